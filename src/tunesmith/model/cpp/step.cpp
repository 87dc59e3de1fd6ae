// Products with weights in blocks, and all decoder layers of a sampling step in one go; the arithmetic of cached_layer.py.
//
// Everything around the products happens to a block's outputs while they are in the cache (blocks.h). native.py says what every field is.
#include "blocks.h"
#include "heads.h"

namespace {

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
        auto add = [x = s.x, hidden = s.hidden](int64_t row, int64_t column, Vec value, int64_t) {
            float* at = x + row * hidden + column;
            store(at, load(at) + rounded<T>(value));
        };
        auto join = [joined, joined_width](int64_t row, int64_t column, Vec value, int64_t) { store(joined + row * joined_width + column, value); };
        for (int64_t i = 0; i < s.depth; i++) {
            const Layer& layer = s.layers[i];
            norm_rows(layer.first_norm, layer.eps, layer.product[0], layer.lora[0]);
            run(layer, 0, values, join);
            attention(s, layer, i, joined, values, own_scores);
#pragma omp barrier
            ask_for_rows<T>(s, i + 1, ahead);
            prepare_rows(values, layer.product[1], layer.lora[1]);
            run(layer, 1, values, add);
            norm_rows(layer.second_norm, layer.eps, layer.product[2], layer.lora[2]);
            run(layer, 2, values, Gate<T>{gated, inner});
            prepare_rows(gated, layer.product[3], layer.lora[3]);
            run(layer, 3, gated, add);
        }
        s.release(true);
    }
}

enum Kind { NARROW, WIDE, ACTIVE, ONTO };

// x W^T + bias [rows, outputs]: in T; with the values of T in fp32; of a gated product silu(first half) * second half, in T; or with the
// values of T added to what is there in fp32, for whole vectors of outputs.
template <class T>
void product(const Product& product, const T* x, void* out, int64_t kind, int64_t rows, const Lora* given, const int64_t* places,
             Multiply call, Release release, int threads) {
    const Lora lora = given ? *given : Lora{};
    Room room({product.scale ? rows * product.inputs : 0, product.scale ? rows * 4 : 0, rows * lora.ranks * 4});
    uint8_t* bytes = room.take<uint8_t>();
    float *scale = room.take<float>(), *small = room.take<float>();
    const Input input = product.scale ? Input{bytes, scale} : Input{x, nullptr};
    T* narrow = static_cast<T*>(out);
    const int64_t width = product.outputs;
#pragma omp parallel num_threads(threads)
    {
        auto run = [&](auto out) { multiply<T>(product, input, rows, call, &lora, places, small, out); };
        if (product.scale || lora.a) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++) prepare(x + row * product.inputs, row, product, lora, places, bytes, scale, small);
        }
        if (kind == NARROW) {
            run([narrow, width](int64_t row, int64_t column, Vec value, int64_t left) { store_some(narrow + row * width + column, value, left); });
        } else if (kind == WIDE) {
            float* wide = static_cast<float*>(out);
            run([wide, width](int64_t row, int64_t column, Vec value, int64_t left) {
                store_some(wide + row * width + column, rounded<T>(value), left);
            });
        } else if (kind == ACTIVE) {
            run(Gate<T>{narrow, product.outputs / 2});
        } else {
            float* sum = static_cast<float*>(out);
            run([sum, width](int64_t row, int64_t column, Vec value, int64_t) {
                float* at = sum + row * width + column;
                store(at, load(at) + rounded<T>(value));
            });
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
