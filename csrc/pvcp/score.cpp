#include "score.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace catmllm::pvcp {
namespace {

constexpr double kCountTolerance = 1e-3;
constexpr double kErrorTolerance = 1e-9;
const double kNan = std::numeric_limits<double>::quiet_NaN();

// R_comp (Eqs. 17-24)
double composition(const cif::Structure& structure, const Target& target, double* row) {
    double found[128] = {};
    int extra = 0;
    for (const cif::Count& count : structure.counts) {
        if (count.amount <= kCountTolerance) continue;
        found[count.number] = count.amount;
        bool wanted = false;
        for (const Target::Entry& entry : target.entries) wanted |= entry.number == count.number;
        extra += !wanted;  // as is every dummy, number 0
    }
    int missing = 0;
    for (const Target::Entry& entry : target.entries) missing += !(found[entry.number] > kCountTolerance);
    row[kMissing] = missing;
    row[kExtra] = extra;
    row[kCountError] = kNan;
    if (missing) return std::max(-15.0, -8.0 - 2.0 * missing);
    if (extra) return std::max(-15.0, -5.0 - 2.0 * extra);
    double error = 0;
    bool exact = true;
    for (const Target::Entry& entry : target.entries) {
        const double difference = std::fabs(found[entry.number] - entry.amount);
        if (difference <= kCountTolerance) continue;
        exact = false;
        error += difference / entry.amount;
    }
    error /= static_cast<double>(target.entries.size());
    row[kCountError] = exact ? 0.0 : error;
    if (exact) return 10.0;
    static constexpr double kLimits[] = {0.05, 0.10, 0.20, 0.30, 0.50};
    static constexpr double kScores[] = {8, 5, 2, -2, -5};
    for (int i = 0; i < 5; ++i)
        if (error < kLimits[i] - kErrorTolerance) return kScores[i];
    return -10.0;
}

bool outside(double value, double low, double high) {
    return !(low <= value && value <= high);
}  // nan is outside

}  // namespace

void score_structure(const cif::Structure& structure, const Target& target, const Weights& w,
                     const Thresholds& t, double* row) {
    const std::size_t n = structure.numbers.size();
    const double sites = static_cast<double>(n);
    const double volume = geometry::volume(structure.lattice);
    const double cubic_cm = volume * 1e-24;  // underflows where pymatgen's does
    const double density = cubic_cm == 0 ? kNan : structure.mass * kGramsPerAmu / cubic_cm;
    double d_min = structure.min_distance;
    if (t.own_images && !std::isnan(d_min)) {
        const double own = geometry::shortest_vector(structure.lattice);
        d_min = own < d_min || std::isnan(own) ? own : d_min;
    }
    row[kSites] = sites;
    row[kVolume] = volume;
    row[kDensity] = density;
    row[kMinDistance] = d_min;

    int bad = 0;
    const bool all_inside = structure.raw_low >= t.coord_min && structure.raw_high <= t.coord_max;
    for (std::size_t i = 0; i + 2 < structure.raw.size() && !all_inside; i += 3) {
        bool inside = true;
        for (std::size_t k = i; k < i + 3; ++k)
            inside &= structure.raw[k] >= t.coord_min && structure.raw[k] <= t.coord_max;
        bad += !inside;
    }
    row[kBadCoords] = bad;
    row[kVolumePenalty] = outside(volume, t.volume_min, t.volume_max) ? 3.0 : 0.0;
    row[kSitesPenalty] = n < 1 ? 10.0 : sites > t.max_sites ? 2.0 : 0.0;
    row[kCoordPenalty] = std::min(3.0, 0.5 * bad);
    row[kDensityPenalty] = outside(density, t.density_min, t.density_max) ? 2.0 : 0.0;
    row[kDistancePenalty] = d_min >= t.near ? 0.0 : d_min >= t.close ? 3.0 : 8.0;
    const double per_atom = volume / sites;
    row[kVolumePerAtomPenalty] = per_atom > t.volume_per_atom_max    ? 2.0
                                 : per_atom >= t.volume_per_atom_min ? 0.0
                                                                     : 4.0;

    row[kParse] = 10.0;
    if (target.entries.empty()) {
        row[kComp] = row[kMissing] = row[kExtra] = 0.0;
        row[kCountError] = kNan;
    } else {
        row[kComp] = composition(structure, target, row);
    }
    row[kValid] = std::max(
        -10.0, 10.0 - row[kVolumePenalty] - row[kSitesPenalty] - row[kCoordPenalty] - row[kDensityPenalty]);
    row[kPhys] = std::max(-10.0, 10.0 - row[kDistancePenalty] - row[kVolumePerAtomPenalty]);
    row[kTotal] = w.comp * row[kComp] + w.parse * row[kParse] + w.valid * row[kValid] + w.phys * row[kPhys];
}

void score_failure(const Weights& w, double* row) {
    for (int i = 0; i < kScoreColumns; ++i) row[i] = kNan;
    row[kComp] = -15.0;
    row[kParse] = -20.0;
    row[kValid] = -10.0;
    row[kPhys] = -10.0;
    row[kTotal] = -15.0 * w.comp - 20.0 * w.parse - 10.0 * w.valid - 10.0 * w.phys;
}

}  // namespace catmllm::pvcp
