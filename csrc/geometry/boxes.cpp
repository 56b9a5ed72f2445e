// Pairs in the same and in neighbouring boxes: any bound, any number of sites, linear in them unless they
// crowd.
#include "images.h"
#include "search.h"

namespace catmllm::geometry {
namespace {

std::size_t box_at(const Slices& slices, const int at[3]) {
    return (static_cast<std::size_t>(at[0]) * slices.n[1] + at[1]) * slices.n[2] + at[2];
}

Slices choose_slices(const Cell& cell, double r, std::size_t n) {
    double wanted[3];
    double boxes = 1;
    for (int k = 0; k < 3; ++k) {
        wanted[k] = r > 0 ? std::min(cell.spacing[k] / (r * (1 + 1e-9)), 1e6) : 1e6;
        boxes *= std::max(1.0, std::floor(wanted[k]));
    }
    const double most = 2.0 * static_cast<double>(n) + 32;
    // Too many boxes for the sites: fewer slices along the axes that have the most.
    while (boxes > most) {
        const int k =
            wanted[0] >= wanted[1] ? (wanted[0] >= wanted[2] ? 0 : 2) : (wanted[1] >= wanted[2] ? 1 : 2);
        wanted[k] *= std::max(0.5, most / boxes);
        boxes = 1;
        for (double w : wanted) boxes *= std::max(1.0, std::floor(w));
    }
    Slices slices;
    for (int k = 0; k < 3; ++k) {
        slices.n[k] = wanted[k] >= 3 ? static_cast<int>(wanted[k]) : 1;
        slices.thin[k] = slices.n[k] == 1;
    }
    return slices;
}

// A counting sort of the sites' positions by box; the number of sites in the fullest one.
std::uint32_t sort_by_box(const Cell& cell, const Slices& slices, std::size_t n, DistanceScratch& s) {
    const std::size_t boxes = static_cast<std::size_t>(slices.n[0]) * slices.n[1] * slices.n[2];
    s.box_start.assign(boxes + 1, 0);
    s.box_of_site.resize(n);
    s.position.resize(3 * n);
    for (std::size_t i = 0; i < n; ++i) {
        int at[3];
        for (int k = 0; k < 3; ++k) at[k] = slices.of(s.column(k)[i], k);
        const std::size_t box = box_at(slices, at);
        s.box_of_site[i] = static_cast<std::uint32_t>(box);
        ++s.box_start[box + 1];
    }
    std::uint32_t most = 0;
    for (std::size_t b = 0; b < boxes; ++b) {
        most = std::max(most, s.box_start[b + 1]);
        s.box_start[b + 1] += s.box_start[b];
    }
    for (std::size_t i = n; i-- > 0;) {  // from behind: box_start[b + 1] ends as the start of box b
        const std::uint32_t at = --s.box_start[s.box_of_site[i] + 1];
        site_position(cell, s, i, &s.position[3 * std::size_t{at}]);
    }
    for (std::size_t b = 0; b < boxes; ++b) s.box_start[b] = s.box_start[b + 1];
    s.box_start[boxes] = static_cast<std::uint32_t>(n);
    return most;
}

}  // namespace

std::uint32_t fill_boxes(const Cell& cell, double& r, std::size_t n, Slices& slices, DistanceScratch& s) {
    std::uint32_t most = 0;
    for (int round = 0; round < 64; ++round) {
        slices = choose_slices(cell, r, n);
        most = sort_by_box(cell, slices, n, s);
        if (!lower_bound_of_crowd(cell, slices, most, r)) break;
    }
    return most;
}

double search_boxes(const Cell& cell, const Slices& slices, const DistanceScratch& s, double best) {
    const Images images(cell, slices.thin);
    const bool direct = images.n_axes() == 0;
    const double* positions = s.position.data();
    const auto pair = [&](std::uint32_t p, std::uint32_t q, const double* shift) {
        const double* a = positions + 3 * std::size_t{p};
        const double* b = positions + 3 * std::size_t{q};
        const double x = b[0] - a[0] + shift[0];
        const double y = b[1] - a[1] + shift[1];
        const double z = b[2] - a[2] + shift[2];
        const double d = direct ? x * x + y * y + z * z : images.nearest(x, y, z);
        if (d < best) best = d;
    };
    const double none[3] = {0, 0, 0};
    int at[3];
    for (at[0] = 0; at[0] < slices.n[0]; ++at[0]) {
        for (at[1] = 0; at[1] < slices.n[1]; ++at[1]) {
            for (at[2] = 0; at[2] < slices.n[2]; ++at[2]) {
                const std::uint32_t* own = &s.box_start[box_at(slices, at)];
                if (own[0] == own[1]) continue;
                for (std::uint32_t p = own[0]; p < own[1]; ++p)
                    for (std::uint32_t q = p + 1; q < own[1]; ++q) pair(p, q, none);
                for (int neighbour = kFirstLater; neighbour < kNeighbours; ++neighbour) {
                    int beside[3];
                    double around[3];
                    if (!step_beside(slices, neighbour, at, beside, around)) continue;
                    const std::uint32_t* other = &s.box_start[box_at(slices, beside)];
                    if (other[0] == other[1]) continue;
                    double shift[3];
                    to_cartesian(cell.basis, around, shift);
                    for (std::uint32_t p = own[0]; p < own[1]; ++p)
                        for (std::uint32_t q = other[0]; q < other[1]; ++q) pair(p, q, shift);
                }
            }
        }
    }
    return best;
}

}  // namespace catmllm::geometry
