// libFuzzer target: whatever stands around a CIF that strict mode accepts, the answer's CIF is that one. The
// bytes are what stands before and behind, apart from what makes it another's by the rules of
// ../pvcp/extract.h.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "../cif/characters.h"
#include "../cif/number.h"
#include "../cif/parser.h"
#include "../pvcp/extract.h"

namespace {

using namespace catmllm;

const std::string kCell =
    "data_x\n_cell_length_a 5.5\n_cell_length_b 5.5\n_cell_length_c 15\n_cell_angle_alpha "
    "90\n_cell_angle_beta 90\n"
    "_cell_angle_gamma 60\n";
const std::string kSites =
    "loop_\n_atom_site_type_symbol\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_"
    "fract_z\n"
    "_atom_site_occupancy\nPt Pt0 0.0 0.0 0.3 1\nCu Cu1 0.5 0.0 0.3 1\nO O2 0.0 0.0 0.5 1\n";
const std::string kCifs[] = {
    kCell + kSites,
    kCell + "_x\n;\n<think>\n```\n</answer> done\n;\n_y '<|im_end|>'\n" + kSites,
    "data_x\n" + kSites + kCell.substr(7),
    kCell + kSites + "loop_\n_symmetry_equiv_pos_as_xyz\nx,y,z\n'-x, -y, z'\n",
};

// The words of a line that follows the sites might be a row, garbled or not: as many as their loop has
// columns, numbers where it has coordinates, a letter in a name; where a number is not known a name begins
// with a capital. Behind quotes that do not close words go on: of lines with quotes any three numbers and a
// letter.
bool may_be_row(const std::string& line) {
    std::vector<std::string> words(1);
    for (char c : line) {
        if (!cif::is_space_or_unicode(static_cast<unsigned char>(c)))
            words.back() += c;
        else if (!words.back().empty())
            words.emplace_back();
    }
    const auto unknown = [](const std::string& s) { return s == "?" || s == "."; };
    const auto number = [&](const std::string& s) {
        double value;
        return unknown(s) || cif::str2float(s, value);
    };
    const auto letter = [](const std::string& s) {
        return std::any_of(s.begin(), s.end(),
                           [](char c) { return cif::is_alpha(static_cast<unsigned char>(c)); });
    };
    if (line.find_first_of("'\"") != std::string::npos) {
        int numbers = 0;
        for (std::string word : words) {
            while (!word.empty() && (word[0] == '\'' || word[0] == '"')) word.erase(0, 1);
            while (!word.empty() && (word.back() == '\'' || word.back() == '"')) word.pop_back();
            numbers += number(word);
        }
        return numbers >= 3 && letter(line);
    }
    if (words.size() < 6 || words[5].empty()) return false;
    for (std::size_t i = 2; i < 5; ++i)
        if (!number(words[i])) return false;
    const bool known = std::none_of(words.begin() + 2, words.begin() + 5, unknown);
    const auto capital = [](const std::string& s) { return cif::is_upper(static_cast<unsigned char>(s[0])); };
    return (letter(words[0]) || letter(words[1])) && (known || capital(words[0]) || capital(words[1]));
}

// Reasoning, chat turns, CIFs: what stands in them is no surrounding. Letters in lower case. Nor is an
// element's symbol, which may begin a row that was cut off, also behind quotes: those that do not close are
// passed over; nor, behind sites, a line that may be a row.
bool is_excluded(const std::string& text, bool before, bool sites) {
    std::string low = text;
    for (char& c : low)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
    for (const char* word : {"data_", "loop_", "think", "thought", "reason", "rationale", "reflection",
                             "analysis", "scratchpad", "assistant", "model", "final", "inst]", "\\"})
        if (low.find(word) != std::string::npos) return true;
    if (before)
        for (const char* word : {"im_end", "endoftext", "eot", "end", "return", "eom", "eos", "call"})
            if (low.find(word) != std::string::npos) return true;
    for (std::size_t from = 0; sites && from < text.size();) {
        const std::size_t end = std::min(text.find('\n', from), text.size());
        if (may_be_row(text.substr(from, end - from))) return true;
        from = end + 1;
    }
    for (std::size_t i = 0; i < text.size(); ++i) {
        const bool line = i == 0 || text[i - 1] == '\n' || static_cast<unsigned char>(text[i - 1]) <= ' ' ||
                          static_cast<unsigned char>(text[i - 1]) == 0x80 || text[i - 1] == '>' ||
                          text[i - 1] == '\'' || text[i - 1] == '"';
        if (line && (text[i] == '_' || text[i] == ';' || (text[i] >= 'A' && text[i] <= 'Z'))) return true;
    }
    return false;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 2) return 0;
    const std::string& cif = kCifs[data[0] % 4];
    const std::size_t split = 2 + data[1] % (size - 1);
    const std::string before(reinterpret_cast<const char*>(data) + 2, split - 2);
    const std::string behind(reinterpret_cast<const char*>(data) + split, size - split);
    const bool sites_last = data[0] % 4 < 2;
    if (is_excluded(before, true, false) || is_excluded(behind, false, sites_last)) return 0;
    if (&cif == &kCifs[3] && behind.find(',') != std::string::npos) return 0;  // may be another operation

    static cif::Parser parser;
    static pvcp::Extraction memory;
    std::size_t sites = 0;
    double x = 0;
    const pvcp::Reads reads = [&](std::string_view candidate) -> std::size_t {
        if (parser.parse(candidate.data(), candidate.size()) != cif::Reason::kNone) return 0;
        sites = parser.structure().numbers.size();
        x = parser.structure().lattice.rows[0];
        return parser.n_blocks();
    };
    if (reads(cif) != 1) std::abort();
    const std::size_t wanted = sites;
    const double a = x;
    sites = 0;
    const std::string answer = before + "\n" + cif + "\n" + behind;
    (void)pvcp::extract_cif(answer, reads, memory);
    if (sites != wanted || x != a) std::abort();
    return 0;
}
