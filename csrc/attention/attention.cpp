#include "attention.h"

#include "table.h"

namespace {

template <typename Call>
const char* wrong_heads(const Call& p) {
    if (p.heads < 1 || p.kv_heads < 1 || p.width < 1 || p.heads % p.kv_heads)
        return "heads, kv_heads and width must be at least 1, and kv_heads must divide heads";
    return nullptr;
}

const char* wrong(const attention_call& p) {
    if (const char* error = wrong_heads(p)) return error;
    if (p.samples < 0 || p.groups < 0) return "a negative number of samples";
    for (int64_t g = 0; g < p.groups; ++g)
        if (p.group[g] >= p.group[g + 1]) return "a group without samples";
    if (p.groups && (p.group[0] != 0 || p.group[p.groups] != p.samples))
        return "groups must cover all samples";
    return nullptr;
}

const char* wrong(const attention_cached_call& p) {
    if (const char* error = wrong_heads(p)) return error;
    if (p.rows < 0 || p.prompts < 0) return "a negative number of rows";
    if (p.group[0] != 0 || p.group[p.prompts] != p.rows) return "prompts must cover all rows";
    for (int64_t g = 0; g < p.prompts; ++g) {
        if (p.group[g] > p.group[g + 1]) return "rows of a prompt must follow each other";
        if (p.length[g] < 0 || p.length[g] > p.prompt_slots) return "a prompt is longer than its cache";
    }
    for (int64_t r = 0; r < p.rows; ++r) {
        const int64_t n = p.bounds[r + 1] - p.bounds[r];
        if (n < 0 || p.before[r] < 0 || p.before[r] + n > p.own_slots)
            return "a row is longer than its cache";
    }
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

const char* attention_cached(const attention_cached_call* p) {
    const char* error = wrong(*p);
    return error ? error : chosen().cached(p);
}
