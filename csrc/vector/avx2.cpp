// A library's kernels for AVX2 with FMA.
#include "level.h"
#ifdef VECTOR_X86
#define VECTOR_LEVEL 1
#define VECTOR_SET avx2
#include VECTOR_KERNELS
#endif
