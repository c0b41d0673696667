"""Engines that share prompts, at start-up: what is refused, by name and before weights load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import families
from tests.models import create_config, write_config

pytest.importorskip("vllm", reason="vLLM is not installed")

from logquant_vllm.plugin.offload import STORAGE, STORAGE_MEANING, STORAGE_MODULE, STORAGE_PATH, keep_apart

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "by somebody else's module": (
        {},
        {"kv_connector_module_path": "tests.storage_of_others"},
        {},
        "LogQuantStorageConnector is tests.storage_of_others: use logquant_vllm.plugin.storage",
    ),
    "nowhere": ({}, {"kv_connector_extra_config": {}}, {}, "must name a directory that is there, got None"),
    "in a directory that is not there": (
        {},
        {"kv_connector_extra_config": {"shared_storage_path": "/nowhere/at/all"}},
        {},
        "shared_storage_path of the LogQuantStorageConnector must name a directory .* '/nowhere/at/all'",
    ),
    "without a prefix cache": ({}, {}, {"enable_prefix_caching": False}, "leave one of the two out"),
    "by hashes of its own": (
        {},
        {},
        {"prefix_caching_hash_algo": "xxhash"},
        "xxhash, by which other engines do not find prefixes of the LogQuantStorageConnector: use sha256",
    ),
    "with drafts": (
        {},
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "drafts have not been tried with the LogQuantStorageConnector: leave --speculative-config out",
    ),
    "for layers of several kinds": (
        families.MIXED["Gemma 3"],
        {},
        {},
        "layers of other kinds have not been tried with the LogQuantStorageConnector: leave --kv-transfer",
    ),
    "with adapters": (
        {},
        {},
        {"enable_lora": True, "max_lora_rank": 8},
        "not enough for the LogQuantStorageConnector: leave --enable-lora out",
    ),
}


def asked(directory: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kv_connector": STORAGE,
        "kv_connector_module_path": STORAGE_MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {STORAGE_PATH: str(directory)},
        **changes,
    }


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    changes, transfer, arguments, message = CASES[name]
    path = write_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        create_config(path, kv_transfer_config=asked(tmp_path, **transfer), **arguments)


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer", "kv_both"])
def test_accepted(role: str, tmp_path: Path) -> None:
    config = create_config(write_config(tmp_path / "model"), kv_transfer_config=asked(tmp_path, kv_role=role))
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager


def test_a_starting_engine_checks_it_again(tmp_path: Path) -> None:
    """vLLM does so when its processes have met, and that is after the directory has got its meaning."""
    config = create_config(write_config(tmp_path / "model"), kv_transfer_config=asked(tmp_path))
    keep_apart(config.kv_transfer_config, ["a meaning"])
    config.__post_init__()
    found = config.kv_transfer_config.kv_connector_extra_config
    assert found[STORAGE_PATH] == str(tmp_path) and found[STORAGE_MEANING].startswith("logquant-")


def test_options_of_another_connector_are_none_of_this_one(tmp_path: Path) -> None:
    extra = {STORAGE_PATH: str(tmp_path), "secondary_tiers": [{"type": "fs", "root_dir": "/tmp"}]}
    transfer = asked(tmp_path, kv_connector_extra_config=extra)
    config = create_config(write_config(tmp_path / "model"), kv_transfer_config=transfer)
    keep_apart(config.kv_transfer_config, ["a meaning"])
    assert config.kv_transfer_config.kv_connector_extra_config[STORAGE_MEANING].startswith("logquant-")


def test_another_dtype_is_refused_by_the_connector(tmp_path: Path) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    path = write_config(tmp_path / "model")
    config = create_config(path, kv_cache_dtype="auto", kv_transfer_config=asked(tmp_path))
    with pytest.raises(ValueError, match="stores pages of --kv-cache-dtype logquant: set it"):
        KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, None)  # type: ignore[arg-type]


def test_weights_that_are_exchanged_again_and_again(tmp_path: Path) -> None:
    """As in reinforcement learning: each time a directory of its own, whose name a file system takes."""
    from logquant_vllm.plugin.storage import StorageScheduler

    config = create_config(write_config(tmp_path / "model"), kv_transfer_config=asked(tmp_path))
    keep_apart(config.kv_transfer_config, ["a meaning"])
    scheduler = StorageScheduler(config)
    directories = [Path(scheduler.orders(no_step()).directory)]
    for _ in range(20):
        scheduler.renew()
        directories.append(Path(scheduler.orders(no_step()).directory))
    assert len(set(directories)) == 21
    for directory in directories:
        assert directory.parent == tmp_path
        directory.mkdir()


def no_step() -> SimpleNamespace:
    return SimpleNamespace(num_scheduled_tokens={})
