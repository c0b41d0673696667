// Attention with an online softmax over three sources in turn: groups of pages, window slots, and this step's tokens.
//
// A tile is a run of query rows (query tokens x the heads that share a KV head) of one request. Its context is cut into
// units of kBlock tokens; a unit is brought to floats once, keys as [token][channel] and values as
// [channel][token], and both products are then sums along contiguous rows. Where there are fewer tiles than threads can
// use, the units of a tile are split, and whoever finishes the last split merges them.
#include <ATen/Parallel.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "cache.h"
#include "dequantize.h"
#include "vec.h"

namespace logquant {
namespace {

constexpr int64_t kTileRows = 128;    // rows of a tile: enough to pay for bringing a unit to floats
constexpr int64_t kSplitUnits = 2;    // a smaller split would not pay for its merge
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kAlignment = 64;    // bytes of a cache line
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.69314718056f;
constexpr double kLog2e = 1.4426950408889634;

// c[m][n] (+)= sum over l of a[m][l] * b[n][l], for MR rows of a. n and l in multiples of 8.
template <int MR, bool accumulate>
void dot_rows(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, int64_t l, float* c, int64_t ldc) {
    constexpr int NR = 8 / MR;
    for (int64_t j = 0; j < n; j += NR) {
        v8 acc[8] = {};
        for (int64_t i = 0; i < l; i += kLanes) {
            v8 y[NR];
            for (int q = 0; q < NR; ++q) {
                y[q] = load(b + (j + q) * ldb + i);
                if (MR > 1) pin(y[q]);
            }
            for (int p = 0; p < MR; ++p) {
                v8 x = load(a + p * lda + i);
                if (NR > 1) pin(x);
                for (int q = 0; q < NR; ++q) acc[p * NR + q] = fma(x, y[q], acc[p * NR + q]);
            }
        }
        alignas(32) float out[8];
        store(out, sum_each(acc));
        for (int p = 0; p < MR; ++p)
            for (int q = 0; q < NR; ++q) {
                float& cell = c[p * ldc + j + q];
                cell = accumulate ? cell + out[p * NR + q] : out[p * NR + q];
            }
    }
}

// Rows that dot_rows takes at a time; tiles are padded to a multiple.
int64_t row_step(int64_t rows) { return rows < 4 ? (rows < 2 ? 1 : 2) : 4; }
int64_t padded(int64_t rows) { return rows == 3 ? 4 : ceil_div(rows, row_step(rows)) * row_step(rows); }

template <bool accumulate>
void dot_tile(const float* a, int64_t rows, int64_t lda, const float* b, int64_t ldb, int64_t n, int64_t l, float* c,
              int64_t ldc) {
    if (rows == 1) return dot_rows<1, accumulate>(a, lda, b, ldb, n, l, c, ldc);
    if (rows == 2) return dot_rows<2, accumulate>(a, lda, b, ldb, n, l, c, ldc);
    for (int64_t m = 0; m < rows; m += 4)
        dot_rows<4, accumulate>(a + m * lda, lda, b, ldb, n, l, c + m * ldc, ldc);
}

struct Tile {
    int64_t request, head, first_row, rows;  // row = query * (query heads per KV head) + head within
    int64_t page_units, slot_units, new_units, splits;
    int64_t partial;  // first split's place among the partial results
    int64_t units() const { return page_units + slot_units + new_units; }
};

struct Task {
    int64_t tile, split;
};

// Uninitialized floats that start on a cache line
class AlignedFloats {
  public:
    void grow(int64_t size) {
        if (size <= size_) return;
        memory_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, ceil_div(size * 4, kAlignment) * kAlignment)));
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

// A thread's memory, kept between calls: fresh pages from the system would cost more than a decode step.
struct Buffers {
    AlignedFloats query, scores, keys, values, state;
    alignas(32) int32_t wanted[kBlock];
    static Buffers& mine() {
        static thread_local Buffers b;
        return b;
    }
};

// Running maximum (in powers of two), sum and weighted values of the rows of a tile, in one piece of memory.
struct State {
    float *maximum, *total, *output;
    State(float* memory, int64_t rows, int64_t head_size)
        : maximum(memory + rows * head_size), total(maximum + rows), output(memory) {}
    static int64_t size(int64_t rows, int64_t head_size) {  // whole cache lines
        return ceil_div(rows * (head_size + 2) * 4, kAlignment) * (kAlignment / 4);
    }
};

template <typename T>
class Attention {
  public:
    Attention(const Rows<T>& query, const Rows<T>& key, const Rows<T>& value, const Cache& cache, const Layout& f,
              int64_t num_heads, const Scores& scores, T* output, float* lse)
        : query_(query), key_(key), value_(value), cache_(cache), f_(f), num_heads_(num_heads),
          group_heads_(num_heads / cache.num_kv_heads), scale_(static_cast<float>(scores.scale * kLog2e)),
          softcap_(static_cast<float>(scores.softcap * kLog2e)), sinks_(scores.sinks), output_(output), lse_(lse) {}

