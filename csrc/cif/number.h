// Numbers as Python's float() and pymatgen's str2float read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace catmllm::cif {

// float(text): surrounding space, sign, `_` between digits, inf / infinity / nan; false for what raises ValueError.
bool python_float(std::string_view text, double& value);

// str2float(text): an uncertainty in brackets is cut off together with everything behind it, a lone "." is 0.
bool str2float(std::string_view text, double& value);

// Like str2float for the commonest spelling, at most 15 digits with or without a point; false says nothing, str2float
// decides. The last eight digits are read as one word where there are eight.
inline bool plain_decimal(const char* p, const char* end, double& value) {
    static constexpr double kPowers[] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                         1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    const bool negative = p < end && *p == '-';
    p += negative;
    const auto size = static_cast<std::size_t>(end - p);
    if (size - 1 > 15) return false;  // 15 digits and a point are exact in a double
    std::uint64_t mantissa = 0;
    const char* tail = end;
    std::uint64_t last_eight = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    if (size >= 9) {
        std::uint64_t word;
        std::memcpy(&word, end - 8, 8);
        const std::uint64_t high = 0xF0F0F0F0F0F0F0F0ull;
        if (((word & high) | (((word + 0x0606060606060606ull) & high) >> 4)) == 0x3333333333333333ull) {
            word -= 0x3030303030303030ull;
            word = word * 10 + (word >> 8);
            last_eight = ((word & 0x000000FF000000FFull) * 0x000F424000000064ull +
                          ((word >> 16) & 0x000000FF000000FFull) * 0x0000271000000001ull) >>
                         32;
            tail = end - 8;
        }
    }
#endif
    const char* q = p;
    const char* point = nullptr;
    for (; q < tail; ++q) {
        const auto digit = static_cast<unsigned>(static_cast<unsigned char>(*q)) - '0';
        if (digit <= 9) {
            mantissa = mantissa * 10 + digit;
        } else if (*q == '.' && point == nullptr) {
            point = q;
        } else {
            return false;
        }
    }
    if (tail != end) mantissa = mantissa * 100'000'000 + last_eight;
    std::size_t decimals = 0;
    if (point != nullptr) {
        if (size == 1) return false;
        decimals = static_cast<std::size_t>(end - point - 1);
    } else if (size > 15) {
        return false;
    }
    value = static_cast<double>(mantissa) / kPowers[decimals];  // one correctly rounded division
    if (negative) value = -value;
    return true;
}

}  // namespace catmllm::cif
