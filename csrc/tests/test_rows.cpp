// Unit tests of csrc/rows without Python: every instruction set that this machine has against the plain
// definitions in double precision, in float32 and bfloat16, threads against one thread, to the bit. `make
// test-so2` builds them with both sanitizers.
#include "../rows/rows.h"

#include "check.h"

namespace {

struct BFloat16 {
    std::uint16_t bits = 0x7fc0;
    BFloat16() = default;
    explicit BFloat16(double x) {
        const float f = float(x);
        std::uint32_t word;
        std::memcpy(&word, &f, 4);
        bits = std::uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    }
    operator double() const {
        const std::uint32_t word = std::uint32_t(bits) << 16;
        float f;
        std::memcpy(&f, &word, 4);
        return f;
    }
    bool operator==(const BFloat16& other) const { return bits == other.bits; }
};

// What each type rounds by, with room for the float32 arithmetic before.
template <class T>
constexpr double kBound = sizeof(T) == 4 ? 2e-6 : 4.1e-3;
template <class T>
constexpr std::int32_t kType = sizeof(T) == 4 ? 0 : 1;

using Doubles = std::vector<double>;
using Floats = std::vector<float>;
const std::vector<std::int64_t> kWidths = {2, 7, 16, 48, 131};

template <class T>
Doubles wide(const std::vector<T>& x) {
    return {x.begin(), x.end()};
}

// Runs f(threads) -> results in every instruction set with one thread and with three; each must be near
// `exact`.
template <class F>
void everywhere(const std::string& name, const std::vector<Doubles>& exact, const Doubles& bounds, F f) {
    for (const char* set : sets()) {
        use(set);
        const auto found = f(1);
        for (std::size_t i = 0; i < exact.size(); ++i)
            CHECK(distance(exact[i], found[i]) < bounds[i],
                  name + ", " + set + ", array " + std::to_string(i));
        CHECK(found == f(3), name + ", " + set);
    }
}

template <class T>
void test_log_softmax(std::int64_t words) {
    constexpr std::int64_t rows = 5, first = 0;
    const float scale = 0.7f;
    std::mt19937 random(3);
    const auto logits = normal<T>(random, rows * words, 3);
    const auto grad = normal<float>(random, rows), grad_entropy = normal<float>(random, rows);
    std::vector<std::int64_t> target;
    for (std::int64_t r = 0; r < rows; ++r) target.push_back(std::int64_t(random() % std::uint32_t(words)));
    Doubles logprob, lse, entropy, kept, gradient;
    for (std::int64_t r = 0; r < rows; ++r) {
        const T* z = logits.data() + r * words;
        double sum = 0, mean = 0;
        for (std::int64_t j = 0; j < words; ++j) sum += std::exp(scale * double(z[j]));
        for (std::int64_t j = 0; j < words; ++j)
            mean += scale * double(z[j]) * std::exp(scale * double(z[j])) / sum;
        lse.push_back(std::log(sum)), entropy.push_back(lse.back() - mean);
        logprob.push_back(scale * double(z[target[r]]) - lse.back());
        for (std::int64_t j = 0; j < words; ++j) {
            const double p = std::exp(scale * double(z[j])) / sum, log_p = scale * double(z[j]) - lse.back();
            kept.push_back((j == target[r]) - p);
            gradient.push_back(scale *
                               (grad[r] * kept.back() - grad_entropy[r] * p * (log_p + entropy.back())));
        }
    }
    const std::string name = "log-softmax of " + std::to_string(words) + (kType<T> ? " in bfloat16" : "");
    everywhere(name, {logprob, lse, entropy, kept}, {2e-6, 2e-6, 2e-5, kBound<T>}, [&](int threads) {
        auto z = logits;
        Floats l(rows), s(rows), e(rows);
        CHECK(!rows_log_softmax(kType<T>, threads, rows, words, scale, target.data(), z.data(), 1, l.data(),
                                s.data(), e.data()),
              name);
        return std::vector<Doubles>{wide(l), wide(s), wide(e), wide(z)};
    });
    const Floats s(lse.begin(), lse.end()), e(entropy.begin(), entropy.end());
    everywhere(name + ", gradient", {gradient}, {10 * kBound<float> + kBound<T>}, [&](int threads) {
        auto z = logits;
        CHECK(!rows_log_softmax_gradient(kType<T>, threads, rows, words, first, scale, target.data(),
                                         s.data(), e.data(), grad.data(), grad_entropy.data(), z.data()),
              name);
        return std::vector<Doubles>{wide(z)};
    });
}

template <class T>
void test_rms_norm(std::int64_t width) {
    constexpr std::int64_t rows = 6;
    const float eps = 1e-5f;
    std::mt19937 random(4);
    const auto x = normal<T>(random, rows * width), weight = normal<T>(random, width);
    const auto grad = normal<T>(random, rows * width);
    Doubles out, inverse, grad_x, grad_weight(width);
    for (std::int64_t r = 0; r < rows; ++r) {
        const T *a = x.data() + r * width, *g = grad.data() + r * width;
        double square = 0, product = 0;
        for (std::int64_t i = 0; i < width; ++i) square += double(a[i]) * a[i];
        inverse.push_back(1 / std::sqrt(square / double(width) + eps));
        for (std::int64_t i = 0; i < width; ++i) product += double(g[i]) * weight[i] * a[i];
        for (std::int64_t i = 0; i < width; ++i) {
            const double y = inverse[r], scaled = product * y * y * y / double(width);
            out.push_back(double(weight[i]) * a[i] * y);
            grad_x.push_back(double(g[i]) * weight[i] * y - scaled * a[i]);
            grad_weight[i] += double(g[i]) * a[i] * y;
        }
    }
    const std::string name = "RMSNorm of " + std::to_string(width) + (kType<T> ? " in bfloat16" : "");
    everywhere(name, {out, inverse}, {kBound<T>, 2e-6}, [&](int threads) {
        std::vector<T> y(rows * width);
        Floats i(rows);
        CHECK(
            !rows_rms_norm(kType<T>, threads, rows, width, eps, x.data(), weight.data(), y.data(), i.data()),
            name);
        return std::vector<Doubles>{wide(y), wide(i)};
    });
    const Floats i(inverse.begin(), inverse.end());
    everywhere(name + ", gradient", {grad_x, grad_weight}, {kBound<T>, 2e-6}, [&](int threads) {
        std::vector<T> gx(rows * width);
        Floats gw(width);
        CHECK(!rows_rms_norm_gradient(kType<T>, threads, rows, width, x.data(), weight.data(), i.data(),
                                      grad.data(), gx.data(), gw.data()),
              name);
        return std::vector<Doubles>{wide(gx), wide(gw)};
    });
}

template <class T>
void test_rotate(std::int64_t width) {
    constexpr std::int64_t tokens = 5, heads = 3;
    std::mt19937 random(5);
    const auto x = normal<T>(random, tokens * heads * width);
    const auto cos = normal<T>(random, tokens * width), sin = normal<T>(random, tokens * width);
    const std::int64_t half = width / 2;
    for (bool transposed : {false, true}) {
        Doubles out(x.size());
        for (std::int64_t t = 0; t < tokens; ++t)
            for (std::int64_t h = 0; h < heads; ++h)
                for (std::int64_t i = 0; i < width; ++i) {
                    const std::int64_t row = (t * heads + h) * width, other = i < half ? i + half : i - half;
                    const double sign = i < half ? -1 : 1;
                    out[row + i] += double(x[row + i]) * cos[t * width + i];
                    if (transposed) out[row + other] += sign * x[row + i] * sin[t * width + i];
                    if (!transposed) out[row + i] += sign * x[row + other] * sin[t * width + i];
                }
        everywhere("rotation of " + std::to_string(width), {out}, {kBound<T>}, [&](int threads) {
            std::vector<T> y(x.size());
            CHECK(!rows_rotate(kType<T>, threads, tokens, heads, width, x.data(), cos.data(), sin.data(),
                               transposed, y.data()),
                  "rotation");
            return std::vector<Doubles>{wide(y)};
        });
    }
}

template <class T>
void test_swiglu(std::int64_t count) {
    std::mt19937 random(6);
    const auto gate = normal<T>(random, count, 2), up = normal<T>(random, count),
               grad = normal<T>(random, count);
    Doubles out, grad_gate, grad_up;
    for (std::int64_t i = 0; i < count; ++i) {
        const double g = gate[i], s = 1 / (1 + std::exp(-g));
        out.push_back(g * s * up[i]);
        grad_gate.push_back(double(grad[i]) * up[i] * s * (1 + g * (1 - s)));
        grad_up.push_back(double(grad[i]) * g * s);
    }
    const std::string name = "SwiGLU of " + std::to_string(count);
    everywhere(name, {out, grad_gate, grad_up}, {kBound<T>, kBound<T>, kBound<T>}, [&](int threads) {
        std::vector<T> y(count), a(count), b(count);
        CHECK(!rows_swiglu(kType<T>, threads, count, gate.data(), up.data(), y.data()), name);
        CHECK(!rows_swiglu_gradient(kType<T>, threads, count, gate.data(), up.data(), grad.data(), a.data(),
                                    b.data()),
              name);
        return std::vector<Doubles>{wide(y), wide(a), wide(b)};
    });
}

template <class T>
void test_all() {
    for (std::int64_t width : kWidths) {
        test_log_softmax<T>(width);
        test_rms_norm<T>(width);
        test_rotate<T>(2 * width);
        test_swiglu<T>(width);
    }
    test_swiglu<T>(20000);  // several tasks
}

}  // namespace

int main() {
    test_all<float>();
    test_all<BFloat16>();
    CHECK(std::strstr(rows_rotate(0, 1, 1, 1, 3, nullptr, nullptr, nullptr, 0, nullptr), "even"), "width 3");
    return report("rows");
}
