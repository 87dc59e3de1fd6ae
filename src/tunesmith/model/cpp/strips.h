// Rows times strips of 32 outputs: by the matrix unit (matrix.h), or by instructions that add two products of bf16, or four of 8 bits, to
// every lane of a vector, on processors that have these and no such unit.
//
// Sixteen sums of eight rows stay in registers while a strip passes by, so that an instruction of sixteen waits for one load and no sum for
// the one before it; more rows of sums were no faster on Zen 4, and three vectors of outputs instead of two slower.
#pragma once
#include <vector>

#include "matrix.h"
#if defined(__AVX512BF16__)
#define PAIRS_OF_BF16
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define FOURS_OF_8_BITS
#endif

namespace {

// Memory that is read some products later, asked for while these multiply: they wait for their instructions, and memory has time.
class Ahead {
   public:
    void clear() { pieces_.clear(), next_ = 0, left_ = MOST; }

    void add(const void* at, int64_t bytes) {
        bytes = std::min(bytes, left_);
        left_ -= bytes;
        if (bytes > 0) pieces_.push_back({static_cast<const char*>(at), bytes});
    }

    // Where to ask for the next `bytes`, or null when everything is on its way. What is asked for beyond a piece does no harm.
    const char* take(int64_t bytes) {
        if (next_ == pieces_.size()) return nullptr;
        Piece& piece = pieces_[next_];
        const char* at = piece.at;
        piece.at += bytes, piece.bytes -= bytes;
        if (piece.bytes <= 0) next_++;
        return at;
    }

   private:
    static constexpr int64_t MOST = 4 << 20;  // what the processor's caches keep until it is read
    struct Piece {
        const char* at;
        int64_t bytes;
    };
    std::vector<Piece> pieces_;
    size_t next_ = 0;
    int64_t left_ = MOST;
};

// Whether weights in 8 bits (or in bf16) lie in strips on this processor.
inline bool in_strips(bool small) {
#ifdef MATRIX_UNIT
    if (matrix_unit()) return true;
#endif
#ifdef FOURS_OF_8_BITS
    if (small) return true;
#endif
#ifdef PAIRS_OF_BF16
    if (!small) return true;
#endif
    return false;
}

#if defined(PAIRS_OF_BF16) || defined(FOURS_OF_8_BITS)
#define VECTOR_STRIPS

constexpr int TOGETHER = 8;  // rows whose sums are held at once

template <bool SMALL>
inline __m512i add_products(__m512i sum, __m512i row, __m512i weights) {
#ifdef FOURS_OF_8_BITS
    if constexpr (SMALL) return add_fours(sum, row, weights);
#endif
#ifdef PAIRS_OF_BF16
    if constexpr (!SMALL) return as<__m512i>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(row), as<__m512bh>(weights)));
#endif
    __builtin_unreachable();  // in_strips has said no
}

// R rows by a strip of `depth` lines of WIDTH bytes. With each, ASKS lines of `asked` are asked for.
template <bool SMALL, int R, int ASKS>
void some_rows(const char* rows, int64_t stride, const char* weights, char* out, int64_t depth, const char* asked) {
    __m512i low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k++) {
        const __m512i first = _mm512_loadu_si512(weights + k * WIDTH), second = _mm512_loadu_si512(weights + k * WIDTH + LINE);
        for (int i = 0; i < ASKS; i++) ask(asked + (k * ASKS + i) * LINE);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            int32_t some;
            std::memcpy(&some, rows + r * stride + 4 * k, sizeof(some));
            const __m512i row = _mm512_set1_epi32(some);
            low[r] = add_products<SMALL>(low[r], row, first);
            high[r] = add_products<SMALL>(high[r], row, second);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        _mm512_storeu_si512(out + r * PITCH, low[r]);
        _mm512_storeu_si512(out + r * PITCH + LINE, high[r]);
    }
}

template <bool SMALL, int R>
void asking_rows(const char* rows, int64_t stride, const char* weights, char* out, int64_t depth, const char* asked, int64_t lines) {
    auto call = !asked ? some_rows<SMALL, R, 0> : lines == depth ? some_rows<SMALL, R, 1> : some_rows<SMALL, R, 2>;
    call(rows, stride, weights, out, depth, asked);
}

// Half of out [rows, 64] in four bytes each. The first rows ask for the strip `next`, if it is known, the others for what is `ahead`: one
// line at a time and none twice, which would hold up the weights that are loaded.
template <bool SMALL>
void vector_strip(int64_t rows, const char* from, int64_t stride, const char* weights, void* out, int64_t depth, const char* next,
                  Ahead* ahead) {
    constexpr decltype(&asking_rows<SMALL, 1>) calls[] = {asking_rows<SMALL, 1>, asking_rows<SMALL, 2>, asking_rows<SMALL, 3>,
                                                          asking_rows<SMALL, 4>, asking_rows<SMALL, 5>, asking_rows<SMALL, 6>,
                                                          asking_rows<SMALL, 7>, asking_rows<SMALL, 8>};
    const int64_t turns = (rows + TOGETHER - 1) / TOGETHER, lines = turns > 1 ? depth : 2 * depth;
    for (int64_t turn = 0; turn < turns; turn++) {
        const int64_t first = rows * turn / turns, count = rows * (turn + 1) / turns - first;
        const char* asked = nullptr;
        if (turn < 2)
            asked = next ? next + turn * depth * LINE : nullptr;
        else if (ahead)
            asked = ahead->take(depth * LINE);
        calls[count - 1](from + first * stride, stride, weights, static_cast<char*>(out) + first * PITCH, depth, asked, lines);
    }
}

#endif

// One product's strips on this thread, between `begin` and `end`.
class Strips {
   public:
    Strips(bool small, int64_t rows) : small_(small) {
#ifdef MATRIX_UNIT
        tiles_ = matrix_unit();
        shaped_ = std::min(rows, 2 * TILE);
        if (tiles_) shape_tiles(shaped_);
#endif
    }

    ~Strips() {
#ifdef MATRIX_UNIT
        if (tiles_) _tile_release();
#endif
    }

    // Half of out [rows, 64], four bytes each, from rows of `stride` bytes; `next` is the strip that is asked for meanwhile, or null.
    void operator()(int64_t rows, const char* from, int64_t stride, const char* weights, void* out, const char* next,
                    Ahead* ahead = nullptr) const {
#ifdef MATRIX_UNIT
        if (tiles_) return (small_ ? strip<true> : strip<false>)(rows, shaped_, from, stride, weights, out, stride * STRIP / DEEP, next);
#endif
#ifdef VECTOR_STRIPS
        (small_ ? vector_strip<true> : vector_strip<false>)(rows, from, stride, weights, out, stride * STRIP / WIDTH, next, ahead);
#endif
    }

   private:
    bool small_;
    bool tiles_ = false;
    int64_t shaped_ = 0;
};

}  // namespace
