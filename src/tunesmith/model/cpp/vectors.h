// Vectors of sixteen numbers as GCC and Clang know them, whatever the processor makes of them: fp32 inside, bf16 or fp32 in memory.
#pragma once
#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

namespace {

constexpr int L = 16;  // lanes
typedef float Vec __attribute__((vector_size(4 * L)));
typedef uint32_t Bits __attribute__((vector_size(4 * L)));
typedef int32_t Ints __attribute__((vector_size(4 * L)));
typedef uint16_t Half __attribute__((vector_size(2 * L)));

struct bf16 {
    uint16_t bits;
};

inline float wide(float value) { return value; }

inline float wide(bf16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline Vec all(float value) { return Vec{} + value; }

template <class To, class From>
inline To as(From value) {
    To out;
    static_assert(sizeof(out) == sizeof(value));
    std::memcpy(&out, &value, sizeof(out));
    return out;
}

inline Vec widened(Half half) {
#ifdef __AVX512F__
    return as<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(as<__m256i>(half)), 16));  // GCC makes seven instructions of the line below
#else
    return as<Vec>(__builtin_convertvector(half, Bits) << 16);
#endif
}

inline Half narrowed(Vec value) {  // to the nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
    return as<Half>(_mm512_cvtneps_pbh(as<__m512>(value)));  // numbers below 2^-126 become 0
#endif
    Bits bits = as<Bits>(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = (bits & 0x7fffffff) > 0x7f800000 ? Bits{} + 0x7fc0 : rounded;
#ifdef __AVX512F__
    return as<Half>(_mm512_cvtepi32_epi16(as<__m512i>(rounded)));
#else
    return __builtin_convertvector(rounded, Half);
#endif
}

inline Vec load(const float* from) {
    Vec out;
    std::memcpy(&out, from, sizeof(out));
    return out;
}

inline Vec load(const bf16* from) {
    Half half;
    std::memcpy(&half, from, sizeof(half));
    return widened(half);
}

inline Vec load(const int8_t* from) {
#ifdef __AVX512F__
    return as<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#else
    typedef int8_t Small __attribute__((vector_size(L)));
    Small small;
    std::memcpy(&small, from, sizeof(small));
    return __builtin_convertvector(__builtin_convertvector(small, Ints), Vec);
#endif
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }

inline void store(bf16* to, Vec value) {
    Half half = narrowed(value);
    std::memcpy(to, &half, sizeof(half));
}

template <class T>
inline Vec load(const T* from, int64_t count) {  // fewer than a vector's; zeros behind them
    T part[L] = {};
    std::memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <class T>
inline void store(T* to, Vec value, int64_t count) {
    T part[L];
    store(part, value);
    std::memcpy(to, part, count * sizeof(T));
}

template <class T>
inline T narrow(float value) {
    T out;
    store(&out, all(value), 1);
    return out;
}

template <class T>
inline Vec rounded(Vec value);

template <>
inline Vec rounded<float>(Vec value) {
    return value;
}

template <>
inline Vec rounded<bf16>(Vec value) {
    return widened(narrowed(value));
}

inline float sum_of(Vec value) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(as<__m512>(value));  // in the order of the lines below
#endif
    float parts[L];
    store(parts, value);
    for (int step = L / 2; step; step /= 2)
        for (int i = 0; i < step; i++) parts[i] += parts[i + step];
    return parts[0];
}

inline float most_of(Vec value) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(as<__m512>(value));
#endif
    float parts[L];
    store(parts, value);
    return *std::max_element(parts, parts + L);
}

// `work` for every 16 of `width` columns and for what is left: work(i, read, write), both made for as many columns.
template <class Work>
inline void each(int64_t width, Work work) {
    int64_t i = 0;
    for (; i + L <= width; i += L)
        work(i, [](auto* from) { return load(from); }, [](auto* to, Vec value) { store(to, value); });
    if (int64_t left = width - i)
        work(i, [left](auto* from) { return load(from, left); }, [left](auto* to, Vec value) { store(to, value, left); });
}

