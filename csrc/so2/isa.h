// The kernels of each instruction set, as `so2.cpp` chooses between them.
#pragma once
#include "so2.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SO2_X86 1
#endif

namespace catmllm::so2 {

int level();  // 2 AVX-512, 1 AVX2, 0 neither: what this machine has and CATMLLM_SO2_ISA allows

const char* forward_avx512(const so2_message&);
const char* backward_avx512(const so2_message&);
const char* sum_forward_avx512(const so2_sum&);
const char* sum_backward_avx512(const so2_sum&);
const char* forward_avx2(const so2_message&);
const char* backward_avx2(const so2_message&);
const char* sum_forward_avx2(const so2_sum&);
const char* sum_backward_avx2(const so2_sum&);
const char* forward_portable(const so2_message&);
const char* backward_portable(const so2_message&);
const char* sum_forward_portable(const so2_sum&);
const char* sum_backward_portable(const so2_sum&);

}  // namespace catmllm::so2
