// See begin.h. GCC's target holds to the end of the file, which is here.
#if VECTOR_LEVEL > 0 && defined(__clang__)
#pragma clang attribute pop
#endif
