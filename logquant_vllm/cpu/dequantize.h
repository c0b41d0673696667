// One group of tokens of a page as floats: keys token by token, values channel by channel, as both are stored.
#pragma once

#include <c10/util/Float8_e4m3fn.h>

#include <array>
#include <cmath>

#include "cache.h"
#include "vec.h"

namespace logquant {

constexpr int64_t kBlock = 128;  // tokens handled at a time; a multiple of every group size

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

// Rows of words of one plane: out[j * words + w] = scale * bits + add. Bits are masked in place, so the scale of slot j has
// to carry a factor of 2**(-bits * j): see scale_plane. fixed_words is words where known, else 0. The first plane adds
// zeros, the others what those before have left in out.
template <int bits, int fixed_words, bool first>
inline void unpack_rows(const uint16_t* rows, int64_t row_stride, int64_t some_words, int64_t count,
                        const int32_t* wanted, const float* scale, const float* zero, float* out, int64_t out_stride) {
    constexpr int slots = 16 / bits;
    constexpr int32_t mask = (1 << bits) - 1;
    const int64_t words = fixed_words ? fixed_words : some_words;
    for (int64_t r = 0; r < count; ++r, rows += row_stride, out += out_stride) {
        if (wanted && !wanted[r]) continue;
        const float* add = first ? zero : out;
        int64_t w = 0;
        for (; w + kLanes <= words; w += kLanes) {
            const v8i word = __builtin_convertvector(load(rows + w), v8i);
            for (int j = 0; j < slots; ++j) {
                const int64_t i = j * words + w;
                const v8 code = __builtin_convertvector(word & (mask << (bits * j)), v8);
                store(out + i, fma(code, load(scale + i), load(add + i)));
            }
        }
        for (; w < words; ++w)
            for (int j = 0; j < slots; ++j) {
                const int64_t i = j * words + w;
                out[i] = static_cast<float>(rows[w] & (mask << (bits * j))) * scale[i] + add[i];
            }
    }
}

// The right unpack_rows: widths of common formats are worth a copy of the code.
template <int bits, bool first>
auto unpacker(int64_t words) {
    switch (words) {
        case 8: return unpack_rows<bits, 8, first>;
        case 16: return unpack_rows<bits, 16, first>;
        case 32: return unpack_rows<bits, 32, first>;
        default: return unpack_rows<bits, 0, first>;
    }
}
inline auto unpacker(const Plane& plane, int64_t words) {
    switch (plane.bits) {
        case 1: return unpacker<1, false>(words);
        case 2: return unpacker<2, true>(words);
        default: return unpacker<4, true>(words);
    }
}

// The scales with which a plane's bits, masked in place in rows of words, count.
inline void scale_plane(const Plane& plane, int64_t words, const float* scale, float* out) {
    for (int64_t j = 0; j < plane.slots(); ++j) {
        const float factor = std::ldexp(1.0f, static_cast<int>(plane.shift - plane.bits * j));
        for (int64_t w = 0; w < words; ++w) out[j * words + w] = scale[j * words + w] * factor;
    }
}

// Keys of the wanted tokens of a group, [group_size][head_size]; the rows of the others are left alone.
inline void dequantize_keys(const uint8_t* slab, int64_t in_page, const int32_t* wanted, const Layout& f, float* keys) {
    alignas(32) float scale[512], zero[512], scaled[512];
    const int64_t at = in_page * f.head_size * (f.scale_bits / 8), first = in_page * f.group_size;
    read_scales(slab + f.key_scale + at, slab + f.key_zero + at, f.head_size, f.scale_bits, scale, zero);
    for (const Plane& plane : f.key_planes) {
        if (plane.bits == 0) break;
        const int64_t words = plane.words;
        scale_plane(plane, words, scale, scaled);
        const auto* rows = reinterpret_cast<const uint16_t*>(slab + plane.offset) + first * words;
        unpacker(plane, words)(rows, words, words, f.group_size, wanted, scaled, zero, keys, f.head_size);
    }
}

// Values of a group, rows of group_size tokens kBlock apart, [head_size]; those of unwanted tokens are 0.
inline void dequantize_values(const uint8_t* slab, int64_t in_page, const int32_t* wanted, const Layout& f,
                              float* values) {
    alignas(32) float scale[kBlock], zero[kBlock], scaled[kBlock];
    const int64_t first = in_page * f.group_size;
    for (int64_t g = 0; g < f.value_groups; ++g) {
        const int64_t at = (g * f.page_size + first) * (f.scale_bits / 8);
        read_scales(slab + f.value_scale + at, slab + f.value_zero + at, f.group_size, f.scale_bits, scale, zero);
        for (int64_t t = 0; t < f.group_size; ++t)
            if (!wanted[t]) scale[t] = zero[t] = 0.0f;
        const int64_t begin = g * f.value_group_size, end = std::min(begin + f.value_group_size, f.head_size);
        for (const Plane& plane : f.value_planes) {
            if (plane.bits == 0) break;
            const int64_t words = plane.words / f.groups_per_page;
            scale_plane(plane, words, scale, scaled);
            const auto* rows = reinterpret_cast<const uint16_t*>(slab + plane.offset) + in_page * words;
            unpacker(plane, words)(rows + begin * plane.words, plane.words, words, end - begin, nullptr, scaled, zero,
                                   values + begin * kBlock, kBlock);
        }
    }
}

}  // namespace logquant
