// From rows to the sites of the whole cell: CifParser._unique_coords.
#include <cmath>

#include "steps.h"

namespace catmllm::cif {

void rows_as_sites(const SiteRows& rows, std::vector<double>& frac) {
    if (rows.inside) return frac.assign(rows.at(0), rows.at(rows.size));
    frac.resize(3 * std::size_t{rows.size});
    for (std::uint32_t r = 0; r < rows.size; ++r) wrap(rows.at(r), frac.data() + 3 * std::size_t{r});
}

Status make_images(const std::vector<AffineOperation>& operations, const SiteRows& rows, PointTable& points,
                   Groups& groups, std::vector<double>& frac) {
    std::vector<std::uint32_t>& group_of_site = groups.of_site;
    group_of_site.clear();
    frac.clear();
    points.reset(std::size_t{rows.size} * operations.size());
    for (std::uint32_t r = 0; r < rows.size; ++r) {
        const std::uint32_t group = rows.rows[r].group;
        for (const AffineOperation& operation : operations) {
            double image[3];
            double wrapped[3];
            for (int k = 0; k < 3; ++k) {
                image[k] = operation.component(k, rows.at(r));
                if (std::isnan(image[k])) return skip_block(Reason::kNumber);   // floor(nan): ValueError
                if (std::isinf(image[k])) return reject_text(Reason::kNumber);  // floor(inf): OverflowError
            }
            wrap(image, wrapped);
            bool full = false;
            bool known = false;
            const auto same = [&](std::uint32_t id) {
                return group_of_site[id] == group && same_modulo_one(&frac[3 * std::size_t{id}], wrapped);
            };
            if (group_of_site.size() <= kFewPoints) {
                for (std::uint32_t id = 0; id < group_of_site.size() && !known; ++id) known = same(id);
            } else {
                known = points.search(wrapped, full, same);
            }
            if (full) return reject_text(Reason::kLimit);
            if (known) continue;
            points.insert(wrapped);
            frac.insert(frac.end(), wrapped, wrapped + 3);
            group_of_site.push_back(group);
            if (group_of_site.size() > Limits::kSites) return reject_text(Reason::kLimit);
        }
    }
    return ok();
}

}  // namespace catmllm::cif
