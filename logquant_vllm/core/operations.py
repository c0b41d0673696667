"""The three operations of one layer in one step, and :func:`step`, which is all of them: the reference of every kernel.

The order within a step is fixed (a request may hit a prefix that another request completes in the same step):

1. :func:`quantize_pages` for the whole batch: every group whose last token arrives now becomes 2-bit, and what others
   may read of a window is written;
2. :func:`attention`: cached tokens from pages and window, this step's own tokens as they come;
3. :func:`update_window`: compact the log-selected set, copy the new tokens to the recent window.

Kernels have the same names and signatures. All tensors are on one device; queries, keys and values are already rotated,
and outputs are still (``core.calibration.Basis``): only :func:`step` has them as the model does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.calibration import Basis, change_basis, rotate_back, rotate_heads
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.log_selection import THINNING_BITS, is_log_selected, log_slot_position, num_compactions_tensor
from logquant_vllm.core.paged import (
    Batch,
    CacheLayout,
    PagedCache,
    compactions_after,
    dequantize_pages,
    gather_tokens,
    has_copy,
    page_views,
    ranges,
    read_header,
    slot_address,
    slot_of_position,
    slot_positions,
    turns_of_step,
    window_slots_view,
    write_header,
)
from logquant_vllm.core.quantizer import pack, quantize_key_group, quantize_value_group
from logquant_vllm.core.states import add_sinks

if TYPE_CHECKING:
    from logquant_vllm.core.parts import Parts


def shared_prefix_end(window_start: Tensor, layout: CacheLayout) -> Tensor:
    """End of the prefix hit that a request began with (0 if none): its pages below were written by others."""
    return torch.where(window_start > 0, window_start + layout.prefix_replay_tokens, 0)


def quantize_pages(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """Quantize every group of tokens that this step completes into its page, and copy a new token 0 with its group.

    Others may read either in this very step.

    Args:
        key, value: this step's ``[num_tokens, num_kv_heads, head_size]``; keys rotated.
        cache: ``cache.pages`` is written, and slot 0 of ``cache.window``.
        feedback: of :class:`logquant_vllm.core.calibration.Basis`; sums are rounded differently in each implementation,
            so with it two of them may choose different codes for a few channels, of equal merit.
    """
    fmt, size = layout.fmt, layout.fmt.key_group_size
    num_kv_heads = key.shape[1]
    computed = batch.num_computed
    shared = shared_prefix_end(read_header(cache, computed, layout).window_start, layout)
    first = torch.maximum(computed // size, -(-shared // size))
    live = cache.own_blocks[:, 0] > 0
    request, group = ranges(first, torch.where(live, batch.seq_lens // size, 0))
    if len(request) == 0:
        return
    _copy_first_tokens(request[(group == 0) & (computed[request] == 0)], key, value, cache, batch)
    position = group[:, None] * size + torch.arange(size, device=key.device)
    tokens = gather_tokens(position, request[:, None].expand_as(position), key, value, cache, batch, layout)
    keys = quantize_key_group(tokens[..., 0, :].transpose(1, 2), fmt, feedback)
    values = quantize_value_group(tokens[..., 1, :].transpose(1, 2), fmt)

    block = cache.block_table[request, group // fmt.groups_per_page].long()
    in_page = group % fmt.groups_per_page
    slabs = cache.pages.unflatten(1, (num_kv_heads, fmt.head_bytes))
    views = page_views(slabs, fmt)
    heads = torch.arange(num_kv_heads, device=key.device)[None, :, None]
    rows = (in_page[:, None] * size + torch.arange(size, device=key.device))[:, None, :]
    channels = torch.arange(fmt.head_size, device=key.device)[None, None, :, None]
    value_groups = torch.arange(fmt.value_groups, device=key.device)[None, None, :, None]
    b = block[:, None, None]
    for view, words in zip(views.key_codes, pack(keys.codes, fmt.key_planes), strict=True):
        view[b, heads, rows] = words
    for view, words in zip(views.value_codes, pack(values.codes.mT, fmt.value_planes), strict=True):
        index = in_page[:, None] * words.shape[-1] + torch.arange(words.shape[-1], device=key.device)
        view[b[..., None], heads[..., None], channels, index[:, None, None, :]] = words
    for view, data in ((views.key_scale, keys.scale), (views.key_zero, keys.zero)):
        _bits(view)[b[..., 0], heads[..., 0], in_page[:, None]] = _bits(data)
    for view, data in ((views.value_scale, values.scale), (views.value_zero, values.zero)):
        _bits(view)[b[..., None], heads[..., None], value_groups, rows[:, :, None]] = _bits(data)


def _copy_first_tokens(request: Tensor, key: Tensor, value: Tensor, cache: PagedCache, batch: Batch) -> None:
    """Copy token 0 of requests where it is new and its group complete: a prefix hit may read it in this very step."""
    row = batch.query_start_loc[request].long()
    slots = window_slots_view(cache.window, key.shape[1], key.shape[2], key.dtype)
    block, offset = slot_address(torch.zeros_like(request), request, cache, slots.shape[1])
    slots[block, offset] = torch.stack([key[row], value[row]], -2)


def _bits(x: Tensor) -> Tensor:
    """The same bytes as integers: indexed assignment does not take float8."""
    return x.view(torch.int8 if x.dtype.itemsize == 1 else torch.int16)


class CachedTokens(NamedTuple):
    """What a layer's cache holds of every request; a token is valid either in its page or as a copy, never in both."""

    page_keys: Tensor  # float32 [num_reqs, tokens, num_kv_heads, head_size], in position order
    page_values: Tensor
    page_valid: Tensor  # bool [num_reqs, tokens]
    copies: Tensor  # model's dtype [num_reqs, num_slots, num_kv_heads, 2, head_size]
    copy_position: Tensor  # int32 [num_reqs, num_slots]
    copy_valid: Tensor  # bool [num_reqs, num_slots]


