"""Third bits where they matter: a budget of bits, spent on the layers whose keys or values cost most.

Layers differ much in what quantizing their keys, or their values, does to the model's output. A *place* is one of both
in one layer; a third bit takes its errors to about a quarter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from logquant_vllm.core.page_format import PageFormat

Cost = tuple[float, float]
"""Of a layer's keys and of its values, see :class:`logquant_vllm.core.calibration.Moments`."""


def num_places(bits: float, fmt: PageFormat, num_layers: int) -> int:
    """Places of a model that a budget has a third bit for.

    Args:
        bits: stored bits of an element on average, over keys and values of all layers.
        fmt: the format without third bits.

    Raises:
        ValueError: if the budget is less than that format takes.
    """
    places = math.floor((bits - fmt.bits_per_element) * 2 * num_layers + 1e-6)
    if places < 0:
        raise ValueError(
            f"bits {bits:g} are too few: heads of {fmt.head_size} channels take {fmt.bits_per_element:g} in "
            f"{fmt.key_bits} + {fmt.value_bits} bits with their scales"
        )
    return min(places, 2 * num_layers)


def spend(fmt: PageFormat, places: int, num_layers: int, costs: Sequence[Cost] | None) -> list[PageFormat]:
    """The format of each layer.

    Args:
        costs: of every layer; None: keys before values, and layers at equal distances.
    """
    if costs is None:
        keys = min(places, num_layers)
        chosen = {(i * num_layers // keys, 0) for i in range(keys)}
        chosen |= {(i * num_layers // (places - keys), 1) for i in range(places - keys)}
    else:
        order = sorted((-cost, layer, kind) for layer, of in enumerate(costs) for kind, cost in enumerate(of))
        chosen = {(layer, kind) for _, layer, kind in order[:places]}
    return [
        replace(fmt, key_bits=fmt.key_bits + ((i, 0) in chosen), value_bits=fmt.value_bits + ((i, 1) in chosen))
        for i in range(num_layers)
    ]
