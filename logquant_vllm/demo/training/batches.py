"""Training batches, made ahead of time by worker processes.

This module imports no torch, and what a worker is started with is small: starting a process blocks until the child
has read its arguments, so large ones would start the workers one after the other.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from logquant_vllm.demo.corpus import RowStream

BLOCK_TOKENS = 32_768  # what a worker hands over at once


def _produce(
    tokenizer_file: str,
    file_list: str,
    seed: int,
    rank: int,
    block_tokens: int,
    length: Synchronized[int],
    progress: Synchronized[float],
    out: mp.Queue[Any],
) -> None:
    """Body of a worker: blocks of rows ``[n, length + 1]`` uint16, for as long as the training wants them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(10)  # the queue is deep: the training process goes first
    files = [Path(line) for line in Path(file_list).read_text(encoding="utf-8").splitlines()]
    stream = RowStream(Tokenizer.from_file(tokenizer_file), files, seed, rank)
    while progress.value < 1.0:
        tokens = length.value
        rows = max(1, block_tokens // tokens)
        out.put(np.stack([stream.row(tokens + 1, progress.value) for _ in range(rows)]))


class Batches:
    """An endless source of batches of ``batch_tokens`` tokens; ``length_of`` gives the row length at a progress."""

    def __init__(
        self,
        tokenizer_file: Path,
        file_list: Path,
        seed: int,
        workers: int,
        batch_tokens: int,
        length_of: Callable[[float], int],
    ) -> None:
        context = mp.get_context("spawn")  # fork is unsafe beside CUDA and the tokenizer's threads
        self.batch_tokens = batch_tokens
        self.length_of = length_of
        self.progress: Synchronized[float] = context.Value("d", 0.0)
        self.length: Synchronized[int] = context.Value("i", length_of(0.0))
        self.queue: mp.Queue[Any] = context.Queue(maxsize=12 * workers)
        self.waited = 0.0
        block = min(BLOCK_TOKENS, batch_tokens)
        shared = (block, self.length, self.progress, self.queue)
        self.workers = [
            context.Process(
                target=_produce, args=(str(tokenizer_file), str(file_list), seed, rank, *shared), daemon=True
            )
            for rank in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def next(self, progress: float) -> NDArray[np.int32]:
        """The next batch ``[B, length + 1]``; blocks of an earlier row length are dropped."""
        length = self.length_of(progress)
        self.progress.value, self.length.value = progress, length
        wanted = max(1, self.batch_tokens // length)
        blocks: list[NDArray[np.uint16]] = []
        started = time.monotonic()
        while sum(len(b) for b in blocks) < wanted:
            try:
                block = self.queue.get(timeout=120)
            except queue.Empty as error:
                raise RuntimeError("the data workers make no rows; see their messages above") from error
            if block.shape[1] == length + 1:
                blocks.append(block)
        self.waited += time.monotonic() - started
        return np.concatenate(blocks)[:wanted].astype(np.int32)

    def close(self) -> None:
        """Stop the workers."""
        self.progress.value = 1.0
        for worker in self.workers:
            worker.terminate()
