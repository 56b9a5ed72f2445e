// Points of the unit cube, modulo 1: when two are the same site to pymatgen, and a table that finds them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../geometry/rounding.h"
#include "status.h"

namespace catmllm::cif {

constexpr double kSiteTolerance = 1e-4;
constexpr std::uint32_t kNoPoint = 0xffffffff;
constexpr std::uint32_t kFewPoints = 12;  // up to here comparing with all is quicker than a table

inline bool same_modulo_one(const double* a, const double* b, double tolerance = kSiteTolerance) {
    for (int k = 0; k < 3; ++k) {
        double d = a[k] - b[k];
        d -= geometry::round_even(d);
        if (!(std::fabs(d) < tolerance)) return false;
    }
    return true;
}

// The same to within rounding: wrapping the points first may change the answer.
inline bool nearly_same_modulo_one(const double* a, const double* b) {
    return same_modulo_one(a, b, kSiteTolerance * (1 + 1e-6));
}

inline void wrap(const double* x, double* wrapped) {
    for (int k = 0; k < 3; ++k) wrapped[k] = x[k] >= 0 && x[k] < 1 ? x[k] : x[k] - geometry::floor_of(x[k]);
}

// Looks up points by their place in the unit cube: chains of a hash table over small cubes.
class PointTable {
  public:
    // Forgets all points; `expected` is about how many will come.
    void reset(std::size_t expected) {
        std::size_t size = 64;
        while (size < 2 * expected) size *= 2;
        newest_.assign(size, kNoPoint);
        older_.clear();
        mask_ = static_cast<std::uint32_t>(size - 1);
        // Coarse cubes are almost never straddled; fine ones keep chains short when there are many points.
        cubes_ = expected <= 4096 ? 64 : 4096;
        margin_ = 1.5 * kSiteTolerance * cubes_;
    }

    // Points are numbered as they come.
    void insert(const double* wrapped) {
        const auto id = static_cast<std::uint32_t>(older_.size());
        std::uint32_t& head = newest_[slot(cube(wrapped[0]), cube(wrapped[1]), cube(wrapped[2]))];
        older_.push_back(head);
        head = id;
    }

    // Calls visit(id) for every point that may be within the tolerance; stops when it returns true. False
    // with `full` set when a chain is longer than the limit.
    template <class Visit>
    bool search(const double* wrapped, bool& full, Visit visit) const {
        std::int32_t at[3];
        std::int32_t beside[3] = {0, 0, 0};  // -1 or 1 where the neighbouring cube is as near
        bool alone = true;
        for (int k = 0; k < 3; ++k) {
            const double y = wrapped[k] * cubes_ + kShift;
            at[k] = static_cast<std::int32_t>(y);
            const double inside = y - at[k];
            if (inside < margin_) beside[k] = -1;
            if (inside > 1 - margin_) beside[k] = 1;
            alone &= beside[k] == 0;
        }
        if (alone) return visit_chain(at[0], at[1], at[2], full, visit);
        for (int code = 0; code < 8; ++code) {
            std::int32_t c[3];
            bool repeated = false;
            for (int k = 0; k < 3; ++k) {
                const bool step = code >> k & 1;
                repeated |= step && beside[k] == 0;
                c[k] = at[k] + (step ? beside[k] : 0);
            }
            if (repeated) continue;
            if (visit_chain(c[0], c[1], c[2], full, visit)) return true;
            if (full) return false;
        }
        return false;
    }

  private:
    // No simple fraction lies on a face between cubes, where all neighbours would have to be looked at.
    static constexpr double kShift = 0.37;
    template <class Visit>
    bool visit_chain(std::int32_t i, std::int32_t j, std::int32_t k, bool& full, Visit& visit) const {
        std::uint32_t steps = 0;
        for (std::uint32_t id = newest_[slot(i, j, k)]; id != kNoPoint; id = older_[id]) {
            if (visit(id)) return true;
            if (++steps > Limits::kChain) {
                full = true;
                return false;
            }
        }
        return false;
    }
    // x in [0, 1]; 1 is 0 again
    std::int32_t cube(double x) const { return static_cast<std::int32_t>(x * cubes_ + kShift); }
    std::uint32_t slot(std::int32_t i, std::int32_t j, std::int32_t k) const {
        const std::int32_t m = cubes_ - 1;
        const std::uint64_t h =
            (static_cast<std::uint64_t>(i & m) << 24 | static_cast<std::uint64_t>(j & m) << 12 |
             static_cast<std::uint64_t>(k & m)) *
            0x9E3779B97F4A7C15ull;
        return static_cast<std::uint32_t>(h >> 40) & mask_;
    }
    std::vector<std::uint32_t> newest_;  // point of each slot
    std::vector<std::uint32_t> older_;   // the point before each point in its slot
    std::uint32_t mask_ = 0;
    std::int32_t cubes_ = 0;
    double margin_ = 0;
};

}  // namespace catmllm::cif
