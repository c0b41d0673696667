"""Bytes of blocks in files that several engines share: whole or not at all, and never taken for something else.

A file has a row of bytes, then a digest of them and of the file's place. It gets its name when all of it is written,
so who finds a name finds a whole file. One that was cut, changed or moved by others does not match its digest: it is
removed, as if it had never been there, and written again by who computes what it was.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

DIGEST_BYTES = hashlib.sha256().digest_size


class PageFiles(NamedTuple):
    """The files of one worker.

    Args:
        directory: of engines whose bytes mean the same.
        rank: the worker's, among those of its engine.
    """

    directory: str
    rank: int

    def path(self, name: str) -> Path:
        return Path(self.directory, f"rank{self.rank}", name[:2], name)

    def has(self, name: str) -> bool:
        """Whether there is such a file; what the file system does not let us see is not there."""
        return os.path.exists(self.path(name))

    def write(self, name: str, row: Tensor) -> None:
        """Store a row, uint8 ``[bytes]`` on the host; if that fails there is no file, which is logged once."""
        path = self.path(name)
        unfinished = path.with_name(f"{name}.{uuid.uuid4().hex}.unfinished")  # hosts share process ids
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                file.write(_bytes(row))
                file.write(self._digest(name, row))
            unfinished.replace(path)
        except OSError as error:
            logger.warning_once("Prefixes are not stored in %s: %s", self.directory, error.strerror)
            with suppress(OSError):
                unfinished.unlink()

    def read(self, name: str, row: Tensor) -> bool:
        """Fill a row, uint8 ``[bytes]`` on the host; whether it is what was stored."""
        path = self.path(name)
        try:
            with open(path, "rb") as file:
                whole = file.readinto(_bytes(row)) == len(row)
                if whole and file.read(DIGEST_BYTES + 1) == self._digest(name, row):
                    return True
            logger.warning("%s is damaged: it is removed, and what it held is computed again", path)
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning_once("Prefixes are not read from %s: %s", self.directory, error.strerror)
        return False

    def _digest(self, name: str, row: Tensor) -> bytes:
        place = "/".join(self.path(name).relative_to(Path(self.directory).parent).parts)
        digest = hashlib.sha256(place.encode())  # for which processors have instructions
        digest.update(_bytes(row))
        return digest.digest()


def _bytes(row: Tensor) -> memoryview:
    return row.numpy().data
