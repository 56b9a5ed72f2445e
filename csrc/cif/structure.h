// From a data block to the sites of the whole cell, by the rules of pymatgen's CifParser._get_structure.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "../geometry/lattice.h"
#include "../geometry/min_distance.h"
#include "arena.h"
#include "block.h"
#include "elements.h"
#include "status.h"
#include "symmetry.h"

namespace catmllm::cif {

// What sits on a site: an element or a dummy, with an oxidation state where the file lists them.
struct Species {
    int element = kNoElement;  // index into the element table; kNoElement for a dummy
    std::string_view dummy;
    bool has_oxidation = false;
    double oxidation = 0;
};

struct Amount {
    std::uint32_t species;
    double value;
};

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
    std::vector<double> raw;           // [R, 3] coordinates as written, of the rows that are atoms
    double mass = 0;                   // amu of the whole cell; nan with a dummy
    double raw_low = 0, raw_high = 0;  // the least and the largest number in `raw`; nan where one is no number
    double min_distance = 0;           // Å, see geometry/min_distance.h
    Fields fields;
    void clear();
};

// Reused memory of structure building.
struct StructureScratch {
    struct Row {
        std::uint32_t first_amount;
        std::uint32_t n_amounts;
        std::uint32_t group;
    };
    // What the last few names of sites stand for, by their letters.
    struct Name {
        std::uint64_t word;
        std::uint32_t size;     // 0: free
        std::uint32_t species;  // kNoSpecies: the site is dropped
        std::uint32_t hydrogens;
    };
    static constexpr std::uint32_t kNoSpecies = 0xffffffff;
    static constexpr std::size_t kNames = 32;
    Name names[kNames];
    KnownComponents components;
    std::vector<AffineOperation> operations;
    std::vector<Species> species;
    std::vector<Amount> amounts;
    std::vector<Row> rows;                    // more than there are: it only grows
    std::vector<double> x;                    // [rows, 3], thirds made exact
    std::vector<Token> letters[6];            // of site columns that are no lists but strings
    std::vector<std::uint32_t> species_rows;  // the last row of one species alone, by species
    std::vector<std::uint32_t> groups;        // row that stands for a group of equal compositions
    std::vector<std::uint32_t> table;
    std::vector<std::uint32_t> next;
    std::vector<std::uint32_t> site_group;
    std::vector<std::uint64_t> words;
    std::vector<double> sums;
    geometry::DistanceScratch distance;
};

// Builds the structure of a block. kSkipBlock: pymatgen goes on to the next block; kRejectText: it raises.
Status build_structure(const Block& block, bool magnetic, bool incommensurate, StructureScratch& scratch,
                       Structure& structure);

}  // namespace catmllm::cif
