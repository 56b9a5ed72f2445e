// Unit tests of csrc/attention without Python: every instruction set that this machine has against the plain
// definition in double precision, threads against one thread, to the bit. `make test-so2` builds them with
// both sanitizers.
#include "../attention/attention.h"

#include "check.h"

namespace {

struct Case {
    const char* name;
    int heads, kv_heads, width;
    std::vector<std::vector<int>> groups;  // lengths of the samples of each group
    std::vector<std::int64_t> owned;       // whether the first is the prefix of the others
};

struct Call {
    attention_call p{};
    std::vector<std::int64_t> bounds = {0}, group = {0}, owned;
    std::vector<float> query, key, value, out, grad_out, grad_query, grad_key, grad_value;

    Call(const Case& c, int threads) : owned(c.owned) {
        for (const auto& lengths : c.groups) {
            for (int n : lengths) bounds.push_back(bounds.back() + n);
            group.push_back(std::int64_t(bounds.size()) - 1);
        }
        std::mt19937 random(5);
        const std::size_t tokens = std::size_t(bounds.back()), rows = tokens * std::size_t(c.heads * c.width),
                          columns = tokens * std::size_t(c.kv_heads * c.width);
        query = normal<float>(random, rows), grad_out = normal<float>(random, rows);
        key = normal<float>(random, columns), value = normal<float>(random, columns);
        out = grad_query = std::vector<float>(rows, NAN);
        grad_key = grad_value = std::vector<float>(columns, NAN);
        p.samples = std::int64_t(bounds.size()) - 1, p.groups = std::int64_t(c.groups.size());
        p.threads = threads, p.heads = c.heads, p.kv_heads = c.kv_heads, p.width = c.width;
        p.scale = float(1 / std::sqrt(c.width));
        p.bounds = bounds.data(), p.group = group.data(), p.owned = owned.data();
        p.query = query.data(), p.key = key.data(), p.value = value.data(), p.out = out.data();
        p.grad_out = grad_out.data(), p.grad_query = grad_query.data();
        p.grad_key = grad_key.data(), p.grad_value = grad_value.data();
    }
    Call(const Call&) = delete;
    std::vector<std::vector<float>> results() const { return {out, grad_query, grad_key, grad_value}; }
};

// Out and the gradients of query, key and value, one query at a time.
std::vector<std::vector<double>> defined(const Call& c) {
    const attention_call& p = c.p;
    std::vector<double> out(c.out.size()), grad_query(out), grad_key(c.key.size()), grad_value(grad_key);
    const auto one_query = [&](const std::vector<std::int64_t>& seen, std::int64_t t, int h) {
        const int k = h / (p.heads / p.kv_heads);
        const std::size_t q = std::size_t((t * p.heads + h) * p.width);
        const auto at = [&](std::int64_t j) { return std::size_t((j * p.kv_heads + k) * p.width); };
        std::vector<double> weight(seen.size());
        double sum = 0, mean = 0;
        for (std::size_t j = 0; j < seen.size(); ++j) {
            for (int d = 0; d < p.width; ++d)
                weight[j] += p.scale * double(c.query[q + d]) * c.key[at(seen[j]) + d];
            sum += weight[j] = std::exp(weight[j]);
        }
        std::vector<double> slope(seen.size());
        for (std::size_t j = 0; j < seen.size(); ++j) {
            weight[j] /= sum;
            for (int d = 0; d < p.width; ++d) {
                out[q + d] += weight[j] * c.value[at(seen[j]) + d];
                slope[j] += double(c.grad_out[q + d]) * c.value[at(seen[j]) + d];
                grad_value[at(seen[j]) + d] += weight[j] * c.grad_out[q + d];
            }
            mean += weight[j] * slope[j];
        }
        for (std::size_t j = 0; j < seen.size(); ++j)
            for (int d = 0; d < p.width; ++d) {
                const double factor = p.scale * weight[j] * (slope[j] - mean);
                grad_query[q + d] += factor * c.key[at(seen[j]) + d];
                grad_key[at(seen[j]) + d] += factor * c.query[q + d];
            }
    };
    for (std::int64_t g = 0; g < p.groups; ++g)
        for (std::int64_t s = p.group[g]; s < p.group[g + 1]; ++s) {
            std::vector<std::int64_t> seen;
            if (p.owned[g] && s > p.group[g])
                for (std::int64_t t = p.bounds[p.group[g]]; t < p.bounds[p.group[g] + 1]; ++t)
                    seen.push_back(t);
            for (std::int64_t t = p.bounds[s]; t < p.bounds[s + 1]; ++t) {
                seen.push_back(t);
                for (int h = 0; h < p.heads; ++h) one_query(seen, t, h);
            }
        }
    return {out, grad_query, grad_key, grad_value};
}

void test(const Case& c) {
    const Call arguments(c, 1);
    const auto exact = defined(arguments);
    for (const char* set : sets()) {
        use(set);
        const std::string what = std::string(c.name) + ", " + set;
        Call one(c, 1), three(c, 3);
        for (Call* call : {&one, &three})
            CHECK(attention_forward(&call->p) == nullptr && attention_backward(&call->p) == nullptr, what);
        const auto found = one.results();
        for (std::size_t i = 0; i < exact.size(); ++i)
            CHECK(distance(exact[i], found[i]) < 2e-6, what + ", array " + std::to_string(i));
        CHECK(found == three.results(), what);  // to the bit
    }
}

// Rows of a prompt: how many own tokens each has, and how many of the newest ask.
struct Growing {
    const char* name;
    int heads, kv_heads, width, prompt_slots, own_slots;
    std::vector<int> prompts;                               // their lengths
    std::vector<std::vector<std::pair<int, int>>> answers;  // of each prompt
};

struct CachedCall {
    attention_cached_call p{};
    std::vector<std::int64_t> group = {0}, length, bounds = {0}, before;
    std::vector<float> query, prompt_key, prompt_value, own_key, own_value, out;

