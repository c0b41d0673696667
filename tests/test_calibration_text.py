"""What a model is measured on, and the name under which that is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from logquant_vllm import calibration
from logquant_vllm.calibration import text
from logquant_vllm.cli.models import DEMO_MODEL
from logquant_vllm.config import LogQuantConfig


class Words:
    """A tokenizer: a token is a word, and a chat has 1 before and 2 after each turn."""

    def encode(self, content: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [len(word) for word in content.split()]

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return " ".join(f"< {turn['content']} >>" for turn in messages)


class NoChats(Words):
    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("no chat template")


def test_the_packages_text() -> None:
    """Something of everything, and about as much as is read of it."""
    documents = text.documents(None)
    chats = [document for document in documents if not isinstance(document, str)]
    assert len(chats) == 2 and all({turn["role"] for turn in chat} >= {"user", "assistant"} for chat in chats)
    everything = "".join(document for document in documents if isinstance(document, str))
    for sample in ("lighthouse", "Schaffner", "лодка", "照相馆", "السوق", "\\binom", "SELECT", '"openapi"', "heapq"):
        assert sample in everything
    assert 40_000 < sum(len(json.dumps(document, ensure_ascii=False)) for document in documents) < 60_000


def test_sequences_take_the_beginning_of_everything_first() -> None:
    long, short, chat = "word " * 700, "word " * 299, [{"role": "user", "content": "word " * 300}]
    found = text.sequences([long, short, chat], Words(), longest=300, tokens=1250)
    assert [len(ids) for ids in found] == [300, 300, 300, 300]  # what is left of each is too short, or of the tokens
    assert found[2][0] == 1 and found[0][0] == 0
    assert found == text.sequences([long, short, chat], Words(), longest=300, tokens=1250)
    assert [len(ids) for ids in text.sequences([long], Words(), tokens=400)] == [400]
    with pytest.raises(ValueError, match="the text is too short: no part of it has 256 tokens"):
        text.sequences(["word " * 200] * 10, Words())
    with pytest.raises(ValueError, match="too short"):
        text.sequences([long], Words(), longest=200)


def test_a_model_without_a_chat_template() -> None:
    chat = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    assert text.token_ids(chat, Words()) == [1, 3, 3, 2, 1, 5, 2]
    assert text.token_ids(chat, NoChats()) == [0, 5, 3, 3, 10, 5]


def test_recorded_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hello", "name": "x"}]
    path.write_text(f'{json.dumps({"messages": chat, "model": "m"})}\n\n{{"prompt": "p"}}\n{{"text": "t"}}\n')
    assert text.documents(str(path)) == [[{"role": "user", "content": "Hello"}], "p", "t"]


def test_records_in_files_of_other_programs(tmp_path: Path) -> None:
    """JSON lets a string hold what Unicode calls the end of a line, and some editors begin a file with a mark."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n{"prompt": "p"}\n'.encode())
    assert text.documents(str(path)) == ["a\u2028b\x85c", "p"]


def test_no_more_is_tokenized_than_may_be_run() -> None:
    """A text of gigabytes is not a reason to start for an hour."""

    class Counting(Words):
        characters = 0

        def encode(self, content: str, add_special_tokens: bool = True) -> list[int]:
            self.characters += len(content)
            return super().encode(content, add_special_tokens)

    for documents in (["word " * 1_000_000], ["word " * 300] * 10_000):
        tokenizer = Counting()
        found = text.sequences(documents, tokenizer, longest=300, tokens=1000)
        assert sum(map(len, found)) == 900 and tokenizer.characters <= text.CHARACTERS * 1000


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.txt", None, "cannot read the calibration text '.*x.txt': .*No such file"),
        ("x.txt", b"\xff\xfe\xff", "cannot read the calibration text '.*x.txt': .*codec can't decode"),
        (".", None, "cannot read the calibration text .*Is a directory"),
        ("x\0", None, "cannot read the calibration text .*null"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 5}', "x.jsonl', line 2: {'text': 5} is no record: it needs \"messages\""),
        ("x.jsonl", b"text", "x.jsonl', line 1: Expecting value"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl', line 1: "),
        ("x.jsonl", b'{"messages": [{"role": "user", "content": [1]}]}', "line 1: .* is no record"),
        ("x.jsonl", b'{"messages": "a"}', "line 1: .* is no record"),
        ("x.jsonl", b"3", "line 1: 3 is no record"),
    ],
)
def test_a_text_that_cannot_be_used(name: str, content: bytes | None, problem: str, tmp_path: Path) -> None:
    """Named when the engine is configured, by the command line as well."""
    path = f"{tmp_path}/{name}"
    if content is not None:
        Path(path).write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        calibration.find(LogQuantConfig(calibration_text=path), "a/model")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("options", [{"calibration": None}, {"calibration": "x"}, {"rotation": False}])
def test_a_text_is_for_measuring(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="calibration_text is what a calibration is measured on"):
        LogQuantConfig.from_options({"calibration_text": "x", **options})


def test_what_is_kept_follows_from_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (model / calibration.FILE_NAME).unlink()
    config = LogQuantConfig()
    name = calibration.measured_path(config, str(model))
    assert name.parent == tmp_path / "cache" / "logquant" and calibration.is_measured(name)

    copied = shutil.copytree(model, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    (copied / "README.md").write_text("The same weights.")
    assert calibration.measured_path(config, str(copied)) == name
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    assert calibration.measured_path(config, "someone/model") == name

    words = tmp_path / "words.txt"
    words.write_text("Other text.")
    others = [
        calibration.measured_path(config, str(model), changes="fp8"),
        calibration.measured_path(LogQuantConfig(calibration_text=str(words)), str(model)),
        calibration.measured_path(LogQuantConfig(window_length=128), str(model)),
        calibration.measured_path(LogQuantConfig(key_group_size=32), str(model)),
        calibration.measured_path(config, "someone/else"),
        calibration.measured_path(config, "someone/else", "old"),
        calibration.measured_path(config, str(model), device="cpu"),  # of which less is read there
    ]
    for file in (copied / "config.json", next(copied.glob("*.safetensors"))):
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        others.append(calibration.measured_path(config, str(copied)))
    weights = load_file(next(model.glob("*.safetensors")))
    for changed in ("model.layers.1.self_attn.q_proj.weight", "model.layers.5.self_attn.v_proj.weight"):
        # as of a merged adapter
        save_file(
            {key: 0 * x if key == changed else x for key, x in weights.items()}, next(copied.glob("*.safetensors"))
        )
        others.append(calibration.measured_path(config, str(copied)))
    assert len({name, *others}) == 1 + len(others)
    own = LogQuantConfig(calibration_text=str(words))
    assert calibration.measured_path(own, str(model), device="cpu") == calibration.measured_path(own, str(model))
    # how keys are stored does not change what is measured
    assert calibration.measured_path(LogQuantConfig(key_bits=4, range_shrink=0.8), str(model)) == name


def test_a_measured_one_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    measured, beside = calibration.measured_path(LogQuantConfig(), str(model)), model / calibration.FILE_NAME
    assert calibration.find(LogQuantConfig(), str(model)) is None
    measured.parent.mkdir(parents=True)
    measured.write_bytes(b"")
    assert calibration.find(LogQuantConfig(), str(model)) == measured
    assert calibration.find(LogQuantConfig(calibration=None), str(model)) is None
    assert calibration.find(LogQuantConfig(rotation=False), str(model)) is None
    beside.write_bytes(b"")
    assert calibration.find(LogQuantConfig(), str(model)) == beside
