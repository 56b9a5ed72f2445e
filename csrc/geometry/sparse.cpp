// Sites that crowd a small part of the cell: boxes as fine as the bound asks for, of which only the filled
// ones are kept, sorted by key.
#include <vector>

#include "images.h"
#include "search.h"

namespace catmllm::geometry {
namespace {

constexpr int kKeyBits = 21;  // of each axis
constexpr double kMostSlices = 1 << (kKeyBits - 1);

struct Member {
    std::uint64_t key;
    std::uint32_t site;
};

struct SparseBoxes {
    Slices slices;
    std::vector<Member> members;        // sorted by key
    std::vector<std::uint32_t> starts;  // of the filled boxes in `members`, and their end
};

std::uint64_t key_of(const int at[3]) {
    std::uint64_t key = 0;
    for (int k = 0; k < 3; ++k) key = key << kKeyBits | static_cast<std::uint64_t>(at[k]);
    return key;
}

// The number of sites in the fullest box.
std::uint32_t fill(const Cell& cell, double r, std::size_t n, const DistanceScratch& s, SparseBoxes& boxes) {
    Slices& slices = boxes.slices;
    for (int k = 0; k < 3; ++k) {
        const double wanted = r > 0 ? std::min(cell.spacing[k] / (r * (1 + 1e-9)), kMostSlices) : kMostSlices;
        slices.n[k] = wanted >= 3 ? static_cast<int>(wanted) : 1;
        slices.thin[k] = slices.n[k] == 1;
    }
    std::vector<Member>& members = boxes.members;
    for (std::size_t i = 0; i < n; ++i) {
        int at[3];
        for (int k = 0; k < 3; ++k) at[k] = slices.of(s.column(k)[i], k);
        members[i] = {key_of(at), static_cast<std::uint32_t>(i)};
    }
    std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) { return a.key < b.key; });
    std::vector<std::uint32_t>& starts = boxes.starts;
    starts.clear();
    std::uint32_t most = 0;
    for (std::uint32_t i = 0; i < n; ++i) {
        if (i != 0 && members[i].key == members[i - 1].key) continue;
        if (!starts.empty()) most = std::max(most, i - starts.back());
        starts.push_back(i);
    }
    most = std::max(most, static_cast<std::uint32_t>(n) - starts.back());
    starts.push_back(static_cast<std::uint32_t>(n));
    return most;
}

}  // namespace

double search_sparse(const Cell& cell, double r, std::size_t n, const DistanceScratch& s, double best,
                     double enough) {
    SparseBoxes boxes;
    boxes.members.resize(n);
    for (int round = 0; round < 64; ++round) {
        const std::uint32_t most = fill(cell, r, n, s, boxes);
        if (!lower_bound_of_crowd(cell, boxes.slices, most, r)) break;
    }
    const std::vector<Member>& members = boxes.members;
    const std::vector<std::uint32_t>& starts = boxes.starts;
    const Images images(cell, boxes.slices.thin);
    const auto pairs = [&](std::size_t box, std::size_t other, const double* shift) {
        for (std::uint32_t p = starts[box]; p < starts[box + 1]; ++p) {
            double a[3];
            site_position(cell, s, members[p].site, a);
            for (std::uint32_t q = box == other ? p + 1 : starts[other]; q < starts[other + 1]; ++q) {
                double b[3];
                site_position(cell, s, members[q].site, b);
                best = std::min(best, images.nearest(b[0] - a[0] + shift[0], b[1] - a[1] + shift[1],
                                                     b[2] - a[2] + shift[2]));
                if (best <= enough) return;
            }
        }
    };
    const auto end = starts.end() - 1;
    const auto before = [&](std::uint32_t start, std::uint64_t key) { return members[start].key < key; };
    for (std::size_t box = 0; box + 1 < starts.size(); ++box) {
        const double none[3] = {0, 0, 0};
        pairs(box, box, none);
        if (best <= enough) return best;
        const std::uint64_t key = members[starts[box]].key;
        int at[3];
        for (int k = 0; k < 3; ++k)
            at[k] = static_cast<int>(key >> (kKeyBits * (2 - k)) & ((1u << kKeyBits) - 1));
        for (int neighbour = kFirstLater; neighbour < kNeighbours; ++neighbour) {
            int beside[3];
            double around[3];
            if (!step_beside(boxes.slices, neighbour, at, beside, around)) continue;
            const std::uint64_t other = key_of(beside);
            const auto found = std::lower_bound(starts.begin(), end, other, before);
            if (found == end || members[*found].key != other) continue;
            double shift[3];
            to_cartesian(cell.basis, around, shift);
            pairs(box, static_cast<std::size_t>(found - starts.begin()), shift);
        }
    }
    return best;
}

}  // namespace catmllm::geometry
