// The backward pass: chunks of whole targets, each in three parallel steps.
//
//   1  a block of edges: values again, gradients of values and attention, back through the second product and
//   the
//      activation
//   2  a block of edges: the softmax (which needs all edges of a target), back through the first product, the
//   rotation
//      and the radial weights, whose forward is done again; the gradient of `edge`
//   3  a panel of a weight matrix, or a few nodes: sums over the chunk's edges
//
// Nothing is ever added to from two threads, and chunks do not depend on their number: the result is the same
// to the bit for any. Included by `kernels.h` inside the namespace of an instruction set.

enum {
    CHUNK_BYTES = 24 << 20,  // below glibc's largest threshold for mapping fresh pages at every call
    DEPTH = 256,             // edges of a weight gradient at a time: their panel fits the first cache
    NODES = 8                // a task
};

// Gradients of rows as the left side of a product over edges.
template <class T>
struct Left {
    T* tiles;
    Index columns;
};

// One weight matrix's gradient: grad [columns, in] += sum over edges of leftᵀ·right. Complex: the rows of r,
// then of s.
template <class T>
struct WeightTask {
    Left<T> plus, minus;  // minus.tiles null for m = 0
    const T *right, *right_minus;
    Index right_step, in;
    T* grad;
    T* bias;  // or null
    Index panels() const { return (in + panel_width<T> - 1) / panel_width<T>; }
};

template <class T>
struct BackwardSpace {
    T *value, *grad_after, *radial, *weight, *channels, *panel;
    double *logits, *partial;  // [A] for one logit; sums of norm, bias and dot over the edges of a block
    Share<T>* shares;
    Index value_step, after_step, radial_step;

    static Index widest(const Sizes& s) { return stride<T>(s.pair(0)); }
    static Index bytes(const Sizes& s) {
        return vector::Memory::size<T>(BLOCK * stride<T>(s.M * s.V)) +
               vector::Memory::size<T>(BLOCK * stride<T>(s.M * s.H)) +
               vector::Memory::size<T>(BLOCK * widest(s)) + 2 * vector::Memory::size<T>(s.V) +
               vector::Memory::size<T>(2 * DEPTH * panel_width<T>) + vector::Memory::size<double>(s.A) +
               vector::Memory::size<double>(partial_size(s)) + vector::Memory::size<Share<T>>(BLOCK);
    }
    static Index partial_size(const Sizes& s) { return 2 * s.A + Index(s.heads) * s.A; }
    void carve(const Sizes& s, vector::Memory& memory) {
        value_step = stride<T>(s.M * s.V);
        after_step = stride<T>(s.M * s.H);
        radial_step = widest(s);
        value = memory.take<T>(BLOCK * value_step);
        grad_after = memory.take<T>(BLOCK * after_step);
        radial = memory.take<T>(BLOCK * radial_step);
        weight = memory.take<T>(s.V);
        channels = memory.take<T>(s.V);
        panel = memory.take<T>(2 * DEPTH * panel_width<T>);
        logits = memory.take<double>(s.A);
        partial = memory.take<double>(partial_size(s));
        shares = memory.take<Share<T>>(BLOCK);
    }
};

template <class T>
struct Backward {
    const so2_message& p;
    const Sizes s;
    const Constants<T> k;
    PackedSet<T> packed;
    int radial, radial_back, conv1_extra, conv1, conv2, conv2_back;
    T ones[SO2_MAX_LMAX + 1];

    // of a chunk
    Index capacity = 0, begin = 0, edges = 0;
    bool first_chunk = true;
    Index pair_step, hidden_step;
    T *pair, *grad_pair, *grad_before, *grad_extra, *grad_weight, *partial;
    Left<T> left_extra, left_radial[SO2_MAX_LMAX + 1];
    Left<T> left1[SO2_MAX_LMAX + 1][2], left2[SO2_MAX_LMAX + 1][2];
    Index* cursor;  // [nodes] how far each node's edges as a source have been used
    WeightTask<T> tasks[3 * (SO2_MAX_LMAX + 1) + 1];
    Index task_begin[3 * (SO2_MAX_LMAX + 1) + 2];
    int n_tasks = 0;

