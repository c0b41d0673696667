"""Bytes between a device's blocks, the host's memory and files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from logquant_vllm.plugin import storage_worker
from logquant_vllm.plugin.page_files import PageFiles
from logquant_vllm.plugin.storage_worker import Read, _read, gather, scatter

NAMES = [f"{i:064x}" for i in range(20)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("at_once", [1, 700, 1 << 25])
def test_rows_cross_in_pieces(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block, some and all; every layer has other bytes."""
    monkeypatch.setattr(storage_worker, "AT_ONCE", at_once)
    memory = [torch.randint(0, 256, (30, size), dtype=torch.uint8, device=DEVICE) for size in (100, 60, 100)]
    blocks = torch.randperm(30)[:11].tolist()
    rows = gather(memory, blocks)
    assert rows.equal(torch.cat([of_layer[blocks] for of_layer in memory], 1).cpu())

    others = [torch.zeros_like(of_layer) for of_layer in memory]
    scatter(rows, others, blocks)
    for of_layer, other in zip(memory, others, strict=True):
        assert other[blocks].equal(of_layer[blocks])
        assert not other[[i for i in range(30) if i not in blocks]].any()


@pytest.mark.parametrize("missing", [0, 7, 19, None])
def test_a_prefix_ends_where_a_page_is_missing(tmp_path: Path, missing: int | None) -> None:
    """Pages are read by several threads, and those behind it are there."""
    files, rows = PageFiles(str(tmp_path), 0), torch.randint(0, 256, (20, 300), dtype=torch.uint8)
    for i, name in enumerate(NAMES):
        if i != missing:
            files.write(name, rows[i])
    with ThreadPoolExecutor() as threads:
        prefix = _read(files, Read(0, NAMES, False), 300, 300, threads)
    assert prefix.pages.equal(rows[:missing]) and prefix.token_0 is None


def test_what_the_host_has_no_memory_for_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A request waits for an answer, whatever it is; the log says so once."""
    files = PageFiles(str(tmp_path), 0)
    files.write(NAMES[0], torch.zeros(300, dtype=torch.uint8))
    with ThreadPoolExecutor() as threads, caplog.at_level("WARNING", logger="vllm"):
        for _ in range(2):
            prefix = _read(files, Read(0, NAMES, True), 1 << 50, 300, threads)
            assert len(prefix.pages) == 0 and prefix.token_0 is None
    assert sum("Prefixes are not read" in record.message for record in caplog.records) == 1
