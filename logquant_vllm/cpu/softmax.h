// The online softmax: scores of a row become weights, and what the row holds so far is rescaled where they exceed it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cache.h"
#include "matrix.h"

namespace logquant {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.69314718056f;
constexpr double kLog2e = 1.4426950408889634;

// Running maximum (in powers of two), sum of weights and weighted values of rows, in one piece of memory. A row has
// kLanes sums of weights, to be added at the end.
struct State {
    float *output, *totals, *maximum;
    State(float* memory, int64_t rows, int64_t head_size)
        : output(memory), totals(memory + rows * head_size), maximum(totals + rows * kLanes) {}
    static int64_t size(int64_t rows, int64_t head_size) {  // whole cache lines
        return ceil_div(rows * (head_size + kLanes + 1) * 4, kAlignment) * (kAlignment / 4);
    }
    void clear(int64_t rows, int64_t head_size) {
        std::fill_n(output, rows * (head_size + kLanes), 0.0f);
        std::fill_n(maximum, rows, -kInfinity);
    }
    float total(int64_t row) const { return sum(load(totals + row * kLanes)); }

    // To another maximum, from which on weights count; what to subtract from scores for it.
    float raise(int64_t row, float top, int64_t head_size) {
        const float shift = top == -kInfinity ? 0.0f : top;
        if (top == maximum[row]) return shift;
        const vf factor = exp2(splat(maximum[row] - shift));
        maximum[row] = top;
        store(totals + row * kLanes, load(totals + row * kLanes) * factor);
        float* out = output + row * head_size;
        for (int64_t c = 0; c < head_size; c += kLanes) store(out + c, load(out + c) * factor);
        return shift;
    }

    // Adds a row of another state, of the same tile.
    void merge(int64_t row, const State& part, int64_t head_size) {
        const float shift = raise(row, std::max(maximum[row], part.maximum[row]), head_size);
        const vf factor = exp2(splat(part.maximum[row] - shift));
        const auto add = [&](float* to, const float* from) { store(to, fma(load(from), factor, load(to))); };
        add(totals + row * kLanes, part.totals + row * kLanes);
        for (int64_t c = row * head_size; c < (row + 1) * head_size; c += kLanes) add(output + c, part.output + c);
    }
};

// Scores become softcap * tanh(score / softcap), in units of log2.
inline void cap(float* scores, int64_t width, float softcap) {
    for (int64_t i = 0; i < width; i += kLanes) {
        const vf x = load(scores + i), size = x > splat(0.0f) ? x : -x;
        const vf power = exp2(size * splat(-2.0f * static_cast<float>(kLog2e) / softcap));
        const vf capped = splat(softcap) * (splat(1.0f) - power) / (splat(1.0f) + power);
        store(scores + i, x > splat(0.0f) ? capped : -capped);
    }
}

// Scores that are not wanted (all are if that is null), or not among the first seen, become -inf.
inline void mask(float* scores, int64_t width, int64_t seen, const int32_t* wanted) {
    vi lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    for (int64_t i = 0; i < width; i += kLanes) {
        vi valid = lane + static_cast<int32_t>(i) < static_cast<int32_t>(seen);
        if (wanted != nullptr) valid &= load_as<vi>(wanted + i) != 0;
        store(scores + i, valid ? load(scores + i) : splat(-kInfinity));
    }
}

// The largest score of each lane.
inline vf largest_of(const float* scores, int64_t width) {
    vf top = load(scores);
    for (int64_t i = kLanes; i < width; i += kLanes) top = larger(load(scores + i), top);
    return top;
}

// Scores of a row, of which the largest are tops, become weights; -inf becomes 0.
inline void weigh(float* scores, int64_t width, vf tops, State& state, int64_t row, int64_t head_size) {
    float top = state.maximum[row];
    if (any_above(tops, top)) top = largest(tops);
    const vf shift = splat(state.raise(row, top, head_size));
    vf total = load(state.totals + row * kLanes);
    for (int64_t i = 0; i < width; i += kLanes) {
        const vf weight = exp2(load(scores + i) - shift);
        store(scores + i, weight);
        total += weight;
    }
    store(state.totals + row * kLanes, total);
}

}  // namespace logquant
