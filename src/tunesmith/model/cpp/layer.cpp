// Elementwise passes of a decoder layer that PyTorch would make one at a time. Compiled for this machine by native.py, which also says what
// every argument is. The arithmetic is that of layer_ops.py, rounded to T (bf16 or fp32) exactly where a tensor of PyTorch's would be.
#include "vectors.h"

namespace {

template <class T>
void norm(const float* x, const T* weight, float eps, T* out, T* unit, float* inverse, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(crew(threads, rows* width)) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float* at = x + row * width;
        const float scale = inverse[row] = inverse_rms(at, eps, width);
        each(width, [&](int64_t i, auto read, auto write) {
            Vec one = rounded<T>(read(at + i) * scale);
            write(unit + row * width + i, one);
            write(out + row * width + i, one * read(weight + i));
        });
    }
}

template <class T>
void norm_backward(const T* dy, const T* unit, const float* inverse, const T* weight, const float* add, float* dx, float* d_weight,
                   int64_t rows, int64_t width, int threads) {
    int team = crew(threads, rows * width);
    std::unique_ptr<float[]> parts(d_weight ? new float[team * width]() : nullptr);
#pragma omp parallel num_threads(team)
    {
        float* mine = d_weight ? parts.get() + omp_get_thread_num() * width : nullptr;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const T *d = dy + row * width, *u = unit + row * width;
            Vec sum{};
            each(width, [&](int64_t i, auto read, auto write) {
                Vec product = read(d + i) * read(u + i);
                sum += product * read(weight + i);
                if (mine) write(mine + i, read(mine + i) + product);
            });
            float share = sum_of(sum) / float(width);
            each(width, [&](int64_t i, auto read, auto write) {
                Vec one = (read(d + i) * read(weight + i) - read(u + i) * share) * inverse[row];
                write(dx + row * width + i, add ? one + read(add + row * width + i) : one);
            });
        }
    }
    if (d_weight) {
        std::fill(d_weight, d_weight + width, 0.0f);
        for (int part = 0; part < team; part++)  // in a fixed order: the same sum for the same number of threads
            for (int64_t i = 0; i < width; i++) d_weight[i] += parts[part * width + i];
    }
}

template <class T>
void gate(const T* inner, const T* up, T* out, int64_t rows, int64_t width, int64_t stride, int threads) {
#pragma omp parallel for num_threads(crew(threads, 4 * rows * width)) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        each(width, [&](int64_t i, auto read, auto write) {
            Vec x = read(inner + row * stride + i);
            write(out + row * width + i, rounded<T>(x * logistic(x)) * read(up + row * stride + i));
        });
}

template <class T>
void gate_backward(T* d, const T* inner, const T* up, T* out, T* d_up, int64_t count, int threads) {
    const int64_t block = 4096;
#pragma omp parallel for num_threads(crew(threads, 4 * count)) schedule(static)
    for (int64_t start = 0; start < count; start += block)
        each(std::min(count - start, block), [&](int64_t i, auto read, auto write) {
            i += start;
            Vec x = read(inner + i), s = logistic(x), of = read(d + i), other = read(up + i);
            Vec active = rounded<T>(x * s);
            write(out + i, active * other);
            write(d_up + i, active * of);
            write(d + i, rounded<T>(of * other) * (s * (1.0f + x * (1.0f - s))));
        });
}

template <class T>
void turn(const T* from, const int64_t* index, const T* cos, const T* sin, T* to, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(crew(threads, rows* width)) schedule(static)
    for (int64_t row = 0; row < rows; row++) turn_head(from + index[row] * width, cos + row * width, sin + row * width, to + row * width, width);
}

// Log-probabilities of the targets, and where `slope` is wanted, in place of the logits, one-hot minus softmax.
template <class T>
void soften(T* logits, const int64_t* targets, float* logp, int64_t slope, int64_t rows, int64_t width, int threads) {
    const int64_t whole = width / L * L, left = width - whole, block = 64 * L;
#pragma omp parallel for num_threads(crew(threads, 4 * rows * width)) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T* at = logits + row * width;
        const float lowest = -std::numeric_limits<float>::infinity();
        float tail[L];
        for (int64_t i = 0; i < L; i++) tail[i] = i < left ? wide(at[whole + i]) : lowest;
        Vec most = load(tail);
        for (int64_t i = 0; i < whole; i += L) {
            Vec next = load(at + i);
            most = next > most ? next : most;
        }
        const float top = most_of(most);
        double total = sum_of(exponential(load(tail) - top));
        for (int64_t first = 0; first < whole; first += block) {  // in parts, so that small terms are not lost in a large sum
            Vec sum{};
            for (int64_t i = first; i < std::min(whole, first + block); i += L) sum += exponential(load(at + i) - top);
            total += sum_of(sum);
        }
        const float target = wide(at[targets[row]]), times = float(-1.0 / total);
        logp[row] = float(double(target) - top - std::log(total));
        if (!slope) continue;
        for (int64_t i = 0; i < whole; i += L) store(at + i, exponential(load(at + i) - top) * times);
        if (left) store(at + whole, exponential(load(tail) - top) * times, left);
        at[targets[row]] = narrow<T>(1.0f + float(std::exp(double(target) - top)) * times);
    }
}

