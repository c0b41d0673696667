// Attention with an online softmax over three sources in turn: groups of pages, copies, and this step's tokens.
//
// A tile is a run of query rows (query tokens x the heads that share a KV head) of one request. Its context is cut into
// units (tokens.h); a unit is brought to floats once, and all rows of the tile are multiplied with it, a few at a time
// (matrix.h). Where there are fewer tiles than threads can use, the units of a tile are split, and whoever finishes the
// last split merges them.
#include <ATen/Parallel.h>

#include <atomic>
#include <memory>

#include "cache.h"
#include "matrix.h"
#include "softmax.h"
#include "tokens.h"

namespace logquant {
namespace {

constexpr int64_t kTileRows = 256;  // rows of a tile: enough to pay for bringing a unit to floats
constexpr int64_t kSplitUnits = 4;  // a smaller split would not pay for its merge
constexpr int64_t kTasksPerThread = 4;

struct Tile {
    int64_t request, head, first_row, rows;  // row = query * (query heads per KV head) + head within
    int64_t page_units, copy_units, new_units, splits;
    int64_t partial;  // first split's place among the partial results
    int64_t units() const { return page_units + copy_units + new_units; }
};

struct Task {
    int64_t tile, split;
};

// A thread's memory, kept between calls: fresh pages from the system would cost more than a decode step.
struct Buffers {
    AlignedFloats query, state, rows, turned;
    Unit unit;
    alignas(kAlignment) float scores[kRows * kMaxGroup];
    void grow(int64_t num_rows, const Layout& f) {
        const int64_t head_size = f.head_size;
        query.grow(num_rows * head_size);
        state.grow(State::size(num_rows, head_size));
        rows.grow(kRows * head_size);
        turned.grow(kRows * head_size);
        unit.grow(f);
    }
    static Buffers& mine() {
        static thread_local Buffers b;
        return b;
    }
};

template <typename T>
class Attention {
  public:
    Attention(const Tokens<T>& tokens, const Cache& cache, const Layout& f, const Scores& scores,
              const Results<T>& results)
        : tokens_(tokens), cache_(cache), f_(f), unit_(unit_tokens(f)),
          group_heads_(tokens.num_heads / cache.num_kv_heads), scale_(static_cast<float>(scores.scale * kLog2e)),
          softcap_(static_cast<float>(scores.softcap * kLog2e)), sinks_(scores.sinks), results_(results) {
        const int64_t size = f.head_size, elements = tokens.query_basis ? tokens.query_groups * size * size : 0;
        query_basis_.grow(elements);
        for (int64_t i = 0; i < elements; i += kLanes) store(query_basis_.data() + i, load(tokens.query_basis + i));
        if (tokens.value_basis == nullptr) return;
        value_basis_.grow(size * size);
        for (int64_t i = 0; i < size; ++i)  // transposed: what is summed of values is taken back
            for (int64_t j = 0; j < size; ++j)
                value_basis_.data()[j * size + i] = static_cast<float>(tokens.value_basis[i * size + j]);
    }

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
    void plan() {
        int64_t total = 0;
        copies_.resize(cache_.requests.size());
        for (int64_t i = 0; i < static_cast<int64_t>(cache_.requests.size()); ++i) {
            const Request& r = cache_.requests[i];
            if (!r.live) continue;
            copies_[i] = slots_of_copies(r, f_);
            const int64_t rows = r.query_len * group_heads_;
            for (int64_t head = 0; head < cache_.num_kv_heads; ++head)
                for (int64_t first = 0; first < rows; first += kTileRows) {
                    Tile t{i, head, first, std::min(kTileRows, rows - first), 0, 0, 0, 1, 0};
                    t.page_units = ceil_div(pages_end(r, f_), unit_);
                    t.copy_units = ceil_div(copies_[i].size(), unit_);
                    t.new_units = ceil_div((t.first_row + t.rows - 1) / group_heads_ + 1, unit_);
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
            partial_size += t.splits * State::size(t.rows, f_.head_size);
            ++partials;
        }
        if (partials == 0) return;
        partial_.grow(partial_size);
        pending_.reset(new std::atomic<int64_t>[tiles_.size()]);
        for (size_t i = 0; i < tiles_.size(); ++i) pending_[i].store(tiles_[i].splits, std::memory_order_relaxed);
    }

    void run_task(const Task& task) {
        const Tile& t = tiles_[task.tile];
        Buffers& b = Buffers::mine();
        b.grow(t.rows, f_);
        State state = t.splits == 1 ? State(b.state.data(), t.rows, f_.head_size) : split_state(t, task.split);
        state.clear(t.rows, f_.head_size);
        read_query(t, b);
        const int64_t units = t.units(), last = units * (task.split + 1) / t.splits;
        for (int64_t unit = units * task.split / t.splits; unit < last; ++unit) run_unit(t, unit, b, state);
        if (t.splits == 1) return finish(t, state, b);
        if (pending_[task.tile].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(t, b);
    }

    // 32-bit divisions, as there is one for every row and unit
    int64_t query_of(const Tile& t, int64_t row) const {
        return static_cast<uint32_t>(t.first_row + row) / static_cast<uint32_t>(group_heads_);
    }
    int64_t head_of(const Tile& t, int64_t row) const {
        return t.head * group_heads_ + static_cast<uint32_t>(t.first_row + row) % static_cast<uint32_t>(group_heads_);
    }

    // Whether tokens are attended to as the model has them: this request reads nothing that is stored in another basis
    bool begins(const Tile& t) const {
        return tokens_.own_key.data != nullptr && cache_.requests[t.request].computed == 0;
    }

    void read_query(const Tile& t, Buffers& b) const {
        const int64_t size = f_.head_size;
        const bool turns = tokens_.query_basis != nullptr && !begins(t);
        const float* basis = query_basis_.data() + (tokens_.query_groups > 1 ? t.head * size * size : 0);
        for (int64_t m = 0; m < t.rows; m += kRows) {
            const int64_t rows = std::min(kRows, t.rows - m);
            float *to = b.query.data() + m * size, *out = turns ? b.rows.data() : to;
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t token = cache_.requests[t.request].first_row + query_of(t, m + i);
                const T* in = tokens_.query.at(token, head_of(t, m + i));
                for (int64_t c = 0; c < size; c += kLanes) store(out + i * size + c, load(in + c) * splat(scale_));
            }
            if (turns) multiply<false>(out, rows, size, basis, size, size, to, size, size);
        }
    }

    void run_unit(const Tile& t, int64_t unit, Buffers& b, State& state) const {
        const Request& r = cache_.requests[t.request];
        int64_t first_new = -1;
        if (unit < t.page_units) {
            read_pages(cache_, f_, t.request, t.head, unit * unit_, b.unit);
        } else if ((unit -= t.page_units) < t.copy_units) {
            const int32_t* slots = copies_[t.request].data() + unit * unit_;
            const int64_t count = std::min<int64_t>(unit_, copies_[t.request].size() - unit * unit_);
            read_tokens<T>(count, f_, b.unit, [&](int64_t i) -> Token<T> {
                const T* copy = cache_.slot<T>(t.request, slots[i], t.head, f_);
                return {copy, copy + f_.head_size};
            });
        } else {
            first_new = (unit - t.copy_units) * unit_;
            const Rows<T>& key = begins(t) ? tokens_.own_key : tokens_.key;
            const Rows<T>& value = begins(t) ? tokens_.own_value : tokens_.value;
            const int64_t count = std::min(unit_, query_of(t, t.rows - 1) + 1 - first_new);
            read_tokens<T>(count, f_, b.unit, [&](int64_t i) -> Token<T> {
                return {key.at(r.first_row + first_new + i, t.head), value.at(r.first_row + first_new + i, t.head)};
            });
        }
        for (int64_t m = 0; m < t.rows; m += kRows) add_unit(t, m, first_new, b, state);
    }

    // A unit for a few rows; first_new is the query of its first token if it is of this step, else -1.
    void add_unit(const Tile& t, int64_t m, int64_t first_new, Buffers& b, State& state) const {
        const int64_t size = f_.head_size, rows = std::min(kRows, t.rows - m);
        // tokens of this step that a row may see: itself and those before it
        int64_t seen[kRows] = {};
        for (int64_t i = 0; i < rows; ++i)
            seen[i] = first_new < 0 ? b.unit.count : std::min(b.unit.count, query_of(t, m + i) + 1 - first_new);
        const int64_t most = seen[rows - 1], width = ceil_div(most, kLanes) * kLanes;
        if (most <= 0) return;
        multiply<false>(b.query.data() + m * size, rows, size, b.unit.keys.data(), unit_, size, b.scores, unit_, width);
        vf tops[kRows];  // all before the first is used: each is a chain of its own
        for (int64_t i = 0; i < rows; ++i) {
            float* scores = b.scores + i * unit_;
            if (softcap_ != 0.0f) cap(scores, width, softcap_);
            if (b.unit.wanted != nullptr || seen[i] < width) mask(scores, width, seen[i], b.unit.wanted);
            tops[i] = largest_of(scores, width);
        }
        for (int64_t i = 0; i < rows; ++i) weigh(b.scores + i * unit_, width, tops[i], state, m + i, size);
        multiply<true>(b.scores, rows, unit_, b.unit.values.data(), size, most, state.output + m * size, size, size);
    }

    State split_state(const Tile& t, int64_t split) const {
        return {partial_.data() + t.partial + split * State::size(t.rows, f_.head_size), t.rows, f_.head_size};
    }

    void merge(const Tile& t, Buffers& b) const {
        State all = split_state(t, 0);
        for (int64_t split = 1; split < t.splits; ++split)
            for (int64_t m = 0; m < t.rows; ++m) all.merge(m, split_state(t, split), f_.head_size);
        finish(t, all, b);
    }

    void finish(const Tile& t, const State& state, Buffers& b) const {
        const int64_t size = f_.head_size;
        const bool turns = tokens_.value_basis != nullptr && !begins(t);
        for (int64_t m = 0; m < t.rows; m += kRows) {
            const int64_t rows = std::min(kRows, t.rows - m);
            for (int64_t i = 0; i < rows; ++i) {
                float total = state.total(m + i);
                if (sinks_ != nullptr)
                    total += std::exp2(sinks_[head_of(t, m + i)] * static_cast<float>(kLog2e) - state.maximum[m + i]);
                const float* in = state.output + (m + i) * size;
                float* out = b.rows.data() + i * size;
                for (int64_t c = 0; c < size; c += kLanes) store(out + c, load(in + c) * splat(1.0f / total));
            }
            if (turns)
                multiply<false>(b.rows.data(), rows, size, value_basis_.data(), size, size, b.turned.data(), size,
                                size);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t head = head_of(t, m + i);
                const int64_t token = cache_.requests[t.request].first_row + query_of(t, m + i);
                const float* in = (turns ? b.turned : b.rows).data() + i * size;
                T* out = results_.output + token * results_.token_stride + head * results_.head_stride;
                for (int64_t c = 0; c < size; ++c) out[c] = static_cast<T>(in[c]);
                results_.lse[token * tokens_.num_heads + head] =
                    (state.maximum[m + i] + std::log2(state.total(m + i))) * kLn2;
            }
        }
    }

    const Tokens<T>& tokens_;
    const Cache& cache_;
    const Layout& f_;
    int64_t unit_, group_heads_;
    float scale_, softcap_;  // both in units of log2
    const float* sinks_;
    const Results<T>& results_;
    AlignedFloats query_basis_, value_basis_;   // the latter's transpose
    std::vector<std::vector<int32_t>> copies_;  // slots of each request
    std::vector<Tile> tiles_;
    std::vector<Task> tasks_;
    AlignedFloats partial_;
    std::unique_ptr<std::atomic<int64_t>[]> pending_;
};

}  // namespace

template <typename T>
void attention(const Tokens<T>& tokens, const Cache& cache, const Layout& f, const Scores& scores,
               const Results<T>& results) {
    Attention<T>(tokens, cache, f, scores, results).run();
}

#define LOGQUANT_INSTANTIATE(T) \
    template void attention<T>(const Tokens<T>&, const Cache&, const Layout&, const Scores&, const Results<T>&);
LOGQUANT_INSTANTIATE(float)
LOGQUANT_INSTANTIATE(c10::Half)
LOGQUANT_INSTANTIATE(c10::BFloat16)

}  // namespace logquant
