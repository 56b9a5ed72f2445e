// The kernels for AVX2 with FMA.
#include <cstdint>

#include "../so2/run.h"
#include "isa.h"
#ifdef SO2_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SO2_LEVEL 1
#define ROWS_SET avx2
#define ROWS_TABLE avx2_table
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
