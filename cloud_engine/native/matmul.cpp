// Matrix times packed weight, for the few rows of a decode step and the many of a prompt alike.
//
// A weight [outputs, inputs] lies in panels of 32 outputs: [panel][inputs][32]. In bfloat16 two inputs, in int8 four, of
// one output are neighbours, as the processor's dot instructions take them: [panel][inputs / 4][32][4].
// A tile of rows is multiplied with a panel in registers; threads share the panels. Sums are float32.
//
// int8: each 64 inputs of an output have a scale, and so have each 64 values of a row of x, which is rounded to int8
// too. The instruction wants one factor unsigned: rows are stored plus 128, and `offsets`, -128 times the sum of a
// group's weights, take that out again.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "vector.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

using namespace causeway;

namespace {

constexpr int PANEL = 2 * LANES;
constexpr int GROUP = 64;
constexpr int AHEAD = 4096;  // bytes of a panel that are fetched before they are needed, where memory is what takes time
constexpr int STEP = 128;    // bytes of a panel that one step along the inputs takes, except in int8
constexpr int BRIEF = 12;    // tiles with a panel, up to which reading the next one takes a good part of their time

// The part of the next panel that a tile asks for while it computes: `stride` bytes a step, into the second cache.
struct Next {
    const char* from;
    int stride;

    // For the `index`th of `count` tiles with the panel before `panel`. One tile alone reads ahead by itself.
    Next(const void* panel, int steps, int index, int count) : from((const char*)panel), stride(0) {
        if (count == 1 || count > BRIEF) return;
        stride = (STEP + count - 1) / count;
        from += int64_t(index) * steps * stride;
    }
    void ask(int i) const {
        if (stride) _mm_prefetch(from + int64_t(i) * stride, _MM_HINT_T1);
    }
};

// Half a panel's sums of one row into the output; `some` of the lanes exist.
template <class T>
void finish(T* out, const float* bias, Floats total, int some) {
    if (some >= LANES) {
        store(out, bias ? total + load(bias) : total);
        return;
    }
    T last[LANES];
    float added[LANES] = {};
    if (bias && some > 0) std::copy_n(bias, some, added);
    store(last, total + load(added));
    if (some > 0) std::copy_n(last, some, out);
}

// What one step along the inputs takes: a number of x, or a pair, with 32 weights, or pairs of weights.
struct Singles {
    typedef float Value;
    static constexpr int WIDTH = 1;
    static __m512 all(const float* x) { return _mm512_set1_ps(*x); }
    static __m512 add(__m512 sum, const char* weights, __m512 x) {
        return _mm512_fmadd_ps(_mm512_loadu_ps(weights), x, sum);
    }
};

#ifdef __AVX512BF16__
struct Pairs {
    typedef BFloat16 Value;
    static constexpr int WIDTH = 2;
    static __m512 all(const BFloat16* x) {
        int32_t pair;
        std::memcpy(&pair, x, sizeof pair);
        return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
    }
    static __m512 add(__m512 sum, const char* weights, __m512 x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_ps(weights), (__m512bh)x);
    }
};
#endif

