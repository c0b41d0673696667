"""How layers of several kinds come to blocks of the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from logquant_vllm.config import PAGE_SIZE

DEFAULT_BLOCK_SIZE = {"cuda": 16, "cpu": 128}
"""vLLM's block size for its own KV cache formats."""
MOST_TOKENS = 1024
"""Of a block, if it is the state of a recurrent layer that makes it so large."""


class BlockShape(NamedTuple):
    """A block of ours: pages of tokens one after another, in each place those of several layers side by side."""

    pages: int = 1
    layers: int = 1
    sizes: tuple[int, ...] = ()
    """Bytes of each of those layers' pages, where layers differ; a block then has one page."""

    def bytes_of_place(self, page_bytes: int) -> int:
        """Bytes of the pages side by side, which have ``page_bytes`` each where layers do not differ."""
        return sum(self.sizes) or self.layers * page_bytes

    def bytes_of_layer(self, layer: int, width: int) -> slice:
        """Where a layer's bytes lie among ``width`` of all that are side by side."""
        if self.sizes:
            first = sum(self.sizes[:layer])
            return slice(first, first + self.sizes[layer])
        return slice(layer * (width // self.layers), (layer + 1) * (width // self.layers))


def kernel_block(block_size: int) -> int:
    """The least tokens that vLLM's own attention takes as a block, on the platform with that default block size."""
    return 32 if block_size == DEFAULT_BLOCK_SIZE["cpu"] else 16


def layers_beside_a_state(num_layers: int, page_bytes: int, state_bytes: int) -> int:
    """How many of our layers have their pages in the same blocks, so that one holds a recurrent state in few tokens."""
    divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    most = MOST_TOKENS // PAGE_SIZE
    return next((n for n in divisors if most * n * page_bytes >= state_bytes), num_layers)


def layers_beside_full(num_layers: int, page_bytes: int, full: Sequence[tuple[int, int]]) -> int:
    """How many of our layers have their pages in the same blocks beside a few that keep all tokens in vLLM's own cache.

    vLLM manages blocks for groups of as many layers as the rarest kind has, which takes time for each group; and blocks
    that are larger than a page's tokens of the others waste memory. Here a group counts as much as a page. The others
    remain one group.

    Args:
        full: of each of the others, as in :func:`pages_per_block`.
    """

    def cost(beside: int) -> int:
        owners = -(-num_layers // beside)
        blocks = sum(PAGE_SIZE // tokens_per_block(1, beside * page_bytes, *other) for other in full)
        return beside * (owners + blocks) + owners

    possible = [n for n in range(1, num_layers + 1) if n == 1 or -(-num_layers // n) >= len(full)]
    holding = [n for n in possible if all(n * page_bytes >= token * least for token, least in full)]
    return min(holding, key=cost) if holding else possible[-1]


def pages_per_block(page_bytes: int, others: Iterable[tuple[int, int]]) -> int:
    """Pages of a block that layers with our cache share with layers of other kinds.

    Args:
        page_bytes: bytes of a page.
        others: of each of those layers the bytes of a token, and the least tokens that its kernel takes as a block; a
            recurrent state is one token.
    """
    kinds = set(others)
    step = math.lcm(*(kernel_block // math.gcd(kernel_block, PAGE_SIZE) for _, kernel_block in kinds))
    least = max(1, *(-(-token_bytes * kernel_block // page_bytes) for token_bytes, kernel_block in kinds), 1)
    return -(-least // step) * step


def block_shape(
    num_layers: int,
    page_bytes: int,
    others: Sequence[tuple[int, int]] = (),
    state_bytes: int = 0,
    full: Sequence[tuple[int, int]] = (),
) -> BlockShape:
    """The blocks of layers with our cache.

    Args:
        num_layers: so many.
        page_bytes: bytes of a page of one of them.
        others: as in :func:`pages_per_block`, without states.
        state_bytes: of the largest recurrent state.
        full: those of the others, one by one, that keep all tokens.
    """
    if full and not state_bytes:
        beside = layers_beside_full(num_layers, page_bytes, full)
    else:
        beside = layers_beside_a_state(num_layers, page_bytes, state_bytes)
    return BlockShape(pages_per_block(beside * page_bytes, [*others, (state_bytes, 1)]), beside)


def tokens_per_block(pages: int, page_bytes: int, token_bytes: int, kernel_block: int) -> int:
    """Tokens of another kind of layer in a block of ``pages`` pages; the block's own tokens are a multiple of them."""
    tokens = range(kernel_block, pages * page_bytes // token_bytes + 1, kernel_block)
    return max(n for n in tokens if pages * PAGE_SIZE % n == 0)
