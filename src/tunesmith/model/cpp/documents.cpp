// Attention of whole documents in bf16 and its gradients, in one call for all documents of a pass: no filler, no scores in memory.
//
// A piece of work is a document and a key head. Eight rows of a query head meet the keys they may see; their scores, softmax and weighted
// values stay in the cache, and the way back makes them once more from the logarithms of the sums (Dao 2022, arXiv:2205.14135, section 3).
#include "pairs.h"

namespace {

// What native.py fills in. Rows of tokens: queries [tokens, heads * width], keys and values [tokens, keys * width], one stride each.
struct Documents {
    const bf16 *q, *k, *v;
    int64_t q_stride, kv_stride, keys, group, width, window, count;
    const int64_t* spans;  // first token and length of each document
    const int32_t* sight;  // of each token: keys 0 to `front` and from `begin` to itself, counted from the document's start
    bf16* out;             // [tokens, heads * width]
    float* logs;           // [tokens, heads]: logarithm of the sum of e^score
    const bf16* d_out;
    bf16 *dq, *dk, *dv;
};

#ifdef PAIRS

constexpr int64_t PANEL = 16 * MOST, PART = 32, CHUNK = 64;  // keys of a panel, numbers of a head at a time, rows whose shares are kept

struct Sight {  // keys in whole panels: 0 to `front` and `begin` to `end`; between them lies nothing that a row sees
    int64_t front, begin, end;
    bool holds(int64_t place) const { return place < front || (place >= begin && place < end); }
};

// One document and one key head.
struct Work {
    const Documents& of;
    int64_t start, length, head;

    int64_t front(int64_t i) const { return of.sight[2 * (start + i)]; }
    int64_t begin(int64_t i) const { return std::max<int64_t>(of.sight[2 * (start + i) + 1], of.window ? i - of.window + 1 : 0); }
    int64_t panels() const { return (length + PANEL - 1) / PANEL; }
    int64_t pitch() const { return panels() * PANEL + L; }  // no power of two: rows would meet in one set of the cache
    const bf16* query(const bf16* rows, int64_t i, int64_t g) const {
        return rows + (start + i) * of.q_stride + (head * of.group + g) * of.width;
    }
    const bf16* key(const bf16* rows) const { return rows + start * of.kv_stride + head * of.width; }

    Sight sight(int64_t first, int64_t last) const {
        int64_t most = 0, least = first;
        for (int64_t i = first; i < last; i++) most = std::max(most, front(i)), least = std::min(least, begin(i));
        Sight seen{(most + PANEL - 1) / PANEL * PANEL, least / PANEL * PANEL, (last + PANEL - 1) / PANEL * PANEL};
        if (seen.front >= seen.begin) seen.front = seen.begin = 0;
        return seen;
    }

    // Keys or values as columns, for scores: panels of 48 tokens, each [width / 2, 48] pairs.
    void lay_columns(const bf16* rows, __m512i* to) const {
        const Term term{nullptr, rows, 0, of.kv_stride, of.width, 0, 1, 0};
        for (int64_t p = 0; p < panels(); p++) lay_panel(key(rows), term, p * PANEL, length, MOST, to + p * of.width / 2 * MOST);
    }

    // Rows of tokens as depth, for sums over tokens: parts of 32 numbers, each [pairs of tokens, 32] pairs.
    void lay_depth(const bf16* rows, int64_t stride, int64_t count, __m512i* to) const {
        const Term term{nullptr, rows, 0, stride, count, 0, 0, 0};
        for (int64_t part = 0; part < of.width / PART; part++) lay_panel(rows, term, part * PART, of.width, 2, to + part * ((count + 1) / 2) * 2);
    }

    // scores [rows, pitch] in fp32 of some rows and panels of columns.
    void score(const bf16* rows, int64_t count, const Sight& seen, const __m512i* columns, float* to) const {
        const Rows from{reinterpret_cast<const char*>(rows), 2 * of.q_stride, 4, of.width / 2};
        for (int64_t first = 0; first < seen.end; first += PANEL) {
            if (!seen.holds(first)) continue;
            const Out out{to + first, pitch(), PANEL, WIDE, 1.0f, nullptr};
            block_of<3>(count)(&from, 1, columns + first / PANEL * of.width / 2 * MOST, 0, out);
        }
    }

