// Attention of single new tokens over keys and values in bf16, by instructions that add two products of bf16 to every lane: the factors are
// what they are, softmax weights are rounded to bf16, sums are fp32.
#pragma once
#include "attention.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define PAIRED_ATTENTION

namespace {

constexpr int PAIRED = 32;  // numbers of bf16 in a vector

inline __m512i paired(const bf16* from) { return _mm512_loadu_si512(from); }

inline Vec add_pairs(Vec sum, __m512i a, __m512i b) {
    return as<Vec>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(a), as<__m512bh>(b)));
}

// As `gather`, of weights in bf16, with zeros up to an even number.
template <int W, int N>
void gather_pairs(const bf16* weights, int64_t stride, const bf16* values, int64_t seen, const float* times, bf16* out, const bf16* next) {
    constexpr int sides = W / PAIRED;
    Vec total[N][2 * sides] = {};
    for (int64_t t = 0; t < seen; t += 2) {
        const bf16 *one = values + t * W, *other = t + 1 < seen ? one + W : one;  // the weight behind the last one is 0
        ask_row<bf16, W>(next + t * W);
        ask_row<bf16, W>(next + (t + 1) * W);
        __m512i weight[N];
        for (int g = 0; g < N; g++) {
            int32_t both;
            std::memcpy(&both, weights + g * stride + t, sizeof(both));
            weight[g] = _mm512_set1_epi32(both);
        }
        for (int i = 0; i < sides; i++) {
            const __m512i a = paired(one + i * PAIRED), b = paired(other + i * PAIRED);
            const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
            for (int g = 0; g < N; g++) {
                total[g][2 * i] = add_pairs(total[g][2 * i], low, weight[g]);
                total[g][2 * i + 1] = add_pairs(total[g][2 * i + 1], high, weight[g]);
            }
        }
    }
    for (int g = 0; g < N; g++)
        for (int i = 0; i < sides; i++) store_unpacked(out + g * W + i * PAIRED, total[g][2 * i] * times[g], total[g][2 * i + 1] * times[g]);
}

// As `look`; `scores` has room for 2 * MOST_GROUPED * (seen + 16) numbers.
template <int W>
void look_pairs(const Vec* query, int64_t group, const bf16* keys, const bf16* values, int64_t seen, float scale, float* scores, bf16* out,
                const bf16* next) {
    constexpr int sides = W / PAIRED;
    const int64_t stride = (seen + L - 1) / L * L;
    bf16* weights = reinterpret_cast<bf16*>(scores + MOST_GROUPED * stride);
    alignas(64) bf16 small[MOST_GROUPED * W];
    for (int64_t i = 0; i < group * W / L; i++) store(small + i * L, query[i]);
    for (int64_t t = 0; t < seen; t += L) {
        const int64_t count = std::min<int64_t>(L, seen - t);
        for (int64_t k = 0; k < count; k++) ask_row<bf16, W>(values + (t + k) * W);
        for (int64_t g = 0; g < group; g++) {
            __m512i own[sides];
            for (int i = 0; i < sides; i++) own[i] = paired(small + g * W + i * PAIRED);
            Vec sums[L];
#pragma GCC unroll 16
            for (int k = 0; k < L; k++) {
                const bf16* key = keys + (t + std::min<int64_t>(k, count - 1)) * W;
                sums[k] = Vec{};
                for (int i = 0; i < sides; i++) sums[k] = add_pairs(sums[k], own[i], paired(key + i * PAIRED));
            }
            store(scores + g * stride + t, sums_of(sums) * scale);
        }
    }
    float times[MOST_GROUPED];
    for (int64_t g = 0; g < group; g++) {
        times[g] = soften(scores + g * stride, seen);
        for (int64_t t = 0; t < stride; t += L) store(weights + g * stride + t, load(scores + g * stride + t));
    }
    int64_t g = 0;
    auto some = [&](auto work) { work(weights + g * stride, stride, values, seen, times + g, out + g * W, next); };
    for (; g + 4 <= group; g += 4) some(gather_pairs<W, 4>);
    if (group - g == 3) some(gather_pairs<W, 3>);
    if (group - g == 2) some(gather_pairs<W, 2>);
    if (group - g == 1) some(gather_pairs<W, 1>);
}

}  // namespace

#endif
