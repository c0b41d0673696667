// What the operations share: constants of the format, views of the cache, and where a position's copy lies.
// The arithmetic of positions is that of core/log_selection.py and core/paged.py; byte offsets come from Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace logquant {

constexpr int64_t kMaxGroup = 128;     // tokens of a group, and channels that share a scale
constexpr int64_t kMaxChannels = 512;  // of a head

// Some bits of all codes of a slab, in rows of 16-bit words; see core/page_format.py.
struct Plane {
    int64_t bits, shift, words, offset;  // of a code; of these bits in it; words of a row; bytes from the slab's start
    int64_t slots() const { return 16 / bits; }
};
constexpr int64_t kPlanes = 2;  // at most; one that is not there has no bits

// Integer constants in the order in which operations.py passes them.
struct Layout {
    int64_t head_size, page_size, group_size, value_group_size, key_bits, value_bits, scale_bits;
    Plane key_planes[kPlanes], value_planes[kPlanes];
    int64_t groups_per_page, value_groups, head_bytes;
    int64_t key_scale, key_zero, value_scale, value_zero;  // byte offsets in a slab
    int64_t header_slots, header_channels, sink_columns;
    int64_t window_length, replay_tokens, rollback_tokens, decode_query_len;

    int64_t ring_slots() const { return 2 * window_length + rollback_tokens - 1; }
    int64_t num_slots() const { return window_length + ring_slots(); }
};
constexpr int64_t kNumConstants = sizeof(Layout) / sizeof(int64_t);

// float32 constants of the quantizer, likewise
struct Quantizer {
    double key_spread, value_spread;    // share of the range / levels
    double key_stretch, value_stretch;  // of data about the middle, and what keeps the middle where it is
    double key_bias, value_bias;
    double key_floor, value_floor;    // least 8-bit scale per unit of |middle|
    double scale_min, scale_max;      // smallest and largest stored scale
};
constexpr int64_t kNumFactors = sizeof(Quantizer) / sizeof(double);

// [tokens, heads, head_size] with contiguous channels; strides in elements
template <typename T>
struct Rows {
    const T* data;
    int64_t token_stride, head_stride;
    const T* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// First bytes of a request's window; all 0 in a fresh block.
struct Header {
    int32_t window_begin;  // window_start + 1
    int32_t compactions;
};

struct Request {
    int64_t first_row, query_len, computed, seq_len;
    int64_t window_start;        // first position with a full-precision copy of its own
    int64_t compactions;         // of the computed tokens: what attention sees
    int64_t stored_compactions;  // of the log-selected slots: at most one behind
    bool live;                   // owns window blocks and has tokens in this step
    bool sink;                   // token 0 has a copy, its own or another request's

    // Whether a computed position was copied when it was new: core/paged.py's has_copy.
    bool has_copy(int64_t position) const { return position >= window_start || (position == 0 && sink); }
};

struct Cache {
    uint8_t* pages;
    int64_t page_stride;
    uint8_t* window;
    int64_t window_stride, slots_per_block;
    const int32_t* block_table;
    int64_t block_table_stride;
    const int32_t* window_table;  // a request's own blocks; in front of them is the sink block
    int64_t window_table_stride, window_columns;
    int64_t num_kv_heads;
    const float* feedback;  // [num_kv_heads, head_size, head_size], or null: see core/calibration.py
    std::vector<Request> requests;

    uint8_t* slab(int64_t request, int64_t page, int64_t head, const Layout& f) const {
        const int64_t block = block_table[request * block_table_stride + page];
        return pages + block * page_stride + head * f.head_bytes;
    }

    // key of a window slot (header not counted), slot 0 in the sink block; the value follows it
    template <typename T>
    T* slot(int64_t request, int64_t index, int64_t head, const Layout& f) const {
        // 32-bit divisions: several per slot and head, and 64-bit ones take longer than the copy
        const auto i = static_cast<uint32_t>(index + f.header_slots);
        const auto per_block = static_cast<uint32_t>(slots_per_block);
        const int64_t own = std::min<int64_t>(i / per_block, window_columns - 1);
        const int64_t block = window_table[request * window_table_stride + (index == 0 ? -f.sink_columns : own)];
        const int64_t row = (i % per_block) * num_kv_heads + head;
        return reinterpret_cast<T*>(window + block * window_stride) + row * 2 * f.head_size;
    }

