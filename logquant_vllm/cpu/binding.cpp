// From tensors to the views in cache.h: one call per operation, and one for a whole step.
// not ATen/ATen.h, which brings every operation of torch: half of the time that compiling takes
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "cache.h"

namespace logquant {
namespace {

using at::Tensor;

struct Args {
    Cache cache;
    Layout layout;
    Quantizer quantizer;
};

Args read_args(const Tensor& key, const Tensor& value, const Tensor& pages, const Tensor& window,
               const Tensor& block_table, const Tensor& window_table, const Tensor& query_start_loc,
               const Tensor& seq_lens, const Tensor& constants, const Tensor& factors) {
    TORCH_CHECK(constants.numel() == kNumConstants && constants.scalar_type() == at::kLong, "logquant: bad constants");
    TORCH_CHECK(factors.numel() == kNumFactors && factors.scalar_type() == at::kDouble, "logquant: bad factors");
    for (const Tensor& t : {block_table, window_table, query_start_loc, seq_lens})
        TORCH_CHECK(t.scalar_type() == at::kInt && (t.numel() == 0 || t.stride(-1) == 1) && t.device().is_cpu(),
                    "logquant: block tables and lengths must be int32 tensors on the CPU with contiguous rows");
    for (const Tensor& t : {pages, window})
        TORCH_CHECK(t.scalar_type() == at::kByte && t.dim() == 2 && t.stride(1) == 1 && t.device().is_cpu(),
                    "logquant: cache memory must be uint8 [num_blocks, page_bytes] on the CPU");
    Args a;
    std::memcpy(&a.layout, constants.const_data_ptr(), sizeof(Layout));
    std::memcpy(&a.quantizer, factors.const_data_ptr(), sizeof(Quantizer));
    const int64_t num_reqs = seq_lens.size(0), heads = key.size(1), size = a.layout.head_size;
    TORCH_CHECK(size <= kMaxChannels && a.layout.group_size <= kMaxGroup && a.layout.value_group_size <= kMaxGroup,
                "logquant: heads of ", size, " channels and groups of ", a.layout.group_size, " and ",
                a.layout.value_group_size, ": at most ", kMaxChannels, " and ", kMaxGroup);
    TORCH_CHECK(key.size(2) == size && value.sizes() == key.sizes() && key.scalar_type() == value.scalar_type(),
                "logquant: keys and values must be [tokens, ", heads, ", ", size, "] of one dtype, got ", key.sizes(),
                " and ", value.sizes());
    TORCH_CHECK(query_start_loc.size(0) > num_reqs && block_table.size(0) >= num_reqs &&
                    window_table.size(0) >= num_reqs,
                "logquant: block tables and query_start_loc do not cover ", num_reqs, " requests");
    TORCH_CHECK(pages.size(1) == heads * a.layout.head_bytes, "logquant: pages of ", pages.size(1), " bytes, expected ",
                heads * a.layout.head_bytes);
    Cache& c = a.cache;
    c.pages = pages.mutable_data_ptr<uint8_t>();
    c.page_stride = pages.stride(0);
    c.window = window.mutable_data_ptr<uint8_t>();
    c.window_stride = window.stride(0);
    c.slots_per_block = window.size(1) / (heads * 2 * size * key.element_size());
    c.block_table = block_table.const_data_ptr<int32_t>();
    c.block_table_stride = block_table.stride(0);
    c.window_table = window_table.const_data_ptr<int32_t>() + a.layout.sink_columns;
    c.window_table_stride = window_table.stride(0);
    c.window_columns = window_table.size(1) - a.layout.sink_columns;
    c.num_kv_heads = heads;
    c.feedback = nullptr;
    const int32_t* start = query_start_loc.const_data_ptr<int32_t>();
    const int32_t* lens = seq_lens.const_data_ptr<int32_t>();
    c.requests.resize(num_reqs);
    for (int64_t i = 0; i < num_reqs; ++i) {
        Request& r = c.requests[i];
        r.first_row = start[i];
        r.query_len = start[i + 1] - start[i];
        r.seq_len = lens[i];
        r.computed = r.seq_len - r.query_len;
        r.live = c.window_table[i * c.window_table_stride] > 0 && r.query_len > 0;
        r.sink = c.window_table[i * c.window_table_stride - a.layout.sink_columns] > 0;
        const Header header = r.live ? c.header(i) : Header{};
        const bool fresh = header.window_begin == 0;  // the request's first step: nothing was copied yet
        r.compactions = num_compactions(r.computed, a.layout.window_length);
        r.window_start = fresh ? r.computed : header.window_begin - 1;
        r.stored_compactions = fresh ? r.compactions : header.compactions;
        TORCH_CHECK(r.first_row + r.query_len <= key.size(0), "logquant: request ", i, " has rows past the ",
                    key.size(0), " tokens of this step");
    }
    return a;
}

template <typename T>
Rows<T> rows_of(const Tensor& t) {
    TORCH_CHECK(t.dim() == 3 && t.stride(2) == 1, "logquant: channels must be contiguous");
    return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

template <typename F>
void dispatch(const Tensor& key, F&& f) {
    switch (key.scalar_type()) {
        case at::kFloat: return f(float{});
        case at::kHalf: return f(c10::Half{});
        case at::kBFloat16: return f(c10::BFloat16{});
        default: TORCH_CHECK(false, "logquant: dtype ", key.scalar_type(), " is not supported on the CPU");
    }
}

#define LOGQUANT_CACHE                                                                                                 \
    const Tensor &pages, const Tensor &window, const Tensor &block_table, const Tensor &window_table,                  \
        const Tensor &query_start_loc, const Tensor &seq_lens, const Tensor &constants, const Tensor &factors
#define LOGQUANT_ARGS \
    read_args(key, value, pages, window, block_table, window_table, query_start_loc, seq_lens, constants, factors)

using Matrix = std::optional<Tensor>;

const float* feedback_of(const Matrix& feedback, const Args& a) {
    if (!feedback) return nullptr;
    const int64_t heads = a.cache.num_kv_heads, size = a.layout.head_size;
    TORCH_CHECK(feedback->sizes() == at::IntArrayRef({heads, size, size}) && feedback->is_contiguous() &&
                    feedback->scalar_type() == at::kFloat,
                "logquant: feedback must be contiguous float32 [", heads, ", ", size, ", ", size, "], got ",
                feedback->sizes());
    return feedback->const_data_ptr<float>();
}

void quantize_pages_op(const Tensor& key, const Tensor& value, LOGQUANT_CACHE, const Matrix& feedback) {
    Args a = LOGQUANT_ARGS;
    a.cache.feedback = feedback_of(feedback, a);
    dispatch(key, [&](auto zero) {
        using T = decltype(zero);
        quantize_pages<T>(rows_of<T>(key), rows_of<T>(value), a.cache, a.layout, a.quantizer);
    });
}

void update_window_op(const Tensor& key, const Tensor& value, LOGQUANT_CACHE) {
    const Args a = LOGQUANT_ARGS;
    dispatch(key, [&](auto zero) {
        using T = decltype(zero);
        update_window<T>(rows_of<T>(key), rows_of<T>(value), a.cache, a.layout);
    });
}

// Of attention: what becomes of scores, and the bases that queries are taken to and outputs back from.
using Options = std::tuple<double, double, Matrix, Matrix, Matrix>;  // scale, softcap, sinks, query's and value's basis

Scores scores_of(const Options& options, int64_t num_heads) {
    const auto& [scale, softcap, sinks, query_basis, value_basis] = options;
    TORCH_CHECK(!sinks || (sinks->sizes() == at::IntArrayRef({num_heads}) && sinks->is_contiguous() &&
                           sinks->scalar_type() == at::kFloat),
                "logquant: sinks must be contiguous float32 [", num_heads, "]");
    return {scale, softcap, sinks ? sinks->const_data_ptr<float>() : nullptr};
}

const void* basis_of(const Matrix& basis, const Tensor& query, int64_t heads) {
    if (!basis) return nullptr;
    const int64_t size = query.size(2);
    TORCH_CHECK(basis->dim() == 3 && (basis->size(0) == 1 || basis->size(0) == heads) && basis->size(1) == size &&
                    basis->size(2) == size && basis->is_contiguous() && basis->scalar_type() == query.scalar_type(),
                "logquant: a basis must be contiguous [1 or ", heads, ", ", size, ", ", size, "] like queries, got ",
                basis->sizes());
    return basis->const_data_ptr();
}

using Own = std::optional<std::pair<Tensor, Tensor>>;  // keys and values as the model has them, if they are at hand

// Attention into output and lse; key and value are as they are stored.
template <typename T>
void attend(const Tensor& query, const Tensor& key, const Tensor& value, const Own& own, const Args& a,
            const Options& options, const Tensor& output, const Tensor& lse) {
    const auto& [scale, softcap, sinks, query_basis, value_basis] = options;
    Tokens<T> tokens{rows_of<T>(query), rows_of<T>(key), rows_of<T>(value), {}, {}};
    if (own) tokens.own_key = rows_of<T>(own->first), tokens.own_value = rows_of<T>(own->second);
    tokens.query_basis = static_cast<const T*>(basis_of(query_basis, query, key.size(1)));
    tokens.value_basis = static_cast<const T*>(basis_of(value_basis, query, 1));
    tokens.query_groups = query_basis ? query_basis->size(0) : 0;
    tokens.num_heads = query.size(1);
    attention<T>(tokens, a.cache, a.layout, scores_of(options, query.size(1)),
                 {output.mutable_data_ptr<T>(), output.stride(0), output.stride(1), lse.mutable_data_ptr<float>()});
}

// Rows of no request stay as they are here; the lse.
Tensor clear(const Tensor& query, const Tensor& key, const Own& own, const Tensor& output, const Args& a) {
    TORCH_CHECK(query.size(0) == key.size(0) && query.size(2) == a.layout.head_size &&
                    query.size(1) % key.size(1) == 0 && query.scalar_type() == key.scalar_type(),
                "logquant: queries ", query.sizes(), " do not fit keys ", key.sizes());
    TORCH_CHECK(!own || (own->first.sizes() == key.sizes() && own->first.scalar_type() == key.scalar_type() &&
                         own->second.sizes() == key.sizes() && own->second.scalar_type() == key.scalar_type()),
                "logquant: the model's own keys and values must be like those that are stored, ", key.sizes());
    TORCH_CHECK(output.sizes() == query.sizes() && output.stride(2) == 1 &&
                    output.scalar_type() == query.scalar_type(),
                "logquant: the output must be like the queries ", query.sizes(), ", got ", output.sizes());
    output.zero_();
    return at::full({query.size(0), query.size(1)}, -std::numeric_limits<float>::infinity(),
                    query.options().dtype(at::kFloat));
}

Tensor attend_op(const Tensor& query, const Tensor& key, const Tensor& value, const Own& own, LOGQUANT_CACHE,
                 const Options& options, const Tensor& output) {
    const Args a = LOGQUANT_ARGS;
    const Tensor lse = clear(query, key, own, output, a);
    dispatch(key, [&](auto zero) { attend<decltype(zero)>(query, key, value, own, a, options, output, lse); });
    return lse;
}

// Cuts requests in a decode step off where they reach the next compaction, and returns the tokens behind: they see the
// compacted window, as if the step's tokens had come one at a time. Requests that are done have no token there.
std::vector<Request> cut_at_compaction(std::vector<Request>& requests, const Layout& f) {
    std::vector<Request> behind;
    const int64_t w = f.window_length;
    for (size_t i = 0; i < requests.size(); ++i) {
        Request& r = requests[i];
        const int64_t cut = std::max((r.computed / w + 1) * w, 3 * w);  // the first position that sees it
        if (!r.live || r.query_len > f.decode_query_len || cut >= r.seq_len) continue;
        if (behind.empty()) {
            behind = requests;
            for (Request& other : behind) other.live = false;
        }
        Request& rest = behind[i];
        rest.first_row += cut - r.computed;
        rest.query_len = r.seq_len - cut;
        rest.computed = cut;
        rest.compactions = num_compactions(cut, w);
        rest.live = true;
        r.query_len = cut - r.computed;
        r.seq_len = cut;
        rest.stored_compactions = compactions_after(r, f);
    }
    return behind;
}

void step_op(const Tensor& query, const Tensor& key, const Tensor& value, const Own& own, LOGQUANT_CACHE,
             const Options& options, const Matrix& feedback, const Tensor& output) {
    Args a = LOGQUANT_ARGS;
    a.cache.feedback = feedback_of(feedback, a);
    const Tensor lse = clear(query, key, own, output, a);
    dispatch(key, [&](auto zero) {
        using T = decltype(zero);
        const Rows<T> keys = rows_of<T>(key), values = rows_of<T>(value);
        quantize_pages<T>(keys, values, a.cache, a.layout, a.quantizer);
        std::vector<Request> behind = cut_at_compaction(a.cache.requests, a.layout);
        for (;;) {
            attend<T>(query, key, value, own, a, options, output, lse);
            update_window<T>(keys, values, a.cache, a.layout);
            if (behind.empty()) break;
            a.cache.requests = std::exchange(behind, {});
        }
    });
}

}  // namespace
}  // namespace logquant

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using release = pybind11::call_guard<pybind11::gil_scoped_release>;
    m.def("quantize_pages", &logquant::quantize_pages_op, release());
    m.def("update_window", &logquant::update_window_op, release());
    m.def("attend", &logquant::attend_op, release());
    m.def("step", &logquant::step_op, release());
}
