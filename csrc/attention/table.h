// The functions of attention.h in each instruction set.
#pragma once

#include "../vector/dispatch.h"
#include "attention.h"

namespace catmllm::attention {

struct Table {
    decltype(&attention_forward) forward, backward;
    decltype(&attention_cached) cached;
};
VECTOR_SETS(Table)

}  // namespace catmllm::attention
