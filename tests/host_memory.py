"""vLLM's offloading to host memory, on a CPU: everything is vLLM's but the copy itself, which it makes with a GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

Copy = tuple[Tensor, Tensor]


class Copies(OffloadingWorker):
    """Copies at once, and says so when it is asked: what vLLM's worker does on streams of a GPU."""

    stored = loaded = 0  # blocks, of all workers

    def __init__(self, caches: Any, num_chunks: int) -> None:
        self.caches = caches
        self.host = [torch.zeros(num_chunks, t.page_size_bytes, dtype=torch.int8) for t in caches.tensors]
        self.done: list[TransferResult] = []

    def _pairs(self, device: Any, host: Any) -> Iterator[Copy]:
        blocks, chunks = iter(device.block_ids.tolist()), iter(host.block_ids.tolist())
        for refs, count in zip(self.caches.group_data_refs, device.group_sizes, strict=True):
            for _ in range(count):
                block, chunk = next(blocks), next(chunks)
                for ref in refs:
                    size = ref.page_size_bytes
                    tensor = self.caches.tensors[ref.tensor_idx].tensor
                    yield tensor[block, :size], self.host[ref.tensor_idx][chunk, :size]

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for device, host in self._pairs(src_spec, dst_spec):
            host.copy_(device)
        Copies.stored += len(src_spec.block_ids)
        self.done.append(TransferResult(job_id, True))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        for device, host in self._pairs(dst_spec, src_spec):
            device.copy_(host)
        Copies.loaded += len(dst_spec.block_ids)
        self.done.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass


class HostMemory(CPUOffloadingSpec):
    """With chunks of one block."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            self._worker = Copies(kv_caches, self.num_chunks)  # type: ignore[assignment]
        return self._worker  # type: ignore[return-value]


class HostMemoryBeforeFiles(TieringOffloadingSpec):
    """Host memory that vLLM's tiers read and write, too."""

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            size, stride = self.cpu_page_size_per_worker, self.kv_bytes_per_chunk
            region = SharedOffloadRegion(self._engine_id, self.num_chunks, 0, stride, size)
            chunks = torch.frombuffer(region.mmap_obj, dtype=torch.int8).view(self.num_chunks, stride)  # type: ignore[call-overload]
            worker = Copies(kv_caches, 0)
            worker.host = list(chunks.split([t.page_size_bytes for t in kv_caches.tensors] + [stride - size], 1))
            self._worker = worker  # type: ignore[assignment]
        return self._worker  # type: ignore[return-value]
