"""Steps of a model of two layers that are one graph, beside the same steps launched layer by layer.

Without a GPU a graph is the forward that was captured, run again: with the step's description of that time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logquant_vllm.core.paged import PagedCache
from tests.models import create_config, write_config
from tests.paging import assert_close, random_qkv
from tests.pair import DEVICE, ON_GPU
from tests.test_replay import HEAD_SIZES, HEADS, KV_HEADS, LaunchedAgain, Server, servers

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

NAMES = ("model.layers.0.attn", "model.layers.1.attn")


class Model:
    """Two layers, each with blocks of its own, and vLLM's runner: it has graphs of the pieces between them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        pages = server.side.cache.pages
        self.layers = [
            SimpleNamespace(
                impl=SimpleNamespace(
                    launches_alone=True, layer=server.layer, memory=lambda kv_cache: (kv_cache, kv_cache)
                ),
                kv_cache=memory,
            )
            for memory in (pages, pages.clone())
        ]
        self.buffers = {size: [[x.clone() for x in rows] for _ in NAMES] for size, rows in server.rows.items()}
        self.others: dict[str, Any] = {}  # what further layers are told
        self.positions = {size: torch.zeros(size, dtype=torch.long, device=DEVICE) for size in server.rows}
        self.embeds: torch.Tensor | None = None
        self.is_padding = torch.zeros(128, dtype=torch.bool, device=DEVICE)
        self.breaks = False  # while it is captured
        self.modes: list[str] = []  # in which the forward was run

    def forward(self, context: Any, tables: tuple[torch.Tensor, ...], of_layers: list[list[torch.Tensor]]) -> Any:
        """What vLLM's runner calls.

        Args:
            tables: of pages and of windows.
            of_layers: queries, keys, values and outputs.
        """
        from logquant_vllm.kernels import operations

        self.modes.append(context.cudagraph_runtime_mode.name)
        metadata = context.attn_metadata[NAMES[0]]
        for name, (*qkv, output), layer in zip(NAMES, of_layers, self.layers, strict=True):
            cache = PagedCache(layer.kv_cache, layer.kv_cache, *tables)
            if metadata.again is None:
                operations.step(layer.impl.layer, *qkv, cache, metadata.batch, output, metadata.parts)
            else:
                metadata.again.step(name, operations.step, layer.impl.layer, *qkv, cache, output)
            if self.breaks and metadata.again is not None and metadata.again.is_captured:
                raise AssertionError("nothing of this stream is known")
        first, second = (rows[3] for rows in of_layers)
        return first + second, [first * 2, second * 2]

    def step(self, qkv: list[tuple[torch.Tensor, ...]], requests: list[int], new: list[int], whole: bool) -> Any:
        """The results of a step, of its tokens."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import ForwardContext, override_forward_context

        from logquant_vllm.plugin import whole_step
        from logquant_vllm.plugin.metadata import LogQuantMetadata
        from logquant_vllm.plugin.window_layer import WindowMetadata

        cache, batch, parts, again = self.server.describe(requests, new, replays=True)
        count, windows = sum(new), WindowMetadata(cache.window_block_table)
        metadata = LogQuantMetadata(count, batch, cache.block_table, parts, again)
        context = ForwardContext(
            no_compile_layers=dict(zip(NAMES, self.layers, strict=True)),
            attn_metadata={NAMES[0]: metadata, NAMES[1]: metadata, "window": windows, **self.others},
            slot_mapping={},
            is_padding=self.is_padding,
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
        )
        of_layers = [[*tensors, torch.full_like(tensors[0], torch.nan)] for tensors in qkv]
        if again is not None:
            of_layers, given = self.buffers[again.num_tokens], of_layers
            for buffers, tensors in zip(of_layers, given, strict=True):
                for buffer, x in zip(buffers, tensors, strict=True):
                    buffer[:count] = x
        forward = partial(self.forward, context, (cache.block_table, cache.window_block_table), of_layers)
        with override_forward_context(context):
            positions = self.positions[again.num_tokens] if again else None
            inputs = {"input_ids": of_layers[0][0], "positions": positions, "inputs_embeds": self.embeds}
            first, others = whole_step.run(self, inputs, forward) if whole else forward()
        assert context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE and not (again and again.is_captured)
        return [x[:count].clone() for x in (first, *others)]


ANEW = ["PIECEWISE", "NONE"]  # a step that comes for the first time, and one for the second, which is captured
REPLAYED = [] if ON_GPU else ["NONE"]
Both = tuple[Model, Model]


def models(head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options: int) -> Both:
    """Of the same requests, one that is run layer by layer and one of whole steps."""
    if not ON_GPU:
        monkeypatch.setattr("logquant_vllm.plugin.whole_step.weak_ref_tensors", lambda x: x)
    one, other = servers(head_size, dtype, **options)
    return Model(one), Model(other)


def step_both(sides: Both, requests: list[int], new: list[int], seed: int) -> None:
    side = sides[0].server.side
    size, dtype = side.layout.fmt.head_size, side.dtype
    qkv = [random_qkv(sum(new), HEADS, KV_HEADS, size, dtype, DEVICE, seed + 1000 * layer) for layer in range(2)]
    found = [model.step(qkv, requests, new, whole=model is sides[1]) for model in sides]
    for a, b in zip(*found, strict=True):
        assert_close(b, a, what=f"step {seed}")
    for layer in range(2):
        assert torch.equal(*(model.layers[layer].kv_cache for model in sides)), f"step {seed}, layer {layer}"


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 44])
@pytest.mark.parametrize(("head_size", "dtype"), HEAD_SIZES)
def test_whole_steps(head_size: int, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time a step is captured, then replayed for other requests of other lengths."""
    sides = models(head_size, dtype, monkeypatch, few=few)
    server, whole = sides[1].server, sides[1]
    for request, length in enumerate((150, 300)):  # more tokens than vLLM has graphs for
        step_both(sides, [request], [length], 50 + request)
    assert whole.modes == ["PIECEWISE"] * 2 and not server.captures
    whole.modes.clear()
    steps = [([0], [40]), ([0], [44]), ([1], [36]), ([0, 1], [1, 40]), ([1, 0], [1, 43]), ([0, 1], [1, 36])]
    for seed, (requests, new) in enumerate(steps):
        step_both(sides, requests, new, seed)
    assert server.captures == 2, "a graph for each kind of steps"
    assert whole.modes == [*ANEW, *REPLAYED, *ANEW, *REPLAYED]


