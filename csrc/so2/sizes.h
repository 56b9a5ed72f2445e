// Sizes and offsets of a message, computed once per call.
#pragma once
#include <cstdint>

#include "so2.h"

namespace catmllm::so2 {

using Index = std::int64_t;

// The rows of an edge, and where each finds its row of the packed Wigner matrices.
struct Rows {
    int lmax, mmax, S, M, half, packed;
    int n[SO2_MAX_LMAX + 1];      // degrees of order m
    int first[SO2_MAX_LMAX + 1];  // row of (m, m)
    int plus[SO2_MAX_LMAX + 1];   // the same where -m is left out
    // by degree: how many rows, which, and where in the packed matrices; in the order m = 0, +1, -1, +2, ...
    int count[SO2_MAX_LMAX + 1], row[SO2_MAX_LMAX + 1][2 * SO2_MAX_LMAX + 1];
    int at[SO2_MAX_LMAX + 1][2 * SO2_MAX_LMAX + 1];

    Rows(int lmax, int mmax, bool only_zero = false)
        : lmax(lmax), mmax(mmax), S((lmax + 1) * (lmax + 1)), packed(0) {
        M = half = 0;
        for (int m = 0; m <= mmax; ++m) {
            n[m] = lmax + 1 - m;
            first[m] = M;
            plus[m] = half;
            M += (m ? 2 : 1) * n[m];
            half += n[m];
        }
        for (int l = 0; l <= lmax; ++l) {
            const int most = l < mmax ? l : mmax, width = 2 * l + 1;
            count[l] = 0;
            for (int m = 0; m <= (only_zero ? 0 : most); ++m)
                for (int sign = 1; sign >= (m ? -1 : 1); sign -= 2) {
                    row[l][count[l]] = first[m] + (sign < 0 ? n[m] : 0) + l - m;
                    at[l][count[l]++] = packed + (most + sign * m) * width;
                }
            packed += (2 * most + 1) * width;
        }
    }
    // Place in the packed matrices of the rows +m and -m of degree l.
    int at_plus(int l, int m) const { return at[l][m == 0 ? 0 : 2 * m - 1]; }
    int at_minus(int l, int m) const { return at[l][2 * m]; }
    // On the way back, for the rows that were cut; its square.
    double lost_square(int l) const { return l > mmax ? (2 * l + 1.0) / (2 * mmax + 1.0) : 1.0; }
};

struct Sizes : Rows {
    int C, H, heads, A, V, K, gates, extra;

    explicit Sizes(const so2_message& p)
        : Rows(p.lmax, p.mmax),
          C(p.channels),
          H(p.hidden),
          heads(p.heads),
          A(p.alpha),
          V(p.heads * p.value),
          K(p.radial),
          gates(p.gate ? p.lmax * p.hidden : p.hidden),
          extra(p.heads * p.alpha + gates) {}

    int pair(int m) const { return n[m] * 2 * C; }  // both ends' channels in the rows +m
};

}  // namespace catmllm::so2
