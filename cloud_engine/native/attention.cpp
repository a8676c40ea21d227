// Paged attention: keys and values are read where they lie, through the block tables, with an online softmax.
//
// A work item is a tile of rows of one sequence and one key head: the query heads of that group are rows of one problem.
// Keys come in tiles of 64, turned so that scores are broadcasts times vectors. A sequence with one tile of rows (a
// decode) is divided into segments of keys, always at the same places, and merged in their order: what a sequence gets
// does not depend on the batch around it. Slots that no row may see are never read.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vector.h"

using namespace causeway;

namespace {

constexpr int KEYS = 64;           // keys of a tile
constexpr int SEGMENT = 16 * KEYS; // keys of a segment
constexpr int ROWS = 48;           // rows of a tile, about
constexpr int SPARE = 4;           // items for each thread, at least, so that none waits long for another
constexpr float NONE = -std::numeric_limits<float>::infinity();

template <class T>
struct Step {
    const T *q, *k, *v;
    T *cache, *out;
    const int64_t* slots;
    const int32_t *starts, *contexts, *tables;
    int64_t q_stride, k_stride, v_stride, num_slots;
    int sequences, width, rows, heads, kv_heads, dim, block_size, window;
    float scale;

    int group() const { return heads / kv_heads; }
    // Where the keys of `count` positions from `from` on lie; their values are `values()` further.
    void find(const T** at, int sequence, int head, int from, int count) const {
        const int32_t* block = tables + int64_t(sequence) * width + from / block_size;
        for (int i = 0, offset = from % block_size; i < count; i++) {
            at[i] = cache + ((int64_t(*block) * block_size + offset) * kv_heads + head) * dim;
            if (++offset == block_size) offset = 0, block++;
        }
    }
    int64_t values() const { return num_slots * kv_heads * dim; }
    T* place(int row, int head) const { return out + (int64_t(row) * heads + head) * dim; }
};

struct Item {
    int sequence, row, count, head, heads, begin, end;
    int64_t partial;  // where its unfinished result goes; -1: it is the whole
};

struct Merge {
    int row, count, head, heads, segments;
    int64_t partial;
};

// sums[r][c] = (add to it) the product of left [r][inner] and right [inner][c], for R rows and V vectors of columns.
template <int R, int V>
void product(const float* left, int left_stride, const float* right, int right_stride, int inner, float* sums,
             int sums_stride) {
    Floats total[R][V];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < V; c++) total[r][c] = load(sums + r * sums_stride + c * LANES);
    for (int i = 0; i < inner; i++) {
        Floats column[V];
        for (int c = 0; c < V; c++) column[c] = load(right + int64_t(i) * right_stride + c * LANES);
        for (int r = 0; r < R; r++) {
            Floats factor = splat(left[r * left_stride + i]);
            for (int c = 0; c < V; c++) total[r][c] += factor * column[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < V; c++) store(sums + r * sums_stride + c * LANES, total[r][c]);
}

template <int V>
void product_rows(const float* left, int ls, const float* right, int rs, int inner, float* sums, int ss, int rows) {
    for (; rows >= 6; rows -= 6, left += 6 * ls, sums += 6 * ss) product<6, V>(left, ls, right, rs, inner, sums, ss);
    switch (rows) {
        case 5: product<5, V>(left, ls, right, rs, inner, sums, ss); break;
        case 4: product<4, V>(left, ls, right, rs, inner, sums, ss); break;
        case 3: product<3, V>(left, ls, right, rs, inner, sums, ss); break;
        case 2: product<2, V>(left, ls, right, rs, inner, sums, ss); break;
        case 1: product<1, V>(left, ls, right, rs, inner, sums, ss); break;
        default: break;
    }
}

void multiply(const float* left, int ls, const float* right, int rs, int inner, float* sums, int ss, int rows,
              int vectors) {
    for (; vectors >= 4; vectors -= 4, right += 4 * LANES, sums += 4 * LANES)
        product_rows<4>(left, ls, right, rs, inner, sums, ss, rows);
    switch (vectors) {
        case 3: product_rows<3>(left, ls, right, rs, inner, sums, ss, rows); break;
        case 2: product_rows<2>(left, ls, right, rs, inner, sums, ss, rows); break;
        case 1: product_rows<1>(left, ls, right, rs, inner, sums, ss, rows); break;
        default: break;
    }
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
        Floats a = row[i], b = row[i + S];
        row[i] = __builtin_shuffle(a, b, upper);
        row[i + S] = __builtin_shuffle(a, b, lower);
    }
}

void transpose(Floats (&row)[LANES]) {
    exchange<8>(row);
    exchange<4>(row);
    exchange<2>(row);
    exchange<1>(row);
}

// One thread's working memory.
struct Bench {
    std::vector<float> queries, keys, values, scores, result, best, weight;
    Bench(int rows, int dim)
        : queries(rows * dim), keys(dim * KEYS), values(KEYS * dim), scores(rows * KEYS), result(rows * dim),
          best(rows), weight(rows) {}
};

// The keys of one position lie together, those of the next are elsewhere: no processor guesses that by itself.
template <class T>
void fetch(const Step<T>& step, const Item& item, int from) {
    const T* at[KEYS];
    const int count = std::min(KEYS, item.end - from);
    if (count <= 0) return;
    step.find(at, item.sequence, item.head, from, count);
    const int64_t values = step.values() * int64_t(sizeof(T)), bytes = int64_t(item.heads) * step.dim * sizeof(T);
    for (int i = 0; i < count; i++)
        for (int64_t line = 0; line < bytes; line += 64) {
            __builtin_prefetch((const char*)at[i] + line, 0, 2);
            __builtin_prefetch((const char*)at[i] + values + line, 0, 2);
        }
}

template <class T>
void read(const Step<T>& step, const Item& item, int head, int from, int count, Bench& bench) {
    const T* at[KEYS];
    step.find(at, item.sequence, head, from, count);
    const int64_t values = step.values();
    for (int i = 0; i < count; i++)
        for (int d = 0; d < step.dim; d += LANES) store(&bench.values[i * step.dim + d], load(at[i] + values + d));
    for (int first = 0; first < count; first += LANES) {
        const int some = std::min(LANES, count - first);
        for (int d = 0; d < step.dim; d += LANES) {
            Floats rows[LANES];
            if (some == LANES)
                for (int i = 0; i < LANES; i++) rows[i] = load(at[first + i] + d);
            else
                for (int i = 0; i < LANES; i++) rows[i] = i < some ? load(at[first + i] + d) : Floats{};
            transpose(rows);
            for (int i = 0; i < LANES; i++) store(&bench.keys[(d + i) * KEYS + first], rows[i]);
        }
    }
}

// Scores of a row become weights under its new maximum; what it had so far is scaled to that. Keys outside [low, high),
// counted from the tile's first, are hidden.
void soften(float* scores, int vectors, int low, int high, float& best, float& weight, float* result, int dim) {
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    Floats most = splat(NONE), seen[KEYS / LANES];
    for (int c = 0; c < vectors; c++) {
        Ints key = lane + c * LANES;
        seen[c] = (key >= low) & (key < high) ? load(scores + c * LANES) : splat(NONE);
        most = larger(seen[c], most);
    }
    float now = std::max(best, largest(most));
    if (now == NONE) {
        std::fill(scores, scores + vectors * LANES, 0.0f);
        return;
    }
    Floats total{};
    for (int c = 0; c < vectors; c++) {
        Floats part = exponential(seen[c] - now);
        store(scores + c * LANES, part);
        total += part;
    }
    if (now != best) {
        float kept = std::exp(best - now);
        weight *= kept;
        for (int d = 0; d < dim; d += LANES) store(result + d, load(result + d) * kept);
        best = now;
    }
    weight += sum(total);
}

// One tile of keys against the rows of one head, which are the bench's from `first` on.
template <class T>
void attend_tile(const Step<T>& step, const Item& item, int head, int first, int from, Bench& bench) {
    const int group = step.group(), rows = item.count * group, dim = step.dim;
    const int count = std::min(KEYS, item.end - from), vectors = (count + LANES - 1) / LANES;
    const int64_t behind = int64_t(step.contexts[item.sequence]) - step.starts[item.sequence + 1];
    read(step, item, head, from, count, bench);
    std::fill(bench.scores.begin(), bench.scores.begin() + rows * KEYS, 0.0f);
    multiply(&bench.queries[first * dim], dim, bench.keys.data(), KEYS, dim, bench.scores.data(), KEYS, rows, vectors);
    for (int r = 0; r < rows; r++) {
        const int64_t position = behind + item.row + r / group;
        const int64_t low = std::clamp<int64_t>(position + 1 - step.window - from, 0, KEYS);
        const int64_t high = std::min<int64_t>(count, position + 1 - from);
        soften(&bench.scores[r * KEYS], vectors, int(low), int(high), bench.best[first + r], bench.weight[first + r],
               &bench.result[(first + r) * dim], dim);
    }
    multiply(bench.scores.data(), KEYS, bench.values.data(), dim, count, &bench.result[first * dim], dim, rows,
             dim / LANES);
}

template <class T>
void attend(const Step<T>& step, const Item& item, Bench& bench, float* partials) {
    const int group = step.group(), rows = item.count * group, all = rows * item.heads, dim = step.dim;
    fetch(step, item, item.begin);
    auto row = [&](int r) { return item.row + r % rows / group; };
    auto head = [&](int r) { return (item.head + r / rows) * group + r % group; };
    for (int r = 0; r < all; r++) {
        const T* from = step.q + row(r) * step.q_stride + head(r) * dim;
        for (int d = 0; d < dim; d += LANES) {
            store(&bench.queries[r * dim + d], load(from + d) * step.scale);
            store(&bench.result[r * dim + d], Floats{});
        }
        bench.best[r] = NONE;
        bench.weight[r] = 0;
    }
    for (int from = item.begin; from < item.end; from += KEYS) {
        fetch(step, item, from + KEYS);
        for (int h = 0; h < item.heads; h++) attend_tile(step, item, item.head + h, h * rows, from, bench);
    }
    for (int r = 0; r < all; r++) {
        const float* result = &bench.result[r * dim];
        if (item.partial >= 0) {
            float* to = partials + (item.partial + r) * (dim + 2);
            std::copy(result, result + dim, to);
            to[dim] = bench.best[r];
            to[dim + 1] = bench.weight[r];
            continue;
        }
        T* to = step.place(row(r), head(r));
        for (int d = 0; d < dim; d += LANES) store(to + d, load(result + d) / bench.weight[r]);
    }
}

template <class T>
void merge(const Step<T>& step, const Merge& item, const float* partials) {
    const int group = step.group(), rows = item.count * group, all = rows * item.heads, dim = step.dim;
    for (int r = 0; r < all; r++) {
        auto part = [&](int s) { return partials + (item.partial + int64_t(s) * all + r) * (dim + 2); };
        float best = NONE, weight = 0;
        for (int s = 0; s < item.segments; s++) best = std::max(best, part(s)[dim]);
        for (int s = 0; s < item.segments; s++) weight += std::exp(part(s)[dim] - best) * part(s)[dim + 1];
        T* to = step.place(item.row + r % rows / group, (item.head + r / rows) * group + r % group);
        for (int d = 0; d < dim; d += LANES) {
            Floats total{};
            for (int s = 0; s < item.segments; s++) total += load(part(s) + d) * std::exp(part(s)[dim] - best);
            store(to + d, total / weight);
        }
    }
}

// Divide the step into items of `heads` key heads; returns how many partial rows there are.
template <class T>
int64_t divide(const Step<T>& step, int tile, int heads, std::vector<Item>& items, std::vector<Merge>& merges) {
    int64_t partials = 0;
    for (int i = 0; i < step.sequences; i++) {
        const int first = step.starts[i], last = step.starts[i + 1], context = step.contexts[i];
        for (int row = first; row < last; row += tile) {
            const int count = std::min(tile, last - row), end = context - (last - row - count);
            const int begin = int(std::max<int64_t>(0, int64_t(context) - (last - row) + 1 - step.window));
            const int from = begin / SEGMENT, segments = last - first > tile ? 1 : (end - 1) / SEGMENT - from + 1;
            for (int head = 0; head < step.kv_heads; head += heads) {
                const int some = std::min(heads, step.kv_heads - head);
                if (segments == 1) {
                    items.push_back({i, row, count, head, some, begin, end, -1});
                    continue;
                }
                merges.push_back({row, count, head, some, segments, partials});
                for (int s = from; s < from + segments; s++, partials += count * some * step.group())
                    items.push_back({i, row, count, head, some, std::max(begin, s * SEGMENT),
                                     std::min(end, (s + 1) * SEGMENT), partials});
            }
        }
    }
    return partials;
}

// 0, or 1 where a slot is outside the cache: then nothing has been written.
template <class T>
int run(const Step<T>& step, int threads) {
    for (int i = 0; i < step.rows; i++)
        if (step.slots[i] < 0 || step.slots[i] >= step.num_slots) return 1;
    const int tile = std::max(1, ROWS / step.group()), size = step.kv_heads * step.dim;
    // Enough sequences: one thread reads all heads of a position, which lie together.
    const int heads = step.sequences < SPARE * threads || step.rows > step.sequences ? 1 : step.kv_heads;
    std::vector<Item> items;
    std::vector<Merge> merges;
    std::vector<float> partials(divide(step, tile, heads, items, merges) * (step.dim + 2));
    const int count = int(items.size()), joined = int(merges.size());
#pragma omp parallel num_threads(threads)
    {
        Bench bench(std::min(tile, step.rows) * heads * step.group(), step.dim);
#pragma omp for schedule(static)
        for (int i = 0; i < step.rows; i++) {
            std::copy_n(step.k + i * step.k_stride, size, step.cache + step.slots[i] * size);
            std::copy_n(step.v + i * step.v_stride, size, step.cache + (step.num_slots + step.slots[i]) * size);
        }
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < count; i++) attend(step, items[i], bench, partials.data());
        if (joined) {
#pragma omp for schedule(static)
            for (int i = 0; i < joined; i++) merge(step, merges[i], partials.data());
        }
    }
    return 0;
}

}  // namespace

#define ATTENTION(NAME, T)                                                                                          \
    extern "C" int NAME(const void* q, const void* k, const void* v, void* cache, void* out, const int64_t* slots,  \
                        const int32_t* starts, const int32_t* contexts, const int32_t* tables, int64_t q_stride,    \
                        int64_t k_stride, int64_t v_stride, int64_t num_slots, int sequences, int width, int rows,  \
                        int heads, int kv_heads, int dim, int block_size, int window, float scale, int threads) {   \
        return run(Step<T>{(const T*)q, (const T*)k, (const T*)v, (T*)cache, (T*)out, slots, starts, contexts,      \
                           tables, q_stride, k_stride, v_stride, num_slots, sequences, width, rows, heads,          \
                           kv_heads, dim, block_size, window, scale},                                               \
                   threads);                                                                                        \
    }

ATTENTION(attention_float32, float)
ATTENTION(attention_bfloat16, BFloat16)
