// The kernels for AVX2 with FMA.
#include "isa.h"
#ifdef SO2_X86
#include <immintrin.h>

#include "run.h"
#include "sizes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SO2_LEVEL 1
#define SO2_SET avx2
#define SO2_FORWARD forward_avx2
#define SO2_BACKWARD backward_avx2
#define SO2_SUM_FORWARD sum_forward_avx2
#define SO2_SUM_BACKWARD sum_backward_avx2
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
