// Many texts at once: every thread takes the next few, finds the CIF in each, parses, measures and scores it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../cif/parser.h"
#include "extract.h"
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

struct TextOut {
    cif::Reason reason = cif::Reason::kNone;
    std::uint8_t fields = 0;  // bits: lattice, space group, site loop, duplicate labels
};

// What a thread needs to read texts, its memory reused from text to text.
class Reader {
  public:
    // Finds the CIF in a text and reads it; the result is in structure() when the reason is kNone. Throws
    // std::bad_alloc.
    cif::Reason read(const TextRef& text, bool extract);
    const cif::Structure& structure() const { return parser_.structure(); }
    // What was read, as bytes of characters.h and as parts of the text; valid until the next call.
    std::string_view cif() const { return cif_; }
    const std::vector<Span>& parts() const { return extraction_.parts; }

  private:
    cif::Parser parser_;
    std::string bytes_;
    Extraction extraction_;
    std::string_view cif_;
};

// The calling thread's own; a new one after a giant text, so that memory is given back.
Reader& reader_of_this_thread();
void forget_giant(const TextRef& text);

struct Batch {
    std::vector<TextRef> texts;
    std::vector<Target> targets;
    Weights weights;
    Thresholds thresholds;
    bool extract = true;
    std::vector<TextOut> out;  // filled by run()

    // Scores all texts with at most `threads` threads (0: as many as the machine has): kScoreColumns numbers
    // a text to `rows`. Throws std::bad_alloc before anything is done.
    void run(double* rows, unsigned threads);
};

// Least seconds of each stage over `repeats` runs of one text: finding the CIF, scan and tokens of its first
// block, symmetry operations, the whole parse but for the distance (both before included), distance, score.
struct Profile {
    double extract = 0;
    double tokenise = 0;
    double symmetry = 0;
    double parse = 0;
    double distance = 0;
    double score = 0;
    std::uint32_t n_sites = 0;
};
Profile profile(const TextRef& text, int repeats);

}  // namespace catmllm::pvcp
