// The forward pass: whole targets' edges, a few dozen at a time, run through every step on one thread.
// Included by `kernels.h` inside the namespace of an instruction set.

enum {
    BLOCK = 60
};  // edges at a time: five register tiles. The weights, 6.5 MB at L4M2, are read once a block

template <class T>
const T* of(const void* p) {
    return static_cast<const T*>(p);
}
template <class T>
T* of(void* p) {
    return static_cast<T*>(p);
}

// A row stride that is an odd number of cache lines: rows at a multiple of 4 KiB would share one set of the
// cache.
template <class T>
constexpr Index stride(Index n) {
    return ((n * Index(sizeof(T)) + 63) / 64 | 1) * 64 / Index(sizeof(T));
}

// One weight matrix in panels. Complex ones hold r, then s.
template <class T>
struct Packed {
    const T* weight;
    T* panels;
    Index in, out;       // of the product: depth and columns
    Index step;          // of `weight`'s rows
    bool complex, back;  // back: x·weight instead of x·weightᵀ

    Index depth() const { return complex ? 2 * in : in; }
    Index size() const { return packed_size<T>(depth(), out); }
    Index count() const { return (out + panel_width<T> - 1) / panel_width<T>; }
    void pack_panel(Index i) const {
        const Index j = i * panel_width<T>, w = out - j;
        T* to = panels + j * depth();
        for (int part = 0; part < (complex ? 2 : 1); ++part) {
            T* half = to + part * in * panel_width<T>;
            if (back)
                pack(weight + part * in * step + j, step, in, w, half);
            else
                pack_transposed(weight + (part * out + j) * step, step, in, w, half);
        }
    }
};

template <class T>
struct PackedSet {
    enum { MOST = 6 * (SO2_MAX_LMAX + 1) + 2 };
    Packed<T> list[MOST];
    int n = 0;

    // Returns the place in `list`, whose entries move nowhere.
    int add(const void* weight, Index in, Index out, Index step, bool complex, bool back) {
        list[n] = {of<T>(weight), nullptr, in, out, step, complex, back};
        return n++;
    }
    Index bytes() const {
        Index total = 0;
        for (int i = 0; i < n; ++i) total += vector::Memory::size<T>(list[i].size());
        return total;
    }
    void fill(vector::Memory& memory, int threads) {
        Index begin[MOST + 1] = {};
        for (int i = 0; i < n; ++i) {
            list[i].panels = memory.take<T>(list[i].size());
            begin[i + 1] = begin[i] + list[i].count();
        }
        vector::in_parallel(threads, begin[n], [&](Index task, int) {
            int i = 0;
            while (begin[i + 1] <= task) ++i;
            list[i].pack_panel(task - begin[i]);
        });
    }
};

template <class T>
void multiply(const Packed<T>& w, Index rows, const T* a, Index step, const T* init, Index init_step, T* c,
              Index c_step) {
    product(rows, a, step, w.panels, w.in, init, init_step, c, c_step, w.out);
}

template <class T>
struct Constants {
    Grid<T> grid;
    LogitWeights<T> logits;
    T scale[SO2_MAX_LMAX + 1];  // of the way back

    Constants(const so2_message& p, const Sizes& s)
        : grid{p.latitudes, p.longitudes, of<T>(p.to_lat), of<T>(p.from_lat), of<T>(p.lon)},
          logits{of<T>(p.norm_weight), of<T>(p.norm_bias), of<T>(p.alpha_dot), p.eps} {
        for (int l = 0; l <= s.lmax; ++l) scale[l] = T(__builtin_sqrt(s.lost_square(l)));
    }
};

template <class T>
void activate(const so2_message& p, const Sizes& s, const Constants<T>& k, const T* gates, const T* before,
              T* after) {
    if (p.gate)
        gate(s, gates, before, after);
    else
        with_constant(s.mmax,
                      [&](auto m) { sphere_silu<T, decltype(m)::value>(s, k.grid, gates, before, after); });
}