    // out [rows, width] = shares [rows, pitch] times rows of tokens that lie as depth.
    void sum(const bf16* shares, int64_t count, const Sight& seen, const __m512i* depth, bf16* out) const {
        const int64_t pairs = (length + 1) / 2;
        for (int64_t part = 0; part < of.width / PART; part++) {
            const __m512i* panel = depth + part * pairs * 2;
            const int64_t last = std::min(seen.end / 2, pairs);
            // The terms of a block lie one behind the other, so that what lies between two of them is a call of its own.
            float wide[TALL * PART];
            const Out to{wide, PART, PART, WIDE, 1.0f, nullptr};
            const Rows far{reinterpret_cast<const char*>(shares + seen.begin), 2 * pitch(), 4, last - seen.begin / 2};
            block_of<2>(count)(&far, 1, panel + seen.begin, 0, to);
            if (seen.front) {
                const Rows near{reinterpret_cast<const char*>(shares), 2 * pitch(), 4, seen.front / 2};
                const Out more{wide, PART, PART, ADD, 1.0f, nullptr};
                block_of<2>(count)(&near, 1, panel, 0, more);
            }
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = 0; i < PART; i += L) store(out + r * of.q_stride + part * PART + i, load(wide + r * PART + i));
        }
    }

    // `work(place, seen)` for every 16 keys of the panels in sight, and which of them row i sees.
    template <class Each>
    void look(int64_t i, const Sight& seen, Each work) const {
        const int64_t near = front(i), far = begin(i);
        for (int64_t place = 0; place < seen.end; place += L) {
            if (!seen.holds(place)) continue;
            const bool every = place + L <= near || (place >= far && place + L <= i + 1);
            auto upto = [&](int64_t end) { return (1u << std::max<int64_t>(0, std::min<int64_t>(L, end - place))) - 1; };
            work(place, every ? __mmask16(~0) : __mmask16(upto(near) | (upto(i + 1) & ~upto(far))));
        }
    }
};

const __m512 NONE = _mm512_set1_ps(-std::numeric_limits<float>::infinity());

inline Vec only(Vec value, __mmask16 seen) { return as<Vec>(_mm512_maskz_mov_ps(seen, as<__m512>(value))); }

void attend(const Work& work) {
    const Documents& of = work.of;
    const int64_t pitch = work.pitch(), columns = work.panels() * of.width / 2 * MOST, depth = (work.length + 1) / 2 * (of.width / 16);
    __m512i* laid = reinterpret_cast<__m512i*>(Shelf<2>::of((columns + depth) * 64 + TALL * pitch * 6 + 64));
    __m512i *keys = laid, *values = laid + columns;
    float* scores = reinterpret_cast<float*>(values + depth);
    bf16* shares = reinterpret_cast<bf16*>(scores + TALL * pitch);
    work.lay_columns(of.k, keys);
    work.lay_depth(work.key(of.v), of.kv_stride, work.length, values);
    for (int64_t g = 0; g < of.group; g++)
        for (int64_t first = 0; first < work.length; first += TALL) {
            const int64_t count = std::min(TALL, work.length - first);
            const Sight seen = work.sight(first, first + count);
            work.score(work.query(of.q, first, g), count, seen, keys, scores);
            for (int64_t r = 0; r < count; r++) {
                float* row = scores + r * pitch;
                __m512 most = NONE;
                work.look(first + r, seen, [&](int64_t place, __mmask16 some) {
                    most = _mm512_mask_max_ps(most, some, most, _mm512_loadu_ps(row + place));
                });
                const float top = most_of(as<Vec>(most));
                Vec total{};
                work.look(first + r, seen, [&](int64_t place, __mmask16 some) {
                    const Vec share = only(exponential(load(row + place) - top), some);
                    store(row + place, share);
                    total += share;
                });
                const float all = sum_of(total), times = 1.0f / all;
                work.look(first + r, seen, [&](int64_t place, __mmask16) { store(shares + r * pitch + place, load(row + place) * times); });
                of.logs[(work.start + first + r) * of.keys * of.group + work.head * of.group + g] = top + std::log(all);
            }
            work.sum(shares, count, seen, values, const_cast<bf16*>(work.query(of.out, first, g)));
        }
}

