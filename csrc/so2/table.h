// The functions of so2.h in each instruction set.
#pragma once

#include "../vector/dispatch.h"
#include "so2.h"

namespace catmllm::so2 {

struct Table {
    decltype(&so2_forward) forward, backward;
    decltype(&so2_sum_forward) sum_forward, sum_backward;
};
VECTOR_SETS(Table)

}  // namespace catmllm::so2