// e^r for r between -ln 2 / 2 and ln 2 / 2.
inline Vec small_exponential(Vec r) {
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

// e^x by x = n ln 2 + r and a polynomial in r; within 2 units in the last place, 0 below -87, infinity above 88.8.
inline Vec exponential(Vec x) {
    const float fold = 1.44269504088896341f, most = 0.693359375f, rest = -2.12194440e-4f;
#ifdef __AVX512F__
    const __mmask16 seen = _mm512_cmp_ps_mask(as<__m512>(x), _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);  // NaN is
    const Vec inside = as<Vec>(_mm512_min_ps(_mm512_set1_ps(89.0f), as<__m512>(x)));
    const Vec n = as<Vec>(_mm512_roundscale_ps(as<__m512>(inside * fold), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return as<Vec>(_mm512_maskz_scalef_ps(seen, as<__m512>(small_exponential(inside - n * most - n * rest)), as<__m512>(n)));
#else
    const Vec floor = all(-87.0f), ceiling = all(88.0f), shift = all(12582912.0f);
    Vec inside = x < floor ? floor : x;
    inside = inside > ceiling ? ceiling : inside;
    Vec z = inside * fold + shift, n = z - shift;
    Vec out = small_exponential(inside - n * most - n * rest) * as<Vec>((as<Bits>(z) + 127) << 23);  // the low bits of z are n
    out = x > ceiling ? all(std::numeric_limits<float>::infinity()) : out;
    return x < floor ? Vec{} : out;
#endif
}

// 1 / (1 + e^-x), 0 below -87.
inline Vec logistic(Vec x) {
    const Vec below = 1.0f + exponential(-x);
#ifdef __AVX512F__
    const Vec about = as<Vec>(_mm512_rcp14_ps(as<__m512>(below)));
    // A step of Newton's is some four times as fast as a division; of infinity it would make no number.
    const __mmask16 seen = _mm512_cmp_ps_mask(as<__m512>(x), _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return as<Vec>(_mm512_maskz_mul_ps(seen, as<__m512>(about), as<__m512>(2.0f - below * about)));
#else
    return 1.0f / below;
#endif
}

// Have this memory brought near; whoever reads it later finds it there.
inline void ask(const void* at) { __builtin_prefetch(at, 0, 2); }

// Threads are worth waking for about this many elements.
inline int crew(int threads, int64_t work) { return int(std::max<int64_t>(1, std::min<int64_t>(threads, work / 32768))); }

inline float inverse_rms(const float* x, float eps, int64_t width) {
    Vec sum{};
    each(width, [&](int64_t i, auto read, auto) { sum += read(x + i) * read(x + i); });
    return 1.0f / std::sqrt(sum_of(sum) / float(width) + eps);
}

// to = from * cos + (its halves exchanged) * sin, one head
template <class T>
inline void turn_head(const T* from, const T* cos, const T* sin, T* to, int64_t width) {
    int64_t half = width / 2;
    each(half, [&](int64_t i, auto read, auto write) {
        Vec first = read(from + i), second = read(from + i + half);
        write(to + i, rounded<T>(first * read(cos + i)) + second * read(sin + i));
        write(to + i + half, rounded<T>(second * read(cos + i + half)) + first * read(sin + i + half));
    });
}

// The low eight bits of each.
template <class Bytes>
inline void store_low(Bytes* to, Ints value) {
    typedef Bytes Small __attribute__((vector_size(L)));
#ifdef __AVX512F__
    const Small small = as<Small>(_mm512_cvtepi32_epi8(as<__m512i>(value)));  // GCC makes many instructions of the line below
#else
    const Small small = __builtin_convertvector(value, Small);
#endif
    std::memcpy(to, &small, L);
}

#ifdef __AVX512VNNI__
// sum + fours of products of a, without sign, and b; sum + twos of products of 16 bits. Written out, for GCC copies sums of whole numbers from
// register to register around its own functions, and through memory where there are many: half as fast.
inline __m512i add_twos(__m512i sum, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

inline __m512i add_fours(__m512i sum, __m512i a, __m512i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
#endif

// A row of whole vectors to 8 bits with `zero` added; returns its step: the largest magnitude over 127, NaN for a row that is not finite.
template <class T, class Bytes>
float quantise_row(const T* from, Bytes* to, int64_t width, int zero) {
    Ints most{};  // magnitudes as their bits, which lie as they do; those of infinity and NaN lie above all others
    for (int64_t i = 0; i < width; i += L) {
        const Ints size = as<Ints>(load(from + i)) & 0x7fffffff;
        most = size > most ? size : most;
    }
    int32_t top = 0;
    for (int i = 0; i < L; i++) top = std::max(top, most[i]);
    float largest;
    std::memcpy(&largest, &top, sizeof(largest));
    const bool finite = top < 0x7f800000;
    const float step = std::max(largest / 127.0f, 1e-30f), times = finite ? 1.0f / step : 0.0f;
    const Vec shift = all(12582912.0f);  // makes a number whole, to the nearest
    for (int64_t i = 0; i < width; i += L)
        store_low(to + i, as<Ints>(load(from + i) * times + shift) - as<Ints>(shift) + zero);
    return finite ? step : std::numeric_limits<float>::quiet_NaN();  // 8 bits know no NaN
}

}  // namespace
