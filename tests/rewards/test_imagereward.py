"""ImageReward: made-up weights under the published names, loaded by the reward, against the same sums by hand."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import BertTokenizer

from rlkit import registry
from rlkit.errors import RewardError
from rlkit.rewards import imagereward
from rlkit.rewards.imagereward import ImageReward
from rlkit.types import Unscored

CPU = torch.device("cpu")
PUBLISHED = (imagereward.VISION, imagereward.TEXT, imagereward.VOCABULARY)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "on", "the", "mat", "[", "]", "sep", "mask", "dog"]
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SEEN = "blip.visual_encoder."
READ = "blip.text_encoder."


def shapes() -> dict[str, tuple[int, ...]]:
    """The names of the published file, with the sizes of a tiny network."""
    v, t = VISION["hidden_size"], TEXT["hidden_size"]
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, wide: int, narrow: int) -> None:
        found.update({f"{name}.weight": (wide, narrow), f"{name}.bias": (wide,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    found[f"{SEEN}cls_token"] = (1, 1, v)
    found[f"{SEEN}pos_embed"] = (1, 197, v)
    found |= {f"{SEEN}patch_embed.proj.weight": (v, 3, 16, 16), f"{SEEN}patch_embed.proj.bias": (v,)}
    for block in (f"{SEEN}blocks.{i}" for i in range(2)):
        norm(f"{block}.norm1", v)
        linear(f"{block}.attn.qkv", 3 * v, v)
        linear(f"{block}.attn.proj", v, v)
        norm(f"{block}.norm2", v)
        linear(f"{block}.mlp.fc1", 40, v)
        linear(f"{block}.mlp.fc2", v, 40)
    norm(f"{SEEN}norm", v)
    found[f"{READ}embeddings.word_embeddings.weight"] = (len(WORDS) + 2, t)
    found[f"{READ}embeddings.position_embeddings.weight"] = (512, t)
    norm(f"{READ}embeddings.LayerNorm", t)
    for layer in (f"{READ}encoder.layer.{i}" for i in range(2)):
        for part, other in (("attention", t), ("crossattention", v)):
            linear(f"{layer}.{part}.self.query", t, t)
            linear(f"{layer}.{part}.self.key", t, other)
            linear(f"{layer}.{part}.self.value", t, other)
            linear(f"{layer}.{part}.output.dense", t, t)
            norm(f"{layer}.{part}.output.LayerNorm", t)
        linear(f"{layer}.intermediate.dense", 32, t)
        linear(f"{layer}.output.dense", t, 32)
        norm(f"{layer}.output.LayerNorm", t)
    for place, (wide, narrow) in {0: (1024, t), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        linear(f"mlp.layers.{place}", wide, narrow)
    return found


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    for name, tensor in state.items():
        if tensor.ndim == 2 and "embeddings" not in name:
            tensor /= math.sqrt(tensor.shape[1])
        if "patch_embed" in name or name.endswith(("cls_token", "pos_embed")):
            tensor /= 1000  # small enough for the least variance of the norms to be seen
    unused = {f"blip.{one}_proj.{kind}": torch.zeros(1) for one in ("vision", "text") for kind in ("weight", "bias")}
    return state | unused | {f"{READ}embeddings.position_ids": torch.arange(512)[None]}


def by_hand(state: dict[str, Tensor], tokens: list[int], pixels: Tensor) -> float:
    """One sample, without padding. pixels: [3, 224, 224], normalised."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str, least: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + least).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        parts = []
        for q, k, v in zip(*(one.chunk(heads, dim=-1) for one in (query, key, value)), strict=True):
            parts.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v)
        return torch.cat(parts, dim=-1)

    patches = pixels.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(196, -1)  # row by row
    seen = patches @ state[f"{SEEN}patch_embed.proj.weight"].flatten(1).T + state[f"{SEEN}patch_embed.proj.bias"]
    seen = torch.cat([state[f"{SEEN}cls_token"][0], seen]) + state[f"{SEEN}pos_embed"][0]
    for block in (f"{SEEN}blocks.{i}" for i in range(2)):
        qkv = linear(norm(seen, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
        seen = seen + linear(attend(*qkv.chunk(3, dim=-1), heads=2), f"{block}.attn.proj")
        inner = functional.gelu(linear(norm(seen, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        seen = seen + linear(inner, f"{block}.mlp.fc2")
    seen = norm(seen, f"{SEEN}norm", 1e-6)

    read = state[f"{READ}embeddings.word_embeddings.weight"][tokens]
    read = read + state[f"{READ}embeddings.position_embeddings.weight"][: len(tokens)]
    read = norm(read, f"{READ}embeddings.LayerNorm", 1e-12)
    for layer in (f"{READ}encoder.layer.{i}" for i in range(2)):
        for part, other in (("attention", None), ("crossattention", seen)):
            name = f"{layer}.{part}"
            over = read if other is None else other
            key, value = linear(over, f"{name}.self.key"), linear(over, f"{name}.self.value")
            query = linear(read, f"{name}.self.query")
            out = linear(attend(query, key, value, heads=4), f"{name}.output.dense")
            read = norm(read + out, f"{name}.output.LayerNorm", 1e-12)
        inner = functional.gelu(linear(read, f"{layer}.intermediate.dense"))
        read = norm(read + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    number = read[0]
    for place in (0, 2, 4, 6, 7):
        number = linear(number, f"mlp.layers.{place}")
    return (float(number) - 0.16717362830052426) / 1.0333394966054072


def preprocessed(picture: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """[3, 224, 224]. size: (width, height) after resizing; corner: (left, top) of the middle square."""
    bytes_ = (picture.movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    resized = np.asarray(Image.fromarray(bytes_).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    left, top = corner
    square = resized[top : top + 224, left : left + 224] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor((square - mean) / std, dtype=torch.float32).movedim(-1, 0)


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagereward, "VISION", VISION)
        patch.setattr(imagereward, "TEXT", TEXT)
        patch.setattr(imagereward, "VOCABULARY", len(WORDS) + 2)
        yield


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    folder = tmp_path_factory.mktemp("imagereward")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.save(weights(), folder / "ImageReward.pt")
    return ImageReward(str(folder / "ImageReward.pt"), str(folder))


@pytest.fixture(scope="module")
def scorer(reward: ImageReward) -> Any:
    return reward.load(CPU)


def noise(n: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    pixels = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return pixels / 255


@pytest.mark.parametrize(
    ("shape", "size", "corner"),
    [
        ((224, 224), (224, 224), (0, 0)),
        ((40, 40), (224, 224), (0, 0)),
        ((37, 91), (550, 224), (163, 0)),  # 224 * 91 / 37 is 550.9, cut to 550
        ((300, 200), (224, 336), (0, 56)),
        ((200, 201), (225, 224), (0, 0)),  # .5 is rounded to even
        ((67, 68), (227, 224), (2, 0)),  # as is 1.5
    ],
)
def test_the_value_is_that_of_the_published_network(
    shape: tuple[int, int], size: tuple[int, int], corner: tuple[int, int], scorer: Any, samples_of: Callable[..., Any]
) -> None:
    picture = noise(1, *shape)
    (value,) = scorer(samples_of(picture, ["a Cat on the mat"]))
    expected = by_hand(weights(), [2, 5, 6, 7, 8, 9, 3], preprocessed(picture[0], size, corner))
    assert value == pytest.approx(expected, abs=1e-4)


def test_neither_batch_nor_order_counts(scorer: Any, samples_of: Callable[..., Any]) -> None:
    texts = ["a cat", "the dog on the mat on the mat on the mat", "a dog", "a cat"]
    media = noise(4)
    together = scorer(samples_of(media, texts))
    alone = [scorer(samples_of(media[row : row + 1], [text]))[0] for row, text in enumerate(texts)]
    assert together == pytest.approx(alone, abs=1e-5)
    assert scorer(samples_of(media.flip(0), texts[::-1]))[::-1] == pytest.approx(together, abs=1e-5)
    assert abs(together[0] - together[3]) > 1e-3  # another picture
    assert len({round(scorer(samples_of(media[:1], [text]))[0], 4) for text in texts}) == 3  # another text


def test_35_tokens_are_read_and_the_cut_is_told_once(
    scorer: Any, samples_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    fits, longer, other = " ".join(["cat"] * 33), " ".join(["cat"] * 33 + ["dog"]), " ".join(["cat"] * 34)
    media = noise(1).repeat(3, 1, 1, 1)
    with caplog.at_level(logging.WARNING, logger="rlkit.rewards.imagereward"):
        values = scorer(samples_of(media, [fits, longer, other]))
        scorer(samples_of(media, [longer, longer, fits]))
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [repr(longer), repr(other)]
    expected = by_hand(weights(), [2, *[6] * 33, 3], preprocessed(media[0], (224, 224), (0, 0)))
    assert values[0] == pytest.approx(expected, abs=1e-4)


def test_a_prompt_that_reads_like_special_tokens_is_text(scorer: Any, samples_of: Callable[..., Any]) -> None:
    tokens, cut = scorer.words("a [SEP] cat [MASK]")
    spelled = [WORDS.index(word) for word in ("a", "[", "sep", "]", "cat", "[", "mask", "]")]
    assert tokens == [2, *spelled, 3] + [0] * (35 - len(spelled) - 2)
    assert not cut
    text, plain = scorer(samples_of(noise(1).repeat(2, 1, 1, 1), ["a [SEP] cat", "a cat"]))
    assert abs(text - plain) > 1e-4


def test_every_text_is_encoded_once(
    scorer: Any, samples_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counting(text: str) -> tuple[list[int], bool]:
        asked.append(text)
        return scorer.words(text)

    replace(scorer, words=counting)(samples_of(noise(3), ["a cat", "a dog", "a cat"]))
    assert asked == ["a cat", "a dog"]


def test_a_sample_that_fails_costs_itself_only(scorer: Any, samples_of: Callable[..., Any]) -> None:
    media = noise(4)
    broken = media.clone()
    broken[1, 0, 0, 0] = torch.nan
    values = scorer(samples_of(broken, ["a cat", "a cat", " \n", ""]))
    assert values[0] == pytest.approx(scorer(samples_of(media[:1], ["a cat"]))[0], abs=1e-5)
    assert isinstance(values[1], Unscored)
    assert "NaN" in values[1].reason
    assert values[2:] == [Unscored("the prompt is empty")] * 2


def test_nothing_to_score(scorer: Any, samples_of: Callable[..., Any]) -> None:
    assert scorer(samples_of(torch.zeros(0, 3, 8, 8), [])) == []
    (value,) = scorer(samples_of(torch.zeros(1, 1, 8, 8), ["a cat"]))  # one channel is no picture
    assert isinstance(value, Unscored)
    assert "[3, H, W]" in value.reason


def test_grey_low_precision_and_gradients(scorer: Any, samples_of: Callable[..., Any]) -> None:
    grey = torch.full((1, 3, 1, 9), 128 / 255)
    kinds = (grey, grey.bfloat16(), grey.clone().requires_grad_(), grey + 1e-3)
    values = [scorer(samples_of(media, ["a cat"]))[0] for media in kinds]
    assert values == [values[0]] * 4  # all are the same bytes
    assert math.isfinite(values[0])


def test_it_is_loaded_for_looking_only(scorer: Any, samples_of: Callable[..., Any]) -> None:
    assert not any(module.training for module in scorer.network.modules())  # no dropout
    assert not any(parameter.requires_grad for parameter in scorer.network.parameters())
    samples = samples_of(noise(1), ["a cat"])
    assert scorer(samples) == scorer(samples)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp.layers.7.bias"), r'Missing key\(s\).*"head.7.bias"'),
        (lambda s: s.pop(f"{SEEN}pos_embed"), r'Missing key\(s\).*"vision.embeddings.position_embedding"'),
        (lambda s: s.update({f"{SEEN}blocks.2.norm1.bias": torch.zeros(24)}), r"Unexpected.*vision.encoder.layers.2"),
        (lambda s: s.update({"blip.itm_head.bias": torch.zeros(2)}), r'Unexpected.*"blip.itm_head.bias"'),
        (lambda s: s.update({f"{SEEN}norm.bias": torch.zeros(25)}), r"size mismatch for vision.post_layernorm.bias"),
        (lambda s: s.update({"mlp.layers.2.weight": torch.zeros(64, 1024)}), r"size mismatch for head.2.weight"),
        (lambda s: s.update({"epoch": 3}), r'Unexpected.*"epoch"'),
        (lambda s: s.update({"net": torch.nn.Linear}), "(?i)weights.only"),  # a pickled class is not executed
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Any]], Any], message: str, reward: ImageReward, tmp_path: Path
) -> None:
    state: dict[str, Any] = weights()
    change(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=f"(?s){message}"):
        replace(reward, weights=str(tmp_path / "other.pt")).load(CPU)


def test_weights_that_are_not_there(reward: ImageReward, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"cannot read .*lost\.pt"):
        replace(reward, weights=str(tmp_path / "lost.pt")).load(CPU)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(RewardError, match="does not hold the weights of ImageReward"):
        replace(reward, weights=str(tmp_path / "empty.pt")).load(CPU)


def test_a_tokenizer_of_another_size(reward: ImageReward, tmp_path: Path) -> None:
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS[:-1])}).save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="the tokenizer has 14 tokens and should have 15"):
        replace(reward, tokenizer=str(tmp_path)).load(CPU)


def test_the_card() -> None:
    (entry,) = [one for one in registry.describe("rewards") if one.name == "imagereward"]
    assert entry.constants["reads"] == ("prompt",)
    assert entry.summary.endswith(".")
    assert all(option.doc for option in entry.fields)
    assert registry.load("rewards", "imagereward") is ImageReward


def test_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("VISION", "TEXT", "VOCABULARY"), PUBLISHED, strict=True):
        monkeypatch.setattr(imagereward, name, value)
    with torch.device("meta"):
        network = imagereward._Network()
    assert sum(parameter.numel() for parameter in network.parameters()) == 446_206_689
    assert network.vision.config.num_attention_heads == 16
    assert network.text.config.num_attention_heads == 12
    assert network.text.embeddings.word_embeddings.weight.shape == (30524, 768)
