#include "attention.h"

#include "isa.h"

namespace {

const char* wrong(const attention_call& p) {
    if (p.heads < 1 || p.kv_heads < 1 || p.width < 1 || p.heads % p.kv_heads)
        return "heads, kv_heads and width must be at least 1, and kv_heads must divide heads";
    if (p.samples < 0 || p.groups < 0) return "a negative number of samples";
    for (int64_t g = 0; g < p.groups; ++g)
        if (p.group[g] >= p.group[g + 1]) return "a group without samples";
    if (p.groups && (p.group[0] != 0 || p.group[p.groups] != p.samples)) return "groups must cover all samples";
    return nullptr;
}

}  // namespace

using namespace catmllm::attention;

#ifdef SO2_X86
#define ATTENTION_CHOOSE(name, p)                                 \
    switch (catmllm::so2::level()) {                              \
        case 2: return name##_avx512(p);                          \
        case 1: return name##_avx2(p);                            \
        default: return name##_portable(p);                       \
    }
#else
#define ATTENTION_CHOOSE(name, p) return name##_portable(p)
#endif

const char* attention_forward(const attention_call* p) {
    if (const char* error = wrong(*p)) return error;
    ATTENTION_CHOOSE(forward, *p);
}

const char* attention_backward(const attention_call* p) {
    if (const char* error = wrong(*p)) return error;
    ATTENTION_CHOOSE(backward, *p);
}
