// A tile of keys with few rows, as a decode has them: keys and values are multiplied where they lie.
#pragma once
#include <type_traits>

#include "softmax.h"

namespace causeway {

// Add up each of sixteen vectors: lane i is the sum of the i-th.
template <int S>
void halve(Floats (&part)[LANES]) {
    Ints upper, lower;
    for (int i = 0; i < LANES; i++) {
        upper[i] = i & S ? LANES + i - S : i;
        lower[i] = i & S ? LANES + i : i + S;
    }
    for (int i = 0; i < S; i++)
        part[i] = __builtin_shuffle(part[i], part[i + S], upper) + __builtin_shuffle(part[i], part[i + S], lower);
}

inline Floats sums(Floats (&part)[LANES]) {
    halve<8>(part);
    halve<4>(part);
    halve<2>(part);
    halve<1>(part);
    return part[0];
}

// The products of a query with sixteen keys, which lie `offset` behind `keys`; after each 64 bytes of them `asks`.
template <class T>
Floats dots(const T* query, const T* const* keys, int offset, int dim, Ahead<T>& ahead, int asks) {
    typedef typename Inner<T>::Step Step;
    constexpr int WHOLE = LANES * Step::WIDTH;
    Floats part[LANES] = {};
    auto some = [&](int d, int numbers) {
        const Floats q = Step::take(query + d, numbers);
        for (int i = 0; i < LANES; i++) part[i] = Step::add(part[i], Step::take(keys[i] + offset + d, numbers), q);
        for (int i = 0; i < asks; i++) ahead.ask();
    };
    int d = 0;
    for (; d + WHOLE <= dim; d += WHOLE) some(d, WHOLE);
    if (d < dim) some(d, LANES);
    return sums(part);
}

// result [R][dim] += weights [R][KEYS] times the values, which lie `offset` behind the keys. Of bfloat16 two at a time: of
// an odd number the last one meets the key that fills the tile, and a weight of zero.
template <int R, class T>
void weigh(const Keys<T>& keys, int64_t offset, const typename Inner<T>::Value* weights, float* result, int dim,
           Ahead<T>& ahead) {
    typedef typename Inner<T>::Step Step;
    for (int d = 0; d < dim; d += 4 * LANES) {
        auto some = [&](auto width) {
            constexpr int V = decltype(width)::value;
            Floats total[R][V];
            for (int r = 0; r < R; r++)
                for (int c = 0; c < V; c++) total[r][c] = load(result + r * dim + d + c * LANES);
            for (int i = 0; i < keys.count; i += Step::WIDTH) {
                for (int a = 0; a < Step::WIDTH * int(sizeof(T)) / 2; a++) ahead.ask();
                const T *row = keys.at[i] + offset + d, *next = keys.at[i + Step::WIDTH - 1] + offset + d;
                Floats value[V];
                for (int c = 0; c < V; c++) value[c] = Step::across(row + c * LANES, next + c * LANES);
                for (int r = 0; r < R; r++) {
                    const Floats weight = lane(weights + r * KEYS + i);
                    for (int c = 0; c < V; c++) total[r][c] = Step::add(total[r][c], value[c], weight);
                }
            }
            for (int r = 0; r < R; r++)
                for (int c = 0; c < V; c++) store(result + r * dim + d + c * LANES, total[r][c]);
        };
        switch (std::min(4, (dim - d) / LANES)) {
            case 4: some(std::integral_constant<int, 4>{}); break;
            case 3: some(std::integral_constant<int, 3>{}); break;
            case 2: some(std::integral_constant<int, 2>{}); break;
            default: some(std::integral_constant<int, 1>{});
        }
    }
}

template <class T>
void weigh_rows(const Keys<T>& keys, int64_t offset, int rows, const typename Inner<T>::Value* weights, float* result,
                int dim, Ahead<T>& ahead) {
    for (; rows >= 4; rows -= 4, weights += 4 * KEYS, result += 4 * dim)
        weigh<4>(keys, offset, weights, result, dim, ahead);
    if (rows == 3) weigh<3>(keys, offset, weights, result, dim, ahead);
    if (rows == 2) weigh<2>(keys, offset, weights, result, dim, ahead);
    if (rows == 1) weigh<1>(keys, offset, weights, result, dim, ahead);
}

// All heads of the item; meanwhile `next`, a tile of `next_heads`, is fetched, at the rate at which this one is read: half
// of it while keys are read, half with the values. `scores` and `weights` have room for a head's.
template <class T>
void attend_few(const Step<T>& step, const Item& item, int from, const Keys<T>& keys, const Keys<T>& next,
                int next_heads, float* scores, typename Inner<T>::Value* weights, Found found) {
    const int rows = item.rows_of_head(step), dim = step.dim, vectors = (keys.count + LANES - 1) / LANES;
    const int asks = (LANES / 2 + rows - 1) / rows;
    Ahead<T> ahead(step, next, next_heads);
    for (int h = 0; h < item.heads; h++) {
        for (int c = 0; c < vectors; c++)
            for (int r = 0; r < rows; r++)
                store(scores + r * KEYS + c * LANES,
                      dots(item.query(step, h * rows + r), keys.at + c * LANES, h * dim, dim, ahead, asks));
        const Found mine{found.best + h * rows, found.weight + h * rows, found.result + int64_t(h) * rows * dim};
        soften_rows<typename Inner<T>::Step>(step, item, from, keys.count, scores, weights, mine);
        weigh_rows(keys, step.values() + h * dim, rows, weights, mine.result, dim, ahead);
    }
    ahead.rest();
}

}  // namespace causeway
