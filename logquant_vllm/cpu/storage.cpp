// Writing the cache: groups of tokens into pages, new tokens into the window.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cache.h"
#include "matrix.h"

namespace logquant {
namespace {

constexpr uint8_t kNanE4m3 = 0x7F;
constexpr uint16_t kNanHalf = 0x7E00;

// One group of core/quantizer.py, operation by operation: no fused multiply-add, round half to even, IEEE division.
// Values and codes are contiguous, their count is a multiple of kLanes.
struct GroupQuantizer {
    int64_t bits, scale_bits;
    float spread_factor, stretch, bias, floor_factor, scale_min, scale_max;

    // what dequantization will use; a NaN scale for a group that is not finite
    struct Stored {
        float scale, zero;
    };

    vf levels() const { return splat(static_cast<float>((1 << bits) - 1)); }

    // codes of values, not limited to those that there are
    vf code(vf x, const Stored& s) const {
        return nearest((x - splat(s.zero)) * splat(1.0f / s.scale * stretch) + splat(bias));
    }

    // count values become codes; scale and zero are stored
    Stored operator()(const float* x, uint8_t* codes, int64_t count, uint8_t* scale_out, uint8_t* zero_out) const {
        vf least = load(x), most = least;
        vi odd = {};
        for (int64_t i = 0; i < count; i += kLanes) {
            const vf v = load(x + i);
            odd |= (v - v) != splat(0.0f);
            least = v < least ? v : least;
            most = larger(v, most);
        }
        bool finite = true;
        for (int i = 0; i < kLanes; ++i) finite &= odd[i] == 0;
        const float high = largest(most), low = -largest(-least), top_code = levels()[0];
        const float spread = finite ? (high - low) * spread_factor : 0.0f;
        const float middle = finite ? (high + low) * 0.5f : 0.0f;
        float scale, zero;
        if (scale_bits == 8) {
            const float wanted = std::max(spread, std::fabs(middle) * floor_factor);
            const c10::Float8_e4m3fn stored(std::min(std::max(wanted, scale_min), scale_max));
            scale = static_cast<float>(stored);
            const float quarters = std::nearbyint(middle * 4.0f / scale - 2.0f * top_code);
            const auto stored_zero = static_cast<int8_t>(std::min(std::max(quarters, -128.0f), 127.0f));
            zero = scale * (static_cast<float>(stored_zero) * 0.25f);
            *scale_out = finite ? stored.x : kNanE4m3;
            std::memcpy(zero_out, &stored_zero, 1);
        } else {
            const c10::Half stored(std::min(std::max(spread, scale_min), scale_max));
            scale = static_cast<float>(stored);
            const float wanted = middle - scale * (0.5f * top_code);
            const c10::Half stored_zero(std::min(std::max(wanted, -scale_max), scale_max));
            zero = static_cast<float>(stored_zero);
            const uint16_t scale_word = finite ? stored.x : kNanHalf;
            std::memcpy(scale_out, &scale_word, 2);
            std::memcpy(zero_out, &stored_zero.x, 2);
        }
        for (int64_t i = 0; i < count; i += kLanes) {
            const vf c = finite ? code(load(x + i), {scale, zero}) : splat(0.0f);
            store_codes(codes + i, smaller(larger(c, splat(0.0f)), levels()));
        }
        return {finite ? scale : std::numeric_limits<float>::quiet_NaN(), zero};
    }
};

// core/quantizer.py's round_with_feedback for one group and head: other codes, each channel taking up what those before
// it lost, and the first half then what all others did. x and codes are [channels, tokens]; lost is scratch of the same
// shape.
void round_with_feedback(const float* x, uint8_t* codes, const GroupQuantizer::Stored* stored, const float* feedback,
                         int64_t tokens, int64_t channels, const GroupQuantizer& q, float* lost) {
    for (int64_t t = 0; t < tokens; t += kLanes) {
        const auto taken_up = [&](int64_t b, float share, vf sum) {
            return sum + splat(share) * load(lost + b * tokens + t);
        };
        const auto choose = [&](int64_t c, vf more) {
            const vf key = load(x + c * tokens + t), code = q.code(key + more, stored[c]);
            const vf clamped = code >= splat(0.0f) ? smaller(code, q.levels()) : splat(0.0f);  // a NaN is not
            store_codes(codes + c * tokens + t, clamped);
            const vf left = key - (clamped * splat(stored[c].scale) + splat(stored[c].zero));
            store(lost + c * tokens + t, (left - left) == splat(0.0f) ? left : splat(0.0f));
        };
        for (int64_t c = 0; c < channels; ++c) {
            vf sum = splat(0.0f);
            for (int64_t b = 0; b < c; ++b) sum = taken_up(b, feedback[c * channels + b], sum);
            choose(c, sum);
        }
        for (int64_t c = 0; c < channels / 32 * 16; ++c) {  // channels_again
            vf sum = splat(0.0f);
            for (int64_t b = 0; b < c; ++b) sum = taken_up(b, feedback[b * channels + c], sum);
            for (int64_t b = c + 1; b < channels; ++b) sum = taken_up(b, feedback[c * channels + b], sum);
            choose(c, sum * splat(feedback[c * channels + c]));
        }
    }
}

// Rows of words, or one of the groups that rows consist of, from codes [codes of a row, rows]. Word w of a row holds
// codes w, w + words, w + 2 * words, ...
void pack(const uint8_t* codes, int64_t rows, const Plane (&planes)[kPlanes], int64_t first_row, int64_t group,
          int64_t groups, uint8_t* slab) {
    for (const Plane& plane : planes) {
        if (plane.bits == 0) break;
        const int64_t words = plane.words / groups;
        uint8_t* out = slab + plane.offset + 2 * (first_row * plane.words + group * words);
        const int mask = (1 << plane.bits) - 1;
        for (int64_t w = 0; w < words; ++w, out += 2) {
            uint16_t word[kMaxChannels] = {};
            for (int64_t j = 0; j < plane.slots(); ++j) {
                const uint8_t* code = codes + (j * words + w) * rows;
                const int64_t place = plane.bits * j;
                for (int64_t r = 0; r < rows; ++r) word[r] |= ((code[r] >> plane.shift) & mask) << place;
            }
            for (int64_t r = 0; r < rows; ++r) std::memcpy(out + 2 * r * plane.words, &word[r], 2);
        }
    }
}

struct Scratch {
    AlignedFloats x, lost;
    std::vector<GroupQuantizer::Stored> stored;
    std::vector<uint8_t> codes;
};

// Copies token 0, new in this step, with its group: a request that hits this prefix in this very step reads both.
template <typename T>
void copy_first_token(int64_t request, int64_t head, const Rows<T>& key, const Rows<T>& value, const Cache& cache,
                      const Layout& f) {
    const int64_t row = cache.requests[request].first_row;
    T* slot = cache.slot<T>(request, 0, head, f);
    std::memcpy(slot, key.at(row, head), f.head_size * sizeof(T));
    std::memcpy(slot + f.head_size, value.at(row, head), f.head_size * sizeof(T));
}

template <typename T>
void quantize_group(int64_t request, int64_t group, int64_t head, const Rows<T>& key, const Rows<T>& value,
                    const Cache& cache, const Layout& f, const Quantizer& q, Scratch& scratch) {
    const int64_t tokens = f.group_size, channels = f.head_size, scale_bytes = f.scale_bits / 8;
    const int64_t in_page = group % f.groups_per_page, first = in_page * tokens;
    uint8_t* slab = cache.slab(request, group / f.groups_per_page, head, f);
    const auto lowest = static_cast<float>(q.scale_min), highest = static_cast<float>(q.scale_max);
    const GroupQuantizer keys{f.key_bits,        f.scale_bits,       float(q.key_spread), float(q.key_stretch),
                              float(q.key_bias), float(q.key_floor), lowest,              highest};
    const GroupQuantizer values{f.value_bits,           f.scale_bits,         float(q.value_spread),
                                float(q.value_stretch), float(q.value_bias), float(q.value_floor),
                                lowest,                 highest};
    scratch.x.grow(tokens * channels);
    scratch.lost.grow(tokens * channels);
    scratch.codes.resize(tokens * channels);
    scratch.stored.resize(channels);
    float* x = scratch.x.data();
    uint8_t* codes = scratch.codes.data();
    const auto token = [&](int64_t t) { return find_token(group * tokens + t, request, head, key, value, cache, f); };

    for (int64_t t = 0; t < tokens; t += 8) {  // [channels, tokens]
        const T* rows[8];
        for (int64_t i = 0; i < 8; ++i) rows[i] = token(t + i).key;
        transpose_rows(rows, channels, x + t, tokens);
    }
    for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = (in_page * channels + c) * scale_bytes, from = c * tokens;
        scratch.stored[c] = keys(x + from, codes + from, tokens, slab + f.key_scale + at, slab + f.key_zero + at);
    }
    if (cache.feedback != nullptr)
        round_with_feedback(x, codes, scratch.stored.data(), cache.feedback + head * channels * channels, tokens,
                            channels, keys, scratch.lost.data());
    pack(codes, tokens, f.key_planes, first, 0, 1, slab);

