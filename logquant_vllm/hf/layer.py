"""One layer of the cache: what transformers calls, put in terms of the core's operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import (
    Basis,
    Moments,
    calibrated_basis,
    change_basis,
    rotate_back,
    rotate_values,
    rotation_basis,
)
from logquant_vllm.core.log_selection import num_compactions
from logquant_vllm.core.operations import quantize_pages, read_cached_tokens, update_window
from logquant_vllm.core.paged import Batch, read_header, window_slots_view, write_header
from logquant_vllm.hf.blocks import BlockColumns


class LogQuantLayer(CacheLayerMixin):
    """Keys and values of one layer: 2-bit pages, and full-precision copies of recent and log-selected tokens.

    A transformers cache hands all keys and values back to the model. So :meth:`update` returns, in position order, the
    copy of every cached token that has one, the 2-bit image of every other, and the new tokens as they came: attention
    over them is LogQuant's mixture (arXiv 2503.19950, section 3.2), for any attention function and any mask.
    """

    is_sliding = False
    # what transformers asks here is whether a crop never leaves a trace: see :meth:`crop`
    is_croppable = False

    def __init__(self, config: LogQuantConfig, moments: Moments | None = None) -> None:
        super().__init__()
        self.config, self.moments = config, moments
        self.seq_len = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, dtype and device from the first ``[batch, num_kv_heads, tokens, head_size]``."""
        if key_states.shape != value_states.shape:
            raise ValueError(
                "LogQuantCache needs keys and values of one shape, got keys of "
                f"{tuple(key_states.shape)} and values of {tuple(value_states.shape)}; models whose key and value "
                "heads differ in size (multi-head latent attention) work with DynamicCache"
            )
        batch_size, num_kv_heads, _, head_size = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.layout = self.config.layout(head_size, prefix_caching=False)
        # rotated, and rotated back, in at least float32: a copy is then off by its storage's rounding alone
        self.compute = torch.promote_types(self.dtype, torch.float32)
        self.basis = self._make_basis(head_size)
        self.blocks = BlockColumns(self.layout, batch_size, num_kv_heads, self.dtype, self.device)
        self.seq_len = 0
        self.is_initialized = True

    def _make_basis(self, head_size: int) -> Basis:
        config = self.config
        rotation = rotation_basis(
            head_size, self.compute, self.device, keys=config.rotation, values=config.value_rotation
        )
        if self.moments is None or not config.rotation:
            return rotation
        basis = calibrated_basis(Moments(*(x.to(self.device) for x in self.moments)))
        return Basis(basis.query.to(self.compute), basis.key.to(self.compute), basis.feedback, rotation.value)

    @property
    def batch_size(self) -> int:
        """Sequences in the cache; an AttributeError before the first step, as transformers expects."""
        if not self.is_initialized:
            raise AttributeError("batch_size is not known before the first step")
        return self.blocks.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of pages and window blocks, all that is kept between steps."""
        return self.blocks.nbytes if self.is_initialized else 0

    def _batch(self, computed: int, seq_len: int) -> Batch:
        """Metadata of a step that brings every sequence from ``computed`` to ``seq_len`` tokens."""
        size, new = self.blocks.batch_size, seq_len - computed
        starts = torch.arange(size + 1, dtype=torch.int32, device=self.device) * new
        lens = torch.full((size,), seq_len, dtype=torch.int32, device=self.device)
        return Batch(starts, lens, new, seq_len)

    def _read(self) -> tuple[Tensor, Tensor]:
        """What attention sees of the cached tokens: keys and values, rotated, each ``[batch, tokens, num_kv_heads,
        head_size]`` in the computing dtype."""
        lens = torch.full((self.blocks.batch_size,), self.seq_len, dtype=torch.int32, device=self.device)
        cached = read_cached_tokens(self.blocks.paged(), lens, self.layout, self.blocks.num_kv_heads, self.dtype)
        request, slot = cached.copy_valid.nonzero(as_tuple=True)
        position = cached.copy_position[request, slot].long()
        keys, values = cached.page_keys.to(self.compute), cached.page_values.to(self.compute)
        keys[request, position] = cached.copies[request, slot, :, 0].to(self.compute)
        values[request, position] = cached.copies[request, slot, :, 1].to(self.compute)
        return keys[:, : self.seq_len], values[:, : self.seq_len]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One step: quantize the groups that it completes, read the cache as it was, keep the new tokens.

        Args:
            key_states, value_states: new tokens, ``[batch, num_kv_heads, tokens, head_size]``; keys after RoPE.

        Returns:
            Keys and values of all tokens, cached ones first, ``[batch, num_kv_heads, all tokens, head_size]``.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        expected = (self.blocks.batch_size, self.blocks.num_kv_heads, self.layout.fmt.head_size)
        given = (key_states.shape[0], key_states.shape[1], key_states.shape[3])
        if given != expected or key_states.dtype != self.dtype or value_states.shape != key_states.shape:
            raise ValueError(
                f"this LogQuantCache holds (batch, KV heads, head size) {expected} of {self.dtype}, got keys of "
                f"{given} and {key_states.dtype} and values of shape {tuple(value_states.shape)}; use a new "
                "LogQuantCache for another model or batch, or reset() this one"
            )
        new = key_states.shape[2]
        if new == 0:
            return self._returned(key_states, value_states)
        seq_len = self.seq_len + new
        self.blocks.reserve(seq_len)
        cache, batch = self.blocks.paged(), self._batch(self.seq_len, seq_len)
        # [batch, heads, tokens, channels] to [batch * tokens, heads, channels]: the sequences' tokens one after another
        key, value = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        key = change_basis(key.to(self.compute), self.basis.key).to(self.dtype)
        value = rotate_values(value.to(self.compute), self.basis).to(self.dtype)
        quantize_pages(key, value, cache, batch, self.layout, self.basis.feedback)
        result = self._returned(key_states, value_states)
        update_window(key, value, cache, batch, self.layout)
        self.seq_len = seq_len
        return result

    def _returned(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cached tokens, turned back to the model's own basis, followed by the new ones."""
        if self.seq_len == 0:
            return key_states, value_states
        keys, values = self._read()
        # a query's matrix, transposed, undoes the key's
        keys, values = change_basis(keys, self.basis.query.mT), rotate_back(values, self.basis)
        keys, values = (x.to(self.dtype).transpose(1, 2) for x in (keys, values))
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: ``-n`` removes ``n``; a positive number is the length to keep (transformers' old
        way).

        As long as no compaction of the window is undone, the result is exactly the cache of the shorter sequence: where
        one token is removed, and where ``(seq_len - 1) // W`` is at most ``keep // W`` or 2. Otherwise tokens whose
        copies are gone are read in 2 bits, and if their group is open again, it is later quantized from that image.
        Removing at most ``W`` tokens (``W - key_group_size`` if groups do not divide the window) opens no such group,
        and the next compaction drops just the copies that are missing: from there on all is exact again.
        """
        keep = min(tokens_to_remove, self.seq_len) if tokens_to_remove > 0 else self.seq_len + tokens_to_remove
        if keep == self.seq_len:
            return
        if keep <= 0:
            self.reset()
            return
        cache, batch = self.blocks.paged(), self._batch(0, keep)
        header = read_header(cache, batch.seq_lens, self.layout)
        if num_compactions(keep, self.layout.window_length) < int(header.compactions[0]):
            # the window of the shorter sequence, written anew from what attention would have seen
            keys, values = (x[:, :keep].flatten(0, 1).to(self.dtype) for x in self._read())
            slots = window_slots_view(cache.window, keys.shape[1], keys.shape[2], keys.dtype)
            none = header._replace(compactions=torch.zeros_like(header.compactions))
            write_header(cache, none, batch.seq_lens > 0, slots)
            update_window(keys, values, cache, batch, self.layout)
        self.seq_len = keep

    def reset(self) -> None:
        """Forget all tokens and free the memory; the next step may have another batch size."""
        if self.is_initialized:
            del self.blocks
        self.seq_len = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence ``i`` continue what was ``beam_idx[i]``; blocks are copied."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers, or a mask), in that order."""
        if self.is_initialized:
            self.blocks.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times, copies side by side."""
        if self.is_initialized:
            self.blocks.select(torch.arange(self.blocks.batch_size, device=self.device).repeat_interleave(repeats))

    def get_seq_length(self) -> int:
        """Tokens in the cache; padding counts."""
        return self.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that :meth:`update` will return for ``query_length`` new ones, and the position of the first."""
        return self.seq_len + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1
