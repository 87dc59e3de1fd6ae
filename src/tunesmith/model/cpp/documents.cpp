// Attention of whole documents in bf16 and its gradients, in one call for all documents of a pass: no filler, no scores in memory.
//
// Up to 48 queries of a head stand side by side and the keys they see pass by, eight at a time: a score's row is a key, so that largest
// scores and sums are kept lane by lane, shares meet values and gradients as they were made, and nothing is turned but the results. The
// way back makes the shares once more from the logarithms of the sums (Dao 2022, arXiv:2205.14135, section 3).
#include "pairs.h"

namespace {

// What native.py fills in. Rows: of queries [rows, heads * width], of keys and values [tokens, keys * width], one stride each.
struct Documents {
    const bf16 *q, *k, *v;
    int64_t q_stride, kv_stride, keys, group, width, window, count;
    const int64_t* spans;  // of each document: first token and number of tokens, first row of queries and number of rows
    const int32_t* sight;  // of each row of queries: the keys 0 to `front` and from `begin` to `place`, counted from the document's start
    bf16* out;             // [rows, heads * width]
    float* logs;           // [rows, heads]: logarithm of the sum of e^score
    const bf16* d_out;
    bf16 *dq, *dk, *dv;
};

#ifdef PAIRS

constexpr int64_t PART = 32, KEYS = 128;  // numbers of a head at a time, keys whose shares are kept
constexpr int64_t SIDE = 16 * MOST;       // queries side by side, at most

// One document and one key head; `part` of `parts`, which share the document's queries in turn.
struct Work {
    const Documents& of;
    int64_t start, length, first_row, rows, head, part, parts;
    float* sums;  // on the way back: gradients of keys and of values [2, length, width]

    const int32_t* sight(int64_t row) const { return of.sight + 3 * (first_row + row); }
    int64_t front(int64_t row) const { return sight(row)[0]; }
    int64_t place(int64_t row) const { return sight(row)[2]; }
    int64_t begin(int64_t row) const { return std::max<int64_t>(sight(row)[1], of.window ? place(row) - of.window + 1 : 0); }
    int64_t at(int64_t row, int64_t g) const { return (first_row + row) * of.q_stride + (head * of.group + g) * of.width; }
    int64_t key() const { return start * of.kv_stride + head * of.width; }
    float& log(int64_t row, int64_t g) const { return of.logs[(first_row + row) * of.keys * of.group + head * of.group + g]; }
    Rows keys(const bf16* of_all, int64_t first) const {
        return {reinterpret_cast<const char*>(of_all + key() + first * of.kv_stride), 2 * of.kv_stride, 4, of.width / 2};
    }

    // Keys or values with their numbers as rows and tokens as depth: [width / 8] times [pairs of tokens, 8] pairs.
    void lay_turned(const bf16* of_all, __m256i* to) const {
        const Term term{of_all + key(), nullptr, of.kv_stride, 0, length, 1, 0, IN_BF16};
        for (int64_t i = 0; i < of.width; i += TALL) lay_rows(term, i, of.width, to + i / TALL * ((length + 1) / 2));
    }
};

// Some queries of a document, 16 * V at most, and which keys they see.
template <int V>
struct Panel {
    const Work& work;
    int64_t first, count, spans[2][2];    // keys in sight of any of them
    int64_t every_front, every_begin, every_place;  // keys that all of them see: 0 to the first, and from the second to the third
    Ints fronts[V], begins[V], places[V];

