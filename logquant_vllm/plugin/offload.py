"""Pages that leave an engine's device: vLLM's offloading to host memory and files, the directory of engines that share
prompts (``plugin/storage.py``), and what other KV connectors would do to pages.

A page is a block of vLLM's prefix cache, and the offloading connector copies such blocks as bytes, whatever is in them.
Window blocks are no part of a prefix cache, so they stay with their request. A hit in host memory is thus like one on
the GPU: pages, a few tokens that are computed again, and the exact copy of token 0 if its block is still there.

The memory lives and ends with its engine, so format and calibration of what it holds are the engine's. Stores that
outlive it, or that several engines share, find a block by its tokens and the model's name, and another engine's bytes
may mean something else. In a file system each meaning gets a directory of its own (:func:`keep_apart`); other stores
are refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import vllm.envs as envs
from vllm.platforms import current_platform

from logquant_vllm.plugin.model import has_other_kinds

CONNECTOR, STORAGE = "OffloadingConnector", "LogQuantStorageConnector"
STORAGE_MODULE, STORAGE_PATH = "logquant_vllm.plugin.storage", "shared_storage_path"
STORAGE_MEANING = "logquant_meaning"
"""Of our connector's options: the directory of an engine's meaning below the user's."""
IN_HOST_MEMORY, IN_TIERS = "CPUOffloadingSpec", "TieringOffloadingSpec"
IN_FILES = "fs"
TIERS = "secondary_tiers"


def copies_blocks() -> bool:
    """Whether vLLM copies blocks between this device and the host's memory."""
    return current_platform.is_cuda_alike()


def connector_problems(vllm_config: Any) -> Iterator[str]:
    """Why pages cannot travel as a configuration, with ours as its KV cache dtype, wants them to."""
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    if not getattr(cache, "kv_offloading_size", None):
        if transfer is None:
            return
        option, name = "--kv-transfer-config", transfer.kv_connector
    else:  # vLLM makes a connector of it, after it has asked us
        option, name = "--kv-offloading-size", CONNECTOR
        if cache.kv_offloading_backend != "native":
            yield f"--kv-offloading-backend is {cache.kv_offloading_backend}: use native"
            return
        if envs.VLLM_USE_SIMPLE_KV_OFFLOAD:
            yield "VLLM_USE_SIMPLE_KV_OFFLOAD is set, whose connector is not supported: leave it out"
            return
    if name == STORAGE:
        yield from _storage_problems(vllm_config, transfer)
        return
    if name != CONNECTOR:
        yield (
            f"the KV connector {name} does not know pages and full-precision blocks: use {CONNECTOR}, which "
            f"--kv-offloading-size sets up, {STORAGE} for prompts on another engine, or leave --kv-transfer-config out"
        )
        return
    extra = (transfer.kv_connector_extra_config if transfer is not None else None) or {}
    if (store := extra.get("spec_name", IN_HOST_MEMORY)) not in (IN_HOST_MEMORY, IN_TIERS):
        yield (
            f"spec_name of the {CONNECTOR} is {store}, which may find blocks of another format or calibration: use "
            f"{IN_HOST_MEMORY}, for host memory of the engine's own, or {IN_TIERS} with files behind it"
        )
    tiers = extra.get(TIERS) or []
    if not isinstance(tiers, list) or not all(isinstance(tier, dict) for tier in tiers):
        yield f"{TIERS} of the {CONNECTOR} must be a list of objects with type and root_dir, got {tiers!r:.80}"
    elif others := [tier.get("type") for tier in tiers if tier.get("type") != IN_FILES]:
        yield (
            f"a secondary tier of the {CONNECTOR} is of the type {others[0]}, which may find blocks of another format "
            f'or calibration: use "{IN_FILES}"'
        )
    elif not all(tier.get("root_dir") for tier in tiers):
        yield f'a secondary tier of the {CONNECTOR} of the type "{IN_FILES}" has no root_dir: name a directory'
    if extra.get("canonical_layout"):
        yield f"canonical_layout of the {CONNECTOR} cuts blocks into tokens, which a page is not: leave it out"
    if not cache.enable_prefix_caching:
        yield f"{option} keeps prefixes, and --no-enable-prefix-caching is given: leave one of the two out"
    if vllm_config.model_config is not None and vllm_config.model_config.is_hybrid:
        yield f"recurrent states have not been offloaded beside pages yet: leave {option} out"
    if not copies_blocks():
        yield f"vLLM offloads from a GPU, and this is a {current_platform.device_name}: leave {option} out"


def _storage_problems(vllm_config: Any, transfer: Any) -> Iterator[str]:
    """Why engines cannot share a directory of prompts."""
    cache = vllm_config.cache_config
    if transfer.kv_connector_module_path != STORAGE_MODULE:
        yield f"kv_connector_module_path of the {STORAGE} is {transfer.kv_connector_module_path}: use {STORAGE_MODULE}"
    path = (transfer.kv_connector_extra_config or {}).get(STORAGE_PATH)
    if not isinstance(path, str) or not os.path.isdir(path):
        yield f"{STORAGE_PATH} of the {STORAGE} must name a directory that is there, got {path!r:.200}"
    elif not os.access(path, os.R_OK | os.X_OK | (os.W_OK if transfer.is_kv_producer else 0)):
        yield f"{STORAGE_PATH} of the {STORAGE} is {path}, which this user may not read, or not write to"
    if not cache.enable_prefix_caching:
        yield f"the {STORAGE} keeps prefixes, and --no-enable-prefix-caching is given: leave one of the two out"
    if cache.prefix_caching_hash_algo.startswith("xxhash"):
        yield (
            f"--prefix-caching-hash-algo is {cache.prefix_caching_hash_algo}, by which other engines do not find "
            f"prefixes of the {STORAGE}: use sha256"
        )
    if vllm_config.model_config is not None and has_other_kinds(vllm_config):
        yield f"layers of other kinds have not been tried with the {STORAGE}: leave --kv-transfer-config out"
    if vllm_config.speculative_config is not None:
        yield f"drafts have not been tried with the {STORAGE}: leave --speculative-config out"
    if vllm_config.lora_config is not None:
        yield f"adapters are known by their names alone, which is not enough for the {STORAGE}: leave --enable-lora out"


def keep_apart(transfer: Any, meanings: Sequence[str]) -> None:
    """Give blocks that lie in files a directory for what they mean: format, options and calibration.

    Called before the scheduler, which reads and writes the files, is made.

    Args:
        transfer: vLLM's ``KVTransferConfig``.
        meanings: what the blocks of each rank mean, see :func:`logquant_vllm.plugin.meaning.meaning`.
    """
    directory = f"logquant-{hashlib.sha256(' '.join(meanings).encode()).hexdigest()[:16]}"
    extra = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector == STORAGE:
        transfer.kv_connector_extra_config = {**extra, STORAGE_MEANING: directory}
        return
    tiers = [{**tier, "root_dir": os.path.join(tier["root_dir"], directory)} for tier in extra.get(TIERS) or ()]
    if tiers:  # the tiers are still the user's objects, who may start another engine with them
        transfer.kv_connector_extra_config = {**extra, TIERS: tiers}


def no_transfers(transfer: Any) -> Any:
    """What the connector of a worker is told in a step that neither saves nor loads anything."""
    if transfer.kv_connector == STORAGE:
        from logquant_vllm.plugin.storage_worker import Orders

        return Orders()
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingConnectorMetadata

    return OffloadingConnectorMetadata(load_jobs={}, store_jobs={})
