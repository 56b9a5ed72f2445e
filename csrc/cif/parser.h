// A CIF text to its first structure, accepted or refused as pymatgen's Structure.from_str(text, fmt="cif")
// does.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "arena.h"
#include "block.h"
#include "scan.h"
#include "status.h"
#include "structure.h"

namespace catmllm::cif {

// Reused from text to text; one per thread. After parse() `structure` views into the text and the arena.
class Parser {
  public:
    // `text`: bytes as characters.h describes them. The result is in structure() when the reason is kNone.
    Reason parse(const char* text, std::size_t size);
    const Structure& structure() const { return structures_[found_]; }
    // `data_` blocks of the last text
    std::size_t n_blocks() const { return extents_.size(); }

  private:
    struct Extent {
        std::uint32_t begin;  // of `data_`
        std::uint32_t end;
    };
    void find_blocks(const char* text, std::size_t size);
    Reason parse_blocks(const char* text);

    Arena arena_;
    ScanMasks masks_;
    ScanMasks clean_masks_;
    LoopScratch loops_;
    StructureScratch scratch_;
    std::vector<Extent> extents_;
    std::vector<Block> blocks_;
    std::size_t n_blocks_ = 0;
    Structure structures_[2];
    int found_ = 0;
};

}  // namespace catmllm::cif