    explicit Backward(const so2_message& p) : p(p), s(p), k(p, s) {
        for (T& one : ones) one = 1;
        radial = packed.n;
        for (int m = 0; m <= s.mmax; ++m) packed.add(radial_of(m), s.K, s.pair(m), s.K, false, false);
        radial_back = packed.n;
        for (int m = 0; m <= s.mmax; ++m) packed.add(radial_of(m), s.pair(m), s.K, s.K, false, true);
        conv1_extra = packed.add(p.conv1[0], s.extra, s.pair(0), s.pair(0), false, true);
        conv1 = packed.n;
        for (int m = 0; m <= s.mmax; ++m)
            packed.add(of<T>(p.conv1[m]) + (m ? 0 : Index(s.extra) * s.pair(0)), s.n[m] * s.H, s.pair(m),
                       s.pair(m), m > 0, true);
        conv2 = packed.n;
        for (int m = 0; m <= s.mmax; ++m)
            packed.add(p.conv2[m], s.n[m] * s.H, s.n[m] * s.V, s.n[m] * s.H, m > 0, false);
        conv2_back = packed.n;
        for (int m = 0; m <= s.mmax; ++m)
            packed.add(p.conv2[m], s.n[m] * s.V, s.n[m] * s.H, s.n[m] * s.H, m > 0, true);
        pair_step = stride<T>(s.M * 2 * s.C);
        hidden_step = stride<T>(s.M * s.H);
    }
    const T* radial_of(int m) const { return of<T>(p.radial_weight) + Index(s.plus[m]) * 2 * s.C * s.K; }
    Index partial_size() const { return BackwardSpace<T>::partial_size(s); }

    // Hands out the chunk's memory, or only counts it: f(pointer, number of values).
    template <class F>
    void each_array(F f) {
        f(pair, capacity * pair_step);
        f(grad_pair, capacity * pair_step);
        f(grad_before, capacity * hidden_step);
        f(grad_extra, capacity * s.extra);
        f(grad_weight, capacity * s.heads);
        f(partial, (capacity / BLOCK + 1) * partial_size());
        left_extra.columns = s.extra;
        f(left_extra.tiles, left_size<T>(capacity, s.extra));
        for (int m = 0; m <= s.mmax; ++m) {
            left_radial[m].columns = s.pair(m);
            f(left_radial[m].tiles, left_size<T>(capacity, s.pair(m)));
            for (int sign = 0; sign < (m ? 2 : 1); ++sign) {
                left1[m][sign].columns = s.n[m] * s.H;
                left2[m][sign].columns = s.n[m] * s.V;
                f(left1[m][sign].tiles, left_size<T>(capacity, left1[m][sign].columns));
                f(left2[m][sign].tiles, left_size<T>(capacity, left2[m][sign].columns));
            }
        }
    }

    void add_task(Left<T> plus, Left<T> minus, const T* right, const T* right_minus, Index right_step,
                  Index in, void* grad, void* bias, Index row) {
        tasks[n_tasks] = {plus,
                          minus,
                          right,
                          right_minus,
                          right_step,
                          in,
                          of<T>(grad) + row * in,
                          bias ? of<T>(bias) + row : nullptr};
        task_begin[n_tasks + 1] = task_begin[n_tasks] + tasks[n_tasks].panels();
        ++n_tasks;
    }
    // `edge` and `after` of the current chunk move with it; the rest stays.
    void list_tasks() {
        n_tasks = 0;
        task_begin[0] = 0;
        const Left<T> none = {nullptr, 0};
        const T *edge = of<T>(p.edge) + begin * s.K, *after = of<T>(p.after) + begin * s.M * s.H;
        add_task(left_extra, none, pair, nullptr, pair_step, s.pair(0), p.grad_conv1[0], p.grad_conv1_bias,
                 0);
        add_task(left1[0][0], none, pair, nullptr, pair_step, s.pair(0), p.grad_conv1[0], p.grad_conv1_bias,
                 s.extra);
        add_task(left2[0][0], none, after, nullptr, s.M * s.H, s.n[0] * s.H, p.grad_conv2[0],
                 p.grad_conv2_bias, 0);
        for (int m = 0; m <= s.mmax; ++m)
            add_task(left_radial[m], none, edge, nullptr, s.K, s.K, p.grad_radial_weight, p.grad_radial_bias,
                     Index(s.plus[m]) * 2 * s.C);
        for (int m = 1; m <= s.mmax; ++m) {
            const T *x = pair + s.first[m] * 2 * s.C, *a = after + s.first[m] * s.H;
            add_task(left1[m][0], left1[m][1], x, x + s.pair(m), pair_step, s.pair(m), p.grad_conv1[m],
                     nullptr, 0);
            add_task(left2[m][0], left2[m][1], a, a + s.n[m] * s.H, s.M * s.H, s.n[m] * s.H, p.grad_conv2[m],
                     nullptr, 0);
        }
    }

