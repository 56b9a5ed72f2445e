// How: in a Minkowski-reduced basis any pair gives an upper bound r (neighbours in the file give a good one). The
// cell is cut into slices no thinner than r along each axis that has room for three; pairs nearer than r then lie in
// neighbouring boxes. Along axes without room for three slices all images are tried: the nearest is the rounded one
// or, for a reduced basis, one beside it. Crowded boxes lower r first (m points in a box of diameter D: two of them
// are within D / floor(cbrt(m - 1))), which keeps the work linear however the sites cluster.
#include "min_distance.h"

#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CATMLLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CATMLLM_CLONES
#endif
#if defined(__GNUC__) || defined(__clang__)
#define CATMLLM_INLINE inline __attribute__((always_inline))
#else
#define CATMLLM_INLINE inline
#endif

namespace catmllm::geometry {
namespace {

constexpr std::uint32_t kCrowded = 24;
constexpr std::size_t kOneRun = 24;  // up to here every pair is quicker than any order
constexpr double kReach = 4;         // slices to the length of the bound, along the widest axis
constexpr std::size_t kRuns = 2048;
constexpr std::size_t kFew = 4096;  // up to here crowding costs less than looking out for it

struct Cell {
    double basis[9];
    double inverse[9];
    double spacing[3];
    double scale;
};

double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

void to_cartesian(const double* basis, const double* f, double* x) {
    for (int k = 0; k < 3; ++k) x[k] = f[0] * basis[k] + f[1] * basis[3 + k] + f[2] * basis[6 + k];
}

// The images of a vector along the axes in `thin`: the rounded one and those beside it.
class Images {
  public:
    Images(const Cell& cell, const bool thin[3]) {
        for (int k = 0; k < 3; ++k)
            if (thin[k]) axis_[n_axes_++] = cell.basis + 3 * k;  // ascending lengths
        // Each axis less its parts along the shorter ones (Gram-Schmidt): rounding goes plane by plane, from the
        // longest axis down, which stays exact when one axis is 1e11 times another.
        bool orthogonal = true;
        for (int i = 0; i < n_axes_; ++i) {
            double* own = upright_[i];
            for (int d = 0; d < 3; ++d) own[d] = axis_[i][d];
            for (int j = 0; j < i; ++j) {
                const double part = dot(axis_[i], upright_[j]) / dot(upright_[j], upright_[j]);
                orthogonal &= std::fabs(part) < 1e-14;
                for (int d = 0; d < 3; ++d) own[d] -= part * upright_[j][d];
            }
            const double norm = dot(own, own);
            for (int d = 0; d < 3; ++d) own_over_norm_[i][d] = own[d] / norm;
        }
        if (orthogonal || n_axes_ < 2) return;
        const int reach2 = n_axes_ == 3 ? 1 : 0;
        for (int i = -1; i <= 1; ++i) {
            for (int j = -1; j <= 1; ++j) {
                for (int k = -reach2; k <= reach2; ++k) {
                    if (i == 0 && j == 0 && k == 0) continue;
                    double* shift = shifts_ + 3 * n_shifts_++;
                    for (int d = 0; d < 3; ++d)
                        shift[d] = i * axis_[0][d] + j * axis_[1][d] + (reach2 ? k * axis_[2][d] : 0.0);
                }
            }
        }
    }

    // Least squared length of v over the images.
    double nearest(double x, double y, double z) const {
        for (int i = n_axes_ - 1; i >= 0; --i) {
            const double n =
                round_even(own_over_norm_[i][0] * x + own_over_norm_[i][1] * y + own_over_norm_[i][2] * z);
            x -= n * axis_[i][0];
            y -= n * axis_[i][1];
            z -= n * axis_[i][2];
        }
        double best = x * x + y * y + z * z;
        for (int s = 0; s < n_shifts_; ++s) {
            const double dx = x + shifts_[3 * s];
            const double dy = y + shifts_[3 * s + 1];
            const double dz = z + shifts_[3 * s + 2];
            best = std::min(best, dx * dx + dy * dy + dz * dz);
        }
        return best;
    }

    int n_axes() const { return n_axes_; }

