// Blocks of products in bf16 for processors that multiply pairs of bf16 (AVX512-BF16) and have no matrix unit: rows as they lie in memory
// meet panels of columns that are laid out as pairs of depth, and sums stay in fp32 registers. In 8 bits, fours take the place of pairs.
#pragma once
#include "vectors.h"

#include <type_traits>
#include <utility>

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(__AMX_BF16__)
#define PAIRS
#endif

namespace {

enum Numbers : int64_t { IN_BF16, IN_FP32, IN_8_BITS };

// What native.py fills in. `a` is [rows, depth], or with `turned` [depth, rows]; `b` is [depth, columns], or with `of_weight` [columns, depth],
// of `numbers`; with b in 8 bits, a is [rows, depth] in 8 bits with 128 added, otherwise in bf16. Strides count numbers; the depth of rows is
// even where they are not turned or `of_weight`, and in 8 bits a multiple of four.
struct Term {
    const void* a;
    const void* b;
    int64_t a_stride, b_stride, depth, turned, of_weight;
    Numbers numbers;

    int64_t each() const { return numbers == IN_8_BITS ? 1 : 2; }  // bytes of a number of a
    int64_t deep() const { return (depth * each() + 3) / 4; }      // pairs, or fours, of depth
};

// What numbers in 8 bits count: of all terms with such together, which stand first.
struct Steps {
    const float* rows;     // [rows]
    const float* columns;  // [columns], or null for ones
    const int32_t* shift;  // [columns] what 128 too much in every number of a row adds to the sums, to be taken off
};

enum Kind { NARROW, WIDE, ADD };  // c in bf16, in fp32, or in fp32 with another matrix of its strides added, mostly itself

#ifdef PAIRS

constexpr int MOST = 3;                 // vectors of a panel
constexpr int64_t TALL = 8, SLIM = 16;  // rows that meet it at a time: of a panel of one vector twice as many
constexpr int TERMS = 8;

inline __m512i joined(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

inline __m256i some(const bf16* from, __mmask16 seen) { return _mm256_maskz_loadu_epi16(seen, from); }

inline __m256i some(const float* from, __mmask16 seen) { return as<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(seen, from))); }

// Pairs of one weight row, at most 16 of them.
inline __m512i pairs(const bf16* from, int64_t count) { return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), from); }

inline __m512i pairs(const float* from, int64_t count) {
    const uint32_t seen = count < 16 ? (1u << 2 * count) - 1 : ~0u;
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(seen), from), high = _mm512_maskz_loadu_ps(__mmask16(seen >> 16), from + 16);
    return as<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// 16 rows of 16 pairs become 16 columns.
inline void turn_square(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Fours of one weight row, at most 16 of them.
inline __m512i pairs(const int8_t* from, int64_t count) { return _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), from); }