    // Step 1 for the chunk's edges at ... at+n-1.
    void through_activation(const BackwardSpace<T>& space, Index at, Index n) {
        const Index e0 = begin + at, H = s.M * s.H;
        const T *after = of<T>(p.after) + e0 * H, *attention = of<T>(p.attention);
        second_product(s, &packed.list[conv2], p.conv2_bias, n, after, H, space.value, space.value_step);
        for (Index i = 0; i < n; ++i) {
            const Index e = e0 + i;
            by_channel(s, attention + e * s.heads, p.keep ? of<T>(p.keep) + e * s.heads : nullptr,
                       space.weight);
            for (int c = 0; c < s.V; ++c) space.channels[c] = 0;
            turn_gradient(s, of<T>(p.grad_total) + p.target[e] * s.S * s.V, s.V,
                          of<T>(p.wigner) + e * s.packed, k.scale, space.weight,
                          space.value + i * space.value_step, space.channels);
            const int width = s.V / s.heads;
            for (int h = 0; h < s.heads; ++h) {
                T sum = 0;
                for (int c = 0; c < width; ++c) sum += space.channels[h * width + c];
                grad_weight[(at + i) * s.heads + h] = p.keep ? sum * of<T>(p.keep)[e * s.heads + h] : sum;
            }
        }
        for (int m = 0; m <= s.mmax; ++m) {
            const T* v = space.value + s.first[m] * s.V;
            T* a = space.grad_after + s.first[m] * s.H;
            const Packed<T>& w = packed.list[conv2_back + m];
            for (int sign = 0; sign < (m ? 2 : 1); ++sign)
                pack_left(v + sign * s.n[m] * s.V, space.value_step, n, left2[m][sign].columns, capacity, at,
                          left2[m][sign].tiles);
            if (m == 0)
                multiply(w, n, v, space.value_step, static_cast<const T*>(nullptr), 0, a, space.after_step);
            else
                complex_product<T, true>(n, v, v + s.n[m] * s.V, space.value_step, w.panels, w.in, a,
                                         a + s.n[m] * s.H, space.after_step, w.out);
        }
        for (Index i = 0; i < n; ++i) {
            const T *gates = of<T>(p.extra) + (e0 + i) * s.extra + s.heads * s.A,
                    *rows = of<T>(p.before) + (e0 + i) * H;
            const T* grad = space.grad_after + i * space.after_step;
            T *grad_rows = grad_before + (at + i) * hidden_step,
              *grad_gates = grad_extra + (at + i) * s.extra + s.heads * s.A;
            if (p.gate)
                gate_back(s, gates, rows, grad, grad_rows, grad_gates);
            else
                with_constant(s.mmax, [&](auto m) {
                    sphere_silu_back<T, decltype(m)::value>(s, k.grid, gates, rows, grad, grad_rows,
                                                            grad_gates);
                });
        }
        for (int m = 0; m <= s.mmax; ++m)
            for (int sign = 0; sign < (m ? 2 : 1); ++sign)
                pack_left(grad_before + at * hidden_step + (s.first[m] + sign * s.n[m]) * s.H, hidden_step, n,
                          left1[m][sign].columns, capacity, at, left1[m][sign].tiles);
    }

