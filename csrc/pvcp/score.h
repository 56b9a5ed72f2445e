// The PVCP reward of a parsed structure (paper Eqs. 12-44), with every sub-term.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../cif/structure.h"

namespace catmllm::pvcp {

struct Weights {
    double comp = 0.60, parse = 0.20, valid = 0.10, phys = 0.10;
};

struct Thresholds {
    double close = 0.5, near = 1.0;
    double volume_min = 1.0, volume_max = 100'000.0;
    double max_sites = 1000;
    double coord_min = -0.1, coord_max = 1.1;
    double density_min = 0.1, density_max = 30.0;
    double volume_per_atom_min = 3.0, volume_per_atom_max = 150.0;
    bool own_images = false;  // a site's own images count for the least distance (Eq. 41 leaves them out)
};

// The wanted counts by atomic number; empty leaves the composition out.
struct Target {
    struct Entry {
        int number;
        double amount;
    };
    std::vector<Entry> entries;
};

// One row of numbers a text, in the order of kScoreNames.
enum ScoreColumn {
    kTotal,
    kComp,
    kParse,
    kValid,
    kPhys,
    kSites,
    kVolume,
    kDensity,
    kMinDistance,
    kMissing,
    kExtra,
    kCountError,
    kVolumePenalty,
    kSitesPenalty,
    kCoordPenalty,
    kDensityPenalty,
    kDistancePenalty,
    kVolumePerAtomPenalty,
    kBadCoords,
    kScoreColumns,
};

constexpr double kGramsPerAmu = 1.66053906892e-24;

// Writes the kScoreColumns numbers of a structure.
void score_structure(const cif::Structure& structure, const Target& target, const Weights& weights,
                     const Thresholds& thresholds, double* row);

// The numbers of a text that does not parse.
void score_failure(const Weights& weights, double* row);

}  // namespace catmllm::pvcp
