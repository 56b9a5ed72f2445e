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

#include "tables.inc"

}  // namespace catmllm::cif::tables
