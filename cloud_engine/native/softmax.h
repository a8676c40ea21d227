// The online softmax: weights under the maximum so far.
#pragma once
#include <cmath>

#include "paged.h"
#include "steps.h"

namespace causeway {

// What a row has found so far: its best score, the sum of its weights under it, and the sum of the values [dim] so weighted.
struct Found {
    float *best, *weight, *result;
};

// Products of a row with a tile of keys become weights of `scale` times as much; what it found before is scaled to the new maximum. Keys outside
// [low, high), counted from the tile's first, are hidden. `weights` may be `scores`.
template <class Step>
void soften(const float* scores, typename Step::Value* weights, int vectors, int low, int high, float scale, Found row,
            int dim) {
    Ints number;
    for (int i = 0; i < LANES; i++) number[i] = i;
    Floats most = splat(NONE), seen[KEYS / LANES];
    for (int c = 0; c < vectors; c++) {
        const Ints key = number + c * LANES;
        seen[c] = (key >= low) & (key < high) ? load(scores + c * LANES) * scale : splat(NONE);
        most = larger(seen[c], most);
    }
    const float now = std::max(*row.best, largest(most));
    if (now == NONE) {
        for (int c = 0; c < vectors; c++) Step::narrow(weights + c * LANES, Floats{});
        return;
    }
    Floats total{};
    for (int c = 0; c < vectors; c++) {
        const Floats part = exponential(seen[c] - now);
        Step::narrow(weights + c * LANES, part);
        total += part;
    }
    if (now != *row.best) {
        const float kept = std::exp(*row.best - now);
        *row.weight *= kept;
        for (int d = 0; d < dim; d += LANES) store(row.result + d, load(row.result + d) * kept);
        *row.best = now;
    }
    *row.weight += sum(total);
}

// The same for all rows of a problem, [rows][KEYS] each; `from` is the place of the tile's first key in the sequence.
template <class Inner, class T>
void soften_rows(const Step<T>& step, const Item& item, int from, int count, const float* scores,
                 typename Inner::Value* weights, Found first) {
    const int group = step.group(), rows = item.rows_of_head(step), vectors = (count + LANES - 1) / LANES;
    const int64_t behind = int64_t(step.contexts[item.sequence]) - step.starts[item.sequence + 1];
    for (int r = 0; r < rows; r++) {
        const int64_t position = behind + item.row + r / group;
        const int low = int(std::clamp<int64_t>(position + 1 - step.window - from, 0, KEYS));
        const int high = int(std::min<int64_t>(count, position + 1 - from));
        soften<Inner>(scores + r * KEYS, weights + r * KEYS, vectors, low, high, step.scale,
                      {first.best + r, first.weight + r, first.result + int64_t(r) * step.dim}, step.dim);
    }
}

}  // namespace causeway
