// A library's kernels for AVX-512.
#include "level.h"
#ifdef VECTOR_X86
#define VECTOR_LEVEL 2
#define VECTOR_SET avx512
#include VECTOR_KERNELS
#endif
