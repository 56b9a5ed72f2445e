#include "tokens.h"

#include <cstring>

#include "characters.h"

namespace catmllm::cif {

// Three passes, as the three substitutions of _process_string; each may change what the next one sees.
std::string_view cleaned(std::string_view block, Arena& arena) {
    const std::size_t n = block.size();
    char* uncommented = arena.allocate(n + 1);
    std::size_t m = 0;
    for (std::size_t i = 0; i < n;) {  // re.sub(r"(\s|^)#.*$", "")
        const auto c = static_cast<unsigned char>(block[i]);
        if (is_space_or_unicode(c) && i + 1 < n && block[i + 1] == '#') {
            const void* eol = std::memchr(block.data() + i + 1, '\n', n - i - 1);
            i = eol ? static_cast<std::size_t>(static_cast<const char*>(eol) - block.data()) : n;
        } else {
            uncommented[m++] = static_cast<char>(c);
            ++i;
        }
    }
    char* clean = arena.allocate(m + 1);
    std::size_t k = 0;
    bool line_start = true;
    for (std::size_t i = 0; i < m;) {
        if (line_start) {  // re.sub(r"^\s*\n", ""): the white space up to its last newline
            std::size_t j = i;
            std::size_t resume = i;
            while (j < m && is_space_or_unicode(static_cast<unsigned char>(uncommented[j])))
                if (uncommented[j++] == '\n') resume = j;
            i = resume;
            line_start = false;
            if (i >= m) break;
        }
        const auto c = static_cast<unsigned char>(uncommented[i++]);
        if (c < 0x80) clean[k++] = static_cast<char>(c);
        line_start = c == '\n';
    }
    return {clean, k};
}

bool Tokenizer::at_line_start(std::uint32_t p) const {
    if (after_field_ && p == position_) return true;
    return p > begin_ && is_line_break(static_cast<unsigned char>(text_[p - 1]));
}

std::uint32_t Tokenizer::line_end(std::uint32_t p) const {
    while (p < end_ && !is_line_break(static_cast<unsigned char>(text_[p]))) ++p;
    return p;
}

// '(.*?)'(?!\S) on the rest of the line: the closing quote is the last character of a word. An opening quote
// that does not close is passed over.
bool Tokenizer::quoted(std::uint32_t start, char quote, Token& token) {
    after_field_ = false;
    std::uint32_t& no_close = no_close_[quote == '"'];
    std::uint32_t stop = start;
    while (start >= no_close) {
        stop = std::min(next_edge(), end_);
        if (text_[stop - 1] == quote && stop - 1 > start) {
            token = Token{text_ + start + 1, stop - start - 2, false};
            seek_ = false;
            return true;
        }
        const std::uint32_t next = std::min(next_edge(), end_);
        while (stop < next && !is_line_break(static_cast<unsigned char>(text_[stop]))) ++stop;
        if (stop < next || stop >= end_) no_close = stop;
    }
    seek_ = true;
    position_ = start + 1;
    return false;
}

// From `;` at a line start to the line that begins with `;`. False, with everything consumed, when it never
// closes.
bool Tokenizer::text_field(std::uint32_t start, Token& token) {
    after_field_ = false;
    std::uint32_t eol = line_end(start);
    const std::string_view first = strip({text_ + start + 1, eol - start - 1});
    std::size_t size = first.size();
    std::uint32_t p = eol;
    std::uint32_t stop = end_;
    for (bool pass = false;; pass = true) {  // first measures, then copies
        char* out = pass ? arena_.allocate(size + 1) : nullptr;
        std::size_t at = 0;
        if (pass) std::memcpy(out, first.data(), first.size());
        at = first.size();
        p = eol;
        bool closed = false;
        while (p < end_) {
            const bool crlf = text_[p] == '\r' && p + 1 < end_ && text_[p + 1] == '\n';
            p += crlf ? 2 : 1;
            if (p >= end_) break;
            if (text_[p] == ';') {
                closed = true;
                break;
            }
            const std::uint32_t next_eol = line_end(p);
            if (pass) {
                out[at] = ' ';
                std::memcpy(out + at + 1, text_ + p, next_eol - p);
            }
            at += 1 + next_eol - p;
            p = next_eol;
        }
        if (!closed) {
            position_ = end_;
            return false;
        }
        size = at;
        stop = p;
        if (pass) {
            token = Token{out, static_cast<std::uint32_t>(size), false};
            break;
        }
    }
    // The rest of the closing line is tokenised; a `;` that begins it opens the next field.
    position_ = stop + 1;
    const std::uint32_t rest = next_word(position_);
    if (rest < end_ && text_[rest] == ';' && line_end(stop) > rest) {
        position_ = rest;
        after_field_ = true;
    }
    return true;
}

}  // namespace catmllm::cif
