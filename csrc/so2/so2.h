// The attention messages of EquiformerV2 on a CPU, as one operation, by a plain C interface: no Python, no
// torch.
//
// For every edge: gather both ends, rotate into the edge's frame, scale by the radial weights, SO(2) product,
// activation on the sphere (or gates), SO(2) product, softmax attention over each target's edges, rotate
// back, sum. Blocks of a few dozen edges run through all of it inside a core's cache.
#pragma once
#include <cstdint>

#define SO2_API extern "C" __attribute__((visibility("default")))

enum { SO2_MAX_LMAX = 8 };

// Arrays are contiguous and row-major, of float (dtype 4) or double (dtype 8). S = (lmax+1)^2, n_m =
// lmax+1-m, half = sum n_m, M = 2*half - n_0 rows of an edge in m-primary order, V = heads*value. extra =
// heads*alpha + gates, gates = hidden (sphere) or lmax*hidden (gate). Edges are sorted by target. The packed
// Wigner matrices hold, degree by degree, the rows m = -min(l, mmax) ... min(l, mmax) over the 2l+1
// components of a node.
struct so2_message {
    int64_t nodes, edges;
    int32_t dtype, threads;
    int32_t lmax, mmax, channels, hidden, heads, alpha, value, radial;
    int32_t gate, latitudes, longitudes;  // gate: logistic gates per degree instead of the sphere grid
    double eps;                           // of the LayerNorm over alpha
    const void* x;                        // [nodes, S, channels]
    const void* edge;                     // [edges, radial], what the last layer of the radial function reads
    const int64_t *source, *target;       // [edges]
    const int64_t* first;                 // [nodes + 1] where each target's edges begin
    const int64_t *source_order,
        *source_first;              // [edges] edges by source, [nodes + 1]; for the backward pass
    const void* wigner;             // [edges, sum (2 min(l, mmax) + 1)(2l + 1)]
    const void* keep;               // [edges, heads] factors of the attention (dropout), or null
    const void *to_lat, *from_lat;  // [latitudes, half] the grid's factors of the rows m >= 0
    const void* lon;  // [longitudes, 2*mmax + 1]: 1, cos, sin, cos 2, sin 2, ...; equidistant from 0
    const void *radial_weight, *radial_bias;  // [2*channels*half, radial]
    const void *norm_weight, *norm_bias;      // [alpha] or null
    const void* alpha_dot;                    // [heads, alpha]
    const void* conv1[SO2_MAX_LMAX + 1];  // [out, in] of m = 0, extra first; [2*out, in] = (r; s) of m > 0
    const void* conv1_bias;               // [extra + n_0*hidden]
    const void* conv2[SO2_MAX_LMAX + 1];
    const void* conv2_bias;  // [n_0*V]
    void* total;             // [nodes, S, V]
    // what the backward pass reads again; null where none follows
    void* extra;           // [edges, extra]
    void *before, *after;  // [edges, M, hidden] around the activation
    void* attention;       // [edges, heads]
    // backward: grad_total in, the others out
    const void* grad_total;
    void *grad_x, *grad_edge;
    void *grad_radial_weight, *grad_radial_bias, *grad_norm_weight, *grad_norm_bias, *grad_alpha_dot;
    void *grad_conv1[SO2_MAX_LMAX + 1], *grad_conv1_bias;
    void *grad_conv2[SO2_MAX_LMAX + 1], *grad_conv2_bias;
};

// The last step alone: values [edges, rows, heads*value] times attention [edges, heads], turned back and
// summed over the edges of each target. rows is M, or lmax + 1 for m = 0 alone. The backward pass writes the
// last two.
struct so2_sum {
    int64_t nodes, edges;
    int32_t dtype, threads;
    int32_t lmax, mmax, rows, heads, value;
    const int64_t *target, *first;
    const void *wigner, *values, *attention;
    void* total;  // [nodes, S, heads*value]
    const void* grad_total;
    void *grad_values, *grad_attention;
};

// All return null, or a message that says what is wrong. The instruction set is chosen as vector/level.h
// says.
SO2_API const char* so2_forward(const so2_message*);
SO2_API const char* so2_backward(const so2_message*);
SO2_API const char* so2_sum_forward(const so2_sum*);
SO2_API const char* so2_sum_backward(const so2_sum*);