    CachedCall(const Growing& c, int threads) {
        for (std::size_t g = 0; g < c.prompts.size(); ++g) {
            length.push_back(c.prompts[g]);
            for (const auto& [own, asking] : c.answers[g]) {
                before.push_back(own - asking);
                bounds.push_back(bounds.back() + asking);
            }
            group.push_back(std::int64_t(before.size()));
        }
        std::mt19937 random(7);
        const auto cache = [&](std::size_t n, int slots) {
            auto x = normal<float>(random, n * std::size_t(c.kv_heads * slots * c.width));
            return x;
        };
        prompt_key = cache(length.size(), c.prompt_slots),
        prompt_value = cache(length.size(), c.prompt_slots);
        own_key = cache(before.size(), c.own_slots), own_value = cache(before.size(), c.own_slots);
        query = normal<float>(random, std::size_t(bounds.back()) * std::size_t(c.heads * c.width));
        hide(c);
        out = std::vector<float>(query.size(), NAN);
        p.rows = std::int64_t(before.size()), p.prompts = std::int64_t(length.size());
        p.prompt_slots = c.prompt_slots, p.own_slots = c.own_slots, p.threads = threads;
        p.heads = c.heads, p.kv_heads = c.kv_heads, p.width = c.width;
        p.scale = float(1 / std::sqrt(c.width));
        p.group = group.data(), p.length = length.data(), p.bounds = bounds.data(), p.before = before.data();
        p.query = query.data(), p.prompt_key = prompt_key.data(), p.prompt_value = prompt_value.data();
        p.own_key = own_key.data(), p.own_value = own_value.data(), p.out = out.data();
    }
    CachedCall(const CachedCall&) = delete;

