// Rounding without a call: the portable instruction set has none for it, and these sit in the innermost
// loops.
#pragma once

#include <cmath>

namespace catmllm::geometry {

// std::rint for |x| < 2^51: adding 1.5 * 2^52 leaves whole numbers, ties to even. Larger |x| and nan go to
// std::rint.
inline double round_even(double x) {
    constexpr double kMagic = 6755399441055744.0;
    if (!(std::fabs(x) < 2251799813685248.0)) return std::rint(x);
    return (x + kMagic) - kMagic;
}

inline double floor_of(double x) {
    if (!(std::fabs(x) < 2251799813685248.0)) return std::floor(x);
    const double r = round_even(x);
    return r > x ? r - 1.0 : r;
}

}  // namespace catmllm::geometry
