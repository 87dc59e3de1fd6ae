// Attention of single new tokens over the keys and values of their rows, which cached.py keeps.
#pragma once
#include "vectors.h"

namespace {

constexpr int64_t MOST_GROUPED = 64;  // query heads on one key head

// Sixteen sums of sixteen numbers each, in order.
template <class V>
inline V sums_of(V (&v)[L]) {
    for (int i = 0; i < L; i += 2)
        v[i / 2] = __builtin_shufflevector(v[i], v[i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   __builtin_shufflevector(v[i], v[i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < L / 2; i += 2)
        v[i / 2] = __builtin_shufflevector(v[i], v[i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                   __builtin_shufflevector(v[i], v[i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    for (int i = 0; i < L / 4; i += 2)
        v[i / 2] = __builtin_shufflevector(v[i], v[i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                   __builtin_shufflevector(v[i], v[i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return __builtin_shufflevector(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// A key or value of one head as the cache keeps it: W numbers of C, and of 8 bits their step (fp32) behind them.
template <class C, int W>
constexpr int64_t PITCH_OF = W + (sizeof(C) == 1 ? sizeof(float) : 0);

// Whether numbers are held in 8 bits.
template <class C>
constexpr bool SMALL_OF = sizeof(C) == 1;

template <class T, int W>
inline void keep(const T* from, T* to) {
    std::memcpy(to, from, W * sizeof(T));
}

template <class T, int W>
inline void keep(const T* from, int8_t* to) {
    const float step = quantise_row(from, to, W, 0);
    std::memcpy(to + W, &step, sizeof(step));
}

// The steps of `count` rows in 8 bits, at most sixteen.
template <int W>
inline Vec steps_of(const int8_t* rows, int64_t count) {
    constexpr int pitch = PITCH_OF<int8_t, W>;
#ifdef __AVX512F__
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __mmask16 some = __mmask16((1u << count) - 1);
    return as<Vec>(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, as<__m512i>(lane * pitch), rows + W, 1));
#else
    float steps[L] = {};
    for (int64_t i = 0; i < count; i++) std::memcpy(steps + i, rows + i * pitch + W, sizeof(float));
    return load(steps);
#endif
}

// Thirty-two numbers that unpacking pairs of 16 bits has put, four of each eight, into one vector and the other.
template <class T>
inline void store_unpacked(T* to, Vec low, Vec high) {
    store(to, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
    store(to + L, __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
}

// A row to be read soon.
template <class C, int W>
inline void ask_row(const C* at) {
    constexpr int64_t size = PITCH_OF<C, W> * sizeof(C);
    for (int64_t byte = 0; byte < size; byte += 64) ask(reinterpret_cast<const char*>(at) + byte);
}

// The weighted sum of values for N queries; `next` [seen] rows are read after them.
template <class T, class C, int W, int N>
void gather(const float* weights, int64_t stride, const C* values, int64_t seen, const float* times, T* out, const C* next) {
    constexpr int parts = W / L;
    Vec total[N][parts] = {};
    for (int64_t t = 0; t < seen; t++) {
        ask_row<C, W>(next + t * PITCH_OF<C, W>);
        for (int i = 0; i < parts; i++) {
            Vec value = load(values + t * PITCH_OF<C, W> + i * L);
            for (int g = 0; g < N; g++) total[g][i] += value * weights[g * stride + t];
        }
    }
    for (int g = 0; g < N; g++)
        for (int i = 0; i < parts; i++) store(out + g * W + i * L, total[g][i] * times[g]);
}

// Softmax of `seen` scores, in place, without its division: 1 / sum is returned. What fills the last vector becomes 0.
inline float soften(float* weight, int64_t seen) {
    const int64_t stride = (seen + L - 1) / L * L;
    for (int64_t t = seen; t < stride; t++) weight[t] = -std::numeric_limits<float>::infinity();
    Vec most = load(weight), sum{};
    for (int64_t t = L; t < stride; t += L) {
        Vec next = load(weight + t);
        most = next > most ? next : most;
    }
    const float top = most_of(most);
    for (int64_t t = 0; t < stride; t += L) {
        Vec share = exponential(load(weight + t) - top);
        store(weight + t, share);
        sum += share;
    }
    return 1.0f / sum_of(sum);
}

// One row's new token and one key head: its queries [group, W] over `seen` keys. `scores` has room for MOST_GROUPED * (seen + 16) numbers.
// `next` are the keys that follow.
template <class T, class C, int W>
void look(const Vec* query, int64_t group, const C* keys, const C* values, int64_t seen, float scale, float* scores, T* out, const C* next) {
    constexpr int parts = W / L;
    constexpr int64_t pitch = PITCH_OF<C, W>;
    const int64_t stride = (seen + L - 1) / L * L;
    Vec block[L][parts];
    for (int64_t t = 0; t < seen; t += L) {
        int64_t count = std::min<int64_t>(L, seen - t);
        for (int64_t k = 0; k < count; k++) ask_row<C, W>(values + (t + k) * pitch);
        for (int64_t k = 0; k < L; k++)
            for (int i = 0; i < parts; i++) block[k][i] = k < count ? load(keys + (t + k) * pitch + i * L) : Vec{};
        Vec times = all(scale);
        if constexpr (SMALL_OF<C>) times *= steps_of<W>(keys + t * pitch, count);
        for (int64_t g = 0; g < group; g++) {
            Vec sums[L];
            for (int k = 0; k < L; k++) {
                sums[k] = query[g * parts] * block[k][0];
                for (int i = 1; i < parts; i++) sums[k] += query[g * parts + i] * block[k][i];
            }
            store(scores + g * stride + t, sums_of(sums) * times);
        }
    }
    float times[MOST_GROUPED];
    for (int64_t g = 0; g < group; g++) {
        float* weight = scores + g * stride;
        times[g] = soften(weight, seen);
        if constexpr (SMALL_OF<C>)
            for (int64_t t = 0; t < seen; t += L)
                store(weight + t, load(weight + t) * steps_of<W>(values + t * pitch, std::min<int64_t>(L, seen - t)));
    }
    int64_t g = 0;  // the totals of some queries at a time stay in registers
    for (; g + 4 <= group; g += 4) gather<T, C, W, 4>(scores + g * stride, stride, values, seen, times + g, out + g * W, next);
    if (group - g == 3) gather<T, C, W, 3>(scores + g * stride, stride, values, seen, times + g, out + g * W, next);
    if (group - g == 2) gather<T, C, W, 2>(scores + g * stride, stride, values, seen, times + g, out + g * W, next);
    if (group - g == 1) gather<T, C, W, 1>(scores + g * stride, stride, values, seen, times + g, out + g * W, next);
}

}  // namespace