    // What nobody may see is no number.
    void hide(const Growing& c) {
        const auto line = std::size_t(c.width);
        for (std::size_t g = 0; g < length.size() * std::size_t(c.kv_heads); ++g)
            for (std::size_t j = std::size_t(length[g / std::size_t(c.kv_heads)]) * line;
                 j < std::size_t(c.prompt_slots) * line; ++j)
                prompt_key[g * std::size_t(c.prompt_slots) * line + j] =
                    prompt_value[g * std::size_t(c.prompt_slots) * line + j] = NAN;
        for (std::size_t r = 0; r < before.size() * std::size_t(c.kv_heads); ++r) {
            const std::size_t row = r / std::size_t(c.kv_heads);
            for (std::size_t j = std::size_t(before[row] + bounds[row + 1] - bounds[row]) * line;
                 j < std::size_t(c.own_slots) * line; ++j)
                own_key[r * std::size_t(c.own_slots) * line + j] =
                    own_value[r * std::size_t(c.own_slots) * line + j] = NAN;
        }
    }
};

std::vector<double> defined(const CachedCall& c) {
    const attention_cached_call& p = c.p;
    std::vector<double> out(c.out.size());
    for (std::int64_t g = 0; g < p.prompts; ++g)
        for (std::int64_t r = p.group[g]; r < p.group[g + 1]; ++r)
            for (std::int64_t t = p.bounds[r]; t < p.bounds[r + 1]; ++t)
                for (int h = 0; h < p.heads; ++h) {
                    const std::int64_t k = h / (p.heads / p.kv_heads),
                                       own = p.before[r] + t - p.bounds[r] + 1;
                    std::vector<std::pair<const float*, const float*>> seen;
                    const auto see = [&](const float* key, const float* value, std::int64_t line) {
                        seen.emplace_back(key + line * p.width, value + line * p.width);
                    };
                    for (std::int64_t j = 0; j < p.length[g]; ++j)
                        see(p.prompt_key, p.prompt_value, (g * p.kv_heads + k) * p.prompt_slots + j);
                    for (std::int64_t j = 0; j < own; ++j)
                        see(p.own_key, p.own_value, (r * p.kv_heads + k) * p.own_slots + j);
                    const std::size_t q = std::size_t((t * p.heads + h) * p.width);
                    double sum = 0;
                    std::vector<double> weight;
                    for (const auto& [key, value] : seen) {
                        double score = 0;
                        for (int d = 0; d < p.width; ++d) score += p.scale * double(c.query[q + d]) * key[d];
                        sum += std::exp(score);
                        weight.push_back(std::exp(score));
                    }
                    for (std::size_t j = 0; j < seen.size(); ++j)
                        for (int d = 0; d < p.width; ++d) out[q + d] += weight[j] / sum * seen[j].second[d];
                }
    return out;
}

void test(const Growing& c) {
    const CachedCall arguments(c, 1);
    const auto exact = defined(arguments);
    for (const char* set : sets()) {
        use(set);
        const std::string what = std::string(c.name) + ", " + set;
        CachedCall one(c, 1), three(c, 3);
        for (CachedCall* call : {&one, &three}) CHECK(attention_cached(&call->p) == nullptr, what);
        CHECK(distance(exact, one.out) < 2e-6, what);
        CHECK(one.out == three.out, what);  // to the bit
    }
}

void test_wrong_cached_calls() {
    const Growing c = {"wrong", 2, 1, 8, 4, 6, {4}, {{{6, 2}}}};
    CachedCall one(c, 1);
    one.before[0] = 5;
    CHECK(std::strstr(attention_cached(&one.p), "row is longer"), "7 tokens in 6 slots");
    one.before[0] = 4, one.length[0] = 5;
    CHECK(std::strstr(attention_cached(&one.p), "prompt is longer"), "5 tokens in 4 slots");
    one.length[0] = 4, one.group[0] = 1;
    CHECK(std::strstr(attention_cached(&one.p), "cover"), "a row of no prompt");
    one.p.kv_heads = 3;
    CHECK(std::strstr(attention_cached(&one.p), "divide"), "2 heads, 3 key heads");
}

void test_wrong_calls() {
    attention_call p{};
    CHECK(std::strstr(attention_forward(&p), "at least 1"), "no heads");
    p.heads = 3, p.kv_heads = 2, p.width = 4;
    CHECK(std::strstr(attention_backward(&p), "divide"), "3 heads, 2 key heads");
}

}  // namespace

int main() {
    const std::vector<Case> cases = {
        {"one token", 1, 1, 1, {{1}}, {0}},
        {"samples of their own", 4, 2, 32, {{7}, {1}, {40}}, {0, 0, 0}},
        {"a prompt and its answers", 6, 6, 16, {{19, 5, 1, 33}, {3}}, {1, 0}},
        {"odd widths, one key head", 3, 1, 37, {{50, 2, 3}, {65, 17}}, {1, 1}},
        {"nothing", 2, 1, 8, {}, {}},
    };
    for (const Case& c : cases) test(c);
    const std::vector<Growing> growing = {
        {"one token of one row", 1, 1, 1, 1, 1, {1}, {{{1, 1}}}},
        {"a token each", 6, 2, 32, 61, 64, {61, 40}, {{{9, 1}, {64, 1}, {1, 1}}, {{33, 1}}}},
        {"runs", 6, 2, 32, 20, 96, {20, 0, 7}, {{{28, 28}, {40, 3}, {96, 17}}, {{5, 5}}, {{50, 1}, {2, 0}}}},
        {"odd widths, a prompt without rows", 3, 1, 37, 90, 40, {90, 3}, {{}, {{40, 40}, {21, 4}}}},
        {"nothing", 2, 1, 8, 4, 4, {}, {}},
    };
    for (const Growing& c : growing) test(c);
    test_wrong_calls();
    test_wrong_cached_calls();
    return report("attention");
}
