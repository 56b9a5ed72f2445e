#include "attention.h"

#include "table.h"

namespace {

const char* wrong(const attention_call& p) {
    if (p.heads < 1 || p.kv_heads < 1 || p.width < 1 || p.heads % p.kv_heads)
        return "heads, kv_heads and width must be at least 1, and kv_heads must divide heads";
    if (p.samples < 0 || p.groups < 0) return "a negative number of samples";
    for (int64_t g = 0; g < p.groups; ++g)
        if (p.group[g] >= p.group[g + 1]) return "a group without samples";
    if (p.groups && (p.group[0] != 0 || p.group[p.groups] != p.samples))
        return "groups must cover all samples";
    return nullptr;
}

}  // namespace

using namespace catmllm::attention;

const char* attention_forward(const attention_call* p) {
    const char* error = wrong(*p);
    return error ? error : chosen().forward(p);
}

const char* attention_backward(const attention_call* p) {
    const char* error = wrong(*p);
    return error ? error : chosen().backward(p);
}
