// The nearest periodic image of a vector along some of the axes.
#pragma once

#include <algorithm>
#include <cmath>

#include "rounding.h"
#include "search.h"

namespace catmllm::geometry {

// Images along the axes in `thin`: the nearest is the rounded one or, for a reduced basis, one beside it.
class Images {
  public:
    Images(const Cell& cell, const bool thin[3]) {
        for (int k = 0; k < 3; ++k)
            if (thin[k]) axis_[n_axes_++] = cell.basis + 3 * k;  // ascending lengths
        // Each axis less its parts along the shorter ones (Gram-Schmidt): rounding goes plane by plane, from
        // the longest axis down, which stays exact when one axis is 1e11 times another.
        bool orthogonal = true;
        for (int i = 0; i < n_axes_; ++i) {
            double* own = upright_[i];
            for (int d = 0; d < 3; ++d) own[d] = axis_[i][d];
            for (int j = 0; j < i; ++j) {
                const double part = dot(axis_[i], upright_[j]) / dot(upright_[j], upright_[j]);
                orthogonal &= std::fabs(part) < 1e-14;
                for (int d = 0; d < 3; ++d) own[d] -= part * upright_[j][d];
            }
            const double norm = dot(own, own);
            for (int d = 0; d < 3; ++d) own_over_norm_[i][d] = own[d] / norm;
        }
        if (!orthogonal && n_axes_ >= 2) list_shifts();
    }

    // Least squared length of the vector over its images.
    double nearest(double x, double y, double z) const {
        for (int i = n_axes_ - 1; i >= 0; --i) {
            const double n =
                round_even(own_over_norm_[i][0] * x + own_over_norm_[i][1] * y + own_over_norm_[i][2] * z);
            x -= n * axis_[i][0];
            y -= n * axis_[i][1];
            z -= n * axis_[i][2];
        }
        double best = x * x + y * y + z * z;
        for (int s = 0; s < n_shifts_; ++s) {
            const double dx = x + shifts_[s][0];
            const double dy = y + shifts_[s][1];
            const double dz = z + shifts_[s][2];
            best = std::min(best, dx * dx + dy * dy + dz * dz);
        }
        return best;
    }

    int n_axes() const { return n_axes_; }

  private:
    void list_shifts() {
        const int third = n_axes_ == 3 ? 1 : 0;
        for (int i = -1; i <= 1; ++i) {
            for (int j = -1; j <= 1; ++j) {
                for (int k = -third; k <= third; ++k) {
                    if (i == 0 && j == 0 && k == 0) continue;
                    double* shift = shifts_[n_shifts_++];
                    for (int d = 0; d < 3; ++d)
                        shift[d] = i * axis_[0][d] + j * axis_[1][d] + (third ? k * axis_[2][d] : 0.0);
                }
            }
        }
    }

    const double* axis_[3] = {nullptr, nullptr, nullptr};
    int n_axes_ = 0;
    double upright_[3][3] = {};
    double own_over_norm_[3][3] = {};
    double shifts_[26][3];
    int n_shifts_ = 0;
};

}  // namespace catmllm::geometry
