"""Views of the paged cache, and where a position's full-precision copy lies.

Everything that reads or writes blocks takes the same three arguments: a :class:`PagedCache` (the memory and the block
tables), a :class:`Batch` (which tokens of which requests this step computes) and a :class:`CacheLayout` (constants).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core import log_selection
from logquant_vllm.core.log_selection import is_log_selected, log_slot_position, num_compactions_tensor
from logquant_vllm.core.page_format import HEADER_CHANNELS, HEADER_SLOTS, PageFormat, Plane, num_window_blocks
from logquant_vllm.core.quantizer import (
    Quantized,
    dequantize,
    dequantize_values,
    unpack,
)


@dataclass(frozen=True)
class CacheLayout:
    """Constants of a cache: its block format and its full-precision window.

    Args:
        fmt: the block format.
        window_length: ``W`` of the paper: ``W`` log-selected tokens and a recent window of up to ``2W``.
        prefix_replay_tokens: tokens before the end of a prefix hit that are computed again. Their pages belong to every
            request that shares the prefix and are not written again.
        rollback_tokens: the newest tokens that may be taken back, to be computed again with other tokens; see
            ``docs/design.md`` for how many vLLM takes.
        prefix_caching: whether there are prefix hits at all.
        decode_query_len: tokens of a request in a decode step, its drafts included. In ``operations.step`` each of at
            most so many tokens sees the window as if they had come one at a time; a longer chunk sees the window as it
            was before the step.
        window_pages: pages whose place a window block takes; more than one beside layers of other kinds.
        window_fmt: of those pages, if it is not ``fmt``: in blocks of layers of different bits, that with the fewest.

    Raises:
        ValueError: if a group of tokens could outgrow the recent window, from which it is quantized, or if more tokens
            could be taken back, or come in a decode step, than one compaction of the window takes in.
    """

    fmt: PageFormat
    window_length: int = 64
    prefix_replay_tokens: int = 0
    rollback_tokens: int = 1
    prefix_caching: bool = True
    decode_query_len: int = 1
    window_pages: int = 1
    window_fmt: PageFormat | None = None

    def __post_init__(self) -> None:
        if self.window_length < self.fmt.key_group_size:
            raise ValueError(
                f"window_length {self.window_length} is smaller than key_group_size {self.fmt.key_group_size}: a group "
                "is quantized from the recent window, so use a window_length of at least key_group_size"
            )
        for name in ("rollback_tokens", "decode_query_len"):
            if not 1 <= (count := getattr(self, name)) <= self.window_length:
                raise ValueError(f"{name} must lie between 1 and window_length {self.window_length}, got {count}")

    @property
    def first_filled_slot(self) -> int:
        """See :func:`log_selection.first_filled_slot`."""
        return log_selection.first_filled_slot(self.window_length)

    @property
    def selected_chunks(self) -> int:
        """See :func:`log_selection.selected_chunks`."""
        return log_selection.selected_chunks(self.window_length)

    @property
    def ring_slots(self) -> int:
        """Slots of the recent window: ``2 * window_length``, and the tokens for which compaction waits."""
        return 2 * self.window_length + self.rollback_tokens - 1

    @property
    def num_slots(self) -> int:
        """Full-precision token slots of a request, header not counted."""
        return self.window_length + self.ring_slots

    @property
    def window_head_bytes(self) -> int:
        """Bytes of a window block for one KV head."""
        return self.window_pages * (self.window_fmt or self.fmt).head_bytes

    def slots_per_block(self, num_kv_heads: int, dtype: torch.dtype) -> int:
        """Full-precision tokens in ``dtype`` that fit in a window block."""
        slot_bytes = num_kv_heads * 2 * self.fmt.head_size * dtype.itemsize
        return num_kv_heads * self.window_head_bytes // slot_bytes

    def num_window_blocks(self, seq_len: int, num_kv_heads: int, dtype: torch.dtype) -> int:
        """Window blocks that a request of ``seq_len`` tokens holds, for copies in ``dtype``."""
        return num_window_blocks(seq_len, self.num_slots, self.slots_per_block(num_kv_heads, dtype))

    @property
    def may_store_last(self) -> bool:
        """Whether a decode step may store after its attention (``operations.store_tokens``)."""
        return not self.prefix_caching or self.prefix_replay_tokens >= self.fmt.page_size


SINK_COLUMNS = 1
"""Columns of a window table before those of the request's own blocks."""


