"""An engine measures its own model when it starts with it for the first time.

The loaded model, whatever its quantization and however it is spread over ranks, runs some text as ordinary prompts, one
after another, while its attention layers look at their queries and keys (:mod:`logquant_vllm.plugin.observe`). What
comes out is kept where the next start finds it (:mod:`logquant_vllm.calibration.lookup`) and put to use at once.

This happens when the cache is there and kernels and graphs are made, before the engine is ready. The prompts have a
scheduler of their own, which goes with all that it knew: no page that they wrote is ever read again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from logquant_vllm import calibration
from logquant_vllm.calibration import text
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Moments
from logquant_vllm.plugin import basis, observe
from logquant_vllm.plugin.model import shape_of, skipped_layers, where
from logquant_vllm.plugin.offload import no_transfers

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name


class Status(NamedTuple):
    """What an engine's keys are quantized with."""

    path: str | None
    """Of the calibration's file; None without one."""
    note: str
    """Where it comes from, or why there is none."""


def obstacle(vllm_config: Any) -> str | None:
    """Why an engine of this configuration cannot measure its model; None if it can."""
    import vllm.envs as envs

    model, longest = vllm_config.model_config, _longest(vllm_config)
    if model.skip_tokenizer_init:
        return "the engine has no tokenizer (--skip-tokenizer-init)"
    if model.runner_type != "generate":
        return f"the model does not generate (--runner {model.runner_type})"
    if skipped_layers(vllm_config):
        return "some layers are left out (--kv-cache-dtype-skip-layers), and other starts may keep them"
    if str(vllm_config.load_config.load_format).endswith("dummy"):
        return "its weights are random (--load-format dummy)"
    if longest < text.SHORTEST:
        return f"a step takes {longest} tokens of a prompt, and measuring at least {text.SHORTEST}"
    if envs.VLLM_ELASTIC_EP_SCALE_UP_LAUNCH:
        return "the engine joins others that run already"
    return None


def _longest(vllm_config: Any) -> int:
    """Tokens of a prompt that is computed in one step."""
    scheduler = vllm_config.scheduler_config
    limits = vllm_config.model_config.max_model_len - 1, scheduler.max_num_batched_tokens
    others = scheduler.max_num_scheduled_tokens, scheduler.long_prefill_token_threshold  # None or 0 without one
    return min(*limits, *filter(None, others))


def calibrate(vllm_config: Any, executor: Any, kv_cache_config: Any) -> Status:
    """See that all layers quantize with the model's calibration, if it may have one: measure it if there is none.

    Args:
        executor: vLLM's, whose workers have loaded the model and have a KV cache.
        kv_cache_config: of that cache.
    """
    config = LogQuantConfig.from_additional_config(vllm_config.additional_config)
    model = vllm_config.model_config
    path = calibration.find(config, *where(model))
    if not config.measures:
        if path is not None:
            return Status(str(path), calibration.origin(config, path))
        return Status(None, f"none: the option {'calibration is null' if config.rotation else 'rotation is false'}")
    if (why := obstacle(vllm_config)) is not None:
        return Status(None, f"none: {why}") if path is None else Status(str(path), calibration.origin(config, path))
    if path is not None and calibration.is_measured(path) and basis.load(path, model) is None:
        path = None
    surveyed = executor.collective_rpc(observe.survey, args=(path is not None,))
    target = calibration.measured_path(config, *where(model))
    if any(lacking for _, lacking in surveyed):
        began = time.monotonic()
        try:
            moments = _measure(config, vllm_config, executor, kv_cache_config)
        except ValueError as error:
            logger.warning(
                "LogQuant: %s cannot be calibrated, so keys are rotated, which is less accurate: %s", model.model, error
            )
            return Status(None, f"none: {error}")
        executor.collective_rpc(observe.use, args=(moments, target))
        note = f"measured at this start in {time.monotonic() - began:.1f} s"
        if config.bits is not None:
            note += f", bits {config.bits:g} are spent by it from the next start on"
        if (longest := _longest(vllm_config)) < text.KEPT:
            return Status(None, f"{note}, on prompts of {longest} tokens, too short to be kept for other starts")
        if _keep(moments, target):
            return Status(str(target), note)
        return Status(None, f"{note}, and not kept: the next start measures again")
    if path is None:
        return Status(None, "found by the workers, on other machines")
    if any(waits for waits, _ in surveyed):  # on machines that do not see the file
        executor.collective_rpc(observe.use, args=(basis.load(path, model), target))
    return Status(str(path), calibration.origin(config, path))


