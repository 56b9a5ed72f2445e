// exp, the logistic function and SiLU on vectors. Included behind lanes.h.

template <class T>
struct Exponential;
template <>
struct Exponential<float> {  // Chebyshev interpolation on ±ln2/2, relative error 3e-9 before rounding
    static constexpr float high = 0.693359375f, low = -2.12194440e-4f, least = -87, most = 80;
    static constexpr float factors[] = {0.0013948593f, 0.0083751373f, 0.041666218f, 0.16666415f,
                                        0.50000001f,   1.0f,          1.0f};
};
template <>
struct Exponential<double> {  // 1/k!, relative error 4e-18
    static constexpr double high = 0x1.62e42feep-1, low = 0x1.a39ef35793c76p-33, least = -708, most = 700;
    static constexpr double factors[] = {1 / 6227020800.0,
                                         1 / 479001600.0,
                                         1 / 39916800.0,
                                         1 / 3628800.0,
                                         1 / 362880.0,
                                         1 / 40320.0,
                                         1 / 5040.0,
                                         1 / 720.0,
                                         1 / 120.0,
                                         1 / 24.0,
                                         1 / 6.0,
                                         0.5,
                                         1.0,
                                         1.0};
};

// exp(x), x first cut to a range in which neither x nor 1 + exp(x) over- or underflows; a NaN stays one.
template <class T>
inline Vec<T> exponential(Vec<T> x) {
    using L = Lanes<T>;
    using E = Exponential<T>;
    x = L::at_least(L::at_most(x, L::all(E::most)), L::all(E::least));
    const Vec<T> n = L::round(x * L::all(T(1.4426950408889634)));
    const Vec<T> r = L::fnma(n, L::all(E::low), L::fnma(n, L::all(E::high), x));
    Vec<T> y = L::all(E::factors[0]);
    for (unsigned i = 1; i < sizeof(E::factors) / sizeof(T); ++i) y = L::fma(y, r, L::all(E::factors[i]));
    return L::scale(y, n);
}

template <class T>
inline Vec<T> logistic(Vec<T> x) {
    return Lanes<T>::inverse(exponential<T>(-x) + Lanes<T>::all(1));
}

template <class T>
inline Vec<T> silu(Vec<T> x) {
    return x * logistic<T>(x);
}

template <class T>
inline Vec<T> silu_slope(Vec<T> x) {
    const Vec<T> s = logistic<T>(x);
    return s * Lanes<T>::fma(x, Lanes<T>::all(1) - s, Lanes<T>::all(1));
}