    // One of the copies that lie every header_channels channels of the keys in slot 0; all are the same between steps.
    template <typename T>
    Header* header(int64_t request, int64_t head, int64_t channel, const Layout& f) const {
        return reinterpret_cast<Header*>(slot<T>(request, -f.header_slots, head, f) + channel);
    }
    Header header(int64_t request) const {
        const int64_t block = window_table[request * window_table_stride];
        return *reinterpret_cast<const Header*>(window + block * window_stride);
    }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t num_compactions(int64_t seq_len, int64_t w) { return std::max<int64_t>(seq_len / w - 2, 0); }

// core/log_selection.py
constexpr int64_t kThinningBits = 3;

inline int64_t first_filled_slot(int64_t w) { return ceil_div(w, int64_t{1} << kThinningBits); }

inline int64_t log_slot_position(int64_t slot, int64_t compactions, int64_t w) {
    if (slot == 0) return 0;
    int64_t steps = 0;
    while (slot << steps * kThinningBits < first_filled_slot(w)) ++steps;
    if (steps <= compactions) return (compactions - steps) * w + (slot << steps * kThinningBits);
    return slot << compactions * kThinningBits;
}

inline bool is_log_selected(int64_t position, int64_t compactions, int64_t w) {
    const int64_t chunk = static_cast<uint32_t>(position) / static_cast<uint32_t>(w);
    if (chunk > compactions) return false;
    const int64_t slot = position - chunk * w;  // where the compaction of its chunk brought it
    if (chunk > 0 && slot < first_filled_slot(w)) return false;
    const int64_t shift = std::min<int64_t>((compactions - chunk) * kThinningBits, 30);
    return (slot & ((int64_t{1} << shift) - 1)) == 0;
}

// Stored compactions after this step; they cannot be undone, so none is for a token that may be taken back.
inline int64_t compactions_after(const Request& r, const Layout& f) {
    return std::max(r.stored_compactions, num_compactions(r.seq_len - f.rollback_tokens, f.window_length));
}

// slot of a position in the recent window, or of any before the first compaction
inline int64_t slot_of_position(int64_t position, const Layout& f) {
    const int64_t w = f.window_length;
    if (position < w) return position;
    return w + static_cast<uint32_t>(position - w) % static_cast<uint32_t>(f.ring_slots());
}

// Key of a position that is new in this step or lies in the window, and its value.
template <typename T>
struct Token {
    const T *key, *value;
};

template <typename T>
Token<T> find_token(int64_t position, int64_t request, int64_t head, const Rows<T>& key, const Rows<T>& value,
                    const Cache& cache, const Layout& f) {
    const Request& r = cache.requests[request];
    if (position >= r.computed) {
        const int64_t row = r.first_row + position - r.computed;
        return {key.at(row, head), value.at(row, head)};
    }
    const T* copy = cache.slot<T>(request, slot_of_position(position, f), head, f);
    return {copy, copy + f.head_size};
}

// -- the three operations ------------------------------------------------------------------------------------------

template <typename T>
void quantize_pages(const Rows<T>& key, const Rows<T>& value, const Cache& cache, const Layout& f, const Quantizer& q);

// What becomes of a product of query and key: see core.layer.Layer; sinks are null if there are none.
struct Scores {
    double scale, softcap;
    const float* sinks;
};

// A step's tokens: queries as the model has them, keys and values as they are stored, and, where they are at hand (else
// null), as the model has them, too. What leads from one to the other (core/calibration.py) is query_basis
// [query_groups, head_size, head_size] and value_basis [head_size, head_size], null if that is nothing.
template <typename T>
struct Tokens {
    Rows<T> query, key, value, own_key, own_value;
    const T *query_basis, *value_basis;
    int64_t query_groups, num_heads;
};

// output [num_tokens, num_heads, head_size] and lse [num_tokens, num_heads]; rows of no request are left alone
template <typename T>
struct Results {
    T* output;
    int64_t token_stride, head_stride;
    float* lse;
};

template <typename T>
void attention(const Tokens<T>& tokens, const Cache& cache, const Layout& f, const Scores& scores,
               const Results<T>& results);

template <typename T>
void update_window(const Rows<T>& key, const Rows<T>& value, const Cache& cache, const Layout& f);

}  // namespace logquant
