// Numbers as Python's float() and pymatgen's str2float read them.
#pragma once

#include <string_view>

namespace catmllm::cif {

// float(text): surrounding space, sign, `_` between digits, inf / infinity / nan; false for what raises ValueError.
bool python_float(std::string_view text, double& value);

// str2float(text): an uncertainty in brackets is cut off together with everything behind it, a lone "." is 0.
bool str2float(std::string_view text, double& value);

// Like str2float for the commonest spelling; false says nothing, str2float decides.
inline bool plain_decimal(const char* p, const char* end, double& value) {
    static constexpr double kPowers[] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                         1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    const bool negative = p < end && *p == '-';
    p += negative;
    if (end - p > 16 || p == end) return false;  // 15 digits and a point are exact in a double
    unsigned long long mantissa = 0;
    const char* q = p;
    while (q < end && static_cast<unsigned char>(*q - '0') <= 9) mantissa = mantissa * 10 + static_cast<unsigned>(*q++ - '0');
    int decimals = 0;
    if (q < end && *q == '.') {
        const char* fraction = ++q;
        while (q < end && static_cast<unsigned char>(*q - '0') <= 9)
            mantissa = mantissa * 10 + static_cast<unsigned>(*q++ - '0');
        decimals = static_cast<int>(q - fraction);
        if (q - p == 1) return false;
    }
    if (q != end || q - p > 15 + (decimals > 0)) return false;
    value = static_cast<double>(mantissa) / kPowers[decimals];  // one correctly rounded division
    if (negative) value = -value;
    return true;
}

}  // namespace catmllm::cif