def _keep(moments: Sequence[Moments], path: Path) -> bool:
    """Write what was measured, for later starts; whether that worked."""
    try:
        calibration.keep(moments, path)
    except ValueError as error:
        logger.info("LogQuant: the calibration is not kept, and the next start measures again: %s", error)
        return False
    logger.info("LogQuant: later starts find the calibration in %s", path)
    return True


def _measure(config: LogQuantConfig, vllm_config: Any, executor: Any, kv_cache_config: Any) -> list[Moments]:
    """Moments of every layer and of all KV heads, as a file holds them.

    Raises:
        ValueError: if they cannot be measured, with the reason.
    """
    from tqdm import tqdm
    from vllm.tokenizers import cached_tokenizer_from_config

    documents = text.documents(config.calibration_text)
    try:
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        amount = text.amount(config.calibration_text, current_platform.device_type)
        prompts = text.sequences(documents, tokenizer, min(amount.longest, _longest(vllm_config)), amount.tokens)
    except ValueError:
        raise
    except Exception as error:  # what tokenizers raise is up to them
        raise ValueError(f"its tokenizer cannot be used: {error!r}") from error
    tokens = sum(map(len, prompts))
    logger.info("LogQuant: measuring the model's queries and keys on %d tokens, once", tokens)
    problems = executor.collective_rpc(observe.begin)
    try:
        for problem in filter(None, problems):
            raise ValueError(problem)
        run = _runner(vllm_config, executor, kv_cache_config)
        with tqdm(total=tokens, desc="Measuring queries and keys", unit="tok") as progress:
            for i, prompt in enumerate(prompts):
                run(f"logquant-calibration-{i}", prompt)
                progress.update(len(prompt))
    finally:
        ranks = executor.collective_rpc(observe.end)
    return calibration.encoded(_merge(ranks, shape_of(vllm_config.model_config)))


def _runner(vllm_config: Any, executor: Any, kv_cache_config: Any) -> Callable[[str, list[int]], None]:
    """What runs a prompt to its end, as the engine's own loop does; with a scheduler that nobody else knows."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    alone = copy.copy(vllm_config)
    alone.kv_events_config = alone.kv_transfer_config = None
    alone.cache_config = copy.copy(vllm_config.cache_config)
    alone.cache_config.enable_prefix_caching = False  # nothing of these prompts is to be found
    alone.cache_config.mamba_cache_mode = "none"  # nor are they cut where recurrent states would be
    block_size, hash_block_size = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    scheduler = alone.scheduler_config.get_scheduler_cls()(
        vllm_config=alone,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(alone),
        block_size=block_size,
        hash_block_size=hash_block_size,
    )

    def run(name: str, prompt: list[int]) -> None:
        scheduler.add_request(
            Request(name, prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), pooling_params=None)
        )
        while scheduler.has_requests():  # until the workers know that it is finished
            step = scheduler.schedule()
            if vllm_config.kv_transfer_config is not None:
                step.kv_connector_metadata = no_transfers(vllm_config.kv_transfer_config)
            output = executor.execute_model(step, non_block=True).result()
            if output is None:
                output = executor.sample_tokens(None)
            scheduler.update_from_output(step, output)

    return run


def _merge(ranks: Sequence[tuple[dict[int, observe.Seen], str | None]], shape: tuple[int, int, int]) -> list[Moments]:
    """What all ranks measured: heads that several have count as their mean; what errors cost, as a share of all heads'
    output; layers that nobody has as a head without a preference.

    Args:
        shape: layers, KV heads and channels.

    Raises:
        ValueError: if something went wrong in a rank.
    """
    for _, problem in ranks:
        if problem:
            raise ValueError(problem)
    layers, heads, channels = shape
    sums, count = torch.zeros(2, layers, heads, channels, channels), torch.zeros(layers, heads, 1, 1)
    costs, output = torch.zeros(layers, 2), torch.zeros(layers, 1)
    for of_rank, _ in ranks:
        for i, (first, moments, read) in of_rank.items():
            mine = slice(first, first + len(moments.key))
            count[i, mine] += 1
            sums[0, i, mine] += moments.query
            sums[1, i, mine] += moments.key
            costs[i] += moments.cost * read
            output[i] += read
    if not count.any():
        raise ValueError("no layer of the model was run")
    query, key = sums / count.clamp(min=1)
    shares = costs / output.clamp(min=torch.finfo(output.dtype).tiny)
    return [Moments(*of_layer) for of_layer in zip(query, key, shares, strict=True)]
