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
    test_wrong_calls();
    return report("attention");
}
