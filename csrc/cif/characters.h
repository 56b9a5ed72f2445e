// Character classes of Python's `str` methods and of the `re` module, on the bytes the parser works on.
//
// Texts are ASCII bytes. Of other characters only two facts matter (pymatgen deletes them after looking for
// comments and blank lines), so they come in as kUnicodeSpace (matches `\s`) or kUnicodeOther, whatever their
// code point.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

#if !defined(__GNUC__) && !defined(__clang__)
#error "the engine needs GCC or Clang: it uses their vectors and their bit-counting functions"
#endif

namespace catmllm::cif {

constexpr unsigned char kUnicodeSpace = 0x80;
constexpr unsigned char kUnicodeOther = 0x81;

inline bool is_space(unsigned char c) { return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x1f); }
inline bool is_space_or_unicode(unsigned char c) { return is_space(c) || c == kUnicodeSpace; }
// str.splitlines: \x1f is a space but no line break.
inline bool is_line_break(unsigned char c) { return (c >= 10 && c <= 13) || (c >= 0x1c && c <= 0x1e); }
inline bool is_digit(unsigned char c) { return c >= '0' && c <= '9'; }
inline bool is_upper(unsigned char c) { return c >= 'A' && c <= 'Z'; }
inline bool is_lower(unsigned char c) { return c >= 'a' && c <= 'z'; }
inline bool is_alpha(unsigned char c) { return is_upper(c) || is_lower(c); }
inline char to_lower(unsigned char c) { return static_cast<char>(is_upper(c) ? c + 32 : c); }
inline char to_upper(unsigned char c) { return static_cast<char>(is_lower(c) ? c - 32 : c); }

inline std::string_view strip(std::string_view s) {
    while (!s.empty() && is_space(static_cast<unsigned char>(s.front()))) s.remove_prefix(1);
    while (!s.empty() && is_space(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
    return s;
}

inline bool starts_with(std::string_view s, std::string_view prefix) {
    return s.size() >= prefix.size() && std::memcmp(s.data(), prefix.data(), prefix.size()) == 0;
}

// Eight bytes as a number, the first in the lowest byte.
inline std::uint64_t word_at(const char* p) {
    std::uint64_t word;
    std::memcpy(&word, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

// The same of 1 to 8 bytes, zeros behind them, by loads that stay inside.
inline std::uint64_t left_word(const char* p, std::size_t size) {
    if (size == 8) return word_at(p);
    const auto byte = [&](std::size_t i) { return std::uint64_t{static_cast<unsigned char>(p[i])}; };
    if (size >= 4) {
        std::uint32_t low, high;
        std::memcpy(&low, p, 4);
        std::memcpy(&high, p + size - 4, 4);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        low = __builtin_bswap32(low);
        high = __builtin_bswap32(high);
#endif
        return low | std::uint64_t{high} << (8 * (size - 4));
    }
    return byte(0) | byte(size >> 1) << (8 * (size >> 1)) | byte(size - 1) << (8 * (size - 1));
}

}  // namespace catmllm::cif
