// Which rows have equal compositions: pymatgen makes the images of each such group together.
#include <algorithm>

#include "steps.h"

namespace catmllm::cif {
namespace {

constexpr std::uint32_t kNone = 0xffffffff;
// Below this an amount may be within the tolerance of none at all, and equality is no equivalence any more.
constexpr double kTiny = 1e-7;
constexpr std::size_t kShortRun = 64;  // up to here Python sorts by insertion

bool same_amounts(const Compositions& all, const Composition& a, const Composition& b) {
    for (std::uint32_t i = 0; i < a.size; ++i)
        if (all.amounts[a.first + i].value != all.amounts[b.first + i].value) return false;
    return a.size == b.size;
}

// list.sort() of Python 3.11 for a short list: the run that it begins with, then every later one inserted by
// bisection.
void python_sort(std::vector<std::uint32_t>& order, const Compositions& all, const SiteRows& rows) {
    const auto less = [&](std::uint32_t a, std::uint32_t b) {
        return all.less(rows.rows[a].composition, rows.rows[b].composition);
    };
    if (order.size() >= kShortRun) {
        std::stable_sort(order.begin(), order.end(), less);
        return;
    }
    if (order.size() < 2) return;
    std::size_t run = 2;
    if (less(order[1], order[0])) {
        while (run < order.size() && less(order[run], order[run - 1])) ++run;
        std::reverse(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(run));
    } else {
        while (run < order.size() && !less(order[run], order[run - 1])) ++run;
    }
    for (std::size_t i = run; i < order.size(); ++i) {
        const std::uint32_t pivot = order[i];
        std::size_t low = 0;
        std::size_t high = i;
        while (low < high) {
            const std::size_t middle = (low + high) / 2;
            if (less(pivot, order[middle])) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        std::copy_backward(order.begin() + static_cast<std::ptrdiff_t>(low),
                           order.begin() + static_cast<std::ptrdiff_t>(i),
                           order.begin() + static_cast<std::ptrdiff_t>(i) + 1);
        order[low] = pivot;
    }
}

// groupby(sorted(...)): neighbours in pymatgen's order that equal the first of their group.
Status group_sorted_rows(const Compositions& compositions, SiteRows& rows, Groups& groups) {
    groups.first_row.clear();
    std::vector<std::uint32_t> order(rows.size);
    for (std::uint32_t r = 0; r < rows.size; ++r) order[r] = r;
    python_sort(order, compositions, rows);
    for (const std::uint32_t r : order) {
        SiteRow& row = rows.rows[r];
        if (groups.first_row.empty() ||
            !compositions.equal(rows.rows[groups.first_row.back()].composition, row.composition)) {
            if (groups.first_row.size() >= Limits::kCompositions) return reject_text(Reason::kLimit);
            groups.first_row.push_back(r);
        }
        row.group = static_cast<std::uint32_t>(groups.first_row.size() - 1);
    }
    return ok();
}

}  // namespace

Status group_rows(const Compositions& compositions, SiteRows& rows, Groups& groups) {
    groups.first_row.clear();
    std::vector<std::uint32_t>& last_row = groups.last_row_of_species;
    const auto tiny = [&](const Composition& c) {
        for (std::uint32_t i = 0; i < c.size; ++i)
            if (compositions.amounts[c.first + i].value < kTiny) return true;
        return false;
    };
    last_row.assign(compositions.species.size(), kNone);
    for (std::uint32_t r = 0; r < rows.size; ++r) {
        SiteRow& row = rows.rows[r];
        if (row.composition.size == 1) {  // mostly the same species and amount as in a row before
            const Amount& amount = compositions.amounts[row.composition.first];
            const std::uint32_t before = last_row[amount.species];
            if (before != kNone &&
                compositions.amounts[rows.rows[before].composition.first].value == amount.value) {
                row.group = rows.rows[before].group;
                continue;
            }
            last_row[amount.species] = r;
        }
        row.group = kNone;
        for (std::uint32_t g = 0; g < groups.first_row.size() && row.group == kNone; ++g) {
            const Composition& first = rows.rows[groups.first_row[g]].composition;
            if (!compositions.equal(first, row.composition)) continue;
            row.group = g;
            if (!same_amounts(compositions, first, row.composition))
                return group_sorted_rows(compositions, rows, groups);
        }
        if (row.group == kNone && tiny(row.composition)) return group_sorted_rows(compositions, rows, groups);
        if (row.group != kNone) continue;
        if (groups.first_row.size() >= Limits::kCompositions) return reject_text(Reason::kLimit);
        row.group = static_cast<std::uint32_t>(groups.first_row.size());
        groups.first_row.push_back(r);
    }
    return ok();
}

}  // namespace catmllm::cif
