// What one step along the inner dimension of a product takes. Lanes have four bytes: a float, or a pair of bfloat16 that
// the processor multiplies and adds up at once.
#pragma once
#include "vector.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace causeway {

// The four bytes there, in all lanes.
inline Floats lane(const void* from) {
    float value;
    std::memcpy(&value, from, sizeof value);
    return splat(value);
}

inline Floats lanes(const void* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline void put(void* to, Floats value) { std::memcpy(to, &value, sizeof value); }

struct Singles {
    typedef float Value;
    static constexpr int WIDTH = 1;

    static Floats add(Floats sum, Floats columns, Floats x) { return sum + columns * x; }
    // Sixteen lanes of numbers that lie together; of a last half there are eight.
    template <class T>
    static Floats take(const T* from, int) {
        return load(from);
    }
    // Sixteen lanes across: the numbers of one row.
    template <class T>
    static Floats across(const T* row, const T*) {
        return load(row);
    }
    static void narrow(float* to, Floats numbers) { store(to, numbers); }
};

#ifdef __AVX512BF16__
struct Pairs {
    typedef uint16_t Pairing __attribute__((vector_size(64)));
    typedef BFloat16 Value;
    static constexpr int WIDTH = 2;

    static Floats add(Floats sum, Floats columns, Floats x) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)columns, (__m512bh)x);
    }
    static Floats take(const BFloat16* from, int numbers) {
        Floats value{};
        if (numbers >= 2 * LANES) std::memcpy(&value, from, sizeof value);
        else std::memcpy(&value, from, sizeof value / 2);
        return value;
    }
    // A number of `row` and the one of `next`, the row after it, if there is one.
    static Floats across(const BFloat16* row, const BFloat16* next) {
        __m256i low, high{};
        std::memcpy(&low, row, sizeof low);
        if (next) std::memcpy(&high, next, sizeof high);
        const Pairing turns = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                               8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        return (Floats)_mm512_permutex2var_epi16(_mm512_castsi256_si512(low), (__m512i)turns,
                                                 _mm512_castsi256_si512(high));
    }
    static void narrow(BFloat16* to, Floats numbers) { store(to, numbers); }
};
#endif

// How keys and values of this type are multiplied.
template <class T>
struct Inner {
    typedef Singles Step;
    typedef float Value;
};
#ifdef __AVX512BF16__
template <>
struct Inner<BFloat16> {
    typedef Pairs Step;
    typedef BFloat16 Value;
};
#endif

}  // namespace causeway