    // The softmax and the logits of the chunk's edges at ... at+n-1.
    void through_attention(const BackwardSpace<T>& space, Index at, Index n) {
        const T* attention = of<T>(p.attention);
        double *norm = space.partial, *bias = norm + s.A, *dot = bias + s.A;
        for (Index i = 0; i < partial_size(); ++i) norm[i] = 0;
        for (Index i = at; i < at + n; ++i) {
            const Index e = begin + i, target = p.target[e];
            for (int h = 0; h < s.heads; ++h) {
                // by the sum of the weights, which is 1 only up to rounding: then a target's gradients sum to
                // 0
                double mean = 0, mass = 0;
                for (Index o = p.first[target]; o < p.first[target + 1]; ++o) {
                    const double weight = attention[o * s.heads + h];
                    mean += weight * grad_weight[(o - begin) * s.heads + h];
                    mass += weight;
                }
                const double grad = attention[e * s.heads + h] * (grad_weight[i * s.heads + h] - mean / mass);
                logit_back(of<T>(p.extra) + e * s.extra + h * s.A, s.A, k.logits, k.logits.dot + h * s.A,
                           grad, grad_extra + i * s.extra + h * s.A, norm, bias, dot + h * s.A, space.logits);
            }
        }
        T* sums = partial + at / BLOCK * partial_size();
        for (Index i = 0; i < partial_size(); ++i) sums[i] = T(norm[i]);
        pack_left(grad_extra + at * s.extra, s.extra, n, s.extra, capacity, at, left_extra.tiles);
    }

    // Step 2.
    void through_rotation(const BackwardSpace<T>& space, Index at, Index n) {
        through_attention(space, at, n);
        const Index e0 = begin + at;
        for (int m = 0; m <= s.mmax; ++m) {
            const Index width = s.pair(m);
            T* r = space.radial;
            T *x = pair + at * pair_step + s.first[m] * 2 * s.C,
              *g = grad_pair + at * pair_step + s.first[m] * 2 * s.C;
            const T* y = grad_before + at * hidden_step + s.first[m] * s.H;
            const Packed<T>& w = packed.list[conv1 + m];
            if (m == 0) {
                multiply(packed.list[conv1_extra], n, grad_extra + at * s.extra, s.extra,
                         static_cast<const T*>(nullptr), 0, g, pair_step);
                multiply(w, n, y, hidden_step, static_cast<const T*>(g), pair_step, g, pair_step);
            } else {
                complex_product<T, true>(n, y, y + s.n[m] * s.H, hidden_step, w.panels, w.in, g, g + width,
                                         pair_step, w.out);
            }
            multiply(packed.list[radial + m], n, of<T>(p.edge) + e0 * s.K, s.K,
                     of<T>(p.radial_bias) + Index(s.plus[m]) * 2 * s.C, 0, r, space.radial_step);
            for (Index i = 0; i < n; ++i) {
                const T* d = of<T>(p.wigner) + (e0 + i) * s.packed;
                for (int end = 0; end < 2; ++end) {
                    const T* node = of<T>(p.x) + (end ? p.target : p.source)[e0 + i] * s.S * s.C;
                    for (int l = m; l <= s.lmax; ++l) {
                        const Index c = (l - m) * 2 * s.C + end * s.C, row = i * pair_step + c;
                        turn_and_scale_back(l, node + l * l * s.C, s.C, d + s.at_plus(l, m),
                                            m ? d + s.at_minus(l, m) : nullptr, r + i * space.radial_step + c,
                                            g + row, m ? g + row + width : nullptr, x + row,
                                            m ? x + row + width : nullptr);
                    }
                }
            }
            pack_left(r, space.radial_step, n, width, capacity, at, left_radial[m].tiles);
            T* grad_edge = of<T>(p.grad_edge) + e0 * s.K;
            multiply(packed.list[radial_back + m], n, r, space.radial_step,
                     m ? static_cast<const T*>(grad_edge) : nullptr, s.K, grad_edge, s.K);
        }
    }

