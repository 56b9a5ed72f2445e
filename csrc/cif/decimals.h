// Columns of plain decimal numbers, many at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tokens.h"

namespace catmllm::cif {

// out[i * out_stride] is the value of tokens[i * stride] where plain_decimal (number.h) reads it, else nan; i
// < n. Only plain tokens are looked at, and these are values of a loop, so that a key of some length stands
// before them in memory.
void plain_decimals(const Token* tokens, std::size_t stride, std::size_t n, double* out,
                    std::size_t out_stride);

}  // namespace catmllm::cif
