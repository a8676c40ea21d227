// Rows times packed weight in float32 or bfloat16, for the few rows of a decode step and the many of a prompt alike.
//
// A weight [outputs, inputs] lies in panels of 32 outputs: [panel][inputs][32]. In bfloat16 two inputs of one output
// are neighbours, as the processor's dot instruction takes them: [panel][inputs / 2][32][2]. A tile of rows is
// multiplied with a panel in registers; threads share the panels.
#include "product.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)

using namespace causeway;

namespace {

constexpr int AHEAD = 4096;  // bytes of a panel that are asked for before they are needed, where memory is slow
constexpr int STEP = 128;    // bytes of a panel that one step along the inputs takes
constexpr int BRIEF = 12;    // tiles with a panel, up to which reading the next one takes a good part of their time

// The panel after one: each tile asks for some of it, `stride` bytes a step, into the second cache.
struct Next {
    const char* from;
    int stride = 0;

    // For the `index`th of `count` tiles. One tile alone reads ahead by itself.
    Next(const char* after, int steps, int index, int count) : from(after) {
        if (count == 1 || count > BRIEF) return;
        stride = (STEP + count - 1) / count;
        from += int64_t(index) * steps * stride;
    }
    void ask(int i) const { _mm_prefetch(from + int64_t(i) * stride, _MM_HINT_T1); }
};

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

// R rows of x from `row` on with a panel; U sums for each output hide the instruction's latency where rows are few.
template <int R, int U, class Step, class T = typename Step::Value>
void tile(const Product<T>& product, const T* x, int64_t x_stride, int row, const char* weight, int panel,
          const Next& next) {
    __m512 total[U][R][2];
    for (int u = 0; u < U; u++)
        for (int r = 0; r < R; r++) total[u][r][0] = total[u][r][1] = _mm512_setzero_ps();
    const int steps = product.inputs / Step::WIDTH;
    product.expect(row, R, panel);
    auto step = [&](int i, int u, auto asks) {
        const char* at = weight + int64_t(i) * STEP;
        if (R <= 4) _mm_prefetch(at + AHEAD, _MM_HINT_T0), _mm_prefetch(at + AHEAD + 64, _MM_HINT_T0);
        else if (asks) next.ask(i);
        for (int r = 0; r < R; r++) {
            const __m512 all = Step::all(x + r * x_stride + Step::WIDTH * i);
            total[u][r][0] = Step::add(total[u][r][0], at, all);
            total[u][r][1] = Step::add(total[u][r][1], at + 64, all);
        }
    };
    auto run = [&](auto asks) {
        int i = 0;
        for (; i + U <= steps; i += U)
            for (int u = 0; u < U; u++) step(i + u, u, asks);
        for (; i < steps; i++) step(i, 0, asks);
    };
    if (next.stride) run(std::true_type{});
    else run(std::false_type{});
    float sums[R * PANEL];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) {
            __m512 sum = total[0][r][half];
            for (int u = 1; u < U; u++) sum = _mm512_add_ps(sum, total[u][r][half]);
            _mm512_storeu_ps(sums + r * PANEL + half * LANES, sum);
        }
    product.finish(row, R, panel, sums);
}

template <class Step, class T = typename Step::Value>
void multiply(const Product<T>& product, const void* weight) {
    const int rows = product.rows, inputs = product.inputs, steps = inputs / Step::WIDTH;
    T* normed = product.norm ? bench<ROWS, T>(size_t(rows) * inputs) : nullptr;
    const T* x = product.norm ? normed : product.x;
    const int64_t x_stride = product.norm ? inputs : product.x_stride;
#pragma omp parallel num_threads(product.threads)
    {
        if (product.norm) {
#pragma omp for schedule(static)
            for (int r = 0; r < rows; r++) {
                const Normed<T> row(product.x + r * product.x_stride, product.norm, inputs, product.eps);
                for (int i = 0; i < inputs; i += LANES) store(normed + int64_t(r) * inputs + i, row(i));
            }
        }
#pragma omp for schedule(static)
        for (int p = 0; p < product.panels(); p++) {
            const char* panel = (const char*)weight + int64_t(p) * steps * STEP;
            tiles<12>(rows, [&](int first, auto size, int index, int count) {
                constexpr int R = decltype(size)::value;
                const Next next(panel + int64_t(steps) * STEP, steps, index, count);
                tile<R, (R == 1 ? 4 : R <= 3 ? 2 : 1), Step>(product, x + first * x_stride, x_stride, first, panel, p,
                                                             next);
            });
        }
    }
}

}  // namespace

#define MATMUL(NAME, STEP)                                                                                          \
    extern "C" void NAME(PRODUCT_ARGUMENTS, const void* weight) {                                                   \
        multiply<STEP>(PRODUCT(STEP::Value), weight);                                                               \
    }

MATMUL(matmul_float32, Singles)
#ifdef __AVX512BF16__
MATMUL(matmul_bfloat16, Pairs)
#endif

#endif
