"""Pages that leave the device and come back: vLLM's connector, scheduler and store, and a copy that works on a CPU.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import MIXED
from tests.models import measured_on, write_model, write_model_that_reads
from tests.test_engine import ROUNDING, VOCABULARY, Engine, distance, mean_kl, prompts_of

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from logquant_vllm.plugin import offload
from logquant_vllm.plugin.backend import LogQuantImpl
from logquant_vllm.plugin.specs import WindowManager
from logquant_vllm.plugin.window_layer import pages_of
from tests.host_memory import Copies, HostMemory, HostMemoryBeforeFiles
from tests.test_mixed import engine_of

pytestmark = [pytest.mark.server, pytest.mark.skipif(torch.cuda.is_available(), reason="copies are a CPU's")]


@pytest.fixture(scope="module", autouse=True)
def copies_of_the_cpu(in_this_process: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "copies_blocks", lambda: True)
        patch.setitem(OffloadingSpecFactory._registry, offload.IN_HOST_MEMORY, lambda: HostMemory)
        patch.setitem(OffloadingSpecFactory._registry, offload.IN_TIERS, lambda: HostMemoryBeforeFiles)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama")


def forget(engine: Engine) -> None:
    """As if other requests had taken all blocks of the device."""
    assert engine.core.scheduler.kv_cache_manager.reset_prefix_cache()


def forget_copies(engine: Engine) -> None:
    """As if other requests had taken the copies of token 0 alone."""
    manager = engine.core.scheduler.kv_cache_manager
    (windows,) = (m for m in manager.coordinator.single_type_managers if isinstance(m, WindowManager))
    offers = [offer for offer in windows._sinks._offers.values() if offer.is_there]
    manager.evict_blocks({block.block_id for offer in offers for block in offer.blocks})


def pages(engine: Engine, name: str, count: int) -> list[Tensor]:
    """Bytes of a request's first pages, of every layer ``[count, page_bytes]``."""
    managers = engine.core.scheduler.kv_cache_manager.coordinator.single_type_managers
    (request,) = (r for r in engine.core.scheduler.requests if r.startswith(name))
    (table,) = (m.req_to_blocks[request] for m in managers if not isinstance(m, WindowManager))
    blocks = [block.block_id for block in table[:count]]
    layers = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    ours = [layer for layer in layers if isinstance(getattr(layer, "impl", None), LogQuantImpl)]
    return [pages_of(layer.kv_cache, layer.impl.window_layer.block, 0)[blocks].clone() for layer in ours]


class TestPages:
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, model: Path) -> Iterator[Engine]:
        """With blocks for two requests, and host memory for all that is asked here."""
        with engine_of(model, num_gpu_blocks_override=60, kv_offloading_size=0.25) as engine:
            yield engine

    def test_pages_come_back_as_they_were(self, engine: Engine) -> None:
        """Bytes are equal, and answers are those after a hit on the device whose exact first token is gone, too."""
        (prompt,) = prompts_of(900)
        free = engine.free_blocks
        engine.begin("first", prompt)
        while not next(iter(engine.core.scheduler.requests.values())).output_token_ids:
            engine.llm.llm_engine.step()
        before = pages(engine, "first", 7)
        engine.end()
        forget_copies(engine)
        here, cached = engine.ask([prompt], 20)
        assert cached == [896]
        assert Copies.stored >= 7 and Copies.loaded == 0

        forget(engine)
        back, cached = engine.ask([prompt], 20)
        assert cached == [896]
        assert Copies.loaded == 7
        assert distance(here, back) < ROUNDING
        engine.begin("again", prompt)
        assert all(torch.equal(a, b) for a, b in zip(before, pages(engine, "again", 7), strict=True))
        engine.end()
        assert engine.free_blocks == free

    def test_a_part_here_and_a_part_from_the_host(self, engine: Engine) -> None:
        """The device has the beginning, and its copy of token 0: it is read as after any other hit."""
        (prompt,) = prompts_of(1000)
        free = engine.free_blocks
        engine.ask([prompt], 1)
        whole, cached = engine.ask([prompt], 20)
        assert cached == [896]
        forget(engine)
        engine.ask([prompt[:500]], 1)  # brings three pages back
        forget(engine)
        engine.ask([[*prompt[:300], 7]], 1)  # two, and computes the rest
        before = Copies.loaded
        mixed, cached = engine.ask([prompt], 20)
        assert cached == [896] and Copies.loaded == before + 5
        assert distance(whole, mixed) < 0.5 and distance(whole, mixed) > 0  # token 0 is read in 2 bits
        assert engine.free_blocks == free


@pytest.mark.slow
def test_beside_layers_of_other_kinds(tmp_path: Path) -> None:
    """Sliding windows' blocks travel with the pages, several of them to a block of ours."""
    path = write_model(tmp_path / "model", **MIXED["Gemma 3"])
    options = {"logquant": {"key_bits": 4, "value_bits": 4}}
    with engine_of(path, num_gpu_blocks_override=260, kv_offloading_size=0.25, additional_config=options) as engine:
        free, (prompt,) = engine.free_blocks, prompts_of(900)
        engine.ask([prompt], 4)
        forget_copies(engine)
        here, cached = engine.ask([prompt], 4)
        assert cached[0] >= 768
        loaded = Copies.loaded
        forget(engine)
        back, again = engine.ask([prompt], 4)
        assert again == cached and Copies.loaded > loaded
        assert distance(here, back) < ROUNDING
        assert engine.free_blocks == free


