// Numbers as Python's float() and pymatgen's str2float read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "characters.h"

namespace catmllm::cif {

// float(text): surrounding space, sign, `_` between digits, inf / infinity / nan; false for what raises
// ValueError.
bool python_float(std::string_view text, double& value);

// str2float(text): an uncertainty in brackets is cut off together with everything behind it, a lone "." is 0.
bool str2float(std::string_view text, double& value);

namespace digits {

constexpr std::uint64_t kZeros = 0x3030303030303030ull;

inline bool all(std::uint64_t word) {
    const std::uint64_t high = 0xF0F0F0F0F0F0F0F0ull;
    return ((word & high) | (((word + 0x0606060606060606ull) & high) >> 4)) == 0x3333333333333333ull;
}

// Eight digits, the first in the lowest byte.
inline std::uint64_t value(std::uint64_t word) {
    word -= kZeros;
    word = word * 10 + (word >> 8);
    return ((word & 0x000000FF000000FFull) * 0x000F424000000064ull +
            ((word >> 16) & 0x000000FF000000FFull) * 0x0000271000000001ull) >>
           32;
}

// The place of the first point (8: none).
inline unsigned point(std::uint64_t word) {
    const std::uint64_t x = word ^ 0x2E2E2E2E2E2E2E2Eull;
    const std::uint64_t zero = (x - 0x0101010101010101ull) & ~x & 0x8080808080808080ull;
    return zero == 0 ? 8 : static_cast<unsigned>(__builtin_ctzll(zero)) / 8;
}

// The word without its byte `at`, those before it moved up, `first` in front.
inline std::uint64_t without(std::uint64_t word, unsigned at, std::uint64_t first) {
    const std::uint64_t before = (std::uint64_t{1} << (8 * at)) - 1;
    return (word & ~(before << 8 | 0xFF)) | (word & before) << 8 | first;
}

}  // namespace digits

// Like str2float for the commonest spelling, at most 15 digits with or without a point; false says nothing,
// str2float decides. The characters are taken as one or two words of eight, right-aligned, and the point is
// squeezed out.
inline bool plain_decimal(const char* p, const char* end, double& value) {
    static constexpr double kPowers[] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                         1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    const bool negative = p < end && *p == '-';
    p += negative;
    const auto size = static_cast<std::size_t>(end - p);
    if (size - 1 > 15) return false;  // 15 digits and a point are exact in a double
    std::uint64_t mantissa;
    unsigned decimals = 0;
    if (size <= 8) {
        std::uint64_t word = left_word(p, size) << (8 * (8 - size)) | digits::kZeros >> (8 * (size - 1)) >> 8;
        const unsigned point = digits::point(word);
        if (point < 8) {
            if (size == 1) return false;
            decimals = 7 - point;
            word = digits::without(word, point, '0');
        }
        if (!digits::all(word)) return false;
        mantissa = digits::value(word);
    } else {
        std::uint64_t head = word_at(p) << (8 * (16 - size)) | digits::kZeros >> (8 * (size - 9)) >> 8;
        std::uint64_t tail = word_at(end - 8);
        const unsigned point = digits::point(head);
        if (point < 8) {
            decimals = 15 - point;
            head = digits::without(head, point, '0');
        } else if (const unsigned late = digits::point(tail); late < 8) {
            decimals = 7 - late;
            tail = digits::without(tail, late, head >> 56);
            head = head << 8 | '0';
        } else if (size > 15) {
            return false;
        }
        if (!digits::all(head) || !digits::all(tail)) return false;
        mantissa = digits::value(head) * 100'000'000 + digits::value(tail);
    }
    value = static_cast<double>(mantissa) / kPowers[decimals];  // one correctly rounded division
    if (negative) value = -value;
    return true;
}

}  // namespace catmllm::cif
