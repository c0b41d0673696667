"""How the decode kernel's work is cut: arithmetic on the host, without a GPU."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from hypothesis import given
from hypothesis import strategies as st

from logquant_vllm.kernels.decoding import MAX_SPLITS, gluon_shares

WAVE, WINDOW_SPLITS = 1584, 3


@given(rows=st.integers(1, 5000), max_groups=st.integers(1, 4096))
def test_every_slot_and_page_has_a_program(rows: int, max_groups: int) -> None:
    shares = gluon_shares(rows, max_groups, WAVE, WINDOW_SPLITS)
    assert 1 <= shares.window_parts <= shares.programs <= MAX_SPLITS + WINDOW_SPLITS
    assert 0 <= shares.first_page_part < shares.programs
    # either all programs take both, or each takes one of the two
    assert (shares.window_parts, shares.first_page_part) in (
        (shares.programs, 0),
        (WINDOW_SPLITS, WINDOW_SPLITS),
    )


@pytest.mark.parametrize(("rows", "groups"), [(128, 512), (512, 128), (64, 1024)])
def test_a_full_gpu_gets_one_wave_of_equal_programs(rows: int, groups: int) -> None:
    shares = gluon_shares(rows, groups, WAVE, WINDOW_SPLITS)
    assert shares.first_page_part == 0
    assert 0.9 <= rows * shares.programs / WAVE <= 1
    assert math.ceil(groups / shares.programs) * shares.programs < 1.1 * groups