    for (int64_t t = 0; t < tokens; ++t) {  // [tokens, channels]
        const T* row = token(t).value;
        for (int64_t c = 0; c < channels; c += kLanes) store(x + t * channels + c, load(row + c));
    }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t g = 0; g < f.value_groups; ++g) {
            const int64_t start = g * f.value_group_size, count = std::min(f.value_group_size, channels - start);
            const int64_t at = (g * f.page_size + first + t) * scale_bytes, from = t * channels + start;
            values(x + from, codes + from, count, slab + f.value_scale + at, slab + f.value_zero + at);
        }
    pack(codes, channels, f.value_planes, 0, in_page, f.groups_per_page, slab);
}

template <typename T>
void update_head(int64_t request, int64_t head, const Rows<T>& key, const Rows<T>& value, const Cache& cache,
                 const Layout& f, std::vector<T>& kept) {
    const Request& r = cache.requests[request];
    const int64_t w = f.window_length, size = f.head_size;
    const int64_t before = r.stored_compactions, after = compactions_after(r, f);
    if (after > before) {
        // a slot that survives all compactions of this step moves down, others are filled from the recent window and
        // from new tokens; all are read before any is written
        kept.resize(w * 2 * size);
        const int64_t shift = std::min<int64_t>((after - before) * kThinningBits, 20);
        for (int64_t slot = 0; slot < w; ++slot) {
            const int64_t position = log_slot_position(slot, after, w), source = slot << shift;
            if (position < r.window_start) continue;
            Token<T> token;
            if (source < w && position < r.computed) {
                const T* copy = cache.slot<T>(request, source, head, f);
                token = {copy, copy + size};
            } else {
                token = find_token(position, request, head, key, value, cache, f);
            }
            std::memcpy(&kept[slot * 2 * size], token.key, size * sizeof(T));
            std::memcpy(&kept[(slot * 2 + 1) * size], token.value, size * sizeof(T));
        }
        for (int64_t slot = 0; slot < w; ++slot)
            if (log_slot_position(slot, after, w) >= r.window_start)
                std::memcpy(cache.slot<T>(request, slot, head, f), &kept[slot * 2 * size], 2 * size * sizeof(T));
    }
    const int64_t begin = std::max(r.computed, after > 0 ? (after + 1) * w : 0);
    for (int64_t position = begin; position < r.seq_len; ++position) {
        const int64_t row = r.first_row + position - r.computed;
        T* slot = cache.slot<T>(request, slot_of_position(position, f), head, f);
        std::memcpy(slot, key.at(row, head), size * sizeof(T));
        std::memcpy(slot + size, value.at(row, head), size * sizeof(T));
    }
}

}  // namespace