// Second product: [edges, M·H] -> [edges, M·V].
template <class T>
void second_product(const Sizes& s, const Packed<T>* conv2, const void* bias, Index edges, const T* after,
                    Index step, T* value, Index value_step) {
    multiply(conv2[0], edges, after, step, of<T>(bias), 0, value, value_step);
    for (int m = 1; m <= s.mmax; ++m) {
        const T* a = after + s.first[m] * s.H;
        T* v = value + s.first[m] * s.V;
        complex_product(edges, a, a + s.n[m] * s.H, step, conv2[m].panels, conv2[m].in, v, v + s.n[m] * s.V,
                        value_step, conv2[m].out);
    }
}

template <class T>
void by_channel(const Sizes& s, const T* attention, const T* keep, T* weight) {
    const int width = s.V / s.heads;
    for (int h = 0; h < s.heads; ++h) {
        const T w = keep ? attention[h] * keep[h] : attention[h];
        for (int c = 0; c < width; ++c) weight[h * width + c] = w;
    }
}

template <class T>
struct ForwardSpace {
    T *pair, *extra, *before, *after, *value, *weight, *logit, *running;
    Share<T>* shares;
    Index pair_step, value_step;

    static Index widest(const Sizes& s) {
        Index most = s.pair(0);
        for (int m = 1; m <= s.mmax; ++m) most = 2 * s.pair(m) > most ? 2 * s.pair(m) : most;
        return stride<T>(most);
    }
    static Index bytes(const Sizes& s) {
        return vector::Memory::size<T>(BLOCK * widest(s)) + vector::Memory::size<T>(BLOCK * s.extra) +
               2 * vector::Memory::size<T>(BLOCK * stride<T>(s.M * s.H)) +
               vector::Memory::size<T>(BLOCK * stride<T>(s.M * s.V)) + vector::Memory::size<T>(BLOCK * s.V) +
               vector::Memory::size<T>(BLOCK * s.heads) + vector::Memory::size<T>(3 * s.heads) +
               vector::Memory::size<Share<T>>(BLOCK);
    }
    void carve(const Sizes& s, vector::Memory& memory) {
        pair_step = widest(s);
        value_step = stride<T>(s.M * s.V);
        pair = memory.take<T>(BLOCK * pair_step);
        extra = memory.take<T>(BLOCK * s.extra);
        before = memory.take<T>(BLOCK * stride<T>(s.M * s.H));
        after = memory.take<T>(BLOCK * stride<T>(s.M * s.H));
        value = memory.take<T>(BLOCK * value_step);
        weight = memory.take<T>(BLOCK * s.V);
        logit = memory.take<T>(BLOCK * s.heads);
        running = memory.take<T>(3 * s.heads);
        shares = memory.take<Share<T>>(BLOCK);
    }
};

template <class T>
struct Forward {
    const so2_message& p;
    const Sizes s;
    const Constants<T> k;
    PackedSet<T> packed;
    int radial, conv1_extra, conv1, conv2;  // places in `packed`

    explicit Forward(const so2_message& p) : p(p), s(p), k(p, s) {
        radial = packed.n;
        for (int m = 0; m <= s.mmax; ++m)
            packed.add(of<T>(p.radial_weight) + Index(s.plus[m]) * 2 * s.C * s.K, s.K, s.pair(m), s.K, false,
                       false);
        conv1_extra = packed.add(p.conv1[0], s.pair(0), s.extra, s.pair(0), false, false);
        conv1 = packed.n;
        for (int m = 0; m <= s.mmax; ++m)
            packed.add(of<T>(p.conv1[m]) + (m ? 0 : Index(s.extra) * s.pair(0)), s.pair(m), s.n[m] * s.H,
                       s.pair(m), m > 0, false);
        conv2 = packed.n;
        for (int m = 0; m <= s.mmax; ++m)
            packed.add(p.conv2[m], s.n[m] * s.H, s.n[m] * s.V, s.n[m] * s.H, m > 0, false);
    }