void attend_back(const Work& work) {
    const Documents& of = work.of;
    const int64_t pitch = work.pitch(), width = of.width, length = work.length;
    const int64_t columns = work.panels() * width / 2 * MOST, depth = (length + 1) / 2 * (width / 16), chunk = CHUNK / 2 * (width / 16);
    const int64_t turned = (pitch + TALL - 1) / TALL * CHUNK / 2 * 32;
    const int64_t bytes[] = {columns * 64, columns * 64, depth * 64, chunk * 64, chunk * 64, turned, TALL * pitch * 8, CHUNK * pitch * 4,
                             length * width * 8};
    int64_t total = 0;
    for (int64_t one : bytes) total += one;
    char* at = Shelf<2>::of(total);
    char* rooms[9];
    for (int i = 0; i < 9; i++) rooms[i] = at, at += bytes[i];
    __m512i *keys = reinterpret_cast<__m512i*>(rooms[0]), *values = reinterpret_cast<__m512i*>(rooms[1]);
    __m512i *key_depth = reinterpret_cast<__m512i*>(rooms[2]), *q_depth = reinterpret_cast<__m512i*>(rooms[3]),
            *d_depth = reinterpret_cast<__m512i*>(rooms[4]);
    float *scores = reinterpret_cast<float*>(rooms[6]), *slopes = scores + TALL * pitch;
    bf16 *shares = reinterpret_cast<bf16*>(rooms[7]), *d_scores = shares + CHUNK * pitch;
    float *dk = reinterpret_cast<float*>(rooms[8]), *dv = dk + length * width;
    std::fill(dk, dk + 2 * length * width, 0.0f);
    work.lay_columns(of.k, keys);
    work.lay_columns(of.v, values);
    work.lay_depth(work.key(of.k), of.kv_stride, length, key_depth);
    for (int64_t g = 0; g < of.group; g++)
        for (int64_t low = 0; low < length; low += CHUNK) {
            const int64_t high = std::min(length, low + CHUNK), rows = high - low;
            const Sight whole = work.sight(low, high);
            for (int64_t first = low; first < high; first += TALL) {
                const int64_t count = std::min(TALL, high - first);
                const Sight seen = work.sight(first, first + count);
                for (int64_t place = 0; place < whole.end; place += PANEL) {  // other rows of the chunk see them
                    if (whole.holds(place) && !seen.holds(place))
                        for (int64_t r = first - low; r < first - low + count; r++)
                            for (bf16* side : {shares, d_scores}) std::memset(static_cast<void*>(side + r * pitch + place), 0, PANEL * sizeof(bf16));
                }
                work.score(work.query(of.q, first, g), count, seen, keys, scores);
                work.score(work.query(of.d_out, first, g), count, seen, values, slopes);
                for (int64_t r = 0; r < count; r++) {
                    const bf16 *o = work.query(of.out, first + r, g), *d = work.query(of.d_out, first + r, g);
                    Vec both{};
                    for (int64_t i = 0; i < width; i += L) both += load(o + i) * load(d + i);
                    const float mean = sum_of(both);
                    const float log = of.logs[(work.start + first + r) * of.keys * of.group + work.head * of.group + g];
                    const int64_t row = (first - low + r) * pitch;
                    work.look(first + r, seen, [&](int64_t place, __mmask16 some) {
                        const Vec share = only(exponential(load(scores + r * pitch + place) - log), some);
                        store(shares + row + place, share);
                        store(d_scores + row + place, share * (load(slopes + r * pitch + place) - mean));
                    });
                }
                work.sum(d_scores + (first - low) * pitch, count, seen, key_depth, const_cast<bf16*>(work.query(of.dq, first, g)));
            }
            work.lay_depth(work.query(of.q, low, g), of.q_stride, rows, q_depth);
            work.lay_depth(work.query(of.d_out, low, g), of.q_stride, rows, d_depth);
            for (int side = 0; side < 2; side++) {
                const Term term{side ? d_scores : shares, nullptr, pitch, 0, rows, 1, 0, 0};
                const __m512i* panels = side ? q_depth : d_depth;
                float* to = side ? dk : dv;
                for (int64_t key = 0; key < high; key += TALL) {
                    if (!whole.holds(key)) continue;
                    const int64_t count = std::min(TALL, length - key);
                    lay_rows(term, key, length, reinterpret_cast<__m256i*>(rooms[5]));
                    const Rows from{rooms[5], 4, 4 * TALL, (rows + 1) / 2};
                    for (int64_t part = 0; part < width / PART; part++)
                        block_of<2>(count)(&from, 1, panels + part * ((rows + 1) / 2) * 2, 0,
                                           Out{to + key * width + part * PART, width, PART, ADD, 1.0f, nullptr});
                }
            }
        }
    for (int64_t i = 0; i < length; i++)
        for (int64_t j = 0; j < width; j += L) {
            store(const_cast<bf16*>(work.key(of.dk)) + i * of.kv_stride + j, load(dk + i * width + j));
            store(const_cast<bf16*>(work.key(of.dv)) + i * of.kv_stride + j, load(dv + i * width + j));
        }
}

#endif

}  // namespace

extern "C" void attend_documents(const Documents* documents, int64_t back, int threads) {
#ifdef PAIRS
    const int64_t items = documents->count * documents->keys;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t item = 0; item < items; item++) {
        const int64_t* span = documents->spans + item / documents->keys * 2;
        (back ? attend_back : attend)(Work{*documents, span[0], span[1], item % documents->keys});
    }
#endif
}
