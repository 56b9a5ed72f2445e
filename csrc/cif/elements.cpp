#include "elements.h"

#include <cstring>

#include "characters.h"
#include "tables.h"

namespace catmllm::cif {
namespace {

struct ElementTable {
    std::int8_t index[26][27];  // first letter, second letter (0: none)
    ElementTable() {
        std::memset(index, kNoElement, sizeof index);
        for (std::size_t i = 0; i < sizeof tables::kElements / sizeof *tables::kElements; ++i) {
            const char* symbol = tables::kElements[i].symbol;
            index[symbol[0] - 'A'][symbol[1] ? symbol[1] - 'a' + 1 : 0] = static_cast<std::int8_t>(i);
        }
    }
};
const ElementTable kElementTable;
static_assert(sizeof tables::kElements / sizeof *tables::kElements == kElementSlots, "kElementSlots");

}  // namespace

const Element& element(int index) { return tables::kElements[index]; }

int find_element(char first, char second) {
    if (!is_upper(static_cast<unsigned char>(first))) return kNoElement;
    if (second == 0) return kElementTable.index[first - 'A'][0];
    if (!is_lower(static_cast<unsigned char>(second))) return kNoElement;
    return kElementTable.index[first - 'A'][second - 'a' + 1];
}

bool parse_symbol(std::string_view text, Symbol& symbol) {
    if (text.empty()) return false;
    symbol = Symbol();
    const char first = text[0];
    // re.match("Hw|Ow|Wat|wat|OH|OH2|NO3")
    if (first == 'H' || first == 'O' || first == 'W' || first == 'w' || first == 'N') {
        const auto is = [&](std::string_view prefix) { return starts_with(text, prefix); };
        char found = 0;
        if (is("Hw")) found = 'H';
        if (is("Ow") || is("Wat") || is("wat")) found = 'O';
        if (is("NO3")) found = 'N';
        if (found) {
            symbol.kind = Symbol::kElement;
            symbol.element = find_element(found, 0);
            return true;
        }
        if (is("OH")) return true;  // stands for "": dropped
    }
    const char upper = to_upper(static_cast<unsigned char>(first));
    const char second = text.size() > 1 ? text[1] : '\0';
    if (is_alpha(static_cast<unsigned char>(first))) {
        // sym[:2].title() is an element
        int index = kNoElement;
        if (text.size() == 1) {
            index = find_element(upper, 0);
        } else if (is_alpha(static_cast<unsigned char>(second))) {
            index = find_element(upper, to_lower(static_cast<unsigned char>(second)));
        }
        if (index == kNoElement) index = find_element(upper, 0);  // sym[0].upper() is
        if (index != kNoElement) {
            symbol.kind = Symbol::kElement;
            symbol.element = index;
            return true;
        }
    }
    // re.match(r"w?[A-Z][a-z]*"); a leading w is the element W by now
    if (is_upper(static_cast<unsigned char>(first))) {
        std::size_t n = 1;
        while (n < text.size() && is_lower(static_cast<unsigned char>(text[n]))) ++n;
        symbol.kind = Symbol::kDummy;
        symbol.dummy = text.substr(0, n);
    }
    return true;
}

}  // namespace catmllm::cif
