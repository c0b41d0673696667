// Products of a few rows with a matrix of contiguous rows: a block of sums stays in registers.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "vec.h"

namespace logquant {

constexpr int64_t kAlignment = 64;  // bytes of a cache line
constexpr int64_t kRows = 4;        // of a block, and its vectors: with AVX2, half of the sixteen registers
constexpr int64_t kVectors = kLanes / 4;

// Uninitialized floats that start on a cache line
class AlignedFloats {
  public:
    void grow(int64_t size) {
        if (size <= size_) return;
        const int64_t bytes = (size * 4 + kAlignment - 1) / kAlignment * kAlignment;
        memory_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
        if (!memory_) throw std::bad_alloc();
        size_ = size;
    }
    float* data() const { return memory_.get(); }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

template <int rows, int vectors, bool accumulate>
inline void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t length, float* c,
                           int64_t ldc) {
    vf sums[rows][vectors];
    for (int m = 0; m < rows; ++m)
        for (int v = 0; v < vectors; ++v) sums[m][v] = accumulate ? load(c + m * ldc + v * kLanes) : splat(0.0f);
    for (int64_t i = 0; i < length; ++i, b += ldb) {
        vf y[vectors];
        for (int v = 0; v < vectors; ++v) y[v] = load(b + v * kLanes);
        for (int m = 0; m < rows; ++m) {
            const vf x = splat(a[m * lda + i]);
            for (int v = 0; v < vectors; ++v) sums[m][v] = fma(x, y[v], sums[m][v]);
        }
    }
    for (int m = 0; m < rows; ++m)
        for (int v = 0; v < vectors; ++v) store(c + m * ldc + v * kLanes, sums[m][v]);
}

// c[m][n] (+)= sum over i < length of a[m][i] * b[i][n] for at most kRows rows of a; width is a multiple of kLanes.
template <int rows, bool accumulate>
void multiply_rows(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t length, float* c, int64_t ldc,
                   int64_t width) {
    int64_t n = 0;
    for (; n + kVectors * kLanes <= width; n += kVectors * kLanes)
        multiply_block<rows, kVectors, accumulate>(a, lda, b + n, ldb, length, c + n, ldc);
    for (; n < width; n += kLanes) multiply_block<rows, 1, accumulate>(a, lda, b + n, ldb, length, c + n, ldc);
}
template <bool accumulate>
void multiply(const float* a, int64_t rows, int64_t lda, const float* b, int64_t ldb, int64_t length, float* c,
              int64_t ldc, int64_t width) {
    switch (rows) {
        case 1: return multiply_rows<1, accumulate>(a, lda, b, ldb, length, c, ldc, width);
        case 2: return multiply_rows<2, accumulate>(a, lda, b, ldb, length, c, ldc, width);
        case 3: return multiply_rows<3, accumulate>(a, lda, b, ldb, length, c, ldc, width);
        default: return multiply_rows<kRows, accumulate>(a, lda, b, ldb, length, c, ldc, width);
    }
}

}  // namespace logquant
