#include "rows.h"

#include "table.h"

using namespace catmllm::rows;

const char* rows_log_softmax(int32_t dtype, int32_t threads, int64_t rows, int64_t words, float scale,
                             const int64_t* target, void* logits, int32_t keep, float* logprob, float* lse,
                             float* entropy) {
    return chosen().log_softmax(dtype, threads, rows, words, scale, target, logits, keep, logprob, lse,
                                entropy);
}

const char* rows_log_softmax_gradient(int32_t dtype, int32_t threads, int64_t rows, int64_t words,
                                      int64_t first, float scale, const int64_t* target, const float* lse,
                                      const float* entropy, const float* grad, const float* grad_entropy,
                                      void* logits) {
    return chosen().log_softmax_gradient(dtype, threads, rows, words, first, scale, target, lse, entropy,
                                         grad, grad_entropy, logits);
}

const char* rows_rms_norm(int32_t dtype, int32_t threads, int64_t rows, int64_t width, float eps,
                          const void* x, const void* weight, void* out, float* inverse) {
    return chosen().rms_norm(dtype, threads, rows, width, eps, x, weight, out, inverse);
}

const char* rows_rms_norm_gradient(int32_t dtype, int32_t threads, int64_t rows, int64_t width, const void* x,
                                   const void* weight, const float* inverse, const void* grad, void* grad_x,
                                   float* grad_weight) {
    return chosen().rms_norm_gradient(dtype, threads, rows, width, x, weight, inverse, grad, grad_x,
                                      grad_weight);
}

const char* rows_rotate(int32_t dtype, int32_t threads, int64_t tokens, int64_t heads, int64_t width,
                        const void* x, const void* cos, const void* sin, int32_t transposed, void* out) {
    if (width % 2) return "the rotary embedding turns pairs: width must be even";
    return chosen().rotate(dtype, threads, tokens, heads, width, x, cos, sin, transposed, out);
}

const char* rows_swiglu(int32_t dtype, int32_t threads, int64_t count, const void* gate, const void* up,
                        void* out) {
    return chosen().swiglu(dtype, threads, count, gate, up, out);
}

const char* rows_swiglu_gradient(int32_t dtype, int32_t threads, int64_t count, const void* gate,
                                 const void* up, const void* grad, void* grad_gate, void* grad_up) {
    return chosen().swiglu_gradient(dtype, threads, count, gate, up, grad, grad_gate, grad_up);
}
