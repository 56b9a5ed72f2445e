// Rotate back and sum alone, for messages without products (the edge-degree embedding). Included by
// `kernels.h` inside the namespace of an instruction set.

template <class T>
struct SumSpace {
    T *weight, *channels;
    Share<T>* shares;
};

template <class T>
struct Sum {
    const so2_sum& p;
    const Rows rows;
    const Index width;
    T scale[SO2_MAX_LMAX + 1];
    vector::Memory memory;
    SumSpace<T>* spaces = nullptr;
    int threads;

    explicit Sum(const so2_sum& p)
        : p(p),
          rows(p.lmax, p.mmax, p.rows == p.lmax + 1),
          width(Index(p.heads) * p.value),
          memory(Index(p.threads > 0 ? p.threads : 1) *
                     (vector::Memory::size<T>(BLOCK * width) + vector::Memory::size<T>(width) +
                      vector::Memory::size<Share<T>>(BLOCK)) +
                 vector::Memory::size<SumSpace<T>>(p.threads > 0 ? p.threads : 1)),
          threads(p.threads > 0 ? p.threads : 1) {
        for (int l = 0; l <= p.lmax; ++l) scale[l] = T(__builtin_sqrt(rows.lost_square(l)));
        if (!memory) return;
        spaces = memory.take<SumSpace<T>>(threads);
        for (int i = 0; i < threads; ++i)
            spaces[i] = {memory.take<T>(BLOCK * width), memory.take<T>(width), memory.take<Share<T>>(BLOCK)};
    }
    void by_channel(Index e, T* weight) const {
        for (int h = 0; h < p.heads; ++h)
            for (int c = 0; c < p.value; ++c) weight[h * p.value + c] = of<T>(p.attention)[e * p.heads + h];
    }
    void forward(Index target, const SumSpace<T>& space) const {
        T* out = of<T>(p.total) + target * rows.S * width;
        const Index begin = p.first[target], end = p.first[target + 1];
        for (Index e = begin; e < end || e == begin; e += BLOCK) {
            const Index n = end - e < BLOCK ? end - e : Index(BLOCK);
            for (Index i = 0; i < n; ++i) {
                by_channel(e + i, space.weight + i * width);
                space.shares[i] = {of<T>(p.wigner) + (e + i) * rows.packed,
                                   of<T>(p.values) + (e + i) * p.rows * width, space.weight + i * width};
            }
            turn_back_and_sum(rows, space.shares, int(n), width, int(width), scale, out, e > begin);
        }
    }
    void backward(Index e, const SumSpace<T>& space) const {
        const T* value = of<T>(p.values) + e * p.rows * width;
        T *grad = of<T>(p.grad_values) + e * p.rows * width, *sums = space.channels;
        for (Index i = 0; i < p.rows * width; ++i) grad[i] = value[i];
        for (Index i = 0; i < width; ++i) sums[i] = 0;
        by_channel(e, space.weight);
        turn_gradient(rows, of<T>(p.grad_total) + p.target[e] * rows.S * width, int(width),
                      of<T>(p.wigner) + e * rows.packed, scale, space.weight, grad, sums);
        for (int h = 0; h < p.heads; ++h) {
            T total = 0;
            for (int c = 0; c < p.value; ++c) total += sums[h * p.value + c];
            of<T>(p.grad_attention)[e * p.heads + h] = total;
        }
    }
};

template <class T>
const char* sum_forward(const so2_sum& p) {
    Sum<T> s(p);
    if (!s.spaces) return "out of memory";
    vector::in_parallel(s.threads, p.nodes, [&](Index target, int me) { s.forward(target, s.spaces[me]); });
    return nullptr;
}

template <class T>
const char* sum_backward(const so2_sum& p) {
    Sum<T> s(p);
    if (!s.spaces) return "out of memory";
    const Index blocks = (p.edges + BLOCK - 1) / BLOCK;
    vector::in_parallel(s.threads, blocks, [&](Index block, int me) {
        for (Index e = block * BLOCK; e < p.edges && e < (block + 1) * BLOCK; ++e)
            s.backward(e, s.spaces[me]);
    });
    return nullptr;
}
