// Products of rows with weights in blocks, and what is done to a block's outputs while they are in the cache.
//
// The products themselves are strips.h's on processors that have what it takes, else oneDNN's, through PyTorch's `brgemm`, whose
// address native.py hands over: it multiplies rows by one block of weights.
#pragma once
#include <type_traits>

#include "attention.h"
#include "prompts.h"
#include "strips.h"

namespace {

constexpr int64_t B = 64;      // outputs of a block
constexpr int64_t ROWS = 128;  // rows that are multiplied at once
constexpr int64_t PARTS = 4;   // so often one after the other

struct Product {
    const void* weight;    // [blocks, inputs, B], in bf16 two inputs and in 8 bits four side by side; in strips [2 blocks, inputs, B / 2]
    const float* scale;    // [outputs] of weights in 8 bits, otherwise null
    const int32_t* shift;  // [outputs] 128 times the sum of an output's weights in 8 bits: inputs are stored with 128 added
    const float* bias;     // [outputs] or null
    int64_t outputs, inputs;
    int64_t gated;  // whether half a block are outputs of the first half, and half those of the second
};

struct Span {
    const void* b;  // [places, rank, columns]
    int64_t first, rank, column, columns;
};

struct Lora {  // the rows' adapters on one input
    const void* a;  // [places, ranks, inputs], null where there is none
    int64_t ranks, spans;
    Span span[3];
};

// What a product reads: rows in its own type, and of rows in 8 bits their steps.
struct Input {
    const void* data;
    const float* scale;
};

struct Share {
    int64_t begin, end;
};

// This thread's strips of a product; of a gated one both of a block go together.
inline Share share(const Product& product) {
    const int64_t together = product.gated ? 2 : 1, count = (product.outputs + B - 1) / B * 2 / together;
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    return {count * me / threads * together, count * (me + 1) / threads * together};
}

// The adapters' part of an output column: small [ranks] of this row times B.
template <class T>
inline Vec adapted(const Lora& lora, int64_t place, const float* small, int64_t column) {
    Vec out{};
    for (int64_t i = 0; i < lora.spans; i++) {
        const Span& span = lora.span[i];
        if (column < span.column || column >= span.column + span.columns) continue;
        const T* b = static_cast<const T*>(span.b) + place * span.rank * span.columns + column - span.column;
        for (int64_t r = 0; r < span.rank; r++) out += load(b + r * span.columns) * small[span.first + r];
    }
    return out;
}

// Whether such weights lie in strips of 32 outputs here.
template <class T>
bool by_strips(const Product& product) {
    return (product.scale || sizeof(T) == 2) && in_strips(product.scale);
}

// silu(gate) * up [rows, inner] from the outputs of a gated block, whose first half are gates.
template <class T>
struct Gate {
    T* out;
    int64_t inner;

    void operator()(int64_t row, int64_t column, Vec gate, Vec up) const {
        gate = rounded<T>(gate);
        store(out + row * inner + column, rounded<T>(gate * logistic(gate)) * rounded<T>(up));
    }
};

// What becomes of a block's sums. What does not change from row to row is read once: stores could change it for all the compiler knows.
template <class T, class Out>
struct Finish {
    static constexpr bool GATE = std::is_same_v<Out, Gate<T>>;
    const Product& product;
    const float* row_scale;
    const Lora* lora;
    const int64_t* places;
    const float* small;
    const float* room;  // [rows, B]
    Out& out;

    // N vectors of the sums of `count` rows, those of `first` on, beginning at the block's output `begin`.
    template <int N>
    void operator()(int64_t block, int64_t first, int64_t count, int64_t begin = 0) const {
        if (product.scale)
            some<N, true>(block, first, count, begin);
        else
            some<N, false>(block, first, count, begin);
    }

