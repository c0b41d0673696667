"""The Gluon decode kernel against ``core``, in the interpreter: what it computes, on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.kernels import arguments
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.decode import launch
from logquant_vllm.kernels.decode.choice import why_not_gluon
from tests.gluon_interpreter import imported
from tests.pair import ON_GPU, Pair

CASES = [
    # head size, query heads of a KV head, new tokens of a request, options
    (64, 4, 1, {}),
    (128, 6, 2, {}),
    (64, 6, 1, {"preset": "k3v3"}),
    (256, 3, 1, {}),
    (96, 3, 1, {}),
    (128, 4, 1, {"preset": "k3v3"}),
    (128, 8, 1, {"preset": "k3v2"}),
    (128, 8, 2, {"value_bits": 3, "value_group_size": 128}),
    (64, 2, 1, {"preset": "k3v3", "key_group_size": 128, "window_length": 128}),
    (128, 8, 1, {}),
    (128, 5, 1, {"preset": "k4v2"}),
    (128, 1, 1, {"key_group_size": 128, "window_length": 128}),
    (128, 3, 1, {"value_group_size": 128}),
    (128, 8, 1, {"key_bits": 4, "value_bits": 4}),
    (128, 16, 1, {}),
    (128, 12, 3, {}),
    (64, 2, 2, {}),
    (80, 1, 1, {}),
    (80, 3, 2, {"preset": "k4v2"}),
    (64, 3, 5, {"preset": "k4v2"}),
    (64, 4, 20, {}),
    (96, 12, 2, {"preset": "k4v2"}),
    (160, 2, 1, {}),
    (192, 1, 9, {}),
    (256, 4, 3, {"value_group_size": 128}),
    (512, 3, 1, {}),
]


def layout_of(head_size: int, queries: int, options: dict[str, object]) -> CacheLayout:
    """With as many tokens that can be taken back as a step of speculation wants."""
    return LogQuantConfig.from_options(options).layout(head_size, rollback_tokens=2 * queries - 1)


@pytest.mark.skipif(ON_GPU, reason="kernels run compiled: tests/test_decode_formats.py")
@pytest.mark.parametrize(
    ("head_size", "gqa", "queries", "options", "late"),
    [
        *((*case, True) for case in CASES[:3]),
        *(pytest.param(*case, True, marks=pytest.mark.slow) for case in CASES[3:]),
        # what is copied, and where to, depends on bits, groups and warps
        *(pytest.param(*case, False, marks=pytest.mark.slow) for case in CASES[:12] + CASES[-2:]),
    ],
    ids=str,
)
def test_decode(
    monkeypatch: pytest.MonkeyPatch, head_size: int, gqa: int, queries: int, options: dict[str, object], late: bool
) -> None:
    """Lengths around groups, pages and compactions, over poisoned memory; programs that share the requests. The last
    one begins with a prefix hit.

    Args:
        late: when copies to shared memory happen (``tests.gluon_interpreter``).
    """
    steps(monkeypatch, Pair(layout_of(head_size, queries, options), gqa, 1, 4, 800, torch.bfloat16), queries, late)


@pytest.mark.skipif(ON_GPU, reason="kernels run compiled: tests/test_decode_formats.py")
@pytest.mark.parametrize(("head_size", "gqa", "queries"), [(64, 2, 1), pytest.param(128, 9, 1, marks=pytest.mark.slow)])
def test_soft_capping(monkeypatch: pytest.MonkeyPatch, head_size: int, gqa: int, queries: int) -> None:
    """Of scores in pages and in the window, with one warp and with two."""
    pair = Pair(LogQuantConfig().layout(head_size), gqa, 1, 4, 800, torch.bfloat16)
    pair.scores = {"softcap": 1.5}
    steps(monkeypatch, pair, queries, late=True)


def steps(monkeypatch: pytest.MonkeyPatch, pair: Pair, queries: int, late: bool) -> None:
    """Prompts, then two steps of the Gluon kernel."""
    layout = pair.layout
    monkeypatch.setattr(arguments, "architecture", lambda device: Architecture((0, 0), 228 << 10, 1))
    pair.fill([1, 191, 700, 0])
    for side in (pair.expected, pair.actual):
        side.hit(2, 3, 512)
    pair.fill([0, 0, 0, layout.prefix_replay_tokens + 70])
    with imported("logquant_vllm.kernels.decode.gluon.kernel", late) as kernel:
        monkeypatch.setattr(launch, "_choose", lambda gpu, _, *of: launch.Choice.of(kernel, gpu, *of))
        pair.step([queries, queries, 1, queries], seed=1, queries=queries)
        pair.step([1, 0, queries, 1], seed=2, queries=queries)


@pytest.mark.parametrize(("head_size", "gqa", "queries", "options"), CASES, ids=str)
def test_gluon_serves(head_size: int, gqa: int, queries: int, options: dict[str, object]) -> None:
    """All that is tested here is chosen, too."""
    assert why_not_gluon(Architecture((8, 0)), torch.bfloat16, layout_of(head_size, queries, options).fmt) is None


@pytest.mark.parametrize(
    ("head_size", "gqa", "drafts", "options", "few"),
    [
        (128, 4, 0, {}, 64),
        (128, 1, 3, {}, 64),
        (64, 7, 0, {}, 36),
        (128, 16, 0, {}, 16),
        (128, 16, 15, {}, 0),  # a step of speculation has as many
        (256, 4, 0, {}, 32),
        (256, 4, 0, {"preset": "k3v3"}, 0),  # the Triton kernel serves
    ],
)
def test_few_tokens(
    monkeypatch: pytest.MonkeyPatch, head_size: int, gqa: int, drafts: int, options: dict[str, object], few: int
) -> None:
    """As many blocks of query vectors as are worth it, whatever a block holds."""
    layout = LogQuantConfig.from_options(options).layout(head_size, decode_query_len=1 + drafts)
    with imported("logquant_vllm.kernels.decode.gluon.kernel", True) as kernel:
        monkeypatch.setattr(launch, "_kernel", lambda *_: kernel)
        assert launch.few_tokens(Architecture((9, 0)), torch.bfloat16, layout, gqa) == few


@pytest.mark.parametrize(
    ("head_size", "options", "why"),
    [
        (48, {}, "48 channels"),
        (112, {"value_group_size": 128}, "a group of 112"),
        (96, {"value_group_size": 128}, "a group of 96"),
        (640, {}, "640 channels"),
        (128, {"scale_bits": 16}, "scale_bits is 16"),
        (128, {"key_group_size": 32}, "key_group_size is 32"),
        (128, {"value_group_size": 32}, "value_group_size is 32"),
    ],
)
def test_gluon_leaves(head_size: int, options: dict[str, int], why: str) -> None:
    reason = why_not_gluon(Architecture((9, 0)), torch.bfloat16, PageFormat(head_size, **options))
    assert reason is not None and why in reason
