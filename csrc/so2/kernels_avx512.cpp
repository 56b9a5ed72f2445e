// The kernels for AVX-512.
#include "isa.h"
#ifdef SO2_X86
#include <immintrin.h>

#include "run.h"
#include "sizes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#endif
#define SO2_LEVEL 2
#define SO2_SET avx512
#define SO2_FORWARD forward_avx512
#define SO2_BACKWARD backward_avx512
#define SO2_SUM_FORWARD sum_forward_avx512
#define SO2_SUM_BACKWARD sum_backward_avx512
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
