// What is done to a row by itself: alone (`rows.cpp`), or on its way into a product and out of it (`product.h`).
#pragma once
#include <cmath>

#include "vector.h"

namespace causeway {

// Sixteen numbers of a row from `i` on, as they are.
template <class T>
struct Plain {
    const T* row;

    Floats operator()(int i) const { return load(row + i); }
};

// The same, divided by the row's root mean square and multiplied with a weight.
template <class T>
struct Normed {
    const T *row, *weight;
    float factor;

    Normed(const T* row, const T* weight, int size, float eps) : row(row), weight(weight) {
        Floats squares[4] = {};  // each addition waits for the one before it: four sums at a time
        auto add = [&](Floats& squares, int i) {
            const Floats part = load(row + i);
            squares += part * part;
        };
        int i = 0;
        for (; i + 4 * LANES <= size; i += 4 * LANES)
            for (int j = 0; j < 4; j++) add(squares[j], i + j * LANES);
        for (; i < size; i += LANES) add(squares[0], i);
        factor = 1.0f / std::sqrt(sum(squares[0] + squares[1] + (squares[2] + squares[3])) / float(size) + eps);
    }
    Floats operator()(int i) const { return load(row + i) * factor * load(weight + i); }
};

// silu(gate) * up
inline Floats gated(Floats gate, Floats up) { return gate * reciprocal(exponential(-gate) + 1.0f) * up; }

}  // namespace causeway