template <typename T>
void quantize_pages(const Rows<T>& key, const Rows<T>& value, const Cache& cache, const Layout& f, const Quantizer& q) {
    struct Group {
        int64_t request, index;
    };
    std::vector<Group> groups;
    for (int64_t i = 0; i < static_cast<int64_t>(cache.requests.size()); ++i) {
        const Request& r = cache.requests[i];
        if (!r.live) continue;
        // pages below the end of the prefix hit belong to whoever computed them first
        const int64_t shared = r.window_start > 0 ? r.window_start + f.replay_tokens : 0;
        const int64_t first = std::max(r.computed / f.group_size, ceil_div(shared, f.group_size));
        for (int64_t g = first; g < r.seq_len / f.group_size; ++g) groups.push_back({i, g});
    }
    const int64_t heads = cache.num_kv_heads, tasks = static_cast<int64_t>(groups.size()) * heads;
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        for (int64_t task = begin; task < end; ++task) {
            const Group& g = groups[task / heads];
            if (g.index == 0 && cache.requests[g.request].computed == 0)
                copy_first_token(g.request, task % heads, key, value, cache, f);
            quantize_group(g.request, g.index, task % heads, key, value, cache, f, q, scratch);
        }
    });
}

template <typename T>
void update_window(const Rows<T>& key, const Rows<T>& value, const Cache& cache, const Layout& f) {
    const int64_t heads = cache.num_kv_heads, num_reqs = static_cast<int64_t>(cache.requests.size());
    constexpr int64_t kHeadsPerThread = 32;  // a decode step copies one token per head: fewer are not worth a thread
    at::parallel_for(0, num_reqs * heads, kHeadsPerThread, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<T> kept;
        for (int64_t task = begin; task < end; ++task)
            if (cache.requests[task / heads].live)
                update_head(task / heads, task % heads, key, value, cache, f, kept);
    });
    for (int64_t i = 0; i < num_reqs; ++i) {
        const Request& r = cache.requests[i];
        if (!r.live) continue;
        const Header header{static_cast<int32_t>(r.window_start + 1), static_cast<int32_t>(compactions_after(r, f))};
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t c = 0; c < f.head_size; c += f.header_channels) *cache.header<T>(i, head, c, f) = header;
    }
}

#define LOGQUANT_INSTANTIATE(T)                                                                                    \
    template void quantize_pages<T>(const Rows<T>&, const Rows<T>&, const Cache&, const Layout&, const Quantizer&); \
    template void update_window<T>(const Rows<T>&, const Rows<T>&, const Cache&, const Layout&);
LOGQUANT_INSTANTIATE(float)
LOGQUANT_INSTANTIATE(c10::Half)
LOGQUANT_INSTANTIATE(c10::BFloat16)

}  // namespace logquant
