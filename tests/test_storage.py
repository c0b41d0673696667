"""Prompts on one engine, answers on another, which share a directory: every answer is that of a prefix hit in one.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import measured_on, write_model, write_model_that_reads
from tests.test_engine import ROUNDING, Engine, distance, mean_kl, prompts_of
from tests.test_page_files import change, cut, empty, lengthen

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm.envs as envs
from vllm import SamplingParams

from logquant_vllm.plugin import storage
from logquant_vllm.plugin.storage import StorageScheduler
from tests.peers import Engines, Peer
from tests.test_offload import forget, forget_copies, pages

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="two engines in one process are a CPU's"),
]

REPLAY = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    directory = tmp_path_factory.mktemp("prompts")
    first = Peer(model, directory, "kv_producer", num_gpu_blocks_override=400, max_num_batched_tokens=256)
    engines = Engines(first, Peer(model, directory, "kv_consumer"), directory)
    yield engines
    for engine in engines[:2]:
        engine.core.shutdown()


@pytest.fixture(scope="module")
def others() -> Iterator[Callable[..., Peer]]:
    """Further engines; whichever ends first ends vLLM's groups of workers for all of this process."""
    found: list[Peer] = []

    def begin(*args: Any, **kwargs: Any) -> Peer:
        found.append(Peer(*args, **kwargs))
        return found[-1]

    yield begin
    for engine in found:
        engine.core.shutdown()


@pytest.fixture
def engines(pair: Engines) -> Iterator[Engines]:
    """With nothing stored and nothing known, and so they are left but for what is stored."""
    for engine in pair[:2]:
        forget(engine)
    for path in pair.directory.iterdir():
        shutil.rmtree(path)
    free = [engine.free_blocks for engine in pair[:2]]
    yield pair
    assert [engine.free_blocks for engine in pair[:2]] == free
    with pair.second:
        pair.second.llm.llm_engine.step()
    assert all(engine.is_idle for engine in pair[:2])
    assert not [path for path in pair.files() if path.name.endswith("unfinished")]


