// Rows that an operation carries onto an earlier one: the first loop of CifParser._get_structure.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "steps.h"

namespace catmllm::cif {
namespace {

constexpr std::uint32_t kMostFarAway = 4096;  // rows that are compared one by one

// The rows kept so far, searched by position.
class Merger {
  public:
    Merger(const std::vector<AffineOperation>& operations, bool identity, PointTable& points, SiteRows& rows,
           Compositions& compositions, Merging& found)
        : operations_(operations),
          identity_(identity),
          points_(points),
          rows_(rows),
          compositions_(compositions),
          found_(found) {}

    Status take(std::uint32_t r);
    std::uint32_t kept() const { return kept_; }

  private:
    // Few rows are compared one by one, and so are huge and non-finite coordinates.
    bool one_by_one() const { return kept_ <= kFewPoints || rows_.far_away; }
    Status find_match(const double* x, std::uint32_t& match);
    Status find_repeated(const double* x, const double* wrapped, std::uint32_t& repeated) const;

    const std::vector<AffineOperation>& operations_;
    const bool identity_;
    PointTable& points_;
    SiteRows& rows_;
    Compositions& compositions_;
    Merging& found_;
    std::uint32_t kept_ = 0;
};

// CifParser.get_matching_coord: the first operation that carries x onto a row that is kept, the earliest such
// row.
Status Merger::find_match(const double* x, std::uint32_t& match) {
    for (std::size_t o = 0; o < operations_.size() && kept_ > 0 && match == kNoPoint; ++o) {
        double image[3];
        if (identity_) {
            std::memcpy(image, x, sizeof image);
        } else {
            for (int k = 0; k < 3; ++k) image[k] = operations_[o].component(k, x);
        }
        const auto closer = [&](std::uint32_t id) {
            if (nearly_same_modulo_one(rows_.at(id), image)) {
                found_.close_call = true;
                if (same_modulo_one(rows_.at(id), image)) match = std::min(match, id);
            }
            return false;
        };
        if (one_by_one()) {
            for (std::uint32_t id = 0; id < kept_; ++id) closer(id);
            continue;
        }
        double wrapped[3];
        wrap(image, wrapped);  // not finite: no match
        bool full = false;
        if (std::isfinite(wrapped[0] + wrapped[1] + wrapped[2])) points_.search(wrapped, full, closer);
        if (full) return reject_text(Reason::kLimit);
    }
    return ok();
}

// A row that is kept and has exactly these coordinates.
Status Merger::find_repeated(const double* x, const double* wrapped, std::uint32_t& repeated) const {
    const auto exact = [&](std::uint32_t id) {
        const double* y = rows_.at(id);
        if (y[0] == x[0] && y[1] == x[1] && y[2] == x[2]) repeated = id;
        return repeated != kNoPoint;
    };
    bool full = false;
    if (one_by_one()) {
        for (std::uint32_t id = 0; id < kept_ && repeated == kNoPoint; ++id) exact(id);
    } else {
        points_.search(wrapped, full, exact);
    }
    return full ? reject_text(Reason::kLimit) : ok();
}

Status Merger::take(std::uint32_t r) {
    const SiteRow row = rows_.rows[r];
    const double x[3] = {rows_.at(r)[0], rows_.at(r)[1], rows_.at(r)[2]};
    if (rows_.far_away && kept_ > kMostFarAway) return reject_text(Reason::kLimit);
    std::uint32_t match = kNoPoint;
    if (const Status status = find_match(x, match); !status.ok()) return status;
    if (match != kNoPoint) {
        found_.merged = true;
        compositions_.add(rows_.rows[match].composition, row.composition);
        return ok();
    }
    double wrapped[3];
    wrap(x, wrapped);
    if (!identity_) {
        // Without the identity among the operations a row may repeat an earlier one's coordinates unnoticed:
        // the same key of pymatgen's dict, so the later composition wins.
        std::uint32_t repeated = kNoPoint;
        if (const Status status = find_repeated(x, wrapped, repeated); !status.ok()) return status;
        if (repeated != kNoPoint) {
            rows_.rows[repeated].composition = row.composition;
            return ok();
        }
    }
    std::memcpy(rows_.x.data() + 3 * std::size_t{kept_}, x, sizeof x);
    rows_.rows[kept_++] = row;
    if (kept_ > Limits::kSites) return reject_text(Reason::kLimit);
    if (!rows_.far_away) points_.insert(wrapped);
    return ok();
}

}  // namespace

Status merge_rows(const std::vector<AffineOperation>& operations, bool identity, PointTable& points,
                  SiteRows& rows, Compositions& compositions, Merging& found) {
    points.reset(rows.size);
    Merger merger(operations, identity, points, rows, compositions, found);
    for (std::uint32_t r = 0; r < rows.size; ++r)
        if (const Status status = merger.take(r); !status.ok()) return status;
    rows.size = merger.kept();
    return ok();
}

}  // namespace catmllm::cif
