"""FLUX.2 dev and klein, a few thousand weights each, against diffusers' pipelines."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_flux2
from torch import Tensor

from rlkit import registry
from rlkit.backbones import _flux2
from rlkit.errors import DataError, RecipeError
from rlkit.types import FlowModel, Prompt

picture = conforms.picture
PROMPTS = (
    Prompt(0, "a red circle"),
    Prompt(1, "two blue crosses, and make it green", source=picture("a", 67, 72)),
    Prompt(2, "", references=(picture("b", 64, 80), picture("c", 68, 64))),
)
KINDS = ("dev", "base", "distilled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def at(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_flux2.save(tmp_path_factory.mktemp(kind) / "base", kind != "dev", kind == "distilled")
        return made[kind]

    return at


@pytest.fixture(scope="module")
def load(folder: Callable[[str], Path]) -> Callable[..., FlowModel]:
    made: dict[str, FlowModel] = {}

    def at(kind: str, **options: Any) -> FlowModel:
        whole = {"path": str(folder(kind)), "size": [16, 32], "max_tokens": 90} | options
        if options:
            return conforms.loaded("flux2", **whole)
        made[kind] = made.get(kind) or conforms.loaded("flux2", **whole)
        return made[kind]

    return at


def velocity(model: FlowModel, prompt: Prompt) -> Tensor:
    x = torch.ones(1, *model.latent_shape)
    with torch.no_grad():
        return model.velocity(model.net, x, torch.ones(1), model.collate(model.encode([prompt])))


def test_the_card() -> None:
    conforms.card("flux2")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_pipeline(load: Callable[..., FlowModel], kind: str) -> None:
    conforms.parity(load(kind), PROMPTS, (1.0, 4.0) if kind == "base" else (1.0,))


@pytest.mark.parametrize("kind", ["dev", "base"])
def test_it_does_what_every_backbone_does(load: Callable[..., FlowModel], kind: str) -> None:
    conforms.contract(load(kind), PROMPTS)


@pytest.mark.parametrize("kind", ["dev", "base"])
def test_its_encoders_can_leave(folder: Callable[[str], Path], kind: str) -> None:
    conforms.frees(PROMPTS[:2], "flux2", path=str(folder(kind)), size=[16, 32], max_tokens=90)


def test_the_ratio_is_1_before_any_update(load: Callable[..., FlowModel]) -> None:
    conforms.on_policy(load("base"), PROMPTS)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_a_recipe_trains_it(
    folder: Callable[[str], Path], tmp_path: Path, algorithm: str, train: str, guidance: float
) -> None:
    kind = "dev" if algorithm == "diffusion_nft" else "base"
    backbone = {"name": "flux2", "path": str(folder(kind)), "size": [16, 16], "max_tokens": 90}
    conforms.trains(tmp_path, backbone, algorithm, train, guidance)


def test_diffusers_loads_what_was_trained(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = conforms.loaded("flux2", path=str(folder("base")), size=[16, 32], max_tokens=90)
    conforms.exports(tmp_path, model, PROMPTS, 3.0)


def test_distilled_klein_refuses_guidance(load: Callable[..., FlowModel]) -> None:
    v = torch.zeros(1, 16, 4, 4)
    with pytest.raises(RecipeError, match=r"policy.guidance: .* distilled .* Leave it at 1"):
        load("distilled").guide(v, v, 4.0)
    assert torch.equal(load("base").guide(v + 1, v, 4.0), v + 4)


def test_diffusers_has_no_guidance_of_this_kind_for_dev(load: Callable[..., FlowModel]) -> None:
    model = load("dev")
    assert model.pipeline is not None
    with pytest.raises(RecipeError, match="no classifier-free guidance"):
        model.pipeline(PROMPTS[:1], torch.zeros(1, *model.latent_shape), 1, 4.0, "")


def test_dev_is_told_its_guidance_and_klein_is_not(load: Callable[..., FlowModel]) -> None:
    for kind, moves in (("dev", True), ("base", False)):
        apart = velocity(load(kind), PROMPTS[0]) - velocity(load(kind, guidance=1.5), PROMPTS[0])
        assert (apart.abs().max() > 1e-4) == moves


def test_the_shift_depends_on_the_steps_and_the_size(load: Callable[..., FlowModel]) -> None:
    model = load("base")
    few, many = model.sigmas(10), model.sigmas(100)
    assert few[5] != many[50]
    assert model.at is not None
    large = model.at((128, 128)).sigmas(10)  # 1024 tokens: the line of diffusers that is for 10 steps
    shift = math.exp(8.73809524e-05 * 1024 + 1.89833333)
    even = 1 - torch.arange(11) / 10
    torch.testing.assert_close(large, shift * even / (1 + (shift - 1) * even), rtol=0, atol=1e-6)


def test_every_picture_is_read_in_its_place(load: Callable[..., FlowModel]) -> None:
    model = load("base")
    before = velocity(model, PROMPTS[2])
    first, second = PROMPTS[2].references
    for others in ((second, first), (first, picture("d", 68, 64)), (first,), (first, second, first)):
        assert (velocity(model, replace(PROMPTS[2], references=others)) - before).abs().max() > 1e-4


def test_large_pictures_are_brought_down_and_small_ones_refused(load: Callable[..., FlowModel]) -> None:
    model = load("base", picture_area=80 * 80)
    large, small = (replace(PROMPTS[0], source=picture("e", *sides)) for sides in ((90, 120), (63, 64)))
    assert model.encode([large])[0]["grids"].tolist() == [[17, 23]]  # 69 x 92 pixels, cut to 68 x 92
    conforms.parity(model, [large, PROMPTS[1]], (1.0,))
    with pytest.raises(DataError, match="prompt 0: Image too small"):
        model.encode([small])
    with pytest.raises(DataError, match="has 2 pictures, and this backbone reads 0 to 1"):
        load("base", max_pictures=1).encode(PROMPTS[2:])


@pytest.mark.parametrize("kind", ["dev", "base"])
def test_a_long_prompt_is_cut_and_what_is_lost_is_named(load: Callable[..., FlowModel], kind: str) -> None:
    model = load(kind)
    assert model.unread("a red circle") == []
    longer = " ".join(f"w{i}" for i in range(90))
    lost = model.unread(longer)
    assert lost
    assert longer.endswith(" ".join(lost))
    kept = longer.removesuffix(" ".join(lost))
    same, other = (replace(PROMPTS[0], text=text) for text in (longer + " and more", kept[:-3]))
    tokens = [model.encode([one])[0]["tokens"] for one in (replace(PROMPTS[0], text=longer), same, other)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_the_layers_that_are_read(load: Callable[..., FlowModel]) -> None:
    assert _flux2.LAYERS == {"Flux2Pipeline": (10, 20, 30), "Flux2KleinPipeline": (9, 18, 27)}
    assert load("base").encode(PROMPTS[:1])[0]["tokens"].shape == (90, 24)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": [100, 96]}, r"try \[96, 96\]"),
        ({"max_tokens": 513}, "within 1..512"),
        ({"picture_area": 100}, "within 4096"),
        ({"max_pictures": 0}, "1 or more"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        registry.build("backbones", "flux2", options)
