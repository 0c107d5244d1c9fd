"""FLUX.1 Kontext of a few thousand weights, against diffusers' pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import conforms, parts

from rlkit.backbones import _pictures
from rlkit.errors import DataError, RecipeError
from rlkit.types import FlowModel, Prompt

picture = conforms.picture
PROMPTS = (
    Prompt(0, "make it red", source=picture("a", 16, 24)),
    Prompt(1, "two blue squares left of a green one", source=picture("b", 35, 20)),  # brought to 32 x 20: whole tokens
    Prompt(2, "words alone"),
)
OPTIONS = {"size": [16, 32], "max_tokens": 40, "resize_source": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel

    with conforms.seeded():
        net = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
        vae, clip, t5 = parts.autoencoder(), parts.clip("CLIPTextModel", width=16), parts.t5(width=24)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    path = tmp_path_factory.mktemp("flux_kontext") / "base"
    FluxKontextPipeline(
        scheduler, vae, clip, parts.clip_tokenizer(), t5, parts.t5_tokenizer(), conforms.awake(net)
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> FlowModel:
    return conforms.loaded("flux_kontext", path=str(folder), **OPTIONS)


def test_the_card() -> None:
    conforms.card("flux_kontext")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, PROMPTS)


def test_sources_are_brought_to_a_size_of_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.flux import pipeline_flux_kontext

    few = [(24, 48), (32, 32), (48, 24)]  # width and height
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", few)
    model = conforms.loaded("flux_kontext", path=str(folder), **(OPTIONS | {"resize_source": True}))
    sizes = [(height // 4, width // 4) for width, height in few]
    sources = [replace(PROMPTS[0], source=picture("c", *sides)) for sides in ((80, 40), (30, 31))]
    grids = [one["grids"] for one in model.encode(sources)]
    assert [tuple(one[0].tolist()) for one in grids] == sizes[:2]
    conforms.parity(model, PROMPTS)


def test_it_does_what_every_backbone_does(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_may_leave(folder: Path) -> None:
    conforms.frees(PROMPTS, "flux_kontext", path=str(folder), **OPTIONS)


def test_the_ratio_is_1_before_any_update(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS[1:])


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_a_recipe_trains_it(folder: Path, tmp_path: Path, algorithm: str, train: str, guidance: float) -> None:
    backbone = {"name": "flux_kontext", "path": str(folder), **OPTIONS, "max_tokens": 16}
    data = conforms.picture_prompts(tmp_path / "data")
    conforms.trains(tmp_path / "run", backbone, algorithm, train, guidance, data)


def test_diffusers_loads_what_was_trained(folder: Path, tmp_path: Path) -> None:
    conforms.exports(tmp_path, conforms.loaded("flux_kontext", path=str(folder), **OPTIONS), PROMPTS, 3.0)


def test_the_source_and_the_guidance_are_read(folder: Path, model: FlowModel) -> None:
    def velocity(model: FlowModel, prompt: Prompt) -> torch.Tensor:
        x = torch.ones(1, *model.latent_shape)
        with torch.no_grad():
            return model.velocity(model.net, x, torch.ones(1), model.collate(model.encode([prompt])))

    before = velocity(model, PROMPTS[0])
    assert (velocity(model, replace(PROMPTS[0], source=picture("other", 16, 24))) - before).abs().max() > 1e-4
    assert (velocity(model, replace(PROMPTS[0], source=None)) - before).abs().max() > 1e-4
    other = conforms.loaded("flux_kontext", path=str(folder), **OPTIONS, guidance=1.0)
    assert (velocity(other, PROMPTS[0]) - before).abs().max() > 1e-4


def test_pictures_of_equal_sizes_go_together(model: FlowModel) -> None:
    same = replace(PROMPTS[0], id=3, text="once more")
    asked: list[tuple[list[int], _pictures.Grids]] = []

    def rows(part: dict[str, torch.Tensor], at: torch.Tensor, grids: _pictures.Grids) -> torch.Tensor:
        asked.append((at.tolist(), grids))
        assert part["pictures"].shape[:2] == (len(at), sum(height * width for height, width in grids))
        return at

    cond = model.collate(model.encode([PROMPTS[0], PROMPTS[1], same, PROMPTS[2]]))
    assert _pictures.by_grids(cond, rows).tolist() == [0, 1, 2, 3]
    assert asked == [([0, 2], ((4, 6),)), ([1], ((8, 5),)), ([3], ())]


def test_there_is_one_picture_at_most(model: FlowModel) -> None:
    with pytest.raises(DataError, match=r"prompt 0: .* has 2 pictures, and this backbone reads 0 to 1"):
        model.encode([replace(PROMPTS[0], references=(picture("d"),))])


def test_what_t5_cuts_off_is_unread(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    assert model.unread("a circle " * 6) == ["circle", "a", "circle"]  # 40 tokens: one a letter and one a gap


def test_bad_options() -> None:
    with pytest.raises(RecipeError, match=r"multiples of 16 .* not \[500, 512\]: try \[496, 512\]"):
        conforms.loaded("flux_kontext", path="nowhere", size=[500, 512])
    with pytest.raises(RecipeError, match="max_tokens must be within"):
        conforms.loaded("flux_kontext", path="nowhere", max_tokens=513)
