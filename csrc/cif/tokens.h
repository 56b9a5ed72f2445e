// The token stream of one block, by the rules of pymatgen's CifBlock._process_string.
#pragma once

#include <algorithm>
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

// Bytes [begin, end) of a text without comments, blank lines and non-ASCII characters, in that order of
// removal.
std::string_view cleaned(std::string_view block, Arena& arena);

class Tokenizer {
  public:
    // `text` is clean (see above) and `masks` is its scan; reads [begin, end).
    Tokenizer(const char* text, const ScanMasks& masks, std::uint32_t begin, std::uint32_t end, Arena& arena)
        : text_(text),
          space_(masks.space.data()),
          special_(masks.special.data()),
          position_(begin),
          begin_(begin),
          end_(end),
          arena_(arena) {}

    // No block has more tokens than this.
    std::size_t most_tokens() const { return (end_ - begin_) / 2 + 2; }

    // The next token; false at the end of the block.
    bool next(Token& token) {
        for (;;) {
            const std::uint32_t start = seek_ ? sought_word() : next_edge();
            if (start >= end_) return false;
            const char c = text_[start];
            if (c == '\'' || c == '"' || c == ';') {
                seek_ = true;
                if (c == ';') {
                    if (at_line_start(start)) {
                        if (text_field(start, token)) return true;
                        continue;
                    }
                    seek_ = false;
                } else {
                    if (quoted(start, c, token)) return true;
                    continue;
                }
            }
            std::uint32_t stop = next_edge();
            if (stop > end_) stop = end_;
            token = Token{text_ + start, stop - start, true};
            return true;
        }
    }

    // The plain tokens that come next, up to one that may be more than a value of a loop; the end of what was
    // written.
    Token* plain_values(Token* out) {
        if (seek_) return out;
        for (;;) {
            const std::uint32_t base = word_ << 6;
            const char* text = text_ + base;
            std::uint64_t halt = special_[word_] & edges_ & ~space_[word_];  // special words begin here
            if (end_ - base < 64) halt |= ~std::uint64_t{0} << (end_ - base);
            std::uint64_t taken = halt ? edges_ & ((halt & (0 - halt)) - 1) : edges_;
            edges_ = 0;
            while (taken) {
                const char* start = text + __builtin_ctzll(taken);
                taken &= taken - 1;
                if (taken) {
                    *out++ =
                        Token{start, static_cast<std::uint32_t>(text + __builtin_ctzll(taken) - start), true};
                    taken &= taken - 1;
                } else {  // it ends in a later word of the mask, or where the block does
                    const std::uint32_t stop = halt ? end_ : std::min(next_edge(), end_);
                    *out++ = Token{start, static_cast<std::uint32_t>(text_ + stop - start), true};
                }
            }
            if (halt) {  // back to where that word begins
                seek_ = true;
                position_ = base + static_cast<std::uint32_t>(__builtin_ctzll(halt));
                return out;
            }
            if (edges_ != 0) continue;
            if (((word_ + 1) << 6) >= end_) {
                seek_ = true;
                position_ = end_;
                return out;
            }
            ++word_;
            edges_ = space_[word_] ^ (space_[word_] << 1 | space_[word_ - 1] >> 63);
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
    // Where words begin and end, one after the other: set bits of the mask against itself shifted by one.
    std::uint32_t next_edge() {
        while (edges_ == 0) {
            if ((++word_ << 6) >= end_) {
                --word_;
                return end_;
            }
            edges_ = space_[word_] ^ (space_[word_] << 1 | space_[word_ - 1] >> 63);
        }
        const auto found = (word_ << 6) + static_cast<std::uint32_t>(__builtin_ctzll(edges_));
        edges_ &= edges_ - 1;
        return found;
    }
    // The first word at or after position_, with the edges behind its begin up next.
    std::uint32_t sought_word() {
        const std::uint32_t start = next_word(position_);
        if (start >= end_) return end_;
        seek_ = false;
        word_ = start >> 6;
        const std::uint64_t before = word_ ? space_[word_ - 1] >> 63 : 1;
        edges_ = (space_[word_] ^ (space_[word_] << 1 | before)) & (~std::uint64_t{1} << (start & 63));
        return start;
    }
    bool at_line_start(std::uint32_t p) const;
    std::uint32_t line_end(std::uint32_t p) const;
    bool quoted(std::uint32_t start, char quote, Token& token);
    bool text_field(std::uint32_t start, Token& token);

    const char* text_;
    const std::uint64_t* space_;
    const std::uint64_t* special_;
    std::uint32_t position_;
    std::uint32_t begin_;
    std::uint32_t end_;
    std::uint32_t word_ = 0;  // of the masks, and what is left of its edges
    std::uint64_t edges_ = 0;
    bool seek_ = true;                    // the next word is to be looked for from position_
    std::uint32_t no_close_[2] = {0, 0};  // a quote of this kind does not close before here
    bool after_field_ = false;            // a `;` at position_ opens a field although it is not in column 0
    Arena& arena_;
};

}  // namespace catmllm::cif
