// Where a CIF inside other text ends, decided by CIF's own grammar.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace catmllm::pvcp {

constexpr std::size_t kNowhere = std::string_view::npos;

inline unsigned char byte(char c) { return static_cast<unsigned char>(c); }

struct Word {
    std::string_view text;
    bool quoted;
};

// What a column of a loop holds.
enum class Kind : std::uint8_t { kAny, kName, kNumber, kCoordinate, kSymbol, kLabel, kOperation };

// Memory of length_of_cif, reused from text to text.
struct LineScratch {
    std::vector<Kind> kinds;
    std::vector<Word> words;
};

// The length of the CIF that begins at s[0], a `data_`: up to the first line that cannot belong to it.
//
// A line belongs if it is empty, a comment, in a text field, begins with a key, `loop_` or the value of a key
// before, or is a row of the loop before it: its values are of the kind that their columns hold (numbers in
// columns of numbers, an element in the column of symbols). A damaged row, too short or too long but of the
// right kinds, belongs too: nothing is repaired. A line that does not belong ends the CIF, unless a key or a
// `loop_` begins a later line, or a whole row of sites follows it in the same paragraph (behind what may
// be rows that are garbled, in any): then it stands inside. A `data_` behind such a line begins another CIF;
// a `data_` behind a row is a further block. So does one inside a line, at `other`, behind such a line.
std::size_t length_of_cif(std::string_view s, LineScratch& scratch, std::size_t other = kNowhere);

// Looks like a whole row of a site loop: an element first, then at least three numbers, one of them last.
bool is_site_row(std::string_view line);

}  // namespace catmllm::pvcp
