"""Conversations that go on with the window that the turn before has left, in vLLM's engine: as if it had never left.

The control computes the whole prompt in one request, in steps that end where the hit ends, so it has the same pages and
the same window then, and answers are equal but for the order of sums. After a hit without a kept window they are not.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import MIXED
from tests.models import write_model
from tests.test_engine import ROUNDING, Engine, distance, mean_kl, prompts_of
from tests.test_mixed import engine_of

pytest.importorskip("vllm", reason="vLLM is not installed")

from logquant_vllm.plugin.specs import WindowManager

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("in_this_process")]

STEP, LONGEST = 256, 1024
"""Tokens of a step, and of a request."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    found = Engine(
        write_model(tmp_path_factory.mktemp("model") / "llama"),
        max_model_len=LONGEST,
        max_num_batched_tokens=STEP,
        num_gpu_blocks_override=120,
        additional_config={"logquant": {"keep_windows_from": STEP}},
    )
    yield found
    found.core.shutdown()


def windows(engine: Engine) -> Any:
    managers = engine.core.scheduler.kv_cache_manager.coordinator.single_type_managers
    (found,) = (manager for manager in managers if isinstance(manager, WindowManager))
    return found


def forget(engine: Engine) -> None:
    assert engine.core.scheduler.kv_cache_manager.reset_prefix_cache()


def forget_windows(engine: Engine) -> None:
    """As if their memory had been needed, but for the copies of token 0."""
    offers = [offer for offer in windows(engine)._windows._offers.values() if offer.is_there]
    engine.core.scheduler.kv_cache_manager.evict_blocks({offer.blocks[2].block_id for offer in offers})


def cold(engine: Engine, prompt: list[int]) -> list[Any]:
    forget(engine)
    answer, cached = engine.ask([prompt], 20)
    assert cached == [0]
    forget(engine)
    return answer


@given(
    turns=st.lists(st.tuples(st.integers(0, 63), st.booleans()), min_size=1, max_size=3),
    last=st.integers(1, 200),
)
@settings(max_examples=12)
def test_turns_go_on_as_if_nobody_had_left(engine: Engine, turns: list[tuple[int, bool]], last: int) -> None:
    """However many tokens a turn has behind its last whole page, up to where the window is compacted, ended or aborted;
    another conversation takes turns with it."""
    free, lengths = engine.free_blocks, [STEP * i + behind for i, (behind, _) in enumerate(turns, 1)]
    prompts = prompts_of(lengths[-1] + last, lengths[-1] + last + 1)
    expected = [cold(engine, prompt)[0] for prompt in prompts]
    for i, (length, (_, aborted)) in enumerate(zip(lengths, turns, strict=True)):
        for prompt in prompts:
            if aborted:
                engine.begin("left", prompt[:length])
                while engine.computed("left") < length:
                    engine.llm.llm_engine.step()
                engine.end()
            else:
                _, cached = engine.ask([prompt[:length]], 1)
                assert cached == [i * STEP]
    found = [engine.ask([prompt], 20) for prompt in prompts]
    assert [cached for _, cached in found] == [[len(turns) * STEP]] * 2
    assert distance(expected, [answer for answers, _ in found for answer in answers]) < ROUNDING
    assert engine.free_blocks == free


def test_without_its_window_a_turn_is_not_as_cold(engine: Engine) -> None:
    """The control of the test above, and what a request does whose window was evicted: it computes tokens again."""
    (prompt,) = prompts_of(2 * STEP + 300)
    expected = cold(engine, prompt)
    engine.ask([prompt[: 2 * STEP + 30]], 1)
    forget_windows(engine)
    replayed, cached = engine.ask([prompt], 20)
    assert cached == [2 * STEP]
    assert distance(expected, replayed) > 10 * ROUNDING
    assert mean_kl([(a[0], b[0]) for a, b in zip(expected, replayed, strict=True)]) < 0.2


@pytest.mark.parametrize("length", [STEP + 64, STEP - 1])
def test_what_is_not_kept(engine: Engine, length: int) -> None:
    """A window that was compacted behind its last whole page, and one of too short a prefix."""
    (prompt,) = prompts_of(length)
    forget(engine)
    before = len(windows(engine)._windows)
    engine.ask([prompt], 1)
    assert len(windows(engine)._windows) == before


@pytest.mark.slow
def test_all_are_kept(tmp_path: Path) -> None:
    """Compactions wait for the page that is not whole yet, and the window takes more blocks."""
    path = write_model(tmp_path / "llama")
    options = {"logquant": {"keep_windows_from": STEP, "keep_all_windows": True}}
    with engine_of(path, num_gpu_blocks_override=120, max_num_batched_tokens=STEP, additional_config=options) as engine:
        free = engine.free_blocks
        for behind in (0, 63, 64, 65, 100, 126):
            (prompt,) = prompts_of(3 * STEP + behind)
            expected = cold(engine, prompt)
            for i, length in enumerate((STEP + behind, 2 * STEP + behind)):
                _, cached = engine.ask([prompt[:length]], 1)
                assert cached == [i * STEP]
            found, cached = engine.ask([prompt], 20)
            assert cached == [2 * STEP]
            assert distance(expected, found) < ROUNDING
        assert engine.free_blocks == free


@pytest.mark.slow
def test_beside_layers_of_other_kinds(tmp_path: Path) -> None:
    """Where nothing is ever computed again, a kept window is all that fills the recent past after a hit."""
    path = write_model(tmp_path / "model", **MIXED["Gemma 3"])
    options = {"logquant": {"keep_windows_from": 0}}
    with engine_of(path, num_gpu_blocks_override=260, additional_config=options) as engine:
        (prompt,), free = prompts_of(900), engine.free_blocks
        (expected,) = cold(engine, prompt)
        found = []
        for forgotten in (False, True):
            engine.ask([prompt[:532]], 1)
            if forgotten:
                forget_windows(engine)
            answer, cached = engine.ask([prompt], 20)
            assert cached == [512]
            found.append(distance([expected], answer))
            forget(engine)
        assert found[0] < ROUNDING < 10 * ROUNDING < found[1]
        assert engine.free_blocks == free