    // First product of edges begin ... end-1, an order m at a time: radial weights, rotation, product.
    void first_product(const ForwardSpace<T>& space, Index begin, Index edges, T* extra, T* before,
                       Index before_step) {
        const T* bias = of<T>(p.conv1_bias);
        for (int m = 0; m <= s.mmax; ++m) {
            const Index width = s.pair(m), step = space.pair_step;
            T* pair = space.pair;
            multiply(packed.list[radial + m], edges, of<T>(p.edge) + begin * s.K, s.K,
                     of<T>(p.radial_bias) + Index(s.plus[m]) * 2 * s.C, 0, pair, step);
            for (Index i = 0; i < edges; ++i) {
                const Index e = begin + i;
                const T* d = of<T>(p.wigner) + e * s.packed;
                for (int end = 0; end < 2; ++end) {
                    const T* x = of<T>(p.x) + (end ? p.target : p.source)[e] * s.S * s.C;
                    for (int l = m; l <= s.lmax; ++l) {
                        T* plus = pair + i * step + (l - m) * 2 * s.C + end * s.C;
                        turn_and_scale(l, x + l * l * s.C, s.C, d + s.at_plus(l, m),
                                       m ? d + s.at_minus(l, m) : nullptr, plus, m ? plus + width : nullptr);
                    }
                }
            }
            const Packed<T>& w = packed.list[conv1 + m];
            if (m == 0) {
                multiply(packed.list[conv1_extra], edges, pair, step, bias, 0, extra, s.extra);
                multiply(w, edges, pair, step, bias + s.extra, 0, before, before_step);
            } else {
                T* y = before + s.first[m] * s.H;
                complex_product(edges, pair, pair + width, step, w.panels, w.in, y, y + s.n[m] * s.H,
                                before_step, w.out);
            }
        }
    }

    // Targets first ... last-1, which have at most BLOCK edges together unless they are one.
    void targets(const ForwardSpace<T>& space, Index first_target, Index last_target) {
        const Index end = p.first[last_target];
        for (Index t = first_target; t < last_target; ++t)
            if (p.first[t] == p.first[t + 1]) clear(t);
        for (Index begin = p.first[first_target]; begin < end; begin += BLOCK) {
            const Index edges = end - begin < BLOCK ? end - begin : Index(BLOCK);
            const bool save = p.extra != nullptr;
            T* extra = save ? of<T>(p.extra) + begin * s.extra : space.extra;
            T* before = save ? of<T>(p.before) + begin * s.M * s.H : space.before;
            T* after = save ? of<T>(p.after) + begin * s.M * s.H : space.after;
            const Index step = save ? Index(s.M) * s.H : stride<T>(s.M * s.H);
            first_product(space, begin, edges, extra, before, step);
            for (Index i = 0; i < edges; ++i) {
                const T* a = extra + i * s.extra;
                activate(p, s, k, a + s.heads * s.A, before + i * step, after + i * step);
                for (int h = 0; h < s.heads; ++h)
                    space.logit[i * s.heads + h] =
                        T(logit(a + h * s.A, s.A, k.logits, k.logits.dot + h * s.A));
            }
            second_product(s, &packed.list[conv2], p.conv2_bias, edges, after, step, space.value,
                           space.value_step);
            if (save)
                for (Index i = 0; i < edges * s.heads; ++i)
                    of<T>(p.attention)[begin * s.heads + i] =
                        space.logit[i];  // made into attention at the end
            for (Index i = 0; i < edges;) {
                Index to = i + 1;
                while (to < edges && p.target[begin + to] == p.target[begin + i]) ++to;
                sum(space, begin, i, to);
                i = to;
            }
        }
    }

    void clear(Index target) {
        T* out = of<T>(p.total) + target * s.S * s.V;
        for (Index i = 0; i < Index(s.S) * s.V; ++i) out[i] = 0;
    }

