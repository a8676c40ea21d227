// A product of rows with a weight packed in panels of 32 outputs, and what comes before and after it in the same pass.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "rows.h"

namespace causeway {

constexpr int PANEL = 2 * LANES;

// out = gate(norm(x) * weight + bias) + added. Sums are float32, and are rounded once.
template <class T>
struct Product {
    const T* x;  // [rows][inputs], the rows `x_stride` apart
    int64_t x_stride;
    int rows, inputs;
    const T* norm;  // the weight [inputs] of an RMS norm of each row, or none
    float eps;
    const float* bias;  // [panels][PANEL], or none
    const T* added;     // [rows][columns], the rows `added_stride` apart, or none
    int64_t added_stride;
    T* out;  // [rows][columns]
    int outputs;
    int gates;  // 1: a panel is sixteen gates and the sixteen numbers they let through, columns are half the outputs
    int threads;

    int panels() const { return (outputs + PANEL - 1) / PANEL; }
    int columns() const { return gates ? outputs / 2 : outputs; }

    // Asks for the memory that `finish` will read and write.
    void expect(int row, int count, int panel) const {
        const int column = panel * (gates ? LANES : PANEL);
        for (int last = row + count; row < last; row++) {
            if (added) __builtin_prefetch(added + row * added_stride + column);
            __builtin_prefetch(out + int64_t(row) * columns() + column, 1);
        }
    }

    // The sums [count][PANEL] of rows from `row` on with a panel become output.
    __attribute__((noinline)) void finish(int row, int count, int panel, const float* sums) const {
        for (int last = row + count; row < last; row++, sums += PANEL) {
            Floats first = load(sums), second = load(sums + LANES);
            if (bias) first += load(bias + panel * PANEL), second += load(bias + panel * PANEL + LANES);
            if (gates) {
                put(row, panel * LANES, gated(first, second));
            } else {
                put(row, panel * PANEL, first);
                put(row, panel * PANEL + LANES, second);
            }
        }
    }
    void put(int row, int column, Floats value) const {
        const int some = columns() - column;
        T* to = out + int64_t(row) * columns() + column;
        const T* more = added ? added + row * added_stride + column : nullptr;
        if (some >= LANES) {
            store(to, more ? value + load(more) : value);
        } else if (some > 0) {
            T last[LANES] = {};
            if (more) std::copy_n(more, some, last);
            store(last, more ? value + load(last) : value);
            std::copy_n(last, some, to);
        }
    }
};

enum Use { ROWS, SCALES, STARTS };

// Memory of the calling thread for one use, kept from call to call.
template <Use, class T>
T* bench(size_t size) {
    static thread_local std::vector<T> memory;
    if (memory.size() < size) memory.resize(size);
    return memory.data();
}

// `work(std::integral_constant<rows>)`, where rows are 1 to MOST.
template <int MOST, class Work, int R = MOST>
void with_rows(int rows, Work&& work) {
    if constexpr (R > 0) {
        if (rows == R) work(std::integral_constant<int, R>{});
        else with_rows<MOST, Work, R - 1>(rows, std::forward<Work>(work));
    }
}

// Call `work(first row, std::integral_constant<rows>, tile, tiles)` for tiles of at most MOST rows, as equal as can be.
template <int MOST, class Work>
void tiles(int rows, Work&& work) {
    const int count = (rows + MOST - 1) / MOST;
    for (int i = 0, first = 0; i < count; i++) {
        const int some = (rows - first) / (count - i);
        with_rows<MOST>(some, [&](auto size) { work(first, size, i, count); });
        first += some;
    }
}

}  // namespace causeway

#define PRODUCT_ARGUMENTS                                                                                           \
    const void *x, int64_t x_stride, int rows, int inputs, const void *norm, float eps, const float *bias,          \
        const void *added, int64_t added_stride, void *out, int outputs, int gates, int threads

#define PRODUCT(T)                                                                                                  \
    Product<T> {                                                                                                    \
        (const T*)x, x_stride, rows, inputs, (const T*)norm, eps, bias, (const T*)added, added_stride, (T*)out,     \
            outputs, gates, threads                                                                                 \
    }