def cold_window_table(own_blocks: Tensor) -> Tensor:
    """The window table of requests that began without a prefix hit: they have the copy of token 0 themselves.

    Args:
        own_blocks: int32 ``[num_reqs, blocks]``.
    """
    return torch.cat([own_blocks[:, :SINK_COLUMNS], own_blocks], 1)


class PagedCache(NamedTuple):
    """One layer's cache memory and the step's block tables. Block 0 is vLLM's null block: never written, never read."""

    pages: Tensor  # uint8 [num_blocks, page_bytes], last dimension contiguous
    window: Tensor  # uint8 [num_blocks, num_kv_heads * window_head_bytes], likewise; may alias ``pages``
    block_table: Tensor  # int32 [num_reqs, max_pages]
    window_block_table: Tensor  # int32 [num_reqs, SINK_COLUMNS + blocks of num_slots tokens or more]

    @property
    def sink_blocks(self) -> Tensor:
        """Whose slot 0 has the copy of token 0, int32 ``[num_reqs]``: that of a request's own first block, or after a
        prefix hit another request's, which is not written; 0 if there is none."""
        return self.window_block_table[:, 0]

    @property
    def own_blocks(self) -> Tensor:
        """The requests' own window blocks, int32 ``[num_reqs, blocks]``; the first is 0 in a row of padding."""
        return self.window_block_table[:, SINK_COLUMNS:]


class Batch(NamedTuple):
    """The tokens of one step: request ``r`` has ``seq_lens[r]`` tokens, the last of them new in this step."""

    query_start_loc: Tensor  # int32 [num_reqs + 1]
    seq_lens: Tensor  # int32 [num_reqs]
    max_query_len: int  # at least the longest query
    max_seq_len: int  # at least the longest sequence

    @property
    def num_computed(self) -> Tensor:
        """Tokens computed before this step, int32 ``[num_reqs]``."""
        return self.seq_lens - (self.query_start_loc[1:] - self.query_start_loc[:-1])


