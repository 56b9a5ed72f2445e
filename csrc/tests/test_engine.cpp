// Unit tests of the engine without Python: numbers, tokens, operations, lattices, distances, limits. `make
// test-engine` builds them with both sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../cif/characters.h"
#include "../cif/decimals.h"
#include "../cif/number.h"
#include "../cif/parser.h"
#include "../cif/symmetry.h"
#include "../cif/tokens.h"
#include "../geometry/min_distance.h"
#include "../pvcp/batch.h"

using namespace catmllm;

namespace {

int failures = 0;

void check(bool condition, const char* what, int line) {
    if (condition) return;
    ++failures;
    std::printf("line %d: %s\n", line, what);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

double number(std::string_view text) {
    double value = 0;
    return cif::str2float(text, value) ? value : -12345.0;
}

void test_numbers() {
    CHECK(number("0.123456789012345") == 0.123456789012345);
    CHECK(number("123456789.123456789") == 123456789.123456789);
    CHECK(number("-0.12264095") == -0.12264095);
    CHECK(number("5.") == 5 && number(".5") == 0.5 && number("-.5") == -0.5 && number("0012.50") == 12.5);
    CHECK(number("1e5") == 1e5 && number("1_0.0_1") == 10.01 && number("+3") == 3);
    CHECK(number("0.2(3)e5") == 0.2 && number("0.5(3") == 0.5 && number("4.(") == -12345 && number(".") == 0);
    CHECK(std::isinf(number("1e400")) && number("1e-400") == 0 && std::isnan(number("NaN")) &&
          std::isinf(number("-inf")));
    for (const char* bad :
         {"", "-", "+-1", "1__0", "_1", "1_", "0x10", "1e", "e5", "..", "1.2.3", "?", "1,5", "\x01"})
        CHECK(number(bad) == -12345);
    // every spelling that plain_decimal takes is what strtod reads
    std::mt19937 random(1);
    for (int i = 0; i < 200000; ++i) {
        std::string text;
        const int whole = static_cast<int>(random() % 7);
        const int decimals = static_cast<int>(random() % 11);
        if (random() % 3 == 0) text += '-';
        for (int k = 0; k < whole; ++k) text += static_cast<char>('0' + random() % 10);
        if (random() % 4) text += '.';
        for (int k = 0; k < decimals; ++k) text += static_cast<char>('0' + random() % 10);
        double value = 0;
        if (cif::plain_decimal(text.data(), text.data() + text.size(), value))
            CHECK(value == std::strtod(text.c_str(), nullptr));
    }
}

std::vector<std::string> tokens_of(const std::string& text) {
    cif::Arena arena;
    cif::ScanMasks masks;
    const std::string clean(cif::cleaned(text, arena));
    cif::scan(clean.data(), clean.size(), masks);
    cif::Tokenizer tokens(clean.data(), masks, 0, static_cast<std::uint32_t>(clean.size()), arena);
    std::vector<std::string> found;
    cif::Token token{};
    while (tokens.next(token)) found.emplace_back((token.plain ? "" : "~") + std::string(token.view()));
    return found;
}

void test_tokens() {
    using List = std::vector<std::string>;
    CHECK((tokens_of("data_x a 'b c' \"d'\" e") == List{"data_x", "a", "~b c", "~d'", "e"}));
    CHECK((tokens_of("data_x 'it's' ok'") == List{"data_x", "~it's", "ok'"}));
    CHECK((tokens_of("data_x 'open\nnext") == List{"data_x", "open", "next"}));
    CHECK((tokens_of("data_x\n; one \n two\n\n;three\n") == List{"data_x", "~one  two", "three"}));
    CHECK((tokens_of("data_x\n;a\n; ;b\n;c\n") == List{"data_x", "~a", "~b", "c"}));
    CHECK((tokens_of("data_x\n;never\nclosed") == List{"data_x"}));
    CHECK((tokens_of("data_x # gone 'a'\nb#c #d\n#e\nf") == List{"data_x", "b#c", "f"}));
    CHECK((tokens_of(std::string("data_x a\x80") + "b \x81 c") == List{"data_x", "ab", "c"}));
}

void test_operations() {
    cif::AffineOperation op;
    cif::KnownComponents known;
    CHECK(cif::operation_from_xyz("-x+1/2, y-x, 2*Z", known, op).ok());
    CHECK(op.rotation[0] == -1 && op.translation[0] == 0.5 && op.rotation[3] == -1 && op.rotation[4] == 1);
    CHECK(op.rotation[8] == 1 && op.translation[2] == 2);
    CHECK(cif::operation_from_xyz("12x,y,z", known, op).ok() && op.rotation[0] == 12 &&
          op.translation[0] == 1);
    CHECK(cif::operation_from_xyz("1/2x,y,z", known, op).ok() && op.rotation[0] == 0.5 &&
          op.translation[0] == 1);
    CHECK(cif::operation_from_xyz("x+1..2,y,z", known, op).outcome == cif::Outcome::kSkipBlock);
    CHECK(cif::operation_from_xyz("x+1/0,y,z", known, op).outcome == cif::Outcome::kRejectText);
    CHECK(cif::operation_from_xyz("x,y,z,z", known, op).outcome == cif::Outcome::kRejectText);
    CHECK(cif::operation_from_xyz("", known, op).ok() && !op.is_identity());
}

double brute_force(const geometry::Lattice& lattice, const std::vector<double>& frac, int reach) {
    double best = 1e300;
    const std::size_t n = frac.size() / 3;
    for (std::size_t a = 0; a < n; ++a)
        for (std::size_t b = 0; b < a; ++b)
            for (int i = -reach; i <= reach; ++i)
                for (int j = -reach; j <= reach; ++j)
                    for (int k = -reach; k <= reach; ++k) {
                        const double f[3] = {frac[3 * a] - frac[3 * b] + i,
                                             frac[3 * a + 1] - frac[3 * b + 1] + j,
                                             frac[3 * a + 2] - frac[3 * b + 2] + k};
                        double d = 0;
                        for (int c = 0; c < 3; ++c) {
                            const double x = f[0] * lattice.rows[c] + f[1] * lattice.rows[3 + c] +
                                             f[2] * lattice.rows[6 + c];
                            d += x * x;
                        }
                        best = std::fmin(best, d);
                    }
    return std::sqrt(best);
}

void test_distances() {
    std::mt19937 random(7);
    std::uniform_real_distribution<double> unit(0, 1);
    geometry::DistanceScratch scratch;
    for (int trial = 0; trial < 3000; ++trial) {
        geometry::Lattice lattice{};
        for (int k = 0; k < 3; ++k) lattice.rows[4 * k] = 1 + 9 * unit(random);
        lattice.rows[3] = (unit(random) - 0.5) * 2.4 * lattice.rows[0];
        lattice.rows[6] = (unit(random) - 0.5) * 2.4 * lattice.rows[0];
        lattice.rows[7] = (unit(random) - 0.5) * 2.4 * lattice.rows[4];
        const std::size_t n = 2 + random() % (trial % 10 ? 4 : 14);
        std::vector<double> frac(3 * n);
        for (double& x : frac) x = unit(random);
        const double expected = brute_force(lattice, frac, 5);
        const double found = geometry::min_distance(lattice, frac.data(), n, scratch);
        CHECK(std::fabs(found - expected) < 1e-9 * (1 + expected));
    }
}

void test_parser() {
    const std::string head =
        "data_x\n_cell_length_a 4\n_cell_length_b 4\n_cell_length_c 4\n_cell_angle_alpha "
        "90\n_cell_angle_beta 90\n"
        "_cell_angle_gamma "
        "90\nloop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n";
    cif::Parser parser;
    const auto reason = [&](const std::string& text) { return parser.parse(text.data(), text.size()); };
    CHECK(reason(head + "Pt 0 0 0\nO 0.5 0.5 0.5\n") == cif::Reason::kNone);
    CHECK(parser.structure().numbers.size() == 2 && parser.structure().numbers[0] == 78);
    CHECK(reason(head + "Pt 0 0 0\nO 1.0 0 0\n") == cif::Reason::kOccupancy);
    CHECK(reason(head + "Pt 0 0\n") == cif::Reason::kLoop);
    CHECK(reason(head) == cif::Reason::kLoop);
    CHECK(reason("") == cif::Reason::kNoBlock);
    CHECK(reason("data_") == cif::Reason::kSites || reason("data_") == cif::Reason::kCell);
    for (std::size_t n = 0; n < head.size(); ++n) (void)reason(head.substr(0, n));
    CHECK(reason(std::string(cif::Limits::kTextBytes + 1, 'x')) == cif::Reason::kLimit);
}

std::string cell(int a) {
    return "data_x\n_cell_length_a " + std::to_string(a) +
           "\n_cell_length_b 4\n_cell_length_c 4\n_cell_angle_alpha 90\n_cell_angle_beta "
           "90\n_cell_angle_gamma 90\n"
           "loop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n";
}

void test_extraction() {
    cif::Parser parser;
    pvcp::Extraction memory;
    const pvcp::Reads reads = [&](std::string_view text) -> std::size_t {
        return parser.parse(text.data(), text.size()) == cif::Reason::kNone ? parser.n_blocks() : 0;
    };
    const auto found = [&](std::string_view answer) {
        return std::string(pvcp::extract_cif(answer, reads, memory));
    };
    const std::string cif = cell(4) + "Pt 0 0 0.5\nCu 0.5 0.5 0.25\n";
    const std::string draft = cell(5) + "Ni 0 0 0.5\n";
    const std::string half = cell(5) + "Ni 0 0\n";
    CHECK(found(cif) == cif && found("Ok:\n" + cif) == cif && found("Ok: " + cif) == cif);
    CHECK(found("```cif\n" + cif + "```\nDone, it is good.") == cif);
    CHECK(found("<THINK>" + draft + "</Think>" + cif) == cif && found(draft + "\n</think>" + cif) == cif);
    CHECK(found("<|im_start|>assistant\n" + cif + "<|im_end|>\n" + draft) == cif);
    CHECK(found(cif + "</s>\n") == cif && found(cif + "I hope this helps") == cif &&
          found(cif + "Done.") == cif);
    CHECK(found(draft + "Better:\n" + cif) == cif && found(cif + "Again:\n" + half) == cif);
    CHECK(found(half + "Better it is:\n" + cif) == cif && found(half + cif) == cif && found(half) == half);
    CHECK(found("").empty() && found("<think>").empty() && found("no block") == "no block");
    CHECK(found("{\"cif\": \"" + [&] {
              std::string escaped;
              for (char c : cif) escaped += c == '\n' ? std::string("\\n") : std::string(1, c);
              return escaped;
          }() + "\"}") == cif);
}

// Every instruction set sees the same bits.
void test_scans() {
    std::mt19937 random(3);
    for (int round = 0; round < 2000; ++round) {
        std::string text(random() % 300, ' ');
        for (char& c : text)
            c = random() % 4 ? " \n\td#;_l'\"x0\x1c\x1f\x80\x81"[random() % 17] : static_cast<char>(random());
        cif::ScanMasks masks;
        cif::ScanMasks portable;
        CHECK(cif::scan_by("portable", text.data(), text.size(), portable));
        for (std::size_t i = 0; i < text.size(); ++i)
            CHECK((portable.space[i / 64] >> i % 64 & 1) ==
                  cif::is_space(static_cast<unsigned char>(text[i])));
        for (const char* level : {"sse2", "avx2", "avx512"}) {
            if (!cif::scan_by(level, text.data(), text.size(), masks)) continue;
            CHECK(masks.space == portable.space && masks.d_starts == portable.d_starts);
            CHECK(masks.special == portable.special && masks.has_hash == portable.has_hash);
            CHECK(masks.has_semicolon == portable.has_semicolon && masks.has_high == portable.has_high);
        }
    }
}

// Numbers of a column are those of their tokens, and strtod's.
void test_columns() {
    std::mt19937 random(4);
    for (int round = 0; round < 20000; ++round) {
        std::string text = "data_x loop_ _atom_site_fract_x";
        std::size_t begins[9];
        std::size_t ends[9];
        for (int i = 0; i < 9; ++i) {
            text += ' ';
            begins[i] = text.size();
            if (random() % 4 == 0) text += '-';
            const std::size_t digits = 1 + random() % 17;
            const std::size_t point = random() % 20;
            for (std::size_t k = 0; k < digits; ++k) {
                if (k == point) text += '.';
                text += random() % 60 ? static_cast<char>('0' + random() % 10) : "+_e.-x/:\x0f"[random() % 9];
            }
            ends[i] = text.size();
        }
        cif::Token tokens[9];
        for (int i = 0; i < 9; ++i)
            tokens[i] = {text.data() + begins[i], static_cast<std::uint32_t>(ends[i] - begins[i]), i != 4};
        double values[9];
        cif::plain_decimals(tokens, 1, 9, values, 1);
        for (int i = 0; i < 9; ++i) {
            const cif::Token& t = tokens[i];
            double value = 0;
            const bool read = t.plain && cif::plain_decimal(t.data, t.data + t.size, value);
            CHECK(read ? value == values[i] : std::isnan(values[i]));
            if (read) CHECK(value == std::strtod(std::string(t.view()).c_str(), nullptr));
        }
    }
}

}  // namespace

int main() {
    test_numbers();
    test_tokens();
    test_operations();
    test_distances();
    test_parser();
    test_extraction();
    test_scans();
    test_columns();
    if (failures) {
        std::printf("%d failures\n", failures);
    } else {
        std::printf("all tests pass; the scan uses %s\n", cif::scan_level());
    }
    return failures != 0;
}
