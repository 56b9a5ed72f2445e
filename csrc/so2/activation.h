// The nonlinearity between the two SO(2) products: SiLU on a grid of the sphere, or gates.
//
// The grid is a product of latitudes and equidistant longitudes, so the way there has two stages, rows ->
// 2·mmax+1 Fourier coefficients of a latitude -> points; the points at ±longitude share their cosines and
// sines. 324 points of 19 rows cost 9 operations a point beside SiLU, instead of 38. Nothing but a latitude's
// coefficients is ever stored. Included by `kernels.h` inside the namespace of an instruction set.

enum { MOST_ROWS = (SO2_MAX_LMAX + 1) * (SO2_MAX_LMAX + 1) };

template <class T>
struct Grid {
    int latitudes, longitudes;
    const T *to, *from;  // [latitudes, half]
    const T* lon;        // [longitudes, 2·mmax + 1]
};

// Fourier coefficients of a function, or of its gradient, along one latitude.
template <class T, int M>
struct Circle {
    Vec<T> constant, even[M + 1], odd[M + 1];  // 1 ... M are used

    void clear() {
        constant = Lanes<T>::all(0);
        for (int m = 1; m <= M; ++m) even[m] = odd[m] = constant;
    }
    void gather(const Sizes& s, const T* latitude, const Vec<T>* rows) {
        clear();
        for (int l = 0; l < s.n[0]; ++l)
            constant = Lanes<T>::fma(Lanes<T>::all(latitude[l]), rows[l], constant);
        for (int m = 1; m <= M; ++m)
            for (int i = 0; i < s.n[m]; ++i) {
                const Vec<T> a = Lanes<T>::all(latitude[s.plus[m] + i]);
                even[m] = Lanes<T>::fma(a, rows[s.first[m] + i], even[m]);
                odd[m] = Lanes<T>::fma(a, rows[s.first[m] + s.n[m] + i], odd[m]);
            }
    }
    void scatter(const Sizes& s, const T* latitude, Vec<T>* rows) const {
        for (int l = 0; l < s.n[0]; ++l)
            rows[l] = Lanes<T>::fma(Lanes<T>::all(latitude[l]), constant, rows[l]);
        for (int m = 1; m <= M; ++m)
            for (int i = 0; i < s.n[m]; ++i) {
                const Vec<T> a = Lanes<T>::all(latitude[s.plus[m] + i]);
                Vec<T>*plus = rows + s.first[m] + i, *minus = plus + s.n[m];
                *plus = Lanes<T>::fma(a, even[m], *plus);
                *minus = Lanes<T>::fma(a, odd[m], *minus);
            }
    }
    Vec<T> even_at(const T* lon) const {
        Vec<T> y = constant;
        for (int m = 1; m <= M; ++m) y = Lanes<T>::fma(Lanes<T>::all(lon[2 * m - 1]), even[m], y);
        return y;
    }
    Vec<T> odd_at(const T* lon) const {
        Vec<T> y = Lanes<T>::all(0);
        for (int m = 1; m <= M; ++m) y = Lanes<T>::fma(Lanes<T>::all(lon[2 * m]), odd[m], y);
        return y;
    }
    void add(const T* lon, Vec<T> total, Vec<T> difference) {
        constant += total;
        for (int m = 1; m <= M; ++m) {
            even[m] = Lanes<T>::fma(Lanes<T>::all(lon[2 * m - 1]), total, even[m]);
            odd[m] = Lanes<T>::fma(Lanes<T>::all(lon[2 * m]), difference, odd[m]);
        }
    }
};

