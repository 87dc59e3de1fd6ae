// All heads of new tokens, as the product of query, key and value gives them.
#pragma once
#include <type_traits>

#include "attention.h"
#include "attention_bf16.h"
#include "attention_int8.h"

namespace {

// One head as the product gives it, normed where there is a weight, and turned.
template <class T, int W>
void head(const T* from, const T* weight, float eps, const T* cos, const T* sin, T* to) {
    T held[W];
    if (weight) {
        Vec sum{};
        for (int i = 0; i < W; i += L) sum += load(from + i) * load(from + i);
        float scale = 1.0f / std::sqrt(sum_of(sum) / float(W) + eps);
        for (int i = 0; i < W; i += L) store(held + i, rounded<T>(load(from + i) * scale) * load(weight + i));
        from = held;
    }
    turn_head(from, cos, sin, to, W);
}

// Rows whose slots are equally wide, [slots, key heads, slot, W], in the order in which they lie.
struct Pool {
    int64_t rows, slot;
    const int64_t* past;  // where each row's new key stands
};

// All heads of a pool's rows, shared among the threads that are here; nobody waits for the others. `group` queries look at one key head.
template <class T, class C, int W>
void attend(const Pool& pool, const T* joined, const T* cos, const T* sin, const T* query_norm, const T* key_norm, float eps, C* keys,
            C* values, T* out, int64_t key_heads, int64_t group, int64_t window, float scale, float* scores) {
    Vec query[MOST_GROUPED * W / L];
    constexpr int64_t pitch = PITCH_OF<C, W>;
    const int64_t apart = pool.slot * pitch, heads = pool.rows * key_heads, team = omp_get_num_threads();
#pragma omp for schedule(static, 1) nowait
    for (int64_t number = 0; number < heads; number++) {  // in turn, so that a thread knows which keys it reads next
        const int64_t row = number / key_heads, k = number % key_heads;
        const T *from = joined + row * (group + 2) * key_heads * W, *c = cos + row * W, *s = sin + row * W;
        const int64_t at = pool.past[row], low = window ? std::max<int64_t>(0, at + 1 - window) : 0;
        C *own_keys = keys + number * apart, *own_values = values + number * apart;
        T turned[W];
        for (int64_t g = 0; g < group; g++) {
            head<T, W>(from + (k * group + g) * W, query_norm, eps, c, s, turned);
            for (int i = 0; i < W / L; i++) query[g * W / L + i] = load(turned + i * L);
        }
        head<T, W>(from + (group * key_heads + k) * W, key_norm, eps, c, s, turned);
        keep<T, W>(turned, own_keys + at * pitch);
        keep<T, W>(from + ((group + 1) * key_heads + k) * W, own_values + at * pitch);
        const C* next = number + team < heads ? own_keys + team * apart : own_keys;
        auto* way = look<T, C, W>;
#ifdef WHOLE_NUMBERS
        if constexpr (SMALL_OF<C> && W % SIDE == 0) way = look16<T, W>;
#endif
#ifdef PAIRED_ATTENTION
        if constexpr (std::is_same_v<C, bf16> && W % PAIRED == 0) way = look_pairs<W>;
#endif
        way(query, group, own_keys + low * pitch, own_values + low * pitch, at + 1 - low, scale, scores, out + number * group * W,
            next + low * pitch);
    }
}

}  // namespace
