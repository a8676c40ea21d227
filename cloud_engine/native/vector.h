// Sixteen numbers at once, in the compiler's own vector types: it makes of them whatever the processor has.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace causeway {

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};

// Not `Floats{} + value`: an addition, and no longer the same bits.
inline Floats splat(float v) { return Floats{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }

inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Words words(Halves half) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32((__m256i)half);  // of the generic form GCC 12 makes four instructions
#else
    return __builtin_convertvector(half, Words);
#endif
}

inline Floats load(const BFloat16* from) {
    Halves half;
    std::memcpy(&half, from, sizeof half);
    return (Floats)(words(half) << 16);
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// Rounds to the nearest, ties to even, as torch does; a NaN stays one.
inline void store(BFloat16* to, Floats value) {
#ifdef __AVX512BF16__
    const __m256bh half = _mm512_cvtneps_pbh((__m512)value);  // what is smaller than a normal number becomes zero
#else
    Words bits = (Words)value;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = value == value ? rounded : (Words{} + 0x7fc0);
    Halves half = __builtin_convertvector(rounded, Halves);
#endif
    std::memcpy(to, &half, sizeof half);
}

inline float number(float value) { return value; }
inline float number(BFloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline Floats larger(Floats a, Floats b) {
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);  // of the generic form GCC 12 makes two instructions
#else
    return a > b ? a : b;
#endif
}

// Fold sixteen numbers to one by `join`, always in the same order. By shuffles: a copy of a half has the whole in memory,
// wherever it is used.
template <class Join>
inline float fold(Floats value, Join join) {
    const auto eight = join(__builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
    const auto four = join(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                           __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    const auto two = join(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
    return join(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}

inline float sum(Floats value) {
    return fold(value, [](auto a, auto b) { return a + b; });
}

inline float largest(Floats value) {
    return fold(value, [](auto a, auto b) { return a > b ? a : b; });
}

// 1 / x of a normal number, to about a unit in the last place; 0 if that is smaller than a normal number.
inline Floats reciprocal(Floats x) {
#ifdef __AVX512F__
    const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);  // with Newton's step 3 cycles, a division takes 10
    return guess * (2.0f - x * guess);
#else
    return 1.0f / x;
#endif
}

// e to the power of x to about 2 units in the last place; 0 below -87. Cody-Waite reduction, Taylor's polynomial.
inline Floats exponential(Floats x) {
    const Floats lowest = splat(-87.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats clamped = larger(x, lowest);
    clamped = clamped < 88.0f ? clamped : splat(88.0f);
    Floats shifted = clamped * 1.44269504f + magic;
    Floats turns = shifted - magic;
    Floats rest = clamped - turns * 0.693359375f + turns * 2.12194440e-4f;
    Floats value = splat(1.0f / 5040);
    value = value * rest + 1.0f / 720;
    value = value * rest + 1.0f / 120;
    value = value * rest + 1.0f / 24;
    value = value * rest + 1.0f / 6;
    value = value * rest + 0.5f;
    value = value * rest + 1.0f;
    value = value * rest + 1.0f;
    Ints exponent = ((Ints)shifted - 0x4b400000) << 23;
    value = (Floats)((Ints)value + exponent);
    return x < lowest ? Floats{} : value;
}

}  // namespace causeway
