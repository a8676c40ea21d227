// A tile of keys with many rows, as a prompt has them: keys and values are first put into the order in which a product
// takes them, keys turned, so that scores and results are broadcasts times vectors. Of bfloat16 weights become so too.
#pragma once
#include <type_traits>
#include <utility>
#include <vector>

#include "softmax.h"

namespace causeway {

// sums [R][V vectors] = (add to it) the product of left [R][steps] and right [steps][columns], in lanes of four bytes.
template <int R, int V, class Inner>
void product(const typename Inner::Value* left, int left_stride, const float* right, int right_stride, int steps,
             float* sums, int sums_stride, bool add) {
    Floats total[R][V];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < V; c++) total[r][c] = add ? load(sums + r * sums_stride + c * LANES) : Floats{};
    for (int i = 0; i < steps; i++) {
        Floats column[V];
        for (int c = 0; c < V; c++) column[c] = lanes(right + int64_t(i) * right_stride + c * LANES);
        for (int r = 0; r < R; r++) {
            const Floats factor = lane(left + r * left_stride + i * Inner::WIDTH);
            for (int c = 0; c < V; c++) total[r][c] = Inner::add(total[r][c], column[c], factor);
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < V; c++) store(sums + r * sums_stride + c * LANES, total[r][c]);
}

// The same for any number of rows, and of vectors.
template <class Inner>
void multiply(const typename Inner::Value* left, int left_stride, const float* right, int right_stride, int steps,
              float* sums, int sums_stride, bool add, int rows, int vectors) {
    constexpr int MOST = 6;
    auto block = [&](auto height, auto width, int r, int c) {
        product<decltype(height)::value, decltype(width)::value, Inner>(left + r * left_stride, left_stride,
                                                                        right + c * LANES, right_stride, steps,
                                                                        sums + r * sums_stride + c * LANES,
                                                                        sums_stride, add);
    };
    auto column = [&](auto width, int c) {
        int r = 0;
        for (; r + MOST <= rows; r += MOST) block(std::integral_constant<int, MOST>{}, width, r, c);
        for (; r + 2 <= rows; r += 2) block(std::integral_constant<int, 2>{}, width, r, c);
        if (r < rows) block(std::integral_constant<int, 1>{}, width, r, c);
    };
    int c = 0;
    for (; c + 4 <= vectors; c += 4) column(std::integral_constant<int, 4>{}, c);
    for (; c < vectors; c++) column(std::integral_constant<int, 1>{}, c);
}

// Exchange, between rows that are S apart, the blocks of S columns that lie off the diagonal.
template <int S>
void exchange(Floats (&row)[LANES]) {
    Ints upper, lower;
    for (int i = 0; i < LANES; i++) {
        upper[i] = i & S ? LANES + i - S : i;
        lower[i] = i & S ? LANES + i : i + S;
    }
    for (int i = 0; i < LANES; i++) {
        if (i & S) continue;
        const Floats a = row[i], b = row[i + S];
        row[i] = __builtin_shuffle(a, b, upper);
        row[i + S] = __builtin_shuffle(a, b, lower);
    }
}

inline void transpose(Floats (&row)[LANES]) {
    exchange<8>(row);
    exchange<4>(row);
    exchange<2>(row);
    exchange<1>(row);
}

// One thread's working memory for an item of many rows.
template <class T>
struct Turned {
    typedef typename Inner<T>::Step Inner;
    typedef typename Inner::Value Value;
    static constexpr int WIDTH = Inner::WIDTH;
    std::vector<Value> queries, weights;     // [rows][dim], [rows][KEYS]
    std::vector<float> keys, values, scores; // lanes [dim / WIDTH][KEYS], [KEYS / WIDTH][dim]; [rows][KEYS]

    void reserve(size_t rows, size_t dim) {
        auto fit = [](auto& memory, size_t size) { memory.resize(std::max(memory.size(), size)); };
        fit(queries, rows * dim), fit(weights, rows * KEYS), fit(scores, rows * KEYS);
        fit(keys, dim * KEYS), fit(values, dim * KEYS);
    }

    void begin(const Step<T>& step, const Item& item) {
        for (int r = 0; r < item.rows_of_head(step); r++) {
            const T* query = item.query(step, r);
            if constexpr (std::is_same_v<T, Value>) std::copy_n(query, step.dim, &queries[r * step.dim]);
            else for (int d = 0; d < step.dim; d += LANES) store(&queries[r * step.dim + d], load(query + d));
        }
    }

    void turn(const Step<T>& step, const Keys<T>& tile) {
        const int dim = step.dim;
        for (int i = 0; i < tile.count; i += WIDTH) {
            const T *row = tile.at[i] + step.values(), *next = i + 1 < tile.count ? tile.at[i + 1] + step.values() : nullptr;
            for (int d = 0; d < dim; d += LANES) put(&values[i / WIDTH * dim + d], Inner::across(row + d, next ? next + d : nullptr));
        }
        for (int first = 0; first < tile.count; first += LANES)
            for (int d = 0; d < dim; d += LANES * WIDTH) {
                Floats rows[LANES];
                if (d + LANES * WIDTH <= dim)
                    for (int i = 0; i < LANES; i++) rows[i] = Inner::take(tile.at[first + i] + d, LANES * WIDTH);
                else
                    for (int i = 0; i < LANES; i++) rows[i] = Inner::take(tile.at[first + i] + d, LANES);
                transpose(rows);
                for (int i = 0; i < LANES && d + i * WIDTH < dim; i++) put(&keys[(d / WIDTH + i) * KEYS + first], rows[i]);
            }
    }

    void attend(const Step<T>& step, const Item& item, int from, const Keys<T>& tile, Found found) {
        const int rows = item.rows_of_head(step), dim = step.dim, vectors = (tile.count + LANES - 1) / LANES;
        turn(step, tile);
        multiply<Inner>(queries.data(), dim, keys.data(), KEYS, dim / WIDTH, scores.data(), KEYS, false, rows, vectors);
        soften_rows<Inner>(step, item, from, tile.count, scores.data(), weights.data(), found);
        multiply<Inner>(weights.data(), KEYS, values.data(), dim, (tile.count + WIDTH - 1) / WIDTH, found.result, dim,
                        true, rows, dim / LANES);
    }
};

}  // namespace causeway
