#include "level.h"

#include <cstdlib>
#include <cstring>

namespace catmllm::vector {

// The environment is read at every call, so that tests can force each set in one process.
Level level() {
    static const Level found = [] {
#ifdef VECTOR_X86
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl");
            return wide ? kAvx512 : kAvx2;
        }
#endif
        return kPortable;
    }();
    const char* asked = std::getenv("CATMLLM_ISA");
    if (!asked || !*asked || !std::strcmp(asked, "avx512")) return found;
    const Level limit = !std::strcmp(asked, "avx2") ? kAvx2 : kPortable;
    return limit < found ? limit : found;
}

}  // namespace catmllm::vector

const char* vector_isa() {
    using namespace catmllm::vector;
    return level() == kAvx512 ? "avx512" : level() == kAvx2 ? "avx2" : "portable";
}

#ifndef VECTOR_SOURCES
#define VECTOR_SOURCES ""
#endif
const char* vector_sources() { return VECTOR_SOURCES; }