    // Step 3, a panel of columns of a weight's gradient.
    void weight_panel(const BackwardSpace<T>& space, const WeightTask<T>& t, Index panel) {
        const Index j = panel * panel_width<T>, width = t.in - j;
        T *right = space.panel, *right_minus = right + DEPTH * panel_width<T>;
        T *r = t.grad + j, *im = r + t.plus.columns * t.in;
        for (Index k0 = 0; k0 < edges; k0 += DEPTH) {
            const Index depth = edges - k0 < DEPTH ? edges - k0 : Index(DEPTH);
            const bool add = !first_chunk || k0 > 0;
            pack(t.right + k0 * t.right_step + j, t.right_step, depth, width, right);
            if (t.right_minus)
                pack(t.right_minus + k0 * t.right_step + j, t.right_step, depth, width, right_minus);
            for (Index o = 0; o < t.plus.columns; o += tile_rows<T>) {
                const int rows = t.plus.columns - o < tile_rows<T> ? int(t.plus.columns - o) : tile_rows<T>;
                const T* plus = t.plus.tiles + o * capacity + k0 * tile_rows<T>;
                T* to = r + o * t.in;
                cut_tile<T, true, false>(rows, plus, tile_rows<T>, right, depth, add ? to : nullptr, t.in, to,
                                         t.in, width);
                if (!t.right_minus) continue;
                const T* minus = t.minus.tiles + o * capacity + k0 * tile_rows<T>;
                T* s_to = im + o * t.in;
                cut_tile<T, true, false>(rows, minus, tile_rows<T>, right_minus, depth, to, t.in, to, t.in,
                                         width);
                cut_tile<T, true, false>(rows, minus, tile_rows<T>, right, depth, add ? s_to : nullptr, t.in,
                                         s_to, t.in, width);
                cut_tile<T, true, true>(rows, plus, tile_rows<T>, right_minus, depth, s_to, t.in, s_to, t.in,
                                        width);
            }
        }
        if (panel == 0 && t.bias)
            for (Index o = 0; o < t.plus.columns; o += tile_rows<T>) {
                T sum[tile_rows<T>] = {};
                const T* tiles = t.plus.tiles + o * capacity;
                for (Index e = 0; e < edges; ++e)
                    for (int i = 0; i < tile_rows<T>; ++i) sum[i] += tiles[e * tile_rows<T> + i];
                for (Index i = 0; i < tile_rows<T> && o + i < t.plus.columns; ++i)
                    t.bias[o + i] = first_chunk ? sum[i] : t.bias[o + i] + sum[i];
            }
    }

    // Step 3, the gradient of a node from the chunk's edges that end and begin there.
    void node(const BackwardSpace<T>& space, Index node) {
        T* out = of<T>(p.grad_x) + node * s.S * s.C;
        if (first_chunk) {
            for (Index i = 0; i < Index(s.S) * s.C; ++i) out[i] = 0;
            cursor[node] = p.source_first[node];
        }
        int n = 0;
        const auto add = [&](Index e, int end) {
            space.shares[n++] = {of<T>(p.wigner) + e * s.packed,
                                 grad_pair + (e - begin) * pair_step + end * s.C, nullptr};
            if (n == BLOCK) flush(space, n, out);
        };
        for (Index e = p.first[node]; e < p.first[node + 1]; ++e)
            if (e >= begin && e < begin + edges) add(e, 1);
        for (Index& c = cursor[node]; c < p.source_first[node + 1] && p.source_order[c] < begin + edges; ++c)
            add(p.source_order[c], 0);
        flush(space, n, out);
    }
    void flush(const BackwardSpace<T>& space, int& n, T* out) {
        if (n) turn_back_and_sum(s, space.shares, n, 2 * s.C, s.C, ones, out, true);
        n = 0;
    }

    void add_partials() {
        if (p.grad_norm_weight) {
            add_partial(0, s.A, of<T>(p.grad_norm_weight));
            add_partial(s.A, s.A, of<T>(p.grad_norm_bias));
        }
        add_partial(2 * s.A, Index(s.heads) * s.A, of<T>(p.grad_alpha_dot));
    }
    void add_partial(Index at, Index n, T* to) {
        const Index blocks = (edges + BLOCK - 1) / BLOCK;
        for (Index i = 0; i < n; ++i) {
            double sum = first_chunk ? 0 : to[i];
            for (Index b = 0; b < blocks; ++b) sum += partial[b * partial_size() + at + i];
            to[i] = T(sum);
        }
    }

