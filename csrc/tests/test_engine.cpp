// Unit tests of the engine without Python: numbers, tokens, operations, lattices, distances, limits. `make
// test-engine` builds them with both sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

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
    CHECK(cif::operation_from_xyz("-x+1/2, y-x, 2*Z", op).ok());
    CHECK(op.rotation[0] == -1 && op.translation[0] == 0.5 && op.rotation[3] == -1 && op.rotation[4] == 1);
    CHECK(op.rotation[8] == 1 && op.translation[2] == 2);
    CHECK(cif::operation_from_xyz("12x,y,z", op).ok() && op.rotation[0] == 12 && op.translation[0] == 1);
    CHECK(cif::operation_from_xyz("1/2x,y,z", op).ok() && op.rotation[0] == 0.5 && op.translation[0] == 1);
    CHECK(cif::operation_from_xyz("x+1..2,y,z", op).outcome == cif::Outcome::kSkipBlock);
    CHECK(cif::operation_from_xyz("x+1/0,y,z", op).outcome == cif::Outcome::kRejectText);
    CHECK(cif::operation_from_xyz("x,y,z,z", op).outcome == cif::Outcome::kRejectText);
    CHECK(cif::operation_from_xyz("", op).ok() && !op.is_identity());
}

double brute_force(const geometry::Lattice& lattice, const std::vector<double>& frac, int reach) {
    double best = 1e300;
    const std::size_t n = frac.size() / 3;
    for (std::size_t a = 0; a < n; ++a)
        for (std::size_t b = 0; b < a; ++b)
            for (int i = -reach; i <= reach; ++i)
                for (int j = -reach; j <= reach; ++j)
                    for (int k = -reach; k <= reach; ++k) {
                        const double f[3] = {frac[3 * a] - frac[3 * b] + i, frac[3 * a + 1] - frac[3 * b + 1] + j,
                                             frac[3 * a + 2] - frac[3 * b + 2] + k};
                        double d = 0;
                        for (int c = 0; c < 3; ++c) {
                            const double x =
                                f[0] * lattice.rows[c] + f[1] * lattice.rows[3 + c] + f[2] * lattice.rows[6 + c];
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
        "data_x\n_cell_length_a 4\n_cell_length_b 4\n_cell_length_c 4\n_cell_angle_alpha 90\n_cell_angle_beta 90\n"
        "_cell_angle_gamma 90\nloop_\n_atom_site_label\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n";
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

void test_bare() {
    const auto bare = [](const std::string& text) { return pvcp::is_bare_cif(text.data(), text.size()); };
    CHECK(bare("Ok:\ndata_x\nloop_\n_a\nPt 0.5 0.5\n"));
    CHECK(!bare("```\ndata_x\nPt 0.5\n```") && !bare("<think>\ndata_x\nPt 0.5") && !bare("data_x\nPt 1\n</s>"));
    CHECK(bare("data_CO</s>Pt (1 1 1)\nPt 0.5\n") && !bare("data_x\nPt 1\nI hope this is 1 good answer") &&
          !bare(""));
}

}  // namespace

int main() {
    test_numbers();
    test_tokens();
    test_operations();
    test_distances();
    test_parser();
    test_bare();
    if (failures) {
        std::printf("%d failures\n", failures);
    } else {
        std::printf("all tests pass; the scan uses %s\n", cif::scan_level());
    }
    return failures != 0;
}
