"""FLUX.1 of a few thousand weights, against diffusers' pipeline; once with an ear for guidance (dev), once without."""

from pathlib import Path

import pytest
import torch
from backbones import conforms, parts
from making import told

from rlkit import parity as measures
from rlkit import registry
from rlkit.errors import RecipeError
from rlkit.types import FlowModel

PROMPTS = told(["a red circle", "two blue squares left of a green one", ""])
SIZE = [16, 32]  # of latents 8 x 16, and 32 tokens


def save(path: Path, dev: bool) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with conforms.seeded():
        net = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(4, 4, 8),
        )
        vae, clip, t5 = parts.autoencoder(), parts.clip("CLIPTextModel", width=16), parts.t5(width=24)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    FluxPipeline(
        scheduler, vae, clip, parts.clip_tokenizer(), t5, parts.t5_tokenizer(), conforms.awake(net)
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("flux") / "dev", dev=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> FlowModel:
    return conforms.loaded("flux", path=str(folder), size=SIZE, max_tokens=40)


def test_the_card() -> None:
    conforms.card("flux")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, PROMPTS)


def test_pictures_are_those_of_the_pipeline_in_bf16_too(folder: Path) -> None:
    backbone = registry.build("backbones", "flux", {"path": str(folder), "size": SIZE, "max_tokens": 40})
    low = backbone.load(conforms.CPU, torch.bfloat16)
    apart = measures.pixels_apart(low, PROMPTS, conforms.CPU, 3, 4.0, "bf16")
    assert 1e-4 < apart < measures.TOLERANCES["bf16"]
    assert measures.ratio_off(low, PROMPTS[:2], conforms.CPU, 4.0, "bf16") == 0


def test_schnell_has_its_own_schedule_and_no_ear_for_guidance(tmp_path: Path, model: FlowModel) -> None:
    schnell = conforms.loaded("flux", path=str(save(tmp_path / "schnell", dev=False)), size=SIZE, max_tokens=40)
    conforms.parity(schnell, PROMPTS)
    assert torch.allclose(schnell.sigmas(4), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert (model.sigmas(4)[1:-1] > schnell.sigmas(4)[1:-1]).all(), "dev's is shifted, by so few tokens a little"


def test_the_network_is_told_the_guidance(folder: Path, model: FlowModel) -> None:
    other = conforms.loaded("flux", path=str(folder), size=SIZE, max_tokens=40, guidance=1.0)
    x, sigma = torch.randn(1, *model.latent_shape), torch.tensor([0.5])
    (condition,) = model.encode(PROMPTS[:1])
    one, two = (each.velocity(each.net, x, sigma, each.collate([condition])) for each in (model, other))
    assert (one - two).abs().max() > 1e-3


def test_it_keeps_the_contract(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_may_leave(folder: Path) -> None:
    conforms.frees(PROMPTS, "flux", path=str(folder), size=SIZE, max_tokens=40)


def test_a_path_is_computed_again_to_the_bit(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS[:2])


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(tmp_path: Path, folder: Path, algorithm: str, train: str, guidance: float) -> None:
    backbone = {"name": "flux", "path": str(folder), "size": SIZE, "max_tokens": 16}
    conforms.trains(tmp_path / "run", backbone, algorithm, train, guidance)


def test_diffusers_loads_what_was_trained(tmp_path: Path, folder: Path) -> None:
    fresh = conforms.loaded("flux", path=str(folder), size=SIZE, max_tokens=40)
    conforms.exports(tmp_path / "lora", fresh, PROMPTS[:2])


def test_what_t5_cuts_off_is_unread(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    assert model.unread("a circle " * 6) == ["circle", "a", "circle"]  # 40 tokens: one a letter and one a gap


def test_bad_options() -> None:
    with pytest.raises(RecipeError, match=r"multiples of 16 .* not \[500, 512\]: try \[496, 512\]"):
        conforms.loaded("flux", path="nowhere", size=[500, 512])
    with pytest.raises(RecipeError, match="max_tokens must be within"):
        conforms.loaded("flux", path="nowhere", max_tokens=513)