    void chunk(int threads, const BackwardSpace<T>* spaces) {
        const Index blocks = (edges + BLOCK - 1) / BLOCK;
        const auto size = [&](Index b) {
            return edges - b * BLOCK < BLOCK ? edges - b * BLOCK : Index(BLOCK);
        };
        vector::in_parallel(threads, blocks,
                            [&](Index b, int me) { through_activation(spaces[me], b * BLOCK, size(b)); });
        vector::in_parallel(threads, blocks,
                            [&](Index b, int me) { through_rotation(spaces[me], b * BLOCK, size(b)); });
        list_tasks();
        const Index panels = task_begin[n_tasks], groups = (p.nodes + NODES - 1) / NODES;
        vector::in_parallel(threads, panels + groups, [&](Index task, int me) {
            if (task < panels) {
                int i = 0;
                while (task_begin[i + 1] <= task) ++i;
                weight_panel(spaces[me], tasks[i], task - task_begin[i]);
            } else {
                const Index n = (task - panels) * NODES;
                for (Index i = n; i < n + NODES && i < p.nodes; ++i) node(spaces[me], i);
            }
        });
        add_partials();
        first_chunk = false;
    }
};

template <class T>
void clear(void* p, Index n) {
    if (p)
        for (Index i = 0; i < n; ++i) of<T>(p)[i] = 0;
}

// Without an edge every gradient is zero.
template <class T>
void clear_gradients(const so2_message& p, const Sizes& s) {
    clear<T>(p.grad_x, p.nodes * s.S * s.C);
    clear<T>(p.grad_radial_weight, Index(s.half) * 2 * s.C * s.K);
    clear<T>(p.grad_radial_bias, Index(s.half) * 2 * s.C);
    clear<T>(p.grad_norm_weight, s.A);
    clear<T>(p.grad_norm_bias, s.A);
    clear<T>(p.grad_alpha_dot, Index(s.heads) * s.A);
    clear<T>(p.grad_conv1_bias, s.extra + s.n[0] * s.H);
    clear<T>(p.grad_conv2_bias, s.n[0] * s.V);
    for (int m = 0; m <= s.mmax; ++m) {
        const Index out1 = m ? 2 * s.n[m] * s.H : s.extra + s.n[0] * s.H, out2 = (m ? 2 : 1) * s.n[m] * s.V;
        clear<T>(p.grad_conv1[m], out1 * s.pair(m));
        clear<T>(p.grad_conv2[m], out2 * s.n[m] * s.H);
    }
}

template <class T>
const char* backward(const so2_message& p) {
    Backward<T> b(p);
    const Sizes& s = b.s;
    if (p.edges == 0) {
        clear_gradients<T>(p, s);
        return nullptr;
    }
    const int threads = p.threads > 0 ? p.threads : 1;
    b.capacity = BLOCK;
    Index per_block = 0;
    b.each_array([&](T*&, Index n) { per_block += vector::Memory::size<T>(n); });
    const Index most = (CHUNK_BYTES / per_block > 1 ? CHUNK_BYTES / per_block : 1) * BLOCK;
    vector::Memory plan(vector::Memory::size<Index>(p.nodes + 1) + vector::Memory::size<Index>(p.nodes));
    if (!plan) return "out of memory";
    Index* limits = plan.take<Index>(p.nodes + 1);
    b.cursor = plan.take<Index>(p.nodes);
    const Index chunks = group_targets(p.first, p.nodes, most, limits);
    b.capacity = 0;
    for (Index i = 0; i < chunks; ++i) {
        const Index edges = p.first[limits[i + 1]] - p.first[limits[i]];
        if (edges > b.capacity) b.capacity = edges;
    }
    Index bytes = 0;
    b.each_array([&](T*&, Index n) { bytes += vector::Memory::size<T>(n); });
    vector::Memory memory(b.packed.bytes() + bytes + threads * BackwardSpace<T>::bytes(s) +
                          vector::Memory::size<BackwardSpace<T>>(threads));
    if (!memory) return "out of memory";
    b.packed.fill(memory, threads);
    b.each_array([&](T*& to, Index n) { to = memory.take<T>(n); });
    auto* spaces = memory.take<BackwardSpace<T>>(threads);
    for (int i = 0; i < threads; ++i) spaces[i].carve(s, memory);
    for (Index i = 0; i < chunks; ++i) {
        b.begin = p.first[limits[i]];
        b.edges = p.first[limits[i + 1]] - b.begin;
        if (b.edges) b.chunk(threads, spaces);
    }
    return nullptr;
}
