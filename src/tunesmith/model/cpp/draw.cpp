// From logits to tokens in two or three passes that stay in the cache; the arithmetic of infer/draw.py, row by row.
#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 256;  // weights that are summed in fp32; sums go on in fp64
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The largest of up to BLOCK numbers.
inline float most_in(const float* x, int64_t count) {
    Vec most = all(LOWEST);
    int64_t i = 0;
    for (; i + L <= count; i += L) {
        Vec next = load(x + i);
        most = next > most ? next : most;
    }
    float out = most_of(most);
    for (; i < count; i++) out = std::max(out, x[i]);
    return out;
}

// e^((x - top) / warmth) of up to BLOCK numbers, and zeros behind them; returns their sum.
inline float weights_of(const float* x, int64_t count, float top, float warmth, float* to) {
    Vec sum{};
    for (int64_t i = 0; i < BLOCK; i += L) {
        Vec value{};
        if (i + L <= count) {
            value = exponential((load(x + i) - top) / warmth);
        } else if (i < count) {
            float part[L];
            std::fill(part, part + L, LOWEST);
            std::copy(x + i, x + count, part);
            value = exponential((load(part) - top) / warmth);
        }
        store(to + i, value);
        sum += value;
    }
    return sum_of(sum);
}

// The first place whose cumulative weight exceeds `uniform` times all weight; the last one with any weight where rounding leaves none.
int64_t invert(const float* x, int64_t width, float top, float warmth, double uniform, const double* sums) {
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
    double total = 0.0, before = 0.0;
    for (int64_t b = 0; b < blocks; b++) total += sums[b];
    const double target = uniform * total;
    int64_t block = -1;
    double reached = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        if (sums[b] > 0) block = b, before = reached;  // never a block without weight
        reached += sums[b];
        if (reached > target) break;
    }
    if (block < 0) return 0;  // no weight at all, or numbers that are none: the log-probability tells
    alignas(64) float weights[BLOCK];
    const int64_t first = block * BLOCK, count = std::min(BLOCK, width - first);
    weights_of(x + first, count, top, warmth, weights);
    int64_t last = 0;
    double inside = 0.0;
    for (int64_t i = 0; i < count; i++) {
        if (weights[i] > 0) last = i;
        inside += weights[i];
        if (inside > target - before) break;
    }
    return first + last;
}

}  // namespace

// One token for each row of logits [rows, width]: the first of the largest where warmth is 0, else by inversion at the row's number.
// totals: the log of the sum of e^logit; NaN or infinite for a row that is not finite, whose token means nothing.
extern "C" void draw(const float* logits, const float* warmth, const double* uniform, int64_t* tokens, double* totals, int64_t rows,
                     int64_t width, int threads) {
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(crew(threads, rows* width))
    {
        std::unique_ptr<double[]> sums(new double[blocks]);
        alignas(64) float weights[BLOCK];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float* x = logits + row * width;
            float top = LOWEST;
            int64_t best = 0;
            for (int64_t b = 0; b < blocks; b++) {
                const float most = most_in(x + b * BLOCK, std::min(BLOCK, width - b * BLOCK));
                if (most > top) top = most, best = b;
            }
            auto weigh = [&](float by) {
                double total = 0.0;
                for (int64_t b = 0; b < blocks; b++) {
                    sums[b] = weights_of(x + b * BLOCK, std::min(BLOCK, width - b * BLOCK), top, by, weights);
                    total += sums[b];
                }
                return total;
            };
            totals[row] = double(top) + std::log(weigh(1.0f));
            if (warmth[row] == 0) {
                const int64_t first = best * BLOCK;
                tokens[row] = std::find(x + first, x + std::min(first + BLOCK, width), top) - x;
                if (tokens[row] >= width) tokens[row] = 0;
                continue;
            }
            if (warmth[row] != 1) weigh(warmth[row]);
            tokens[row] = invert(x, width, top, warmth[row], uniform[row], sums.get());
        }
    }
}
