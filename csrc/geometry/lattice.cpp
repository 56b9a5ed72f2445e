#include "lattice.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace catmllm::geometry {
namespace {

void subtract(double* a, const double* b, double times) {
    for (int k = 0; k < 3; ++k) a[k] -= times * b[k];
}

// Shortens c by combinations of a and b (reduced, not parallel): the point of their plane's lattice nearest
// to c.
bool shorten(const double* a, const double* b, double* c) {
    const double aa = dot(a, a);
    const double ab = dot(a, b);
    const double bb = dot(b, b);
    const double det = aa * bb - ab * ab;
    const double ca = dot(c, a);
    const double cb = dot(c, b);
    double x = 0;
    double y = 0;
    if (det > 0) {
        x = std::rint((ca * bb - cb * ab) / det);
        y = std::rint((cb * aa - ca * ab) / det);
    }
    double best[3];
    double base[3] = {c[0], c[1], c[2]};
    subtract(base, a, x);
    subtract(base, b, y);
    // The rounded point is taken whatever its norm says: beside a vector 1e11 times as long the norm sees no
    // difference.
    const double before = dot(c, c);
    double best_norm = dot(base, base);
    std::memcpy(best, base, sizeof best);
    for (int i = -1; i <= 1; ++i) {
        for (int j = -1; j <= 1; ++j) {
            double trial[3] = {base[0], base[1], base[2]};
            subtract(trial, a, i);
            subtract(trial, b, j);
            const double norm = dot(trial, trial);
            if (norm < best_norm) {
                best_norm = norm;
                std::memcpy(best, trial, sizeof best);
            }
        }
    }
    std::memcpy(c, best, sizeof best);
    return best_norm < before * (1 - 1e-12);
}

}  // namespace

Lattice lattice_from_parameters(const double lengths[3], const double angles_degrees[3]) {
    double cosine[3];
    double sine[3];
    for (int k = 0; k < 3; ++k) {
        const double radians = angles_degrees[k] * (3.14159265358979323846 / 180.0);
        cosine[k] = std::cos(radians);
        sine[k] = std::sin(radians);
    }
    double value = (cosine[0] * cosine[1] - cosine[2]) / (sine[0] * sine[1]);
    if (value < -1) value = -1;
    if (value > 1) value = 1;
    const double gamma_star = std::acos(value);
    const double a = lengths[0];
    const double b = lengths[1];
    return Lattice{{a * sine[1], 0.0, a * cosine[1], -b * sine[0] * std::cos(gamma_star),
                    b * sine[0] * std::sin(gamma_star), b * cosine[0], 0.0, 0.0, lengths[2]}};
}

double volume(const Lattice& lattice) {
    const double* a = lattice.rows;
    const double* b = a + 3;
    const double* c = a + 6;
    return std::fabs((a[1] * b[2] - a[2] * b[1]) * c[0] + (a[2] * b[0] - a[0] * b[2]) * c[1] +
                     (a[0] * b[1] - a[1] * b[0]) * c[2]);
}

bool invert(const double matrix[9], double inverse[9]) {
    double m[3][6];
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            m[i][j] = matrix[3 * i + j];
            m[i][3 + j] = i == j;
        }
    }
    for (int k = 0; k < 3; ++k) {
        int pivot = k;
        for (int i = k + 1; i < 3; ++i)
            if (std::fabs(m[i][k]) > std::fabs(m[pivot][k])) pivot = i;
        if (m[pivot][k] == 0) return false;
        if (pivot != k)
            for (int j = 0; j < 6; ++j) std::swap(m[k][j], m[pivot][j]);
        for (int i = k + 1; i < 3; ++i) {
            const double factor = m[i][k] / m[k][k];
            for (int j = k; j < 6; ++j)
                if (m[k][j] != 0) m[i][j] -= factor * m[k][j];  // as LAPACK: 0 * nan changes nothing
        }
    }
    for (int k = 2; k >= 0; --k) {
        for (int j = 3; j < 6; ++j) {
            double sum = m[k][j];
            for (int i = k + 1; i < 3; ++i) sum -= m[k][i] * inverse[3 * i + j - 3];
            inverse[3 * k + j - 3] = sum / m[k][k];
        }
    }
    return true;
}

bool plane_spacings(const Lattice& lattice, double spacings[3]) {
    double inverse[9];
    if (!invert(lattice.rows, inverse)) return false;
    constexpr double kTwoPi = 2 * 3.14159265358979323846;
    double reciprocal[9];  // rows are reciprocal vectors; the detour over 2 pi may overflow as it does in
                           // pymatgen
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) reciprocal[3 * i + j] = inverse[3 * j + i] * kTwoPi / kTwoPi;
    double metric[9];
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) metric[3 * i + j] = dot(reciprocal + 3 * i, reciprocal + 3 * j);
    for (int k = 0; k < 3; ++k) {
        // hkl . G . hkl with every product formed: an infinite element elsewhere makes it nan
        const double hkl[3] = {k == 0 ? 1.0 : 0.0, k == 1 ? 1.0 : 0.0, k == 2 ? 1.0 : 0.0};
        double sum = 0;
        for (int j = 0; j < 3; ++j)
            sum += (hkl[0] * metric[j] + hkl[1] * metric[3 + j] + hkl[2] * metric[6 + j]) * hkl[j];
        spacings[k] = 1.0 / std::sqrt(sum);
    }
    return true;
}

bool reduce(const Lattice& lattice, Lattice& reduced) {
    double scale = 0;
    for (double x : lattice.rows) {
        if (!std::isfinite(x)) return false;
        scale = std::fmax(scale, std::fabs(x));
    }
    if (scale == 0) return false;
    double v[3][3];
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) v[i][j] = lattice.rows[3 * i + j] / scale;
    bool settled = false;  // c is where it was before it was shortened
    for (int round = 0; round < 1000; ++round) {
        // ascending lengths
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2 - i; ++j)
                if (dot(v[j], v[j]) > dot(v[j + 1], v[j + 1])) std::swap(v[j], v[j + 1]);
        const double aa = dot(v[0], v[0]);
        if (aa == 0) return false;
        const double times = std::rint(dot(v[1], v[0]) / aa);
        if (times != 0) {
            double trial[3] = {v[1][0], v[1][1], v[1][2]};
            subtract(trial, v[0], times);
            if (dot(trial, trial) < dot(v[1], v[1]) * (1 - 1e-12)) {
                std::memcpy(v[1], trial, sizeof trial);
                continue;
            }
        }
        const double before[3] = {v[2][0], v[2][1], v[2][2]};
        if (shorten(v[0], v[1], v[2])) continue;
        settled = std::memcmp(before, v[2], sizeof before) == 0;
        break;
    }
    if (!settled) shorten(v[0], v[1], v[2]);
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) reduced.rows[3 * i + j] = v[i][j] * scale;
    return true;
}

double shortest_vector(const Lattice& lattice) {
    Lattice reduced;
    if (!reduce(lattice, reduced)) return std::nan("");
    double least = std::numeric_limits<double>::infinity();
    for (int k = 0; k < 3; ++k) {
        const double* v = reduced.rows + 3 * k;
        least = std::fmin(least, std::hypot(v[0], v[1], v[2]));
    }
    return least;
}

}  // namespace catmllm::geometry