    Panel(const Work& work, int64_t first, int64_t count) : work(work), first(first), count(count) {
        int32_t told[3][16 * V];
        std::fill(told[0], told[2], 0), std::fill(told[2], told[2] + 16 * V, -1);
        int64_t most = 0, least = work.length, last = 0;
        every_front = every_place = work.length, every_begin = 0;
        for (int64_t i = 0; i < count; i++) {
            const int64_t front = work.front(first + i), begin = work.begin(first + i), place = work.place(first + i);
            told[0][i] = front, told[1][i] = begin, told[2][i] = place;
            most = std::max(most, front), least = std::min(least, begin), last = std::max(last, place + 1);
            every_front = std::min(every_front, front), every_begin = std::max(every_begin, begin);
            every_place = std::min(every_place, place + 1);
        }
        std::memcpy(fronts, told[0], sizeof(fronts)), std::memcpy(begins, told[1], sizeof(begins));
        std::memcpy(places, told[2], sizeof(places));
        most = std::min(last, (most + TALL - 1) / TALL * TALL), least = least / TALL * TALL;
        const bool whole = most >= least;
        spans[0][0] = 0, spans[0][1] = whole ? 0 : most, spans[1][0] = whole ? 0 : least, spans[1][1] = last;
    }

    bool sees_all(int64_t key, int64_t end) const { return end <= every_front || (key >= every_begin && end <= every_place); }
    __mmask16 seen(int64_t key, int v) const {
        const __m512i at = _mm512_set1_epi32(int32_t(key));
        return _mm512_cmplt_epi32_mask(at, as<__m512i>(fronts[v])) |
               (_mm512_cmple_epi32_mask(as<__m512i>(begins[v]), at) & _mm512_cmple_epi32_mask(at, as<__m512i>(places[v])));
    }

    // `each(first, end)` for all keys in sight, KEYS at most at a time.
    template <class Each>
    void keys(Each each) const {
        for (const auto& span : spans)
            for (int64_t key = span[0]; key < span[1]; key += KEYS) each(key, std::min(span[1], key + KEYS));
    }

    // Queries, or the gradient of their outputs, as columns [width / 2, 16 * V] of pairs, for scores.
    void lay_columns(const bf16* of_all, int64_t g, __m512i* to) const {
        lay_panel(of_all + work.at(first, g), Term{nullptr, nullptr, 0, work.of.q_stride, work.of.width, 0, 1, IN_BF16}, 0, count, V, to);
    }

    // The same rows of all heads as depth, for sums over queries: parts of 32 numbers, each [group * 8 * V pairs of rows, 32] pairs.
    void lay_depth(const bf16* of_all, __m512i* to) const {
        const Term term{nullptr, nullptr, 0, work.of.q_stride, count, 0, 0, IN_BF16};
        const int64_t laid = (count + 1) / 2;
        for (int64_t part = 0; part < work.of.width / PART; part++)
            for (int64_t g = 0; g < work.of.group; g++, to += 16 * V) {
                lay_panel(of_all + work.at(first, g), term, part * PART, work.of.width, 2, to);
                std::fill(to + 2 * laid, to + 16 * V, _mm512_setzero_si512());
            }
    }

    // scores [keys, 16 * V] of the keys (or values) `key` to `end`, eight at most.
    void score(const bf16* of_all, int64_t key, int64_t end, const __m512i* columns, float* to) const {
        const Rows rows = work.keys(of_all, key);
        block_of<V>(end - key)(&rows, 1, 0, columns, 0, Out{to, 16 * V, 16 * V, WIDE, 1.0f, nullptr, nullptr});
    }

    // sums [width, 16 * V] += keys or values that lie turned, from `key` to `end`, times shares [pairs of keys, 16 * V].
    void add(const __m256i* turned, int64_t key, int64_t end, const __m512i* shares, float* sums) const {
        for (int64_t i = 0; i < work.of.width; i += TALL, turned += (work.length + 1) / 2, sums += TALL * 16 * V) {
            const Rows rows{reinterpret_cast<const char*>(turned + key / 2), 4, 4 * TALL, (end - key + 1) / 2};
            block_of<V>(TALL)(&rows, 1, 0, shares, 0, Out{sums, 16 * V, 16 * V, ADD, 1.0f, nullptr, sums});
        }
    }

