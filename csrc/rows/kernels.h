// The kernels of one instruction set, see vector/dispatch.h. A task is a block of rows.

#include "../vector/run.h"
#include "table.h"

#include "../vector/begin.h"

namespace catmllm::rows::VECTOR_SET {

#include "../vector/lanes.h"
#include "../vector/functions.h"

using Float = Lanes<float>;
typedef Float::Vec V;
enum { W = Float::W };

struct BFloat16 {
    uint16_t bits;
};
typedef uint32_t Wide __attribute__((vector_size(W * 4)));
typedef uint16_t Narrow __attribute__((vector_size(W * 2)));

inline V widened(Narrow n) { return (V)(__builtin_convertvector(n, Wide) << 16); }

// To the nearest, ties to even. Adding may carry a NaN's bits into the sign, so that it gets those of the
// plain one.
inline Narrow narrowed(V v) {
    const Wide bits = (Wide)v, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Wide nan = (Wide)((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector(((rounded & ~nan) | (nan & 0x7fc00000)) >> 16, Narrow);
}

// A vector of an array's values in float32, and back.
template <class At>
inline V get(const float* p, At w) {
    return load<float>(p, w);
}
template <class At>
inline void put(float* p, V v, At w) {
    store<float>(p, v, w);
}
inline V get(const BFloat16* p, Full) {
    Narrow n;
    __builtin_memcpy(&n, p, sizeof(n));
    return widened(n);
}
inline V get(const BFloat16* p, Part w) {
    Narrow n = {};
    for (int i = 0; i < w.n; ++i) n[i] = p[i].bits;
    return widened(n);
}
inline void put(BFloat16* p, V v, Full) {
    const Narrow n = narrowed(v);
    __builtin_memcpy(p, &n, sizeof(n));
}
inline void put(BFloat16* p, V v, Part w) {
    const Narrow n = narrowed(v);
    for (int i = 0; i < w.n; ++i) p[i].bits = n[i];
}
inline float one(float x) { return x; }
inline float one(BFloat16 x) { return widened(Narrow{} + x.bits)[0]; }

// Lanes that a narrower last vector does not have, as `x`.
inline V beyond(V v, Full, float) { return v; }
inline V beyond(V v, Part w, float x) {
    for (int i = w.n; i < W; ++i) v[i] = x;
    return v;
}

// Calls f(first, end, thread) for blocks of rows.
template <class F>
void over_rows(int threads, int64_t rows, int64_t block, F f) {
    vector::in_parallel(threads, (rows + block - 1) / block, [&](int64_t task, int thread) {
        const int64_t first = task * block, end = first + block < rows ? first + block : rows;
        f(first, end, thread);
    });
}

template <class T>
const char* log_softmax(int threads, int64_t rows, int64_t words, float scale, const int64_t* target,
                        T* logits, bool keep, float* logprob, float* lse, float* entropy) {
    threads = threads > 1 ? threads : 1;
    const int64_t line = vector::Memory::size<float>(words) / int64_t(sizeof(float));
    vector::Memory memory(threads * line * int64_t(sizeof(float)));
    if (!memory) return "not enough memory";
    float* lines = memory.take<float>(threads * line);
    const V factor = Float::all(scale);
    over_rows(threads, rows, 8, [&](int64_t first, int64_t end, int thread) {
        float* e = lines + thread * line;
        for (int64_t r = first; r < end; ++r) {
            T* z = logits + r * words;
            V most = Float::all(-__builtin_inff());
            over_channels<float>(words, [&](int64_t j, auto w) {
                most = Float::at_least(beyond(factor * get(z + j, w), w, -__builtin_inff()), most);
            });
            float top = most[0];
            for (int i = 1; i < W; ++i) top = most[i] > top || most[i] != most[i] ? most[i] : top;
            V sum = Float::all(0), mean = Float::all(0);
            over_channels<float>(words, [&](int64_t j, auto w) {
                const V x = factor * get(z + j, w) - Float::all(top);
                const V y = beyond(exponential<float>(x), w, 0);
                sum += y;
                if (entropy) mean += y * beyond(x, w, 0);
                if (keep) store<float>(e + j, y, w);
            });
            const float total = whole(sum), log_total = __builtin_logf(total);
            const float own = scale * one(z[target[r]]) - top - log_total;
            logprob[r] = own;
            lse[r] = top + log_total;
            if (entropy) entropy[r] = log_total - whole(mean) / total;
            if (!keep) continue;
            const V share = Float::all(-1 / total);
            over_channels<float>(words,
                                 [&](int64_t j, auto w) { put(z + j, share * load<float>(e + j, w), w); });
            // by the difference itself, which keeps its digits where the target is nearly certain
            const int64_t t = target[r];
            put(z + t, Float::all((total - e[t]) / total), Part{1});
        }
    });
    return nullptr;
}

template <class T>
const char* log_softmax_gradient(int threads, int64_t rows, int64_t words, int64_t begin, float scale,
                                 const int64_t* target, const float* lse, const float* entropy,
                                 const float* grad, const float* grad_entropy, T* logits) {
    const V factor = Float::all(scale);
    over_rows(threads, rows, 8, [&](int64_t first, int64_t end, int) {
        for (int64_t r = first; r < end; ++r) {
            T* z = logits + r * words;
            const int64_t t = target[r] - begin;
            const bool inside = t >= 0 && t < words;
            const float at_target = inside ? scale * one(z[t]) - lse[r] : 0;
            const float of_entropy = grad_entropy ? grad_entropy[r] : 0,
                        spread = grad_entropy ? entropy[r] : 0;
            const V log_sum = Float::all(lse[r]), g = Float::all(-scale * (grad[r] + of_entropy * spread));
            const V h = Float::all(-scale * of_entropy);
            over_channels<float>(words, [&](int64_t j, auto w) {
                const V x = factor * get(z + j, w) - log_sum;
                put(z + j, exponential<float>(x) * Float::fma(h, x, g), w);
            });
            if (inside) {
                const float p = __builtin_expf(at_target);
                const float own = grad[r] * (1 - p) - p * of_entropy * (at_target + spread);
                put(z + t, Float::all(scale * own), Part{1});
            }
        }
    });
    return nullptr;
}

template <class T>
const char* rms_norm(int threads, int64_t rows, int64_t width, float eps, const T* x, const T* weight, T* out,
                     float* inverse) {
    over_rows(threads, rows, 32, [&](int64_t first, int64_t end, int) {
        for (int64_t r = first; r < end; ++r) {
            const T* a = x + r * width;
            V sum = Float::all(0);
            over_channels<float>(width, [&](int64_t j, auto w) {
                const V v = get(a + j, w);
                sum = Float::fma(v, v, sum);
            });
            inverse[r] = 1 / __builtin_sqrtf(whole(sum) / float(width) + eps);
            const V f = Float::all(inverse[r]);
            over_channels<float>(width, [&](int64_t j, auto w) {
                put(out + r * width + j, get(weight + j, w) * (f * get(a + j, w)), w);
            });
        }
    });
    return nullptr;
}

template <class T>
const char* rms_norm_gradient(int threads, int64_t rows, int64_t width, const T* x, const T* weight,
                              const float* inverse, const T* grad, T* grad_x, float* grad_weight) {
    enum { BLOCK = 64 };  // rows whose sum is kept apart, so that sums do not depend on the number of threads
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    vector::Memory memory(blocks * width * int64_t(sizeof(float)) + 64);
    if (!memory) return "not enough memory";
    float* sums = memory.take<float>(blocks * width);
    over_rows(threads, rows, BLOCK, [&](int64_t first, int64_t end, int) {
        float* part = sums + first / BLOCK * width;
        for (int64_t j = 0; j < width; ++j) part[j] = 0;
        for (int64_t r = first; r < end; ++r) {
            const T *a = x + r * width, *g = grad + r * width;
            const V f = Float::all(inverse[r]);
            V sum = Float::all(0);
            over_channels<float>(width, [&](int64_t j, auto w) {
                const V y = f * get(a + j, w), d = get(g + j, w);
                store<float>(part + j, Float::fma(d, y, load<float>(part + j, w)), w);
                sum = Float::fma(get(weight + j, w) * d, y, sum);
            });
            const V mean = Float::all(whole(sum) / float(width));
            over_channels<float>(width, [&](int64_t j, auto w) {
                const V y = f * get(a + j, w), d = get(weight + j, w) * get(g + j, w);
                put(grad_x + r * width + j, f * Float::fnma(y, mean, d), w);
            });
        }
    });
    for (int64_t j = 0; j < width; ++j) grad_weight[j] = 0;
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = 0; j < width; ++j) grad_weight[j] += sums[b * width + j];
    return nullptr;
}

template <class T>
const char* rotate(int threads, int64_t tokens, int64_t heads, int64_t width, const T* x, const T* cos,
                   const T* sin, bool transposed, T* out) {
    const int64_t half = width / 2;
    const V sign = Float::all(transposed ? -1 : 1);
    over_rows(threads, tokens, 64, [&](int64_t first, int64_t end, int) {
        for (int64_t t = first; t < end; ++t) {
            const T *c = cos + t * width, *s = sin + t * width;
            // out1 = x1·c1 - x2·s1, out2 = x2·c2 + x1·s2; the transpose has the other half's sine in each
            const T *s1 = s + (transposed ? half : 0), *s2 = s + (transposed ? 0 : half);
            over_channels<float>(half, [&](int64_t j, auto w) {
                const V c1 = get(c + j, w), c2 = get(c + half + j, w);
                const V a = sign * get(s1 + j, w), b = sign * get(s2 + j, w);
                for (int64_t h = 0; h < heads; ++h) {
                    const int64_t at = (t * heads + h) * width + j;
                    const V x1 = get(x + at, w), x2 = get(x + at + half, w);
                    put(out + at, Float::fnma(x2, a, x1 * c1), w);
                    put(out + at + half, Float::fma(x1, b, x2 * c2), w);
                }
            });
        }
    });
    return nullptr;
}

enum { PIECE = 1 << 13 };  // values of an elementwise pass that a task takes

// logistic() does not fall below 1e-35, so that its argument ends at -80, where silu is 0 beside anything.
template <class T, class At>
inline V gate_of(const T* p, At w) {
    return Float::at_least(get(p, w), Float::all(-80));
}

template <class T>
const char* swiglu(int threads, int64_t count, const T* gate, const T* up, T* out) {
    over_rows(threads, count, PIECE, [&](int64_t first, int64_t end, int) {
        over_channels<float>(end - first, [&](int64_t j, auto w) {
            put(out + first + j, silu<float>(gate_of(gate + first + j, w)) * get(up + first + j, w), w);
        });
    });
    return nullptr;
}

template <class T>
const char* swiglu_gradient(int threads, int64_t count, const T* gate, const T* up, const T* grad,
                            T* grad_gate, T* grad_up) {
    over_rows(threads, count, PIECE, [&](int64_t first, int64_t end, int) {
        over_channels<float>(end - first, [&](int64_t j, auto w) {
            const V x = gate_of(gate + first + j, w), g = get(grad + first + j, w), s = logistic<float>(x),
                    y = x * s;
            put(grad_up + first + j, g * y, w);
            put(grad_gate + first + j, g * get(up + first + j, w) * Float::fma(y, Float::all(1) - s, s), w);
        });
    });
    return nullptr;
}

// Calls a kernel with its void pointers as those of the dtype.
#define ROWS_TYPED(call)    \
    if (dtype == 0) {       \
        using T = float;    \
        return call;        \
    } else {                \
        using T = BFloat16; \
        return call;        \
    }
#define IN(x) static_cast<const T*>(x)
#define OUT(x) static_cast<T*>(x)

const Table table = {
    [](int32_t dtype, int32_t threads, int64_t rows, int64_t words, float scale, const int64_t* target,
       void* logits, int32_t keep, float* logprob, float* lse, float* entropy) -> const char* {
        ROWS_TYPED(
            log_softmax(threads, rows, words, scale, target, OUT(logits), keep != 0, logprob, lse, entropy))
    },
    [](int32_t dtype, int32_t threads, int64_t rows, int64_t words, int64_t first, float scale,
       const int64_t* target, const float* lse, const float* entropy, const float* grad,
       const float* grad_entropy, void* logits) -> const char* {
        ROWS_TYPED(log_softmax_gradient(threads, rows, words, first, scale, target, lse, entropy, grad,
                                        grad_entropy, OUT(logits)))
    },
    [](int32_t dtype, int32_t threads, int64_t rows, int64_t width, float eps, const void* x,
       const void* weight, void* out, float* inverse) -> const char* {
        ROWS_TYPED(rms_norm(threads, rows, width, eps, IN(x), IN(weight), OUT(out), inverse))
    },
    [](int32_t dtype, int32_t threads, int64_t rows, int64_t width, const void* x, const void* weight,
       const float* inverse, const void* grad, void* grad_x, float* grad_weight) -> const char* {
        ROWS_TYPED(rms_norm_gradient(threads, rows, width, IN(x), IN(weight), inverse, IN(grad), OUT(grad_x),
                                     grad_weight))
    },
    [](int32_t dtype, int32_t threads, int64_t tokens, int64_t heads, int64_t width, const void* x,
       const void* cos, const void* sin, int32_t transposed, void* out) -> const char* {
        ROWS_TYPED(rotate(threads, tokens, heads, width, IN(x), IN(cos), IN(sin), transposed != 0, OUT(out)))
    },
    [](int32_t dtype, int32_t threads, int64_t count, const void* gate, const void* up,
       void* out) -> const char* { ROWS_TYPED(swiglu(threads, count, IN(gate), IN(up), OUT(out))) },
    [](int32_t dtype, int32_t threads, int64_t count, const void* gate, const void* up, const void* grad,
       void* grad_gate, void* grad_up) -> const char* {
        ROWS_TYPED(swiglu_gradient(threads, count, IN(gate), IN(up), IN(grad), OUT(grad_gate), OUT(grad_up)))
    },
};

}  // namespace catmllm::rows::VECTOR_SET

#include "../vector/end.h"