@pytest.mark.parametrize("length", [20, 127, 128, 129, 256, 257, 385, 900])
def test_an_answer_is_that_of_a_hit(engines: Engines, length: int) -> None:
    """Bytes are equal, token 0 is exact, the last tokens are computed again, and all of it in chunks."""
    (prompt,) = prompts_of(length)
    expected, cached = engines.hit([prompt])
    pages_in_prompt = (length - 1) // 128
    assert cached == [pages_in_prompt * 128 if pages_in_prompt > 1 else 0]  # a hit of one page would be all replay
    assert len(engines.files()) == length // 128 + (length >= 128)
    found, again = engines.second.ask([prompt], 20)
    assert again == cached
    assert distance(expected, found) < ROUNDING

    engines.first.begin("one", prompt)
    forget(engines.second)
    engines.second.begin("two", prompt)
    request = engines.second.until_answered("two")
    engines.first.until_answered("one")
    assert request.replay_start == max(cached[0] - REPLAY, 0)
    if cached[0]:
        names = {"one": engines.first, "two": engines.second}
        of_both = (pages(engine, name, cached[0] // 128) for name, engine in names.items())
        assert all(torch.equal(a, b) for a, b in zip(*of_both, strict=True))
        copies = (engine.copies_of_token_0(engine.first_blocks(name)[1]) for name, engine in names.items())
        assert all(torch.equal(a, b) and a.any() for a, b in zip(*copies, strict=True))
    for engine in engines[:2]:
        engine.end()


def test_without_the_copy_of_token_0(engines: Engines) -> None:
    """Its file is lost, or was never written: a hit like any other whose sink block is gone."""
    (prompt,) = prompts_of(900)
    exact, _ = engines.hit([prompt])
    engines.first.ask([prompt], 1)
    forget_copies(engines.first)
    expected, cached = engines.first.ask([prompt], 20)
    for path in engines.directory.rglob("*.token0"):
        path.unlink()
    found, again = engines.second.ask([prompt], 20)
    assert again == cached == [896]
    assert distance(expected, found) < ROUNDING < distance(exact, found)


def test_a_batch_of_all_kinds(engines: Engines) -> None:
    """Prompts that are stored, some of whose pages are, or here already, and a new one; the same one twice."""
    shared, a, b, c, new, known = prompts_of(300, 350, 200, 130, 400, 500)
    prompts = [shared + a, shared + b, c, new, known, shared + a, shared[:290]]
    expected, cached = engines.hit(prompts)
    assert cached == [640, 384, 0, 384, 384, 640, 256]
    for name in (*hashes(engines.first, prompts[1])[2:], *hashes(engines.first, new)):
        path_of(engines, name).unlink()
    engines.second.ask([known[:400]], 1)
    found, again = engines.second.ask(prompts, 20)
    assert again == [640, 256, 0, 0, 384, 640, 256]
    as_there = [i for i in range(len(prompts)) if again[i] == cached[i]]
    assert distance([expected[i] for i in as_there], [found[i] for i in as_there]) < ROUNDING
    # of the others more was exact
    others = [(expected[i][0], found[i][0]) for i in (1, 3)]
    assert 0 < mean_kl(others) < 0.1


def test_a_part_here_and_a_part_from_files(engines: Engines) -> None:
    """The copy of token 0 is the one that is here, and what is here is not read."""
    (prompt,) = prompts_of(900)
    expected, cached = engines.hit([prompt])
    engines.second.ask([[*prompt[:400], 7]], 1)
    for name in hashes(engines.second, prompt)[:3]:
        path_of(engines, name).unlink()
    found, again = engines.second.ask([prompt], 20)
    assert again == cached == [896]
    assert distance(expected, found) < ROUNDING


def test_a_request_that_waits_is_asked_by_one_name(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each step again, however long it is."""
    (prompt,) = prompts_of(900)
    engines.first.ask([prompt], 1)
    names = StorageScheduler._names
    made: list[int] = []

    def counted(*args: Any) -> list[str]:
        found = names(*args)
        made.append(len(found))
        return found

    monkeypatch.setattr(StorageScheduler, "_names", counted)
    monkeypatch.setattr(storage, "MOST_READS", 0)
    engines.second.begin("one", prompt)
    with engines.second:
        for _ in range(3):
            engines.second.llm.llm_engine.step()
    engines.second.end()
    assert len(made) >= 3 and set(made) == {1}


@pytest.mark.parametrize("damage", [cut, lengthen, change, empty, os.unlink])
def test_a_damaged_file(engines: Engines, damage: Callable[[Path], None]) -> None:
    """What is behind it is computed again, and stored anew by who computes it; token 0 is exact as before."""
    (prompt,) = prompts_of(900)
    cold, _ = engines.second.ask([prompt], 20)
    forget(engines.second)
    expected, _ = engines.hit([prompt])
    names = hashes(engines.first, prompt)
    damage(path_of(engines, names[4]))
    found, cached = engines.second.ask([prompt], 20)
    assert cached == [512]
    assert mean_kl([(cold[0][0], found[0][0])]) < 0.05
    assert not path_of(engines, names[4], missing=True).exists()
    forget(engines.second)
    engines.first.ask([prompt], 1)
    found, cached = engines.second.ask([prompt], 20)
    assert cached == [896]
    assert mean_kl([(expected[0][0], found[0][0])]) < 0.01


def hashes(engine: Engine, prompt: list[int]) -> list[str]:
    """Names of a prompt's pages."""
    engine.begin("hashes", prompt)
    (request,) = (r for n, r in engine.core.scheduler.requests.items() if n.startswith("hashes"))
    names = [block.hex() for block in request.block_hashes]
    engine.end()
    return names


def path_of(engines: Engines, name: str, missing: bool = False) -> Path:
    (meaning,) = engines.directory.iterdir()
    path = meaning / "rank0" / name[:2] / name
    assert missing or path.exists()
    return path


def test_a_directory_that_is_lost(engines: Engines) -> None:
    """Prompts are computed as without one, and stored again when there is one again."""
    prompt, other = prompts_of(900, 700)
    engines.first.ask([prompt], 1)
    shutil.rmtree(engines.directory)
    engines.directory.write_text("a file in its place")
    expected, cached = engines.hit([prompt, other])
    found, again = engines.second.ask([prompt, other], 20)
    assert cached == [896, 640] and again == [0, 0]
    assert mean_kl([(a[0], b[0]) for a, b in zip(expected, found, strict=True)]) < 0.1
    engines.directory.unlink()
    engines.directory.mkdir()
    expected, _ = engines.hit([other])
    forget(engines.second)
    found, again = engines.second.ask([other], 20)
    assert again == [640] and distance(expected, found) < ROUNDING


def test_requests_that_are_aborted(engines: Engines) -> None:
    """In the middle of a prompt there are whole pages; while files are read, nothing of the request is left."""
    (prompt,) = prompts_of(900)
    expected, cached = engines.hit([prompt])
    for path in engines.directory.iterdir():
        shutil.rmtree(path)
    engines.first.begin("gone", prompt)
    engines.first.end()
    forget(engines.first)
    deadline = time.monotonic() + 20
    while len(engines.files()) < 1 + 256 // 128 and time.monotonic() < deadline:
        time.sleep(0.05)  # only the end of a prompt waits for the threads that write
    assert len(engines.files()) == 1 + 256 // 128
    engines.second.begin("gone too", prompt)
    assert not engines.second.is_idle
    engines.second.end()
    engines.first.ask([prompt], 1)
    found, again = engines.second.ask([prompt], 20)
    assert again == cached
    assert distance(expected, found) < ROUNDING


def test_a_crowd_in_a_small_pool(engines: Engines) -> None:
    """More prompts than blocks, beside others that are aborted: some are preempted, and each begins as after a hit."""
    g = random.Random(0)
    shared = prompts_of(300)[0]
    prompts = [shared + prompt for prompt in prompts_of(*(g.randrange(100, 600) for _ in range(12)))]
    expected, cached = engines.hit(prompts, 40)
    for _ in range(2):
        for i, other in enumerate(prompts_of(*(g.randrange(300, 700) for _ in range(3)))):
            engines.second.begin(f"other {i}", other)
        engines.second.end()
        found, again = engines.second.ask(prompts, 40)
        # those that were preempted in the middle of their answer begin with other tokens than these
        same = [i for i, hit in enumerate(again) if hit == cached[i]]
        assert len(same) > 8
        assert distance([expected[i][:1] for i in same], [found[i][:1] for i in same]) < ROUNDING
        forget(engines.second)


@pytest.mark.parametrize("options", [{"value_rotation": False}, {"window_length": 128}])
def test_pages_that_mean_something_else(
    engines: Engines, model: Path, others: Callable[..., Peer], options: dict[str, Any]
) -> None:
    """They have as many bytes as ours, and are not found."""
    (prompt,) = prompts_of(900)
    engines.first.ask([prompt], 1)
    other = others(model, engines.directory, "kv_both", additional_config={"logquant": options})
    found, cached = other.ask([prompt], 20)
    assert cached == [0]
    assert len(list(engines.directory.iterdir())) == 2
    forget(other)
    again, cached = other.ask([prompt], 20)
    assert cached == [896]
    assert mean_kl([(found[0][0], again[0][0])]) < 0.1
    # vLLM clears caches when weights are exchanged: pages of the former are not read, and those to come not shared
    with other:
        assert other.core.reset_prefix_cache(reset_connector=True)
    assert other.ask([prompt], 1)[1] == [0]
    assert len(list(engines.directory.iterdir())) == 3


def test_another_model_of_this_shape(engines: Engines, tmp_path: Path, others: Callable[..., Peer]) -> None:
    (prompt,) = prompts_of(900)
    engines.first.ask([prompt], 1)
    other = others(write_model(tmp_path / "llama", seed=1), engines.directory, "kv_consumer")
    assert other.ask([prompt], 20)[1] == [0]


@pytest.mark.parametrize("options", [{"prefix_replay_tokens": 0}, {"bits": 2.5}, {"preset": "k4v2"}], ids=str)
def test_options(engines: Engines, model: Path, others: Callable[..., Peer], options: dict[str, Any]) -> None:
    """Nothing computed again, if the user asks for it; pages of all layers side by side; pages of another size."""
    (prompt,) = prompts_of(900)
    other = others(model, engines.directory, "kv_both", additional_config={"logquant": options})
    other.ask([prompt], 1)
    expected, cached = other.ask([prompt], 20)
    forget(other)
    found, again = other.ask([prompt], 20)
    assert again == cached == [896]
    assert distance(expected, found) < ROUNDING


def test_two_ranks(engines: Engines, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has files of its own, and a prefix is as long as what all of them have."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one NUMA node serves both ranks
    envs.disable_envs_cache()  # engines before this one have read all of them
    (prompt,) = prompts_of(900)
    other = Peer(model, engines.directory, "kv_both", tensor_parallel_size=2)
    other.ask([prompt], 1)
    expected, cached = other.ask([prompt], 20)
    assert len(engines.files()) == 2 * (7 + 1)
    forget(other)
    found, again = other.ask([prompt], 20)
    assert again == cached == [896]
    assert distance(expected, found) < ROUNDING
    names = hashes(other, prompt)
    forget(other)
    (meaning,) = engines.directory.iterdir()
    (meaning / "rank1" / names[5][:2] / names[5]).unlink()
    assert other.ask([prompt], 20)[1] == [640]
    other.core.model_executor.shutdown()  # its two processes


def test_a_model_is_measured_all_the_same(
    engines: Engines, tmp_path: Path, others: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine measures on is no prompt of anyone: none of it is stored."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    path = write_model_that_reads(tmp_path / "llama", vocab_size=4096)
    options = measured_on(tmp_path / "text.txt")
    other = others(path, engines.directory, "kv_both", skip_tokenizer_init=False, additional_config=options)
    _, note = other.core.logquant_calibration()
    assert note.startswith("measured at this start")
    assert not engines.files()
    (prompt,) = prompts_of(900)
    with other:
        sampling = SamplingParams(temperature=0, max_tokens=1)
        for found in (0, 896):
            (result,) = other.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)  # type: ignore[list-item]
            assert result.num_cached_tokens == found
            forget(other)
