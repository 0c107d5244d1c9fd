"""Reconstruction: cosines with the source picture, in four encoders of the real classes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel

from rlkit.rewards.reconstruction import Reconstruction
from rlkit.types import Prompt, Samples, Unscored
from rlkit.world import grammar, scenes

CPU = torch.device("cpu")
NAMES = ("clip", "longclip", "dinov2", "dinov3")
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIDE = 28  # a multiple of every patch


def network(name: str) -> Any:
    if name == "dinov2":
        return Dinov2Model(Dinov2Config(**TINY, mlp_ratio=2, image_size=SIDE, patch_size=14))
    if name == "dinov3":
        return DINOv3ViTModel(DINOv3ViTConfig(**TINY, intermediate_size=48, image_size=SIDE, patch_size=14))
    texts = {
        **TINY,
        "intermediate_size": 48,
        "vocab_size": 10,
        "max_position_embeddings": 248 if name == "longclip" else 77,
    }
    seen = {**TINY, "intermediate_size": 48, "image_size": SIDE, "patch_size": 14}
    return CLIPModel(CLIPConfig(text_config=texts, vision_config=seen, projection_dim=24))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    config = {"size": SIDE, "crop_size": SIDE, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    for name in NAMES:
        network(name).save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(config))
    return {f"{name}_path": str(folder / name) for name in NAMES}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def asked(samples_of: Callable[..., Samples], media: Tensor, sources: list[Tensor | None]) -> Samples:
    return samples_of(media, [Prompt(row, "", source=source) for row, source in enumerate(sources)])


def test_values_are_the_mean_of_the_encoders_cosines(
    places: dict[str, str], samples_of: Callable[..., Samples]
) -> None:
    media, sources = noise(3, 3, SIDE, SIDE), noise(3, 3, SIDE, SIDE, seed=1)
    values, parts = Reconstruction(NAMES, **places).load(CPU)(asked(samples_of, media, list(sources)))
    assert tuple(parts) == NAMES == Reconstruction.components
    for name, part in parts.items():
        kind = {"dinov2": Dinov2Model, "dinov3": DINOv3ViTModel}.get(name, CLIPModel)
        encoder = kind.from_pretrained(places[f"{name}_path"]).eval()
        with torch.no_grad():
            features = [
                (encoder if "dino" in name else encoder.get_image_features)((x - 0.5) / 0.25).pooler_output
                for x in (media, sources)
            ]
        torch.testing.assert_close(part, torch.cosine_similarity(*features), atol=1e-5, rtol=0)
    torch.testing.assert_close(values, sum(parts.values()) / 4, atol=1e-6, rtol=0)
    assert torch.stack(list(parts.values())).std(0).min() > 1e-3  # four different ones


def test_the_source_itself_is_best_whatever_its_size(
    places: dict[str, str], samples_of: Callable[..., Samples]
) -> None:
    source = noise(3, 40, 60)
    samples = asked(samples_of, torch.stack([source, noise(3, 40, 60, seed=1)]), [source, source])
    values, parts = Reconstruction(clip_path=places["clip_path"]).load(CPU)(samples)
    assert set(parts) == {"clip"}
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values[1] < 0.999
    small = asked(samples_of, noise(1, 3, 16, 16), [source])  # picture and source differ in size
    assert Reconstruction(clip_path=places["clip_path"]).load(CPU)(small)[0].isfinite().all()


def test_equal_sources_are_encoded_once_and_each_picture_meets_its_own(
    places: dict[str, str], samples_of: Callable[..., Samples]
) -> None:
    one, other = noise(3, 30, 30), noise(3, 50, 20, seed=1)
    media = noise(5, 3, SIDE, SIDE, seed=2)
    samples = asked(samples_of, media, [one, other, one.clone(), one, other])
    scorer = Reconstruction(clip_path=places["clip_path"]).load(CPU)
    inner, sizes = scorer.encoders["clip"], []

    def count(pixels: Tensor) -> Any:
        sizes.append(len(pixels))
        return inner.features(pixels)

    values = replace(scorer, encoders={"clip": replace(inner, features=count)})(samples)[0]
    assert sorted(sizes) == [1, 1, 5]
    alone = torch.cat([scorer(samples.select(torch.tensor([row])))[0] for row in range(5)])
    torch.testing.assert_close(values, alone, atol=1e-5, rtol=0)


def test_what_has_no_source_is_not_scored(places: dict[str, str], samples_of: Callable[..., Samples]) -> None:
    media = noise(5, 3, SIDE, SIDE)
    media[3, 0, 0, 0] = math.inf
    fine, broken = noise(3, 9, 9), torch.full((3, 9, 9), math.nan)
    samples = asked(samples_of, media, [fine, None, noise(1, 9, 9), fine, broken])
    scorer = Reconstruction(("clip", "dinov2"), **places).load(CPU)
    values, parts = scorer(samples)
    reasons = [value.reason if isinstance(value, Unscored) else "" for value in values]
    assert reasons[0] == ""
    assert all(
        word in why for word, why in zip(("no source", "[1, 9, 9]", "not finite", "source"), reasons[1:], strict=True)
    )
    assert parts["dinov2"].isnan().tolist() == [False, True, True, True, True]
    none, parts = scorer(asked(samples_of, media[:2], [None, None]))
    assert all(isinstance(value, Unscored) for value in none)
    assert set(parts) == {"clip", "dinov2"}
    assert len(scorer(asked(samples_of, media[:0], []))[0]) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gradient_reaches_the_picture_and_not_the_source(
    places: dict[str, str], samples_of: Callable[..., Samples], dtype: str
) -> None:
    source = noise(3, 40, 33).requires_grad_()
    media = noise(3, 3, 40, 33, seed=1).requires_grad_()
    scorer = Reconstruction(NAMES, **places, dtype=dtype).load(CPU)
    values, parts = scorer(asked(samples_of, media, [source, source, None]))
    assert values.shape == (3,)
    values[:2].sum().backward()
    assert source.grad is None
    assert media.grad is not None
    assert media.grad.isfinite().all()
    assert media.grad[:2].flatten(1).norm(dim=1).min() > 1e-4
    assert (media.grad[2] == 0).all()
    assert not any(part.requires_grad for part in parts.values())


def test_following_the_gradient_makes_the_picture_more_like_its_source(
    places: dict[str, str], samples_of: Callable[..., Samples]
) -> None:
    source, media = noise(3, SIDE, SIDE), noise(1, 3, SIDE, SIDE, seed=1).requires_grad_()
    scorer = Reconstruction(clip_path=places["clip_path"]).load(CPU)
    before = scorer(asked(samples_of, media, [source]))[0]
    before.sum().backward()
    moved = (media + 0.05 * media.grad.sign()).detach().clamp(0, 1)
    assert scorer(asked(samples_of, moved, [source]))[0] > before + 1e-3


@pytest.mark.parametrize(
    ("encoders", "says"),
    [
        ((), "encoders is empty"),
        (("clip", "dinov1"), r"'dinov1' is none of .* Did you mean 'dinov\d'\?"),
        (("clip", "clip"), "names one twice"),
    ],
)
def test_bad_options(encoders: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Reconstruction(encoders)


def test_only_the_chosen_encoders_are_read(places: dict[str, str], tmp_path: Path) -> None:
    missing = {**places, "dinov3_path": str(tmp_path / "gone")}
    assert set(Reconstruction(("dinov2",), **missing).load(CPU).encoders) == {"dinov2"}
    with pytest.raises(Exception, match="no such folder"):
        Reconstruction(("dinov3",), **missing).load(CPU)


# ---- the embedded world's encoder, which ships with rlkit ------------------------------------------------------------

CHANGES = {  # of the caption in one fact; which way two objects stand is the one that this encoder hardly sees
    "colour": ("a red circle left of a blue square", "a green circle left of a blue square"),
    "shape": ("a red circle left of a blue square", "a red triangle left of a blue square"),
    "binding": ("a red circle and a blue square", "a blue circle and a red square"),
    "number": ("three yellow crosses", "two yellow crosses"),
    "missing": ("a red circle and a blue square", "a red circle"),
    "place": ("a cyan cross in the top left", "a cyan cross in the bottom right"),
}


def pictures_of(text: str, count: int, seed: int) -> Tensor:
    captions = [grammar.parse(text)] * count
    return torch.from_numpy(scenes.render_batch(captions, np.random.default_rng(seed)))


@pytest.fixture(scope="module")
def world() -> Any:
    return Reconstruction(clip_path="world").load(CPU)


@pytest.mark.parametrize("change", CHANGES)
def test_the_worlds_encoder_prefers_what_shows_the_same(
    world: Any, samples_of: Callable[..., Samples], change: str
) -> None:
    """Other places and sizes, where the caption leaves them open, cost less than a fact of it."""
    text, other = CHANGES[change]
    sources = list(pictures_of(text, 32, seed=0))
    same, _ = world(asked(samples_of, pictures_of(text, 32, seed=1), sources))
    changed, _ = world(asked(samples_of, pictures_of(other, 32, seed=1), sources))
    assert same.mean() > changed.mean() + 0.05
    assert (same > changed).float().mean() > 0.8


def test_the_worlds_encoder_gives_a_picture_itself_1_and_a_gradient(
    world: Any, samples_of: Callable[..., Samples]
) -> None:
    sources = pictures_of("two blue squares", 2, seed=0)
    assert world(asked(samples_of, sources, list(sources)))[0].tolist() == pytest.approx([1, 1], abs=1e-5)
    media = pictures_of("a blue square", 2, seed=1).requires_grad_()
    values, _ = world(asked(samples_of, media, list(sources)))
    values.sum().backward()
    assert media.grad is not None
    assert media.grad.flatten(1).norm(dim=1).min() > 1e-3


def test_a_folder_called_world_is_written_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(Reconstruction(clip_path="world").load(CPU).encoders) == {"clip"}
    with pytest.raises(Exception, match=r"cannot read './world': there is no such folder"):
        Reconstruction(clip_path="./world").load(CPU)
