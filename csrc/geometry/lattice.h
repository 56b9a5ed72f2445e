// Cells: from parameters as pymatgen builds them, volume, plane spacings, reduced bases.
#pragma once

namespace catmllm::geometry {

struct Lattice {
    double rows[9];  // a, b, c in Å
};

inline double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

// Lattice.from_parameters: c along z, a in the xz plane; the cosine of gamma* is clipped to [-1, 1].
Lattice lattice_from_parameters(const double lengths[3], const double angles_degrees[3]);

double volume(const Lattice& lattice);

// Inverse by elimination with partial pivoting; false for an exactly singular matrix.
bool invert(const double matrix[9], double inverse[9]);

// d_hkl of (100), (010), (001); false where the matrix is singular.
bool plane_spacings(const Lattice& lattice, double spacings[3]);

// A Minkowski-reduced basis of the same lattice (shortest possible vectors, ascending); false for non-finite
// or flat cells.
bool reduce(const Lattice& lattice, Lattice& reduced);

// The length of the shortest vector of the lattice, in Å: how far a site is from its own nearest image. nan
// where reduce() is false.
double shortest_vector(const Lattice& lattice);

}  // namespace catmllm::geometry
