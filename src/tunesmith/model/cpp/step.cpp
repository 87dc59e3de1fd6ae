// Products with weights in blocks, and all decoder layers of a sampling step in one go; the arithmetic of cached_layer.py.
//
// The products themselves are strips.h's on processors that have what it takes, else oneDNN's, through PyTorch's `brgemm`, whose
// address native.py hands over: it multiplies rows by one block of weights. Everything around them happens to a block's outputs while they
// are in the cache. native.py says what every field is.
#include "heads.h"
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

struct Layer {
    Product product[4];  // query, key and value; output; gate and up; down
    Lora lora[4];
    const void *first_norm, *second_norm, *query_norm, *key_norm, *cos, *sin;
    int64_t window;
    float eps, scale;
};

struct Step {
    Multiply multiply;
    Release release;
    const Layer* layers;
    const Pool* pools;
    void **keys, **values;  // [layers, pools]
    const int64_t* places;  // [rows] of each row's adapter, -1 where it has none
    float* x;               // [rows, hidden], changed in place
    int64_t depth, pool_count, rows, hidden, key_heads, group, width, longest, small, threads;  // small: keys and values in 8 bits
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

// Blocks of a product shared among the threads that are here, nobody waits for the others: out(row, column, values, how many of them count).
// `next` is what this team multiplies after it, if that is known; `ahead` what is asked for meanwhile.
template <class T, class Out>
void multiply(const Product& product, Input input, int64_t rows, Multiply call, const Lora* lora, const int64_t* places, const float* small,
              Out out, const Product* next = nullptr, Ahead* ahead = nullptr) {
    alignas(64) float room[ROWS * B];
    const int64_t k = product.inputs, half = product.outputs / 2, each_input = product.scale ? 1 : sizeof(T), size = B * k * each_input;
    const int64_t parts = (rows + ROWS - 1) / ROWS;
    const char *from = static_cast<const char*>(input.data), *weights = static_cast<const char*>(product.weight);
    // What is done to outputs [count, begin to end] of a block, those of `count` rows from `first` on.
    auto finish = [&](int64_t block, int64_t first, int64_t count, int64_t begin, int64_t end) {
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = begin; i < end; i += L) {
                int64_t column = block * B + i, left = product.outputs - column;
                if (product.gated) column = block * B / 2 + (i < B / 2 ? i : half + i - B / 2), left = L;
                if (left <= 0) break;
                Vec value = load(room + r * B + i);
                if (product.scale) {
                    Ints whole, shift;
                    std::memcpy(&whole, room + r * B + i, sizeof(whole));
                    std::memcpy(&shift, product.shift + column, sizeof(shift));
                    value = __builtin_convertvector(whole - shift, Vec) * load(product.scale + column) * input.scale[first + r];
                }
                if (product.bias) value += load(product.bias + column);
                if (lora && lora->a && places[first + r] >= 0)
                    value += adapted<T>(*lora, places[first + r], small + (first + r) * lora->ranks, column);
                out(first + r, column, value, left);
            }
    };
    // `work` for all blocks and parts of the rows, of which some stay in the cache while the weights pass by.
    auto blocks_of = [&](auto work) {
        const int64_t blocks = (product.outputs + B - 1) / B;
        for (int64_t group = 0; group < parts; group += PARTS) {
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t block = 0; block < blocks; block++)
                for (int64_t part = group; part < std::min(parts, group + PARTS); part++) {
                    const int64_t first = part * ROWS, count = std::min(ROWS, rows - first);
                    work(block, first, count);
                    finish(block, first, count, 0, B);
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
                strips(rows, from, stride, strip_at(product, number, bytes), room + number % 2 * STRIP, then, ahead);
                if (!product.gated) finish(number / 2, 0, rows, number % 2 * STRIP, (number % 2 + 1) * STRIP);
                else if (number % 2) finish(number / 2, 0, rows, 0, B);
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

// silu(gate) * up [rows, inner] from the outputs of a gated block, whose first half are gates.
template <class T>
struct Gate {
    T* out;
    int64_t inner;
    Vec active[B / 2 / L];

    void operator()(int64_t row, int64_t column, Vec value, int64_t) {
        value = rounded<T>(value);
        Vec& kept = active[column % (B / 2) / L];
        if (column < inner)
            kept = rounded<T>(value * logistic(value));
        else
            store(out + row * inner + column - inner, kept * value);
    }
};

template <class T, class C, int W>
void attend_pools(const Step& s, const Layer& layer, int64_t number, const T* joined, T* out, float* scores) {
    int64_t first = 0;
    for (int64_t i = 0; i < s.pool_count; i++) {
        const Pool& pool = s.pools[i];
        auto of = [](const void* pointer) { return static_cast<const T*>(pointer); };
        attend<T, C, W>(pool, joined + first * (s.group + 2) * s.key_heads * W, of(layer.cos) + first * W, of(layer.sin) + first * W,
                        of(layer.query_norm), of(layer.key_norm), layer.eps, static_cast<C*>(s.keys[number * s.pool_count + i]),
                        static_cast<C*>(s.values[number * s.pool_count + i]), out + first * s.group * s.key_heads * W, s.key_heads,
                        s.group, layer.window, layer.scale, scores);
        first += pool.rows;
    }
}

// The keys and values that this thread's share of a layer's attention reads, to be asked for in their order.
template <class T>
void ask_for_rows(const Step& s, int64_t number, Ahead& ahead) {
    ahead.clear();
    if (number == s.depth) return;
    const int64_t size = s.small ? s.width + int64_t(sizeof(float)) : s.width * int64_t(sizeof(T)), team = omp_get_num_threads();
    for (int64_t i = 0; i < s.pool_count; i++) {
        const Pool& pool = s.pools[i];
        const char *keys = static_cast<const char*>(s.keys[number * s.pool_count + i]),
                   *values = static_cast<const char*>(s.values[number * s.pool_count + i]);
        for (int64_t one = omp_get_thread_num(); one < pool.rows * s.key_heads; one += team) {
            const int64_t seen = pool.past[one / s.key_heads], window = s.layers[number].window;
            const int64_t low = window ? std::max<int64_t>(0, seen + 1 - window) : 0;
            for (const char* side : {keys, values}) ahead.add(side + (one * pool.slot + low) * size, (seen - low) * size);
        }
    }
}

// The query and key heads of rows [rows, (heads + others) * W], normed and turned where they stand.
template <class T, int W>
void turn_rows(T* joined, const T* cos, const T* sin, const T* query_norm, const T* key_norm, float eps, int64_t rows, int64_t queries,
               int64_t keys, int threads) {
#pragma omp parallel for num_threads(crew(threads, rows*(queries + keys) * W)) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < queries + keys; i++) {
            T turned[W], *at = joined + (row * (queries + 2 * keys) + i) * W;
            head<T, W>(at, i < queries ? query_norm : key_norm, eps, cos + row * W, sin + row * W, turned);
            std::memcpy(at, turned, sizeof(turned));
        }
}

#define BY_WIDTH(FUNCTION, ...)                       \
    switch (width) {                                  \
        case 16: return FUNCTION<__VA_ARGS__, 16>;    \
        case 32: return FUNCTION<__VA_ARGS__, 32>;    \
        case 64: return FUNCTION<__VA_ARGS__, 64>;    \
        case 96: return FUNCTION<__VA_ARGS__, 96>;    \
        case 128: return FUNCTION<__VA_ARGS__, 128>;  \
        default: return FUNCTION<__VA_ARGS__, 256>;   \
    }

template <class T, class C>
auto attention_for(int64_t width) {
    BY_WIDTH(attend_pools, T, C)
}

template <class T>
auto turning_for(int64_t width) {
    BY_WIDTH(turn_rows, T)
}

template <class T>
auto keeping_for(int64_t width) {
    BY_WIDTH(keep_rows, T)
}

template <class T, class C>
auto prompts_for(int64_t width) {
    BY_WIDTH(attend_rows, T, C)
}

template <class T>
void step(const Step& s) {
    const Layer& top = s.layers[0];
    const int64_t heads = s.group * s.key_heads * s.width, joined_width = top.product[0].outputs, inner = top.product[3].inputs;
    int64_t ranks = 0;
    for (int64_t i = 0; i < s.depth; i++)
        for (const Lora& lora : s.layers[i].lora) ranks = std::max(ranks, lora.a ? lora.ranks : 0);
    const int64_t widest = std::max({s.hidden, heads, inner}), room_for_scores = 2 * MOST_GROUPED * (s.longest + L);
    Room room({s.rows * widest * int64_t(sizeof(T)), s.rows * joined_width * int64_t(sizeof(T)), s.rows * inner * int64_t(sizeof(T)),
               s.rows * widest, s.rows * 4, s.rows * ranks * 4, s.threads * room_for_scores * 4});
    T *values = room.take<T>(), *joined = room.take<T>(), *gated = room.take<T>();
    uint8_t* bytes = room.take<uint8_t>();
    float *scale = room.take<float>(), *small = room.take<float>(), *scores = room.take<float>();
    auto attention = s.small ? attention_for<T, int8_t>(s.width) : attention_for<T, T>(s.width);

#pragma omp parallel num_threads(int(s.threads))
    {
        float* own_scores = scores + omp_get_thread_num() * room_for_scores;
        Ahead ahead;
        auto norm_rows = [&](const void* weight, float eps, const Product& product, const Lora& lora) {
            const T* times = static_cast<const T*>(weight);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.rows; row++) {
                float* x = s.x + row * s.hidden;
                T* to = values + row * s.hidden;
                const float inverse = inverse_rms(x, eps, s.hidden);
                each(s.hidden, [&](int64_t i, auto read, auto write) { write(to + i, rounded<T>(read(x + i) * inverse) * read(times + i)); });
                prepare(to, row, product, lora, s.places, bytes, scale, small);
            }
        };
        auto prepare_rows = [&](const T* rows, const Product& product, const Lora& lora) {
            if (!product.scale && !lora.a) return;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s.rows; row++) prepare(rows + row * product.inputs, row, product, lora, s.places, bytes, scale, small);
        };
        auto run = [&](const Layer& layer, int which, const T* rows, auto out) {
            const Product& product = layer.product[which];
            const Input input = product.scale ? Input{bytes, scale} : Input{rows, nullptr};
            const Product* next = which < 3 ? &product + 1 : &layer + 1 < s.layers + s.depth ? (&layer + 1)->product : nullptr;
            multiply<T>(product, input, s.rows, s.multiply, &layer.lora[which], s.places, small, out, next, &ahead);
#pragma omp barrier
        };
        auto add = [&](int64_t row, int64_t column, Vec value, int64_t) {
            float* x = s.x + row * s.hidden + column;
            store(x, load(x) + rounded<T>(value));
        };
        for (int64_t i = 0; i < s.depth; i++) {
            const Layer& layer = s.layers[i];
            norm_rows(layer.first_norm, layer.eps, layer.product[0], layer.lora[0]);
            run(layer, 0, values, [&](int64_t row, int64_t column, Vec value, int64_t) { store(joined + row * joined_width + column, value); });
            attention(s, layer, i, joined, values, own_scores);
#pragma omp barrier
            ask_for_rows<T>(s, i + 1, ahead);
            prepare_rows(values, layer.product[1], layer.lora[1]);
            run(layer, 1, values, add);
            norm_rows(layer.second_norm, layer.eps, layer.product[2], layer.lora[2]);
            run(layer, 2, values, Gate<T>{gated, inner, {}});
            prepare_rows(gated, layer.product[3], layer.lora[3]);
            run(layer, 3, gated, add);
        }
        s.release(true);
    }
}

