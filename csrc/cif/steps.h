// The steps from a block to a structure, in the order in which structure.cpp takes them; a file for each.
#pragma once

#include <cstddef>
#include <vector>

#include "../geometry/lattice.h"
#include "block.h"
#include "oxidation.h"
#include "points.h"
#include "site_rows.h"
#include "species.h"
#include "status.h"
#include "structure.h"
#include "symmetry.h"

namespace catmllm::cif {

// cell.cpp, CifParser.get_lattice: `found` false where it returns None. A cell without thickness is refused.
Status read_lattice(const Block& block, geometry::Lattice& lattice, bool& found);

// magnetic.cpp, CifParser._parse_magmoms: the values do not matter here, a column that is too short does.
Status check_moments(const Block& block);

// site_rows.cpp: the rows that are atoms, with the coordinates as written in `raw`, `raw_low` and `raw_high`
// of the structure. Refuses rows that make too many images under `n_operations`.
Status read_site_rows(const Block& block, const OxidationStates& oxidation, std::size_t n_operations,
                      SiteRowScratch& scratch, SiteRows& rows, Compositions& compositions,
                      Structure& structure);

struct Merging {
    bool merged = false;
    bool close_call = false;  // two rows are about as near as the tolerance
};

// merge.cpp, the first loop of CifParser._get_structure: rows that an operation carries onto an earlier one
// are added to it. `identity`: x,y,z is the one operation.
Status merge_rows(const std::vector<AffineOperation>& operations, bool identity, PointTable& points,
                  SiteRows& rows, Compositions& compositions, Merging& found);

// groups.cpp: numbers the different compositions; a row is in the first group that it equals.
Status group_rows(const Compositions& compositions, SiteRows& rows, Groups& groups);

// images.cpp: the rows themselves as sites, wrapped into the cell; of_site of `groups` follows.
void rows_as_sites(const SiteRows& rows, std::vector<double>& frac);

// images.cpp, CifParser._unique_coords for every group of rows: images that are not yet there, wrapped into
// the cell.
Status make_images(const std::vector<AffineOperation>& operations, const SiteRows& rows, PointTable& points,
                   Groups& groups, std::vector<double>& frac);

// counts.cpp: `numbers`, `counts` and `mass` of the structure.
void count_atoms(const Compositions& compositions, const SiteRows& rows, const Groups& groups,
                 CountScratch& scratch, Structure& structure);

// fields.cpp: which parts the block has.
Fields fields_of(const Block& block, LabelScratch& scratch);

}  // namespace catmllm::cif
