// From a data block to the sites of the whole cell, by the rules of pymatgen's CifParser._get_structure.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "../geometry/lattice.h"
#include "../geometry/min_distance.h"
#include "block.h"
#include "points.h"
#include "site_rows.h"
#include "species.h"
#include "status.h"
#include "symmetry.h"

namespace catmllm::cif {

// Atoms of one element (isotopes and oxidation states together) or of one dummy in the whole cell.
struct Count {
    std::string_view symbol;
    int number = 0;  // 0 for a dummy
    double amount = 0;
};

struct Fields {
    bool lattice = false;
    bool space_group = false;
    bool site_loop = false;
    bool duplicate_labels = false;
};

struct Structure {
    geometry::Lattice lattice{};
    std::vector<double> frac;           // [N, 3], in the order of the file: images follow their row
    std::vector<std::int32_t> numbers;  // [N], of the most abundant species; 0 for a dummy
    std::vector<Count> counts;
    std::vector<double> raw;  // [R, 3] coordinates as written, of the rows that are atoms
    double mass = 0;          // amu of the whole cell; nan with a dummy
    double raw_low = 0,
           raw_high = 0;      // the least and the largest number in `raw`; nan where one is no number
    double min_distance = 0;  // Å, see geometry/min_distance.h
    Fields fields;
    void clear();
};

struct CountScratch {
    std::vector<double> atoms_of_species;
    std::vector<std::uint32_t> sites_of_group;
    std::vector<std::int32_t> number_of_group;  // the atomic number of its most abundant species
};

struct LabelScratch {
    std::vector<std::uint64_t> words;        // of each label
    std::vector<std::uint32_t> row_in_slot;  // an open hash table
};

// Reused memory of structure building, by step.
struct StructureScratch {
    KnownComponents components;
    std::vector<AffineOperation> operations;
    SiteRowScratch site_rows;
    SiteRows rows;
    Compositions compositions;
    PointTable points;
    Groups groups;
    CountScratch counts;
    LabelScratch labels;
    geometry::DistanceScratch distance;
};

// Builds the structure of a block. kSkipBlock: pymatgen goes on to the next block; kRejectText: it raises.
Status build_structure(const Block& block, bool magnetic, bool incommensurate, StructureScratch& scratch,
                       Structure& structure);

}  // namespace catmllm::cif
