// Why a text or a block of it is refused, and how far that reaches.
#pragma once

#include <cstdint>

namespace catmllm::cif {

enum class Reason : std::uint8_t {
    kNone = 0,
    kNoBlock,      // no `data_` at the start of a line
    kLoop,         // a loop whose values are no multiple of its columns
    kCell,         // lattice parameters missing, unreadable or without thickness
    kSites,        // no site, or a site loop without the columns it needs
    kNumber,       // a coordinate that is no number
    kOccupancy,    // occupancies of one site sum to more than 1 (a repeated row does)
    kSymmetry,     // symmetry operations that cannot be read
    kMagnetic,     // magnetic structures beyond explicit operations
    kUnsupported,  // anything else that pymatgen refuses
    kLimit,        // larger than the engine's limits
};

// pymatgen goes on to the next block after KeyError and ValueError (kSkipBlock); any other exception ends the text.
enum class Outcome : std::uint8_t { kOk, kSkipBlock, kRejectText };

struct Status {
    Outcome outcome = Outcome::kOk;
    Reason reason = Reason::kNone;
    bool ok() const { return outcome == Outcome::kOk; }
};

inline Status ok() { return {}; }
inline Status skip_block(Reason reason) { return {Outcome::kSkipBlock, reason}; }
inline Status reject_text(Reason reason) { return {Outcome::kRejectText, reason}; }

const char* reason_name(Reason reason);

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
