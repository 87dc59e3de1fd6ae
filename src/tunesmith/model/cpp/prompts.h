// Attention of the new tokens of prompts over the keys and values that the cache keeps of their rows.
//
// A head's keys and values are laid out once for oneDNN's small product (`Multiply`), 64 of them a block, so that its shapes are two
// for a model whatever the lengths. Scores of some tokens over all that they see are held at once; weights are rounded to T, sums are not.
#pragma once
#include <vector>

#include "attention.h"
#include "room.h"

namespace {

typedef void (*Multiply)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* a, const void* b,
                         void* c, bool paired);
typedef void (*Release)(bool paired);

constexpr int64_t SEEN = 64;           // keys of a block
constexpr int64_t QUERIES = 64;        // rows of scores, about: some tokens of all heads on a key head
constexpr int64_t LAID_OUT = 8 << 20;  // bytes of keys and values that are laid out at once

// A prompt's row of the cache: where its slot begins, how many positions that has, and which of the new tokens go where.
struct Slot {
    void* at;
    int64_t width, past, first, count;
};

// Keys or values [tokens, key heads, W], `stride` numbers from token to token, into the slots of their rows.
template <class T, int W>
void keep_rows(const T* from, int64_t stride, const Slot* slots, int64_t count, int64_t key_heads, int64_t small, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < key_heads; k++) {
            const Slot& slot = slots[i];
            const T* row = from + slot.first * stride + k * W;
            const int64_t place = k * slot.width + slot.past;
            for (int64_t t = 0; t < slot.count; t++, row += stride)
                if (small)
                    keep<T, W>(row, static_cast<int8_t*>(slot.at) + (place + t) * PITCH_OF<int8_t, W>);
                else
                    keep<T, W>(row, static_cast<T*>(slot.at) + (place + t) * W);
        }
}

// A kept row as numbers of T.
template <class T, class C, int W>
inline void read_row(const C* from, T* to) {
    if constexpr (SMALL_OF<C>) {
        float step;
        std::memcpy(&step, from + W, sizeof(step));
        for (int i = 0; i < W; i += L) store(to + i, load(from + i) * step);
    } else {
        std::memcpy(to, from, W * sizeof(T));
    }
}

// A block of at most 64 kept rows: as columns [W, 64], or as they are [64, W]; in bf16 two numbers that meet two of the other side lie
// side by side. What is missing is 0.
template <class T, class C, int W, bool COLUMNS>
void lay_out(const C* from, int64_t count, T* to) {
    constexpr int64_t pair = 4 / sizeof(T);
    T row[W];
    for (int64_t t = 0; t < SEEN; t++) {
        if (t < count)
            read_row<T, C, W>(from + t * PITCH_OF<C, W>, row);
        else
            std::memset(row, 0, sizeof(row));
        if (COLUMNS)
            for (int64_t i = 0; i < W; i += pair) std::memcpy(to + i * SEEN + t * pair, row + i, pair * sizeof(T));
        else
            for (int64_t i = 0; i < W; i++) to[(t / pair * W + i) * pair + t % pair] = row[i];
    }
}

// Softmax of a row of scores over the keys from `begin` to `end`, without its division: shares in T into `to`, which lies like the scores, in
// blocks `apart` numbers from each other, those from `low` to `high`; their sum is returned.
template <class T>
float soften_row(const float* scores, T* to, int64_t apart, int64_t begin, int64_t end, int64_t low, int64_t high, float scale) {
    const float none = -std::numeric_limits<float>::infinity();
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    auto at = [&](int64_t key) { return (key / SEEN - low) * apart + key % SEEN; };
    auto seen = [&](int64_t key) {
        Vec score = load(scores + at(key)) * scale;
        if (key >= begin && key + L <= end) return score;
        const Ints place = lane + int32_t(key);
        return (place >= int32_t(begin)) & (place < int32_t(end)) ? score : all(none);
    };
    Vec most = all(none), sum{};
    for (int64_t key = begin / L * L; key < end; key += L) {
        Vec next = seen(key);
        most = next > most ? next : most;
    }
    const float top = most_of(most);
    for (int64_t key = low * SEEN; key < high * SEEN; key += L) {
        Vec share{};
        if (key + L > begin && key < end) share = exponential(seen(key) - top);
        sum += share;
        store(to + at(key), share);
    }
    return sum_of(sum);
}

