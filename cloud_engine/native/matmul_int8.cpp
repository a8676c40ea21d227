// Rows times packed weight, both of int8; rows and results are float32 or bfloat16.
//
// A weight [outputs, inputs] lies in panels of 32 outputs. Each 64 inputs of an output have a scale, and so have each
// 64 values of a row of x, which is rounded to int8 too. Such a group of a panel is 64 inputs of 32 outputs, four inputs
// of one output being neighbours, as the processor's dot instruction takes them, and then 32 scales. The instruction
// wants one factor unsigned: weights are stored plus 128, and -128 times the sum of a row's group, with which sums
// begin, takes that out again.
#include "product.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

using namespace causeway;

namespace {

constexpr int GROUP = 64;
constexpr int STEPS = GROUP / 4;  // dot instructions along a group
constexpr int STEP = PANEL * 4;   // bytes of a panel that one takes
constexpr int LINE = 64;
constexpr int AHEAD = 4096;  // bytes of a panel that are asked for before they are needed, where memory is slow
constexpr int SINGLE = 3;    // rows up to which it is

// A group of a panel.
struct Group {
    uint8_t values[STEPS][STEP];
    float scales[PANEL];
};

// Rows of int8 [rows][inputs]; of each group its scale, and the sum that its products with a weight begin with.
struct Rounded {
    int8_t* values;
    float* scales;
    int32_t* starts;
};

// sum += weights * x, four and four. Of the intrinsic GCC 12 makes three instructions: it copies the sum to and fro.
inline void dot(__m512i& sum, __m512i weights, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
}

template <class Row>
void round_row(const Row& row, int inputs, const Rounded& to) {
    for (int g = 0; g < inputs / GROUP; g++) {
        Floats part[4], most{};
        for (int i = 0; i < 4; i++) {
            part[i] = row(g * GROUP + i * LANES);
            most = larger(most, (Floats)((Words)part[i] & 0x7fffffff));
        }
        const float peak = largest(most), factor = peak > 0 ? 127.0f / peak : 0.0f;
        __m512i start = _mm512_setzero_si512();
        for (int i = 0; i < 4; i++) {
            const __m512i whole = _mm512_cvtps_epi32((__m512)(part[i] * factor));
            start = _mm512_sub_epi32(start, whole);
            _mm_storeu_si128((__m128i*)(to.values + g * GROUP + i * LANES), _mm512_cvtsepi32_epi8(whole));
        }
        to.scales[g] = peak / 127.0f;
        to.starts[g] = _mm512_reduce_add_epi32(_mm512_slli_epi32(start, 7));
    }
}

// Asks for two lines of the panel, or the next one.
inline void ask_ahead(const void* at) {
    _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
    _mm_prefetch((const char*)at + AHEAD + LINE, _MM_HINT_T0);
}

// What each of the tiles with a panel asks for of the next one: some lines of every group, into the second cache.
struct Next {
    const Group* panel;
    int first, last;

    Next(const Group* panel, int index, int count) : panel(panel) {
        const int lines = sizeof(Group) / LINE, share = (lines + count - 1) / count;
        first = std::min(lines, index * share) * LINE, last = std::min(lines, (index + 1) * share) * LINE;
    }
    void ask(int g) const {
        for (int at = first; at < last; at += LINE) _mm_prefetch((const char*)(panel + g) + at, _MM_HINT_T1);
    }
};

// R rows from `row` on with a panel.
template <int R, class T>
void tile(const Product<T>& product, const Rounded& x, int row, const Group* weight, int panel, const Next& next) {
    __m512 total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    const int inputs = product.inputs, groups = inputs / GROUP;
    product.expect(row, R, panel);
    int g = 0;
    do {
        const Group& group = weight[g];
        const int8_t* from = x.values + g * GROUP;
        __m512i sum[R][2];
        for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(x.starts[r * groups + g]);
        if (R > SINGLE) next.ask(g);
        else ask_ahead(group.scales);
#pragma GCC unroll 16
        for (int i = 0; i < STEPS; i++) {
            const uint8_t* at = group.values[i];
            if (R <= SINGLE) ask_ahead(at);
            const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + LINE);
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, from + int64_t(r) * inputs + 4 * i, sizeof four);
                const __m512i all = _mm512_set1_epi32(four);
                dot(sum[r][0], w0, all);
                dot(sum[r][1], w1, all);
            }
        }
        for (int half = 0; half < 2; half++) {
            const __m512 scale = _mm512_loadu_ps(group.scales + half * LANES);
            for (int r = 0; r < R; r++) {
                const __m512 of_row = _mm512_set1_ps(x.scales[r * groups + g]);
                const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][half]), of_row);
                total[r][half] = _mm512_fmadd_ps(scaled, scale, total[r][half]);
            }
        }
    } while (++g < groups);
    float sums[R * PANEL];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(sums + r * PANEL + half * LANES, total[r][half]);
    product.finish(row, R, panel, sums);
}

template <class T>
void multiply(const Product<T>& product, const Group* weight) {
    const int rows = product.rows, inputs = product.inputs, groups = inputs / GROUP;
    const Rounded x{bench<ROWS, int8_t>(size_t(rows) * inputs), bench<SCALES, float>(size_t(rows) * groups),
                    bench<STARTS, int32_t>(size_t(rows) * groups)};
    auto of_row = [&](int64_t r) {
        return Rounded{x.values + r * inputs, x.scales + r * groups, x.starts + r * groups};
    };
#pragma omp parallel num_threads(product.threads)
    {
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            const T* from = product.x + r * product.x_stride;
            if (product.norm) round_row(Normed<T>(from, product.norm, inputs, product.eps), inputs, of_row(r));
            else round_row(Plain<T>{from}, inputs, of_row(r));
        }
#pragma omp for schedule(static)
        for (int p = 0; p < product.panels(); p++) {
            const Group* panel = weight + int64_t(p) * groups;
            tiles<6>(rows, [&](int first, auto size, int index, int count) {
                const Next next(panel + groups, index, count);
                tile<decltype(size)::value>(product, of_row(first), first, panel, p, next);
            });
        }
    }
}

}  // namespace

#define MATMUL_INT8(NAME, T)                                                                                        \
    extern "C" void NAME(PRODUCT_ARGUMENTS, const void* weight) {                                                   \
        multiply(PRODUCT(T), (const Group*)weight);                                                                 \
    }

MATMUL_INT8(matmul_int8_float32, float)
MATMUL_INT8(matmul_int8_bfloat16, BFloat16)

#endif
