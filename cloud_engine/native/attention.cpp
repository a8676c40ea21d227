// Paged attention: keys and values are read where they lie, through the block tables, with an online softmax.
//
// A work item is a tile of rows of one sequence and one key head: the query heads of that group are rows of one problem.
// Keys come in tiles of 64, turned so that scores are broadcasts times vectors. A sequence with one tile of rows (a
// decode) is divided into segments of keys, always at the same places, and merged in their order: what a sequence gets
// does not depend on the batch around it. Slots that no row may see are never read.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vector.h"

using namespace causeway;

namespace {

constexpr int KEYS = 64;           // keys of a tile
constexpr int SEGMENT = 16 * KEYS; // keys of a segment
constexpr int ROWS = 48;           // rows of a tile, about
constexpr int SPARE = 8;           // parts of the work for each thread, so that none waits long for another
constexpr int FEW = 8;             // rows that are multiplied with keys and values as they lie
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
    int sequence, row, count, head, begin, end;
    int64_t partial;  // where its unfinished result goes; -1: it is the whole
};

struct Merge {
    int row, count, head, segments;
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

// One thread's working memory, kept from call to call.
struct Bench {
    std::vector<float> queries, keys, values, scores, result, best, weight;
    void reserve(size_t rows, size_t dim) {
        for (auto* of_rows : {&queries, &result}) of_rows->resize(std::max(of_rows->size(), rows * dim));
        for (auto* of_keys : {&keys, &values}) of_keys->resize(std::max(of_keys->size(), dim * KEYS));
        for (auto* of_row : {&best, &weight}) of_row->resize(std::max(of_row->size(), rows));
        scores.resize(std::max(scores.size(), rows * KEYS));
    }
};

// The keys of a tile, their values `step.values()` further.
template <class T>
struct Keys {
    const T* at[KEYS];
    int count = 0;
};

template <class T>
void find(const Step<T>& step, const Item& item, int from, Keys<T>& keys) {
    keys.count = std::min(KEYS, item.end - from);
    step.find(keys.at, item.sequence, item.head, from, keys.count);
    // The rest of the last sixteen are computed too, and hidden: any key does.
    for (int i = keys.count; i % LANES; i++) keys.at[i] = keys.at[0];
}

// Ask for what the next tile reads, in step with the reading of this one: the heads of a position lie together, those of
// one head do not, and no processor guesses that by itself.
template <class T>
void fetch(const Step<T>& step, const Keys<T>& next, int i, int64_t offset) {
    if (i < next.count)
        for (int d = 0; d < step.dim; d += 64 / int(sizeof(T))) __builtin_prefetch(next.at[i] + offset + d);
}

template <class T>
void turn(const Step<T>& step, const Keys<T>& keys, const Keys<T>& next, Bench& bench) {
    const int64_t values = step.values();
    for (int i = 0; i < keys.count; i++) {
        fetch(step, next, i, values);
        for (int d = 0; d < step.dim; d += LANES) store(&bench.values[i * step.dim + d], load(keys.at[i] + values + d));
    }
    for (int first = 0; first < keys.count; first += LANES) {
        for (int i = 0; i < LANES; i++) fetch(step, next, first + i, 0);
        for (int d = 0; d < step.dim; d += LANES) {
            Floats rows[LANES];
            for (int i = 0; i < LANES; i++) rows[i] = load(keys.at[first + i] + d);
            transpose(rows);
            for (int i = 0; i < LANES; i++) store(&bench.keys[(d + i) * KEYS + first], rows[i]);
        }
    }
}

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

template <class T>
void dot(const T* query, const T* const* keys, int d, Floats (&part)[LANES]) {
    const Floats q = load(query + d);
    for (int i = 0; i < LANES; i++) part[i] += q * load(keys[i] + d);
}

// The products of a query with sixteen keys.
template <class T>
Floats dots(const T* query, const T* const* keys, int dim) {
    Floats part[LANES] = {};
    int d = 0;
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) == 2)
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
            const __m512bh q = (__m512bh)_mm512_loadu_si512(query + d);
            for (int i = 0; i < LANES; i++)
                part[i] = (Floats)_mm512_dpbf16_ps((__m512)part[i], q, (__m512bh)_mm512_loadu_si512(keys[i] + d));
        }
#endif
    for (; d < dim; d += LANES) dot(query, keys, d, part);
    return sums(part);
}

