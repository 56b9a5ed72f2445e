// The least distance between two different sites of a periodic cell, exact for any lattice and linear in the
// sites.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lattice.h"

namespace catmllm::geometry {

// Memory that is reused from cell to cell.
struct DistanceScratch {
    static constexpr std::size_t kRoom = 8;  // numbers behind the last of a column, for whole vectors
    std::vector<double> fraction;  // three columns in the reduced basis, in [0, 1], each `stride` long
    std::size_t stride = 0;
    std::vector<double> sorted_fraction;  // the same in the order of the boxes
    std::vector<double> position;         // [N, 3] Cartesian in the order of the boxes, over the cell's scale
    std::vector<std::uint32_t> box_of_site;
    std::vector<std::uint32_t> box_start;
    const double* column(int k) const { return fraction.data() + static_cast<std::size_t>(k) * stride; }
};

// frac: [n, 3]. Every periodic image counts, a site's own images do not: inf for n < 2. nan where the lattice
// or a coordinate is not finite or the cell has no volume. A distance up to `enough` (Å) may end the search:
// it is returned then, though a lesser one may be there.
double min_distance(const Lattice& lattice, const double* frac, std::size_t n, DistanceScratch& scratch,
                    double enough = 0);

}  // namespace catmllm::geometry
