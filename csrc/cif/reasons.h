// Why a text is refused, in one table: the codes, what they mean, and an example of each.
// rewards_fast._core.REASONS is made of it, and a test holds that of docs/rewards/reasons.md against that.
#pragma once

#include <cstddef>
#include <cstdint>

namespace catmllm::cif {

#define CATMLLM_REASONS(X)                                                                                   \
    X(kNoBlock, "no_block", "no `data_` block at the start of a line", "`Here is the CIF: ...`")             \
    X(kLoop, "loop", "a loop that is empty, or whose values are not a multiple of its columns",              \
      "a row with a number missing")                                                                         \
    X(kCell, "cell", "cell parameters missing or unreadable, or planes less than 0.01 Å apart",              \
      "`_cell_length_c 0.009`")                                                                              \
    X(kSites, "sites", "no atom left, or a site loop without the columns it needs", "every symbol is `?`")   \
    X(kNumber, "number", "a coordinate that is not a number", "`0.25.1`")                                    \
    X(kOccupancy, "occupancy", "occupancies of one site that sum to more than 1", "the same row twice")      \
    X(kSymmetry, "symmetry", "symmetry operations that cannot be read", "`x+1/0,y,z`")                       \
    X(kMagnetic, "magnetic", "a magnetic structure that is disordered, incommensurate or of no known group", \
      "`_space_group_magn.name_BNS foo`")                                                                    \
    X(kUnsupported, "unsupported", "anything else that pymatgen refuses", "an infinite oxidation state")     \
    X(kLimit, "limit", "larger than the limits of the engine", "20 MB of text")

enum class Reason : std::uint8_t {
    kNone = 0,
#define CATMLLM_REASON(name, code, sentence, example) name,
    CATMLLM_REASONS(CATMLLM_REASON)
#undef CATMLLM_REASON
};

struct ReasonText {
    const char *code, *sentence, *example;
};

// By the number of the reason; that of kNone is empty.
inline constexpr ReasonText kReasons[] = {{"", "", ""},
#define CATMLLM_REASON(name, code, sentence, example) {code, sentence, example},
                                          CATMLLM_REASONS(CATMLLM_REASON)
#undef CATMLLM_REASON
};
inline constexpr std::size_t kReasonCount = sizeof(kReasons) / sizeof(kReasons[0]);

}  // namespace catmllm::cif
