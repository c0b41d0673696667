"""Where a model's calibration is found: where the options say, beside the model, or in the cache of measured ones.

An engine that finds none measures the model and keeps what it found under a name that follows from everything that it
depends on: weights (wherever they lie), what they are turned into when they are loaded, text, and this version of how
they are measured. So there is nothing to invalidate, and machines can share the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from logquant_vllm.calibration import text
from logquant_vllm.calibration.file import FILE_NAME, save
from logquant_vllm.config import LogQuantConfig, shown

if TYPE_CHECKING:
    from logquant_vllm.core.calibration import Moments

VERSION = 2
"""Of how moments are measured: another one makes all models' anew."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_TENSOR_BYTES = 256


def find(
    config: LogQuantConfig, model: str, revision: str | None = None, changes: str | None = None, device: str = "cuda"
) -> Path | None:
    """The calibration to use for a model directory or name; None for none (yet).

    Args:
        revision: of a name on the hub; None for the newest that is cached.
        changes: that an engine makes when it loads the model: quantization, another configuration.
        device: ``cpu`` or ``cuda``, where it measures: a CPU reads less text.

    Raises:
        ValueError: if the options ask for a file that is not there.
    """
    if config.calibration is None or not config.rotation:
        return None
    if config.calibration == "auto":
        candidates = [measured_path(config, model, revision, changes, device)]
        if config.calibration_text is None and (beside := _local_file(model, FILE_NAME, revision)) is not None:
            candidates.insert(0, beside)
        return next((path for path in candidates if _is_file(path)), None)
    path = Path(config.calibration)
    try:
        if path.is_file():
            return path
        problem = "not a regular file" if path.exists() else "not there"
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:  # no name that a file can have
        problem = str(error)
    raise ValueError(
        f"logquant option calibration: there is no file {shown(config.calibration)} ({problem}); give a file of "
        f'`logquant-vllm calibrate`, "auto" for {FILE_NAME} beside the model or one that is measured, or null'
    )


def cache_directory() -> Path:
    """Where engines keep what they measured: a directory of vLLM's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("VLLM_CACHE_ROOT") or f"{home}/vllm")) / "logquant"


def keep(moments: Sequence[Moments], path: Path) -> None:
    """Write what was measured where later starts find it.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {path.parent}: {error.strerror}") from None
    save(moments, path)


def is_measured(path: Path) -> bool:
    """Whether a calibration was measured by an engine, which can measure it again."""
    return path.parent == cache_directory()


def origin(config: LogQuantConfig, path: Path) -> str:
    """Where a calibration that was found comes from."""
    if config.calibration != "auto":
        return "given by the options"
    return "measured at an earlier start" if is_measured(path) else "beside the model"


def measured_path(
    config: LogQuantConfig, model: str, revision: str | None = None, changes: str | None = None, device: str = "cuda"
) -> Path:
    """Where an engine keeps what it measures of a model; arguments as in :func:`find`.

    Raises:
        ValueError: if the options name a text that cannot be read.
    """
    depends_on = {
        "version": VERSION,
        "model": identity(model, revision),
        "changes": changes,
        "text": text.digest(config.calibration_text, device),
        "key_group_size": config.key_group_size,
        "window_length": config.window_length,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return cache_directory() / f"{digest[:32]}.logquant"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # what is out of reach is not there
        return False


def _local_file(model: str, name: str, revision: str | None) -> Path | None:
    """A file of a model in its directory, or in the hub's cache on this machine; nothing is downloaded."""
    folder = Path(model)
    if folder.is_dir():
        return folder / name
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model, name, revision=revision)
    except ValueError:  # not a name that a hub could know
        return None
    return Path(cached) if isinstance(cached, str) else None


def identity(model: str, revision: str | None) -> str:
    """What tells a model from all others: its weights if they are on this machine, else its name."""
    config = _local_file(model, "config.json", revision)
    paths = [Path(model)] if _is_file(Path(model)) else sorted(config.parent.glob("*")) if config is not None else []
    try:
        weights = [path for path in paths if path.suffix in WEIGHTS and path.is_file()]
        if weights:
            files = [*weights, *(path for path in paths if path == config)]
            return _fingerprint(tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))
    except OSError:  # an engine could not read them either
        pass
    return f"{model}@{revision}"


@lru_cache(maxsize=4)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of samples of files, given by path, size and time: wherever they lie, and quickly also for large ones."""
    digest = hashlib.sha256()
    for name, size, _ in files:
        digest.update(f"{Path(name).name} {size} ".encode())
        for sample in _samples(Path(name), size):
            digest.update(sample)
    return digest.hexdigest()


def _samples(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
        for offset in sorted(_tensor_offsets(file, size)) if path.suffix == ".safetensors" else ():
            file.seek(offset)
            yield file.read(_TENSOR_BYTES)


def _tensor_offsets(file: BinaryIO, size: int) -> list[int]:
    """The middle of each tensor of a safetensors file: of a merged adapter some differ alone. No offsets if it is
    damaged."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length if length < size else 0))
        ends = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
        return [8 + length + (begin + end) // 2 for begin, end in ends]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