// R rows of x with one panel; U sums for each output hide the instruction's latency where rows are few.
template <int R, int U, class Step, class T = typename Step::Value>
void tile(const T* x, int64_t x_stride, int inputs, const T* panel, const Next& next, const float* bias, T* out,
          int64_t out_stride, int outputs) {
    __m512 total[U][R][2];
    for (int u = 0; u < U; u++)
        for (int r = 0; r < R; r++) total[u][r][0] = total[u][r][1] = _mm512_setzero_ps();
    const int steps = inputs / Step::WIDTH;
    auto step = [&](int i, int u) {
        const char* at = (const char*)panel + int64_t(i) * STEP;
        if (R <= 4) _mm_prefetch(at + AHEAD, _MM_HINT_T0), _mm_prefetch(at + AHEAD + 64, _MM_HINT_T0);
        else next.ask(i);
        for (int r = 0; r < R; r++) {
            const __m512 all = Step::all(x + r * x_stride + Step::WIDTH * i);
            total[u][r][0] = Step::add(total[u][r][0], at, all);
            total[u][r][1] = Step::add(total[u][r][1], at + 64, all);
        }
    };
    int i = 0;
    for (; i + U <= steps; i += U)
        for (int u = 0; u < U; u++) step(i + u, u);
    for (; i < steps; i++) step(i, 0);
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            __m512 sum = total[0][r][half];
            for (int u = 1; u < U; u++) sum = _mm512_add_ps(sum, total[u][r][half]);
            finish(out + r * out_stride + half * LANES, bias ? bias + half * LANES : nullptr, (Floats)sum,
                   outputs - half * LANES);
        }
}

#ifdef __AVX512VNNI__
// sum += x * weights, four and four. Of the intrinsic GCC 12 makes three instructions: it copies the sum to and fro.
inline void dot(__m512i& sum, __m512i x, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
}

// A row as values [inputs], plus 128, and scales [groups].
template <class T>
void round_row(const T* x, int inputs, uint8_t* values, float* scales) {
    for (int g = 0; g < inputs / GROUP; g++, x += GROUP, values += GROUP) {
        Floats part[4], most{};
        for (int i = 0; i < 4; i++) {
            part[i] = load(x + i * LANES);
            most = larger(most, (Floats)((Words)part[i] & 0x7fffffff));
        }
        const float peak = largest(most), factor = peak > 0 ? 127.0f / peak : 0.0f;
        scales[g] = peak / 127.0f;
        for (int i = 0; i < 4; i++) {
            const __m512i whole = _mm512_cvtps_epi32((__m512)(part[i] * factor));
            const __m128i bytes = _mm512_cvtsepi32_epi8(whole);
            _mm_storeu_si128((__m128i*)(values + i * LANES), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
        }
    }
}

template <int R, class T>
void tile(const uint8_t* x, const float* x_scales, int inputs, const int8_t* panel, const float* scales,
          const int32_t* offsets, const float* bias, T* out, int64_t out_stride, int outputs) {
    const int groups = inputs / GROUP;
    __m512 total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int g = 0; g < groups; g++) {
        __m512i sum[R][2];
        const __m512i start0 = _mm512_loadu_si512(offsets + g * PANEL);
        const __m512i start1 = _mm512_loadu_si512(offsets + g * PANEL + LANES);
        for (int r = 0; r < R; r++) sum[r][0] = start0, sum[r][1] = start1;
        for (int i = 0; i < GROUP / 4; i++) {
            const int8_t* at = panel + (int64_t(g) * GROUP / 4 + i) * PANEL * 4;
            if (R <= 3) _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0), _mm_prefetch((const char*)at + AHEAD + 64, _MM_HINT_T0);
            const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + 64);
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, x + int64_t(r) * inputs + g * GROUP + 4 * i, 4);
                const __m512i all = _mm512_set1_epi32(four);
                dot(sum[r][0], all, w0);
                dot(sum[r][1], all, w1);
            }
        }
        const __m512 scale0 = _mm512_loadu_ps(scales + g * PANEL), scale1 = _mm512_loadu_ps(scales + g * PANEL + LANES);
        for (int r = 0; r < R; r++) {
            const __m512 scale = _mm512_set1_ps(x_scales[r * groups + g]);
            total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), _mm512_mul_ps(scale0, scale), total[r][0]);
            total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), _mm512_mul_ps(scale1, scale), total[r][1]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            finish(out + r * out_stride + half * LANES, bias ? bias + half * LANES : nullptr, (Floats)total[r][half],
                   outputs - half * LANES);
}

#endif