// `query` [tokens, key heads * group, W], `stride` numbers from token to token, to `out` [tokens, key heads * group * W].
template <class T, class C, int W>
void attend_rows(const T* query, int64_t stride, const Slot* keys, const Slot* values, int64_t count, int64_t key_heads, int64_t group,
                 int64_t window, float scale, T* out, Multiply call, Release release, int threads) {
    const int64_t tokens = std::max<int64_t>(1, QUERIES / group), m = tokens * group;
    auto blocks_of = [&](int64_t i) { return (keys[i].past + keys[i].count + SEEN - 1) / SEEN; };
    const int64_t each = SEEN * W;  // numbers of a block
    for (int64_t first = 0, last = 0; first < count; first = last) {
        struct Work {
            int64_t slot, head, from, laid;
        };
        std::vector<Work> layouts, works;
        int64_t laid = 0, longest = 0;
        for (; last < count && (last == first || (laid + blocks_of(last) * key_heads) * each * 2 * int64_t(sizeof(T)) <= LAID_OUT); last++) {
            longest = std::max(longest, blocks_of(last));
            for (int64_t k = 0; k < key_heads; k++, laid += blocks_of(last)) {
                for (int64_t b = 0; b < blocks_of(last); b++) layouts.push_back({last, k, b, laid + b});
                for (int64_t t = 0; t < keys[last].count; t += tokens) works.push_back({last, k, t, laid});
            }
        }
        const int64_t scored = m * longest * SEEN, summed = (m + L - 1) / L * L;
        const int64_t own = (scored + m * W + summed) * 4 + (scored + m * W) * int64_t(sizeof(T)), apart = (own + 63) / 64 * 64;
        Room room({laid * each * int64_t(sizeof(T)), laid * each * int64_t(sizeof(T)), threads * apart});
        T *all_keys = room.take<T>(), *all_values = room.take<T>();
        char* rest = room.take<char>();
#pragma omp parallel num_threads(threads)
        {
            float* scores = reinterpret_cast<float*>(rest + omp_get_thread_num() * apart);
            float *result = scores + scored, *sums = result + m * W;
            T *shares = reinterpret_cast<T*>(sums + summed), *rows = shares + scored;
#pragma omp for schedule(static)
            for (size_t number = 0; number < layouts.size(); number++) {
                const Work& one = layouts[number];
                const int64_t place = one.from * SEEN, left = keys[one.slot].past + keys[one.slot].count - place;
                const int64_t at = (one.head * keys[one.slot].width + place) * PITCH_OF<C, W>;
                lay_out<T, C, W, true>(static_cast<const C*>(keys[one.slot].at) + at, std::min(left, SEEN), all_keys + one.laid * each);
                lay_out<T, C, W, false>(static_cast<const C*>(values[one.slot].at) + at, std::min(left, SEEN), all_values + one.laid * each);
            }
#pragma omp for schedule(dynamic)
            for (size_t number = 0; number < works.size(); number++) {
                const Work& one = works[number];
                const Slot& slot = keys[one.slot];
                const int64_t here = std::min(tokens, slot.count - one.from), start = slot.past + one.from;
                const int64_t low = window ? std::max<int64_t>(0, start + 1 - window) / SEEN : 0, high = (start + here + SEEN - 1) / SEEN;
                for (int64_t t = 0; t < here; t++)
                    std::memcpy(rows + t * group * W, query + (slot.first + one.from + t) * stride + one.head * group * W,
                                group * W * sizeof(T));
                std::memset(static_cast<void*>(rows + here * group * W), 0, (tokens - here) * group * W * sizeof(T));
                for (int64_t b = low; b < high; b++)
                    call(m, SEEN, W, W, SEEN, SEEN, false, rows, all_keys + (one.laid + b) * each, scores + (b - low) * m * SEEN, sizeof(T) == 2);
                for (int64_t r = 0; r < m; r++) {
                    const int64_t end = start + std::min(r / group, here - 1) + 1, begin = window ? std::max<int64_t>(0, end - window) : 0;
                    sums[r] = soften_row(scores + r * SEEN, shares + r * SEEN, m * SEEN, begin, end, low, high, scale);
                }
                for (int64_t b = low; b < high; b++)
                    call(m, W, SEEN, SEEN, W, W, b > low, shares + (b - low) * m * SEEN, all_values + (one.laid + b) * each, result,
                         sizeof(T) == 2);
                for (int64_t t = 0; t < here; t++)
                    for (int64_t g = 0; g < group; g++) {
                        const int64_t r = t * group + g;
                        T* to = out + ((slot.first + one.from + t) * key_heads + one.head) * group * W + g * W;
                        for (int64_t i = 0; i < W; i += L) store(to + i, load(result + r * W + i) * (1.0f / sums[r]));
                    }
            }
            release(true);
        }
    }
}

}  // namespace