enum Kind { NARROW, WIDE, ACTIVE };

// x W^T + bias [rows, outputs]: in T; with the values of T in fp32; or of a gated product silu(first half) * second half, in T.
template <class T>
void product(const Product& product, const T* x, void* out, int64_t kind, int64_t rows, const Lora* given, const int64_t* places,
             Multiply call, Release release, int threads) {
    const Lora lora = given ? *given : Lora{};
    Room room({product.scale ? rows * product.inputs : 0, product.scale ? rows * 4 : 0, rows * lora.ranks * 4});
    uint8_t* bytes = room.take<uint8_t>();
    float *scale = room.take<float>(), *small = room.take<float>();
    const Input input = product.scale ? Input{bytes, scale} : Input{x, nullptr};
    T* narrow = static_cast<T*>(out);
#pragma omp parallel num_threads(threads)
    {
        auto run = [&](auto out) { multiply<T>(product, input, rows, call, &lora, places, small, out); };
        if (product.scale || lora.a) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) prepare(x + row * product.inputs, row, product, lora, places, bytes, scale, small);
        }
        if (kind == NARROW) {
            run([&](int64_t row, int64_t column, Vec value, int64_t left) { store_some(narrow + row * product.outputs + column, value, left); });
        } else if (kind == WIDE) {
            float* wide = static_cast<float*>(out);
            run([&](int64_t row, int64_t column, Vec value, int64_t left) {
                store_some(wide + row * product.outputs + column, rounded<T>(value), left);
            });
        } else {
            run(Gate<T>{narrow, product.outputs / 2, {}});
        }
        release(true);
    }
}

}  // namespace