    // Edges begin+from ... begin+to-1, all of one target: softmax and sum. A target with more edges than a
    // block is summed with a running largest logit; its attention is only known with its last edge.
    void sum(const ForwardSpace<T>& space, Index begin, Index from, Index to) {
        const Index target = p.target[begin + from];
        const bool starts = p.first[target] == begin + from, ends = p.first[target + 1] == begin + to;
        T *most = space.running, *total = most + s.heads, *shrink = total + s.heads;
        T* out = of<T>(p.total) + target * s.S * s.V;
        T* weight = space.logit;
        for (int h = 0; h < s.heads; ++h) {
            T top = weight[from * s.heads + h];
            for (Index i = from + 1; i < to; ++i)
                top = weight[i * s.heads + h] > top ? weight[i * s.heads + h] : top;
            if (starts) {
                total[h] = 0;
                shrink[h] = 1;
            } else {
                top = most[h] > top ? most[h] : top;
                shrink[h] = __builtin_exp(most[h] - top);
                total[h] *= shrink[h];
            }
            most[h] = top;
            for (Index i = from; i < to; ++i) weight[i * s.heads + h] -= top;
        }
        over_channels<T>((to - from) * s.heads, [&](Index c, auto w) {
            T* at = weight + from * s.heads + c;
            store(at, exponential<T>(load(at, w)), w);
        });
        for (Index i = from; i < to; ++i)
            for (int h = 0; h < s.heads; ++h) total[h] += weight[i * s.heads + h];
        const bool whole = starts && ends;
        if (whole)
            for (Index i = from; i < to; ++i)
                for (int h = 0; h < s.heads; ++h) weight[i * s.heads + h] /= total[h];
        if (!starts) scale_total(out, shrink);
        for (Index i = from; i < to; ++i) {
            const Index e = begin + i;
            by_channel(s, weight + i * s.heads, p.keep ? of<T>(p.keep) + e * s.heads : nullptr,
                       space.weight + i * s.V);
            space.shares[i - from] = {of<T>(p.wigner) + e * s.packed, space.value + i * space.value_step,
                                      space.weight + i * s.V};
        }
        turn_back_and_sum(s, space.shares, int(to - from), s.V, s.V, k.scale, out, !starts);
        if (ends && !whole) {
            for (int h = 0; h < s.heads; ++h) shrink[h] = 1 / total[h];
            scale_total(out, shrink);
        }
        if (!ends || !p.attention) return;
        T* attention = of<T>(p.attention);
        for (Index e = p.first[target]; e < p.first[target + 1]; ++e)
            for (int h = 0; h < s.heads; ++h) {
                T& a = attention[e * s.heads + h];
                a = whole ? weight[(e - begin) * s.heads + h] : T(__builtin_exp(a - most[h])) / total[h];
            }
    }

    void scale_total(T* out, const T* factor) {
        const int width = s.V / s.heads;
        for (int i = 0; i < s.S; ++i)
            for (int c = 0; c < s.V; ++c) out[i * s.V + c] *= factor[c / width];
    }
};

// Consecutive targets with at most `most` edges together (or one target with more), as [count + 1] limits;
// returns count.
inline Index group_targets(const std::int64_t* first, Index nodes, Index most, Index* limits) {
    Index count = 0, begin = 0;
    limits[0] = 0;
    for (Index t = 1; t <= nodes; ++t)
        if (t == nodes || first[t + 1] - first[begin] > most) {
            limits[++count] = t;
            begin = t;
        }
    return count;
}

// A block of BLOCK edges, fewer where there would not be 16 blocks: small systems need some for every thread.
inline Index block_edges(Index edges) {
    const Index least = 20, even = (edges + 15) / 16;
    return even > BLOCK ? Index(BLOCK) : even < least ? least : even;
}

template <class T>
const char* forward(const so2_message& p) {
    Forward<T> f(p);
    const int threads = p.threads > 0 ? p.threads : 1;
    vector::Memory memory(f.packed.bytes() +
                          threads * (ForwardSpace<T>::bytes(f.s) + vector::Memory::size<ForwardSpace<T>>(1)) +
                          vector::Memory::size<Index>(p.nodes + 1));
    if (!memory) return "out of memory";
    f.packed.fill(memory, threads);
    auto* spaces = memory.take<ForwardSpace<T>>(threads);
    for (int i = 0; i < threads; ++i) spaces[i].carve(f.s, memory);
    Index* limits = memory.take<Index>(p.nodes + 1);
    const Index groups = group_targets(p.first, p.nodes, block_edges(p.edges), limits);
    vector::in_parallel(threads, groups,
                        [&](Index g, int me) { f.targets(spaces[me], limits[g], limits[g + 1]); });
    return nullptr;
}
