"""Vision-language models with a picture in the prompt, beside vLLM's own cache and transformers.

vLLM reads pictures with torchvision, which the CPU install leaves out: there this is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("torchvision", reason="vLLM reads pictures with torchvision")

from tests.families import FULL, MIXED, SLIDING
from tests.models import LLAMA
from tests.pair import needs_gpu
from tests.test_engine import VOCABULARY, Engine, distance, mean_kl
from tests.test_mixed import OPTIONS, engine_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

TOKENS = 4
FIRST_SPECIAL = VOCABULARY - 8


class Prompt(NamedTuple):
    """Token ids with one picture between them, or none."""

    before: list[int]
    after: list[int]
    picture: Any = None


class Written(NamedTuple):
    """A small model with random weights, written for vLLM."""

    model: Any
    """Transformers'."""
    asked: list[int]
    """What stands for a picture in a prompt."""
    read: Callable[[Any], tuple[list[int], dict[str, Any]]]
    """Of a picture, the tokens that it becomes, and what transformers' model takes of it."""
    image_token: int
    type_ids: str
    """What transformers calls the argument that says which tokens are a picture's."""


class QwenFamily(NamedTuple):
    """Names of transformers' classes, sizes of the tower that sees, and how positions are spread over channels."""

    config: str
    model: str
    processor: str
    videos: str
    patch_size: int
    vision: dict[str, Any]
    rope: dict[str, Any]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def tokenizer_of(special: list[str], **named: str) -> Any:
    """A tokenizer of as many words as the models know, the last of them special."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"t{i}" for i in range(VOCABULARY - len(special))] + special
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="t0",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[word for word in special if word.strip()],
        model_max_length=8192,
        **named,
    )


def save_random(path: Path, model: Any, names: tuple[str, str] | None = None) -> Any:
    """The model with weights as ``tests.models.write_model`` has them, and none of them zero.

    Args:
        names: how weights are called that the public model calls otherwise, and how it does.
    """
    model = model.float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.02) if not weight.any() else weight.mul_(2.0)
    model.save_pretrained(path)
    if names is not None:
        from safetensors.torch import load_file, save_file

        (file,) = path.glob("*.safetensors")
        weights = {n if names[1] in n else n.replace(*names): x for n, x in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    return model


def write_qwen(path: Path, family: QwenFamily) -> Written:
    import transformers

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"]
    image, video, start, end, last = range(VOCABULARY - len(special), VOCABULARY)
    patches = {"patch_size": family.patch_size, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}
    images = transformers.Qwen2VLImageProcessor(**patches, size=sizes)
    videos = getattr(transformers, family.videos)(**patches)
    getattr(transformers, family.processor)(images, tokenizer_of(special), videos).save_pretrained(path)

    text = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type", "torch_dtype")}
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "patch_size": family.patch_size,
        **family.vision,
    }
    config = getattr(transformers, family.config)(
        text_config={**text, "rope_scaling": {"rope_type": "default", **family.rope}, "eos_token_id": last},
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    config.architectures = [family.model]
    torch.manual_seed(0)
    model = save_random(path, getattr(transformers, family.model)(config))

    def read(picture: Any) -> tuple[list[int], dict[str, Any]]:
        pixels = images(images=[picture], return_tensors="pt")
        return [start, *[image] * (int(pixels["image_grid_thw"].prod()) // 4), end], {**pixels}

    return Written(model, [start, image, end], read, image, "mm_token_type_ids")


def write_gemma(path: Path) -> Written:
    """Its pictures' tokens attend to each other in both directions."""
    import transformers

    # vLLM asks for the tokens of line ends, which no text has here
    ends = ["\n" * n for n in range(1, 5)]
    special = ["<start_of_image>", "<end_of_image>", "<image_soft_token>", *ends, "<|endoftext|>"]
    begin, end, image, *_, last = range(VOCABULARY - len(special), VOCABULARY)
    side, count = 112, 64
    named = {"boi_token": special[0], "eoi_token": special[1], "image_token": special[2]}
    tokenizer = tokenizer_of(special, extra_special_tokens=named)
    images = transformers.Gemma3ImageProcessor(size={"height": side, "width": side})
    transformers.Gemma3Processor(images, tokenizer, image_seq_length=count).save_pretrained(path)

    text = {**LLAMA, **MIXED["Gemma 3"], "layer_types": [SLIDING, FULL] * 3, "eos_token_id": last}
    config = transformers.Gemma3Config(
        text_config={key: value for key, value in text.items() if key not in ("architectures", "torch_dtype")},
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": 14,
        },
        mm_tokens_per_image=count,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=image,
        tie_word_embeddings=True,
    )
    config.architectures = ["Gemma3ForConditionalGeneration"]
    torch.manual_seed(0)
    names = "vision_tower.", "vision_tower.vision_model."
    model = save_random(path, transformers.Gemma3ForConditionalGeneration(config), names)

    def read(picture: Any) -> tuple[list[int], dict[str, Any]]:
        pixels = images(images=[picture], return_tensors="pt")
        return [begin, *[image] * count, end], {"pixel_values": pixels["pixel_values"]}

    return Written(model, [begin], read, image, "token_type_ids")


