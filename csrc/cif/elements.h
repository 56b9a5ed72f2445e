// Elements and the symbols of atom sites, by pymatgen's rules.
#pragma once

#include <cstdint>
#include <string_view>

namespace catmllm::cif {

struct Element {
    char symbol[3];
    std::uint8_t number;
    std::uint8_t isotope;      // 1 for D and T, which are elements of their own with the symbol H
    double mass;               // amu
    double electronegativity;  // Pauling's; kNoElectronegativity where there is none
};

constexpr double kNoElectronegativity = 99;  // above all others; as in generate_tables.py

constexpr int kNoElement = -1;
constexpr int kElementSlots = 120;

const Element& element(int index);

// Index of the element with exactly this symbol, or kNoElement.
int find_element(char first, char second);

// What a type symbol or label names: an element, a dummy species (`dummy`, title case kept as written), or
// nothing
// (`nothing`: the site is silently dropped).
struct Symbol {
    enum Kind : std::uint8_t { kElement, kDummy, kNothing };
    Kind kind = kNothing;
    int element = kNoElement;
    std::string_view dummy;
};

// CifParser._parse_symbol; false for the empty string, which is an IndexError there.
bool parse_symbol(std::string_view text, Symbol& symbol);

// get_num_implicit_hydrogens
inline int implicit_hydrogens(std::string_view text) {
    const std::string_view start = text.substr(0, 3);
    return start == "Wat" || start == "wat" ? 2 : start == "O-H" ? 1 : 0;
}

}  // namespace catmllm::cif
