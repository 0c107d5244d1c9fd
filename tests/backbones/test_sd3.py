"""Stable Diffusion 3 of a few thousand weights, against diffusers' pipeline."""

from pathlib import Path

import pytest
import torch
from backbones import conforms, parts
from making import told

from rlkit.errors import RecipeError
from rlkit.types import FlowModel

SIZE = [16, 32]  # of latents 8 x 16
PROMPTS = told(["a red circle", "two blue squares left of a green one", ""])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with conforms.seeded():
        net = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=40,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        vae = parts.autoencoder()
        first, second, third = parts.clip(width=16), parts.clip(width=24), parts.t5(width=48)
    path = tmp_path_factory.mktemp("sd3") / "base"
    clip_words = parts.clip_tokenizer()
    StableDiffusion3Pipeline(
        conforms.awake(net),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        first,
        clip_words,
        second,
        parts.clip_tokenizer(pad="!"),
        third,
        parts.t5_tokenizer(),
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> FlowModel:
    return conforms.loaded("sd3", path=str(folder), size=SIZE, max_tokens=40)


def test_the_card() -> None:
    conforms.card("sd3")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, PROMPTS)


def test_without_t5_its_tokens_are_zeros(folder: Path, model: FlowModel) -> None:
    without = conforms.loaded("sd3", path=str(folder), size=SIZE, max_tokens=40, t5=False)
    conforms.parity(without, PROMPTS)
    (condition,) = without.encode(PROMPTS[:1])
    (full,) = model.encode(PROMPTS[:1])
    assert condition["tokens"].shape == full["tokens"].shape
    assert torch.equal(condition["tokens"][:24], full["tokens"][:24])
    assert condition["tokens"][24:].abs().max() == 0
    assert without.unread("a red circle left of a square") == ["square"], "CLIP reads 22 letters"


def test_it_keeps_the_contract(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_may_leave(folder: Path) -> None:
    conforms.frees(PROMPTS, "sd3", path=str(folder), size=SIZE, max_tokens=40)


def test_a_path_is_computed_again_to_the_bit(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS[:2])


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(tmp_path: Path, folder: Path, algorithm: str, train: str, guidance: float) -> None:
    backbone = {"name": "sd3", "path": str(folder), "size": SIZE, "max_tokens": 16}
    conforms.trains(tmp_path / "run", backbone, algorithm, train, guidance)


def test_diffusers_loads_what_was_trained(tmp_path: Path, folder: Path) -> None:
    fresh = conforms.loaded("sd3", path=str(folder), size=SIZE, max_tokens=40)
    conforms.exports(tmp_path / "lora", fresh, PROMPTS[:2])


def test_what_t5_cuts_off_is_unread(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    assert model.unread("a circle " * 6) == ["circle", "a", "circle"]  # 40 tokens: one a letter and one a gap


def test_bad_options(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"multiples of 16 .* not \[500, 512\]: try \[496, 512\]"):
        conforms.loaded("sd3", path="nowhere", size=[500, 512])
    with pytest.raises(RecipeError, match="max_tokens must be within"):
        conforms.loaded("sd3", path="nowhere", max_tokens=0)
    with pytest.raises(RecipeError, match="draws at most 32 pixels a side"):
        conforms.loaded("sd3", path=str(folder), size=[16, 48])
