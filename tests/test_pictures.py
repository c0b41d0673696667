"""Vision-language models with a picture in the prompt, beside vLLM's own cache and transformers.

vLLM reads pictures with torchvision, which the CPU install leaves out: there this is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("torchvision", reason="vLLM reads pictures with torchvision")

from tests.models import LLAMA
from tests.test_engine import VOCABULARY, Engine, distance, mean_kl
from tests.test_mixed import OPTIONS, engine_of

pytestmark = [pytest.mark.server, pytest.mark.slow]

SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"]
IMAGE, _, START, END, LAST = range(VOCABULARY - len(SPECIAL), VOCABULARY)
TOKENS = 4


class Prompt(NamedTuple):
    """Token ids with one picture, or none."""

    ids: list[int]
    picture: Any = None


class Family(NamedTuple):
    """Names of transformers' classes, sizes of the tower that sees, and how positions are spread over channels."""

    config: str
    model: str
    processor: str
    videos: str
    patch_size: int
    vision: dict[str, Any]
    rope: dict[str, Any]


FAMILIES = {
    "Qwen3-VL": Family(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLProcessor",
        "Qwen3VLVideoProcessor",
        16,
        {"num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]},
        {"mrope_section": [12, 10, 10], "mrope_interleaved": True},
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        "Qwen2VLVideoProcessor",
        14,
        {"window_size": 112, "fullatt_block_indexes": [1]},
        {"mrope_section": [8, 12, 12]},
    ),
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def write_processor(path: Path, family: Family) -> Any:
    """The files with which pictures are cut, and a tokenizer of as many words as the model knows.

    Returns:
        What makes patches of a picture.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"t{i}" for i in range(VOCABULARY - len(SPECIAL))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words + SPECIAL)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="t0",
        eos_token=SPECIAL[-1],
        pad_token=SPECIAL[-1],
        additional_special_tokens=SPECIAL,
        model_max_length=8192,
    )
    patches = {"patch_size": family.patch_size, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}
    images = transformers.Qwen2VLImageProcessor(**patches, size=sizes)
    videos = getattr(transformers, family.videos)(**patches)
    getattr(transformers, family.processor)(images, fast, videos).save_pretrained(path)
    return images


def write_vision_model(path: Path, family: Family) -> Any:
    """A small model with random weights; returned as transformers' model."""
    import transformers

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
        text_config={**text, "rope_scaling": {"rope_type": "default", **family.rope}, "eos_token_id": LAST},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
    )
    config.architectures = [family.model]
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(2.0)
    model.save_pretrained(path)
    return model


def expected_of(model: Any, images: Any, prompts: list[Prompt]) -> Iterator[Tensor]:
    """Transformers' log-probabilities of the first token, ``[vocabulary]``."""
    for ids, picture in prompts:
        full, pixels = torch.tensor([ids]), {}
        if picture is not None:
            pixels = images(images=[picture], return_tensors="pt")
            count, at = int(pixels["image_grid_thw"].prod()) // 4, ids.index(IMAGE)
            full = torch.tensor([ids[:at] + [IMAGE] * count + ids[at + 1 :]])
        with torch.inference_mode():
            logits = model(input_ids=full, mm_token_type_ids=(full == IMAGE).int(), **pixels).logits
        yield logits[0, -1].log_softmax(-1)


def ask(engine: Engine, prompts: list[Prompt]) -> tuple[list[Tensor], list[int]]:
    """As ``Engine.ask``, one after the other."""
    answers, cached = [], []
    for ids, picture in prompts:
        asked: Any = {"prompt_token_ids": ids, **({"multi_modal_data": {"image": picture}} if picture else {})}
        (result,) = engine.llm.generate([asked], engine.sampling(TOKENS), use_tqdm=False)
        steps = result.outputs[0].logprobs or []
        answers.append(torch.tensor([[step[i].logprob for i in range(VOCABULARY)] for step in steps]))
        cached.append(result.num_cached_tokens or 0)
    return answers, cached


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures(name: str, tmp_path: Path) -> None:
    """Short, long, and the same text with another picture, which is no hit behind it; then all again."""
    import numpy
    from PIL import Image

    family = FAMILIES[name]
    images, model = write_processor(tmp_path / "model", family), write_vision_model(tmp_path / "model", family)
    one, other = (
        Image.fromarray(numpy.random.default_rng(seed).integers(0, 255, (128, 192, 3), dtype=numpy.uint8))
        for seed in range(2)
    )
    g = torch.Generator().manual_seed(1)
    before, after = (torch.randint(2, IMAGE, (n,), generator=g).tolist() for n in (140, 700))
    start = [*before, START, IMAGE, END]
    texts = [[*start, *after[:40]], [*start, *after], [*start, *after]]
    prompts = [Prompt(ids, picture) for ids, picture in zip(texts, (one, one, other), strict=True)]
    prompts += [Prompt([*after, *before])]
    expected = list(expected_of(model, images, prompts))

    on_gpu = torch.cuda.is_available()
    dtype, rounding = ("bfloat16", 0.2) if on_gpu else ("float32", 1e-3)
    arguments: dict[str, Any] = {"dtype": dtype, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    arguments["skip_tokenizer_init"] = False
    with engine_of(tmp_path / "model", kv_cache_dtype="auto", num_gpu_blocks_override=600, **arguments) as engine:
        own, _ = ask(engine, prompts + prompts)
    options = {"additional_config": {"logquant": OPTIONS}}
    with engine_of(tmp_path / "model", num_gpu_blocks_override=100, **arguments, **options) as engine:
        ours, cached = ask(engine, prompts + prompts)

    kl = [mean_kl([(a[0], b[0])]) for a, b in zip(own, ours, strict=True)]
    pictures, texts_differ = (mean_kl([(own[1][0], own[i][0])]) for i in (2, 3))
    print([f"{x:.0e}" for x in kl], f"{pictures:.0e} {texts_differ:.0e}", cached)
    assert mean_kl([(e, a[0]) for e, a in zip(expected, own, strict=False)]) < pictures / 20
    assert distance(own[:1], ours[:1]) < rounding
    # no more than in a text without a picture
    assert max(kl[1:3]) < min(3 * kl[3], texts_differ / 20) and max(kl[5:7]) < min(3 * kl[7], texts_differ / 20)
    assert cached[2] <= len(before) and cached[5] >= 512 and cached[6] >= 512
