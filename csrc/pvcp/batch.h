// Many texts at once: every thread takes the next few, parses, measures and scores them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../cif/status.h"
#include "score.h"

namespace catmllm::pvcp {

// A text as Python stores it: `unit` bytes a character (1: Latin-1 or ASCII, 2, 4).
struct TextRef {
    const void* data = nullptr;
    std::size_t size = 0;  // characters
    int unit = 1;
    bool ascii = true;
    std::uint32_t target = 0;
};

struct CountOut {
    std::uint8_t number;  // 0 for a dummy, whose name is in BatchOut::dummies
    std::uint32_t dummy;
    double amount;
};

// What a thread has produced so far; texts point into it.
struct Piece {
    std::vector<double> frac;
    std::vector<std::int64_t> numbers;
    std::vector<CountOut> counts;
    std::vector<std::string> dummies;
};

struct TextOut {
    cif::Reason reason = cif::Reason::kNone;
    std::uint8_t fields = 0;  // bits: lattice, space group, site loop, duplicate labels
    std::uint32_t piece = 0;
    std::uint32_t n_sites = 0;
    std::uint32_t n_counts = 0;
    std::size_t first_site = 0;
    std::size_t first_count = 0;
    double lattice[9] = {};
};

struct Batch {
    std::vector<TextRef> texts;
    std::vector<Target> targets;
    Weights weights;
    Thresholds thresholds;
    // Filled by run(): kScoreColumns numbers a text go to `rows`, given by the caller.
    std::vector<TextOut> out;
    std::vector<Piece> pieces;

    // Scores all texts with at most `threads` threads (0: as many as the machine has). Never throws.
    void run(double* rows, unsigned threads) noexcept;
};

// True where extract_cif() would return an ASCII text unchanged, up to what stands in front of its first block. False
// says nothing.
bool is_bare_cif(const char* text, std::size_t size);

// Least seconds of each stage over `repeats` runs of one text: scan and tokens of its first block, symmetry
// operations, the whole parse (both included), distance, score.
struct Profile {
    double tokenise = 0;
    double symmetry = 0;
    double parse = 0;
    double distance = 0;
    double score = 0;
    std::uint32_t n_sites = 0;
};
Profile profile(const TextRef& text, int repeats);

// Bytes as characters.h describes them, from a text with characters beyond ASCII.
void mark_characters(const TextRef& text, std::string& bytes);

}  // namespace catmllm::pvcp
