"""Requests that take more input after they have answered, in a real engine: vLLM takes steps of theirs back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logquant_vllm.config import LogQuantConfig
from tests.models import write_model

pytest.importorskip("vllm", reason="vLLM is not installed")

pytestmark = pytest.mark.server
WINDOW, VOCABULARY = 64, 512


class Streaming:
    """An engine with asynchronous scheduling, and how many tokens each stop has taken back."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(path),
            kv_cache_dtype="logquant",
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            async_scheduling=True,
            enable_prefix_caching=False,  # chunks are then the same in every conversation
            enforce_eager=True,
            max_model_len=1024,
            max_logprobs=VOCABULARY,
            num_gpu_blocks_override=400,
            skip_tokenizer_init=True,
            gpu_memory_utilization=0.4,
        )
        self.taken_back: list[int] = []
        scheduler: Any = self.llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        handle = scheduler._handle_stopped_request

        def watched(request: Any) -> bool:
            before = request.num_computed_tokens
            finished = handle(request)
            self.taken_back.append(before - request.num_computed_tokens)
            return finished

        monkeypatch.setattr(scheduler, "_handle_stopped_request", watched)

    def turn(self, name: str, tokens: list[int], **sampling: Any) -> tuple[list[int], torch.Tensor]:
        """Add input to a conversation; the answer's tokens and their log-probabilities ``[tokens, vocabulary]``."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=VOCABULARY,
            output_kind=RequestOutputKind.DELTA,
            **sampling,
        )
        engine = self.llm.llm_engine
        request = engine.input_processor.process_inputs(
            name,
            {"prompt_token_ids": list(tokens)},
            params,
            supported_tasks=engine.get_supported_tasks(),
            resumable=True,
        )
        request.external_req_id = name
        engine.output_processor.add_request(copy.deepcopy(request), None)  # both sides append to its tokens
        engine.engine_core.add_request(request)
        answer, logprobs = [], []
        for _ in range(10 * params.max_tokens):
            for output in engine.step():
                completion = output.outputs[0]
                answer += completion.token_ids
                logprobs += [torch.tensor([step[i].logprob for i in range(VOCABULARY)]) for step in completion.logprobs]
                if completion.finish_reason is not None:
                    return answer, torch.stack(logprobs)
        raise AssertionError(f"{name} has not ended after {len(answer)} tokens")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Streaming]:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    if current_platform.is_cpu():  # which turns asynchronous scheduling off: "not required on CPU"
        check = type(current_platform).check_and_update_config

        def asynchronous(cls: type, vllm_config: Any) -> None:
            check(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        monkeypatch.setattr(type(current_platform), "check_and_update_config", classmethod(asynchronous))
    yield Streaming(write_model(tmp_path / "model"), monkeypatch)
    cleanup_dist_env_and_memory()


def test_a_conversation_goes_on_after_a_step_was_taken_back(engine: Streaming) -> None:
    """A token that ends an answer has a step of its own in flight by then, which is taken back; a limit is foreseen."""
    g = torch.Generator().manual_seed(0)
    for length in (4 * WINDOW - 1, 4 * WINDOW):  # that step reaches a multiple of the window, or begins there
        first, second = (torch.randint(3, VOCABULARY, (n,), generator=g).tolist() for n in (length, 20))
        answer, _ = engine.turn(f"limit {length}", first, max_tokens=1)
        expected = engine.turn(f"limit {length}", second, max_tokens=80)
        assert engine.turn(f"stop {length}", first, max_tokens=90, stop_token_ids=answer)[0] == answer
        actual = engine.turn(f"stop {length}", second, max_tokens=80)
        assert actual[0] == expected[0]
        tolerance = 3e-2 if torch.cuda.is_available() else 1e-3
        torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=tolerance)
    assert engine.taken_back == [0, 0, 1, 0] * 2
    assert max(engine.taken_back) <= LogQuantConfig().layout(64).rollback_tokens
