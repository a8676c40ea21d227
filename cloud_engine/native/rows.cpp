// What a layer does to each row by itself: one pass over it, sums in float32.
#include "rows.h"

using namespace causeway;

namespace {

constexpr int64_t ALONE = 1 << 15;  // numbers that one thread has done before two would have met

template <class T>
void norm(const T* x, const T* weight, T* out, int64_t rows, int size, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > ALONE)
    for (int64_t r = 0; r < rows; r++) {
        const Normed<T> row(x + r * size, weight, size, eps);
        for (int i = 0; i < size; i += LANES) store(out + r * size + i, row(i));
    }
}

// The first half of a row are gates, the second what they let through.
template <class T>
void gate(const T* x, T* out, int64_t rows, int size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > ALONE)
    for (int64_t r = 0; r < rows; r++) {
        const T *row = x + r * 2 * size, *up = row + size;
        for (int i = 0; i < size; i += LANES) store(out + r * size + i, gated(load(row + i), load(up + i)));
    }
}

// Heads [rows][heads][2 * half], the rows `stride` apart, turned by their row's angles.
template <class T>
void rotate(const T* x, int64_t stride, const T* cosines, const T* sines, T* out, int64_t rows, int heads, int half,
            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * half > ALONE)
    for (int64_t r = 0; r < rows; r++)
        for (int h = 0; h < heads; h++) {
            const T* from = x + r * stride + h * 2 * half;
            T* to = out + (r * heads + h) * 2 * half;
            for (int i = 0; i < half; i += LANES) {
                const Floats c = load(cosines + r * half + i), s = load(sines + r * half + i);
                const Floats first = load(from + i), second = load(from + half + i);
                store(to + i, first * c - second * s);
                store(to + half + i, second * c + first * s);
            }
        }
}

// The largest number of each row and the first place where it is; if a number is NaN, that one.
template <class T>
void greatest(const T* x, float* values, int64_t* places, int64_t rows, int size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = x + r * size;
        float best = number(row[0]);
        int place = 0, i = 0;
        auto consider = [&](float value, int at) {
            const bool better = value > best || (value != value && best == best);
            const bool equal = value == best || (value != value && best != best);
            if (better || (equal && at < place)) best = value, place = at;
        };
        if (size >= LANES) {
            Floats most = load(row);
            Ints where{};
            for (i = LANES; i + LANES <= size; i += LANES) {
                const Floats part = load(row + i);
                const Ints better = (part > most) | ((part != part) & (most == most));
                most = better ? part : most;
                where = better ? Ints{} + i : where;
            }
            for (int lane = 0; lane < LANES; lane++) consider(most[lane], where[lane] + lane);
        }
        for (; i < size; i++) consider(number(row[i]), i);
        values[r] = best, places[r] = place;
    }
}

}  // namespace

#define ROWS(SUFFIX, T)                                                                                             \
    extern "C" void norm_##SUFFIX(const void* x, const void* weight, void* out, int64_t rows, int size, float eps,  \
                                  int threads) {                                                                    \
        norm((const T*)x, (const T*)weight, (T*)out, rows, size, eps, threads);                                     \
    }                                                                                                               \
    extern "C" void gate_##SUFFIX(const void* x, void* out, int64_t rows, int size, int threads) {                  \
        gate((const T*)x, (T*)out, rows, size, threads);                                                            \
    }                                                                                                               \
    extern "C" void rotate_##SUFFIX(const void* x, int64_t stride, const void* cosines, const void* sines,          \
                                    void* out, int64_t rows, int heads, int half, int threads) {                    \
        rotate((const T*)x, stride, (const T*)cosines, (const T*)sines, (T*)out, rows, heads, half, threads);       \
    }                                                                                                               \
    extern "C" void greatest_##SUFFIX(const void* x, float* values, int64_t* places, int64_t rows, int size,        \
                                      int threads) {                                                                \
        greatest((const T*)x, values, places, rows, size, threads);                                                 \
    }

ROWS(float32, float)
ROWS(bfloat16, BFloat16)
