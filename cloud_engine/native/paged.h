// What a step of attention is given, how it is divided, and where keys and values lie.
#pragma once
#include <algorithm>
#include <limits>

#include "vector.h"

namespace causeway {

constexpr int KEYS = 64;  // keys of a tile
constexpr int FEW = 8;    // rows of a head that are multiplied with keys and values as they lie
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
    // How far behind a key its value is.
    int64_t values() const { return num_slots * kv_heads * dim; }
};

// Some rows of a sequence and some of its key heads, with keys from `begin` to `end`. The query heads of a key head are
// rows of one problem; the problems of all these heads follow each other.
struct Item {
    int sequence, row, count, head, heads, begin, end;
    int64_t partial;  // where its unfinished result goes; -1: it is the whole

    template <class T>
    int rows_of_head(const Step<T>& step) const {
        return count * step.group();
    }
    template <class T>
    int rows(const Step<T>& step) const {
        return heads * rows_of_head(step);
    }
    template <class T>
    bool few(const Step<T>& step) const {
        return rows_of_head(step) <= FEW;
    }
    template <class T>
    int token(const Step<T>& step, int r) const {
        return row + r % rows_of_head(step) / step.group();
    }
    template <class T>
    int query_head(const Step<T>& step, int r) const {
        return (head + r / rows_of_head(step)) * step.group() + r % step.group();
    }
    template <class T>
    const T* query(const Step<T>& step, int r) const {
        return step.q + token(step, r) * step.q_stride + query_head(step, r) * step.dim;
    }
    template <class T>
    T* place(const Step<T>& step, int r) const {
        return step.out + (int64_t(token(step, r)) * step.heads + query_head(step, r)) * step.dim;
    }
};

// The keys of a tile, of the item's first head; those of its other heads follow each.
template <class T>
struct Keys {
    const T* at[KEYS];
    int count = 0;

    void find(const Step<T>& step, const Item& item, int from) {
        count = std::min(KEYS, item.end - from);
        const int32_t* block = step.tables + int64_t(item.sequence) * step.width + from / step.block_size;
        for (int i = 0, offset = from % step.block_size; i < count; i++) {
            at[i] = step.cache + ((int64_t(*block) * step.block_size + offset) * step.kv_heads + item.head) * step.dim;
            if (++offset == step.block_size) offset = 0, block++;
        }
        // The rest of the last sixteen are computed too, and hidden: any key does.
        for (int i = count; i % LANES; i++) at[i] = at[0];
    }
};

// Asks for the lines of another tile, in order of memory, a few at a time: no processor guesses by itself which block is
// next, and what is asked for at once makes it wait. Into the second cache: a tile does not fit into the first.
template <class T>
struct Ahead {
    static constexpr int LINE = 64;
    const Keys<T>& keys;
    const int64_t values;
    const int bytes;  // of a position
    int i = 0, b = 0;

    Ahead(const Step<T>& step, const Keys<T>& keys, int heads)
        : keys(keys), values(step.values()), bytes(heads * step.dim * int(sizeof(T))) {}
    void ask() {
        if (i >= keys.count) return;
        __builtin_prefetch((const char*)keys.at[i] + b, 0, 2);
        __builtin_prefetch((const char*)(keys.at[i] + values) + b, 0, 2);
        if ((b += LINE) >= bytes) b = 0, i++;
    }
    void rest() {
        while (i < keys.count) ask();
    }
};

}  // namespace causeway
