"""What a scenario file may say. Everything is checked before the first request is sent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FOLDER = Path(__file__).parent / "scenarios"

Range = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
"""Smallest and largest number of tokens, drawn uniformly."""


class Strict(BaseModel):
    """A model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Chat(Strict):
    """Questions to a chat that share one system prompt, so that most of each prompt is a prefix hit."""

    kind: Literal["chat"]
    weight: float = Field(1, gt=0)
    system_tokens: int = Field(ge=1, le=1_000_000)


class Conversations(Strict):
    """Chats that take turns in random order: each prompt is all that was said in one before, and some tokens more. The
    answers that it quotes are made beforehand, so of the turn before it is the prompt that is found again."""

    kind: Literal["conversations"]
    weight: float = Field(1, gt=0)
    conversations: int = Field(ge=1, le=10_000)
    """Under way at a time; after its turns each makes room for a new one."""
    turns: int = Field(ge=1, le=1000)
    turn_tokens: Range
    """That a turn adds."""
    system_tokens: int = Field(ge=1, le=1_000_000)


class Documents(Strict):
    """Questions on long tables; several questions may share one."""

    kind: Literal["documents"]
    weight: float = Field(1, gt=0)
    document_tokens: Range
    questions_per_document: int = Field(1, ge=1)


class Code(Strict):
    """Continue a Python file from a random line on."""

    kind: Literal["code"]
    weight: float = Field(1, gt=0)
    context_tokens: Range


Workload = Annotated[Chat | Conversations | Documents | Code, Field(discriminator="kind")]


class Arrivals(Strict):
    """When requests are sent: an open loop at ``rate``, or without it as fast as the concurrency limit lets them."""

    rate: float | None = Field(None, gt=0, le=10_000)
    """Requests per second, on average."""
    burstiness: float = Field(1, gt=0)
    """Shape of the gamma distribution of the gaps: 1 is Poisson, less comes in bursts, more is more even."""
    ramp_to: float | None = Field(None, gt=0, le=10_000)
    """Rate of the last request, reached linearly from ``rate``."""

    @model_validator(mode="after")
    def _ramp_has_a_start(self) -> Arrivals:
        if self.ramp_to is not None and self.rate is None:
            raise ValueError("ramp_to needs a rate to start from")
        return self


class Percentiles(Strict):
    """Upper limits in milliseconds."""

    p50: float | None = Field(None, gt=0)
    p95: float | None = Field(None, gt=0)
    p99: float | None = Field(None, gt=0)


class Thresholds(Strict):
    """What the run must keep to. A figure that has a limit but could not be measured counts as missed."""

    ttft_ms: Percentiles = Percentiles()
    tpot_ms: Percentiles = Percentiles()
    e2e_ms: Percentiles = Percentiles()
    wait_ms: Percentiles = Percentiles()
    error_rate: float | None = Field(None, ge=0, le=1)
    min_requests_per_s: float | None = Field(None, gt=0)
    min_output_tokens_per_s: float | None = Field(None, gt=0)
    kv_usage_after: float | None = Field(None, ge=0, le=1)
    memory_growth_mib: float | None = Field(None, gt=0)


class Scenario(Strict):
    """One load test."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    description: str
    workloads: list[Workload] = Field(min_length=1)
    output_tokens: Range
    ignore_eos: bool = True
    """Generate exactly the drawn number of tokens. An extension of vLLM: switch it off for other servers."""
    arrivals: Arrivals
    requests: int | None = Field(None, ge=1, le=100_000)
    duration_s: float | None = Field(None, gt=0, le=7 * 86_400)
    concurrency: int = Field(ge=1, le=4096)
    timeout_s: float = Field(gt=0, le=3600)
    """Of one request, from sending it to its last token."""
    give_up_s: float | None = Field(None, gt=0)
    """When to end the run whatever is still open. By default the schedule's length and two request timeouts."""
    warmup: int = Field(1, ge=0, le=20)
    """Requests before the run that are not counted."""
    settle_s: float = Field(10, ge=0, le=600)
    """How long the server may take after the run to free its KV cache."""
    poll_s: float = Field(1, ge=0.1, le=60)
    """Seconds between samples of /metrics and of the memory."""
    seed: int = Field(0, ge=0, lt=2**32)
    thresholds: Thresholds

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if (self.requests is None) == (self.duration_s is None):
            raise ValueError("give either requests or duration_s")
        if self.duration_s is not None and (self.arrivals.rate is None or self.arrivals.ramp_to is not None):
            raise ValueError("duration_s needs arrivals.rate, without ramp_to; give requests instead")
        if self.arrivals.rate is None and self.give_up_s is None:
            raise ValueError("without arrivals.rate nothing bounds the run in time: give give_up_s")
        for name in ("output_tokens", *(f"workloads.{i}" for i in range(len(self.workloads)))):
            low, high = self._range(name)
            if low > high:
                raise ValueError(f"{name}: the range [{low}, {high}] is empty")
        if not self.thresholds.model_dump(exclude_none=True, exclude_defaults=True):
            raise ValueError("thresholds: give at least one, for a run without any cannot fail")
        return self

    def _range(self, name: str) -> Range:
        if name == "output_tokens":
            return self.output_tokens
        workload = self.workloads[int(name.rsplit(".", 1)[1])]
        if isinstance(workload, Conversations):
            return workload.turn_tokens
        if isinstance(workload, Documents):
            return workload.document_tokens
        return workload.context_tokens if isinstance(workload, Code) else (1, 1)

    @property
    def count(self) -> int:
        """Number of requests."""
        if self.requests is not None:
            return self.requests
        assert self.duration_s is not None and self.arrivals.rate is not None
        return max(1, round(self.duration_s * self.arrivals.rate))

    @property
    def schedule_s(self) -> float:
        """Seconds, on average, from the first arrival to the last; 0 in a closed loop."""
        start, end = self.arrivals.rate, self.arrivals.ramp_to
        if start is None:
            return 0.0
        if end is None:
            return self.count / start
        steps = max(self.count - 1, 1)
        return sum(1 / (start + (end - start) * i / steps) for i in range(self.count))

    @property
    def limit_s(self) -> float:
        """Seconds after which the run ends, whatever is still open."""
        return self.give_up_s if self.give_up_s is not None else self.schedule_s + 2 * self.timeout_s


def known() -> list[str]:
    """Names of the scenarios that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(what: str | Path) -> Scenario:
    """A scenario by its path, or by its name if it comes with the project.

    Raises:
        ValueError: naming the file and every key that is wrong.
    """
    path = FOLDER / f"{what}.yaml" if str(what) in known() else Path(what)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the scenario {what} ({error}); known names: {', '.join(known())}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} instead of a mapping of keys")
    try:
        scenario = Scenario.model_validate(content)
    except ValidationError as error:
        raise ValueError("\n".join([f"{path} is not a valid scenario:", *map(_line, error.errors())])) from None
    if not math.isfinite(scenario.limit_s):
        raise ValueError(f"{path}: the run would never end")
    return scenario


def _line(problem: object) -> str:
    """One mistake: where, and what."""
    assert isinstance(problem, dict)
    where = ".".join(map(str, problem["loc"]))
    what = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
    return f"  {where}: {what}" if where else f"  {what}"