#define EACH(T, NAME)                                                                                                                 \
    extern "C" void step_##NAME(const Step* s) { step<T>(*s); }                                                                       \
    extern "C" void product_##NAME(const Product* p, const T* x, void* out, int64_t kind, int64_t rows, const Lora* lora,             \
                                   const int64_t* places, Multiply call, Release release, int threads) {                              \
        product<T>(*p, x, out, kind, rows, lora, places, call, release, threads);                                                     \
    }                                                                                                                                 \
    extern "C" void turn_rows_##NAME(T* joined, const T* cos, const T* sin, const T* query_norm, const T* key_norm, float eps,        \
                                     int64_t rows, int64_t queries, int64_t keys, int64_t width, int threads) {                       \
        turning_for<T>(width)(joined, cos, sin, query_norm, key_norm, eps, rows, queries, keys, threads);                             \
    }                                                                                                                                 \
    extern "C" void keep_rows_##NAME(const T* from, int64_t stride, const Slot* slots, int64_t count, int64_t key_heads,              \
                                     int64_t width, int64_t small, int threads) {                                                     \
        keeping_for<T>(width)(from, stride, slots, count, key_heads, small, threads);                                                 \
    }                                                                                                                                 \
    extern "C" void attend_rows_##NAME(const T* query, int64_t stride, const Slot* keys, const Slot* values, int64_t count,           \
                                       int64_t key_heads, int64_t group, int64_t width, int64_t window, float scale, T* out,          \
                                       int64_t small, Multiply call, Release release, int threads) {                                  \
        auto attend = small ? prompts_for<T, int8_t>(width) : prompts_for<T, T>(width);                                               \
        attend(query, stride, keys, values, count, key_heads, group, window, scale, out, call, release, threads);                     \
    }

EACH(float, float32)
EACH(bf16, bfloat16)

// Whether weights in 8 bits, or in bf16, lie in strips.
extern "C" int strips_for(int small) { return in_strips(small); }

// Whether this processor can multiply in this way at all: 0 where PyTorch refuses.
extern "C" int can_multiply(Multiply call, Release release, int64_t paired) {
    alignas(64) char a[64 * 64 * 4] = {}, b[64 * 64 * 4] = {}, c[64 * 64 * 4];
    try {
        call(8, B, 64, 64, B, B, false, a, b, c, paired);
        release(paired);
        return 1;
    } catch (...) {
        return 0;
    }
}
