// Which rows have equal compositions: pymatgen makes the images of each such group together.
#include "steps.h"

namespace catmllm::cif {
namespace {

constexpr std::uint32_t kNone = 0xffffffff;

}  // namespace

Status group_rows(const Compositions& compositions, SiteRows& rows, Groups& groups) {
    groups.first_row.clear();
    std::vector<std::uint32_t>& last_row = groups.last_row_of_species;
    last_row.assign(compositions.species.size(), kNone);
    for (std::uint32_t r = 0; r < rows.size; ++r) {
        SiteRow& row = rows.rows[r];
        if (row.composition.size == 1) {  // mostly the same species and amount as in a row before
            const Amount& amount = compositions.amounts[row.composition.first];
            const std::uint32_t before = last_row[amount.species];
            if (before != kNone && compositions.amounts[rows.rows[before].composition.first].value == amount.value) {
                row.group = rows.rows[before].group;
                continue;
            }
            last_row[amount.species] = r;
        }
        row.group = kNone;
        for (std::uint32_t g = 0; g < groups.first_row.size() && row.group == kNone; ++g)
            if (compositions.equal(rows.rows[groups.first_row[g]].composition, row.composition)) row.group = g;
        if (row.group != kNone) continue;
        if (groups.first_row.size() >= Limits::kCompositions) return reject_text(Reason::kLimit);
        row.group = static_cast<std::uint32_t>(groups.first_row.size());
        groups.first_row.push_back(r);
    }
    return ok();
}

}  // namespace catmllm::cif
