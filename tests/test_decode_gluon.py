"""The Gluon decode kernel against ``core``, in the interpreter: what it computes, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.kernels import arguments
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.decode import launch
from tests.gluon_interpreter import imported
from tests.test_triton import ON_GPU, Pair

pytestmark = pytest.mark.skipif(ON_GPU, reason="kernels run compiled: tests/test_decode_formats.py")


CASES = [
    # head size, query heads of a KV head, options
    (64, 4, {}),
    (128, 2, {}),
    (128, 8, {}),
    (128, 5, {"preset": "k4v2"}),
    (128, 1, {"key_group_size": 128, "window_length": 128}),
    (128, 3, {"value_group_size": 128}),
    (128, 8, {"key_bits": 4, "value_bits": 4}),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("head_size", "gqa", "options"), [CASES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1:])], ids=str
)
def test_decode(
    monkeypatch: pytest.MonkeyPatch, head_size: int, gqa: int, options: dict[str, object], late: bool
) -> None:
    """Lengths around groups, pages and compactions, over poisoned memory; programs that share the requests.

    Args:
        late: when copies to shared memory happen (``tests.gluon_interpreter``).
    """
    layout = LogQuantConfig.from_options(options).layout(head_size)
    monkeypatch.setattr(arguments, "architecture", lambda device: Architecture((0, 0), 228 << 10, 1))
    pair = Pair(layout, gqa, 1, 3, 800, torch.bfloat16)
    pair.step([1, 191, 700])
    with imported("logquant_vllm.kernels.decode.gluon.kernel", late) as kernel:
        monkeypatch.setattr(launch, "_choose", lambda *_: kernel)
        pair.step([1, 1, 1], seed=1)
        pair.step([1, 0, 1], seed=2)
