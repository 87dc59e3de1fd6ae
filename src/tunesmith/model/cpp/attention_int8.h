// Attention of single new tokens over keys and values in 8 bits, in whole numbers: queries and weights are rounded to 16 bits, sums are exact.
#pragma once
#include "attention.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WHOLE_NUMBERS

namespace {

constexpr float MOST = 32767;  // of 16 bits
constexpr int64_t SAFE = 512;  // products of 8 and 16 bits whose sum 32 bits hold
constexpr int SIDE = 32;       // numbers of 16 bits in a vector

inline __m512i wide16(const int8_t* from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }

// Sixteen numbers, rounded to whole ones of 16 bits.
inline void store16(int16_t* to, Vec value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(as<__m512>(value))));
}

// A row of floats to 16 bits; returns its step, NaN where it is not finite.
inline float narrow16(const float* from, int16_t* to, int64_t count) {
    Vec most{}, odd{};
    for (int64_t i = 0; i < count; i += L) {
        Vec value = load(from + i), size = as<Vec>(as<Bits>(value) & 0x7fffffff);
        most = size > most ? size : most;
        odd += value * 0.0f;
    }
    const float step = std::max(most_of(most), 1e-30f) / MOST, times = 1.0f / step;
    for (int64_t i = 0; i < count; i += L) store16(to + i, load(from + i) * times);
    return step + sum_of(odd);
}

// As `gather`, of weights in 16 bits, with zeros up to an even number.
template <class T, int W, int N>
void gather16(const int16_t* weights, int64_t stride, const int8_t* values, int64_t seen, const float* times, T* out, const int8_t* next) {
    constexpr int64_t pitch = PITCH_OF<int8_t, W>;
    constexpr int sides = W / SIDE;
    Vec total[N][2 * sides] = {};
    for (int64_t first = 0; first < seen; first += SAFE) {
        __m512i sums[N][2 * sides];
        for (int g = 0; g < N; g++)
            for (int i = 0; i < 2 * sides; i++) sums[g][i] = _mm512_setzero_si512();
        for (int64_t t = first; t < std::min(seen, first + SAFE); t += 2) {
            const int8_t *one = values + t * pitch, *other = t + 1 < seen ? one + pitch : one;  // the weight behind the last one is 0
            ask_row<int8_t, W>(next + t * pitch);
            ask_row<int8_t, W>(next + (t + 1) * pitch);
            __m512i weight[N];
            for (int g = 0; g < N; g++) {
                int32_t both;
                std::memcpy(&both, weights + g * stride + t, sizeof(both));
                weight[g] = _mm512_set1_epi32(both);
            }
            for (int i = 0; i < sides; i++) {
                const __m512i a = wide16(one + i * SIDE), b = wide16(other + i * SIDE);
                const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
                for (int g = 0; g < N; g++) {
                    sums[g][2 * i] = add_twos(sums[g][2 * i], low, weight[g]);
                    sums[g][2 * i + 1] = add_twos(sums[g][2 * i + 1], high, weight[g]);
                }
            }
        }
        for (int g = 0; g < N; g++)
            for (int i = 0; i < 2 * sides; i++) total[g][i] += as<Vec>(_mm512_cvtepi32_ps(sums[g][i]));
    }
    for (int g = 0; g < N; g++)
        for (int i = 0; i < sides; i++) store_unpacked(out + g * W + i * SIDE, total[g][2 * i] * times[g], total[g][2 * i + 1] * times[g]);
}

// As `look`; `scores` has room for 2 * MOST_GROUPED * (seen + 16) numbers.
template <class T, int W>
void look16(const Vec* query, int64_t group, const int8_t* keys, const int8_t* values, int64_t seen, float scale, float* scores, T* out,
            const int8_t* next) {
    constexpr int64_t pitch = PITCH_OF<int8_t, W>;
    constexpr int sides = W / SIDE;
    const int64_t stride = (seen + L - 1) / L * L;
    int16_t* weights = reinterpret_cast<int16_t*>(scores + MOST_GROUPED * stride);
    alignas(64) int16_t small[MOST_GROUPED * W];
    float steps[MOST_GROUPED];
    for (int64_t g = 0; g < group; g++)
        steps[g] = narrow16(reinterpret_cast<const float*>(query + g * W / L), small + g * W, W) * scale;
    __m512i block[L][sides];
    for (int64_t t = 0; t < seen; t += L) {
        const int64_t count = std::min<int64_t>(L, seen - t);
        for (int64_t k = 0; k < count; k++) ask_row<int8_t, W>(values + (t + k) * pitch);
        for (int64_t k = 0; k < L; k++)
            for (int i = 0; i < sides; i++) block[k][i] = wide16(keys + (t + std::min(k, count - 1)) * pitch + i * SIDE);
        const Vec step = steps_of<W>(keys + t * pitch, count);
        for (int64_t g = 0; g < group; g++) {
            Ints sums[L];
            for (int k = 0; k < L; k++) {
                __m512i sum = _mm512_setzero_si512();
                for (int i = 0; i < sides; i++) sum = add_twos(sum, block[k][i], _mm512_load_si512(small + g * W + i * SIDE));
                sums[k] = as<Ints>(sum);
            }
            store(scores + g * stride + t, __builtin_convertvector(sums_of(sums), Vec) * (step * steps[g]));
        }
    }
    float times[MOST_GROUPED];
    for (int64_t g = 0; g < group; g++) times[g] = soften(scores + g * stride, seen);
    for (int64_t t = 0; t < seen; t += L) {
        const Vec step = steps_of<W>(values + t * pitch, std::min<int64_t>(L, seen - t));
        for (int64_t g = 0; g < group; g++) store(scores + g * stride + t, load(scores + g * stride + t) * step);
    }
    for (int64_t g = 0; g < group; g++) times[g] *= narrow16(scores + g * stride, weights + g * stride, stride);
    int64_t g = 0;
    auto some = [&](auto work) { work(weights + g * stride, stride, values, seen, times + g, out + g * W, next); };
    for (; g + 4 <= group; g += 4) some(gather16<T, W, 4>);
    if (group - g == 3) some(gather16<T, W, 3>);
    if (group - g == 2) some(gather16<T, W, 2>);
    if (group - g == 1) some(gather16<T, W, 1>);
}

}  // namespace

#endif
