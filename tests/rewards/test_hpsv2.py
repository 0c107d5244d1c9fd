"""HPS v2: an open_clip state dict in a CLIPModel says what plain torch says of the same weights."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from rlkit.errors import RewardError
from rlkit.rewards import hpsv2
from rlkit.rewards.hpsv2 import HpsV2, Shape, Tower, config_of
from rlkit.types import Samples, Unscored

CPU = torch.device("cpu")
TINY = Shape(24, Tower(32, 2, 4, 64), Tower(20, 3, 2, 40), picture=32, patch=8, words=10, tokens=8)
IDS = {"ab c": [0, 1, 5, 6, 9], "c": [0, 6, 9]}


def state(shape: Shape) -> dict[str, Tensor]:
    """A random state dict with open_clip's names and shapes. Biases and norms are random too."""
    draw = torch.Generator().manual_seed(0)

    def some(*size: int) -> Tensor:
        return 0.3 * torch.randn(*size, generator=draw)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + some(width), f"{name}.bias": some(width)}

    def linear(name: str, to: int, of: int) -> dict[str, Tensor]:
        return {f"{name}.weight": some(to, of), f"{name}.bias": some(to)}

    def blocks(prefix: str, tower: Tower) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in range(tower.layers):
            at, d = f"{prefix}transformer.resblocks.{layer}", tower.width
            found |= {f"{at}.attn.in_proj_weight": some(3 * d, d), f"{at}.attn.in_proj_bias": some(3 * d)}
            found |= norm(f"{at}.ln_1", d) | norm(f"{at}.ln_2", d) | linear(f"{at}.attn.out_proj", d, d)
            found |= linear(f"{at}.mlp.c_fc", tower.inner, d) | linear(f"{at}.mlp.c_proj", d, tower.inner)
        return found

    seen, texts = shape.pictures.width, shape.texts.width
    patches = (shape.picture // shape.patch) ** 2
    return {
        "positional_embedding": some(shape.tokens, texts),
        "text_projection": some(texts, shape.embedding),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": some(seen),
        "visual.positional_embedding": some(patches + 1, seen),
        "visual.proj": some(seen, shape.embedding),
        "visual.conv1.weight": some(seen, 3, shape.patch, shape.patch),
        "token_embedding.weight": some(shape.words, texts),
        **norm("visual.ln_pre", seen),
        **norm("visual.ln_post", seen),
        **norm("ln_final", texts),
        **blocks("visual.", shape.pictures),
        **blocks("", shape.texts),
    }


def transformer(x: Tensor, weights: dict[str, Tensor], prefix: str, tower: Tower, causal: bool) -> Tensor:
    """[N, L, D] -> [N, L, D], written from the description of open_clip's pre-norm blocks."""
    n, length, d = x.shape
    mask = torch.full((length, length), -math.inf).triu(1) if causal else torch.zeros(length, length)
    for layer in range(tower.layers):

        def of(name: str, layer: int = layer) -> tuple[Tensor, Tensor]:
            at = f"{prefix}transformer.resblocks.{layer}.{name}"
            return weights[f"{at}.weight"], weights[f"{at}.bias"]

        at = f"{prefix}transformer.resblocks.{layer}.attn.in_proj_"
        fused = functional.layer_norm(x, (d,), *of("ln_1")) @ weights[f"{at}weight"].T + weights[f"{at}bias"]
        parts = fused.reshape(n, length, 3, tower.heads, d // tower.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # [N, heads, L, D / heads] each
        seen = (q @ k.transpose(-1, -2) / math.sqrt(d // tower.heads) + mask).softmax(-1) @ v
        x = x + functional.linear(seen.transpose(1, 2).reshape(n, length, d), *of("attn.out_proj"))
        inner = functional.linear(functional.layer_norm(x, (d,), *of("ln_2")), *of("mlp.c_fc"))
        x = x + functional.linear(functional.gelu(inner), *of("mlp.c_proj"))
    return x


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def picture_vectors(pixels: Tensor, weights: dict[str, Tensor]) -> Tensor:
    patches = functional.conv2d(pixels, weights["visual.conv1.weight"], stride=TINY.patch).flatten(2).transpose(1, 2)
    first = weights["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + weights["visual.positional_embedding"]
    x = transformer(norm(x, weights, "visual.ln_pre"), weights, "visual.", TINY.pictures, causal=False)
    return functional.normalize(norm(x[:, 0], weights, "visual.ln_post") @ weights["visual.proj"], dim=-1)


def text_vectors(texts: list[str], weights: dict[str, Tensor]) -> Tensor:
    """Padded with noughts to the full length, and read where the largest number stands, as open_clip does."""
    ids = torch.tensor([IDS[text] + [0] * (TINY.tokens - len(IDS[text])) for text in texts])
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
    x = norm(transformer(x, weights, "", TINY.texts, causal=True), weights, "ln_final")
    return functional.normalize(x[torch.arange(len(ids)), ids.argmax(1)] @ weights["text_projection"], dim=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hps")
    torch.save({"state_dict": state(TINY), "epoch": 1}, place / "hps.pt")
    vocabulary = {"<|startoftext|>": 0, "a": 1, "b": 2, "c": 3, "a</w>": 4, "b</w>": 5, "c</w>": 6, "<|endoftext|>": 9}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(place)
    return place


@pytest.fixture
def reward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> HpsV2:
    monkeypatch.setattr(hpsv2, "VIT_H", TINY)
    return HpsV2(str(folder / "hps.pt"), str(folder))


@pytest.fixture
def samples(samples_of: Callable[..., Samples]) -> Samples:
    media = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(1)) / 255
    return samples_of(media, ["ab c", "c", "c", "ab c"])


def test_values_are_the_plain_cosines_of_the_same_weights(reward: HpsV2, samples: Samples) -> None:
    mean, std = (torch.tensor(one)[:, None, None] for one in (hpsv2.MEAN, hpsv2.STD))
    weights = state(TINY)
    pictures = picture_vectors((samples.media - mean) / std, weights)
    expected = (pictures * text_vectors([prompt.text for prompt in samples.prompts], weights)).sum(1)
    values, parts = reward.load(CPU)(samples)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01
    assert parts["truncated"].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("size", "inside"), [((16, 32), (slice(8, 24), slice(0, 32))), ((32, 11), (slice(0, 32), slice(10, 21)))]
)
def test_a_picture_keeps_its_shape_on_black(
    reward: HpsV2, samples_of: Callable[..., Samples], size: tuple[int, int], inside: tuple[slice, slice]
) -> None:
    media = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    padded = torch.zeros(2, 3, 32, 32)
    padded[:, :, inside[0], inside[1]] = media
    scorer = reward.load(CPU)
    torch.testing.assert_close(
        scorer(samples_of(media, ["c", "c"]))[0], scorer(samples_of(padded, ["c", "c"]))[0], atol=1e-5, rtol=0
    )


def test_a_sample_alone_is_what_it_is_among_others(reward: HpsV2, samples: Samples) -> None:
    scorer = reward.load(CPU)
    together = scorer(samples)[0]
    alone = torch.cat([scorer(samples.select(torch.tensor([row])))[0] for row in range(4)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_empty_prompts_are_not_scored_and_long_ones_are_counted(
    reward: HpsV2, samples_of: Callable[..., Samples]
) -> None:
    scorer = reward.load(CPU)
    values, parts = scorer(samples_of(torch.rand(3, 3, 40, 24), ["", "c", "abcabcabc"]))
    assert [isinstance(value, Unscored) for value in values] == [True, False, False]
    assert parts["truncated"][1:].tolist() == [0, 1]
    assert len(scorer(samples_of(torch.zeros(0, 3, 8, 8), []))[0]) == 0


def test_it_has_a_gradient(reward: HpsV2, samples: Samples) -> None:
    media = samples.media.clone().requires_grad_()
    values, _ = reward.load(CPU)(Samples(**{**vars(samples), "media": media}))
    values.sum().backward()
    assert media.grad is not None
    assert media.grad.isfinite().all()
    assert media.grad.flatten(1).norm(dim=1).min() > 1e-4


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("visual.ln_pre.bias", None, "vision_model.pre_layrnorm.bias is missing"),
        ("transformer.resblocks.1.attn.in_proj_bias", None, "self_attn.q_proj.bias is missing"),
        ("transformer.resblocks.3.ln_1.bias", torch.zeros(20), "transformer.resblocks.3.ln_1.bias is not known"),
        ("visual.proj", torch.zeros(24, 32), r"visual_projection.weight is \[32, 24\], not \[24, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    reward: HpsV2, tmp_path: Path, name: str, tensor: Tensor | None, says: str
) -> None:
    changed = {**state(TINY), name: tensor}
    torch.save({key: value for key, value in changed.items() if value is not None}, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=says):
        HpsV2(str(tmp_path / "other.pt"), reward.tokenizer).load(CPU)


def test_the_real_shape_has_as_many_weights_as_vit_h_14() -> None:
    with torch.device("meta"):
        network = CLIPModel(config_of(hpsv2.VIT_H))
    assert sum(one.numel() for one in network.parameters()) == 986_109_441  # as open_clip counts them
    assert network.config.text_config.eos_token_id == 49407


def test_options() -> None:
    with pytest.raises(ValueError, match="dtype"):
        HpsV2(dtype="fp16")
    assert HpsV2().weights.endswith("HPS_v2.1_compressed.pt")
