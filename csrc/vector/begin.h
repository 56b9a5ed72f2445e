// From here to end.h everything is compiled for the instruction set of VECTOR_LEVEL. What other files share
// comes before: an inline function of the standard library that is compiled here may be the one that the
// linker keeps for all, also on a machine without these instructions.
#if VECTOR_LEVEL > 0
#include <immintrin.h>
#endif

#if VECTOR_LEVEL == 2 && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#elif VECTOR_LEVEL == 2
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#elif VECTOR_LEVEL == 1 && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif VECTOR_LEVEL == 1
#pragma GCC target("avx2,fma")
#endif
