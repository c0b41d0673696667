// One group of tokens of a page as floats: keys token by token, values channel by channel, as both are stored.
#pragma once

#include <c10/util/Float8_e4m3fn.h>

#include <array>

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

// out[j * words + w] = scale * code + zero for the codes of count rows of words. Codes are masked in place, so the
// scale of slot j has to carry a factor of 2**(-bits * j): see fold_slots. fixed_words is words where known, else 0.
template <int bits, int fixed_words>
inline void unpack_rows(const uint16_t* rows, int64_t row_stride, int64_t some_words, int64_t count,
                        const int32_t* wanted, const float* scale, const float* zero, float* out, int64_t out_stride) {
    constexpr int slots = 16 / bits;
    constexpr int32_t mask = (1 << bits) - 1;
    const int64_t words = fixed_words ? fixed_words : some_words;
    for (int64_t r = 0; r < count; ++r, rows += row_stride, out += out_stride) {
        if (wanted && !wanted[r]) continue;
        int64_t w = 0;
        for (; w + kLanes <= words; w += kLanes) {
            const v8i word = __builtin_convertvector(load(rows + w), v8i);
            for (int j = 0; j < slots; ++j) {
                const int64_t i = j * words + w;
                const v8 code = __builtin_convertvector(word & (mask << (bits * j)), v8);
                store(out + i, fma(code, load(scale + i), load(zero + i)));
            }
        }
        for (; w < words; ++w)
            for (int j = 0; j < slots; ++j) {
                const int64_t i = j * words + w;
                out[i] = static_cast<float>(rows[w] & (mask << (bits * j))) * scale[i] + zero[i];
            }
    }
}

// The right unpack_rows: widths of common formats are worth a copy of the code.
template <int bits>
auto unpacker(int64_t words) {
    switch (words) {
        case 8: return unpack_rows<bits, 8>;
        case 16: return unpack_rows<bits, 16>;
        case 32: return unpack_rows<bits, 32>;
        default: return unpack_rows<bits, 0>;
    }
}

inline void fold_slots(float* scale, int64_t words, int64_t bits) {
    for (int64_t j = 1; j < 16 / bits; ++j) {
        const float factor = 1.0f / static_cast<float>(1 << (bits * j));
        for (int64_t w = 0; w < words; ++w) scale[j * words + w] *= factor;
    }
}

// Keys of the wanted tokens of a group, [group_size][head_size]; the rows of the others are left alone.
template <int bits>
void dequantize_keys(const uint8_t* slab, int64_t in_page, const int32_t* wanted, const Layout& f, float* keys) {
    alignas(32) float scale[512], zero[512];
    const int64_t at = in_page * f.head_size * (f.scale_bits / 8), first = in_page * f.group_size;
    read_scales(slab + f.key_scale + at, slab + f.key_zero + at, f.head_size, f.scale_bits, scale, zero);
    fold_slots(scale, f.key_words, bits);
    const auto* words = reinterpret_cast<const uint16_t*>(slab + f.key_codes) + first * f.key_words;
    unpacker<bits>(f.key_words)(words, f.key_words, f.key_words, f.group_size, wanted, scale, zero, keys, f.head_size);
}

// Values of a group, rows of group_size tokens kBlock apart, [head_size]; those of unwanted tokens are 0.
template <int bits>
void dequantize_values(const uint8_t* slab, int64_t in_page, const int32_t* wanted, const Layout& f, float* values) {
    alignas(32) float scale[kBlock], zero[kBlock];
    const int64_t first = in_page * f.group_size, n = f.value_words_per_group;
    const auto* words = reinterpret_cast<const uint16_t*>(slab + f.value_codes) + in_page * n;
    for (int64_t g = 0; g < f.value_groups; ++g) {
        const int64_t at = (g * f.page_size + first) * (f.scale_bits / 8);
        read_scales(slab + f.value_scale + at, slab + f.value_zero + at, f.group_size, f.scale_bits, scale, zero);
        fold_slots(scale, n, bits);
        for (int64_t t = 0; t < f.group_size; ++t)
            if (!wanted[t]) scale[t] = zero[t] = 0.0f;
        const int64_t begin = g * f.value_group_size, end = std::min(begin + f.value_group_size, f.head_size);
        unpacker<bits>(n)(words + begin * f.value_words, f.value_words, n, end - begin, nullptr, scale, zero,
                          values + begin * kBlock, kBlock);
    }
}

}  // namespace logquant
