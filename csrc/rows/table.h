// The functions of rows.h in each instruction set.
#pragma once

#include "../vector/dispatch.h"
#include "rows.h"

namespace catmllm::rows {

struct Table {
    decltype(&rows_log_softmax) log_softmax;
    decltype(&rows_log_softmax_gradient) log_softmax_gradient;
    decltype(&rows_rms_norm) rms_norm;
    decltype(&rows_rms_norm_gradient) rms_norm_gradient;
    decltype(&rows_rotate) rotate;
    decltype(&rows_swiglu) swiglu;
    decltype(&rows_swiglu_gradient) swiglu_gradient;
};
VECTOR_SETS(Table)

}  // namespace catmllm::rows