// result [R][dim] += weights [R][KEYS] times the values, which lie where the keys are.
template <int R, class T>
void weigh(const Step<T>& step, const Keys<T>& keys, const float* weights, float* result) {
    const int64_t values = step.values();
    for (int d = 0; d < step.dim; d += 4 * LANES) {
        const int vectors = std::min(4, (step.dim - d) / LANES);
        auto some = [&](auto width) {
            constexpr int V = decltype(width)::value;
            Floats total[R][V];
            for (int r = 0; r < R; r++)
                for (int c = 0; c < V; c++) total[r][c] = load(result + r * step.dim + d + c * LANES);
            for (int i = 0; i < keys.count; i++) {
                Floats value[V];
                for (int c = 0; c < V; c++) value[c] = load(keys.at[i] + values + d + c * LANES);
                for (int r = 0; r < R; r++) {
                    const Floats weight = splat(weights[r * KEYS + i]);
                    for (int c = 0; c < V; c++) total[r][c] += weight * value[c];
                }
            }
            for (int r = 0; r < R; r++)
                for (int c = 0; c < V; c++) store(result + r * step.dim + d + c * LANES, total[r][c]);
        };
        if (vectors == 4) some(std::integral_constant<int, 4>{});
        else if (vectors == 3) some(std::integral_constant<int, 3>{});
        else if (vectors == 2) some(std::integral_constant<int, 2>{});
        else some(std::integral_constant<int, 1>{});
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

template <class T>
const T* query(const Step<T>& step, const Item& item, int r) {
    const int group = step.group();
    return step.q + (item.row + r / group) * step.q_stride + (item.head * group + r % group) * step.dim;
}

// Scores of few rows: each query with each key, as they lie.
template <class T>
void score_few(const Step<T>& step, const Item& item, const Keys<T>& keys, const Keys<T>& next, int rows, Bench& bench) {
    const int64_t values = step.values();
    for (int first = 0; first < keys.count; first += LANES) {
        for (int i = first; i < first + LANES; i++) fetch(step, next, i, 0), fetch(step, next, i, values);
        for (int r = 0; r < rows; r++)
            store(&bench.scores[r * KEYS + first], dots(query(step, item, r), keys.at + first, step.dim) * step.scale);
    }
}

template <class T>
void weigh_few(const Step<T>& step, const Keys<T>& keys, int rows, Bench& bench) {
    const float* weights = bench.scores.data();
    float* result = bench.result.data();
    for (; rows >= 4; rows -= 4, weights += 4 * KEYS, result += 4 * step.dim) weigh<4>(step, keys, weights, result);
    if (rows == 3) weigh<3>(step, keys, weights, result);
    if (rows == 2) weigh<2>(step, keys, weights, result);
    if (rows == 1) weigh<1>(step, keys, weights, result);
}

// One tile of keys against all rows of the item; meanwhile `next` is fetched.
template <class T>
void attend_tile(const Step<T>& step, const Item& item, int from, const Keys<T>& keys, const Keys<T>& next, Bench& bench) {
    const int group = step.group(), rows = item.count * group, dim = step.dim;
    const int vectors = (keys.count + LANES - 1) / LANES;
    const int64_t behind = int64_t(step.contexts[item.sequence]) - step.starts[item.sequence + 1];
    if (rows <= FEW) {
        score_few(step, item, keys, next, rows, bench);
    } else {
        turn(step, keys, next, bench);
        std::fill(bench.scores.begin(), bench.scores.begin() + rows * KEYS, 0.0f);
        multiply(bench.queries.data(), dim, bench.keys.data(), KEYS, dim, bench.scores.data(), KEYS, rows, vectors);
    }
    for (int r = 0; r < rows; r++) {
        const int64_t position = behind + item.row + r / group;
        const int64_t low = std::clamp<int64_t>(position + 1 - step.window - from, 0, KEYS);
        const int64_t high = std::min<int64_t>(keys.count, position + 1 - from);
        soften(&bench.scores[r * KEYS], vectors, int(low), int(high), bench.best[r], bench.weight[r],
               &bench.result[r * dim], dim);
    }
    if (rows <= FEW) {
        weigh_few(step, keys, rows, bench);
    } else {
        multiply(bench.scores.data(), KEYS, bench.values.data(), dim, keys.count, bench.result.data(), dim, rows,
                 dim / LANES);
    }
}

// `keys` are the item's first; afterwards they are those of the item `after`, if there is one.
template <class T>
void attend(const Step<T>& step, const Item& item, const Item* after, Keys<T>& keys, Bench& bench, float* partials) {
    const int group = step.group(), rows = item.count * group, dim = step.dim;
    std::fill(bench.result.begin(), bench.result.begin() + rows * dim, 0.0f);
    std::fill(bench.best.begin(), bench.best.begin() + rows, NONE);
    std::fill(bench.weight.begin(), bench.weight.begin() + rows, 0.0f);
    for (int r = 0; rows > FEW && r < rows; r++)
        for (int d = 0; d < dim; d += LANES)
            store(&bench.queries[r * dim + d], load(query(step, item, r) + d) * step.scale);
    for (int from = item.begin; from < item.end; from += KEYS) {
        Keys<T> next;
        if (from + KEYS < item.end) find(step, item, from + KEYS, next);
        else if (after) find(step, *after, after->begin, next);
        attend_tile(step, item, from, keys, next, bench);
        keys = next;
    }
    for (int r = 0; r < rows; r++) {
        const float* result = &bench.result[r * dim];
        if (item.partial >= 0) {
            float* to = partials + (item.partial + r) * (dim + 2);
            std::copy(result, result + dim, to);
            to[dim] = bench.best[r];
            to[dim + 1] = bench.weight[r];
            continue;
        }
        T* to = step.place(item.row + r / group, item.head * group + r % group);
        for (int d = 0; d < dim; d += LANES) store(to + d, load(result + d) / bench.weight[r]);
    }
}

template <class T>
void merge(const Step<T>& step, const Merge& item, const float* partials) {
    const int group = step.group(), rows = item.count * group, dim = step.dim;
    for (int r = 0; r < rows; r++) {
        auto part = [&](int s) { return partials + (item.partial + int64_t(s) * rows + r) * (dim + 2); };
        float best = NONE, weight = 0;
        for (int s = 0; s < item.segments; s++) best = std::max(best, part(s)[dim]);
        for (int s = 0; s < item.segments; s++) weight += std::exp(part(s)[dim] - best) * part(s)[dim + 1];
        T* to = step.place(item.row + r / group, item.head * group + r % group);
        for (int d = 0; d < dim; d += LANES) {
            Floats total{};
            for (int s = 0; s < item.segments; s++) total += load(part(s) + d) * std::exp(part(s)[dim] - best);
            store(to + d, total / weight);
        }
    }
}

// Divide the step; returns how many partial rows there are.
template <class T>
int64_t divide(const Step<T>& step, int tile, std::vector<Item>& items, std::vector<Merge>& merges) {
    int64_t partials = 0;
    for (int i = 0; i < step.sequences; i++) {
        const int first = step.starts[i], last = step.starts[i + 1], context = step.contexts[i];
        for (int row = first; row < last; row += tile) {
            const int count = std::min(tile, last - row), end = context - (last - row - count);
            const int begin = int(std::max<int64_t>(0, int64_t(context) - (last - row) + 1 - step.window));
            const int from = begin / SEGMENT, segments = last - first > tile ? 1 : (end - 1) / SEGMENT - from + 1;
            for (int head = 0; head < step.kv_heads; head++) {
                if (segments == 1) {
                    items.push_back({i, row, count, head, begin, end, -1});
                    continue;
                }
                merges.push_back({row, count, head, segments, partials});
                for (int s = from; s < from + segments; s++, partials += count * step.group())
                    items.push_back({i, row, count, head, std::max(begin, s * SEGMENT),
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
    std::vector<Item> items;
    std::vector<Merge> merges;
    std::vector<float> partials(divide(step, tile, items, merges) * (step.dim + 2));
    const int count = int(items.size()), joined = int(merges.size()), chunks = std::min(count, SPARE * threads);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Bench bench;
        bench.reserve(std::min(tile, step.rows) * step.group(), step.dim);
#pragma omp for schedule(static)
        for (int i = 0; i < step.rows; i++) {
            std::copy_n(step.k + i * step.k_stride, size, step.cache + step.slots[i] * size);
            std::copy_n(step.v + i * step.v_stride, size, step.cache + (step.num_slots + step.slots[i]) * size);
        }
#pragma omp for schedule(dynamic, 1)
        for (int c = 0; c < chunks; c++) {
            const int first = int(int64_t(count) * c / chunks), last = int(int64_t(count) * (c + 1) / chunks);
            Keys<T> keys;
            if (first < last) find(step, items[first], items[first].begin, keys);
            for (int i = first; i < last; i++)
                attend(step, items[i], i + 1 < last ? &items[i + 1] : nullptr, keys, bench, partials.data());
        }
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
