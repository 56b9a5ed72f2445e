#include "structure.h"

#include <cmath>

#include "steps.h"

namespace catmllm::cif {
namespace {

// Sites farther apart than this are not the same to pymatgen: such a pair is nearer than the tolerance along
// all three axes. (1 % covers rounding.)
double farthest_same(const geometry::Lattice& lattice) {
    double diagonal = 0;
    for (int k = 0; k < 3; ++k) {
        const double* axis = lattice.rows + 3 * k;
        diagonal += std::sqrt(axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2]);
    }
    return 1.01 * kSiteTolerance * diagonal;
}

}  // namespace

void Structure::clear() {
    frac.clear();
    numbers.clear();
    counts.clear();
    raw.clear();
    mass = min_distance = raw_low = raw_high = 0;
    fields = Fields();
}

Status build_structure(const Block& block, bool magnetic, bool incommensurate, StructureScratch& s,
                       Structure& out) {
    out.clear();
    s.compositions.clear();
    const SiteRows& rows = s.rows;
    const auto measure = [&](double enough) {
        out.min_distance =
            geometry::min_distance(out.lattice, out.frac.data(), out.frac.size() / 3, s.distance, enough);
    };

    bool have_lattice = false;
    Status status = read_lattice(block, out.lattice, have_lattice);
    if (!status.ok()) return status;
    if (magnetic && incommensurate) return reject_text(Reason::kMagnetic);
    if (magnetic && !have_lattice) return skip_block(Reason::kCell);
    status = magnetic ? magnetic_operations(block, s.components, s.operations)
                      : symmetry_operations(block, s.components, s.operations);
    if (!status.ok()) return status;
    if (magnetic) status = check_moments(block);
    if (!status.ok()) return status;
    OxidationStates oxidation;
    status = oxidation.read(block);
    if (!status.ok()) return status;
    if (!block[Key::kSiteLabel].present()) return skip_block(Reason::kSites);
    status = read_site_rows(block, oxidation, s.operations.size(), s.site_rows, s.rows, s.compositions, out);
    if (!status.ok()) return status;

    // With x,y,z alone, sites that are far enough apart are the rows: nothing is merged and nothing is made.
    const bool identity = s.operations.size() == 1 && s.operations[0].is_identity();
    bool apart = false;
    if (identity && have_lattice && !rows.far_away && rows.size <= Limits::kSites) {
        rows_as_sites(rows, out.frac);
        const double same = farthest_same(out.lattice);
        measure(same);                    // any number of rows may lie on one site
        apart = out.min_distance > same;  // not where it is nan
    }
    Merging found;
    if (!apart) status = merge_rows(s.operations, identity, s.points, s.rows, s.compositions, found);
    if (!status.ok()) return status;
    if (magnetic && found.merged) return reject_text(Reason::kMagnetic);  // disordered magnetic structures
    status = group_rows(s.compositions, s.rows, s.groups);
    if (!status.ok()) return status;
    if (apart || (identity && !found.close_call && !rows.far_away)) {
        if (!apart) rows_as_sites(rows, out.frac);
        s.groups.of_site.resize(rows.size);
        for (std::uint32_t r = 0; r < rows.size; ++r) s.groups.of_site[r] = rows.rows[r].group;
    } else {
        status = make_images(s.operations, rows, s.points, s.groups, out.frac);
        if (!status.ok()) return status;
    }

    for (std::uint32_t row : s.groups.first_row)
        if (s.compositions.total(rows.rows[row].composition) > 1.0) return skip_block(Reason::kOccupancy);
    if (rows.size == 0) return skip_block(Reason::kSites);
    if (!have_lattice) return skip_block(Reason::kCell);
    count_atoms(s.compositions, rows, s.groups, s.counts, out);
    out.fields = fields_of(block, s.labels);
    if (!apart) measure(0);
    return ok();
}

}  // namespace catmllm::cif
