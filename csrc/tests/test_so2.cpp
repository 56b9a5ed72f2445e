// Unit tests of the CPU kernels without Python: every instruction set that this machine has against the
// portable one, gradients against differences of the forward pass, threads against one thread, to the bit.
// `make test-so2` builds them with both sanitizers.
#include <algorithm>

#include "../so2/sizes.h"
#include "check.h"

using namespace catmllm::so2;

namespace {

struct Case {
    const char* name;
    int lmax, mmax, channels, hidden, heads, alpha, value, radial;
    bool gate, norm, keep;
    int latitudes, longitudes;
    std::vector<int> degrees;  // edges of each target
};

// A message with random arguments, its outputs and its gradients; every array ends where the next is not, so
// that the sanitizer sees one step too far.
template <class T>
struct Message {
    so2_message p{};
    std::vector<std::vector<T>> arrays;
    std::vector<std::vector<std::int64_t>> indices;
    std::vector<std::pair<T*, std::size_t>> learned, gradients, outputs;
    std::mt19937 random{7};

    T* make(std::size_t n, double scale) {
        std::normal_distribution<double> normal(0, scale);
        arrays.emplace_back(n);
        for (T& x : arrays.back()) x = T(scale ? normal(random) : NAN);
        return arrays.back().data();
    }
    T* learn(std::size_t n, double scale, void*& gradient) {
        T* at = make(n, scale);
        learned.push_back({at, n});
        gradient = make(n, 0);
        gradients.push_back({static_cast<T*>(gradient), n});
        return at;
    }
    T* output(std::size_t n) {
        outputs.push_back({make(n, 0), n});
        return outputs.back().first;
    }
    explicit Message(const Case& c, int threads) {
        const int nodes = int(c.degrees.size());
        std::vector<std::int64_t> source, target, first = {0}, order, source_first = {0};
        for (int t = 0; t < nodes; ++t) {
            for (int e = 0; e < c.degrees[t]; ++e) {
                target.push_back(t);
                source.push_back(std::int64_t(random() % unsigned(nodes)));
            }
            first.push_back(std::int64_t(target.size()));
        }
        for (int n = 0; n < nodes; ++n) {
            for (std::size_t e = 0; e < source.size(); ++e)
                if (source[e] == n) order.push_back(std::int64_t(e));
            source_first.push_back(std::int64_t(order.size()));
        }
        indices = {source, target, first, order, source_first};
        const std::size_t edges = source.size();
        p.nodes = nodes, p.edges = std::int64_t(edges), p.dtype = sizeof(T), p.threads = threads;
        p.lmax = c.lmax, p.mmax = c.mmax, p.channels = c.channels, p.hidden = c.hidden, p.heads = c.heads;
        p.alpha = c.alpha, p.value = c.value, p.radial = c.radial, p.gate = c.gate;
        p.latitudes = c.gate ? 0 : c.latitudes, p.longitudes = c.gate ? 0 : c.longitudes, p.eps = 1e-5;
        const Sizes s(p);
        p.source = indices[0].data(), p.target = indices[1].data(), p.first = indices[2].data();
        p.source_order = indices[3].data(), p.source_first = indices[4].data();
        p.x = learn(std::size_t(nodes * s.S * s.C), 1, p.grad_x);
        p.edge = learn(edges * s.K, 1, p.grad_edge);
        p.radial_weight =
            learn(std::size_t(s.half * 2 * s.C * s.K), 1 / std::sqrt(s.K), p.grad_radial_weight);
        p.radial_bias = learn(std::size_t(s.half * 2 * s.C), 1, p.grad_radial_bias);
        if (c.norm) {
            p.norm_weight = learn(s.A, 1, p.grad_norm_weight);
            p.norm_bias = learn(s.A, 0.3, p.grad_norm_bias);
        }
        p.alpha_dot = learn(std::size_t(s.heads * s.A), 1 / std::sqrt(s.A), p.grad_alpha_dot);
        for (int m = 0; m <= s.mmax; ++m) {
            const int in = s.pair(m), out = m ? 2 * s.n[m] * s.H : s.extra + s.n[0] * s.H, in2 = s.n[m] * s.H;
            p.conv1[m] = learn(std::size_t(out * in), 1 / std::sqrt(in), p.grad_conv1[m]);
            p.conv2[m] =
                learn(std::size_t((m ? 2 : 1) * s.n[m] * s.V * in2), 1 / std::sqrt(in2), p.grad_conv2[m]);
        }
        p.conv1_bias = learn(std::size_t(s.extra + s.n[0] * s.H), 0.3, p.grad_conv1_bias);
        p.conv2_bias = learn(std::size_t(s.n[0] * s.V), 0.3, p.grad_conv2_bias);
        p.wigner = make(edges * s.packed, 0.5);
        if (c.keep) {
            T* keep = make(edges * s.heads, 1);
            for (std::size_t i = 0; i < edges * s.heads; ++i) keep[i] = keep[i] > 0 ? T(2) : T(0);
            p.keep = keep;
        }
        if (!c.gate) {
            p.to_lat = make(std::size_t(c.latitudes * s.half), 0.5);
            p.from_lat = make(std::size_t(c.latitudes * s.half), 1.0 / (c.latitudes * c.longitudes));
            T* lon = make(std::size_t(c.longitudes * (2 * s.mmax + 1)), 1);
            for (int n = 0; n < c.longitudes; ++n)
                for (int m = 0; m <= s.mmax; ++m) {
                    const double angle = 2 * 3.14159265358979323846 * m * n / c.longitudes;
                    T* at = lon + n * (2 * s.mmax + 1);
                    if (m == 0) {
                        at[0] = 1;
                    } else {
                        at[2 * m - 1] = T(std::cos(angle));
                        at[2 * m] = T(std::sin(angle));
                    }
                }
            p.lon = lon;
        }
        p.total = output(std::size_t(nodes * s.S * s.V));
        p.extra = output(edges * s.extra);
        p.before = output(edges * s.M * s.H);
        p.after = output(edges * s.M * s.H);
        p.attention = output(edges * s.heads);
        p.grad_total = make(std::size_t(nodes * s.S * s.V), 1);
    }
    Message(const Message&) = delete;
    double loss() const {
        double sum = 0;
        for (std::size_t i = 0; i < outputs[0].second; ++i)
            sum += outputs[0].first[i] * static_cast<const T*>(p.grad_total)[i];
        return sum;
    }
    // Everything that was computed, in one row.
    std::vector<T> results() const {
        std::vector<T> all;
        for (const auto* list : {&outputs, &gradients})
            for (const auto& a : *list) all.insert(all.end(), a.first, a.first + a.second);
        return all;
    }
};

template <class T>
std::vector<T> run(const char* set, const Case& c, int threads) {
    use(set);
    Message<T> m(c, threads);
    CHECK(so2_forward(&m.p) == nullptr && so2_backward(&m.p) == nullptr, c.name);
    return m.results();
}

void test_sets_and_threads(const Case& c) {
    const std::vector<double> exact = run<double>("portable", c, 1);
    for (const char* set : sets()) {
        const std::string what = std::string(c.name) + ", " + set;
        const std::vector<double> wide = run<double>(set, c, 1);
        CHECK(distance(exact, wide) < 1e-13, what);
        CHECK(wide == run<double>(set, c, 3), what);  // to the bit
        const std::vector<float> narrow = run<float>(set, c, 1);
        CHECK(distance(exact, narrow) < 2e-6, what);
        CHECK(narrow == run<float>(set, c, 2), what);
    }
}

// Every gradient along a random direction, by central differences.
void test_gradients(const Case& c) {
    for (const char* set : sets()) {
        use(set);
        Message<double> m(c, 2);
        CHECK(so2_forward(&m.p) == nullptr && so2_backward(&m.p) == nullptr, c.name);
        std::normal_distribution<double> normal;
        for (std::size_t a = 0; a < m.learned.size(); ++a) {
            auto [x, n] = m.learned[a];
            std::vector<double> direction(n), start(x, x + n);
            double expected = 0, size = 0;
            for (std::size_t i = 0; i < n; ++i) {
                direction[i] = normal(m.random);
                size += direction[i] * direction[i];
            }
            for (std::size_t i = 0; i < n; ++i) {
                direction[i] /= std::sqrt(size);
                expected += direction[i] * m.gradients[a].first[i];
            }
            const double step = 1e-5;
            double values[2];
            for (int side = 0; side < 2; ++side) {
                for (std::size_t i = 0; i < n; ++i) x[i] = start[i] + (side ? -step : step) * direction[i];
                so2_forward(&m.p);
                values[side] = m.loss();
            }
            std::copy(start.begin(), start.end(), x);
            const double found = (values[0] - values[1]) / (2 * step);
            CHECK(std::fabs(found - expected) < 1e-6 * (1 + std::fabs(expected)),
                  std::string(c.name) + ", " + set + ", gradient " + std::to_string(a));
        }
    }
}

void test_nothing_kept_is_the_same(const Case& c) {
    for (const char* set : sets()) {
        use(set);
        Message<float> kept(c, 2), bare(c, 2);
        bare.p.extra = bare.p.before = bare.p.after = bare.p.attention = nullptr;
        CHECK(so2_forward(&kept.p) == nullptr && so2_forward(&bare.p) == nullptr, c.name);
        CHECK(kept.arrays.size() == bare.arrays.size() &&
                  std::equal(kept.outputs[0].first, kept.outputs[0].first + kept.outputs[0].second,
                             bare.outputs[0].first),
              c.name);
    }
}

void test_sum(const Case& c) {
    for (bool only_zero : {false, true})
        for (const char* set : sets()) {
            use(set);
            Message<double> m(c, 2);
            const Rows rows(c.lmax, c.mmax);
            const std::size_t edges = std::size_t(m.p.edges), width = std::size_t(c.heads * c.value);
            so2_sum p{};
            p.nodes = m.p.nodes, p.edges = m.p.edges, p.dtype = 8, p.threads = 2, p.lmax = c.lmax,
            p.mmax = c.mmax;
            p.rows = only_zero ? c.lmax + 1 : rows.M, p.heads = c.heads, p.value = c.value;
            p.target = m.p.target, p.first = m.p.first, p.wigner = m.p.wigner, p.grad_total = m.p.grad_total;
            double *values = m.make(edges * p.rows * width, 1), *attention = m.make(edges * c.heads, 1);
            p.values = values, p.attention = attention, p.total = m.p.total;
            p.grad_values = m.make(edges * p.rows * width, 0), p.grad_attention = m.make(edges * c.heads, 0);
            CHECK(so2_sum_forward(&p) == nullptr && so2_sum_backward(&p) == nullptr, c.name);
            // linear in both: <gradient, argument> is the loss
            double by_values = 0, by_attention = 0;
            for (std::size_t i = 0; i < edges * p.rows * width; ++i)
                by_values += values[i] * static_cast<double*>(p.grad_values)[i];
            for (std::size_t i = 0; i < edges * c.heads; ++i)
                by_attention += attention[i] * static_cast<double*>(p.grad_attention)[i];
            const double bound = 1e-10 * (1 + std::fabs(m.loss()));
            CHECK(std::fabs(by_values - m.loss()) < bound && std::fabs(by_attention - m.loss()) < bound,
                  c.name);
        }
}

void test_wrong_sizes() {
    so2_message p{};
    CHECK(std::strstr(so2_forward(&p), "dtype"), "no dtype");
    p.dtype = 4, p.lmax = 9;
    CHECK(std::strstr(so2_backward(&p), "lmax"), "lmax 9");
    p.lmax = 2, p.mmax = 2;
    CHECK(std::strstr(so2_forward(&p), "width"), "no channels");
    p.channels = p.hidden = p.heads = p.alpha = p.value = p.radial = 1;
    CHECK(std::strstr(so2_forward(&p), "grid"), "no grid");
    so2_sum q{};
    q.dtype = 8, q.lmax = 3, q.mmax = 1, q.heads = q.value = 1, q.rows = 7;
    CHECK(std::strstr(so2_sum_forward(&q), "row"), "7 rows at lmax 3, mmax 1");
}

}  // namespace

