// The matrix product that the kernels use: C += A·B by register tiles of TILE_ROWS x 2 vectors, B packed in
// panels of two vectors' width. 233 GFLOP/s in float on one Zen 5 core, where MKL takes its AVX2 path and
// reaches 95; on an Emerald Rapids core tiles whose data are in the first-level cache reach 155 to 160, and
// MKL, by AVX-512, 130 to 150. Included by `kernels.h` inside the namespace of an instruction set.

template <class T>
constexpr int panel_width = 2 * Lanes<T>::W;
template <class T>
constexpr int tile_rows = Lanes<T>::TILE_ROWS;

// Terms that are summed in one run before they are added to what there is: in float, runs of 1280 had three
// times the error of runs of 256, and those a quarter more than runs of 64 in what the attention reads.
enum { RUN = 64 };

// c[i, 0:panel] = init[i, 0:panel] ± sum_k a(i, k)·b[k, 0:panel]. a(i, k) is a[i·step + k], or a[k·step + i]
// if DOWN.
template <class T, int ROWS, bool DOWN, bool MINUS>
void tile(const T* a, Index step, const T* b, Index depth, const T* init, Index init_step, T* c,
          Index c_step) {
    using L = Lanes<T>;
    enum { W = L::W };
    Vec<T> sum[ROWS][2];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 2; ++j) sum[i][j] = L::all(0);
    for (Index k = 0; k < depth; ++k, b += 2 * W) {
        // Lines of the next run, which comes from the third-level cache.
        for (int at = 0; at < 2 * W; at += 64 / int(sizeof(T))) __builtin_prefetch(b + RUN * 2 * W + at);
        const Vec<T> left = L::load(b), right = L::load(b + W);
        for (int i = 0; i < ROWS; ++i) {
            const Vec<T> x = L::all(DOWN ? a[k * step + i] : a[i * step + k]);
            sum[i][0] = L::fma(x, left, sum[i][0]);
            sum[i][1] = L::fma(x, right, sum[i][1]);
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 2; ++j) {
            const Vec<T> before = L::load(init + i * init_step + j * W);
            L::store(c + i * c_step + j * W, MINUS ? before - sum[i][j] : before + sum[i][j]);
        }
}

template <class T>
using Tile = void (*)(const T*, Index, const T*, Index, const T*, Index, T*, Index);

template <class T, bool DOWN, bool MINUS>
Tile<T> tile_of(int rows) {
    switch (rows) {
        case 1:
            return tile<T, 1, DOWN, MINUS>;
        case 2:
            return tile<T, 2, DOWN, MINUS>;
        case 3:
            return tile<T, 3, DOWN, MINUS>;
        case 4:
            return tile<T, 4, DOWN, MINUS>;
#if VECTOR_LEVEL >= 1
        case 5:
            return tile<T, 5, DOWN, MINUS>;
        case 6:
            return tile<T, 6, DOWN, MINUS>;
#endif
#if VECTOR_LEVEL == 2
        case 7:
            return tile<T, 7, DOWN, MINUS>;
        case 8:
            return tile<T, 8, DOWN, MINUS>;
        case 9:
            return tile<T, 9, DOWN, MINUS>;
        case 10:
            return tile<T, 10, DOWN, MINUS>;
        case 11:
            return tile<T, 11, DOWN, MINUS>;
        case 12:
            return tile<T, 12, DOWN, MINUS>;
#endif
    }
    return nullptr;
}

// One tile whose panel may be cut at `width` columns; init null is zero, init_step 0 one row for all.
template <class T, bool DOWN, bool MINUS>
void cut_tile(int rows, const T* a, Index step, const T* b, Index depth, const T* init, Index init_step, T* c,
              Index c_step, Index width) {
    alignas(64) static const T zeros[panel_width<T>] = {};
    const Tile<T> tile = tile_of<T, DOWN, MINUS>(rows);
    const auto run = [&](const T* from, Index from_step, T* to, Index to_step) {
        for (Index k = 0; k < depth; k += RUN, from = to, from_step = to_step)
            tile(a + (DOWN ? k * step : k), step, b + k * panel_width<T>,
                 depth - k < RUN ? depth - k : Index(RUN), from, from_step, to, to_step);
    };
    if (width >= panel_width<T>) {
        run(init ? init : zeros, init ? init_step : 0, c, c_step);
        return;
    }
    alignas(64) T part[tile_rows<T> * panel_width<T>] = {};
    if (init)
        for (int i = 0; i < rows; ++i)
            for (Index j = 0; j < width; ++j) part[i * panel_width<T> + j] = init[i * init_step + j];
    run(part, panel_width<T>, part, panel_width<T>);
    for (int i = 0; i < rows; ++i)
        for (Index j = 0; j < width; ++j) c[i * c_step + j] = part[i * panel_width<T> + j];
}