// rows, out: [M, H] of one edge; gates [H] gives the row l = 0.
template <class T, int M>
void sphere_silu(const Sizes& s, const Grid<T>& grid, const T* gates, const T* rows, T* out) {
    const int H = s.H;
    over_channels<T>(H, [&](Index c, auto w) {
        Vec<T> in[MOST_ROWS], sum[MOST_ROWS];
        for (int r = 0; r < s.M; ++r) {
            in[r] = load(rows + r * H + c, w);
            sum[r] = Lanes<T>::all(0);
        }
        for (int j = 0; j < grid.latitudes; ++j) {
            Circle<T, M> f, g;
            f.gather(s, grid.to + j * s.half, in);
            g.clear();
            const T* lon = grid.lon;
            for (int n = 0; 2 * n <= grid.longitudes; ++n, lon += 2 * M + 1) {
                const Vec<T> even = f.even_at(lon), odd = f.odd_at(lon);
                if (n == 0 || 2 * n == grid.longitudes) {  // its own mirror
                    g.add(lon, silu<T>(even + odd), Lanes<T>::all(0));
                } else {
                    const Vec<T> left = silu<T>(even + odd), right = silu<T>(even - odd);
                    g.add(lon, left + right, left - right);
                }
            }
            g.scatter(s, grid.from + j * s.half, sum);
        }
        store(out + c, silu<T>(load(gates + c, w)), w);
        for (int r = 1; r < s.M; ++r) store(out + r * H + c, sum[r], w);
    });
}

// grad: of `out` on entry, of `rows` on return; grad_gates is written.
template <class T, int M>
void sphere_silu_back(const Sizes& s, const Grid<T>& grid, const T* gates, const T* rows, const T* grad,
                      T* grad_rows, T* grad_gates) {
    const int H = s.H;
    over_channels<T>(H, [&](Index c, auto w) {
        Vec<T> in[MOST_ROWS], from[MOST_ROWS], sum[MOST_ROWS];
        for (int r = 0; r < s.M; ++r) {
            in[r] = load(rows + r * H + c, w);
            from[r] = load(grad + r * H + c, w);
            sum[r] = Lanes<T>::all(0);
        }
        store(grad_gates + c, from[0] * silu_slope<T>(load(gates + c, w)), w);
        from[0] = Lanes<T>::all(0);
        for (int j = 0; j < grid.latitudes; ++j) {
            Circle<T, M> f, g, h;
            f.gather(s, grid.to + j * s.half, in);
            g.gather(s, grid.from + j * s.half, from);
            h.clear();
            const T* lon = grid.lon;
            for (int n = 0; 2 * n <= grid.longitudes; ++n, lon += 2 * M + 1) {
                const Vec<T> even = f.even_at(lon), odd = f.odd_at(lon);
                const Vec<T> up = g.even_at(lon), down = g.odd_at(lon);
                const Vec<T> left = (up + down) * silu_slope<T>(even + odd);
                if (n == 0 || 2 * n == grid.longitudes) {
                    h.add(lon, left, Lanes<T>::all(0));
                } else {
                    const Vec<T> right = (up - down) * silu_slope<T>(even - odd);
                    h.add(lon, left + right, left - right);
                }
            }
            h.scatter(s, grid.to + j * s.half, sum);
        }
        for (int r = 0; r < s.M; ++r) store(grad_rows + r * H + c, sum[r], w);
    });
}

// Row l = 0 times its own logistic, the rows of l > 0 times that of gates[l - 1].
template <class T>
void gate(const Sizes& s, const T* gates, const T* rows, T* out) {
    const int H = s.H;
    over_channels<T>(H, [&](Index c, auto w) {
        for (int l = 0; l <= s.lmax; ++l) {
            const Vec<T> g = logistic<T>(load(l == 0 ? rows + c : gates + (l - 1) * H + c, w));
            for (int k = 0; k < s.count[l]; ++k) {
                const Index at = Index(s.row[l][k]) * H + c;
                store(out + at, g * load(rows + at, w), w);
            }
        }
    });
}

template <class T>
void gate_back(const Sizes& s, const T* gates, const T* rows, const T* grad, T* grad_rows, T* grad_gates) {
    const int H = s.H;
    over_channels<T>(H, [&](Index c, auto w) {
        const Vec<T> x = load(rows + c, w);
        store(grad_rows + c, load(grad + c, w) * silu_slope<T>(x), w);
        for (int l = 1; l <= s.lmax; ++l) {
            const Vec<T> g = logistic<T>(load(gates + (l - 1) * H + c, w));
            Vec<T> sum = Lanes<T>::all(0);
            for (int k = 0; k < s.count[l]; ++k) {
                const Index at = Index(s.row[l][k]) * H + c;
                const Vec<T> from = load(grad + at, w);
                sum = Lanes<T>::fma(from, load(rows + at, w), sum);
                store(grad_rows + at, from * g, w);
            }
            store(grad_gates + (l - 1) * H + c, sum * g * (Lanes<T>::all(1) - g), w);
        }
    });
}