def test_nothing_stale_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other memory or another layer: captured anew. Layers that do more than to launch, or others: run as ever."""
    sides = models(64, torch.float16, monkeypatch)
    whole, seeds = sides[1], iter(range(100))

    def twice(*modes: str) -> None:
        whole.modes.clear()
        for new in (3, 5):
            step_both(sides, [0], [new], next(seeds))
        assert whole.modes == [*modes]

    step_both(sides, [0], [150], next(seeds))
    twice(*ANEW)
    twice(*REPLAYED, *REPLAYED)
    for layer in whole.layers:
        layer.kv_cache = layer.kv_cache.clone()
        twice(*ANEW)
    for layer in whole.layers:
        layer.impl.layer = layer.impl.layer._replace(softcap=0.0)
        twice(*ANEW)
    for index, table in enumerate(whole.server.tables):
        whole.server.tables[index] = table.clone()
        twice(*ANEW)
    whole.buffers[8][0][0] = whole.buffers[8][0][0].clone()  # what the model is given, here
    twice(*ANEW)
    whole.positions[8] = whole.positions[8].clone()
    twice(*ANEW)
    whole.is_padding = whole.is_padding.clone()
    twice(*ANEW)
    whole.layers[1].impl.launches_alone = False
    twice("PIECEWISE", "PIECEWISE")
    whole.layers[1].impl.launches_alone = True
    whole.others["model.layers.2.attn"] = SimpleNamespace()  # what FlashAttention is told
    twice("PIECEWISE", "PIECEWISE")
    whole.others.clear()
    whole.embeds = torch.zeros(8, 4)  # of a prompt with pictures
    twice("PIECEWISE", "PIECEWISE")
    whole.embeds = None
    positions, whole.positions[8] = whole.positions[8], torch.zeros(9)  # padded to another size than we know of
    twice("PIECEWISE", "PIECEWISE")
    whole.positions[8] = positions
    twice(*REPLAYED, *REPLAYED)


def test_a_step_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """If something fails halfway, the step is run as ever, and layers are replayed; the log says so, once."""
    sides = models(64, torch.float16, monkeypatch)
    whole = sides[1]
    server = whole.server
    monkeypatch.setattr(server.graphs, "capture", type(server.graphs).capture.__get__(server.graphs))
    if not ON_GPU:
        captured = 0

        def capture(launch: Callable[[], Any]) -> Any:
            nonlocal captured
            if server.graphs.captures_whole:
                launch()
            captured += 1
            return LaunchedAgain(launch)

        monkeypatch.setattr(server.graphs, "_capture", capture)
    step_both(sides, [0], [150], 0)
    whole.modes.clear()
    whole.breaks = True
    with caplog.at_level("WARNING", logger="vllm.logquant_vllm.plugin.replay"):
        for seed, new in enumerate((3, 4, 5, 6)):
            step_both(sides, [0], [new], seed)
    assert whole.modes == ["PIECEWISE", "NONE", "PIECEWISE", "PIECEWISE", "PIECEWISE"]
    (said,) = (record.message for record in caplog.records if "layer by layer" in record.message)
    assert "nothing of this stream is known" in said
    assert ON_GPU or captured == 2, "each layer by itself"


CHANGES: list[tuple[str, Any]] = [
    ("cache_config.cache_dtype", "auto"),
    ("compilation_config.cudagraph_mode", "PIECEWISE"),
    ("parallel_config.world_size", 2),
    ("parallel_config.enable_dbo", True),
    ("lora_config", SimpleNamespace()),
    ("offload_config.prefetch.offload_group_size", 4),
    ("quant_config", SimpleNamespace()),
    ("speculative_config", SimpleNamespace()),
    ("model_config.enable_sleep_mode", True),
]


def test_engines_whose_steps_are_more_than_kernels(tmp_path: Path) -> None:
    from vllm.config import CUDAGraphMode

    from logquant_vllm.plugin.whole_step import may_be_whole

    config = create_config(write_config(tmp_path))
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    assert may_be_whole(config)
    for changed, value in CHANGES:
        owner: Any = config
        *path, name = changed.split(".")
        for part in path:
            owner = getattr(owner, part)
        before = getattr(owner, name)
        # around the checks of vLLM's classes, which want whole configurations
        object.__setattr__(owner, name, CUDAGraphMode[value] if name == "cudagraph_mode" else value)
        assert not may_be_whole(config), changed
        object.__setattr__(owner, name, before)
    assert may_be_whole(config)


def test_the_runners_method_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, on a GPU with runner V2; steps of other engines, and those that vLLM breaks by itself, are left alone."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    from logquant_vllm.plugin import patches, whole_step

    config = create_config(write_config(tmp_path))
    original = ModelCudaGraphManager.run_pw_graph
    monkeypatch.setattr(ModelCudaGraphManager, "run_pw_graph", original)  # put back afterwards
    v1 = SimpleNamespace(use_v2_model_runner=False)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: False, raising=False)
    patches._patch_runner(SimpleNamespace(use_v2_model_runner=True))
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True, raising=False)
    patches._patch_runner(v1)
    assert ModelCudaGraphManager.run_pw_graph is original
    for _ in range(2):
        patches._patch_runner(SimpleNamespace(use_v2_model_runner=True))
    assert getattr(ModelCudaGraphManager.run_pw_graph, patches._MARK) is original

    asked = []
    monkeypatch.setattr(whole_step, "run", lambda model, inputs, forward: asked.append(inputs) or forward())
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    manager = object.__new__(ModelCudaGraphManager)
    manager.vllm_config, manager.use_breakable_cg = config, False
    inputs = {"input_ids": 3}
    assert manager.run_pw_graph(lambda input_ids: input_ids + 1, inputs) == 4 and asked == [inputs]
    manager.use_breakable_cg, manager.breakable_cg_runner = True, lambda input_ids: input_ids + 2
    assert manager.run_pw_graph(None, inputs) == 5 and len(asked) == 1
    config.compilation_config.cudagraph_mode, manager.use_breakable_cg = CUDAGraphMode.PIECEWISE, False
    assert manager.run_pw_graph(lambda input_ids: input_ids + 1, inputs) == 4 and len(asked) == 1


def test_a_runner_that_has_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    from logquant_vllm.plugin import patches

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True, raising=False)
    monkeypatch.setattr(ModelCudaGraphManager, "run_pw_graph", lambda self, model, inputs, stream: None)
    with pytest.raises(RuntimeError, match="This vLLM has changed"):
        patches._patch_runner(SimpleNamespace(use_v2_model_runner=True))
