"""Attention to a past that is read slice by slice, and how its states are merged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from logquant_vllm.core import operations as reference
from logquant_vllm.core.past import gather_past, past_slices
from logquant_vllm.core.states import merge_states
from tests.paging import PagedBatch, assert_close, random_qkv
from tests.test_operations import DEFAULT, split

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.mark.parametrize("room", [96, 160, 2000])
def test_past_and_chunk_make_the_whole(room: int) -> None:
    """Dense attention over the gathered past, slice by slice, joined with the chunk's own, is ``attention``."""
    layout, size = DEFAULT, 64
    requests = PagedBatch(layout, 2, 3, 700)
    for seed, new in enumerate([[420, 1, 64], [70, 0, 3], [1, 0, 1]]):
        requests.step(*random_qkv(sum(new), 4, 2, size, seed=seed), new, 0.125)
    new = [40, 5, 130]
    q, k, v = random_qkv(sum(new), 4, 2, size, seed=9)
    batch = requests.batch(new)
    expected, expected_lse = reference.attention(q, k, v, requests.cache, batch, layout, 0.125)

    def dense(r: int, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        rows = slice(int(batch.query_start_loc[r]), int(batch.query_start_loc[r + 1]))
        grouped = q[rows].float().unflatten(1, (2, 2))
        scores = torch.einsum("qhgd,thd->qhgt", grouped, keys.float()) * 0.125
        if causal:
            scores.masked_fill_(~torch.ones(scores.shape[0], len(keys)).tril().bool()[:, None, None], -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        out = torch.einsum("qhgt,thd->qhgd", weights, values.float()).flatten(1, 2)
        return out, torch.logsumexp(scores, -1).flatten(1)

    parts = [split(x, new) for x in (k, v)]
    states = [dense(r, parts[0][r], parts[1][r], True) for r in range(3)]
    slices = past_slices(batch.num_computed, [600, 1, 68], room)
    assert (len(slices) > 1) == (room < 600)
    for piece in slices:
        keys, values = (torch.full((room, 2, size), math.nan, dtype=k.dtype) for _ in range(2))
        gather_past(keys, values, piece, k, v, requests.cache, batch, layout)
        assert piece.start_loc[-1] <= piece.rows <= room
        for r in range(3):
            rows = slice(int(piece.start_loc[r]), int(piece.start_loc[r + 1]))
            states[r] = merge_states(*states[r], *dense(r, keys[rows], values[rows], False))
    assert_close(torch.cat([out for out, _ in states]), expected)
    assert_close(torch.cat([lse for _, lse in states]), expected_lse)


def test_past_needs_room() -> None:
    with pytest.raises(ValueError, match="room for 63 tokens is less than 32 for each of 2 requests"):
        past_slices(torch.tensor([100, 100]), [100, 100], 63)
    assert past_slices(torch.tensor([0, 0]), [0, 0], 64) == []


def test_merge_states() -> None:
    """Two halves of a softmax make the whole, also where one half is empty."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, 20, generator=g, dtype=torch.float64) * 5
    scores[0, :, :8] = scores[1, :, 8:] = -math.inf
    values = torch.randn(20, 16, generator=g, dtype=torch.float64)

    def state(part: slice) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(scores[..., part], -1).nan_to_num(0.0)
        return weights @ values[part], torch.logsumexp(scores[..., part], -1)

    output, lse = merge_states(*state(slice(0, 8)), *state(slice(8, 20)))
    expected, expected_lse = state(slice(0, 20))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    empty = torch.full_like(lse, -math.inf)
    nothing, none = merge_states(torch.zeros_like(output), empty, torch.zeros_like(output), empty)
    assert (nothing == 0).all()
    assert torch.equal(none, empty)
