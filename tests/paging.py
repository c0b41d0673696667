"""A small paged cache for tests: random block tables over poisoned memory, driven in any chunking."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from logquant_vllm.core import operations
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, cold_window_table

RELATIVE_ERROR = 5e-3
"""The tolerance: operands in half precision, sums in float32."""
OTHER_TOLERANCES = {
    1e-9: "everything in float64",
    1e-6: "float32 against float32, statistics of a batch of heads against each head's",
    1e-5: "float32 against float32, with sums in another order",
    1e-4: "attention in float32 against the oracle in float64",
    2e-3: "float32 keys taken to another basis and back",
    2e-2: "operands and results in bfloat16",
    3e-2: "bfloat16 through the layers of a model",
    0.1: "an expectation from samples",
}
"""What a test may ask for instead, and why."""


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = RELATIVE_ERROR, what: str = "") -> None:
    """Relative root mean square error at most ``tolerance``, one of this module's; NaN never passes."""
    assert tolerance == RELATIVE_ERROR or tolerance in OTHER_TOLERANCES, f"give {tolerance} a reason in tests/paging.py"
    a, e = actual.double().cpu(), expected.double().cpu()
    assert a.shape == e.shape, f"{what}: shape {tuple(a.shape)} instead of {tuple(e.shape)}"
    error = ((a - e).square().mean().sqrt() / e.square().mean().sqrt().clamp(min=1e-12)).item()
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


@dataclass
class PagedBatch:
    """Requests over one pool of blocks. Fresh window blocks are zeroed, as vLLM does; all else is poison."""

    layout: CacheLayout
    num_kv_heads: int
    num_reqs: int
    max_len: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    seed: int = 0
    seq_lens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        fmt = self.layout.fmt
        generator = torch.Generator().manual_seed(self.seed)
        pages = -(-self.max_len // fmt.page_size)
        window = self.layout.num_window_blocks(self.max_len, self.num_kv_heads, self.dtype)
        total = 1 + self.num_reqs * (pages + window)
        ids = (torch.randperm(total - 1, generator=generator) + 1).int().view(self.num_reqs, pages + window)
        memory = torch.full((total, fmt.page_bytes(self.num_kv_heads)), 0xFF, dtype=torch.uint8)
        memory[ids[:, pages:].long()] = 0
        memory = memory.to(self.device)
        ids = ids.to(self.device)
        # the window's table is wider than the window, as vLLM's is
        width = 3 + self.layout.num_window_blocks(self.layout.num_slots, self.num_kv_heads, self.dtype)
        padded = torch.nn.functional.pad(cold_window_table(ids[:, pages:]), (0, width - window)).contiguous()
        self.cache = PagedCache(memory, memory, ids[:, :pages].contiguous(), padded)
        self.seq_lens = self.seq_lens or [0] * self.num_reqs

    def hit(self, source: int, target: int, tokens: int, sink: bool = True) -> None:
        """Let ``target`` begin on the pages of the first ``tokens`` of ``source``, by the same ids in its tables.

        Args:
            sink: whether the source's first window block is still there.
        """
        pages, cache = tokens // self.layout.fmt.page_size, self.cache
        cache.block_table[target, :pages] = cache.block_table[source, :pages]
        cache.sink_blocks[target] = cache.sink_blocks[source] if sink else 0
        self.seq_lens[target] = tokens - self.layout.prefix_replay_tokens

    def beside(self, layers: int, layer: int) -> PagedBatch:
        """The same requests in blocks that several layers share (``plugin/window_layer.py``): ``window_pages`` pages
        one after another, in each place those of all layers side by side; of a window block each layer has a run."""
        pages, own = self.layout.window_pages, copy.copy(self)
        size = self.layout.fmt.page_bytes(self.num_kv_heads)
        blocks = 1 + self.cache.block_table.numel() + self.cache.own_blocks.numel()
        memory = torch.full((blocks, pages * layers * size), 0xFF, dtype=torch.uint8, device=self.device)
        ids = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(7)).int().to(self.device) + 1
        columns = -(-self.cache.block_table.shape[1] // pages)
        first = ids[: columns * self.num_reqs].view(self.num_reqs, columns)
        within = torch.arange(pages, dtype=torch.int32, device=self.device)
        table = (first[:, :, None] * pages + within).flatten(1)
        windows = self.cache.own_blocks
        window = ids[columns * self.num_reqs :][: windows.numel()].view(windows.shape).where(windows > 0, 0)
        memory[window.flatten().long()] = 0
        own.cache = PagedCache(
            memory.view(blocks * pages, layers, size)[:, layer],
            memory.view(blocks, layers, pages * size)[:, layer],
            table,
            cold_window_table(window.contiguous()),
        )
        own.seq_lens = list(self.seq_lens)
        return own

    def batch(self, new: list[int]) -> Batch:
        """Metadata of a step that adds ``new[r]`` tokens to request ``r``; advances the lengths."""
        self.seq_lens = [n + q for n, q in zip(self.seq_lens, new, strict=True)]
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32, device=self.device)
        lens = torch.tensor(self.seq_lens, dtype=torch.int32, device=self.device)
        return Batch(starts, lens, max(new), max(self.seq_lens))

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, new: list[int], scale: float, ops=operations
    ) -> tuple[Tensor, Tensor]:
        """The three operations of a step, from the reference or from another module with the same names."""
        batch = self.batch(new)
        ops.quantize_pages(key, value, self.cache, batch, self.layout)
        result = ops.attention(query, key, value, self.cache, batch, self.layout, scale)
        ops.update_window(key, value, self.cache, batch, self.layout)
        return result


def random_qkv(
    tokens: int, num_heads: int, num_kv_heads: int, head_size: int, dtype=torch.bfloat16, device="cpu", seed=0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian queries, keys with uneven channels (as real keys have), values; ``[tokens, heads, head_size]``."""
    g = torch.Generator().manual_seed(seed)
    uneven = 1 + 3 * torch.rand(head_size, generator=g)
    q = torch.randn(tokens, num_heads, head_size, generator=g)
    k = torch.randn(tokens, num_kv_heads, head_size, generator=g) * uneven + torch.randn(head_size, generator=g)
    v = torch.randn(tokens, num_kv_heads, head_size, generator=g)
    return tuple(x.to(dtype).to(device) for x in (q, k, v))
