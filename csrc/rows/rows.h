// What a language model does row by row between its matrix products, on a CPU, by a plain C interface: no
// Python, no torch. The log-softmax of logits with its gradient, RMSNorm, the rotary embedding and SwiGLU:
// each a single pass over what lies in memory, in float32 whatever the arrays' type.
#pragma once
#include <cstdint>

#define ROWS_API extern "C" __attribute__((visibility("default")))

// Arrays are contiguous and row-major. `dtype`, of those that are void: 0 float32, 1 bfloat16, rounded to
// nearest even. All functions return null, or a message that says what is wrong. The instruction set is
// chosen as vector/level.h says; results do not depend on the number of threads.

// Of z = scale·logits [rows, words]: logprob[r] = log softmax(z[r])[target[r]], lse[r] = log sum exp z[r]
// and, unless null, entropy[r] of the softmax. `keep`: logits become (1 at the target, else 0) - softmax,
// what the gradient of logprob in z is. Targets are in [0, words).
ROWS_API const char* rows_log_softmax(int32_t dtype, int32_t threads, int64_t rows, int64_t words,
                                      float scale, const int64_t* target, void* logits, int32_t keep,
                                      float* logprob, float* lse, float* entropy);

// logits [rows, words], those of the words from `first` on, become the gradient of sum over r of
// grad[r]·logprob[r] + grad_entropy[r]·entropy[r] in the logits. grad_entropy may be null.
ROWS_API const char* rows_log_softmax_gradient(int32_t dtype, int32_t threads, int64_t rows, int64_t words,
                                               int64_t first, float scale, const int64_t* target,
                                               const float* lse, const float* entropy, const float* grad,
                                               const float* grad_entropy, void* logits);

// out = weight·x·inverse, inverse[r] = 1 / sqrt(mean of x[r]² + eps); x, out [rows, width], weight [width].
ROWS_API const char* rows_rms_norm(int32_t dtype, int32_t threads, int64_t rows, int64_t width, float eps,
                                   const void* x, const void* weight, void* out, float* inverse);
ROWS_API const char* rows_rms_norm_gradient(int32_t dtype, int32_t threads, int64_t rows, int64_t width,
                                            const void* x, const void* weight, const float* inverse,
                                            const void* grad, void* grad_x, float* grad_weight);

// out = x·cos + (-x2, x1)·sin of each head's two halves x1, x2; x, out [tokens, heads, width], cos, sin
// [tokens, width], width even. `transposed`: the same linear map's transpose, which is its gradient.
ROWS_API const char* rows_rotate(int32_t dtype, int32_t threads, int64_t tokens, int64_t heads, int64_t width,
                                 const void* x, const void* cos, const void* sin, int32_t transposed,
                                 void* out);

// out = silu(gate)·up, arrays of `count`.
ROWS_API const char* rows_swiglu(int32_t dtype, int32_t threads, int64_t count, const void* gate,
                                 const void* up, void* out);
ROWS_API const char* rows_swiglu_gradient(int32_t dtype, int32_t threads, int64_t count, const void* gate,
                                          const void* up, const void* grad, void* grad_gate, void* grad_up);
