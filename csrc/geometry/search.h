// What the searches for the nearest pair share: the reduced cell, boxes of it, and their neighbours.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "min_distance.h"

namespace catmllm::geometry {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Cell {
    double basis[9];  // Minkowski-reduced, its largest number 1
    double inverse[9];
    double spacing[3];  // of the planes across each axis
    double scale;       // Å
};

// How many boxes the cell is cut into along each axis; one along axes without room for three, which are
// `thin`.
struct Slices {
    int n[3];
    bool thin[3];
    int of(double fraction, int axis) const {
        return std::min(static_cast<int>(fraction * n[axis]), n[axis] - 1);
    }
};

constexpr std::uint32_t kCrowded = 24;  // sites of a box

inline void to_cartesian(const double* basis, const double* f, double* x) {
    for (int k = 0; k < 3; ++k) x[k] = f[0] * basis[k] + f[1] * basis[3 + k] + f[2] * basis[6 + k];
}

inline void site_position(const Cell& cell, const DistanceScratch& s, std::size_t site, double* x) {
    const double f[3] = {s.column(0)[site], s.column(1)[site], s.column(2)[site]};
    to_cartesian(cell.basis, f, x);
}

// Lowers the bound r where the fullest box is crowded: two of m points in a box of diameter D are within
// D / floor(cbrt(m - 1)). False where that brings little.
inline bool lower_bound_of_crowd(const Cell& cell, const Slices& slices, std::uint32_t most, double& r) {
    if (most <= kCrowded) return false;
    double diagonal = 0;
    for (int corner = 0; corner < 4; ++corner) {
        const double f[3] = {1.0 / slices.n[0], (corner & 1 ? -1.0 : 1.0) / slices.n[1],
                             (corner & 2 ? -1.0 : 1.0) / slices.n[2]};
        double x[3];
        to_cartesian(cell.basis, f, x);
        diagonal = std::max(diagonal, dot(x, x));
    }
    const double lower = std::sqrt(diagonal) / std::floor(std::cbrt(static_cast<double>(most - 1)) + 1e-9);
    if (!(lower < 0.9 * r)) return false;
    r = lower;
    return true;
}

// The 13 of a box's 26 neighbours that come later than it, so that each pair of boxes is met once.
constexpr int kFirstLater = 14;
constexpr int kNeighbours = 27;

// The box beside the one `at`, around the cell where need be: `around` says by how many cells its sites are
// to be moved. False where the step goes along a thin axis.
inline bool step_beside(const Slices& slices, int neighbour, const int at[3], int beside[3],
                        double around[3]) {
    const int step[3] = {neighbour / 9 - 1, neighbour / 3 % 3 - 1, neighbour % 3 - 1};
    for (int k = 0; k < 3; ++k) {
        if (step[k] != 0 && slices.thin[k]) return false;
        beside[k] = at[k] + step[k];
        around[k] = 0;
        if (beside[k] >= slices.n[k]) {
            beside[k] -= slices.n[k];
            around[k] = 1;
        } else if (beside[k] < 0) {
            beside[k] += slices.n[k];
            around[k] = -1;
        }
    }
    return true;
}

// Every search returns the least squared distance in units of the cell's scale, `best` where none is less. r,
// the root of a bound, says how far to look.

// rounded.cpp. x - floor(x) of n numbers in place, for |x| < 2^51; the largest |x| seen, nan where one is not
// finite. Up to kRoom numbers behind them are written too.
double wrap_fractions(double* x, std::size_t n);
// Between sites that follow each other in the file.
double nearest_in_order(const Cell& cell, std::size_t n, const DistanceScratch& s);
// Over all pairs, r less than half of every plane spacing.
double search_rounded(const Cell& cell, double r, std::size_t n, DistanceScratch& s, double best);

// boxes.cpp. Sorts the sites into boxes no thinner than r, which is lowered where they crowd; the number of
// sites in the fullest box.
std::uint32_t fill_boxes(const Cell& cell, double& r, std::size_t n, Slices& slices, DistanceScratch& s);
// Over pairs in the same and in neighbouring boxes.
double search_boxes(const Cell& cell, const Slices& slices, const DistanceScratch& s, double best);

// sparse.cpp. The same for sites that crowd a small part of the cell; over when `best` is `enough`.
double search_sparse(const Cell& cell, double r, std::size_t n, const DistanceScratch& s, double best,
                     double enough);

}  // namespace catmllm::geometry
