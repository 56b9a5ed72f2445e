// The usual case, eight pairs at a time: where the bound r is under half of every plane spacing, an image
// nearer than r has all fractional differences under one half, so rounding finds it and no shift needs to be
// tried.
#include <cstring>
#include <limits>

#include "lanes.h"
#include "search.h"

namespace catmllm::geometry {
namespace {

static_assert(kLanes == DistanceScratch::kRoom);
constexpr double kInfinity = std::numeric_limits<double>::infinity();

CATMLLM_INLINE Lanes lesser(Lanes a, Lanes b) { return a < b ? a : b; }
CATMLLM_INLINE double least_lane(Lanes v) {
    double least = v[0];
    for (int l = 1; l < kLanes; ++l) least = v[l] < least ? v[l] : least;
    return least;
}

template <class T>
CATMLLM_INLINE T rounded(T x) {
    constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves whole numbers
    return (x + kMagic) - kMagic;
}

// Fractional coordinates by axis, room for kLanes numbers behind the last.
struct Columns {
    const double* f[3];
};

Columns columns_of(const DistanceScratch& s) { return {{s.column(0), s.column(1), s.column(2)}}; }

// What is known of eight pairs and their basis, and spares arithmetic without a change in the result.
enum class Known {
    kNothing,
    kNear,     // along the last axis they differ by less than a half, and rounding gives nought
    kUpright,  // that, and the last axis is along z, the first has no y
};

// Squared distances of eight sites beginning at q to the point a, each to the image that rounding gives.
template <Known known>
CATMLLM_INLINE Lanes squares(const Columns& c, std::size_t q, const double* a, const double* basis) {
    Lanes u = load(c.f[0] + q) - a[0];
    Lanes v = load(c.f[1] + q) - a[1];
    Lanes w = load(c.f[2] + q) - a[2];
    u = u - rounded(u);
    v = v - rounded(v);
    if (known == Known::kNothing) w = w - rounded(w);
    Lanes x = u * basis[0] + v * basis[3];
    Lanes y = v * basis[4];
    const Lanes z = u * basis[2] + v * basis[5] + w * basis[8];
    if (known != Known::kUpright) {
        x = x + w * basis[6];
        y = u * basis[1] + y + w * basis[7];
    }
    return x * x + y * y + z * z;
}

// The lanes' least squared distances from the site at `a` to sites [from, to).
template <Known known>
CATMLLM_INLINE Lanes nearest_of(const Columns& c, std::size_t from, std::size_t to, const double* a,
                                const double* basis, Lanes least) {
    std::size_t q = from;
    for (; q + kLanes <= to; q += kLanes) least = lesser(squares<known>(c, q, a, basis), least);
    if (q < to)
        least = lesser(
            first_lanes(squares<known>(c, q, a, basis), static_cast<std::int64_t>(to - q), kInfinity), least);
    return least;
}

// The same for sites that come later than the one at `a`, in whole vectors: of the sites behind `to` any
// image may be looked at, since none is nearer than the nearest pair; behind the last site is nan, which is
// not less.
template <Known known>
CATMLLM_INLINE Lanes nearest_later(const Columns& c, std::size_t from, std::size_t to, const double* a,
                                   const double* basis, Lanes least) {
    for (std::size_t q = from; q < to; q += kLanes) least = lesser(squares<known>(c, q, a, basis), least);
    return least;
}

// Sites sorted into slices, the last axis innermost. That one has slices so thin that `reach` of them are no
// thinner than the bound; reach is less than their number.
struct Runs {
    double basis[9];  // rows in the order of the axes
    int slices[3];
    int reach;
    Columns columns;
    const std::uint32_t* start;  // of each box
};

CATMLLM_CLONES double search_runs(const Runs& runs, double best) {
    double basis[9];
    for (int k = 0; k < 9; ++k) basis[k] = runs.basis[k];
    const Columns c = runs.columns;
    const int* slices = runs.slices;
    const int reach = runs.reach;
    Lanes least = Lanes{} + best;
    const int n2 = slices[2];
    const bool near = 2 * (reach + 1) < n2;
    const bool upright = near && basis[1] == 0 && basis[6] == 0 && basis[7] == 0;
    for (int i = 0; i < slices[0]; ++i) {
        for (int j = 0; j < slices[1]; ++j) {
            const std::uint32_t* own = runs.start + static_cast<std::size_t>(i * slices[1] + j) * n2;
            for (int di = 0; di <= (slices[0] > 1 ? 1 : 0); ++di) {
                const int first_dj = di == 0 || slices[1] < 3 ? 0 : -1;
                for (int dj = first_dj; dj <= (slices[1] > 1 ? 1 : 0); ++dj) {
                    const bool same = di == 0 && dj == 0;
                    const int i2 = (i + di) % slices[0];
                    const int j2 = (j + dj + slices[1]) % slices[1];
                    const std::uint32_t* other =
                        runs.start + static_cast<std::size_t>(i2 * slices[1] + j2) * n2;
                    for (int k = 0; k < n2; ++k) {
                        // boxes k - reach .. k + reach of the other column are one run of sites, but for the
                        // wrap-around
                        const std::uint32_t from = other[std::max(k - reach, 0)];
                        const std::uint32_t to = other[std::min(k + reach, n2 - 1) + 1];
                        const int over = std::max(0, k + reach - n2 + 1);
                        const int under = same ? n2 : std::min(n2, n2 + k - reach);
                        for (std::uint32_t p = own[k]; p < own[k + 1]; ++p) {
                            const double a[3] = {c.f[0][p], c.f[1][p], c.f[2][p]};
                            if (!same)
                                least = near ? nearest_of<Known::kNear>(c, from, to, a, basis, least)
                                             : nearest_of<Known::kNothing>(c, from, to, a, basis, least);
                            else if (upright)
                                least = nearest_later<Known::kUpright>(c, p + 1, to, a, basis, least);
                            else
                                least = near ? nearest_later<Known::kNear>(c, p + 1, to, a, basis, least)
                                             : nearest_later<Known::kNothing>(c, p + 1, to, a, basis, least);
                            if (over > 0)
                                least =
                                    nearest_of<Known::kNothing>(c, other[0], other[over], a, basis, least);
                            if (under < n2)
                                least =
                                    nearest_of<Known::kNothing>(c, other[under], other[n2], a, basis, least);
                        }
                    }
                }
            }
        }
    }
    return least_lane(least);
}

// Between sites that follow each other.
CATMLLM_CLONES double search_steps(const double* basis_in, const Columns& c, std::size_t n) {
    double basis[9];
    for (int k = 0; k < 9; ++k) basis[k] = basis_in[k];
    const double zero[3] = {0, 0, 0};
    Lanes least = Lanes{} + kInfinity;
    for (std::size_t i = 0; i + 1 < n; i += kLanes) {
        double steps[3][kLanes];
        for (int k = 0; k < 3; ++k) store(steps[k], load(c.f[k] + i + 1) - load(c.f[k] + i));
        const Columns step{{steps[0], steps[1], steps[2]}};
        const Lanes d = squares<Known::kNothing>(step, 0, zero, basis);
        least = lesser(first_lanes(d, static_cast<std::int64_t>(n - 1 - i), kInfinity), least);
    }
    return least_lane(least);
}

CATMLLM_CLONES double wrap(double* x, std::size_t n) {
    constexpr double kMost = std::numeric_limits<double>::max();
    Lanes most = {};
    Lanes strange = {};  // a number that is not finite
    for (std::size_t i = 0; i < n; i += kLanes) {
        Lanes v = load(x + i);
        if (n - i < kLanes) v = first_lanes(v, static_cast<std::int64_t>(n - i), 0.0);
        const Lanes size = v < 0 ? -v : v;
        strange = size <= kMost ? strange : v;
        most = size > most ? size : most;
        const Lanes r = rounded(v);
        store(x + i, v - (r > v ? r - 1.0 : r));
    }
    double greatest = 0;
    bool all_finite = true;
    for (int l = 0; l < kLanes; ++l) {
        greatest = most[l] > greatest ? most[l] : greatest;
        all_finite &= strange[l] == 0;
    }
    return all_finite ? greatest : std::numeric_limits<double>::quiet_NaN();
}

constexpr std::size_t kOneRun = 24;  // up to here every pair is quicker than any order
constexpr double kReach = 4;         // slices to the length of the bound, along the widest axis
constexpr double kTwoAxes = 256;     // sites from which on a second axis is cut,
constexpr double kThreeAxes = 2048;  // and the third

// How the sites are to be cut, and `axes` in that order. Few sites: slices along the widest axis alone, since
// long runs of sites suit the vector unit better than small boxes. More: along a second and a third axis too,
// in steps that still leave several sites to a box.
void choose_runs(const Cell& cell, double r, std::size_t n, Runs& runs, int axes[3]) {
    int by_width[3] = {0, 1, 2};
    std::sort(by_width, by_width + 3, [&](int a, int b) { return cell.spacing[a] > cell.spacing[b]; });
    const int wide = by_width[0];
    const double count = static_cast<double>(n);
    const double shares[3] = {0, count > kTwoAxes ? std::sqrt(count / 16) : 1,
                              count > kThreeAxes ? std::sqrt(count / 256) : 1};
    const auto fit = [&](int axis) { return cell.spacing[axis] / (r * (1 + 1e-9) + 1e-300); };
    int slices[3];
    for (int k = 1; k < 3; ++k)
        slices[by_width[k]] = std::max(1, static_cast<int>(std::min({fit(by_width[k]), shares[k], 1024.0})));
    // Slices thinner than r along the widest axis, to look no further than needed.
    const double room = std::max(1.0, 2 * count / (slices[by_width[1]] * slices[by_width[2]]));
    slices[wide] = std::max(1, static_cast<int>(std::min(kReach * fit(wide), room)));
    runs.reach = static_cast<int>(std::min(slices[wide] - 1.0, std::ceil(slices[wide] / fit(wide))));
    axes[0] = (wide + 1) % 3;
    axes[1] = (wide + 2) % 3;
    axes[2] = wide;
    for (int k = 0; k < 3; ++k) {
        runs.slices[k] = slices[axes[k]];
        for (int d = 0; d < 3; ++d) runs.basis[3 * k + d] = cell.basis[3 * axes[k] + d];
    }
}

// A counting sort of the sites by box.
void sort_runs(const int axes[3], std::size_t n, Runs& runs, DistanceScratch& s) {
    const int* slices = runs.slices;
    const std::size_t boxes = static_cast<std::size_t>(slices[0]) * slices[1] * slices[2];
    s.box_start.assign(boxes + 2, 0);
    s.box_of_site.resize(n);
    s.sorted_fraction.resize(3 * s.stride);
    for (std::size_t i = 0; i < n; ++i) {
        int box = 0;
        for (int k = 0; k < 3; ++k) {
            if (slices[k] == 1) continue;
            const int slice = static_cast<int>(s.column(axes[k])[i] * slices[k]);
            box = box * slices[k] + std::min(slice, slices[k] - 1);
        }
        s.box_of_site[i] = static_cast<std::uint32_t>(box);
        ++s.box_start[static_cast<std::size_t>(box) + 2];
    }
    for (std::size_t b = 2; b < boxes + 2; ++b) s.box_start[b] += s.box_start[b - 1];
    double* sorted[3];
    for (int k = 0; k < 3; ++k) runs.columns.f[k] = sorted[k] = s.sorted_fraction.data() + k * s.stride;
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t at = s.box_start[s.box_of_site[i] + 1]++;
        for (int k = 0; k < 3; ++k) sorted[k][at] = s.column(axes[k])[i];
    }
    std::fill_n(sorted[0] + n, kLanes, kNan);
    runs.start = s.box_start.data();
}

}  // namespace

double wrap_fractions(double* x, std::size_t n) { return wrap(x, n); }

double nearest_in_order(const Cell& cell, std::size_t n, const DistanceScratch& s) {
    return search_steps(cell.basis, columns_of(s), n);
}

double search_rounded(const Cell& cell, double r, std::size_t n, DistanceScratch& s, double best) {
    Runs runs;
    if (n <= kOneRun) {
        const std::uint32_t all[2] = {0, static_cast<std::uint32_t>(n)};
        std::memcpy(runs.basis, cell.basis, sizeof runs.basis);
        runs.slices[0] = runs.slices[1] = runs.slices[2] = 1;
        runs.reach = 0;
        runs.columns = columns_of(s);
        runs.start = all;
        return search_runs(runs, best);
    }
    int axes[3];
    choose_runs(cell, r, n, runs, axes);
    sort_runs(axes, n, runs, s);
    return search_runs(runs, best);
}

}  // namespace catmllm::geometry