    void run() {
        plan();
        const auto tasks = static_cast<int64_t>(tasks_.size());
        if (tasks == 0) return;
        // tasks differ in size, so threads take the next one when they are free
        std::atomic<int64_t> next{0};
        at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t begin, int64_t end) {
            for (int64_t worker = begin; worker < end; ++worker)
                for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run_task(tasks_[i]);
        });
    }

  private:
    // First position past those that pages serve.
    int64_t pages_end(const Request& r) const {
        return std::min(std::max((r.compactions + 1) * f_.window_length, r.window_start), r.computed);
    }

    void plan() {
        int64_t total = 0;
        for (int64_t i = 0; i < static_cast<int64_t>(cache_.requests.size()); ++i) {
            const Request& r = cache_.requests[i];
            if (!r.live) continue;
            const int64_t rows = r.query_len * group_heads_;
            for (int64_t head = 0; head < cache_.num_kv_heads; ++head)
                for (int64_t first = 0; first < rows; first += kTileRows) {
                    Tile t{i, head, first, std::min(kTileRows, rows - first), 0, 0, 0, 1, 0};
                    t.page_units = ceil_div(pages_end(r), kBlock);
                    t.slot_units = r.computed > 0 ? ceil_div(f_.num_slots(), kBlock) : 0;
                    t.new_units = ceil_div((t.first_row + t.rows - 1) / group_heads_ + 1, kBlock);
                    total += t.units();
                    tiles_.push_back(t);
                }
        }
        const int64_t share = std::max(kSplitUnits, ceil_div(total, kTasksPerThread * at::get_num_threads()));
        int64_t partial_size = 0, partials = 0;
        for (int64_t i = 0; i < static_cast<int64_t>(tiles_.size()); ++i) {
            Tile& t = tiles_[i];
            t.splits = ceil_div(t.units(), share);
            for (int64_t s = 0; s < t.splits; ++s) tasks_.push_back({i, s});
            if (t.splits == 1) continue;
            t.partial = partial_size;
            partial_size += t.splits * State::size(padded(t.rows), f_.head_size);
            ++partials;
        }
        if (partials == 0) return;
        partial_.grow(partial_size);
        pending_.reset(new std::atomic<int64_t>[tiles_.size()]);
        for (size_t i = 0; i < tiles_.size(); ++i) pending_[i].store(tiles_[i].splits, std::memory_order_relaxed);
    }

    void run_task(const Task& task) {
        const Tile& t = tiles_[task.tile];
        const int64_t rows = padded(t.rows);
        Buffers& b = Buffers::mine();
        b.query.grow(rows * f_.head_size);
        b.scores.grow(rows * kBlock);
        b.keys.grow(kBlock * f_.head_size);
        b.values.grow(f_.head_size * kBlock);
        b.state.grow(State::size(rows, f_.head_size));
        State state = t.splits == 1 ? State(b.state.data(), rows, f_.head_size) : split_state(t, task.split, rows);
        std::fill(state.maximum, state.maximum + rows, -kInfinity);
        std::fill(state.total, state.total + rows, 0.0f);
        std::fill(state.output, state.output + rows * f_.head_size, 0.0f);
        read_query(t, rows, b);
        const int64_t units = t.units(), last = units * (task.split + 1) / t.splits;
        for (int64_t unit = units * task.split / t.splits; unit < last; ++unit) run_unit(t, unit, rows, b, state);
        if (t.splits == 1) return finish(t, state);
        if (pending_[task.tile].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(t, rows, b);
    }

    int64_t query_of(const Tile& t, int64_t row) const { return (t.first_row + row) / group_heads_; }
    int64_t head_of(const Tile& t, int64_t row) const {
        return t.head * group_heads_ + (t.first_row + row) % group_heads_;
    }

    void read_query(const Tile& t, int64_t rows, Buffers& b) const {
        for (int64_t m = 0; m < rows; ++m) {
            float* out = b.query.data() + m * f_.head_size;
            if (m >= t.rows) {
                std::fill(out, out + f_.head_size, 0.0f);
                continue;
            }
            const T* in = query_.at(cache_.requests[t.request].first_row + query_of(t, m), head_of(t, m));
            for (int64_t c = 0; c < f_.head_size; c += kLanes) store(out + c, load(in + c) * splat(scale_));
        }
    }

    void run_unit(const Tile& t, int64_t unit, int64_t rows, Buffers& b, State& state) const {
        int64_t count = 0, first_new = -1;
        if (unit < t.page_units) {
            count = read_pages(t, unit, b);
        } else if ((unit -= t.page_units) < t.slot_units) {
            count = read_slots(t, unit, b);
        } else {
            first_new = (unit - t.slot_units) * kBlock;
            count = read_new(t, first_new, b);
        }
        if (count == 0) return;
        const int64_t width = ceil_div(count, kLanes) * kLanes;
        dot_tile<false>(b.query.data(), rows, f_.head_size, b.keys.data(), f_.head_size, width, f_.head_size,
                        b.scores.data(), kBlock);
        for (int64_t m = 0; m < rows; ++m) {
            // tokens of this step that the row may see: itself and those before it
            const int64_t seen = first_new < 0 ? count : std::min(count, query_of(t, m) + 1 - first_new);
            weigh(b.scores.data() + m * kBlock, width, seen, b.wanted, state, m);
        }
        dot_tile<true>(b.scores.data(), rows, kBlock, b.values.data(), kBlock, f_.head_size, width, state.output,
                       f_.head_size);
    }

    // Scores of a row become weights, exactly 0 where masked, and what the row holds so far is rescaled.
    void weigh(float* scores, int64_t width, int64_t seen, const int32_t* wanted, State& state, int64_t m) const {
        const v8i lane = {0, 1, 2, 3, 4, 5, 6, 7};
        v8 top = splat(-kInfinity);
        for (int64_t i = 0; i < width; i += kLanes) {
            const v8i valid = (lane + static_cast<int32_t>(i) < static_cast<int32_t>(seen)) & (load(wanted + i) != 0);
            const v8 x = valid ? capped(load(scores + i)) : splat(-kInfinity);
            store(scores + i, x);
            top = x > top ? x : top;
        }
        float maximum = state.maximum[m];
        for (int i = 0; i < kLanes; ++i) maximum = std::max(maximum, top[i]);
        const float shift = maximum == -kInfinity ? 0.0f : maximum;
        v8 total = splat(0.0f);
        for (int64_t i = 0; i < width; i += kLanes) {
            const v8 weight = exp2(load(scores + i) - splat(shift));
            store(scores + i, weight);
            total += weight;
        }
        if (maximum != state.maximum[m]) {
            const float factor = std::exp2(state.maximum[m] - shift);
            state.maximum[m] = maximum;
            state.total[m] *= factor;
            float* out = state.output + m * f_.head_size;
            for (int64_t c = 0; c < f_.head_size; c += kLanes) store(out + c, load(out + c) * splat(factor));
        }
        state.total[m] += sum(total);
    }

    // softcap * tanh(x / softcap), of scores in units of log2.
    v8 capped(v8 x) const {
        if (softcap_ == 0.0f) return x;
        const v8 size = x > splat(0.0f) ? x : -x;
        const v8 power = exp2(size * splat(-2.0f * static_cast<float>(kLog2e) / softcap_));
        const v8 result = splat(softcap_) * (splat(1.0f) - power) / (splat(1.0f) + power);
        return x > splat(0.0f) ? result : -result;
    }

    int64_t read_pages(const Tile& t, int64_t unit, Buffers& b) const {
        const Request& r = cache_.requests[t.request];
        const int64_t first = unit * kBlock / f_.group_size, end = ceil_div(pages_end(r), f_.group_size);
        const int64_t groups = std::min(kBlock / f_.group_size, end - first);
        bool any = false;
        for (int64_t i = 0; i < groups; ++i) any |= read_group(t, first + i, i * f_.group_size, b);
        return any ? groups * f_.group_size : 0;
    }

    // One group of tokens to the buffers' tokens from to on; false if none of them is to be read from the page.
    bool read_group(const Tile& t, int64_t group, int64_t to, Buffers& b) const {
        const Request& r = cache_.requests[t.request];
        const int64_t first = group * f_.group_size, end = pages_end(r) - first;
        // an old chunk has no copy left once every index below 2W is halved away (token 0 is in no such chunk)
        const int64_t halvings = r.compactions - (first + f_.group_size - 1) / f_.window_length + 1;
        const bool old = first >= f_.window_length &&
                         (halvings > 30 || int64_t{1} << std::max<int64_t>(halvings, 0) > 2 * f_.window_length);
        int32_t* wanted = b.wanted + to;
        bool any = false;
        for (int64_t i = 0; i < f_.group_size; ++i) {
            const bool copied = !old && r.has_copy(first + i) &&
                                is_log_selected(first + i, r.compactions, f_.window_length);
            wanted[i] = i < end && !copied;
            any |= wanted[i] != 0;
        }
        float *keys = b.keys.data() + to * f_.head_size, *values = b.values.data() + to;
        if (!any) {  // its weights will be 0, which must not meet a NaN
            for (int64_t c = 0; c < f_.head_size; ++c) std::fill_n(values + c * kBlock, f_.group_size, 0.0f);
            return false;
        }
        const uint8_t* slab = cache_.slab(t.request, group / f_.groups_per_page, t.head, f_);
        const int64_t in_page = group % f_.groups_per_page;
        dequantize_keys(slab, in_page, wanted, f_, keys);
        dequantize_values(slab, in_page, wanted, f_, values);
        return true;
    }

    int64_t read_slots(const Tile& t, int64_t unit, Buffers& b) const {
        const Request& r = cache_.requests[t.request];
        const int64_t w = f_.window_length, recent = (r.compactions + 1) * w, ring = (r.stored_compactions + 1) * w;
        const int64_t begin = slot_of_position(ring, f_);
        const int64_t last = std::min((unit + 1) * kBlock, f_.num_slots());
        Token<T> tokens[kBlock];
        int64_t count = 0;
        for (int64_t slot = unit * kBlock; slot < last; ++slot) {
            // the ring's positions begin at ring; those behind the last computed one may have been taken back
            const int64_t position = slot < w ? log_slot_position(slot, r.stored_compactions, w)
                                              : ring + slot - begin + (slot < begin ? f_.ring_slots() : 0);
            if (position >= r.computed || !r.has_copy(position)) continue;
            if (position < recent && !is_log_selected(position, r.compactions, w)) continue;
            const T* copy = cache_.slot<T>(t.request, slot, t.head, f_);
            tokens[count++] = {copy, copy + f_.head_size};
        }
        return read_tokens(tokens, count, b);
    }

    int64_t read_new(const Tile& t, int64_t first, Buffers& b) const {
        const Request& r = cache_.requests[t.request];
        const int64_t count = std::min(kBlock, query_of(t, t.rows - 1) + 1 - first);
        Token<T> tokens[kBlock];
        for (int64_t i = 0; i < count; ++i)
            tokens[i] = {key_.at(r.first_row + first + i, t.head), value_.at(r.first_row + first + i, t.head)};
        return read_tokens(tokens, count, b);
    }

    int64_t read_tokens(const Token<T>* tokens, int64_t count, Buffers& b) const {
        const int64_t size = f_.head_size;
        std::fill(b.wanted, b.wanted + kBlock, 1);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t c = 0; c < size; c += kLanes) store(b.keys.data() + i * size + c, load(tokens[i].key + c));
        for (int64_t i = 0; i < count; i += kLanes)
            for (int64_t c = 0; c < size; c += kLanes) {
                v8 x[8];
                for (int64_t j = 0; j < kLanes; ++j) x[j] = i + j < count ? load(tokens[i + j].value + c) : splat(0.0f);
                transpose(x);
                for (int64_t j = 0; j < kLanes; ++j) store(b.values.data() + (c + j) * kBlock + i, x[j]);
            }
        return count;
    }

    State split_state(const Tile& t, int64_t split, int64_t rows) const {
        return {partial_.data() + t.partial + split * State::size(rows, f_.head_size), rows, f_.head_size};
    }

    void merge(const Tile& t, int64_t rows, Buffers& b) const {
        State all(b.state.data(), rows, f_.head_size);
        for (int64_t m = 0; m < t.rows; ++m) {
            float maximum = -kInfinity;
            for (int64_t s = 0; s < t.splits; ++s)
                maximum = std::max(maximum, split_state(t, s, rows).maximum[m]);
            float* out = all.output + m * f_.head_size;
            std::fill(out, out + f_.head_size, 0.0f);
            all.maximum[m] = maximum, all.total[m] = 0.0f;
            for (int64_t s = 0; s < t.splits; ++s) {
                const State part = split_state(t, s, rows);
                const float factor = std::exp2(part.maximum[m] - (maximum == -kInfinity ? 0.0f : maximum));
                all.total[m] += part.total[m] * factor;
                const float* in = part.output + m * f_.head_size;
                for (int64_t c = 0; c < f_.head_size; c += kLanes)
                    store(out + c, fma(load(in + c), splat(factor), load(out + c)));
            }
        }
        finish(t, all);
    }

    void finish(const Tile& t, const State& state) const {
        for (int64_t m = 0; m < t.rows; ++m) {
            const int64_t row = cache_.requests[t.request].first_row + query_of(t, m);
            const int64_t at = row * num_heads_ + head_of(t, m);
            float total = state.total[m];
            if (sinks_ != nullptr)
                total += std::exp2(sinks_[head_of(t, m)] * static_cast<float>(kLog2e) - state.maximum[m]);
            const float inverse = 1.0f / total;
            const float* in = state.output + m * f_.head_size;
            for (int64_t c = 0; c < f_.head_size; ++c) output_[at * f_.head_size + c] = static_cast<T>(in[c] * inverse);
            lse_[at] = (state.maximum[m] + std::log2(state.total[m])) * kLn2;
        }
    }

    Rows<T> query_, key_, value_;
    const Cache& cache_;
    const Layout& f_;
    int64_t num_heads_, group_heads_;
    float scale_, softcap_;  // both in units of log2
    const float* sinks_;
    T* output_;
    float* lse_;
    std::vector<Tile> tiles_;
    std::vector<Task> tasks_;
    AlignedFloats partial_;
    std::unique_ptr<std::atomic<int64_t>[]> pending_;
};

}  // namespace

template <typename T>
void attention(const Rows<T>& query, const Rows<T>& key, const Rows<T>& value, const Cache& cache, const Layout& f,
               int64_t num_heads, const Scores& scores, T* output, float* lse) {
    Attention<T>(query, key, value, cache, f, num_heads, scores, output, lse).run();
}

#define LOGQUANT_INSTANTIATE(T)                                                                                   \
    template void attention<T>(const Rows<T>&, const Rows<T>&, const Rows<T>&, const Cache&, const Layout&,      \
                               int64_t, const Scores&, T*, float*);
LOGQUANT_INSTANTIATE(float)
LOGQUANT_INSTANTIATE(c10::Half)
LOGQUANT_INSTANTIATE(c10::BFloat16)

}  // namespace logquant
