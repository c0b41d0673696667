"""``configs/``: vLLM's own parser takes every file, and the capacities in the comments are the planner's."""

from __future__ import annotations

from typing import Any

import pytest

from logquant_vllm.config import LogQuantConfig
from tests.capacities import CONFIGS, ConfigFile, config_files, updated_file, updated_readme

FILES = config_files()
each_file = pytest.mark.parametrize("file", FILES, ids=[file.path.stem for file in FILES])


@pytest.fixture(scope="module")
def serve_parser() -> Any:
    """The parser of ``vllm serve``."""
    pytest.importorskip("vllm")
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser  # 0.33
    except ImportError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser  # 0.32
    load_general_plugins()  # as vLLM does before it builds the parser: the dtype comes with the plugin
    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


@each_file
def test_vllm_parses_the_file(file: ConfigFile, serve_parser: Any) -> None:
    # the parser only looks for the subcommand; vLLM's main removes it before this parser sees it
    arguments = serve_parser._pull_args_from_config(["serve", "--config", str(file.path)])
    parsed = serve_parser.parse_args(arguments[1:])
    assert parsed.kv_cache_dtype == "logquant"
    assert file.flags["model"] in (parsed.model, parsed.model_tag)
    for key in ("max-model-len", "tensor-parallel-size", "gpu-memory-utilization", "max-num-seqs"):
        assert getattr(parsed, key.replace("-", "_")) == file.flags[key]
    backend = parsed.structured_outputs_config
    assert (backend["backend"] if isinstance(backend, dict) else backend.backend) == "xgrammar"


@each_file
def test_the_options_work(file: ConfigFile) -> None:
    options = file.flags.get("additional-config", {}).get("logquant", {})
    config = LogQuantConfig.from_options(options)
    assert {name: getattr(config, name) for name in options} == options


def test_vllm_refuses_an_unknown_key(tmp_path: Any, serve_parser: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "typing-error.yaml"
    path.write_text(FILES[0].path.read_text() + "max-modle-len: 1\n")
    with pytest.raises(SystemExit):
        serve_parser.parse_args(serve_parser._pull_args_from_config(["serve", "--config", str(path)])[1:])
    assert "max-modle-len" in capsys.readouterr().err


@each_file
def test_the_stated_capacity_is_the_planners(file: ConfigFile) -> None:
    assert file.path.read_text() == updated_file(file), "run python -m tests.capacities"
    assert "# plan: logquant " in file.path.read_text()


def test_the_readmes_table() -> None:
    assert (CONFIGS / "README.md").read_text() == updated_readme(), "run python -m tests.capacities"


@each_file
def test_the_longest_request_fits(file: ConfigFile) -> None:
    assert file.capacities()[-1].fits


@each_file
def test_untested_gpus_are_marked(file: ConfigFile) -> None:
    assert ("tested on Hopper GPUs only" in file.path.read_text()) == (file.gpu not in ("h100", "h200"))
