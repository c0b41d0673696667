"""A budget of bits: which layers' keys and values get a third one, and what a request then takes."""

from __future__ import annotations

from collections import Counter

import pytest

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.budget import num_places, spend
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.planning import Engine, ModelShape, logquant_capacity, preset_capacities

FORMAT = PageFormat(64)


@pytest.mark.parametrize(("bits", "places"), [(2.25, 0), (2.5, 15), (2.51, 15), (2.55, 18), (3.25, 60), (3.5, 60)])
def test_places(bits: float, places: int) -> None:
    assert num_places(bits, FORMAT, 30) == places
    formats = spend(FORMAT, places, 30, None)
    assert sum(fmt.bits_per_element for fmt in formats) / 30 == pytest.approx(2.25 + places / 60)


def test_too_few_bits() -> None:
    with pytest.raises(ValueError, match=r"bits 2.1 are too few: heads of 64 channels take 2.25 in 2 \+ 2 bits"):
        num_places(2.1, FORMAT, 30)


def test_costliest_places_first() -> None:
    costs = [(1.0, 8.0), (5.0, 0.5), (7.0, 6.0), (0.1, 0.2)]
    found = [(fmt.key_bits, fmt.value_bits) for fmt in spend(FORMAT, 3, 4, costs)]
    assert found == [(2, 3), (2, 2), (3, 3), (2, 2)]


def test_evenly_without_costs() -> None:
    """Keys first, at equal distances; then values."""
    assert [i for i, fmt in enumerate(spend(FORMAT, 4, 8, None)) if fmt.key_bits == 3] == [0, 2, 4, 6]
    found = Counter((fmt.key_bits, fmt.value_bits) for fmt in spend(FORMAT, 11, 8, None))
    assert found == {(3, 3): 3, (3, 2): 5}


def test_capacity() -> None:
    """As many tokens as the bytes of all layers allow, whichever layers have the third bits."""
    shape, engine = ModelShape(32, 8, 128, "bfloat16"), Engine(16 << 30, 32768)
    tokens = {bits: logquant_capacity(LogQuantConfig(bits=bits), shape, engine).tokens for bits in (2.25, 2.5, 3.25)}
    plain, k3v3 = (
        logquant_capacity(LogQuantConfig.from_options({"preset": name}), shape, engine) for name in ("k2v2", "k3v3")
    )
    assert tokens[2.25] == pytest.approx(plain.tokens, rel=0.01)
    assert tokens[2.5] == pytest.approx(plain.tokens * 2.25 / 2.5, rel=0.01)
    assert k3v3.tokens * 0.98 <= tokens[3.25] <= k3v3.tokens  # window blocks are larger than they need be


def test_presets_beside_a_budget() -> None:
    shape = ModelShape(32, 8, 128, "bfloat16")
    beside, alone = (
        {x.name: x.tokens for x in preset_capacities(config, shape, 16 << 30, 32768)}
        for config in (LogQuantConfig(bits=2.5), LogQuantConfig())
    )
    assert set(beside) == {"k2v2", *alone}
    assert alone.items() <= beside.items()


def test_bits_of_their_own() -> None:
    with pytest.raises(ValueError, match="leave key_bits 3 and value_bits 2 out"):
        LogQuantConfig.from_options({"preset": "k3v2", "bits": 2.75})
