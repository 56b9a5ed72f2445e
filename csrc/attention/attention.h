// Causal attention inside samples laid end to end, on a CPU, by a plain C interface: no Python, no torch.
//
// A sample may continue another one (its owner): its tokens then see all of the owner's tokens before their
// own. That is a prompt that several answers share.
#pragma once
#include <cstdint>

#define ATTENTION_API extern "C" __attribute__((visibility("default")))

// Arrays are contiguous, row-major floats: query, out [tokens, heads, width]; key, value [tokens, kv_heads,
// width], and their gradients alike. kv_heads divides heads. Samples that share an owner follow it directly.
struct attention_call {
    int64_t samples, groups;
    int32_t threads, heads, kv_heads, width;
    float scale;
    const int64_t* bounds;  // [samples + 1] where each sample begins
    const int64_t* group;   // [groups + 1] the first sample of each owner with those that continue it
    const int64_t* owned;   // [groups] whether the first sample is the prefix of the others
    const float *query, *key, *value;
    float* out;  // written by forward, read by backward
    const float* grad_out;
    float *grad_query, *grad_key, *grad_value;
};

// Answers that grow: each row has keys and values of its own tokens in a cache and sees those of its prompt,
// which rows that follow each other share. Caches are [rows or prompts, kv_heads, slots, width] floats;
// query, out [queries, heads, width], those of a row together: its newest tokens, whose keys are in the cache
// already.
struct attention_cached_call {
    int64_t rows, prompts, prompt_slots, own_slots;
    int32_t threads, heads, kv_heads, width;
    float scale;
    const int64_t* group;   // [prompts + 1] the first row of each prompt
    const int64_t* length;  // [prompts] tokens of each
    const int64_t* bounds;  // [rows + 1] where the queries of each row begin
    const int64_t* before;  // [rows] own tokens before the first query
    const float *query, *prompt_key, *prompt_value, *own_key, *own_value;
    float* out;
};

// All return null, or a message that says what is wrong. The instruction set is chosen as vector/level.h
// says.
ATTENTION_API const char* attention_forward(const attention_call*);
ATTENTION_API const char* attention_backward(const attention_call*);
ATTENTION_API const char* attention_cached(const attention_cached_call*);
