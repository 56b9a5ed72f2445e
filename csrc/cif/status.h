// How far it reaches that a text or a block of it is refused, and the limits.
#pragma once

#include <cstdint>

#include "reasons.h"

namespace catmllm::cif {

// pymatgen goes on to the next block after KeyError and ValueError (kSkipBlock); any other exception ends the
// text.
enum class Outcome : std::uint8_t { kOk, kSkipBlock, kRejectText };

struct Status {
    Outcome outcome = Outcome::kOk;
    Reason reason = Reason::kNone;
    bool ok() const { return outcome == Outcome::kOk; }
};

inline Status ok() { return {}; }
inline Status skip_block(Reason reason) { return {Outcome::kSkipBlock, reason}; }
inline Status reject_text(Reason reason) { return {Outcome::kRejectText, reason}; }

// Beyond these a text is refused with Reason::kLimit: bounded time and memory whatever a model writes.
struct Limits {
    static constexpr std::uint32_t kTextBytes = 1u << 24;
    static constexpr std::uint32_t kImages = 2'000'000;  // rows x symmetry operations
    static constexpr std::uint32_t kSites = 200'000;
    static constexpr std::uint32_t kOperations = 100'000;
    static constexpr std::uint32_t kCompositions = 1024;  // different species, different site compositions
    static constexpr std::uint32_t kColumns = 1024;       // of one loop
    static constexpr std::uint32_t kBlocks = 10'000;
    static constexpr std::uint32_t kChain = 20'000;  // sites of one hash cell
};

}  // namespace catmllm::cif
