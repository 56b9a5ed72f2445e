// Character classes of Python's `str` methods and of the `re` module, on the bytes the parser works on.
//
// Texts are ASCII bytes. Of other characters only two facts matter (pymatgen deletes them after looking for comments
// and blank lines), so they come in as kUnicodeSpace (matches `\s`) or kUnicodeOther, whatever their code point.
#pragma once

#include <cstdint>
#include <string_view>

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
    return s.size() >= prefix.size() && s.compare(0, prefix.size(), prefix) == 0;
}

}  // namespace catmllm::cif
