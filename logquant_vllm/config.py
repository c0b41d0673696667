"""The user's settings: what ``--additional-config '{"logquant": {...}}'`` may hold.

The model is frozen and forbids unknown fields, so a typing error stops the server at start-up instead of being ignored.
Importing this module does not import torch: the command line reads settings on machines that have none.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from logquant_vllm.core.page_format import PageFormat
    from logquant_vllm.core.paged import CacheLayout

PAGE_SIZE = 128
"""Tokens of a page; vLLM's block size under this KV cache."""

HEAD_SIZES = (64, 80, 96, 128, 160, 192, 256, 512)
"""Channels of a head that the kernels are tested with."""

CONFIG_KEY = "logquant"
"""Where the settings lie in vLLM's ``additional_config``."""

PRESETS: dict[str, dict[str, Any]] = {
    "k2v2": {},
    "k3v2": {"key_bits": 3},
    "k3v3": {"key_bits": 3, "value_bits": 3},
    "k4v2": {"key_bits": 4},
    "k4v4": {"key_bits": 4, "value_bits": 4},
}
"""Options by name; those that are given beside a preset take precedence."""


def shown(value: object) -> str:
    """What a user gave, for a message of one line: control characters escaped, and cut if it is very long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def unsupported_head_size(head_size: int) -> str:
    """What to say of heads that are not of :data:`HEAD_SIZES`."""
    return f"head size {head_size} is not supported; supported are {', '.join(map(str, HEAD_SIZES))}"


class LogQuantConfig(BaseModel):
    """Settings of the LogQuant KV cache. The defaults are the ones that were measured; see ``docs/design.md``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    window_length: int = Field(
        64,
        ge=32,
        le=1024,
        description="W of the paper: W log-selected tokens and the newest W to 2W tokens stay in full precision",
    )
    key_bits: Literal[2, 3, 4] = Field(2, description="bits of a stored key element")
    value_bits: Literal[2, 3, 4] = Field(2, description="bits of a stored value element")
    bits: float | None = Field(
        None,
        gt=2,
        le=3.5,
        description="stored bits of an element on average, scales included: what 2-bit keys and values do not take "
        "goes to third bits for keys and values of the layers where they help most, as a calibration says; null: "
        "key_bits and value_bits in all layers",
    )
    key_group_size: Literal[32, 64, 128] = Field(64, description="tokens that share a key scale, per channel")
    value_group_size: Literal[32, 64, 128] = Field(64, description="channels that share a value scale, per token")
    scale_bits: Literal[8, 16] = Field(
        8, description="8: scales as e4m3 and zeros as int8 quarters of the scale; 16: float16 both"
    )
    range_shrink: float | None = Field(
        None,
        ge=0.5,
        le=1.0,
        description="of keys, the quantizer's range as a share of the data's range, about its middle; null: what was "
        "measured to be best for their bits",
    )
    value_range_shrink: float | None = Field(None, ge=0.5, le=1.0, description="likewise of values")
    rotation: bool = Field(
        True, description="rotate queries and keys by a Hadamard matrix, so that no channel's outliers fill the range"
    )
    value_rotation: bool = Field(True, description="rotate values by one, too, and outputs back")
    calibration: str | None = Field(
        "auto",
        description='keys in the model\'s own basis, rounded with error feedback; "auto": by the file beside the '
        "model, or else as the engine measures at the model's first start and finds again at later ones; a file of "
        "`logquant-vllm calibrate`; null: none",
    )
    calibration_text: str | None = Field(
        None,
        description="what the engine measures on: a text file, or a .jsonl with messages, text or prompt in each line; "
        "null: the text that comes with the package",
    )
    prefix_replay_tokens: int | None = Field(
        None,
        ge=0,
        description="tokens before the end of a prefix-cache hit that are computed again, so that the recent window is "
        f"in full precision after a hit; null: 2 * window_length, and at least {PAGE_SIZE}, below which a decode step "
        "takes more kernel launches; as many at most as bring every selected copy back but that of token 0, "
        "256 if window_length is 64",
    )
    keep_windows_from: int | None = Field(
        4096,
        ge=0,
        description="tokens of the shortest prefix whose full-precision window stays when its request has left, for a "
        "prefix-cache hit that goes on from it exactly; it takes the memory of some 1,400 tokens until others need it; "
        "null: none is kept",
    )
    keep_all_windows: bool = Field(
        False,
        description="keep windows of nearly all lengths, not only those without a compaction behind the last whole "
        "page (half of them, if window_length is 64); a request's window takes a third more memory",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> LogQuantConfig:
        if self.window_length < self.key_group_size:
            raise ValueError(
                f"window_length {self.window_length} is smaller than key_group_size {self.key_group_size}: a group of "
                f"keys is quantized from the recent window. Use a window_length of at least {self.key_group_size}"
                + (f", or a key_group_size of {self._largest_group()}" if self.window_length >= 32 else "")
            )
        if self.replay_tokens > self._longest_replay():
            raise ValueError(
                f"prefix_replay_tokens {self.replay_tokens} is more than what brings a full-precision copy back: with "
                f"window_length {self.window_length} the oldest but token 0 are {self._longest_replay()} tokens back. "
                f"Use at most {self._longest_replay()}"
            )
        if self.keep_all_windows and self.kept_behind_page > self.window_length:
            raise ValueError(
                f"keep_all_windows with window_length {self.window_length}: up to {self.kept_behind_page} tokens would "
                "be taken back, more than a compaction takes in. Use a window_length of 64 or more, or leave it out"
            )
        if self.bits is not None and (self.key_bits, self.value_bits) != (2, 2):
            raise ValueError(
                f"bits {self.bits:g} are spent from 2-bit keys and values on: leave key_bits {self.key_bits} and "
                f"value_bits {self.value_bits} out, and a preset that sets them, or leave bits out"
            )
        if self.calibration not in (None, "auto") and not self.rotation:
            raise ValueError("a calibration replaces the rotation by the model's own: leave rotation true to use it")
        if self.calibration_text is not None and not self.measures:
            raise ValueError(
                "calibration_text is what a calibration is measured on: use it with rotation true and calibration "
                '"auto", or leave it out'
            )
        return self

    def _largest_group(self) -> int:
        return max(size for size in (32, 64, 128) if size <= self.window_length)

    def _longest_replay(self) -> int:
        """Tokens back to the oldest copy that is ever log-selected, token 0 aside (``core.log_selection``)."""
        return (((self.window_length - 1).bit_length() - 1) // 3 + 3) * self.window_length

    @property
    def measures(self) -> bool:
        """Whether an engine that finds no calibration measures one."""
        return self.calibration == "auto" and self.rotation

    @property
    def replay_tokens(self) -> int:
        """``prefix_replay_tokens`` with its default filled in."""
        if self.prefix_replay_tokens is not None:
            return self.prefix_replay_tokens
        return max(2 * self.window_length, PAGE_SIZE)

    @property
    def kept_behind_page(self) -> int:
        """Tokens for which compaction waits, so that none is made before the page that it would be behind is whole."""
        return PAGE_SIZE - math.gcd(self.window_length, PAGE_SIZE)

    def page_format(self, head_size: int) -> PageFormat:
        """The block format for heads of ``head_size`` channels.

        Raises:
            ValueError: if heads of that size are not supported.
        """
        from logquant_vllm.core.page_format import PageFormat

        if head_size not in HEAD_SIZES:
            raise ValueError(unsupported_head_size(head_size))
        return PageFormat(
            head_size=head_size,
            page_size=PAGE_SIZE,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            key_group_size=self.key_group_size,
            value_group_size=self.value_group_size,
            scale_bits=self.scale_bits,
            range_shrink=self.range_shrink,
            value_range_shrink=self.value_range_shrink,
        )

    def layout(
        self, head_size: int, *, prefix_caching: bool = True, rollback_tokens: int = 1, decode_query_len: int = 1
    ) -> CacheLayout:
        """Block format and window for heads of ``head_size`` channels.

        Args:
            prefix_caching, rollback_tokens, decode_query_len: see :class:`~logquant_vllm.core.paged.CacheLayout`.

        Raises:
            ValueError: as :meth:`page_format` does, or if so many tokens cannot be taken back.
        """
        from logquant_vllm.core.paged import CacheLayout

        if self.keep_all_windows and prefix_caching:
            wanted = min(rollback_tokens + self.kept_behind_page, self.window_length)
            rollback_tokens = max(rollback_tokens, wanted)
        return CacheLayout(
            fmt=self.page_format(head_size),
            window_length=self.window_length,
            prefix_replay_tokens=self.replay_tokens,
            prefix_caching=prefix_caching,
            rollback_tokens=rollback_tokens,
            decode_query_len=decode_query_len,
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LogQuantConfig:
        """Settings from a mapping of options; ``preset`` names some of :data:`PRESETS`, which the others override.

        Raises:
            ValueError: with one line per wrong option, naming what was given and what would work.
        """
        given = dict(options)
        preset = given.pop("preset", "k2v2")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"unknown logquant preset {shown(preset)}; the presets are {', '.join(PRESETS)}")
        try:
            return cls.model_validate({**PRESETS[preset], **given})
        except ValidationError as error:
            raise ValueError(_explain(error)) from None

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> LogQuantConfig:
        """Settings from vLLM's ``additional_config``: its key ``logquant``, or the defaults if there is none.

        Raises:
            ValueError: if it is not of the shape ``{"logquant": {...}}``, if a key is nearly ours (others are those of
                other plugins), or as :meth:`from_options` does.
        """
        usage = f"""use --additional-config '{{"{CONFIG_KEY}": {{"window_length": 64}}}}'"""
        if not isinstance(additional_config, dict):
            raise ValueError(f"additional_config must be a JSON object, got {shown(additional_config)}; {usage}")
        for key in additional_config:
            if key != CONFIG_KEY and difflib.SequenceMatcher(None, _plain(key), CONFIG_KEY).ratio() > 0.8:
                raise ValueError(f'{shown(key)} in additional_config is not read: did you mean "{CONFIG_KEY}"? {usage}')
        options = additional_config.get(CONFIG_KEY, {})
        if not isinstance(options, dict):
            raise ValueError(f'"{CONFIG_KEY}" in additional_config must be a JSON object, got {options!r}; {usage}')
        return cls.from_options(options)


def known_options() -> str:
    """All options with their defaults, for error messages: ``window_length (default 64), ...``."""
    return ", ".join(f"{name} (default {field.default})" for name, field in LogQuantConfig.model_fields.items())


def _plain(key: object) -> str:
    """A key without case and punctuation."""
    return "".join(c for c in str(key).lower() if c.isalnum())


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown logquant option {shown(name)}; the options are {known_options()}")
        elif name:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            description = LogQuantConfig.model_fields[name].description if name in LogQuantConfig.model_fields else None
            lines.append(
                f"logquant option {name}: {message}, got {shown(problem['input'])}"
                + (f" ({description})" if description else "")
            )
        else:
            lines.append(f"logquant options: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)