    template <int N, bool SMALL>
    void some(int64_t block, int64_t first, int64_t count, int64_t begin) const {
        int64_t column[N], left[N];
        Vec scale[N] = {}, bias[N] = {};
        Ints shift[N] = {};
        for (int n = 0; n < N; n++) {
            const int64_t i = begin + n * L, half = product.outputs / 2;
            column[n] = !product.gated ? block * B + i : block * B / 2 + (i < B / 2 ? i : half + i - B / 2);
            left[n] = product.outputs - column[n];
            if (left[n] <= 0) continue;
            if (product.bias) bias[n] = load(product.bias + column[n]);
            if (SMALL) scale[n] = load(product.scale + column[n]), std::memcpy(&shift[n], product.shift + column[n], sizeof(shift[n]));
        }
        const bool biased = product.bias, adapts = lora && lora->a;
        const float *sums = room + begin, *step = SMALL ? row_scale + first : nullptr;
        const Out result = out;
        for (int64_t r = 0; r < count; r++) {
            Vec value[N];
            for (int n = 0; n < N; n++) {
                value[n] = load(sums + r * B + n * L);
                if (SMALL) value[n] = __builtin_convertvector(as<Ints>(value[n]) - shift[n], Vec) * scale[n] * step[r];
            }
            if (biased)
                for (int n = 0; n < N; n++) value[n] += bias[n];
            if (adapts && places[first + r] >= 0)
                for (int n = 0; n < N && left[n] > 0; n++)
                    value[n] += adapted<T>(*lora, places[first + r], small + (first + r) * lora->ranks, column[n]);
            if constexpr (GATE) {
                for (int n = 0; n < N / 2; n++) result(first + r, column[n], value[n], value[n + N / 2]);
            } else {
                for (int n = 0; n < N && left[n] > 0; n++) result(first + r, column[n], value[n], left[n]);
            }
        }
    }
};

// Blocks of a product shared among the threads that are here, nobody waits for the others: out(row, column, values, how many of them count).
// `next` is what this team multiplies after it, if that is known; `ahead` what is asked for meanwhile.
template <class T, class Out>
void multiply(const Product& product, Input input, int64_t rows, Multiply call, const Lora* lora, const int64_t* places, const float* small,
              Out out, const Product* next = nullptr, Ahead* ahead = nullptr) {
    alignas(64) float room[ROWS * B];
    const int64_t k = product.inputs, each_input = product.scale ? 1 : sizeof(T), size = B * k * each_input;
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    const char *from = static_cast<const char*>(input.data), *weights = static_cast<const char*>(product.weight);
    const Finish<T, Out> finish{product, input.scale, lora, places, small, room, out};
    // `work` for all blocks and parts of the rows, of which some stay in the cache while the weights pass by.
    auto blocks_of = [&](auto work) {
        const int64_t blocks = (product.outputs + B - 1) / B;
        for (int64_t group = 0; group < parts; group += PARTS) {
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t block = 0; block < blocks; block++)
                for (int64_t part = group; part < std::min(parts, group + PARTS); part++) {
                    const int64_t first = part * ROWS, count = std::min(ROWS, rows - first);
                    work(block, first, count);
                    finish.template operator()<B / L>(block, first, count);
                }
        }
    };
    if (rows > 0 && by_strips<T>(product)) {
        auto strip_at = [](const Product& of, int64_t number, int64_t bytes) { return static_cast<const char*>(of.weight) + number * bytes; };
        const int64_t stride = k * each_input, bytes = STRIP * stride;
        const Strips strips(product.scale, rows);
        if (rows <= FEW) {
            const Share own = share(product);
            for (int64_t number = own.begin; number < own.end; number++) {
                const char* then = number + 1 < own.end ? strip_at(product, number + 1, bytes) : nullptr;
                if (!then && next) then = strip_at(*next, share(*next).begin, STRIP * next->inputs * each_input);
                const int64_t begin = number % 2 * STRIP;
                strips(rows, from, stride, strip_at(product, number, bytes), room + begin, then, ahead);
                if constexpr (!Finish<T, Out>::GATE)  // which are gated products' alone
                    if (!product.gated) finish.template operator()<STRIP / L>(number / 2, 0, rows, begin);
                if (product.gated && begin) finish.template operator()<B / L>(number / 2, 0, rows);
            }
        } else {
            blocks_of([&](int64_t block, int64_t first, int64_t count) {
                for (int64_t side = 0; side < 2; side++)
                    strips(count, from + first * stride, stride, strip_at(product, 2 * block + side, bytes), room + side * STRIP, nullptr);
            });
        }
        return;
    }
    blocks_of([&](int64_t block, int64_t first, int64_t count) {
        call(count, B, k, k, B, B, false, from + first * k * each_input, weights + block * size, room, product.scale || sizeof(T) == 2);
    });
}

template <class T>
inline void store_some(T* to, Vec value, int64_t count) {
    if (count >= L)
        store(to, value);
    else
        store(to, value, count);
}

// Up to sixteen numbers of x A^T, N of them known to be there.
template <class T, int N>
inline Vec shrink_some(const T* x, const T* a, int64_t inputs) {
    Vec sums[L] = {};
    for (int64_t i = 0; i < inputs; i += L) {
        Vec value = load(x + i);
        for (int j = 0; j < N; j++) sums[j] += value * load(a + j * inputs + i);
    }
    return sums_of(sums);
}

// x A^T of one row, rounded as a tensor would be.
template <class T>
void shrink(const T* x, const T* a, float* small, int64_t ranks, int64_t inputs) {
    int64_t r = 0;
    for (; r + L <= ranks; r += L) store(small + r, rounded<T>(shrink_some<T, L>(x, a + r * inputs, inputs)));
    for (; r < ranks; r++) small[r] = wide(narrow<T>(shrink_some<T, 1>(x, a + r * inputs, inputs)[0]));
}

// What stands ready before a product: the row in 8 bits, and what its adapter makes of it first.
template <class T>
void prepare(const T* row, int64_t number, const Product& product, const Lora& lora, const int64_t* places, uint8_t* bytes, float* scale,
             float* small) {
    if (product.scale) scale[number] = quantise_row(row, bytes + number * product.inputs, product.inputs, 128);
    if (lora.a && places[number] >= 0)
        shrink(row, static_cast<const T*>(lora.a) + places[number] * lora.ranks * product.inputs, small + number * lora.ranks, lora.ranks,
               product.inputs);
}

}  // namespace
