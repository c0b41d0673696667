// As many floats at a time as a register holds, with the compiler's vector extensions: the same source for any
// instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__FMA__) || defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace logquant {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
// always eight, to be transposed
typedef float f8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));

template <typename V>
inline V load_as(const void* p) {
    V x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
template <typename V>
inline void store(void* p, V x) {
    std::memcpy(p, &x, sizeof(x));
}

inline vf load(const float* p) { return load_as<vf>(p); }
inline vf load(const c10::BFloat16* p) {
    const vi bits = __builtin_convertvector(load_as<vh>(p), vi) << 16;
    return reinterpret_cast<const vf&>(bits);
}
inline vf load(const c10::Half* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_cvtph_ps(load_as<__m256i>(p)));
#elif defined(__F16C__)
    return reinterpret_cast<vf>(_mm256_cvtph_ps(load_as<__m128i>(p)));
#else
    vf x;
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
    return x;
#endif
}
// eight of them
inline f8 load8(const float* p) { return load_as<f8>(p); }
template <typename T>
inline f8 load8(const T* p) {
    f8 x;
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(p[i]);
    return x;
}

inline vf splat(float x) { return x - vf{}; }

// a * b + c. The build forbids contraction (the quantizer must round like torch), so it is asked for by name.
inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<vf>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// to the nearest integer, halves to the even one; exact below 2**22, and never nearer to 0 than that otherwise
inline vf nearest(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2**23
    return (x + magic) - magic;
}

// whole numbers from 0 to 255
inline void store_codes(uint8_t* p, vf x) {
    typedef uint8_t vb __attribute__((vector_size(kLanes)));
    store(p, __builtin_convertvector(__builtin_convertvector(x, vi), vb));
}

// 2**x for x <= 0 to float precision; 0 below -126, NaN for NaN
inline vf exp2(vf x) {
    const vi small = x < splat(-126.0f);  // to 0 at once: what is computed with denormal numbers takes very long
    x = small ? splat(-126.0f) : x;
    const vf k = nearest(x), f = x - k;
    vf y = splat(1.5403530e-4f);
    y = fma(y, f, splat(1.3333558e-3f));
    y = fma(y, f, splat(9.6181291e-3f));
    y = fma(y, f, splat(5.5504109e-2f));
    y = fma(y, f, splat(2.4022651e-1f));
    y = fma(y, f, splat(6.9314718e-1f));
    y = fma(y, f, splat(1.0f));
#if defined(__AVX512F__)
    y = reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(y), reinterpret_cast<__m512>(k)));
#else
    const vi power = (__builtin_convertvector(k, vi) + 127) << 23;
    y *= reinterpret_cast<const vf&>(power);
#endif
    return small ? splat(0.0f) : y;
}

// x with its lanes moved by so many, in a circle
template <int lanes>
inline vf rotated(vf x) {
    vi index;
    for (int i = 0; i < kLanes; ++i) index[i] = (i + lanes) % kLanes;
#if defined(__clang__)  // which knows constant shuffles alone
    vf y;
    for (int i = 0; i < kLanes; ++i) y[i] = x[index[i]];
    return y;
#else
    return __builtin_shuffle(x, index);
#endif
}

inline float sum(vf x) {
    if (kLanes > 8) x += rotated<kLanes / 2>(x);
    x += rotated<4>(x);
    x += rotated<2>(x);
    return x[0] + x[1];
}

inline vf larger(vf x, vf y) { return x > y ? x : y; }
inline vf smaller(vf x, vf y) { return x < y ? x : y; }
inline float largest(vf x) {
    if (kLanes > 8) x = larger(x, rotated<kLanes / 2>(x));
    x = larger(x, rotated<4>(x));
    x = larger(x, rotated<2>(x));
    return x[0] > x[1] ? x[0] : x[1];
}

inline bool any_above(vf x, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
    const vi above = x > splat(limit);
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= above[i];
    return any != 0;
#endif
}

// rows of eight become columns: three perfect shuffles swap the halves of a six-bit index
template <typename V>
inline void transpose(V (&a)[8]) {
    V b[8];
    for (int turn = 0; turn < 3; ++turn) {
        for (int i = 0; i < 4; ++i) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int i = 0; i < 8; ++i) a[i] = b[i];
    }
}

// Eight rows of channels as columns, stride apart.
template <typename T>
inline void transpose_rows(const T* const (&rows)[8], int64_t channels, float* columns, int64_t stride) {
    for (int64_t c = 0; c < channels; c += 8) {
        f8 x[8];
        for (int64_t i = 0; i < 8; ++i) x[i] = load8(rows[i] + c);
        transpose(x);
        for (int64_t i = 0; i < 8; ++i) store(columns + (c + i) * stride, x[i]);
    }
}

}  // namespace logquant
