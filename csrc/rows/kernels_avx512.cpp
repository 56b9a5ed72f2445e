// The kernels for AVX-512.
#include <cstdint>

#include "../so2/run.h"
#include "isa.h"
#ifdef SO2_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#endif
#define SO2_LEVEL 2
#define ROWS_SET avx512
#define ROWS_TABLE avx512_table
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
