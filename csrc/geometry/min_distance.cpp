// How: in a Minkowski-reduced basis any pair gives an upper bound r (neighbours in the file give a good one).
// The cell is cut into slices no thinner than r along each axis that has room for three; pairs nearer than r
// then lie in neighbouring boxes. Along axes without room for three slices all images are tried: the nearest
// is the rounded one or, for a reduced basis, one beside it. Crowded boxes lower r first, which keeps the
// work linear however the sites cluster. Here the cell and its sites are made ready and a search is chosen.
#include "min_distance.h"

#include <cstring>
#include <limits>

#include "rounding.h"
#include "search.h"

namespace catmllm::geometry {
namespace {

constexpr std::size_t kFew = 4096;                  // up to here crowding costs less than looking out for it
constexpr double kExactFloor = 2251799813685248.0;  // 2^51

// False where the lattice is not finite or flat.
bool reduce_cell(const Lattice& lattice, Cell& cell) {
    Lattice reduced;
    if (!reduce(lattice, reduced)) return false;
    cell.scale = 0;
    for (double x : reduced.rows) cell.scale = std::max(cell.scale, std::fabs(x));
    for (int k = 0; k < 9; ++k) cell.basis[k] = reduced.rows[k] / cell.scale;
    if (!invert(cell.basis, cell.inverse)) return false;
    for (int k = 0; k < 3; ++k) {
        double sum = 0;
        for (int i = 0; i < 3; ++i) sum += cell.inverse[3 * i + k] * cell.inverse[3 * i + k];
        cell.spacing[k] = 1.0 / std::sqrt(sum);
        if (!(cell.spacing[k] > 0)) return false;
    }
    return true;
}

// The original basis in terms of the reduced one: whole numbers.
void basis_change(const Lattice& lattice, const Cell& cell, double change[9]) {
    double original[9];
    for (int k = 0; k < 9; ++k) original[k] = lattice.rows[k] / cell.scale;
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            double sum = 0;
            for (int k = 0; k < 3; ++k) sum += original[3 * i + k] * cell.inverse[3 * k + j];
            change[3 * i + j] = round_even(sum) + 0.0;  // no -0
        }
    }
}

// The sites in the reduced basis, wrapped into the cell, a column an axis, nan behind the first; false where
// one is not finite.
bool reduce_sites(const double change[9], const double* frac, std::size_t n, DistanceScratch& s) {
    s.stride = n + DistanceScratch::kRoom;
    s.fraction.resize(3 * s.stride);
    double* columns[3];
    for (int k = 0; k < 3; ++k) columns[k] = s.fraction.data() + static_cast<std::size_t>(k) * s.stride;
    for (std::size_t i = 0; i < n; ++i)
        for (int k = 0; k < 3; ++k) columns[k][i] = frac[3 * i + k];
    bool exact = true;  // no coordinate is huge
    for (double* column : columns) {
        const double most = wrap_fractions(column, n);
        if (!(most <= std::numeric_limits<double>::max())) return false;
        exact &= most < kExactFloor;
    }
    if (!exact)
        for (std::size_t i = 0; i < n; ++i)
            for (int k = 0; k < 3; ++k) columns[k][i] = frac[3 * i + k] - floor_of(frac[3 * i + k]);
    std::fill_n(columns[0] + n, DistanceScratch::kRoom, kNan);
    static constexpr double kSame[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    if (std::memcmp(change, kSame, sizeof kSame) == 0) return true;
    bool finite = true;
    for (std::size_t i = 0; i < n; ++i) {
        const double x[3] = {columns[0][i], columns[1][i], columns[2][i]};
        for (int k = 0; k < 3; ++k) {
            const double f = x[0] * change[k] + x[1] * change[3 + k] + x[2] * change[6 + k];
            columns[k][i] = f - floor_of(f);
            finite &= std::isfinite(columns[k][i]);
        }
    }
    return finite;
}

}  // namespace

double min_distance(const Lattice& lattice, const double* frac, std::size_t n, DistanceScratch& s,
                    double enough) {
    if (n < 2) return std::numeric_limits<double>::infinity();
    Cell cell;
    if (!reduce_cell(lattice, cell)) return kNan;
    double change[9];
    basis_change(lattice, cell, change);
    if (!reduce_sites(change, frac, n, s)) return kNan;

    double best = nearest_in_order(cell, n, s);
    double r = std::sqrt(best);
    enough /= cell.scale;
    if (r <= enough) return r * cell.scale;
    const double narrowest = std::min({cell.spacing[0], cell.spacing[1], cell.spacing[2]});
    if (n <= kFew && r < 0.499 * narrowest) {
        best = search_rounded(cell, r, n, s, best);
    } else {
        Slices slices;
        const std::uint32_t most = fill_boxes(cell, r, n, slices, s);
        best = most <= 8 * kCrowded ? search_boxes(cell, slices, s, best)
                                    : search_sparse(cell, r, n, s, best, enough * enough);
    }
    return std::sqrt(best) * cell.scale;
}

}  // namespace catmllm::geometry
