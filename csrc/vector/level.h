// Which instruction set the kernels of a library run in.
#pragma once

#if defined(__x86_64__)
#define VECTOR_X86 1
#endif

namespace catmllm::vector {

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The widest that this machine has and the environment's CATMLLM_ISA (avx512, avx2, portable) allows.
Level level();

}  // namespace catmllm::vector

// Exported by every library: the name of that level, and the digest of the sources that it was built from
// (kernels/catmllm_kernels/native.py), empty where the build gave none.
extern "C" __attribute__((visibility("default"))) const char* vector_isa();
extern "C" __attribute__((visibility("default"))) const char* vector_sources();