int main() {
    const std::vector<Case> cases = {
        {"sphere", 2, 2, 5, 6, 2, 7, 3, 9, false, true, false, 6, 7, {3, 0, 1, 5}},
        {"sphere, cut", 4, 2, 16, 9, 2, 16, 8, 12, false, true, true, 8, 8, {4, 7, 2}},
        {"gates", 3, 1, 8, 17, 3, 5, 4, 8, true, false, true, 0, 0, {2, 0, 0, 9}},
        {"m = 0 alone", 2, 0, 4, 4, 1, 4, 4, 4, false, true, false, 6, 1, {3, 2}},
        {"a target of several blocks", 1, 1, 3, 4, 2, 4, 2, 5, false, true, true, 4, 5, {2, 131, 1, 61}},
        {"no edges", 2, 1, 4, 4, 1, 4, 4, 4, true, true, false, 0, 0, {0, 0, 0}},
        {"no nodes", 2, 1, 4, 4, 1, 4, 4, 4, true, true, false, 0, 0, {}},
        {"several chunks", 3, 2, 48, 20, 2, 8, 24, 16, false, true, false, 8, 8, std::vector<int>(40, 30)},
    };
    for (const Case& c : cases) {
        test_sets_and_threads(c);
        test_nothing_kept_is_the_same(c);
        test_sum(c);
        if (c.degrees.size() < 40) test_gradients(c);
    }
    test_wrong_sizes();
    return report("so2");
}
