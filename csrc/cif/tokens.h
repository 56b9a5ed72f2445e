// The token stream of one block, by the rules of pymatgen's CifBlock._process_string.
#pragma once

#include <cstdint>
#include <string_view>

#include "arena.h"
#include "scan.h"

namespace catmllm::cif {

struct Token {
    const char* data;
    std::uint32_t size;
    bool plain;  // neither quoted nor a text field: only these can be keys, `loop_` or `_eof`
    std::string_view view() const { return {data, size}; }
};

// Bytes [begin, end) of a text without comments, blank lines and non-ASCII characters, in that order of removal.
std::string_view cleaned(std::string_view block, Arena& arena);

class Tokenizer {
  public:
    // `text` is clean (see above) and `masks` is its scan; reads [begin, end).
    Tokenizer(const char* text, const ScanMasks& masks, std::uint32_t begin, std::uint32_t end, Arena& arena)
        : text_(text), space_(masks.space.data()), position_(begin), begin_(begin), end_(end), arena_(arena) {}

    // The next token; false at the end of the block.
    bool next(Token& token) {
        for (;;) {
            const std::uint32_t start = next_word(position_);
            if (start >= end_) return false;
            const char c = text_[start];
            if (c == '\'' || c == '"') {
                if (quoted(start, c, token)) return true;
                continue;
            }
            if (c == ';' && at_line_start(start)) {
                if (text_field(start, token)) return true;
                continue;
            }
            const std::uint32_t stop = next_space(start);
            token = Token{text_ + start, stop - start, true};
            position_ = stop;
            return true;
        }
    }

  private:
    std::uint32_t next_word(std::uint32_t from) const {
        std::uint32_t w = from >> 6;
        std::uint64_t bits = ~space_[w] & (~std::uint64_t{0} << (from & 63));
        while (bits == 0) {
            if ((++w << 6) >= end_) return end_;
            bits = ~space_[w];
        }
        return (w << 6) + static_cast<std::uint32_t>(__builtin_ctzll(bits));
    }
    std::uint32_t next_space(std::uint32_t from) const {
        std::uint32_t w = from >> 6;
        std::uint64_t bits = space_[w] & (~std::uint64_t{0} << (from & 63));
        while (bits == 0) {
            if ((++w << 6) >= end_) return end_;
            bits = space_[w];
        }
        const std::uint32_t found = (w << 6) + static_cast<std::uint32_t>(__builtin_ctzll(bits));
        return found < end_ ? found : end_;
    }
    bool at_line_start(std::uint32_t p) const;
    std::uint32_t line_end(std::uint32_t p) const;
    bool quoted(std::uint32_t start, char quote, Token& token);
    bool text_field(std::uint32_t start, Token& token);

    const char* text_;
    const std::uint64_t* space_;
    std::uint32_t position_;
    std::uint32_t begin_;
    std::uint32_t end_;
    std::uint32_t no_close_[2] = {0, 0};  // a quote of this kind does not close before here
    bool after_field_ = false;            // a `;` at position_ opens a field although it is not in column 0
    Arena& arena_;
};

}  // namespace catmllm::cif