// Softmax of each row over what it sees, in place: of `rows` rows of a matrix [rows, width] row i sees the first i + offset + 1, and the rest is 0.
template <class T>
void look_back(T* scores, int64_t count, int64_t rows, int64_t offset, int64_t width, int threads) {
#pragma omp parallel num_threads(crew(threads, count* width))
    {
        std::unique_ptr<float[]> held(new float[width + L]);
        float* shares = held.get();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; row++) {
            T* at = scores + row * width;
            const int64_t seen = std::min(width, row % rows + offset + 1), whole = seen / L * L;
            float tail[L];
            for (int64_t i = 0; i < L; i++) tail[i] = whole + i < seen ? wide(at[whole + i]) : -std::numeric_limits<float>::infinity();
            Vec most = load(tail), sum{};
            for (int64_t i = 0; i < whole; i += L) {
                Vec next = load(at + i);
                most = next > most ? next : most;
            }
            const float top = most_of(most);
            for (int64_t i = 0; i <= whole; i += L) {
                Vec share = exponential((i < whole ? load(at + i) : load(tail)) - top);
                store(shares + i, share);
                sum += share;
            }
            const float times = 1.0f / sum_of(sum);
            for (int64_t i = 0; i < whole; i += L) store(at + i, load(shares + i) * times);
            if (seen > whole) store(at + whole, load(shares + whole) * times, seen - whole);
            std::memset(static_cast<void*>(at + seen), 0, (width - seen) * sizeof(T));
        }
    }
}

}  // namespace

#define EACH(T, NAME)                                                                                                                 \
    extern "C" void norm_##NAME(const float* x, const T* weight, float eps, T* out, T* unit, float* inverse, int64_t rows,            \
                                int64_t width, int threads) {                                                                         \
        norm<T>(x, weight, eps, out, unit, inverse, rows, width, threads);                                                            \
    }                                                                                                                                 \
    extern "C" void norm_backward_##NAME(const T* dy, const T* unit, const float* inverse, const T* weight, const float* add,         \
                                         float* dx, float* d_weight, int64_t rows, int64_t width, int threads) {                      \
        norm_backward<T>(dy, unit, inverse, weight, add, dx, d_weight, rows, width, threads);                                         \
    }                                                                                                                                 \
    extern "C" void gate_##NAME(const T* inner, const T* up, T* out, int64_t rows, int64_t width, int64_t stride, int threads) {      \
        gate<T>(inner, up, out, rows, width, stride, threads);                                                                        \
    }                                                                                                                                 \
    extern "C" void gate_backward_##NAME(T* d, const T* inner, const T* up, T* out, T* d_up, int64_t count, int threads) {            \
        gate_backward<T>(d, inner, up, out, d_up, count, threads);                                                                    \
    }                                                                                                                                 \
    extern "C" void turn_##NAME(const T* from, const int64_t* index, const T* cos, const T* sin, T* to, int64_t rows, int64_t width,  \
                                int threads) {                                                                                        \
        turn<T>(from, index, cos, sin, to, rows, width, threads);                                                                     \
    }                                                                                                                                 \
    extern "C" void soften_##NAME(T* logits, const int64_t* targets, float* logp, int64_t slope, int64_t rows, int64_t width,         \
                                  int threads) {                                                                                      \
        soften<T>(logits, targets, logp, slope, rows, width, threads);                                                                \
    }                                                                                                                                 \
    extern "C" void look_back_##NAME(T* scores, int64_t count, int64_t rows, int64_t offset, int64_t width, int threads) {            \
        look_back<T>(scores, count, rows, offset, width, threads);                                                                    \
    }

EACH(float, float32)
EACH(bf16, bfloat16)
