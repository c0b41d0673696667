// Eight floats at a time with the compiler's vector extensions: the same source for any instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__FMA__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace logquant {

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));

constexpr int64_t kLanes = 8;

inline v8 load(const float* p) {
    v8 x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
inline v8i load(const int32_t* p) {
    v8i x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
inline v8h load(const uint16_t* p) {
    v8h x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
inline v8 load(const c10::BFloat16* p) {
    const v8i bits = __builtin_convertvector(load(reinterpret_cast<const uint16_t*>(p)), v8i) << 16;
    return reinterpret_cast<const v8&>(bits);
}
inline v8 load(const c10::Half* p) {
#if defined(__F16C__)
    __m128i bits;
    std::memcpy(&bits, p, sizeof(bits));
    return reinterpret_cast<v8>(_mm256_cvtph_ps(bits));
#else
    v8 x;
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(p[i]);
    return x;
#endif
}
inline void store(float* p, v8 x) { std::memcpy(p, &x, sizeof(x)); }
inline v8 splat(float x) { return v8{x, x, x, x, x, x, x, x}; }

// a * b + c. The build forbids contraction (the quantizer must round like torch), so it is asked for by name.
inline v8 fma(v8 a, v8 b, v8 c) {
#if defined(__FMA__)
    return reinterpret_cast<v8>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// 2**x for x <= 0 to float precision; 0 below -126, NaN for NaN
inline v8 exp2(v8 x) {
    const v8 magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer
    const v8i small = x < splat(-126.0f);
    x = small ? splat(-126.0f) : x;
    const v8 k = (x + magic) - magic;
    const v8 f = x - k;
    v8 y = splat(1.5403530e-4f);
    y = fma(y, f, splat(1.3333558e-3f));
    y = fma(y, f, splat(9.6181291e-3f));
    y = fma(y, f, splat(5.5504109e-2f));
    y = fma(y, f, splat(2.4022651e-1f));
    y = fma(y, f, splat(6.9314718e-1f));
    y = fma(y, f, splat(1.0f));
    const v8i power = (__builtin_convertvector(k, v8i) + 127) << 23;
    return small ? splat(0.0f) : y * reinterpret_cast<const v8&>(power);
}

// Keeps x in a register: compilers like to fold a load into each of its uses, and here loads are what is scarce.
inline void pin(v8& x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#endif
}

inline float sum(v8 x) {
    float s = 0;
    for (int i = 0; i < kLanes; ++i) s += x[i];
    return s;
}

// lane i of the result is the sum over the lanes of a[i]
inline v8 sum_each(const v8 (&a)[8]) {
    v8 b[4], c[2];
    for (int i = 0; i < 4; ++i)
        b[i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
               __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    for (int i = 0; i < 2; ++i)
        c[i] = __builtin_shufflevector(b[2 * i], b[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(b[2 * i], b[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(c[0], c[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// rows become columns
inline void transpose(v8 (&a)[8]) {
    v8 b[8], c[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            c[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            c[i + 2 * j + 1] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; ++i) {
        a[i] = __builtin_shufflevector(c[i], c[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        a[i + 4] = __builtin_shufflevector(c[i], c[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

}  // namespace logquant
