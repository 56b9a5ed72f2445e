// libFuzzer target: whatever stands around a CIF that strict mode accepts, the answer's CIF is that one. The
// bytes are what stands before and behind, apart from what makes it another's by the rules of
// ../pvcp/extract.h.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

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

// Reasoning, chat turns, CIFs: what stands in them is no surrounding. Letters in lower case. Nor is an
// element's symbol, which may begin a row that was cut off, also behind quotes: those that do not close are
// passed over; nor a line with a letter and three words that may be numbers, which may be a row that was
// garbled.
bool may_be_row(const std::string& line) {
    int numbers = 0;
    bool letter = false;
    bool begins = true;
    for (char c : line) {
        numbers += begins && ((c >= '0' && c <= '9') || std::string("+-.?iInN").find(c) != std::string::npos);
        letter |= (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
        const auto byte = static_cast<unsigned char>(c);
        begins = byte <= ' ' || byte == 0x80 || c == '\'' || c == '"';
    }
    return letter && numbers >= 3;
}

bool is_excluded(const std::string& text, bool before) {
    std::string low = text;
    for (char& c : low)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
    for (const char* word : {"data_", "loop_", "think", "thought", "reason", "rationale", "reflection",
                             "analysis", "scratchpad", "assistant", "model", "final", "inst]", "\\"})
        if (low.find(word) != std::string::npos) return true;
    if (before)
        for (const char* word : {"im_end", "endoftext", "eot", "end", "return", "eom", "eos"})
            if (low.find(word) != std::string::npos) return true;
    for (std::size_t from = 0; from < text.size();) {
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
    if (is_excluded(before, true) || is_excluded(behind, false)) return 0;
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