def read_cached_tokens(
    cache: PagedCache, num_computed: Tensor, layout: CacheLayout, num_kv_heads: int, dtype: torch.dtype
) -> CachedTokens:
    """The cache after ``num_computed`` tokens (int32 ``[num_reqs]``): pages dequantized, and full-precision slots.

    What is not valid may be stale bytes, even NaN.
    """
    fmt, window_length, device = layout.fmt, layout.window_length, num_computed.device
    header = read_header(cache, num_computed, layout)
    window_start = header.window_start[:, None]
    live = (cache.own_blocks[:, 0] > 0)[:, None]

    num_pages = -(-max(int(num_computed.max()), 1) // fmt.page_size)
    page_keys, page_values = dequantize_pages(cache.pages[cache.block_table[:, :num_pages].long()], num_kv_heads, fmt)
    position = torch.arange(num_pages * fmt.page_size, device=device, dtype=torch.int32)[None]
    compactions = num_compactions_tensor(num_computed, window_length)[:, None]
    end = torch.minimum(torch.maximum((compactions + 1) * window_length, window_start), num_computed[:, None])
    copied = is_log_selected(position, compactions, window_length) & has_copy(position, header)

    slot_position, slot_valid = slot_positions(num_computed, header, layout)
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, dtype)
    request = torch.arange(len(num_computed), device=device)[:, None].expand_as(slot_position)
    slot = torch.arange(layout.num_slots, device=device)[None].expand_as(slot_position)
    block, offset = slot_address(slot, request, cache, slots.shape[1])
    return CachedTokens(
        page_keys.flatten(1, 2),
        page_values.flatten(1, 2),
        (position < end) & ~copied & live,
        slots[block, offset],
        slot_position,
        slot_valid & live,
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    scale: float,
    output: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    ahead: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of this step's tokens over the cache and over each other.

    A cached token is read from its full-precision slot where it has one and from its page otherwise.

    Args:
        query: ``[num_tokens, num_heads, head_size]``, rotated like the keys.
        key, value: this step's ``[num_tokens, num_kv_heads, head_size]``.
        scale: factor on the scores.
        output: where to write the output, if it has a place already.
        softcap, sinks: of :class:`logquant_vllm.core.layer.Layer`.
        ahead: of ``core.parts.Parts.tokens_ahead``, where tokens see later ones.

    Returns:
        output: ``[num_tokens, num_heads, head_size]`` in the dtype of ``query``; zero for tokens of no request.
        lse: float32 ``[num_tokens, num_heads]``, natural logarithm of the sum of exponentials, that of a sink not
        among them (float64 for float64 queries).
    """
    num_kv_heads = key.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    computed = batch.num_computed
    lengths = batch.query_start_loc[1:] - batch.query_start_loc[:-1]
    live = (cache.own_blocks[:, 0] > 0)[:, None]

    cached = read_cached_tokens(cache, computed, layout, num_kv_heads, key.dtype)

    # this step's tokens, padded to the longest query
    local = torch.arange(max(int(lengths.max()), 1), device=query.device)[None]
    present = (local < lengths[:, None]) & live
    row = torch.where(present, batch.query_start_loc[:-1, None] + local, 0).long()

    copies = cached.copies.to(compute)
    keys = torch.cat([cached.page_keys.to(compute), copies[..., 0, :], key[row].to(compute)], 1)
    values = torch.cat([cached.page_values.to(compute), copies[..., 1, :], value[row].to(compute)], 1)
    cached_valid = torch.cat([cached.page_valid, cached.copy_valid], 1)
    # masked tokens may be stale bytes, even NaN, which a zero weight would not silence
    exists = torch.cat([cached_valid, present], 1)[..., None, None]
    keys, values = keys.where(exists, 0), values.where(exists, 0)
    sees = local if ahead is None else local + ahead[row]
    causal = (sees[..., None] >= local[:, None]) & present[:, None]
    valid = torch.cat([cached_valid[:, None].expand(-1, causal.shape[1], -1), causal], 2)

    grouped = query[row].to(compute).unflatten(2, (num_kv_heads, -1))
    scores = torch.einsum("rqhgd,rthd->rhgqt", grouped, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1)
    out = torch.einsum("rhgqt,rthd->rqhgd", weights, values).flatten(2, 3)

    output = torch.zeros_like(query) if output is None else output.zero_()
    output_lse = torch.full(query.shape[:2], -torch.inf, dtype=compute, device=query.device)
    output[row[present]] = out[present].to(query.dtype)
    output_lse[row[present]] = lse.permute(0, 3, 1, 2).flatten(2)[present]
    return add_sinks(output, output_lse, sinks), output_lse


def update_window(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """Bring the full-precision slots from ``num_computed`` to ``seq_lens`` tokens, and the header with them.

    Up to ``layout.rollback_tokens`` of the newest tokens may then be taken back: the next step has fewer
    ``num_computed`` than this one's ``seq_lens``, and writes their slots and their groups again.

    Args:
        key, value: this step's ``[num_tokens, num_kv_heads, head_size]``; keys rotated.
        cache: ``cache.window`` is written.
    """
    window_length, computed = layout.window_length, batch.num_computed
    device, num_reqs = key.device, len(computed)
    live = (cache.own_blocks[:, 0] > 0) & (batch.seq_lens > computed)
    header = read_header(cache, computed, layout)
    after = compactions_after(batch.seq_lens, header.compactions, layout)
    slots = window_slots_view(cache.window, key.shape[1], key.shape[2], key.dtype)

    # log-selected slots: a slot that survives all the compactions of this step moves down, others come from the ring
    slot = torch.arange(window_length, device=device, dtype=torch.int32)[None].expand(num_reqs, -1)
    request = torch.arange(num_reqs, device=device)[:, None].expand_as(slot)
    position = log_slot_position(slot, after[:, None], window_length)
    source = slot << ((after - header.compactions)[:, None] * THINNING_BITS).clamp(max=20)
    moves = ((after > header.compactions) & live)[:, None]
    survives = (source < window_length) & (position < computed[:, None])
    block, offset = slot_address(torch.where(survives, source, 0), request, cache, slots.shape[1])
    kept = torch.where(
        survives[..., None, None, None],
        slots[block, offset],
        gather_tokens(position, request, key, value, cache, batch, layout),
    )
    known = moves & (position >= header.window_start[:, None])
    block, offset = slot_address(slot, request, cache, slots.shape[1])
    slots[block[known], offset[known]] = kept[known]

    # new tokens: the recent window, and the first W tokens before any compaction
    row_position = torch.maximum(computed, torch.where(after > 0, (after + 1) * window_length, 0))
    owner, position = ranges(row_position, torch.where(live, batch.seq_lens, 0))
    row = (batch.query_start_loc[owner] + position - computed[owner]).long()
    block, offset = slot_address(slot_of_position(position, layout), owner, cache, slots.shape[1])
    slots[block, offset] = torch.stack([key[row], value[row]], -2)

    write_header(cache, header._replace(compactions=after), live, slots)


def store_tokens(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """:func:`quantize_pages` and :func:`update_window` of a decode step, after its attention.

    That order is free if no request of the step reads a page that another one completes. Only a prefix hit could; where
    at least its last page is recomputed, it reads older pages only (``CacheLayout.may_store_last``).
    """
    quantize_pages(key, value, cache, batch, layout, feedback)
    update_window(key, value, cache, batch, layout)


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    scale: float,
    output: Tensor | None = None,
    basis: Basis | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` of a decode step, then :func:`store_tokens`; the former's results.

    Args:
        basis: that queries, keys and values are in; its feedback is used, and the output is taken back from it.
    """
    result, lse = attention(query, key, value, cache, batch, layout, scale, None, softcap, sinks)
    store_tokens(key, value, cache, batch, layout, None if basis is None else basis.feedback)
    result = rotate_back(result, basis)
    return result if output is None else output.copy_(result), lse


def begin_step(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: Parts | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`step` of a layer whose tokens others read, too: its window is updated when the last of them has done so.

    All tokens see the window as it is before the step, so there are no drafts among them.

    Returns:
        Keys and values as they are stored, for :func:`attend_stored` and :func:`update_window`.
    """
    feedback = None
    if layer.basis is not None:
        query, key, value = rotate_heads(query, key, value, layer.basis)
        feedback = layer.basis.feedback
    quantize_pages(key, value, cache, batch, layer.layout, feedback)
    output.copy_(_attend(layer, query, key, value, cache, batch, parts and parts.tokens_ahead(query)))
    return key, value


def _attend(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, ahead: Tensor | None
) -> Tensor:
    """The output, not rotated, of attention of rotated tokens."""
    arguments = query, key, value, cache, batch, layer.layout, layer.scale
    result, _ = attention(*arguments, softcap=layer.softcap, sinks=layer.sinks, ahead=ahead)
    return rotate_back(result, layer.basis)


def attend_stored(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: Parts | None = None,
) -> None:
    """Attention of a layer that reads the tokens of another one, whose :func:`begin_step` was in this step.

    Args:
        layer: its basis is the other layer's.
        key, value: of that step, as they are stored.
        cache: the other layer's.
    """
    if layer.basis is not None:
        query = change_basis(query, layer.basis.query)
    output.copy_(_attend(layer, query, key, value, cache, batch, parts and parts.tokens_ahead(query)))


def step(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: Parts | None = None,
) -> None:
    """A whole step of an attention layer: into its basis, then the three operations in their order.

    Args:
        query, key, value: this step's ``[num_tokens, heads, head_size]`` each, as the model has them.
        output: written, like ``query``.
        parts: ``core.parts.Parts`` of the step, for implementations that treat its requests differently; and for all if
            pictures of its see themselves whole.

    A decode step of several tokens that reaches the next compaction takes two turns (``CacheLayout.decode_query_len``),
    so that drafts are verified by what their tokens would have seen alone.
    """
    feedback = None
    if layer.basis is not None:
        query, key, value = rotate_heads(query, key, value, layer.basis)
        feedback = layer.basis.feedback
    layout = layer.layout
    quantize_pages(key, value, cache, batch, layout, feedback)
    output.zero_()
    ahead = parts and parts.tokens_ahead(query)
    for rows, part in turns_of_step(batch, layout):
        q, k, v = query[rows], key[rows], value[rows]
        output[rows] = _attend(layer, q, k, v, cache, part, None if ahead is None else ahead[rows])
        update_window(k, v, cache, part, layout)
