// Between nodes and the frames of edges: Wigner matrices are block-diagonal in the degree l, and only the
// rows |m| <= mmax exist on an edge. Included by `kernels.h` inside the namespace of an instruction set.

template <int N>
struct Const {
    static constexpr int value = N;
};

// f(Const<n>()) with n known to the compiler, so that the 2n+1 node rows of a degree stay in registers.
template <class F>
inline void with_constant(int n, F f) {
    switch (n) {
        case 0:
            return f(Const<0>());
        case 1:
            return f(Const<1>());
        case 2:
            return f(Const<2>());
        case 3:
            return f(Const<3>());
        case 4:
            return f(Const<4>());
        case 5:
            return f(Const<5>());
        case 6:
            return f(Const<6>());
        case 7:
            return f(Const<7>());
        case 8:
            return f(Const<8>());
    }
}

template <class T, int D>
inline void load_rows(const T* x, Index step, Vec<T>* rows, Full w) {
    for (int i = 0; i < D; ++i) rows[i] = load(x + i * step, w);
}
template <class T, int D>
inline void load_rows(const T* x, Index step, Vec<T>* rows, Part w) {
    for (int i = 0; i < D; ++i) rows[i] = load(x + i * step, w);
}

template <class T, int D>
inline Vec<T> dot(const T* factors, const Vec<T>* rows) {
    Vec<T> sum = Lanes<T>::all(factors[0]) * rows[0];
    for (int i = 1; i < D; ++i) sum = Lanes<T>::fma(Lanes<T>::all(factors[i]), rows[i], sum);
    return sum;
}

// One node's rows of degree l onto the rows ±m of an edge, times the radial weight that `plus` holds on
// entry. `minus` is null for m = 0.
template <class T>
void turn_and_scale(int l, const T* x, int C, const T* d_plus, const T* d_minus, T* plus, T* minus) {
    with_constant(l, [&](auto degree) {
        enum { D = 2 * decltype(degree)::value + 1 };
        over_channels<T>(C, [&](Index c, auto w) {
            Vec<T> rows[D];
            load_rows<T, D>(x + c, C, rows, w);
            const Vec<T> scale = load(plus + c, w);
            store(plus + c, scale * dot<T, D>(d_plus, rows), w);
            if (minus) store(minus + c, scale * dot<T, D>(d_minus, rows), w);
        });
    });
}

// The backward pass of the same. In: `grad_plus`, `grad_minus` of the scaled rows, `radial`. Out: the scaled
// rows in `plus`, `minus`; the gradients of the unscaled rows and of `radial` in place of what came in.
template <class T>
void turn_and_scale_back(int l, const T* x, int C, const T* d_plus, const T* d_minus, T* radial, T* grad_plus,
                         T* grad_minus, T* plus, T* minus) {
    with_constant(l, [&](auto degree) {
        enum { D = 2 * decltype(degree)::value + 1 };
        over_channels<T>(C, [&](Index c, auto w) {
            Vec<T> rows[D];
            load_rows<T, D>(x + c, C, rows, w);
            const Vec<T> scale = load(radial + c, w), g = load(grad_plus + c, w);
            const Vec<T> z = dot<T, D>(d_plus, rows);
            Vec<T> grad_radial = g * z;
            store(plus + c, scale * z, w);
            store(grad_plus + c, scale * g, w);
            if (minus) {
                const Vec<T> h = load(grad_minus + c, w), y = dot<T, D>(d_minus, rows);
                grad_radial = Lanes<T>::fma(h, y, grad_radial);
                store(minus + c, scale * y, w);
                store(grad_minus + c, scale * h, w);
            }
            store(radial + c, grad_radial, w);
        });
    });
}

// One edge's share of a sum over edges: its rows turned back into the common frame.
template <class T>
struct Share {
    const T* wigner;  // packed
    const T* rows;    // row r at rows + r·step
    const T* weight;  // by channel, or null
};

// out [S, C] = or += sum over the shares of wignerᵀ·(rows · weight), times scale[l].
template <class T>
void turn_back_and_sum(const Rows& s, const Share<T>* shares, int n, Index step, int C, const T* scale,
                       T* out, bool add) {
    for (int l = 0; l <= s.lmax; ++l)
        with_constant(l, [&](auto degree) {
            enum { D = 2 * decltype(degree)::value + 1 };
            T* to = out + l * l * C;
            const Vec<T> factor = Lanes<T>::all(scale[l]);
            over_channels<T>(C, [&](Index c, auto w) {
                Vec<T> sum[D];
                for (int i = 0; i < D; ++i) sum[i] = Lanes<T>::all(0);
                for (int e = 0; e < n; ++e) {
                    const Vec<T> weight = shares[e].weight ? load(shares[e].weight + c, w) : Lanes<T>::all(1);
                    for (int k = 0; k < s.count[l]; ++k) {
                        const T* d = shares[e].wigner + s.at[l][k];
                        const Vec<T> y = weight * load(shares[e].rows + s.row[l][k] * step + c, w);
                        for (int i = 0; i < D; ++i) sum[i] = Lanes<T>::fma(Lanes<T>::all(d[i]), y, sum[i]);
                    }
                }
                for (int i = 0; i < D; ++i) {
                    const Vec<T> y = sum[i] * factor;
                    store(to + i * C + c, add ? y + load(to + i * C + c, w) : y, w);
                }
            });
        });
}

// The backward pass of an edge's weighted value: G = wigner·grad·scale, by_channel += sum over rows of
// G·value, and value becomes its gradient, weight·G.
template <class T>
void turn_gradient(const Rows& s, const T* grad, int C, const T* wigner, const T* scale, const T* weight,
                   T* value, T* by_channel) {
    for (int l = 0; l <= s.lmax; ++l)
        with_constant(l, [&](auto degree) {
            enum { D = 2 * decltype(degree)::value + 1 };
            const Vec<T> factor = Lanes<T>::all(scale[l]);
            over_channels<T>(C, [&](Index c, auto w) {
                Vec<T> rows[D];
                load_rows<T, D>(grad + l * l * C + c, C, rows, w);
                const Vec<T> by = load(weight + c, w);
                Vec<T> sum = load(by_channel + c, w);
                for (int k = 0; k < s.count[l]; ++k) {
                    T* v = value + Index(s.row[l][k]) * C + c;
                    const Vec<T> g = factor * dot<T, D>(wigner + s.at[l][k], rows);
                    sum = Lanes<T>::fma(g, load(v, w), sum);
                    store(v, g * by, w);
                }
                store(by_channel + c, sum, w);
            });
        });
}
