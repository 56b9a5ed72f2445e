// Vectors of floats and doubles of one instruction set. Included inside a namespace of that set by a
// library's `kernels.h`, never on its own: VECTOR_LEVEL is 2 (AVX-512), 1 (AVX2 with FMA) or 0 (whatever the
// compiler makes of 16-byte vectors). Arithmetic is by the compilers' vector extension; what it lacks is
// here.

// The width of a whole vector, and of one that ends after n lanes.
struct Full {};
struct Part {
    int n;
};

template <class T>
struct Lanes;

#if VECTOR_LEVEL == 2

template <>
struct Lanes<float> {
    typedef __m512 Vec;
    enum { W = 16, TILE_ROWS = 12 };
    static Vec load(const float* p) { return _mm512_loadu_ps(p); }
    static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
    static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
    static void store(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
    static Vec all(float x) { return _mm512_set1_ps(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
    static Vec at_most(Vec a, Vec limit) { return _mm512_min_ps(limit, a); }  // a NaN stays
    static Vec at_least(Vec a, Vec limit) { return _mm512_max_ps(limit, a); }
    static Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vec scale(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }  // a·2^n, n whole
    // 1/a for 1 <= a < 1e38: an estimate of 14 bits and one step of Newton's method
    static Vec inverse(Vec a) {
        const Vec y = _mm512_rcp14_ps(a);
        return fma(y, fnma(a, y, all(1)), y);
    }
};

template <>
struct Lanes<double> {
    typedef __m512d Vec;
    enum { W = 8, TILE_ROWS = 12 };
    static Vec load(const double* p) { return _mm512_loadu_pd(p); }
    static Vec load(const double* p, int n) { return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
    static void store(double* p, Vec v) { _mm512_storeu_pd(p, v); }
    static void store(double* p, Vec v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
    static Vec all(double x) { return _mm512_set1_pd(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_pd(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_pd(a, b, c); }
    static Vec at_most(Vec a, Vec limit) { return _mm512_min_pd(limit, a); }
    static Vec at_least(Vec a, Vec limit) { return _mm512_max_pd(limit, a); }
    static Vec round(Vec a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vec scale(Vec a, Vec n) { return _mm512_scalef_pd(a, n); }
    static Vec inverse(Vec a) { return all(1) / a; }
};

#elif VECTOR_LEVEL == 1

template <>
struct Lanes<float> {
    typedef __m256 Vec;
    enum { W = 8, TILE_ROWS = 6 };
    static Vec load(const float* p) { return _mm256_loadu_ps(p); }
    static Vec load(const float* p, int n) {
        alignas(32) float a[W] = {};
        for (int i = 0; i < n; ++i) a[i] = p[i];
        return _mm256_load_ps(a);
    }
    static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
    static void store(float* p, Vec v, int n) {
        for (int i = 0; i < n; ++i) p[i] = v[i];
    }
    static Vec all(float x) { return _mm256_set1_ps(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
    static Vec at_most(Vec a, Vec limit) { return _mm256_min_ps(limit, a); }
    static Vec at_least(Vec a, Vec limit) { return _mm256_max_ps(limit, a); }
    static Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vec scale(Vec a, Vec n) {
        const __m256i bits =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return a * _mm256_castsi256_ps(bits);
    }
    static Vec inverse(Vec a) { return all(1) / a; }
};

template <>
struct Lanes<double> {
    typedef __m256d Vec;
    enum { W = 4, TILE_ROWS = 6 };
    static Vec load(const double* p) { return _mm256_loadu_pd(p); }
    static Vec load(const double* p, int n) {
        alignas(32) double a[W] = {};
        for (int i = 0; i < n; ++i) a[i] = p[i];
        return _mm256_load_pd(a);
    }
    static void store(double* p, Vec v) { _mm256_storeu_pd(p, v); }
    static void store(double* p, Vec v, int n) {
        for (int i = 0; i < n; ++i) p[i] = v[i];
    }
    static Vec all(double x) { return _mm256_set1_pd(x); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_pd(a, b, c); }
    static Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_pd(a, b, c); }
    static Vec at_most(Vec a, Vec limit) { return _mm256_min_pd(limit, a); }
    static Vec at_least(Vec a, Vec limit) { return _mm256_max_pd(limit, a); }
    static Vec round(Vec a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Vec scale(Vec a, Vec n) {
        const __m256i whole = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n));
        const __m256i bits = _mm256_slli_epi64(_mm256_add_epi64(whole, _mm256_set1_epi64x(1023)), 52);
        return a * _mm256_castsi256_pd(bits);
    }
    static Vec inverse(Vec a) { return all(1) / a; }
};

#else

template <class T, class Whole, int N, int BIAS, int MANTISSA>
struct Portable {
    typedef T Vec __attribute__((vector_size(N * sizeof(T))));
    enum { W = N, TILE_ROWS = 4 };
    static Vec load(const T* p) { return load(p, N); }
    static Vec load(const T* p, int n) {
        Vec v = {};
        for (int i = 0; i < n; ++i) v[i] = p[i];
        return v;
    }
    static void store(T* p, Vec v) { store(p, v, N); }
    static void store(T* p, Vec v, int n) {
        for (int i = 0; i < n; ++i) p[i] = v[i];
    }
    static Vec all(T x) { return Vec{} + x; }
    static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
    static Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
    static Vec at_most(Vec a, Vec limit) { return a > limit ? limit : a; }
    static Vec at_least(Vec a, Vec limit) { return a < limit ? limit : a; }
    static Vec round(Vec a) {
        for (int i = 0; i < N; ++i) a[i] = __builtin_nearbyint(a[i]);
        return a;
    }
    static Vec scale(Vec a, Vec n) {
        typedef Whole Bits __attribute__((vector_size(N * sizeof(T))));
        return a * reinterpret_cast<Vec>((__builtin_convertvector(n, Bits) + BIAS) << MANTISSA);
    }
    static Vec inverse(Vec a) { return T(1) / a; }
};

template <>
struct Lanes<float> : Portable<float, std::int32_t, 4, 127, 23> {};
template <>
struct Lanes<double> : Portable<double, std::int64_t, 2, 1023, 52> {};

#endif

template <class T>
using Vec = typename Lanes<T>::Vec;

// Calls f(first channel, width) for every vector of n channels; the last one may be narrower.
template <class T, class F>
inline void over_channels(int64_t n, F f) {
    enum { W = Lanes<T>::W };
    int64_t c = 0;
    for (; c + W <= n; c += W) f(c, Full());
    if (c < n) f(c, Part{int(n - c)});
}

template <class T>
inline Vec<T> load(const T* p, Full) {
    return Lanes<T>::load(p);
}
template <class T>
inline Vec<T> load(const T* p, Part w) {
    return Lanes<T>::load(p, w.n);
}
template <class T>
inline void store(T* p, Vec<T> v, Full) {
    Lanes<T>::store(p, v);
}
template <class T>
inline void store(T* p, Vec<T> v, Part w) {
    Lanes<T>::store(p, v, w.n);
}
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
    return Lanes<T>::fma(a, b, c);
}

// The lanes' sum, in one order on every machine with this width.
template <class T>
inline T sum_of(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < Lanes<T>::W; ++i) total += v[i];
    return total;
}

// The same in one instruction where there is one; its order of terms is another.
inline float whole(Vec<float> v) {
#if VECTOR_LEVEL == 2
    return _mm512_reduce_add_ps(v);
#else
    return sum_of<float>(v);
#endif
}
