// The rows of a site loop that are atoms, and what reading them needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "species.h"
#include "tokens.h"

namespace catmllm::cif {

struct SiteRow {
    Composition composition;
    std::uint32_t group;  // of equal compositions, see Groups
};

// Both arrays may be longer than `size` says: they only grow.
struct SiteRows {
    std::vector<SiteRow> rows;
    std::vector<double> x;  // [size, 3], thirds made exact
    std::uint32_t size = 0;
    bool inside = false;    // all coordinates are in [0, 1)
    bool far_away = false;  // a coordinate is too large for the arithmetic of a PointTable, or no number
    const double* at(std::uint32_t row) const { return x.data() + 3 * std::size_t{row}; }
};

// What the last few names of sites stand for, by their letters: rows repeat them.
struct KnownName {
    static constexpr std::uint32_t kNoSpecies = 0xffffffff;
    std::uint64_t word;
    std::uint32_t size;     // 0: free
    std::uint32_t species;  // kNoSpecies: the site is dropped
    std::uint32_t hydrogens;
    bool finite;  // its oxidation state
};

struct SiteRowScratch {
    static constexpr std::size_t kNames = 32;  // a power of two
    KnownName names[kNames];
    // Letters of columns that are no lists but strings.
    std::vector<Token> name_letters;
    std::vector<Token> occupancy_letters;
    std::vector<Token> axis_letters[3];
};

// Groups of rows with equal compositions.
struct Groups {
    std::vector<std::uint32_t> first_row;            // of each group
    std::vector<std::uint32_t> of_site;              // the group of each site of the cell
    std::vector<std::uint32_t> last_row_of_species;  // of one species alone
};

}  // namespace catmllm::cif
