// The logit of one edge and head: LayerNorm, SmoothLeakyReLU (0.2·y + 0.8·SiLU(y)), dot product. Included by
// `kernels.h` inside the namespace of an instruction set.

template <class T>
struct LogitWeights {
    const T *norm, *bias;  // [A], null without normalisation
    const T* dot;          // [heads, A]
    T eps;
};

template <class T>
void mean_and_scale(const T* a, int A, T eps, T& mean, T& scale) {
    Vec<T> sum = Lanes<T>::all(0);
    over_channels<T>(A, [&](Index c, auto w) { sum += load(a + c, w); });
    mean = sum_of<T>(sum) / A;
    T tail = 0;
    sum = Lanes<T>::all(0);
    const Vec<T> centre = Lanes<T>::all(mean);
    Index c = 0;
    for (; c + Lanes<T>::W <= A; c += Lanes<T>::W) {
        const Vec<T> d = load(a + c, Full()) - centre;
        sum = Lanes<T>::fma(d, d, sum);
    }
    for (; c < A; ++c) tail += (a[c] - mean) * (a[c] - mean);
    scale = T(1) / T(__builtin_sqrt((sum_of<T>(sum) + tail) / A + eps));
}

template <class T>
T logit(const T* a, int A, const LogitWeights<T>& p, const T* dot) {
    T mean = 0, scale = 1;
    if (p.norm) mean_and_scale(a, A, p.eps, mean, scale);
    Vec<T> sum = Lanes<T>::all(0);
    over_channels<T>(A, [&](Index c, auto w) {
        Vec<T> y = load(a + c, w);
        if (p.norm)
            y = Lanes<T>::fma((y - Lanes<T>::all(mean)) * Lanes<T>::all(scale), load(p.norm + c, w),
                              load(p.bias + c, w));
        sum = Lanes<T>::fma(y * (Lanes<T>::all(T(0.2)) + Lanes<T>::all(T(0.8)) * logistic<T>(y)), load(dot + c, w),
                            sum);
    });
    return sum_of<T>(sum);
}

// grad_a is written; grad_norm, grad_bias [A] and grad_dot [A] of this head are added to.
template <class T>
void logit_back(const T* a, int A, const LogitWeights<T>& p, const T* dot, T grad, T* grad_a, T* grad_norm,
                T* grad_bias, T* grad_dot) {
    T mean = 0, scale = 1;
    if (p.norm) mean_and_scale(a, A, p.eps, mean, scale);
    const Vec<T> g = Lanes<T>::all(grad);
    Vec<T> sum = Lanes<T>::all(0), moment = Lanes<T>::all(0);
    over_channels<T>(A, [&](Index c, auto w) {
        const Vec<T> centred = (load(a + c, w) - Lanes<T>::all(mean)) * Lanes<T>::all(scale);
        Vec<T> y = centred;
        if (p.norm) y = Lanes<T>::fma(centred, load(p.norm + c, w), load(p.bias + c, w));
        const Vec<T> u = y * (Lanes<T>::all(T(0.2)) + Lanes<T>::all(T(0.8)) * logistic<T>(y));
        store(grad_dot + c, Lanes<T>::fma(g, u, load(grad_dot + c, w)), w);
        Vec<T> d = g * load(dot + c, w) * (Lanes<T>::all(T(0.2)) + Lanes<T>::all(T(0.8)) * silu_slope<T>(y));
        if (p.norm) {
            store(grad_norm + c, Lanes<T>::fma(d, centred, load(grad_norm + c, w)), w);
            store(grad_bias + c, load(grad_bias + c, w) + d, w);
            d *= load(p.norm + c, w);
            sum += d;
            moment = Lanes<T>::fma(d, centred, moment);
        }
        store(grad_a + c, d, w);
    });
    if (!p.norm) return;
    const Vec<T> shift = Lanes<T>::all(sum_of<T>(sum) / A), slope = Lanes<T>::all(sum_of<T>(moment) / A);
    over_channels<T>(A, [&](Index c, auto w) {
        const Vec<T> centred = (load(a + c, w) - Lanes<T>::all(mean)) * Lanes<T>::all(scale);
        store(grad_a + c, (load(grad_a + c, w) - shift - centred * slope) * Lanes<T>::all(scale), w);
    });
}
