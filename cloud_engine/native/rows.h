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
        Floats squares{};
        for (int i = 0; i < size; i += LANES) {
            const Floats part = load(row + i);
            squares += part * part;
        }
        factor = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
    }
    Floats operator()(int i) const { return load(row + i) * factor * load(weight + i); }
};

// silu(gate) * up
inline Floats gated(Floats gate, Floats up) { return gate / (exponential(-gate) + 1.0f) * up; }

}  // namespace causeway
