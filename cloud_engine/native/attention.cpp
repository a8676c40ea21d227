// Paged attention: keys and values are read where they lie, through the block tables, with an online softmax.
//
// A step is divided into items, each a tile of rows of one sequence. Few rows (a decode: `few.h`) take all key heads of
// a position together, which lie together; many (a prompt: `many.h`) take one head. A sequence with one tile of rows is
// divided into segments of keys, always at the same places, and merged in their order: what a sequence gets does not
// depend on the batch around it. Slots that no row may see are never read.
#include "few.h"
#include "many.h"

using namespace causeway;

namespace {

constexpr int SEGMENT = 16 * KEYS;  // keys of a segment
constexpr int ROWS = 48;            // rows of a tile, about
constexpr int SPARE = 8;            // parts of the work for each thread, so that none waits long for another
constexpr int ENOUGH = 4;           // sequences for each thread, from which on their heads need not be divided

// Parts of one result, `rows` apart.
struct Merge {
    Item item;
    int segments;
};

struct Plan {
    std::vector<Item> items;
    std::vector<Merge> merges;
    int64_t partials = 0;  // rows of unfinished results
};

// One thread's working memory, kept from call to call.
template <class T>
struct Bench {
    Turned<T> turned;
    std::vector<float> result, best, weight;

    Found found(size_t rows, size_t dim) {
        auto fresh = [](auto& memory, size_t size, float value) {
            memory.resize(std::max(memory.size(), size));
            std::fill(memory.begin(), memory.begin() + size, value);
        };
        fresh(result, rows * dim, 0.0f), fresh(best, rows, NONE), fresh(weight, rows, 0.0f);
        turned.reserve(rows, dim);
        return {best.data(), weight.data(), result.data()};
    }
};

// `keys` are the item's first; afterwards they are those of the item `after`, if there is one.
template <class T>
void attend(const Step<T>& step, const Item& item, const Item* after, Keys<T>& keys, Bench<T>& bench, float* partials) {
    const int rows = item.rows(step), dim = step.dim;
    const bool few = item.few(step);
    const Found found = bench.found(rows, dim);
    if (!few) bench.turned.begin(step, item);
    for (int from = item.begin; from < item.end; from += KEYS) {
        Keys<T> next;
        const bool last = from + KEYS >= item.end;
        if (!last) next.find(step, item, from + KEYS);
        else if (after) next.find(step, *after, after->begin);
        const int heads = last && after ? after->heads : item.heads;
        if (few) {
            attend_few(step, item, from, keys, next, heads, bench.turned.scores.data(), bench.turned.weights.data(),
                       found);
        } else {
            Ahead<T>(step, next, heads).rest();
            bench.turned.attend(step, item, from, keys, found);
        }
        keys = next;
    }
    for (int r = 0; r < rows; r++) {
        const float* result = found.result + r * dim;
        if (item.partial >= 0) {
            float* to = partials + (item.partial + r) * (dim + 2);
            std::copy(result, result + dim, to);
            to[dim] = found.best[r];
            to[dim + 1] = found.weight[r];
            continue;
        }
        T* to = item.place(step, r);
        const float share = 1 / found.weight[r];
        for (int d = 0; d < dim; d += LANES) store(to + d, load(result + d) * share);
    }
}

template <class T>
void merge(const Step<T>& step, const Merge& parts, const float* partials) {
    const int rows = parts.item.rows(step), dim = step.dim;
    for (int r = 0; r < rows; r++) {
        auto part = [&](int s) { return partials + (parts.item.partial + int64_t(s) * rows + r) * (dim + 2); };
        float best = NONE, weight = 0;
        for (int s = 0; s < parts.segments; s++) best = std::max(best, part(s)[dim]);
        for (int s = 0; s < parts.segments; s++) weight += std::exp(part(s)[dim] - best) * part(s)[dim + 1];
        T* to = parts.item.place(step, r);
        for (int d = 0; d < dim; d += LANES) {
            Floats total{};
            for (int s = 0; s < parts.segments; s++) total += load(part(s) + d) * std::exp(part(s)[dim] - best);
            store(to + d, total / weight);
        }
    }
}

// Add the work of an item, whose keys are not yet divided.
template <class T>
void add(const Step<T>& step, Item item, bool divided, Plan& plan) {
    const int from = item.begin / SEGMENT, segments = divided ? (item.end - 1) / SEGMENT - from + 1 : 1;
    if (segments == 1) {
        plan.items.push_back(item);
        return;
    }
    item.partial = plan.partials;
    plan.merges.push_back({item, segments});
    for (int s = from; s < from + segments; s++, plan.partials += item.rows(step)) {
        Item part = item;
        part.begin = std::max(item.begin, s * SEGMENT), part.end = std::min(item.end, (s + 1) * SEGMENT);
        part.partial = plan.partials;
        plan.items.push_back(part);
    }
}

template <class T>
Plan divide(const Step<T>& step, int tile, int threads) {
    Plan plan;
    const int together = step.sequences >= ENOUGH * threads ? step.kv_heads : 1;
    for (int i = 0; i < step.sequences; i++) {
        const int first = step.starts[i], last = step.starts[i + 1], context = step.contexts[i];
        for (int row = first; row < last; row += tile) {
            const int count = std::min(tile, last - row), end = context - (last - row - count);
            const int begin = int(std::max<int64_t>(0, int64_t(context) - (last - row) + 1 - step.window));
            const int heads = count * step.group() <= FEW ? together : 1;
            for (int head = 0; head < step.kv_heads; head += heads)
                add(step, {i, row, count, head, heads, begin, end, -1}, last - first <= tile, plan);
        }
    }
    return plan;
}

// 0, or 1 where a slot is outside the cache: then nothing has been written.
template <class T>
int run(const Step<T>& step, int threads) {
    for (int i = 0; i < step.rows; i++)
        if (step.slots[i] < 0 || step.slots[i] >= step.num_slots) return 1;
    const int tile = std::max(1, ROWS / step.group()), size = step.kv_heads * step.dim;
    const Plan plan = divide(step, tile, threads);
    std::vector<float> partials(plan.partials * (step.dim + 2));
    const int count = int(plan.items.size()), joined = int(plan.merges.size()), chunks = std::min(count, SPARE * threads);
#pragma omp parallel num_threads(threads)
    {
        static thread_local Bench<T> bench;
#pragma omp for schedule(static)
        for (int i = 0; i < step.rows; i++) {
            std::copy_n(step.k + i * step.k_stride, size, step.cache + step.slots[i] * size);
            std::copy_n(step.v + i * step.v_stride, size, step.cache + (step.num_slots + step.slots[i]) * size);
        }
#pragma omp for schedule(dynamic, 1)
        for (int c = 0; c < chunks; c++) {
            const int first = int(int64_t(count) * c / chunks), last = int(int64_t(count) * (c + 1) / chunks);
            Keys<T> keys;
            if (first < last) keys.find(step, plan.items[first], plan.items[first].begin);
            for (int i = first; i < last; i++)
                attend(step, plan.items[i], i + 1 < last ? &plan.items[i + 1] : nullptr, keys, bench, partials.data());
        }
        if (joined) {
#pragma omp for schedule(static)
            for (int i = 0; i < joined; i++) merge(step, plan.merges[i], partials.data());
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
