// Products of training in bf16, for processors that multiply pairs of bf16 (AVX512-BF16) and have no matrix unit.
//
// One call is c = sum over terms of a_t b_t, all sums in fp32 registers: a projection and its adapter, or the gradients of three projections
// on the same input, need no further pass over what they add to. The second factor is laid out anew in every call, 48 columns at a time,
// as pairs of depth that one instruction multiplies; fp32 weights are narrowed on that way. With some hundred rows that costs little,
// and nobody has to keep a second copy of a weight. The first terms may be in 8 bits, fours of which one instruction multiplies.
#include "pairs.h"

namespace {

// Columns of bf16 that are rounded beside others, and what each column is multiplied with first, or null.
struct Piece {
    const bf16* from;
    const float* times;
    int64_t stride, width;
};

#ifdef PAIRS

void sum_of_products(const Term* terms, int count, void* c, int64_t stride, int64_t rows, int64_t columns, Kind kind, float scale, const bf16* bias,
                     const float* before, const Steps& steps, int threads) {
    int64_t deep = 0, turned = 0;
    int small = 0;
    for (int t = 0; t < count; t++) {
        const int64_t depth = terms[t].deep();
        small += terms[t].numbers == IN_8_BITS;
        deep += depth;
        if (terms[t].turned) turned += (rows + TALL - 1) / TALL * depth * 32;
    }
    char* laid = Shelf<0>::of(turned);
    const int64_t panels = (columns + 16 * MOST - 1) / (16 * MOST);
    const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * columns * deep / 100'000)));
    // Where panels are few, each is laid out by every thread for a part of the rows.
    const int64_t parts = panels % team == 0 || panels >= 8 * team ? 1 : team;
    const int64_t part = ((rows + parts - 1) / parts + TALL - 1) / TALL * TALL;
#pragma omp parallel num_threads(team)
    {
        char* to = laid;
        for (int t = 0; t < count; t++) {
            if (!terms[t].turned) continue;
            const int64_t bytes = terms[t].deep() * 32;
#pragma omp for schedule(static)
            for (int64_t first = 0; first < rows; first += TALL)
                lay_rows(terms[t], first, rows, reinterpret_cast<__m256i*>(to + first / TALL * bytes));
            to += (rows + TALL - 1) / TALL * bytes;
        }
        __m512i* panel = reinterpret_cast<__m512i*>(Shelf<1>::of(deep * MOST * 64));
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < panels * parts; item++) {
            const int64_t first = item / parts * 16 * MOST, begin = item % parts * part, end = std::min(rows, begin + part);
            const int vectors = int(std::min<int64_t>(MOST, (columns - first + 15) / 16));
            __m512i* place = panel;
            for (int t = 0; t < count; place += terms[t++].deep() * vectors) {
                auto lay = [&](auto of) { lay_panel(static_cast<decltype(of)>(terms[t].b), terms[t], first, columns, vectors, place); };
                switch (terms[t].numbers) {
                    case IN_BF16: lay(static_cast<const bf16*>(nullptr)); break;
                    case IN_FP32: lay(static_cast<const float*>(nullptr)); break;
                    case IN_8_BITS: lay(static_cast<const int8_t*>(nullptr)); break;
                }
            }
            const int64_t bytes = kind == NARROW ? 2 : 4;
            const Steps own{steps.rows, steps.columns ? steps.columns + first : nullptr, small ? steps.shift + first : nullptr};
            const Out out{static_cast<char*>(c) + first * bytes, stride, columns - first, kind, scale, bias ? bias + first : nullptr, before + first, own};
            for (int64_t row = begin; row < end;) {
                const int64_t high = vectors == 1 && !turned && end - row >= SLIM ? SLIM : std::min(TALL, end - row);
                Rows from[TERMS];
                const char* at = laid;
                for (int t = 0; t < count; t++) {
                    const int64_t depth = terms[t].deep();
                    if (terms[t].turned) {
                        from[t] = {at + row / TALL * depth * 32, 4, 4 * TALL, depth};
                        at += (rows + TALL - 1) / TALL * depth * 32;
                    } else {
                        const int64_t each = terms[t].each() * terms[t].a_stride;
                        from[t] = {static_cast<const char*>(terms[t].a) + row * each, each, 4, depth};
                    }
                }
                (vectors == 3 ? block_of<3> : vectors == 2 ? block_of<2> : block_of<1>)(high)(from, count, small, panel, row, out);
                row += high;
            }
        }
    }
}

// Each row of all pieces together in 8 bits with 128 added, [rows, width], and the step that it counts: its largest magnitude over 127.
void round_together(const Piece* pieces, int64_t count, uint8_t* to, float* steps, int64_t rows, int64_t width, int threads) {
    const int team = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * width / 20'000)));
#pragma omp parallel num_threads(team)
    {
        float* joined = reinterpret_cast<float*>(Shelf<2>::of(width * 4));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            float* at = joined;
            for (const Piece* piece = pieces; piece < pieces + count; at += piece++->width) {
                const bf16* from = piece->from + row * piece->stride;
                for (int64_t i = 0; i < piece->width; i += L)
                    store(at + i, piece->times ? load(from + i) * load(piece->times + i) : load(from + i));
            }
            steps[row] = quantise_row(joined, to + row * width, width, 128);
        }
    }
}

#endif

}  // namespace

extern "C" int can_dense() {
#ifdef PAIRS
    return 1;
#else
    return 0;
#endif
}

extern "C" void dense(const Term* terms, int64_t count, void* c, int64_t stride, int64_t rows, int64_t columns, int64_t kind,
                      float scale, const bf16* bias, const float* before, const Steps* steps, int threads) {
#ifdef PAIRS
    sum_of_products(terms, int(count), c, stride, rows, columns, Kind(kind), scale, bias, before, steps ? *steps : Steps{}, threads);
#endif
}

extern "C" void round_rows(const Piece* pieces, int64_t count, uint8_t* to, float* steps, int64_t rows, int64_t width, int threads) {
#ifdef PAIRS
    round_together(pieces, count, to, steps, rows, width, threads);
#endif
}
