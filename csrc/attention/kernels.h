// The kernels of one instruction set, see vector/dispatch.h.
//
// A task is a key head of a group of samples. Keys lie transposed, so that a tile of scores is a product of
// broadcast queries and vectors of keys. Query heads that share the key head are rows like any others: row =
// token·share + head. Rows are taken ROWS at a time, with all of their scores in the first two caches;
// nothing else is kept, and backward makes the weights again.

#include "../vector/run.h"
#include "table.h"

#include "../vector/begin.h"

namespace catmllm::attention::VECTOR_SET {

#include "../vector/lanes.h"
#include "../vector/functions.h"

using Float = Lanes<float>;
typedef Float::Vec V;
enum { W = Float::W, ROWS = VECTOR_LEVEL == 2 ? 8 : 4, TILE = 2 * W };

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// scores[r, j] = sum over d of rows[r, d] keys[d, j] for j < n, in whole tiles; keys and scores have the
// stride `columns`.
inline void products(const float* rows, const float* keys, float* scores, int64_t width, int64_t n,
                     int64_t columns) {
    for (int64_t j = 0; j < n; j += TILE) {
        V sum[ROWS][2];
        for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = Float::all(0);
        const float* k = keys + j;
        for (int64_t d = 0; d < width; ++d, k += columns) {
            const V a = Float::load(k), b = Float::load(k + W);
            for (int r = 0; r < ROWS; ++r) {
                const V q = Float::all(rows[r * width + d]);
                sum[r][0] = Float::fma(q, a, sum[r][0]);
                sum[r][1] = Float::fma(q, b, sum[r][1]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            Float::store(scores + r * columns + j, sum[r][0]);
            Float::store(scores + r * columns + j + W, sum[r][1]);
        }
    }
}

// out[r, d .. d + N·W] = sum over j < n of weights[r, j] values[j, d ...].
template <int N>
inline void mix(const float* weights, const float* values, float* out, int64_t width, int64_t n,
                int64_t columns) {
    V sum[ROWS][N];
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < N; ++i) sum[r][i] = Float::all(0);
    for (int64_t j = 0; j < n; ++j) {
        V v[N];
        for (int i = 0; i < N; ++i) v[i] = Float::load(values + j * width + i * W);
        for (int r = 0; r < ROWS; ++r) {
            const V w = Float::all(weights[r * columns + j]);
            for (int i = 0; i < N; ++i) sum[r][i] = Float::fma(w, v[i], sum[r][i]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < N; ++i) Float::store(out + r * width + i * W, sum[r][i]);
}

// sums[j, d .. d + N·W] += sum over r of weights[r, j] rows[r, d ...], j < n.
template <int N>
inline void spread(const float* weights, const float* rows, float* sums, int64_t width, int64_t n,
                   int64_t columns) {
    V v[ROWS][N];
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < N; ++i) v[r][i] = Float::load(rows + r * width + i * W);
    for (int64_t j = 0; j < n; ++j) {
        V sum[N];
        for (int i = 0; i < N; ++i) sum[i] = Float::load(sums + j * width + i * W);
        for (int r = 0; r < ROWS; ++r) {
            const V w = Float::all(weights[r * columns + j]);
            for (int i = 0; i < N; ++i) sum[i] = Float::fma(w, v[r][i], sum[i]);
        }
        for (int i = 0; i < N; ++i) Float::store(sums + j * width + i * W, sum[i]);
    }
}

// Calls f<2>(d) for pairs of vectors of a row and f<1>(d) for a last single one; `width` is a multiple of W.
#define OVER_WIDTH(call)                                \
    {                                                   \
        int64_t d = 0;                                  \
        for (; d + 2 * W <= width; d += 2 * W) call(2); \
        if (d < width) call(1);                         \
    }

inline float most_of(V v) {
#if VECTOR_LEVEL == 2
    return _mm512_reduce_max_ps(v);
#else
    float m = v[0];
    for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

// scores[0 .. n) become exp(score - their maximum), those up to the end of `limit`'s vector 0; returns 1 /
// their sum.
inline float soften(float* scores, int64_t n, int64_t limit) {
    const int64_t end = up(n, W);
    for (int64_t j = n; j < end; ++j) scores[j] = -__builtin_inff();
    V most = Float::load(scores);
    for (int64_t j = W; j < end; j += W) most = Float::at_least(Float::load(scores + j), most);
    const V top = Float::all(most_of(most));
    V sum = Float::all(0);
    for (int64_t j = 0; j < end; j += W) {
        const V e = exponential<float>(Float::load(scores + j) - top);
        Float::store(scores + j, e);
        sum += e;  // lanes beyond n add exp(-87) each, which is nothing beside the 1 of the maximum
    }
    for (int64_t j = n, last = up(limit, W); j < last; ++j) scores[j] = 0;
    return 1 / whole(sum);
}

// Where the rows first .. first + count of a sample lie in an array [tokens, p.heads, p.width], from its
// first one.
struct Block {
    int count;
    int64_t at[ROWS], limit[ROWS];  // offset of each row, and how many keys it sees

    template <typename Call>
    Block(const Call& p, int64_t share, int64_t first, int64_t end, int64_t before) {
        count = int(end - first < ROWS ? end - first : int64_t(ROWS));
        int64_t token = first / share, head = first % share;
        for (int r = 0; r < count; ++r) {
            at[r] = (token * p.heads + head) * p.width;
            limit[r] = before + token + 1;
            if (++head == share) ++token, head = 0;
        }
        for (int r = count; r < ROWS; ++r) limit[r] = limit[count - 1];
    }
    int64_t last() const { return limit[ROWS - 1]; }
};

// The rows of a block of x, times a factor, as [ROWS, width] with zeros where there is nothing.
inline void gather(const float* x, const Block& b, int64_t own, int64_t width, float factor, float* rows) {
    const V f = Float::all(factor);
    for (int r = 0; r < ROWS; ++r)
        over_channels<float>(own, [&](int64_t d, auto w) {
            Float::store(rows + r * width + d,
                         r < b.count ? f * load<float>(x + b.at[r] + d, w) : Float::all(0));
        });
}

// The inverse: writes each row of a block times its factor.
inline void scatter(const float* rows, const Block& b, int64_t own, int64_t width, const float* factor,
                    float* x) {
    for (int r = 0; r < b.count; ++r) {
        const V f = Float::all(factor[r]);
        over_channels<float>(own, [&](int64_t d, auto w) {
            store<float>(x + b.at[r] + d, f * Float::load(rows + r * width + d), w);
        });
    }
}

struct Sizes {
    int64_t share, width, columns;  // query heads a key head; width and longest line of keys, rounded up

    explicit Sizes(const attention_call& p) : share(p.heads / p.kv_heads), width(up(p.width, W)), columns(0) {
        for (int64_t g = 0; g < p.groups; ++g)
            for (int64_t s = p.group[g]; s < p.group[g + 1]; ++s) {
                const int64_t before = prefix(p, g, s), n = up(before + p.bounds[s + 1] - p.bounds[s], TILE);
                columns = n > columns ? n : columns;
            }
    }
    explicit Sizes(const attention_cached_call& p)
        : share(p.heads / p.kv_heads), width(up(p.width, W)), columns(0) {
        for (int64_t g = 0; g < p.prompts; ++g)
            for (int64_t r = p.group[g]; r < p.group[g + 1]; ++r) {
                const int64_t n = up(p.length[g] + p.before[r] + p.bounds[r + 1] - p.bounds[r], TILE);
                columns = n > columns ? n : columns;
            }
    }
    static int64_t prefix(const attention_call& p, int64_t g, int64_t s) {
        const int64_t first = p.group[g];
        return p.owned[g] && s > first ? p.bounds[first + 1] - p.bounds[first] : 0;
    }
};

// n rows of `own` floats, `step` apart, at line `at` of plain [z.columns, z.width] and of turned
// [z.width, z.columns]; either may be null.
inline void pack(const Sizes& z, const float* from, int64_t step, int64_t own, int64_t n, int64_t at,
                 float* plain, float* turned) {
    if (plain)
        for (int64_t t = 0; t < n; ++t)
            over_channels<float>(own, [&](int64_t d, auto w) {
                Float::store(plain + (at + t) * z.width + d, load<float>(from + t * step + d, w));
            });
    if (turned) {
        int64_t t = 0;
#if VECTOR_LEVEL == 2
        const __m512i steps =
            _mm512_mullo_epi32(_mm512_set1_epi32(int(step)),
                               _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        for (; t + W <= n; t += W)
            for (int64_t d = 0; d < own; ++d)
                Float::store(turned + d * z.columns + at + t,
                             _mm512_i32gather_ps(steps, from + t * step + d, 4));
#endif
        for (; t < n; ++t)
            for (int64_t d = 0; d < own; ++d) turned[d * z.columns + at + t] = from[t * step + d];
        for (int64_t d = own; d < z.width; ++d)
            for (t = 0; t < n; ++t) turned[d * z.columns + at + t] = 0;
    }
}

// Rows `begin` to `end` of x [tokens, kv_heads, p.width], head k.
inline void pack(const attention_call& p, const Sizes& z, const float* x, int64_t k, int64_t begin,
                 int64_t end, int64_t at, float* plain, float* turned) {
    pack(z, x + (begin * p.kv_heads + k) * p.width, p.kv_heads * p.width, p.width, end - begin, at, plain,
         turned);
}

// What `tokens` queries at `query` of key head k give, when the first sees `before` keys and its own.
template <typename Call>
inline void answer(const Call& p, const Sizes& z, const float* query, float* out, int64_t tokens,
                   int64_t before, const float* keys, const float* values, float* room) {
    const int64_t width = z.width, columns = z.columns;
    float *scores = room, *rows = scores + ROWS * columns, *mixed = rows + ROWS * width;
    for (int64_t first = 0; first < tokens * z.share; first += ROWS) {
        const Block b(p, z.share, first, tokens * z.share, before);
        const int64_t limit = b.last();
        gather(query, b, p.width, width, p.scale, rows);
        products(rows, keys, scores, width, limit, columns);
        float part[ROWS];
        for (int r = 0; r < ROWS; ++r) part[r] = soften(scores + r * columns, b.limit[r], limit);
#define MIX(N) mix<N>(scores, values + d, mixed + d, width, limit, columns)
        OVER_WIDTH(MIX)
#undef MIX
        scatter(mixed, b, p.width, width, part, out);
    }
}

const char* forward(const attention_call& p) {
    const Sizes z(p);
    const int64_t width = z.width, columns = z.columns;
    const int64_t floats = 2 * width * columns + ROWS * columns + 2 * ROWS * width;
    const int threads = p.threads > 1 ? p.threads : 1;
    vector::Memory memory(threads * vector::Memory::size<float>(floats));
    if (!memory) return "not enough memory";
    float* all = memory.take<float>(0);
    vector::in_parallel(threads, p.groups * p.kv_heads, [&](int64_t task, int thread) {
        const int64_t g = task / p.kv_heads, k = task % p.kv_heads;
        float* keys = all + thread * (vector::Memory::size<float>(floats) / int64_t(sizeof(float)));
        float* values = keys + width * columns;
        float* room = values + width * columns;
        for (int64_t s = p.group[g]; s < p.group[g + 1]; ++s) {
            const int64_t begin = p.bounds[s], n = p.bounds[s + 1] - begin, before = Sizes::prefix(p, g, s);
            pack(p, z, p.key, k, begin, begin + n, before, nullptr, keys);
            pack(p, z, p.value, k, begin, begin + n, before, values, nullptr);
            const int64_t corner = (begin * p.heads + k * z.share) * p.width;
            answer(p, z, p.query + corner, p.out + corner, n, before, keys, values, room);
        }
    });
    return nullptr;
}

const char* cached(const attention_cached_call& p) {
    const Sizes z(p);
    const int64_t width = z.width, columns = z.columns;
    const int64_t floats = 2 * width * columns + ROWS * columns + 2 * ROWS * width;
    const int threads = p.threads > 1 ? p.threads : 1;
    vector::Memory memory(threads * vector::Memory::size<float>(floats));
    if (!memory) return "not enough memory";
    float* all = memory.take<float>(0);
    vector::in_parallel(threads, p.prompts * p.kv_heads, [&](int64_t task, int thread) {
        const int64_t g = task / p.kv_heads, k = task % p.kv_heads, length = p.length[g];
        if (p.group[g] == p.group[g + 1]) return;  // Sizes has no place for a prompt without rows
        float* keys = all + thread * (vector::Memory::size<float>(floats) / int64_t(sizeof(float)));
        float* values = keys + width * columns;
        float* room = values + width * columns;
        const int64_t prompt = task * p.prompt_slots * p.width;
        pack(z, p.prompt_key + prompt, p.width, p.width, length, 0, nullptr, keys);
        pack(z, p.prompt_value + prompt, p.width, p.width, length, 0, values, nullptr);
        for (int64_t r = p.group[g]; r < p.group[g + 1]; ++r) {
            const int64_t begin = p.bounds[r], n = p.bounds[r + 1] - begin, before = p.before[r];
            const int64_t own = (r * p.kv_heads + k) * p.own_slots * p.width;
            pack(z, p.own_key + own, p.width, p.width, before + n, length, nullptr, keys);
            pack(z, p.own_value + own, p.width, p.width, before + n, length, values, nullptr);
            const int64_t corner = (begin * p.heads + k * z.share) * p.width;
            answer(p, z, p.query + corner, p.out + corner, n, length + before, keys, values, room);
        }
    });
    return nullptr;
}

const char* backward(const attention_call& p) {
    const Sizes z(p);
    const int64_t width = z.width, columns = z.columns;
    const int64_t floats = 5 * width * columns + 2 * ROWS * columns + 4 * ROWS * width;
    const int threads = p.threads > 1 ? p.threads : 1;
    vector::Memory memory(threads * vector::Memory::size<float>(floats));
    if (!memory) return "not enough memory";
    float* all = memory.take<float>(0);
    vector::in_parallel(threads, p.groups * p.kv_heads, [&](int64_t task, int thread) {
        const int64_t g = task / p.kv_heads, k = task % p.kv_heads;
        float* keys = all + thread * (vector::Memory::size<float>(floats) / int64_t(sizeof(float)));
        float* turned_keys = keys + width * columns;
        float* turned_values = turned_keys + width * columns;
        float* sum_keys = turned_values + width * columns;
        float* sum_values = sum_keys + width * columns;
        float* scores = sum_values + width * columns;
        float* slopes = scores + ROWS * columns;
        float *rows = slopes + ROWS * columns, *grads = rows + ROWS * width, *outs = grads + ROWS * width;
        float* mixed = outs + ROWS * width;
        float scales[ROWS];
        for (float& x : scales) x = p.scale;
        // Samples go backwards, so that what a prefix gathers from those that continue it is whole when its
        // turn comes.
        const int64_t first_sample = p.group[g],
                      shared = p.owned[g] ? p.bounds[first_sample + 1] - p.bounds[first_sample] : 0;
        pack(p, z, p.key, k, p.bounds[first_sample], p.bounds[first_sample] + shared, 0, keys, turned_keys);
        pack(p, z, p.value, k, p.bounds[first_sample], p.bounds[first_sample] + shared, 0, nullptr,
             turned_values);
        for (int64_t i = 0; i < shared * width; ++i) sum_keys[i] = sum_values[i] = 0;
        for (int64_t s = p.group[g + 1] - 1; s >= first_sample; --s) {
            const int64_t begin = p.bounds[s], n = p.bounds[s + 1] - begin, before = Sizes::prefix(p, g, s);
            const bool is_prefix = p.owned[g] && s == first_sample;
            if (!is_prefix) {
                pack(p, z, p.key, k, begin, begin + n, before, keys, turned_keys);
                pack(p, z, p.value, k, begin, begin + n, before, nullptr, turned_values);
                for (int64_t i = before * width; i < (before + n) * width; ++i)
                    sum_keys[i] = sum_values[i] = 0;
            }
            const int64_t corner = (begin * p.heads + k * z.share) * p.width;
            for (int64_t first = 0; first < n * z.share; first += ROWS) {
                const Block b(p, z.share, first, n * z.share, before);
                const int64_t limit = b.last(), end = up(limit, W);
                gather(p.query + corner, b, p.width, width, p.scale, rows);
                gather(p.grad_out + corner, b, p.width, width, 1, grads);
                gather(p.out + corner, b, p.width, width, 1, outs);
                products(rows, turned_keys, scores, width, limit, columns);
                products(grads, turned_values, slopes, width, limit, columns);
                for (int r = 0; r < ROWS; ++r) {
                    const int64_t own = b.limit[r];
                    float *weight = scores + r * columns, *slope = slopes + r * columns;
                    const V part = Float::all(soften(weight, own, limit));
                    // sum over keys of weight times its gradient, which softmax's backward subtracts
                    V total = Float::all(0);
                    for (int64_t d = 0; d < width; d += W)
                        total = Float::fma(Float::load(grads + r * width + d),
                                           Float::load(outs + r * width + d), total);
                    const V mean = Float::all(whole(total));
                    for (int64_t j = own; j < end; ++j)
                        slope[j] = 0;  // what lies there belongs to later tokens
                    for (int64_t j = 0; j < end; j += W) {
                        const V w = Float::load(weight + j) * part;
                        Float::store(weight + j, w);
                        Float::store(slope + j, w * (Float::load(slope + j) - mean));
                    }
                }
#define MIX(N) mix<N>(slopes, keys + d, mixed + d, width, limit, columns)
                OVER_WIDTH(MIX)
#undef MIX
                scatter(mixed, b, p.width, width, scales, p.grad_query + corner);
#define SPREAD_KEYS(N) spread<N>(slopes, rows + d, sum_keys + d, width, limit, columns)
                OVER_WIDTH(SPREAD_KEYS)
#undef SPREAD_KEYS
#define SPREAD_VALUES(N) spread<N>(scores, grads + d, sum_values + d, width, limit, columns)
                OVER_WIDTH(SPREAD_VALUES)
#undef SPREAD_VALUES
            }
            for (int64_t t = 0; t < n; ++t)
                over_channels<float>(p.width, [&](int64_t d, auto w) {
                    const int64_t to = ((begin + t) * p.kv_heads + k) * p.width + d,
                                  from = (before + t) * width + d;
                    store<float>(p.grad_key + to, Float::load(sum_keys + from), w);
                    store<float>(p.grad_value + to, Float::load(sum_values + from), w);
                });
        }
    });
    return nullptr;
}

const Table table = {
    [](const attention_call* p) { return forward(*p); },
    [](const attention_call* p) { return backward(*p); },
    [](const attention_cached_call* p) { return cached(*p); },
};

}  // namespace catmllm::attention::VECTOR_SET

#include "../vector/end.h"
