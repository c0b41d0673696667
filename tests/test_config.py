"""LogQuantConfig: the settings, their errors, and the objects that they make."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from logquant_vllm.config import HEAD_SIZES, PAGE_SIZE, LogQuantConfig


def test_defaults_are_the_measured_format() -> None:
    fmt = LogQuantConfig().page_format(128)
    assert fmt.page_size == PAGE_SIZE == 128
    assert fmt.head_bytes == 9216
    assert fmt.bits_per_element == 2.25


def test_additional_config_without_our_key_gives_the_defaults() -> None:
    assert LogQuantConfig.from_additional_config({}) == LogQuantConfig()
    assert LogQuantConfig.from_additional_config({"another": 1}) == LogQuantConfig()


def test_options_reach_the_layout() -> None:
    config = LogQuantConfig.from_additional_config(
        {"logquant": {"window_length": 128, "key_bits": 4, "key_group_size": 128, "scale_bits": 16, "range_shrink": 1}}
    )
    layout = config.layout(96)
    assert layout.window_length == 128
    assert layout.num_slots == 384
    assert (layout.fmt.head_size, layout.fmt.key_bits, layout.fmt.value_bits) == (96, 4, 2)
    assert (layout.fmt.key_group_size, layout.fmt.scale_bits, layout.fmt.range_shrink) == (128, 16, 1.0)


@pytest.mark.parametrize(
    ("window", "given", "tokens"), [(128, None, 256), (32, None, 128), (128, 0, 0), (128, 7, 7), (128, 640, 640)]
)
def test_replay_tokens(window: int, given: int | None, tokens: int) -> None:
    """By default what follows a hit is in full precision, and a decode step may store after its attention."""
    config = LogQuantConfig(window_length=window, key_group_size=32, prefix_replay_tokens=given)
    layout = config.layout(128)
    assert config.replay_tokens == layout.prefix_replay_tokens == tokens
    assert layout.may_store_last == (tokens >= 128)
    assert config.layout(128, prefix_caching=False).may_store_last, "without prefix hits always"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_len": 64}, ["unknown", "'window_len'", "window_length (default 64)", "rotation"]),
        ({"window_length": 16}, ["window_length", "32", "got 16"]),
        ({"window_length": 4096}, ["window_length", "1024", "got 4096"]),
        ({"window_length": "64"}, ["window_length", "integer", "got '64'"]),
        ({"window_length": True}, ["window_length", "got True"]),
        ({"window_length": 64, "key_group_size": 128}, ["window_length 64", "key_group_size 128", "at least 128"]),
        ({"key_bits": 5}, ["key_bits", "2, 3 or 4", "got 5"]),
        ({"value_group_size": 48}, ["value_group_size", "32, 64 or 128", "got 48"]),
        ({"scale_bits": 4}, ["scale_bits", "8 or 16", "got 4"]),
        ({"range_shrink": 0.2}, ["range_shrink", "0.5", "got 0.2"]),
        ({"range_shrink": float("nan")}, ["range_shrink", "got nan"]),
        ({"value_range_shrink": 1.1}, ["value_range_shrink", "1", "got 1.1"]),
        ({"rotation": 1}, ["rotation", "boolean", "got 1"]),
        (
            {"keep_all_windows": True, "window_length": 32, "key_group_size": 32},
            ["keep_all_windows with window_length 32", "Use a window_length of 64 or more"],
        ),
        ({"prefix_replay_tokens": -1}, ["prefix_replay_tokens", "got -1"]),
        ({"prefix_replay_tokens": 257}, ["prefix_replay_tokens 257", "window_length 64", "Use at most 256"]),
        ({"prefix_replay_tokens": 10**12}, ["prefix_replay_tokens", "Use at most 256"]),
        ({"window_length": "6" * 5000}, ["window_length", "got '66666", "(5002 characters)"]),
        ({"window\n" * 1000: 64}, ["unknown", "window\\nwindow", "characters)"]),
        ({"key_bits": 6, "value_bits": 5}, ["key_bits", "got 6", "value_bits", "got 5"]),
        ({1: 2}, ["got 1"]),
    ],
)
def test_errors_name_the_option_what_was_given_and_what_works(options: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the words are the point
        LogQuantConfig.from_additional_config({"logquant": options})
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message
    assert len(message) < 1500


@pytest.mark.parametrize("window_length", [32, 33, 42, 64, 85, 100, 128, 1000])
def test_most_replay_brings_back_every_copy(window_length: int) -> None:
    """The bound of ``prefix_replay_tokens`` reaches the oldest log-selected copy but token 0 at every length, and a
    window less would not."""
    from logquant_vllm.core.log_selection import log_selected_positions, selected_chunks

    most = (selected_chunks(window_length) + 2) * window_length
    config = LogQuantConfig(window_length=window_length, key_group_size=32, prefix_replay_tokens=most)
    lengths = range(3 * window_length, 2 * most + 1, 1 if window_length < 100 else 31)
    reach = max(n - min(p for p in log_selected_positions(n, window_length) if p > 0) for n in [*lengths, 2 * most - 1])
    assert most - window_length < reach <= config.replay_tokens


@pytest.mark.parametrize(
    "key",
    ["LOGQUANT", "LogQuant", "log-quant", "log_quant", " logquant", "logqant", "logquants", "loqquant", "logquan"],
)
def test_keys_that_are_nearly_ours(key: str) -> None:
    for config in ({key: {"window_length": 128}}, {"logquant": {}, key: {}}):
        with pytest.raises(ValueError, match='did you mean "logquant"') as caught:
            LogQuantConfig.from_additional_config(config)
        assert repr(key) in str(caught.value)


@pytest.mark.parametrize("key", ["quant", "log", "logging", "turboquant", "compressed", "q", "", 7, "ascend_scheduler"])
def test_keys_of_others(key: Any) -> None:
    assert LogQuantConfig.from_additional_config({key: 1, "logquant": {}}) == LogQuantConfig()


@pytest.mark.parametrize("additional_config", [None, [], "logquant", 3])
def test_additional_config_must_be_an_object(additional_config: Any) -> None:
    with pytest.raises(ValueError, match="additional_config must be a JSON object, got"):
        LogQuantConfig.from_additional_config(additional_config)


@pytest.mark.parametrize("value", [None, [64], "64"])
def test_our_part_must_be_an_object(value: Any) -> None:
    with pytest.raises(ValueError, match="must be a JSON object, got"):
        LogQuantConfig.from_additional_config({"logquant": value})


def test_frozen_and_hashable() -> None:
    config = LogQuantConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.window_length = 128  # type: ignore[misc]
    assert hash(config) == hash(LogQuantConfig())


def test_head_sizes() -> None:
    from logquant_vllm.core.hadamard import supports_rotation

    for head_size in HEAD_SIZES:
        assert LogQuantConfig().page_format(head_size).head_size == head_size
        assert supports_rotation(head_size)
    with pytest.raises(
        ValueError, match=r"head size 112 is not supported; supported are 64, 80, 96, 128, 160, 192, 256, 512"
    ):
        LogQuantConfig().page_format(112)


def test_reading_settings_does_not_import_torch() -> None:
    code = "import sys, logquant_vllm.config, logquant_vllm.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_presets() -> None:
    assert LogQuantConfig.from_options({"preset": "k4v2"}) == LogQuantConfig(key_bits=4)
    assert LogQuantConfig.from_options({"preset": "k4v2", "key_bits": 2}) == LogQuantConfig()
    with pytest.raises(ValueError, match=r"unknown logquant preset 'k3'; the presets are k2v2, k3v2, k3v3, k4v2, k4v4"):
        LogQuantConfig.from_options({"preset": "k3"})
    with pytest.raises(ValueError, match=r"preset \[\]"):
        LogQuantConfig.from_options({"preset": []})