// One panel of c [rows, ...], the rows cut into tiles of nearly equal height. A run of the panel (8 KiB)
// stays in the first-level cache while all tiles pass by; the whole panel, which they would read in turn
// otherwise, does not.
template <class T, bool MINUS = false>
void panel_product(Index rows, const T* a, Index step, const T* b, Index depth, const T* init,
                   Index init_step, T* c, Index c_step, Index width) {
    alignas(64) static const T zeros[panel_width<T>] = {};
    const Index tiles = (rows + tile_rows<T> - 1) / tile_rows<T>;
    const auto each = [&](auto call) {
        for (Index t = 0, i = 0; t < tiles; ++t) {
            const int height = int(rows / tiles + (t < rows % tiles));
            call(height, i);
            i += height;
        }
    };
    if (width < panel_width<T>) {
        each([&](int height, Index i) {
            cut_tile<T, false, MINUS>(height, a + i * step, step, b, depth,
                                      init ? init + i * init_step : nullptr, init_step, c + i * c_step,
                                      c_step, width);
        });
        return;
    }
    const T* from = init ? init : zeros;
    Index from_step = init ? init_step : 0;
    for (Index k = 0; k < depth; k += RUN, from = c, from_step = c_step)
        each([&](int height, Index i) {
            tile_of<T, false, MINUS>(height)(a + i * step + k, step, b + k * panel_width<T>,
                                             depth - k < RUN ? depth - k : Index(RUN), from + i * from_step,
                                             from_step, c + i * c_step, c_step);
        });
}

// c [rows, columns] = init + a [rows, depth]·B, B packed.
template <class T>
void product(Index rows, const T* a, Index step, const T* packed, Index depth, const T* init, Index init_step,
             T* c, Index c_step, Index columns) {
    for (Index j = 0; j < columns; j += panel_width<T>)
        panel_product(rows, a, step, packed + j * depth, depth, init ? init + j : nullptr, init_step, c + j,
                      c_step, columns - j);
}

// (y₊, y₋) = (x₊·R - x₋·S, x₋·R + x₊·S): the complex product of an order m > 0. B = (R; S) packed with depth
// 2·depth. BACK, its transpose: (x₊, x₋) = (y₊·Rᵀ + y₋·Sᵀ, y₋·Rᵀ - y₊·Sᵀ); depth is the width of y, packed
// holds (Rᵀ; Sᵀ).
template <class T, bool BACK = false>
void complex_product(Index rows, const T* plus, const T* minus, Index step, const T* packed, Index depth,
                     T* out_plus, T* out_minus, Index out_step, Index columns) {
    for (Index j = 0; j < columns; j += panel_width<T>) {
        const T *r = packed + j * 2 * depth, *s = r + depth * panel_width<T>;
        T *p = out_plus + j, *m = out_minus + j;
        const Index w = columns - j;
        panel_product<T, false>(rows, plus, step, r, depth, nullptr, 0, p, out_step, w);
        panel_product<T, !BACK>(rows, minus, step, s, depth, p, out_step, p, out_step, w);
        panel_product<T, false>(rows, minus, step, r, depth, nullptr, 0, m, out_step, w);
        panel_product<T, BACK>(rows, plus, step, s, depth, m, out_step, m, out_step, w);
    }
}

template <class T>
constexpr Index packed_size(Index depth, Index columns) {
    return (columns + panel_width<T> - 1) / panel_width<T> * panel_width<T> * depth;
}

// One panel of B[k, j] = weight[j·step + k] (the layout of nn.Linear) to packed [depth, panel], zeros beyond
// `width`.
template <class T>
void pack_transposed(const T* weight, Index step, Index depth, Index width, T* packed) {
    enum { P = panel_width<T>, BLOCK = 16 };
    for (Index k0 = 0; k0 < depth; k0 += BLOCK) {
        const Index end = k0 + BLOCK < depth ? k0 + BLOCK : depth;
        for (Index j = 0; j < P; ++j)
            for (Index k = k0; k < end; ++k) packed[k * P + j] = j < width ? weight[j * step + k] : T(0);
    }
}

// One panel of B[k, j] = matrix[k·step + j].
template <class T>
void pack(const T* matrix, Index step, Index depth, Index width, T* packed) {
    enum { P = panel_width<T> };
    for (Index k = 0; k < depth; ++k, matrix += step, packed += P) {
        if (width >= P) {
            Lanes<T>::store(packed, Lanes<T>::load(matrix));
            Lanes<T>::store(packed + P / 2, Lanes<T>::load(matrix + P / 2));
        } else {
            for (Index j = 0; j < P; ++j) packed[j] = j < width ? matrix[j] : T(0);
        }
    }
}

// Rows of y [rows, columns] as the left side of a product over rows: tiles [columns /
// TILE_ROWS][depth][TILE_ROWS], of which rows k0 ... are filled.
template <class T>
void pack_left(const T* y, Index step, Index rows, Index columns, Index depth, Index k0, T* tiles) {
    enum { R = tile_rows<T> };
    for (Index i = 0; i < rows; ++i, y += step)
        for (Index o = 0; o < columns; o += R) {
            T* to = tiles + o * depth + (k0 + i) * R;
            const int n = columns - o < R ? int(columns - o) : int(R);
            if (n == R)
                for (int j = 0; j < R; ++j) to[j] = y[o + j];
            else
                for (int j = 0; j < R; ++j) to[j] = j < n ? y[o + j] : T(0);
        }
}
template <class T>
constexpr Index left_size(Index depth, Index columns) {
    return (columns + tile_rows<T> - 1) / tile_rows<T> * tile_rows<T> * depth;
}