def split_at_compaction(batch: Batch, layout: CacheLayout) -> Tensor:
    """How many new tokens of each request see the window as it is before the step, int64 ``[num_reqs]``.

    All but for a decode step that reaches the next compaction: the others see the compacted window.
    """
    w, computed = layout.window_length, batch.num_computed
    new = batch.seq_lens - computed
    compacted = ((computed // w + 1) * w).clamp(min=3 * w)  # the first position that sees it
    return torch.where(new <= layout.decode_query_len, torch.minimum(new, compacted - computed), new).long()


def window_slots_view(window: Tensor, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    """``[num_blocks, slots_per_block, num_kv_heads, 2, head_size]`` view of window blocks in the model's dtype."""
    slot_bytes = num_kv_heads * 2 * head_size * dtype.itemsize
    slots = window.shape[1] // slot_bytes
    return window[:, : slots * slot_bytes].view(dtype).unflatten(1, (slots, num_kv_heads, 2, head_size))


class Header(NamedTuple):
    """What a request's own first window block says, and whether there is a sink block; ``[num_reqs]`` each."""

    window_start: Tensor  # int32, first position with a full-precision copy of the request's own
    compactions: Tensor  # int32, of the log-selected slots: at most one behind ``num_compactions(num_computed)``
    sink: Tensor  # bool, whether token 0 has a copy, whoever's


def read_header(cache: PagedCache, num_computed: Tensor, layout: CacheLayout) -> Header:
    """The headers of a batch whose requests have ``num_computed`` tokens (int32 ``[num_reqs]``).

    A fresh block's header is 0: then it is the request's first step, and nothing before it was ever copied.
    """
    words = cache.window[cache.own_blocks[:, 0].long(), :8].contiguous().view(torch.int32)
    begun = words[:, 0] > 0
    fresh = num_compactions_tensor(num_computed, layout.window_length)
    return Header(
        torch.where(begun, words[:, 0] - 1, num_computed),
        torch.where(begun, words[:, 1], fresh),
        cache.sink_blocks > 0,
    )


def write_header(cache: PagedCache, header: Header, live: Tensor, slots: Tensor) -> None:
    """Write the headers of the requests where ``live`` (bool ``[num_reqs]``).

    Args:
        slots: :func:`window_slots_view` of the cache.
    """
    words = torch.stack([header.window_start + 1, header.compactions], 1)[live].int().contiguous().view(slots.dtype)
    keys = slots[:, 0, :, 0]
    blocks = cache.own_blocks[live, 0].long()
    for channel in range(0, keys.shape[-1], HEADER_CHANNELS):
        keys[blocks, :, channel : channel + words.shape[1]] = words[:, None]


def compactions_after(seq_lens: Tensor, before: Tensor, layout: CacheLayout) -> Tensor:
    """Compactions of the stored slots at the end of a step: what those tokens ask for that cannot be taken back.

    Args:
        seq_lens: int32 ``[num_reqs]``, tokens at the end of the step.
        before: int32 ``[num_reqs]``, compactions before it; they stay, also where tokens were taken back since.
    """
    return torch.maximum(before, num_compactions_tensor(seq_lens - layout.rollback_tokens, layout.window_length))


def has_copy(position: Tensor, header: Header) -> Tensor:
    """Whether a computed position, int32 ``[num_reqs, tokens]``, was copied when it was new: by the request itself, or
    if it is 0 by whoever's the sink block is."""
    return (position >= header.window_start[:, None]) | ((position == 0) & header.sink[:, None])


def slot_of_position(position: Tensor, layout: CacheLayout) -> Tensor:
    """Slot (header not counted) of a position in the recent window, or of any before the first compaction."""
    ring = layout.window_length + (position - layout.window_length) % layout.ring_slots
    return torch.where(position < layout.window_length, position, ring)


def slot_positions(num_computed: Tensor, header: Header, layout: CacheLayout) -> tuple[Tensor, Tensor]:
    """What every slot holds.

    Returns:
        positions: int32 ``[num_reqs, num_slots]``.
        valid: bool ``[num_reqs, num_slots]``, whether attention reads the slot: its token is log-selected or recent
            after ``num_computed`` tokens. Slots may be a compaction behind and hold others, or tokens taken back.
    """
    w, device, dtype = layout.window_length, num_computed.device, num_computed.dtype
    computed, stored = num_computed[:, None], header.compactions[:, None]
    log_position = log_slot_position(torch.arange(w, device=device, dtype=dtype)[None], stored, w)
    ring = torch.arange(layout.ring_slots, device=device, dtype=dtype)[None]
    ring_position = (stored + 1) * w + (ring - stored * w) % layout.ring_slots
    positions = torch.cat([log_position, ring_position], 1)
    compactions = num_compactions_tensor(computed, w)
    seen = (positions >= (compactions + 1) * w) | is_log_selected(positions, compactions, w)
    return positions, seen & has_copy(positions, header) & (positions < computed)


def slot_address(slot: Tensor, request: Tensor, cache: PagedCache, slots_per_block: int) -> tuple[Tensor, Tensor]:
    """Block id and offset in the block of a request's window slot (header not counted).

    Slot 0 is token 0's for ever, at the same offset in every first block, and the sink block's is meant.
    """
    index = slot.long() + HEADER_SLOTS
    table = cache.window_block_table
    own = (SINK_COLUMNS + index // slots_per_block).clamp(max=table.shape[1] - 1)
    return table[request.long(), torch.where(slot == 0, 0, own)].long(), index % slots_per_block


def gather_tokens(
    position: Tensor, request: Tensor, key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout
) -> Tensor:
    """Full-precision keys and values of positions that are new in this step or lie in the window.

    Args:
        position, request: integer tensors of one shape ``S``.
        key, value: this step's ``[num_tokens, num_kv_heads, head_size]``.

    Returns:
        ``S + [num_kv_heads, 2, head_size]`` in the dtype of ``key``.
    """
    computed = batch.num_computed[request]
    fresh = position >= computed
    row = torch.where(fresh, batch.query_start_loc[request] + position - computed, 0).long()
    row = row.clamp(max=len(key) - 1)  # a caller may ask for more than it keeps
    slots = window_slots_view(cache.window, key.shape[1], key.shape[2], key.dtype)
    block, offset = slot_address(slot_of_position(position, layout), request, cache, slots.shape[1])
    stacked = torch.stack([key[row], value[row]], -2)
    return torch.where(fresh[..., None, None, None], stacked, slots[block, offset])


class PageViews(NamedTuple):
    """Typed views of page blocks ``[..., head_bytes]`` (leading dimensions kept)."""

    key_codes: list[Tensor]  # of each plane, int16 [..., page_size, words]
    value_codes: list[Tensor]  # likewise [..., head_size, words]
    key_scale: Tensor  # [..., groups_per_page, head_size]
    key_zero: Tensor
    value_scale: Tensor  # [..., value_groups, page_size]
    value_zero: Tensor


def page_views(slabs: Tensor, fmt: PageFormat) -> PageViews:
    """Typed views of per-head slabs, uint8 ``[..., head_bytes]``."""
    scale, zero = (torch.float8_e4m3fn, torch.int8) if fmt.scale_bits == 8 else (torch.float16, torch.float16)

    def part(start: int, end: int, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
        return slabs[..., start:end].view(dtype).unflatten(-1, shape)

    def codes(planes: Sequence[Plane], rows: int) -> list[Tensor]:
        return [part(p.offset, p.offset + 2 * rows * p.words, torch.int16, (rows, p.words)) for p in planes]

    keys, values = (fmt.groups_per_page, fmt.head_size), (fmt.value_groups, fmt.page_size)
    return PageViews(
        codes(fmt.key_planes, fmt.page_size),
        codes(fmt.value_planes, fmt.head_size),
        part(fmt.key_scale_offset, fmt.key_zero_offset, scale, keys),
        part(fmt.key_zero_offset, fmt.value_scale_offset, zero, keys),
        part(fmt.value_scale_offset, fmt.value_zero_offset, scale, values),
        part(fmt.value_zero_offset, fmt.head_bytes, zero, values),
    )


def dequantize_pages(blocks: Tensor, num_kv_heads: int, fmt: PageFormat) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages.

    Args:
        blocks: uint8 ``[..., page_bytes]``.

    Returns:
        Two float32 tensors ``[..., page_size, num_kv_heads, head_size]``.
    """
    views = page_views(blocks.unflatten(-1, (num_kv_heads, fmt.head_bytes)), fmt)
    groups = (fmt.groups_per_page, fmt.key_group_size)
    codes = unpack(views.key_codes, fmt.key_planes).unflatten(-2, groups)
    keys = dequantize(Quantized(codes, views.key_scale, views.key_zero), -2).flatten(-3, -2)
    words = [x.unflatten(-1, (fmt.groups_per_page, -1)) for x in views.value_codes]
    codes = unpack(words, fmt.value_planes).flatten(-2).transpose(-1, -2)
    values = dequantize_values(Quantized(codes, views.value_scale, views.value_zero), fmt)
    return keys.transpose(-2, -3), values.transpose(-2, -3)


def ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs ``(r, i)`` with ``first[r] <= i < last[r]``, as two int64 tensors."""
    count = (last - first).clamp(min=0).long()
    request = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    start = torch.cumsum(count, 0) - count
    return request, first.long()[request] + torch.arange(len(request), device=count.device) - start[request]


def turns_of_step(batch: Batch, layout: CacheLayout) -> Iterator[tuple[Tensor, Batch]]:
    """The one or two turns in which a step's tokens are attended to and enter the window, and their rows."""
    computed, starts = batch.num_computed, batch.query_start_loc[:-1].long()
    first, every = split_at_compaction(batch, layout), (batch.seq_lens - computed).long()
    for begin, end in ((torch.zeros_like(first), first), (first, every)):
        lengths = end - begin
        if lengths.any():
            _, rows = ranges(starts + begin, starts + end)
            offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
            yield rows, Batch(offsets, (computed + end).int(), int(lengths.max()), batch.max_seq_len)
