// Rows times packed weight, both of int8; rows and results are float32 or bfloat16.
//
// A weight [outputs, inputs] lies in panels of 32 outputs, four inputs of one output being neighbours, as the
// processor's dot instruction takes them: [panel][inputs / 4][32][4]. Each 64 inputs of an output have a scale, and so have each 64
// values of a row of x, which is rounded to int8 too. The instruction wants one factor unsigned: rows are stored plus
// 128, and `offsets`, -128 times the sum of a group's weights, take that out again.
#include "product.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

using namespace causeway;

namespace {

constexpr int GROUP = 64;
constexpr int AHEAD = 4096;  // bytes of a panel that are asked for before they are needed, where memory is slow

// [panels][inputs / 4][PANEL][4]; of each panel and group [PANEL] scales and offsets.
struct Weight {
    const int8_t* values;
    const float* scales;
    const int32_t* offsets;
};

// Rows of int8 plus 128, [rows][inputs], with their scales [rows][groups].
struct Rounded {
    uint8_t* values;
    float* scales;
};

// sum += x * weights, four and four. Of the intrinsic GCC 12 makes three instructions: it copies the sum to and fro.
inline void dot(__m512i& sum, __m512i x, __m512i weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
}

template <class Row>
void round_row(const Row& row, int inputs, uint8_t* values, float* scales) {
    for (int g = 0; g < inputs / GROUP; g++, values += GROUP) {
        Floats part[4], most{};
        for (int i = 0; i < 4; i++) {
            part[i] = row(g * GROUP + i * LANES);
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

// R rows from `row` on with a panel.
template <int R, class T>
void tile(const Product<T>& product, const Rounded& x, int row, const Weight& weight, int panel) {
    __m512 total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    const int inputs = product.inputs, groups = inputs / GROUP;
    for (int g = 0; g < groups; g++) {
        __m512i sum[R][2];
        const __m512i start0 = _mm512_loadu_si512(weight.offsets + g * PANEL);
        const __m512i start1 = _mm512_loadu_si512(weight.offsets + g * PANEL + LANES);
        for (int r = 0; r < R; r++) sum[r][0] = start0, sum[r][1] = start1;
        for (int i = 0; i < GROUP / 4; i++) {
            const int8_t* at = weight.values + (int64_t(g) * GROUP / 4 + i) * PANEL * 4;
            if (R <= 3) {
                _mm_prefetch((const char*)at + AHEAD, _MM_HINT_T0);
                _mm_prefetch((const char*)at + AHEAD + 64, _MM_HINT_T0);
            }
            const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + 64);
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, x.values + int64_t(r) * inputs + g * GROUP + 4 * i, 4);
                const __m512i all = _mm512_set1_epi32(four);
                dot(sum[r][0], all, w0);
                dot(sum[r][1], all, w1);
            }
        }
        const __m512 scale0 = _mm512_loadu_ps(weight.scales + g * PANEL);
        const __m512 scale1 = _mm512_loadu_ps(weight.scales + g * PANEL + LANES);
        for (int r = 0; r < R; r++) {
            const __m512 scale = _mm512_set1_ps(x.scales[r * groups + g]);
            total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), _mm512_mul_ps(scale0, scale), total[r][0]);
            total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), _mm512_mul_ps(scale1, scale), total[r][1]);
        }
    }
    float sums[R * PANEL];
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(sums + r * PANEL + half * LANES, total[r][half]);
    product.finish(row, R, panel, sums);
}

template <class T>
void multiply(const Product<T>& product, const Weight& weight) {
    const int rows = product.rows, inputs = product.inputs, groups = inputs / GROUP;
    const Rounded x{bench<ROWS, uint8_t>(size_t(rows) * inputs), bench<SCALES, float>(size_t(rows) * groups)};
    auto of_row = [&](int64_t r) { return Rounded{x.values + r * inputs, x.scales + r * groups}; };
    auto of_panel = [&](int64_t p) {
        const int64_t first = p * groups * PANEL;
        return Weight{weight.values + first * GROUP, weight.scales + first, weight.offsets + first};
    };
#pragma omp parallel num_threads(product.threads)
    {
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            const T* from = product.x + r * product.x_stride;
            const Rounded to = of_row(r);
            auto round = [&](const auto& row) { round_row(row, inputs, to.values, to.scales); };
            if (product.norm) round(Normed<T>(from, product.norm, inputs, product.eps));
            else round(Plain<T>{from});
        }
#pragma omp for schedule(static)
        for (int p = 0; p < product.panels(); p++)
            tiles<6>(rows, [&](int first, auto size, int, int) {
                tile<decltype(size)::value>(product, of_row(first), first, of_panel(p), p);
            });
    }
}

}  // namespace

#define MATMUL_INT8(NAME, T)                                                                                        \
    extern "C" void NAME(PRODUCT_ARGUMENTS, const int8_t* values, const float* scales, const int32_t* offsets) {    \
        multiply(PRODUCT(T), Weight{values, scales, offsets});                                                      \
    }

MATMUL_INT8(matmul_int8_float32, float)
MATMUL_INT8(matmul_int8_bfloat16, BFloat16)

#endif