FAMILIES: dict[str, Callable[[Path], Written]] = {
    "Qwen3-VL": partial(
        write_qwen,
        family=QwenFamily(
            "Qwen3VLConfig",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLProcessor",
            "Qwen3VLVideoProcessor",
            16,
            {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]},
            {"mrope_section": [12, 10, 10], "mrope_interleaved": True},
        ),
    ),
    "Qwen2.5-VL": partial(
        write_qwen,
        family=QwenFamily(
            "Qwen2_5_VLConfig",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLProcessor",
            "Qwen2VLVideoProcessor",
            14,
            {"window_size": 112, "fullatt_block_indexes": [1]},
            {"mrope_section": [8, 12, 12]},
        ),
    ),
    "Gemma 3": write_gemma,
}


def expected_of(written: Written, prompts: list[Prompt]) -> Iterator[Tensor]:
    """Transformers' log-probabilities of the first token, ``[vocabulary]``."""
    for before, after, picture in prompts:
        tokens, pixels = ([], {}) if picture is None else written.read(picture)
        full = torch.tensor([[*before, *tokens, *after]])
        types = {written.type_ids: (full == written.image_token).int()}
        with torch.inference_mode():
            logits = written.model(input_ids=full, **types, **pixels).logits
        yield logits[0, -1].log_softmax(-1)


def ask(engine: Engine, written: Written, prompts: list[Prompt]) -> tuple[list[Tensor], list[int]]:
    """As ``Engine.ask``, one after the other."""
    answers, cached = [], []
    for before, after, picture in prompts:
        asked: Any = {"prompt_token_ids": [*before, *(written.asked if picture else ()), *after]}
        asked |= {"multi_modal_data": {"image": picture}} if picture else {}
        (result,) = engine.llm.generate([asked], engine.sampling(TOKENS), use_tqdm=False)
        steps = result.outputs[0].logprobs or []
        answers.append(torch.tensor([[step[i].logprob for i in range(VOCABULARY)] for step in steps]))
        cached.append(result.num_cached_tokens or 0)
    return answers, cached


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[needs_gpu, pytest.mark.gpu] if n == "Gemma 3" else []) for n in FAMILIES]
)
def test_pictures(name: str, tmp_path: Path) -> None:
    """Short, long, and the same text with another picture, which is no hit behind it; then all again."""
    import numpy
    from PIL import Image

    path = tmp_path / "model"
    written = FAMILIES[name](path)
    one, other = (
        Image.fromarray(numpy.random.default_rng(seed).integers(0, 255, (128, 192, 3), dtype=numpy.uint8))
        for seed in range(2)
    )
    g = torch.Generator().manual_seed(1)
    before, after = (torch.randint(2, FIRST_SPECIAL, (n,), generator=g).tolist() for n in (140, 700))
    prompts = [Prompt(before, after[:8], one), Prompt(before, after, one), Prompt(before, after, other)]
    prompts += [Prompt(after, before)]
    expected = list(expected_of(written, prompts))

    on_gpu = torch.cuda.is_available()
    dtype, rounding = ("bfloat16", 0.2) if on_gpu else ("float32", 1e-3)
    arguments: dict[str, Any] = {"dtype": dtype, "limit_mm_per_prompt": {"image": 1}}
    arguments["skip_tokenizer_init"] = False
    with engine_of(path, kv_cache_dtype="auto", num_gpu_blocks_override=600, **arguments) as engine:
        own, _ = ask(engine, written, prompts + prompts)
    options = {"additional_config": {"logquant": OPTIONS | ({"prefix_replay_tokens": 0} if name == "Gemma 3" else {})}}
    with engine_of(path, num_gpu_blocks_override=100, **arguments, **options) as engine:
        ours, cached = ask(engine, written, prompts + prompts)

    kl = [mean_kl([(a[0], b[0])]) for a, b in zip(own, ours, strict=True)]
    pictures, texts_differ = (mean_kl([(own[1][0], own[i][0])]) for i in (2, 3))
    print([f"{x:.0e}" for x in kl], f"{pictures:.0e} {texts_differ:.0e}", cached)
    assert mean_kl([(e, a[0]) for e, a in zip(expected, own, strict=False)]) < pictures / 20
    # a causal mask in our layers alone would make it a fifth of another picture's
    assert distance(own[:1], ours[:1]) < rounding and kl[0] < pictures / 50
    # no more than in a text without a picture
    assert max(kl[1:3]) < min(3 * kl[3], texts_differ / 20) and max(kl[5:7]) < min(3 * kl[7], texts_differ / 20)
    assert cached[2] <= len(before) and cached[5] >= 512 and cached[6] >= 512