  private:
    const double* axis_[3] = {nullptr, nullptr, nullptr};
    int n_axes_ = 0;
    double upright_[3][3] = {};
    double own_over_norm_[3][3] = {};
    double shifts_[78];
    int n_shifts_ = 0;
};

// Where r is under half of every plane spacing, an image nearer than r has all fractional differences under one half:
// rounding finds it, and no shift needs to be tried. This is the usual case, done eight pairs at a time.
constexpr int kLanes = 8;

#if defined(__GNUC__) || defined(__clang__)
typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef std::int64_t LaneMask __attribute__((vector_size(8 * kLanes)));

CATMLLM_INLINE Lanes load(const double* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
CATMLLM_INLINE void store(double* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
CATMLLM_INLINE Lanes lesser(Lanes a, Lanes b) { return a < b ? a : b; }
CATMLLM_INLINE Lanes first_lanes(Lanes v, std::int64_t n, double rest) {  // v in the first n lanes
    const LaneMask lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane < n ? v : Lanes{} + rest;
}
#else
struct Lanes {
    double x[kLanes];
    double& operator[](int l) { return x[l]; }
    double operator[](int l) const { return x[l]; }
};
#define CATMLLM_LANES(op)                                           \
    inline Lanes operator op(Lanes a, const Lanes& b) {             \
        for (int l = 0; l < kLanes; ++l) a.x[l] = a.x[l] op b.x[l]; \
        return a;                                                   \
    }                                                               \
    inline Lanes operator op(Lanes a, double b) {                   \
        for (int l = 0; l < kLanes; ++l) a.x[l] = a.x[l] op b;      \
        return a;                                                   \
    }
CATMLLM_LANES(+)
CATMLLM_LANES(-)
CATMLLM_LANES(*)
#undef CATMLLM_LANES
inline Lanes load(const double* p) {
    Lanes v;
    std::memcpy(v.x, p, sizeof v.x);
    return v;
}
inline void store(double* p, const Lanes& v) { std::memcpy(p, v.x, sizeof v.x); }
inline Lanes lesser(Lanes a, const Lanes& b) {
    for (int l = 0; l < kLanes; ++l) a.x[l] = a.x[l] < b.x[l] ? a.x[l] : b.x[l];
    return a;
}
inline Lanes first_lanes(Lanes v, std::int64_t n, double rest) {
    for (int l = 0; l < kLanes; ++l) v.x[l] = l < n ? v.x[l] : rest;
    return v;
}
#endif

struct Columns {
    const double* f[3];  // fractional coordinates in the order of the boxes, kLanes numbers of room behind the last
};

template <class T>
CATMLLM_INLINE T rounded(T x) {
    constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves whole numbers
    return (x + kMagic) - kMagic;
}

CATMLLM_INLINE double least_lane(Lanes v) {
    double least = v[0];
    for (int l = 1; l < kLanes; ++l) least = v[l] < least ? v[l] : least;
    return least;
}

// Squared distances of eight sites beginning at q to the point a, each to the image that rounding gives.
CATMLLM_INLINE Lanes squares(const Columns& c, std::size_t q, const double* a, const double* basis) {
    Lanes u = load(c.f[0] + q) - a[0];
    Lanes v = load(c.f[1] + q) - a[1];
    Lanes w = load(c.f[2] + q) - a[2];
    u = u - rounded(u);
    v = v - rounded(v);
    w = w - rounded(w);
    const Lanes x = u * basis[0] + v * basis[3] + w * basis[6];
    const Lanes y = u * basis[1] + v * basis[4] + w * basis[7];
    const Lanes z = u * basis[2] + v * basis[5] + w * basis[8];
    return x * x + y * y + z * z;
}

// The lanes' least squared distances from the site at `a` to sites [from, to).
CATMLLM_INLINE Lanes nearest_of(const Columns& c, std::size_t from, std::size_t to, const double* a,
                                const double* basis, Lanes least) {
    std::size_t q = from;
    for (; q + kLanes <= to; q += kLanes) least = lesser(squares(c, q, a, basis), least);
    if (q < to)
        least = lesser(first_lanes(squares(c, q, a, basis), static_cast<std::int64_t>(to - q),
                                   std::numeric_limits<double>::infinity()),
                       least);
    return least;
}

// The last axis has slices so thin that `reach` of them are no thinner than the bound; it is less than their number.
CATMLLM_CLONES double search_rounded(const double* basis_in, const int* slices, int reach, const Columns& c,
                                     const std::uint32_t* start, double best) {
    double basis[9];
    for (int k = 0; k < 9; ++k) basis[k] = basis_in[k];
    Lanes least = Lanes{} + best;
    const int n2 = slices[2];
    for (int i = 0; i < slices[0]; ++i) {
        for (int j = 0; j < slices[1]; ++j) {
            const std::uint32_t* own = start + static_cast<std::size_t>(i * slices[1] + j) * n2;
            for (int di = 0; di <= (slices[0] > 1 ? 1 : 0); ++di) {
                const int first = di == 0 || slices[1] < 3 ? 0 : -1;
                for (int dj = first; dj <= (slices[1] > 1 ? 1 : 0); ++dj) {
                    const bool same = di == 0 && dj == 0;
                    const int i2 = (i + di) % slices[0];
                    const int j2 = (j + dj + slices[1]) % slices[1];
                    const std::uint32_t* other = start + static_cast<std::size_t>(i2 * slices[1] + j2) * n2;
                    for (int k = 0; k < n2; ++k) {
                        // boxes k - reach .. k + reach of the other column are one run of sites, but for the
                        // wrap-around
                        const std::uint32_t from = other[std::max(k - reach, 0)];
                        const std::uint32_t to = other[std::min(k + reach, n2 - 1) + 1];
                        const int over = std::max(0, k + reach - n2 + 1);
                        const int under = same ? n2 : std::min(n2, n2 + k - reach);
                        for (std::uint32_t p = own[k]; p < own[k + 1]; ++p) {
                            const double a[3] = {c.f[0][p], c.f[1][p], c.f[2][p]};
                            least = nearest_of(c, same ? p + 1 : from, to, a, basis, least);
                            if (over > 0) least = nearest_of(c, other[0], other[over], a, basis, least);
                            if (under < n2) least = nearest_of(c, other[under], other[n2], a, basis, least);
                        }
                    }
                }
            }
        }
    }
    return least_lane(least);
}

// x - floor(x) of n numbers in place, for |x| < 2^51; the largest |x| seen, nan where one is not finite.
CATMLLM_CLONES double wrap(double* x, std::size_t n) {
    double most = 0;
    bool finite = true;
    for (std::size_t i = 0; i < n; ++i) {
        const double size = std::fabs(x[i]);
        finite &= size <= std::numeric_limits<double>::max();
        most = size > most ? size : most;
        const double r = rounded(x[i]);
        x[i] -= r > x[i] ? r - 1.0 : r;
    }
    return finite ? most : std::numeric_limits<double>::quiet_NaN();
}

// Least squared distance between sites that follow each other.
CATMLLM_CLONES double neighbours(const double* basis_in, const Columns& c, std::size_t n) {
    double basis[9];
    for (int k = 0; k < 9; ++k) basis[k] = basis_in[k];
    const double zero[3] = {0, 0, 0};
    const double infinity = std::numeric_limits<double>::infinity();
    Lanes least = Lanes{} + infinity;
    for (std::size_t i = 0; i + 1 < n; i += kLanes) {
        double steps[3][kLanes];
        for (int k = 0; k < 3; ++k) store(steps[k], load(c.f[k] + i + 1) - load(c.f[k] + i));
        const Columns step{{steps[0], steps[1], steps[2]}};
        const Lanes d = squares(step, 0, zero, basis);
        least = lesser(first_lanes(d, static_cast<std::int64_t>(n - 1 - i), infinity), least);
    }
    return least_lane(least);
}

void to_cartesian(const Cell& cell, const DistanceScratch& s, std::size_t site, double* x) {
    const double f[3] = {s.column(0)[site], s.column(1)[site], s.column(2)[site]};
    to_cartesian(cell.basis, f, x);
}

// Sorts the sites into boxes; the largest number of sites in one box.
std::uint32_t fill_boxes(const Cell& cell, const int slices[3], std::size_t n, DistanceScratch& s) {
    const std::size_t boxes = static_cast<std::size_t>(slices[0]) * slices[1] * slices[2];
    s.start.assign(boxes + 1, 0);
    s.cell.resize(n);
    s.order.resize(n);
    s.position.resize(3 * n);
    for (std::size_t i = 0; i < n; ++i) {
        std::uint32_t box = 0;
        for (int k = 0; k < 3; ++k) {
            const int slice = std::min(static_cast<int>(s.column(k)[i] * slices[k]), slices[k] - 1);
            box = box * static_cast<std::uint32_t>(slices[k]) + static_cast<std::uint32_t>(slice);
        }
        s.cell[i] = box;
        ++s.start[box + 1];
    }
    std::uint32_t most = 0;
    for (std::size_t b = 0; b < boxes; ++b) {
        most = std::max(most, s.start[b + 1]);
        s.start[b + 1] += s.start[b];
    }
    for (std::size_t i = n; i-- > 0;) {  // from behind: start[b + 1] ends as the start of b + 1 again
        const std::uint32_t at = --s.start[s.cell[i] + 1];
        s.order[at] = static_cast<std::uint32_t>(i);
        to_cartesian(cell, s, i, &s.position[3 * at]);
    }
    // start[b + 1] is now where box b begins; shift down by one
    for (std::size_t b = 0; b < boxes; ++b) s.start[b] = s.start[b + 1];
    s.start[boxes] = static_cast<std::uint32_t>(n);
    return most;
}

void choose_slices(const Cell& cell, double r, std::size_t n, int slices[3], bool thin[3]) {
    double wanted[3];
    double boxes = 1;
    for (int k = 0; k < 3; ++k) {
        wanted[k] = r > 0 ? std::min(cell.spacing[k] / (r * (1 + 1e-9)), 1e6) : 1e6;
        boxes *= std::max(1.0, std::floor(wanted[k]));
    }
    const double most = 2.0 * static_cast<double>(n) + 32;
    // Too many boxes for the sites: fewer slices along the axes that have the most.
    while (boxes > most) {
        const int k = wanted[0] >= wanted[1] ? (wanted[0] >= wanted[2] ? 0 : 2) : (wanted[1] >= wanted[2] ? 1 : 2);
        wanted[k] *= std::max(0.5, most / boxes);
        boxes = 1;
        for (double w : wanted) boxes *= std::max(1.0, std::floor(w));
    }
    for (int k = 0; k < 3; ++k) {
        slices[k] = wanted[k] >= 3 ? static_cast<int>(wanted[k]) : 1;
        thin[k] = slices[k] == 1;
    }
}

double box_diameter(const Cell& cell, const int slices[3]) {
    double most = 0;
    for (int corner = 0; corner < 4; ++corner) {
        const double f[3] = {1.0 / slices[0], (corner & 1 ? -1.0 : 1.0) / slices[1],
                             (corner & 2 ? -1.0 : 1.0) / slices[2]};
        double x[3];
        to_cartesian(cell.basis, f, x);
        most = std::max(most, x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
    }
    return std::sqrt(most);
}

// Least squared distance over pairs in the same and in neighbouring boxes.
double search_boxes(const Cell& cell, const int slices[3], const bool thin[3], const DistanceScratch& s,
                    double best) {
    const Images images(cell, thin);
    const bool direct = images.n_axes() == 0;
    const auto pair = [&](const double* a, const double* b, const double* shift) {
        const double x = b[0] - a[0] + shift[0];
        const double y = b[1] - a[1] + shift[1];
        const double z = b[2] - a[2] + shift[2];
        const double d = direct ? x * x + y * y + z * z : images.nearest(x, y, z);
        if (d < best) best = d;
    };
    const double none[3] = {0, 0, 0};
    for (int i = 0; i < slices[0]; ++i) {
        for (int j = 0; j < slices[1]; ++j) {
            for (int k = 0; k < slices[2]; ++k) {
                const std::size_t box = (static_cast<std::size_t>(i) * slices[1] + j) * slices[2] + k;
                const std::uint32_t first = s.start[box];
                const std::uint32_t last = s.start[box + 1];
                if (first == last) continue;
                for (std::uint32_t p = first; p < last; ++p)
                    for (std::uint32_t q = p + 1; q < last; ++q) pair(&s.position[3 * p], &s.position[3 * q], none);
                for (int di = thin[0] ? 0 : -1; di <= (thin[0] ? 0 : 1); ++di) {
                    for (int dj = thin[1] ? 0 : -1; dj <= (thin[1] ? 0 : 1); ++dj) {
                        for (int dk = thin[2] ? 0 : -1; dk <= (thin[2] ? 0 : 1); ++dk) {
                            if (di < 0 || (di == 0 && (dj < 0 || (dj == 0 && dk <= 0)))) continue;  // each pair once
                            int u[3] = {i + di, j + dj, k + dk};
                            double around[3] = {0, 0, 0};
                            bool crosses = false;
                            for (int a = 0; a < 3; ++a) {
                                if (u[a] >= slices[a]) {
                                    u[a] -= slices[a];
                                    around[a] = 1;
                                    crosses = true;
                                } else if (u[a] < 0) {
                                    u[a] += slices[a];
                                    around[a] = -1;
                                    crosses = true;
                                }
                            }
                            const std::size_t other =
                                (static_cast<std::size_t>(u[0]) * slices[1] + u[1]) * slices[2] + u[2];
                            const std::uint32_t from = s.start[other];
                            const std::uint32_t to = s.start[other + 1];
                            if (from == to) continue;
                            double shift[3] = {0, 0, 0};
                            if (crosses) to_cartesian(cell.basis, around, shift);
                            for (std::uint32_t p = first; p < last; ++p)
                                for (std::uint32_t q = from; q < to; ++q)
                                    pair(&s.position[3 * p], &s.position[3 * q], shift);
                        }
                    }
                }
            }
        }
    }
    return best;
}

// As the boxes above, for sites that crowd a small part of the cell: boxes as fine as r asks for, only the filled
// ones kept, sorted by key.
double search_sparse(const Cell& cell, double r, std::size_t n, const DistanceScratch& s, double best) {
    struct Member {
        std::uint64_t key;
        std::uint32_t site;
    };
    std::vector<Member> members(n);
    std::vector<std::uint32_t> starts;
    int slices[3];
    bool thin[3];
    for (int round = 0; round < 64; ++round) {
        for (int k = 0; k < 3; ++k) {
            const double wanted = r > 0 ? std::min(cell.spacing[k] / (r * (1 + 1e-9)), 1048576.0) : 1048576.0;
            slices[k] = wanted >= 3 ? static_cast<int>(wanted) : 1;
            thin[k] = slices[k] == 1;
        }
        for (std::size_t i = 0; i < n; ++i) {
            std::uint64_t key = 0;
            for (int k = 0; k < 3; ++k) {
                const int slice = std::min(static_cast<int>(s.column(k)[i] * slices[k]), slices[k] - 1);
                key = key << 21 | static_cast<std::uint64_t>(slice);
            }
            members[i] = {key, static_cast<std::uint32_t>(i)};
        }
        std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) { return a.key < b.key; });
        starts.clear();
        std::uint32_t most = 0;
        for (std::uint32_t i = 0; i < n; ++i) {
            if (i != 0 && members[i].key == members[i - 1].key) continue;
            if (!starts.empty()) most = std::max(most, i - starts.back());
            starts.push_back(i);
        }
        most = std::max(most, static_cast<std::uint32_t>(n) - starts.back());
        starts.push_back(static_cast<std::uint32_t>(n));
        if (most <= kCrowded) break;
        const double lower = box_diameter(cell, slices) / std::floor(std::cbrt(static_cast<double>(most - 1)) + 1e-9);
        if (!(lower < 0.9 * r)) break;
        r = lower;
    }
    const Images images(cell, thin);
    const auto pairs = [&](std::size_t box, std::size_t other, const double* shift) {
        for (std::uint32_t p = starts[box]; p < starts[box + 1]; ++p) {
            double a[3];
            to_cartesian(cell, s, members[p].site, a);
            for (std::uint32_t q = box == other ? p + 1 : starts[other]; q < starts[other + 1]; ++q) {
                double b[3];
                to_cartesian(cell, s, members[q].site, b);
                best = std::min(
                    best, images.nearest(b[0] - a[0] + shift[0], b[1] - a[1] + shift[1], b[2] - a[2] + shift[2]));
            }
        }
    };
    const std::size_t boxes = starts.size() - 1;
    for (std::size_t box = 0; box < boxes; ++box) {
        const std::uint64_t key = members[starts[box]].key;
        const double none[3] = {0, 0, 0};
        pairs(box, box, none);
        for (int code = 14; code < 27; ++code) {  // the half of the 26 neighbours that comes later
            const int step[3] = {code / 9 - 1, code / 3 % 3 - 1, code % 3 - 1};
            double around[3] = {0, 0, 0};
            std::uint64_t other = 0;
            bool skip = false;
            for (int k = 0; k < 3; ++k) {
                skip |= step[k] != 0 && thin[k];
                int slice = static_cast<int>(key >> (21 * (2 - k)) & 0x1fffff) + step[k];
                if (slice >= slices[k]) {
                    slice -= slices[k];
                    around[k] = 1;
                } else if (slice < 0) {
                    slice += slices[k];
                    around[k] = -1;
                }
                other = other << 21 | static_cast<std::uint64_t>(slice);
            }
            if (skip) continue;
            const auto found =
                std::lower_bound(starts.begin(), starts.end() - 1, other,
                                 [&](std::uint32_t start, std::uint64_t k) { return members[start].key < k; });
            if (found == starts.end() - 1 || members[*found].key != other) continue;
            double shift[3];
            to_cartesian(cell.basis, around, shift);
            pairs(box, static_cast<std::size_t>(found - starts.begin()), shift);
        }
    }
    return best;
}

double few_sites(const Cell& cell, double r, double best, std::size_t n, DistanceScratch& s) {
    int slices[3] = {1, 1, 1};
    if (n <= kOneRun) {
        const std::uint32_t all[2] = {0, static_cast<std::uint32_t>(n)};
        return search_rounded(cell.basis, slices, 0, Columns{{s.column(0), s.column(1), s.column(2)}}, all, best);
    }
    // Few sites: slices along the widest axis alone, since long runs of sites suit the vector unit better than small
    // boxes. More: along a second and a third axis too, in steps that still leave several sites to a box.
    int by_width[3] = {0, 1, 2};
    std::sort(by_width, by_width + 3, [&](int a, int b) { return cell.spacing[a] > cell.spacing[b]; });
    const int wide = by_width[0];
    const double count = static_cast<double>(n);
    const double shares[3] = {0, n > 256 ? std::sqrt(count / 16) : 1, n > kRuns ? std::sqrt(count / 256) : 1};
    const auto fit = [&](int axis) { return cell.spacing[axis] / (r * (1 + 1e-9) + 1e-300); };
    for (int k = 1; k < 3; ++k)
        slices[by_width[k]] = std::max(1, static_cast<int>(std::min({fit(by_width[k]), shares[k], 1024.0})));
    // Slices thinner than r along the widest axis, to look no further than needed.
    const double room = std::max(1.0, 2 * count / (slices[by_width[1]] * slices[by_width[2]]));
    slices[wide] = std::max(1, static_cast<int>(std::min(kReach * fit(wide), room)));
    const int reach = static_cast<int>(std::min(slices[wide] - 1.0, std::ceil(slices[wide] / fit(wide))));
    // counting sort into boxes, the widest axis innermost
    const int axes[3] = {(wide + 1) % 3, (wide + 2) % 3, wide};
    const int ordered[3] = {slices[axes[0]], slices[axes[1]], slices[axes[2]]};
    const std::size_t boxes = static_cast<std::size_t>(ordered[0]) * ordered[1] * ordered[2];
    s.start.assign(boxes + 2, 0);
    s.cell.resize(n);
    s.position.resize(3 * (n + kLanes));
    for (std::size_t i = 0; i < n; ++i) {
        int box = 0;
        for (int k = 0; k < 3; ++k) {
            if (ordered[k] == 1) continue;
            const int slice = static_cast<int>(s.column(axes[k])[i] * ordered[k]);
            box = box * ordered[k] + std::min(slice, ordered[k] - 1);
        }
        s.cell[i] = static_cast<std::uint32_t>(box);
        ++s.start[static_cast<std::size_t>(box) + 2];
    }
    for (std::size_t b = 2; b < boxes + 2; ++b) s.start[b] += s.start[b - 1];
    double* columns[3] = {s.position.data(), s.position.data() + n + kLanes, s.position.data() + 2 * (n + kLanes)};
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t at = s.start[s.cell[i] + 1]++;
        for (int k = 0; k < 3; ++k) columns[k][at] = s.column(axes[k])[i];
    }
    double basis[9];
    for (int k = 0; k < 3; ++k)
        for (int d = 0; d < 3; ++d) basis[3 * k + d] = cell.basis[3 * axes[k] + d];
    return search_rounded(basis, ordered, reach, Columns{{columns[0], columns[1], columns[2]}}, s.start.data(), best);
}

bool prepare(const Lattice& lattice, const double* frac, std::size_t n, Cell& cell, DistanceScratch& s) {
    Lattice reduced;
    if (!reduce(lattice, reduced)) return false;
    cell.scale = 0;
    for (double x : reduced.rows) cell.scale = std::max(cell.scale, std::fabs(x));
    double original[9];
    for (int k = 0; k < 9; ++k) {
        cell.basis[k] = reduced.rows[k] / cell.scale;
        original[k] = lattice.rows[k] / cell.scale;
    }
    if (!invert(cell.basis, cell.inverse)) return false;
    for (int k = 0; k < 3; ++k) {
        double sum = 0;
        for (int i = 0; i < 3; ++i) sum += cell.inverse[3 * i + k] * cell.inverse[3 * i + k];
        cell.spacing[k] = 1.0 / std::sqrt(sum);
        if (!(cell.spacing[k] > 0)) return false;
    }
    double change[9];  // original basis in terms of the reduced one: whole numbers
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            double sum = 0;
            for (int k = 0; k < 3; ++k) sum += original[3 * i + k] * cell.inverse[3 * k + j];
            change[3 * i + j] = round_even(sum) + 0.0;  // no -0
        }
    }
    s.fraction.resize(3 * (n + kLanes));
    s.stride = n + kLanes;
    double* columns[3] = {s.fraction.data(), s.fraction.data() + s.stride, s.fraction.data() + 2 * s.stride};
    for (std::size_t i = 0; i < n; ++i)
        for (int k = 0; k < 3; ++k) columns[k][i] = frac[3 * i + k];
    bool exact = true;  // wrap() was: no coordinate is huge
    for (int k = 0; k < 3; ++k) {
        const double most = wrap(columns[k], n);
        if (!(most <= std::numeric_limits<double>::max())) return false;
        exact &= most < 2251799813685248.0;
    }
    if (!exact)
        for (std::size_t i = 0; i < n; ++i)
            for (int k = 0; k < 3; ++k) columns[k][i] = frac[3 * i + k] - floor_of(frac[3 * i + k]);
    static constexpr double kSame[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    if (std::memcmp(change, kSame, sizeof change) == 0) return true;
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

double min_distance(const Lattice& lattice, const double* frac, std::size_t n, DistanceScratch& s) {
    if (n < 2) return std::numeric_limits<double>::infinity();
    Cell cell;
    if (!prepare(lattice, frac, n, cell, s)) return std::numeric_limits<double>::quiet_NaN();

    // An upper bound: neighbours in the file.
    double best = neighbours(cell.basis, Columns{{s.column(0), s.column(1), s.column(2)}}, n);
    double r = std::sqrt(best);
    const double narrowest = std::min({cell.spacing[0], cell.spacing[1], cell.spacing[2]});
    if (n <= kFew && r < 0.499 * narrowest) return std::sqrt(few_sites(cell, r, best, n, s)) * cell.scale;
    int slices[3];
    bool thin[3];
    std::uint32_t most = 0;
    for (int round = 0; round < 64; ++round) {
        choose_slices(cell, r, n, slices, thin);
        most = fill_boxes(cell, slices, n, s);
        if (most <= kCrowded) break;
        const double lower = box_diameter(cell, slices) / std::floor(std::cbrt(static_cast<double>(most - 1)) + 1e-9);
        if (!(lower < 0.9 * r)) break;
        r = lower;
    }
    best = most <= 8 * kCrowded ? search_boxes(cell, slices, thin, s, best) : search_sparse(cell, r, n, s, best);
    return std::sqrt(best) * cell.scale;
}

}  // namespace catmllm::geometry