@pytest.mark.slow
def test_a_full_pool_and_a_full_store(model: Path) -> None:
    """Conversations that outgrow device and store, with aborts and preemptions: every answer is that of an engine whose
    prefixes never leave the device."""
    rng = random.Random(0)
    shared = prompts_of(200)[0]
    said = [shared + prompt for prompt in prompts_of(*range(150, 390, 30))]
    turns = [rng.randrange(len(said)) for _ in range(40)]
    answers: list[list[Tensor]] = []
    cached: list[int] = []
    for arguments in ({"num_gpu_blocks_override": 600}, {"num_gpu_blocks_override": 70, "kv_offloading_size": 0.002}):
        with engine_of(model, **arguments) as engine:
            free, texts = engine.free_blocks, [list(text) for text in said]
            g, mine = random.Random(1), []
            for turn in turns:
                if len(texts[turn]) > 800:
                    texts[turn] = list(said[turn])
                forget_copies(engine)
                found, hits = engine.ask([texts[turn]], 6)
                mine += found
                cached += hits
                texts[turn] += [g.randrange(2, VOCABULARY) for _ in range(90)]
                if g.random() < 0.3:  # a crowd that is preempted, of which some are aborted
                    for i, other in enumerate(prompts_of(*(400 + 10 * g.randrange(9) for _ in range(4)))):
                        engine.begin(f"{i}", other)
                    engine.end()
            assert engine.free_blocks == free
            answers.append(mine)
    assert Copies.loaded > 40
    pairs = list(zip(answers[0], answers[1], strict=True))
    # where the store had lost a prefix, it was computed again and is exact
    assert mean_kl([(a[0], b[0]) for a, b in pairs]) < 0.05
    half = len(cached) // 2
    same = [
        distance([a[:1]], [b[:1]]) for (a, b), x, y in zip(pairs, cached[:half], cached[half:], strict=True) if x == y
    ]
    assert len(same) > 10 and max(same) < ROUNDING


@pytest.mark.slow
def test_a_model_is_measured_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine measures on is no prefix of anyone: none of it is stored."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    path = write_model_that_reads(tmp_path / "llama", vocab_size=4096)
    options = measured_on(tmp_path / "text.txt")
    stored = Copies.stored
    with engine_of(path, kv_offloading_size=0.25, skip_tokenizer_init=False, additional_config=options) as engine:
        _, note = engine.core.logquant_calibration()
        assert note.startswith("measured at this start")
        assert Copies.stored == stored
        (prompt,) = prompts_of(900)
        sampling = SamplingParams(temperature=0, max_tokens=1)
        for found in (0, 896):
            (result,) = engine.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)  # type: ignore[list-item]
            assert result.num_cached_tokens == found
            forget(engine)


def files(directory: Path) -> list[Path]:
    return list(directory.rglob("*.bin"))


def test_tiers_stay_the_users(tmp_path: Path) -> None:
    """Who starts another engine with them finds what the first has left, and no directory in its directory."""
    tiers = [{"type": offload.IN_FILES, "root_dir": str(tmp_path)}]
    found = []
    for _ in range(2):
        transfer = KVTransferConfig(
            kv_connector=offload.CONNECTOR,
            kv_role="kv_both",
            kv_connector_extra_config={"spec_name": offload.IN_TIERS, offload.TIERS: tiers},
        )
        offload.keep_apart(transfer, ["a meaning"])
        found.append(transfer.kv_connector_extra_config[offload.TIERS][0]["root_dir"])
    assert tiers == [{"type": offload.IN_FILES, "root_dir": str(tmp_path)}]
    assert found[0] == found[1] != str(tmp_path)


@pytest.mark.slow
def test_pages_in_files(model: Path, tmp_path: Path) -> None:
    """The next engine finds them, one whose pages mean something else does not, and one that loses them goes on."""
    tiers = {"cpu_bytes_to_use": 1 << 26, "secondary_tiers": [{"type": "fs", "root_dir": str(tmp_path)}]}
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"spec_name": offload.IN_TIERS, **tiers},
    }

    def begin(**options: Any) -> Any:
        arguments = {"kv_transfer_config": copy.deepcopy(transfer), "additional_config": {"logquant": options}}
        return engine_of(model, num_gpu_blocks_override=60, **arguments)

    prompt, other, third = prompts_of(900, 901, 902)
    with begin() as engine:
        engine.ask([prompt], 1)
        forget_copies(engine)
        here, cached = engine.ask([prompt], 20)
        assert cached == [896]
        while len(files(tmp_path)) < 7:
            engine.ask([other[:20]], 1)
    loaded = Copies.loaded
    with begin() as engine:
        back, cached = engine.ask([prompt], 20)
        assert cached == [896] and Copies.loaded == loaded + 7
        assert distance(here, back) < ROUNDING
        # another's files are in place of ours, and none
        engine.ask([other], 1)
        while len(files(tmp_path)) < 14:
            engine.ask([third[:20]], 1)
    with begin(value_rotation=False) as engine:
        _, cached = engine.ask([prompt], 20)
        assert cached == [0]
    with begin() as engine:
        for path in files(tmp_path):
            path.write_bytes(b"")
        computed, cached = engine.ask([prompt], 20)
        assert mean_kl([(here[0], computed[0])]) < 0.05
        shutil.rmtree(tmp_path)
        engine.ask([other], 20)
        engine.ask([third], 20)
        assert engine.ask([third], 1)[1] == [896]
