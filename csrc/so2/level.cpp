#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace catmllm::so2 {

// The environment is read at every call, so that tests can force each set in one process.
int level() {
    static const int found = [] {
#ifdef SO2_X86
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl");
            return wide ? 2 : 1;
        }
#endif
        return 0;
    }();
    const char* asked = std::getenv("CATMLLM_SO2_ISA");
    const int limit = !asked || !*asked || !std::strcmp(asked, "avx512") ? 2 : !std::strcmp(asked, "avx2") ? 1 : 0;
    return limit < found ? limit : found;
}

}  // namespace catmllm::so2
