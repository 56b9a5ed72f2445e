// The logit of one edge and head: LayerNorm, SmoothLeakyReLU (0.2·y + 0.8·SiLU(y)), dot product. Always in
// double: the softmax makes the gradient of `bias` a sum that cancels to a tenth of its terms, and 512 values
// an edge cost little beside 20,000 grid points. Included by `kernels.h` inside the namespace of an
// instruction set.

template <class T>
struct LogitWeights {
    const T *norm, *bias;  // [A], null without normalisation
    const T* dot;          // [heads, A]
    double eps;
};

inline Vec<double> wide(const double* p, Full) { return Lanes<double>::load(p); }
inline Vec<double> wide(const double* p, Part w) { return Lanes<double>::load(p, w.n); }
inline Vec<double> wide(const float* p, Part w) {
    double a[Lanes<double>::W] = {};
    for (int i = 0; i < w.n; ++i) a[i] = p[i];
    return Lanes<double>::load(a);
}
inline Vec<double> wide(const float* p, Full) { return wide(p, Part{Lanes<double>::W}); }
inline void narrow(double* p, Vec<double> v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
}
inline void narrow(float* p, Vec<double> v, int n) {
    for (int i = 0; i < n; ++i) p[i] = float(v[i]);
}
inline int lanes(Full) { return Lanes<double>::W; }
inline int lanes(Part w) { return w.n; }

template <class T>
void mean_and_scale(const T* a, int A, double eps, double& mean, double& scale) {
    using L = Lanes<double>;
    Vec<double> sum = L::all(0);
    over_channels<double>(A, [&](Index c, auto w) { sum += wide(a + c, w); });
    mean = sum_of<double>(sum) / A;
    double tail = 0;
    sum = L::all(0);
    const Vec<double> centre = L::all(mean);
    Index c = 0;
    for (; c + L::W <= A; c += L::W) {
        const Vec<double> d = wide(a + c, Full()) - centre;
        sum = L::fma(d, d, sum);
    }
    for (; c < A; ++c) tail += (a[c] - mean) * (a[c] - mean);
    scale = 1 / __builtin_sqrt((sum_of<double>(sum) + tail) / A + eps);
}

template <class T>
double logit(const T* a, int A, const LogitWeights<T>& p, const T* dot) {
    using L = Lanes<double>;
    double mean = 0, scale = 1;
    if (p.norm) mean_and_scale(a, A, p.eps, mean, scale);
    Vec<double> sum = L::all(0);
    over_channels<double>(A, [&](Index c, auto w) {
        Vec<double> y = wide(a + c, w);
        if (p.norm) y = L::fma((y - L::all(mean)) * L::all(scale), wide(p.norm + c, w), wide(p.bias + c, w));
        sum = L::fma(y * (L::all(0.2) + L::all(0.8) * logistic<double>(y)), wide(dot + c, w), sum);
    });
    return sum_of<double>(sum);
}

// grad_a is written; grad_norm, grad_bias [A] and grad_dot [A] of this head are added to. `scratch` [A] is
// for this call.
template <class T>
void logit_back(const T* a, int A, const LogitWeights<T>& p, const T* dot, double grad, T* grad_a,
                double* grad_norm, double* grad_bias, double* grad_dot, double* scratch) {
    using L = Lanes<double>;
    double mean = 0, scale = 1;
    if (p.norm) mean_and_scale(a, A, p.eps, mean, scale);
    const Vec<double> g = L::all(grad);
    Vec<double> sum = L::all(0), moment = L::all(0);
    over_channels<double>(A, [&](Index c, auto w) {
        const Vec<double> centred = (wide(a + c, w) - L::all(mean)) * L::all(scale);
        Vec<double> y = centred;
        if (p.norm) y = L::fma(centred, wide(p.norm + c, w), wide(p.bias + c, w));
        const Vec<double> u = y * (L::all(0.2) + L::all(0.8) * logistic<double>(y));
        store(grad_dot + c, L::fma(g, u, load(grad_dot + c, w)), w);
        Vec<double> d = g * wide(dot + c, w) * (L::all(0.2) + L::all(0.8) * silu_slope<double>(y));
        if (p.norm) {
            store(grad_norm + c, L::fma(d, centred, load(grad_norm + c, w)), w);
            store(grad_bias + c, load(grad_bias + c, w) + d, w);
            d *= wide(p.norm + c, w);
            sum += d;
            moment = L::fma(d, centred, moment);
        }
        store(scratch + c, d, w);
    });
    const double shift = p.norm ? sum_of<double>(sum) / A : 0,
                 slope = p.norm ? sum_of<double>(moment) / A : 0;
    over_channels<double>(A, [&](Index c, auto w) {
        const Vec<double> centred = (wide(a + c, w) - L::all(mean)) * L::all(scale);
        const Vec<double> d = load(scratch + c, w) - L::all(shift) - centred * L::all(slope);
        narrow(grad_a + c, d * L::all(scale), lanes(w));
    });
}