    // Sums [width, 16 * V] times `times` to rows of queries.
    void put(const float* sums, const Vec* times, bf16* of_all, int64_t g) const {
        for (int64_t i = 0; i < work.of.width; i += L)
            for (int v = 0; v < V; v++) {
                __m512i square[L];
                for (int r = 0; r < L; r++) square[r] = as<__m512i>(load(sums + (i + r) * 16 * V + v * L) * times[v]);
                turn_square(square);
                for (int64_t r = 0; r < std::min<int64_t>(L, count - v * L); r++)
                    store(of_all + work.at(first + v * L + r, g) + i, as<Vec>(square[r]));
            }
    }
};

const Vec NONE = all(-std::numeric_limits<float>::infinity());

inline Vec only(Vec value, __mmask16 seen, Vec other) {
    return as<Vec>(_mm512_mask_mov_ps(as<__m512>(other), seen, as<__m512>(value)));
}

constexpr float FOLD = 1.44269504088896341f;  // of 2

// 2^x by its whole part and a polynomial in the rest, which is off by less than 2e-7; half the work of `exponential`, 0 for minus infinity.
inline Vec power_of_two(Vec x) {
    const Vec r = as<Vec>(_mm512_reduce_ps(as<__m512>(x), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    Vec p = all(1.8775766705e-3f);
    p = p * r + 8.9893403402e-3f;
    p = p * r + 5.5826317588e-2f;
    p = p * r + 2.4015361733e-1f;
    p = p * r + 6.9315307314e-1f;
    p = p * r + 9.9999992507e-1f;
    return as<Vec>(_mm512_scalef_ps(as<__m512>(p), as<__m512>(x)));
}

inline Vec larger(Vec one, Vec other) { return as<Vec>(_mm512_max_ps(as<__m512>(one), as<__m512>(other))); }

inline __m512i paired(Vec even, Vec odd) { return joined(as<__m256i>(narrowed(even)), as<__m256i>(narrowed(odd))); }

template <int V>
void attend(const Work& work, int64_t first, int64_t count, const __m256i* values, char* room) {
    const Documents& of = work.of;
    const Panel<V> panel(work, first, count);
    __m512i *columns = reinterpret_cast<__m512i*>(room), *shares = columns + of.width / 2 * V;
    float *scores = reinterpret_cast<float*>(shares + KEYS / 2 * V), *sums = scores + KEYS * 16 * V;
    for (int64_t g = 0; g < of.group; g++) {
        panel.lay_columns(of.q, g, columns);
        std::fill(sums, sums + of.width * 16 * V, 0.0f);
        Vec top[V], total[V];
        for (int v = 0; v < V; v++) top[v] = all(-1e30f), total[v] = Vec{};
        panel.keys([&](int64_t low, int64_t high) {
            Vec most[V];
            std::copy(top, top + V, most);
            for (int64_t key = low; key < high; key += TALL) {
                const int64_t end = std::min(high, key + TALL);
                float* at = scores + (key - low) * 16 * V;
                panel.score(of.k, key, end, columns, at);
                const bool every = panel.sees_all(key, end);
                for (int64_t j = key; j < end; j++)
                    for (int v = 0; v < V; v++, at += L) {
                        Vec score = load(at);
                        if (!every) store(at, score = only(score, panel.seen(j, v), NONE));
                        most[v] = larger(score, most[v]);
                    }
            }
            for (int v = 0; v < V; v++) {
                const Vec times = exponential(top[v] - most[v]);
                if (_mm512_cmp_ps_mask(as<__m512>(top[v]), as<__m512>(most[v]), _CMP_NEQ_UQ)) {
                    total[v] *= times;
                    for (int64_t i = 0; i < of.width; i++) store(sums + (i * V + v) * L, load(sums + (i * V + v) * L) * times);
                }
                top[v] = most[v], most[v] *= FOLD;
            }
            for (int64_t j = 0; j < high - low; j += 2)
                for (int v = 0; v < V; v++) {
                    const float* at = scores + (j * V + v) * L;
                    const Vec even = power_of_two(load(at) * FOLD - most[v]);
                    const Vec odd = j + 1 < high - low ? power_of_two(load(at + V * L) * FOLD - most[v]) : Vec{};
                    total[v] += even + odd;
                    shares[j / 2 * V + v] = paired(even, odd);
                }
            panel.add(values, low, high, shares, sums);
        });
        Vec times[V];
        for (int v = 0; v < V; v++) {
            times[v] = 1.0f / total[v];
            for (int64_t i = v * L; i < std::min<int64_t>(count, v * L + L); i++)
                work.log(first + i, g) = top[v][i - v * L] + std::log(total[v][i - v * L]);
        }
        panel.put(sums, times, of.out, g);
    }
}

template <int V>
void attend_back(const Work& work, int64_t first, int64_t count, const __m256i* keys, char* room) {
    const Documents& of = work.of;
    const Panel<V> panel(work, first, count);
    const int64_t group = of.group, width = of.width, depth = group * 8 * V, pitch = group * 16 * V;
    __m512i *columns = reinterpret_cast<__m512i*>(room), *d_columns = columns + group * width / 2 * V;
    __m512i *rows = d_columns + group * width / 2 * V, *d_rows = rows + depth * width / 16;
    __m512i* paired_slopes = d_rows + depth * width / 16;
    float *sums = reinterpret_cast<float*>(paired_slopes + group * KEYS / 2 * V), *stats = sums + group * width * 16 * V;
    float *scores = stats + 2 * pitch, *d_shares = scores + TALL * 16 * V;
    bf16 *shares = reinterpret_cast<bf16*>(d_shares + TALL * 16 * V), *slopes = shares + TALL * pitch;
    panel.lay_depth(of.q, rows);
    panel.lay_depth(of.d_out, d_rows);
    std::fill(sums, stats + 2 * pitch, 0.0f);
    for (int64_t g = 0; g < group; g++) {
        panel.lay_columns(of.q, g, columns + g * width / 2 * V);
        panel.lay_columns(of.d_out, g, d_columns + g * width / 2 * V);
        for (int64_t i = 0; i < count; i++) {
            const bf16 *o = of.out + work.at(first + i, g), *d = of.d_out + work.at(first + i, g);
            Vec both{};
            for (int64_t j = 0; j < width; j += L) both += load(o + j) * load(d + j);
            stats[g * 16 * V + i] = work.log(first + i, g), stats[pitch + g * 16 * V + i] = sum_of(both);
        }
    }
    panel.keys([&](int64_t low, int64_t high) {
        for (int64_t key = low; key < high; key += TALL) {
            const int64_t end = std::min(high, key + TALL);
            const bool every = panel.sees_all(key, end);
            for (int64_t g = 0; g < group; g++) {
                panel.score(of.k, key, end, columns + g * width / 2 * V, scores);
                panel.score(of.v, key, end, d_columns + g * width / 2 * V, d_shares);
                for (int v = 0; v < V; v++) {
                    const Vec log = load(stats + (g * V + v) * L) * FOLD, mean = load(stats + pitch + (g * V + v) * L);
                    auto slope = [&](int64_t j) {
                        if (key + j >= end) return Vec{};
                        const int64_t at = (j * V + v) * L, to = j * pitch + (g * V + v) * L;
                        Vec share = power_of_two(load(scores + at) * FOLD - log);
                        if (!every) share = only(share, panel.seen(key + j, v), Vec{});
                        const Vec out = share * (load(d_shares + at) - mean);
                        store(shares + to, share), store(slopes + to, out);
                        return out;
                    };
                    for (int64_t j = 0; j < end - key; j += 2) {
                        const Vec even = slope(j);
                        paired_slopes[(g * KEYS / 2 + (key - low + j) / 2) * V + v] = paired(even, slope(j + 1));
                    }
                }
            }
            for (int side = 0; side < 2; side++) {
                const Rows from{reinterpret_cast<const char*>(side ? shares : slopes), 2 * pitch, 4, depth};
                float* to = work.sums + (side * work.length + key) * width;
                for (int64_t part = 0; part < width / PART; part++, to += PART)
                    block_of<2>(end - key)(&from, 1, 0, (side ? d_rows : rows) + part * depth * 2, 0, Out{to, width, PART, ADD, 1.0f, nullptr, to});
            }
        }
        for (int64_t g = 0; g < group; g++)
            panel.add(keys, low, high, paired_slopes + g * KEYS / 2 * V, sums + g * width * 16 * V);
    });
    Vec ones[V];
    for (Vec& one : ones) one = all(1.0f);
    for (int64_t g = 0; g < group; g++) panel.put(sums + g * width * 16 * V, ones, of.dq, g);
}

int64_t room_of(const Documents& of, bool back) {
    const int64_t vectors = back ? of.group * (3 * of.width + KEYS / 2 + 2 + TALL) + 2 * TALL : 3 * of.width / 2 + KEYS / 2 + KEYS;
    return 64 * MOST * vectors;
}

void run(const Work& work, bool back) {
    const Documents& of = work.of;
    const int64_t laid = of.width / TALL * ((work.length + 1) / 2) * 32;
    char* room = Shelf<2>::of(laid + 64 + room_of(of, back));
    __m256i* turned = reinterpret_cast<__m256i*>(room);
    work.lay_turned(back ? of.k : of.v, turned);
    room += (laid + 63) / 64 * 64;
    if (back) std::fill(work.sums, work.sums + 2 * work.length * of.width, 0.0f);
    for (int64_t first = work.part * SIDE; first < work.rows; first += work.parts * SIDE) {
        const int64_t count = std::min(SIDE, work.rows - first);
        if (count > 32)
            (back ? attend_back<3> : attend<3>)(work, first, count, turned, room);
        else if (count > 16)
            (back ? attend_back<2> : attend<2>)(work, first, count, turned, room);
        else
            (back ? attend_back<1> : attend<1>)(work, first, count, turned, room);
    }
}

#endif

}  // namespace

extern "C" void attend_documents(const Documents* documents, int64_t back, int threads) {
#ifdef PAIRS
    const Documents& of = *documents;
    const int64_t items = of.count * of.keys;
    int64_t tokens = 0, parts = 1;
    for (int64_t i = 0; i < of.count; i++) tokens += of.spans[4 * i + 1];
    // Few long documents are shared by more threads than they have key heads.
    while (parts < 4 && items * parts < 4 * threads && items * parts % threads) parts++;
    const int64_t size = 2 * tokens * of.keys * of.width;  // all gradients of keys and values
    float* sums = back ? reinterpret_cast<float*>(Shelf<3>::of(parts * size * 4)) : nullptr;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items * parts; item++) {
            const int64_t head = item / parts % of.keys, *span = of.spans + item / parts / of.keys * 4;
            float* own = sums + item % parts * size + 2 * (span[0] * of.keys + head * span[1]) * of.width;
            run(Work{of, span[0], span[1], span[2], span[3], head, item % parts, parts, own}, back);
        }
        if (back)
#pragma omp for schedule(static)
            for (int64_t item = 0; item < items; item++) {
                const int64_t head = item % of.keys, *span = of.spans + item / of.keys * 4;
                for (int64_t i = 0; i < 2 * span[1] * of.width; i += L) {
                    const int64_t side = i / (span[1] * of.width), token = i / of.width % span[1];
                    const float* own = sums + 2 * (span[0] * of.keys + head * span[1]) * of.width + i;
                    Vec sum = load(own);
                    for (int64_t part = 1; part < parts; part++) sum += load(own + part * size);
                    store((side ? of.dv : of.dk) + (span[0] + token) * of.kv_stride + head * of.width + i % of.width, sum);
                }
            }
    }
#endif
}