// Sixteen columns of four lines of b as fours.
inline __m512i fours(const int8_t* from, int64_t stride, __mmask16 seen) {
    __m128i line[4];
    for (int i = 0; i < 4; i++) line[i] = _mm_maskz_loadu_epi8(seen, from + i * stride);
    const __m128i low = _mm_unpacklo_epi8(line[0], line[1]), high = _mm_unpackhi_epi8(line[0], line[1]);
    const __m128i low2 = _mm_unpacklo_epi8(line[2], line[3]), high2 = _mm_unpackhi_epi8(line[2], line[3]);
    const __m256i first = _mm256_set_m128i(_mm_unpackhi_epi16(low, low2), _mm_unpacklo_epi16(low, low2));
    const __m256i second = _mm256_set_m128i(_mm_unpackhi_epi16(high, high2), _mm_unpacklo_epi16(high, high2));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// The columns from `first` on of b, `vectors` times 16 of them, as a panel [pairs of depth, vectors * 16] of pairs; zeros for what is missing.
template <class T>
void lay_panel(const T* b, const Term& term, int64_t first, int64_t columns, int vectors, __m512i* to) {
    const int64_t depth = term.deep();
    for (int v = 0; v < vectors; v++, first += 16) {
        const int64_t count = std::max<int64_t>(0, std::min<int64_t>(16, columns - first));
        if (!term.of_weight) {
            const __mmask16 seen = __mmask16((1u << count) - 1);
            for (int64_t k = 0; k < depth; k++) {
                if constexpr (sizeof(T) == 1) {
                    to[k * vectors + v] = fours(b + 4 * k * term.b_stride + first, term.b_stride, seen);
                } else {
                    const T* at = b + 2 * k * term.b_stride + first;
                    const bool last = 2 * k + 1 == term.depth;
                    to[k * vectors + v] = joined(some(at, seen), last ? _mm256_setzero_si256() : some(at + term.b_stride, seen));
                }
            }
            continue;
        }
        for (int64_t k = 0; k < depth; k += 16) {
            const int64_t left = std::min<int64_t>(16, depth - k);
            __m512i square[16];
            for (int64_t i = 0; i < 16; i++)
                square[i] = i < count ? pairs(b + (first + i) * term.b_stride + (sizeof(T) == 1 ? 4 : 2) * k, left) : _mm512_setzero_si512();
            turn_square(square);
            for (int64_t i = 0; i < left; i++) to[(k + i) * vectors + v] = square[i];
        }
    }
}

// Rows `first` to `first` + 8 of a turned a as [pairs of depth, 8] pairs.
void lay_rows(const Term& term, int64_t first, int64_t rows, __m256i* to) {
    const __mmask8 seen = __mmask8((1u << std::min<int64_t>(TALL, rows - first)) - 1);
    for (int64_t k = 0; k < term.depth; k += 2) {
        const bf16* at = static_cast<const bf16*>(term.a) + k * term.a_stride + first;
        const __m128i even = _mm_maskz_loadu_epi16(seen, at);
        const __m128i odd = k + 1 < term.depth ? _mm_maskz_loadu_epi16(seen, at + term.a_stride) : _mm_setzero_si128();
        *to++ = _mm256_or_si256(_mm256_cvtepu16_epi32(even), _mm256_slli_epi32(_mm256_cvtepu16_epi32(odd), 16));
    }
}

// Where the pairs of some rows lie: row r at `at` + r * `row` bytes, each pair `step` bytes behind the one before.
struct Rows {
    const char* at;
    int64_t row, step, depth;
};

// Memory of a thread, kept from call to call; the calling thread has one of each number.
template <int NUMBER>
struct Shelf {
    static char* of(int64_t bytes) {
        static thread_local std::unique_ptr<char[]> held;
        static thread_local int64_t size = 0;
        if (size < bytes + 64) held.reset(new char[size = bytes + 64]);
        return held.get() + (64 - reinterpret_cast<uintptr_t>(held.get()) % 64) % 64;
    }
};

struct Out {
    void* c;
    int64_t stride, columns;  // from the panel's first on
    Kind kind;
    float scale;
    const bf16* bias;
    const float* before;  // what is added, from the place of c on
    Steps steps;          // from the panel's first column on
};

#define INLINED __attribute__((always_inline))

template <class Each, int... I>
INLINED inline void written_out(Each each, std::integer_sequence<int, I...>) {
    (each(std::integral_constant<int, I>{}), ...);
}

// `each(i)` for i from 0 to N, written out before the compiler looks at it: in a loop GCC would carry the sums through memory.
template <int N, class Each>
INLINED inline void unrolled(Each each) {
    written_out(each, std::make_integer_sequence<int, N>{});
}

inline __m512 add_product(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, as<__m512bh>(a), as<__m512bh>(b)); }
inline __m512i add_product(__m512i sum, __m512i a, __m512i b) { return add_fours(sum, a, b); }

template <int R, int V, int STEP, class Sum>
INLINED inline void multiply(const Rows& rows, const __m512i* panel, Sum (&sums)[R * V]) {
    const char* at[R];
    unrolled<R>([&](auto r) INLINED { at[r] = rows.at + r * rows.row; });
    const int64_t depth = rows.depth;
    for (int64_t k = 0, far = 0; k < depth; k++, far += STEP, panel += V) {
        __m512i b[V];
        unrolled<V>([&](auto v) INLINED { b[v] = panel[v]; });
        unrolled<R>([&](auto r) INLINED {
            int32_t pair;
            std::memcpy(&pair, at[r] + far, 4);
            const __m512i a = _mm512_set1_epi32(pair);
            unrolled<V>([&](auto v) INLINED { sums[r * V + v] = add_product(sums[r * V + v], a, b[v]); });
        });
    }
}

// How many, and which, of a vector's numbers are columns of c.
inline int64_t count_of(const Out& out, int v) { return std::max<int64_t>(0, std::min<int64_t>(16, out.columns - 16 * v)); }
inline __mmask16 seen_of(const Out& out, int v) { return __mmask16((1u << count_of(out, v)) - 1); }

