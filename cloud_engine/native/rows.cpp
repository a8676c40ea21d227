// What a layer does to each row by itself: one pass over it, sums in float32.
#include <cmath>

#include "vector.h"

using namespace causeway;

namespace {

constexpr int64_t ALONE = 1 << 15;  // numbers that one thread has done before two would have met

template <class T>
void norm(const T* x, const T* weight, T* out, int64_t rows, int size, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > ALONE)
    for (int64_t r = 0; r < rows; r++) {
        const T* row = x + r * size;
        Floats squares{};
        for (int i = 0; i < size; i += LANES) {
            const Floats part = load(row + i);
            squares += part * part;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
        for (int i = 0; i < size; i += LANES) store(out + r * size + i, load(row + i) * scale * load(weight + i));
    }
}

// x / (1 + e^-x) of the first half of a row, times the second half.
template <class T>
void gate(const T* x, T* out, int64_t rows, int size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * size > ALONE)
    for (int64_t r = 0; r < rows; r++) {
        const T *row = x + r * 2 * size, *up = row + size;
        for (int i = 0; i < size; i += LANES) {
            const Floats part = load(row + i);
            store(out + r * size + i, part / (exponential(-part) + 1.0f) * load(up + i));
        }
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
    }

ROWS(float32, float)
ROWS(bfloat16, BFloat16)