// Call `work(first row, std::integral_constant<rows>, index, count)` for tiles of at most MOST rows, as equal as can be.
template <int MOST, class Work, int R = MOST>
void with_rows(int rows, Work&& work) {
    if constexpr (R > 0) {
        if (rows == R) work(std::integral_constant<int, R>{});
        else with_rows<MOST, Work, R - 1>(rows, std::forward<Work>(work));
    }
}

template <int MOST, class Work>
void tiles(int rows, Work&& work) {
    const int count = (rows + MOST - 1) / MOST;
    for (int i = 0, first = 0; i < count; i++) {
        const int some = (rows - first) / (count - i);
        with_rows<MOST>(some, [&](auto size) { work(first, size, i, count); });
        first += some;
    }
}

template <class Step, class T = typename Step::Value>
void multiply(const T* x, int64_t x_stride, int rows, int inputs, const T* weight, const float* bias, T* out,
              int outputs, int threads) {
    const int panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int p = 0; p < panels; p++)
        tiles<12>(rows, [&](int first, auto size, int index, int count) {
            constexpr int R = decltype(size)::value;
            const T* panel = weight + int64_t(p) * PANEL * inputs;
            tile<R, (R == 1 ? 4 : R <= 3 ? 2 : 1), Step>(
                x + first * x_stride, x_stride, inputs, panel,
                Next(panel + int64_t(PANEL) * inputs, inputs / Step::WIDTH, index, count),
                bias ? bias + p * PANEL : nullptr, out + int64_t(first) * outputs + p * PANEL, outputs,
                outputs - p * PANEL);
        });
}

#ifdef __AVX512VNNI__
template <class T>
void multiply(const T* x, int64_t x_stride, int rows, int inputs, const int8_t* weight, const float* scales,
              const int32_t* offsets, const float* bias, T* out, int outputs, uint8_t* values, float* x_scales,
              int threads) {
    const int panels = (outputs + PANEL - 1) / PANEL, groups = inputs / GROUP;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++)
            round_row(x + r * x_stride, inputs, values + int64_t(r) * inputs, x_scales + int64_t(r) * groups);
#pragma omp for schedule(static)
        for (int p = 0; p < panels; p++)
            tiles<6>(rows, [&](int first, auto size, int, int) {
                tile<decltype(size)::value>(values + int64_t(first) * inputs, x_scales + int64_t(first) * groups, inputs,
                                            weight + int64_t(p) * PANEL * inputs,
                                            scales + int64_t(p) * groups * PANEL, offsets + int64_t(p) * groups * PANEL,
                                            bias ? bias + p * PANEL : nullptr, out + int64_t(first) * outputs + p * PANEL,
                                            outputs, outputs - p * PANEL);
            });
    }
}

#endif

}  // namespace

#define MATMUL(NAME, STEP)                                                                                          \
    extern "C" void NAME(const void* x, int64_t x_stride, int rows, int inputs, const void* weight,                 \
                         const float* bias, void* out, int outputs, int threads) {                                  \
        typedef STEP::Value T;                                                                                      \
        multiply<STEP>((const T*)x, x_stride, rows, inputs, (const T*)weight, bias, (T*)out, outputs, threads);     \
    }

MATMUL(matmul_float32, Singles)
#ifdef __AVX512BF16__
MATMUL(matmul_bfloat16, Pairs)
#endif

#ifdef __AVX512VNNI__
#define MATMUL_INT8(NAME, T)                                                                                        \
    extern "C" void NAME(const void* x, int64_t x_stride, int rows, int inputs, const int8_t* weight,               \
                         const float* scales, const int32_t* offsets, const float* bias, void* out, int outputs,    \
                         uint8_t* values, float* x_scales, int threads) {                                           \
        multiply((const T*)x, x_stride, rows, inputs, weight, scales, offsets, bias, (T*)out, outputs, values,      \
                 x_scales, threads);                                                                                \
    }

MATMUL_INT8(matmul_int8_float32, float)
MATMUL_INT8(matmul_int8_bfloat16, BFloat16)
#endif

#endif
