// One pass over the bytes of a text: where white space is, and where a word begins with `d` (a `data_` may
// start there). 64 bytes become one word of bits; the widest vector unit of the machine does it, chosen at
// run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace catmllm::cif {

struct ScanMasks {
    std::vector<std::uint64_t>
        space;  // bit i of word w: byte 64 w + i is white space (bits past the end are set)
    std::vector<std::uint64_t> d_starts;  // bit: the byte is `d` behind white space or at the start
    std::vector<std::uint64_t>
        special;  // bit: the byte is one of _ l ' " ; which begin words that may be no plain value
    bool has_hash = false;
    bool has_semicolon = false;
    bool has_high = false;  // bytes >= 0x80
};

void scan(const char* text, std::size_t size, ScanMasks& masks);

// The instruction set that scan() uses here: "avx512", "avx2", "sse2" or "portable".
const char* scan_level();

// scan() by another instruction set; false where this machine has not got it.
bool scan_by(const char* level, const char* text, std::size_t size, ScanMasks& masks);

}  // namespace catmllm::cif
