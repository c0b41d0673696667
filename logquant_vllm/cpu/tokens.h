// What attention reads, a unit of tokens at a time: groups of pages, copies, and this step's tokens.
#pragma once

#include <algorithm>
#include <vector>

#include "cache.h"
#include "dequantize.h"
#include "matrix.h"

namespace logquant {

// Tokens of a unit: few enough to stay in the cache next to the core, and a whole group at least.
inline int64_t unit_tokens(const Layout& f) { return std::max<int64_t>(64, f.group_size); }

// A unit as floats: keys [head_size][unit_tokens], values [unit_tokens][head_size].
struct Unit {
    AlignedFloats keys, values;
    alignas(kAlignment) int32_t marks[kMaxGroup];
    const int32_t* wanted;  // 0 for a token that is not; null if all are
    int64_t count;

    void grow(const Layout& f) {
        keys.grow(f.head_size * unit_tokens(f));
        values.grow(f.head_size * unit_tokens(f));
    }
};

// First position past those that pages serve.
inline int64_t pages_end(const Request& r, const Layout& f) {
    return std::min(std::max((r.compactions + 1) * f.window_length, r.window_start), r.computed);
}

// Which tokens of a group are to be read from its page: those without a copy. How many there are.
inline int64_t mark_wanted(const Request& r, int64_t first, const Layout& f, int32_t* wanted) {
    const int64_t size = f.group_size, end = std::min(size, pages_end(r, f) - first);
    std::fill_n(wanted, end, 1);
    std::fill_n(wanted + end, size - end, 0);
    // an old chunk has no copy left once no slot below W but 0 stays (token 0 is in no such chunk)
    const int64_t shift = (r.compactions - (first + size - 1) / f.window_length) * kThinningBits;
    if (first >= f.window_length && (shift > 30 || int64_t{1} << std::max<int64_t>(shift, 0) >= f.window_length))
        return end;
    int64_t count = 0;
    for (int64_t i = 0; i < end; ++i) {
        wanted[i] = !(r.has_copy(first + i) && is_log_selected(first + i, r.compactions, f.window_length));
        count += wanted[i];
    }
    return count;
}

// Slots of the copies that attention sees.
inline std::vector<int32_t> slots_of_copies(const Request& r, const Layout& f) {
    std::vector<int32_t> slots;
    if (r.computed == 0) return slots;
    const int64_t w = f.window_length, recent = (r.compactions + 1) * w, ring = (r.stored_compactions + 1) * w;
    const int64_t begin = slot_of_position(ring, f);
    slots.reserve(f.num_slots());
    for (int64_t slot = 0; slot < f.num_slots(); ++slot) {
        // the ring's positions begin at ring; those behind the last computed one may have been taken back
        const int64_t position = slot < w ? log_slot_position(slot, r.stored_compactions, w)
                                          : ring + slot - begin + (slot < begin ? f.ring_slots() : 0);
        if (position >= r.computed || !r.has_copy(position)) continue;
        if (position < recent && !is_log_selected(position, r.compactions, w)) continue;
        slots.push_back(static_cast<int32_t>(slot));
    }
    return slots;
}

// Groups of pages from position first on.
inline void read_pages(const Cache& cache, const Layout& f, int64_t request, int64_t head, int64_t first, Unit& unit) {
    const Request& r = cache.requests[request];
    const int64_t begin = first / f.group_size, end = ceil_div(pages_end(r, f), f.group_size);
    const int64_t groups = std::min(unit_tokens(f) / f.group_size, end - begin);
    int64_t wanted = 0;
    unit.count = 0;
    for (int64_t i = 0; i < groups; ++i) {
        const int64_t group = begin + i, to = i * f.group_size;
        int32_t* marks = unit.marks + to;
        float *keys = unit.keys.data() + to, *values = unit.values.data() + to * f.head_size;
        if (const int64_t count = mark_wanted(r, group * f.group_size, f, marks)) {
            const uint8_t* slab = cache.slab(request, group / f.groups_per_page, head, f);
            dequantize_keys(slab, group % f.groups_per_page, f, keys, unit_tokens(f));
            dequantize_values(slab, group % f.groups_per_page, marks, f, values);
            unit.count = to + f.group_size;
            wanted += count;
        } else {  // its weights will be 0, which must not meet a NaN
            std::fill_n(values, f.group_size * f.head_size, 0.0f);
        }
    }
    unit.wanted = wanted == unit.count ? nullptr : unit.marks;
}

// Tokens in the model's dtype, which token(i) finds.
template <typename T, typename F>
void read_tokens(int64_t count, const Layout& f, Unit& unit, F&& token) {
    unit.count = count;
    unit.wanted = nullptr;
    float *keys = unit.keys.data(), *values = unit.values.data();
    for (int64_t i = 0; i < count; i += 8) {
        const T* rows[8];
        for (int64_t j = 0; j < 8; ++j) {
            const Token<T> t = token(std::min(i + j, count - 1));
            rows[j] = t.key;
            for (int64_t c = 0; i + j < count && c < f.head_size; c += kLanes)
                store(values + (i + j) * f.head_size + c, load(t.value + c));
        }
        transpose_rows(rows, f.head_size, keys + i, unit_tokens(f));
    }
}

}  // namespace logquant
