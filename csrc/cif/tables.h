// The tables that generate_tables.py writes.
#pragma once

#include <cstdint>

#include "elements.h"

namespace catmllm::cif::tables {

struct Operation {
    std::int8_t rotation[9];
    double translation[3];
};
struct SpaceGroupName {
    const char* name;
    std::uint16_t list;
};

struct MagneticGroup {
    std::uint16_t first, second;  // the BNS number
    std::uint16_t list;
    std::uint8_t lattice;
    const char* name;
};
template <int most>
struct MagneticLattice {
    int size;
    double vectors[most][3];
};

#include "tables.inc"
#include "magnetic_tables.inc"

}  // namespace catmllm::cif::tables
