// The kernels of each instruction set, as `attention.cpp` chooses between them.
#pragma once
#include "../so2/isa.h"
#include "attention.h"

namespace catmllm::attention {

const char* forward_avx512(const attention_call&);
const char* backward_avx512(const attention_call&);
const char* forward_avx2(const attention_call&);
const char* backward_avx2(const attention_call&);
const char* forward_portable(const attention_call&);
const char* backward_portable(const attention_call&);

}  // namespace catmllm::attention
