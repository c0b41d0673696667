"""Query vectors that attend to the same cached tokens, and the blocks in which decode kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Vectors:
    """The query heads of one KV head, of each new token of a request; a constant of the kernels.

    Vector ``token * gqa + head`` is query head ``head`` of the request's new token ``token``. All of them see the same
    pages and copies, as these follow from the computed tokens; of the new tokens each sees those up to its own. Where
    they are more than a program takes at a time, they are cut into blocks, each of which reads the cache anew: of a
    request with fewer new tokens, into fewer.

    Args:
        gqa: query heads of a KV head.
        queries: new tokens of a request, at most.
        most: vectors that a program takes, at most.
        softcap: of ``core.layer.Layer``, in units of log2.
    """

    gqa: int
    queries: int
    most: int
    softcap: float = 0.0

    @property
    def count(self) -> int:
        """Vectors of a KV head."""
        return self.gqa * self.queries

    @cached_property
    def blocks(self) -> int:
        """Blocks of them, at most."""
        return -(-self.count // self.most)

    @cached_property
    def block(self) -> int:
        """Vectors of a block; the last one may have fewer."""
        return -(-self.count // self.blocks)


@triton.jit
def cap_scores(scores, CAP: tl.constexpr):
    """``CAP * tanh(scores / CAP)``, if there is a cap; both in units of log2."""
    if CAP > 0:
        power = tl.exp2(scores * (2 * LOG2E / CAP))  # infinite where the result is the cap
        scores = CAP - 2 * CAP / (1 + power)
    return scores


@triton.jit
def count_blocks(query_len, VECTORS: tl.constexpr):
    """Blocks of a KV head's vectors, for so many new tokens; 1 for none."""
    if VECTORS.blocks == 1:
        return 1
    else:
        return (tl.maximum(query_len, 1) * VECTORS.gqa + (VECTORS.block - 1)) // VECTORS.block


@triton.jit
def split_head(tile_head, query_len, VECTORS: tl.constexpr):
    """The KV head of a tile, and its block's first vector; tiles of a request are numbered head by head, block by
    block."""
    if VECTORS.blocks == 1:
        return tile_head, 0
    else:
        blocks = count_blocks(query_len, VECTORS)
        return tile_head // blocks, tile_head % blocks * VECTORS.block


@triton.jit
def place_vectors(vector, VECTORS: tl.constexpr):
    """The new token of vectors, and which query head of their KV head they are."""
    if VECTORS.queries == 1:
        return vector * 0, vector
    else:
        return vector // VECTORS.gqa, vector % VECTORS.gqa