// `each(i, place, seen)` for every vector of R rows, and which of its numbers are columns of c.
template <int R, int V, class Each>
INLINED inline void put(const Out& out, Each each) {
    if (out.columns >= 16 * V)
        return unrolled<R * V>([&](auto i) INLINED { each(i, i / V * out.stride + 16 * (i % V), __mmask16(~0)); });
    unrolled<V>([&](auto v) INLINED {
        const __mmask16 seen = seen_of(out, v);
        unrolled<R>([&](auto r) INLINED { each(r * V + v, r * out.stride + 16 * v, seen); });
    });
}

// The sums of the first `small` terms, which are in 8 bits; returns where their panels end.
template <int R, int V>
INLINED inline const __m512i* multiply_small(const Rows* rows, int small, const __m512i* panel, int64_t row, const Out& out,
                                             __m512 (&sums)[R * V]) {
    __m512i whole[R * V];
    unrolled<V>([&](auto v) INLINED {
        const __m512i less = _mm512_maskz_loadu_epi32(seen_of(out, v), out.steps.shift + 16 * v);
        unrolled<R>([&](auto r) INLINED { whole[r * V + v] = _mm512_sub_epi32(_mm512_setzero_si512(), less); });
    });
    for (int t = 0; t < small; panel += rows[t++].depth * V) multiply<R, V, 4>(rows[t], panel, whole);
    unrolled<V>([&](auto v) INLINED {
        const __m512 step = out.steps.columns ? _mm512_maskz_loadu_ps(seen_of(out, v), out.steps.columns + 16 * v) : _mm512_set1_ps(1.0f);
        unrolled<R>([&](auto r) INLINED {
            const __m512 times = _mm512_mul_ps(step, _mm512_set1_ps(out.steps.rows[row + r]));
            sums[r * V + v] = _mm512_mul_ps(_mm512_cvtepi32_ps(whole[r * V + v]), times);
        });
    });
    return panel;
}

// R rows of c; the first `small` terms are in 8 bits.
template <int R, int V>
void block(const Rows* rows, int terms, int small, const __m512i* panel, int64_t row, const Out& out) {
    __m512 sums[R * V];
    if (small)
        panel = multiply_small<R, V>(rows, small, panel, row, out, sums);
    else
        unrolled<R * V>([&](auto i) INLINED { sums[i] = _mm512_setzero_ps(); });
    if (out.bias)
        unrolled<V>([&](auto v) INLINED {
            const int64_t count = count_of(out, v);
            const __m512 more = as<__m512>(count > 0 ? load(out.bias + 16 * v, count) : Vec{});
            unrolled<R>([&](auto r) INLINED { sums[r * V + v] = _mm512_add_ps(sums[r * V + v], more); });
        });
    for (int t = small; t < terms; panel += rows[t++].depth * V) {
        if (rows[t].step == 4)
            multiply<R, V, 4>(rows[t], panel, sums);
        else
            multiply<R, V, 4 * TALL>(rows[t], panel, sums);
    }
    if (out.scale != 1.0f) unrolled<R * V>([&](auto i) INLINED { sums[i] = _mm512_mul_ps(sums[i], _mm512_set1_ps(out.scale)); });
    const int64_t start = row * out.stride;
    if (out.kind == NARROW) {
        bf16* to = static_cast<bf16*>(out.c) + start;
        put<R, V>(out, [&](int i, int64_t place, __mmask16 seen) INLINED {
            _mm256_mask_storeu_epi16(to + place, seen, as<__m256i>(_mm512_cvtneps_pbh(sums[i])));
        });
        return;
    }
    float* to = static_cast<float*>(out.c) + start;
    if (out.kind == WIDE) {
        put<R, V>(out, [&](int i, int64_t place, __mmask16 seen) INLINED { _mm512_mask_storeu_ps(to + place, seen, sums[i]); });
    } else {
        const float* before = out.before + start;
        put<R, V>(out, [&](int i, int64_t place, __mmask16 seen) INLINED {
            _mm512_mask_storeu_ps(to + place, seen, _mm512_add_ps(sums[i], _mm512_maskz_loadu_ps(seen, before + place)));
        });
    }
}

using Block = void (*)(const Rows*, int, int, const __m512i*, int64_t, const Out&);

template <int V>
Block block_of(int64_t rows) {
    static constexpr Block tall[] = {block<1, V>, block<2, V>, block<3, V>, block<4, V>, block<5, V>, block<6, V>, block<7, V>, block<8, V>};
    return rows == SLIM ? block<V == 1 ? SLIM : 1, V> : tall[rows - 1];
}

#endif

}  // namespace
