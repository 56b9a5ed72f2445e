// A library's kernels in what every machine has.
#define VECTOR_LEVEL 0
#define VECTOR_SET portable
#include VECTOR_KERNELS
