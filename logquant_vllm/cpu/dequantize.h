// One group of tokens of a page as floats: keys channel by channel, values token by token, as products want them. They
// are stored the other way round, in words that hold codes of several channels' keys, or of several tokens' values.
#pragma once

#include <c10/util/Float8_e4m3fn.h>

#include <array>
#include <cmath>

#include "cache.h"
#include "vec.h"

namespace logquant {

constexpr int64_t kMaxWords = kMaxChannels / 4;  // of a row: 4 bits of all channels

inline const float* e4m3_table() {
    static const std::array<float, 256> table = [] {
        std::array<float, 256> t{};
        for (int i = 0; i < 256; ++i)
            t[i] = static_cast<float>(c10::Float8_e4m3fn(static_cast<uint8_t>(i), c10::Float8_e4m3fn::from_bits()));
        return t;
    }();
    return table.data();
}

// float scales and zeros of count stored ones
inline void read_scales(const uint8_t* scale, const uint8_t* zero, int64_t count, int64_t scale_bits, float* s,
                        float* z) {
    if (scale_bits == 8) {
        const float* table = e4m3_table();
        for (int64_t i = 0; i < count; ++i) {
            s[i] = table[scale[i]];
            z[i] = s[i] * (static_cast<float>(static_cast<int8_t>(zero[i])) * 0.25f);
        }
    } else {
        for (int64_t i = 0; i < count; i += kLanes) {
            store(s + i, load(reinterpret_cast<const c10::Half*>(scale) + i));
            store(z + i, load(reinterpret_cast<const c10::Half*>(zero) + i));
        }
    }
}

// Words of a plane, [count][words] with rows row_stride apart, as columns [words][count]; count is a multiple of 8.
inline void transpose_words(const uint16_t* rows, int64_t row_stride, int64_t count, int64_t words, uint16_t* columns) {
    int64_t w = 0;
    for (; w + 8 <= words; w += 8)
        for (int64_t r = 0; r < count; r += 8) {
            h8 a[8];
            for (int64_t i = 0; i < 8; ++i) a[i] = load_as<h8>(rows + (r + i) * row_stride + w);
            transpose(a);
            for (int64_t i = 0; i < 8; ++i) store(columns + (w + i) * count + r, a[i]);
        }
    for (; w < words; ++w)
        for (int64_t r = 0; r < count; ++r) columns[w * count + r] = rows[r * row_stride + w];
}

// The codes of a plane's columns: out[j * words + w][r] = scale * bits + add. Bits are masked in place, so the scale of
// slot j has to carry a factor of 2**(-bits * j): see scale_plane. The first plane adds zeros, the others what those
// before have left in out.
template <int bits, bool first>
inline void unpack(const uint16_t* columns, int64_t words, int64_t count, const float* scale, const float* zero,
                   float* out, int64_t stride) {
    constexpr int slots = 16 / bits;
    constexpr int32_t mask = (1 << bits) - 1;
    for (int64_t w = 0; w < words; ++w)
        for (int64_t r = 0; r < count; r += kLanes) {
            const vi word = __builtin_convertvector(load_as<vh>(columns + w * count + r), vi);
            for (int j = 0; j < slots; ++j) {
                const int64_t i = j * words + w;
                float* to = out + i * stride + r;
                const vf code = __builtin_convertvector(word & (mask << (bits * j)), vf);
                store(to, fma(code, splat(scale[i]), first ? splat(zero[i]) : load(to)));
            }
        }
}

// The scales with which a plane's bits, masked in place in rows of words, count.
inline void scale_plane(const Plane& plane, int64_t words, const float* scale, float* out) {
    for (int64_t j = 0; j < plane.slots(); ++j) {
        const float factor = std::ldexp(1.0f, static_cast<int>(plane.shift - plane.bits * j));
        for (int64_t w = 0; w < words; ++w) out[j * words + w] = scale[j * words + w] * factor;
    }
}

// One plane of count rows, row_stride words apart, of which words are read.
inline void add_plane(const Plane& plane, const uint16_t* rows, int64_t row_stride, int64_t count, int64_t words,
                      const float* scale, const float* zero, float* out, int64_t stride) {
    alignas(64) uint16_t columns[kMaxWords * kMaxGroup];
    alignas(64) float scaled[kMaxChannels];
    transpose_words(rows, row_stride, count, words, columns);
    scale_plane(plane, words, scale, scaled);
    switch (plane.bits) {
        case 1: return unpack<1, false>(columns, words, count, scaled, zero, out, stride);
        case 2: return unpack<2, true>(columns, words, count, scaled, zero, out, stride);
        default: return unpack<4, true>(columns, words, count, scaled, zero, out, stride);
    }
}

// Keys of a group, [head_size][group_size] with rows stride apart.
inline void dequantize_keys(const uint8_t* slab, int64_t in_page, const Layout& f, float* keys, int64_t stride) {
    alignas(64) float scale[kMaxChannels], zero[kMaxChannels];
    const int64_t at = in_page * f.head_size * (f.scale_bits / 8), first = in_page * f.group_size;
    read_scales(slab + f.key_scale + at, slab + f.key_zero + at, f.head_size, f.scale_bits, scale, zero);
    for (const Plane& plane : f.key_planes) {
        if (plane.bits == 0) break;
        const auto* rows = reinterpret_cast<const uint16_t*>(slab + plane.offset) + first * plane.words;
        add_plane(plane, rows, plane.words, f.group_size, plane.words, scale, zero, keys, stride);
    }
}

// Values of a group, [group_size][head_size]; those of unwanted tokens are 0.
inline void dequantize_values(const uint8_t* slab, int64_t in_page, const int32_t* wanted, const Layout& f,
                              float* values) {
    alignas(64) float scale[kMaxGroup], zero[kMaxGroup];
    const int64_t first = in_page * f.group_size;
    for (int64_t g = 0; g < f.value_groups; ++g) {
        const int64_t at = (g * f.page_size + first) * (f.scale_bits / 8);
        read_scales(slab + f.value_scale + at, slab + f.value_zero + at, f.group_size, f.scale_bits, scale, zero);
        for (int64_t t = 0; t < f.group_size; ++t)
            if (!wanted[t]) scale[t] = zero[t] = 0.0f;
        const int64_t begin = g * f.value_group_size, count = std::min(f.value_group_size, f.head_size - begin);
        for (const Plane& plane : f.value_planes) {
            if (plane.bits == 0) break;
            const int64_t words = plane.words / f.groups_per_page;
            const auto* rows = reinterpret_cast<const uint16_t*>(slab + plane.offset) + begin * plane.words;
            add_plane(plane, rows + in_page * words, plane.words, count, words, scale, zero, values + begin,
                      f.head_size);
        }
    }
}

}  // namespace logquant
