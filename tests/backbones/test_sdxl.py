"""Stable Diffusion XL of a few thousand weights: the flow that a network of noise becomes, and diffusers' pipeline."""

from pathlib import Path

import pytest
import torch
from backbones import conforms, parts
from making import told

from rlkit import flow
from rlkit.errors import RecipeError
from rlkit.types import FlowModel

SIZE = [16, 32]  # of latents 8 x 16
PROMPTS = told(["a red circle", "two blue squares left of a green one", "a cat"])
TRAINED = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}  # as published


def save(path: Path, **changes: str) -> Path:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    with conforms.seeded():
        net = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=1,
            attention_head_dim=(2, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            cross_attention_dim=40,
            norm_num_groups=4,
        )
        vae = parts.autoencoder(scaling=0.8, shift=None, quantised=True)
        first, second = parts.clip("CLIPTextModel", width=16), parts.clip(width=24)
    scheduler = EulerDiscreteScheduler(**TRAINED, timestep_spacing="leading", **changes)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=parts.clip_tokenizer(),
        tokenizer_2=parts.clip_tokenizer(pad="!"),
        unet=conforms.awake(net),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def model(folder: Path) -> FlowModel:
    return conforms.loaded("sdxl", path=str(folder), size=SIZE)


def test_the_card() -> None:
    conforms.card("sdxl")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, PROMPTS)


def test_without_a_negative_prompt_guidance_leads_away_from_zeros(model: FlowModel) -> None:
    (nothing,) = model.encode(told([""]))
    assert nothing["tokens"].abs().max() == 0
    assert nothing["pooled"].abs().max() == 0
    assert nothing["sizes"].tolist() == [16, 32, 0, 0, 16, 32]


@torch.no_grad()
def test_an_euler_step_is_ddims(folder: Path, model: FlowModel) -> None:
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler(**TRAINED, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    ddim.set_timesteps(5)
    condition = model.collate(model.encode(PROMPTS[:1]))
    levels = model.sigmas(5)
    added = {"text_embeds": condition["pooled"], "time_ids": condition["sizes"]}
    known = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))  # variance preserving
    x = known / float(((1 - levels[0]) ** 2 + levels[0] ** 2).sqrt()) * float((1 - levels[0]) ** 2 + levels[0] ** 2)
    for k, time in enumerate(ddim.timesteps):
        noise = model.net(known, time, condition["tokens"], added_cond_kwargs=added, return_dict=False)[0]
        known = ddim.step(noise, time, known, return_dict=False)[0]
        v = model.velocity(model.net, x, levels[k : k + 1], condition)
        x = flow.ode_step(x, v, levels[k : k + 1], levels[k + 1 : k + 2])
    torch.testing.assert_close(x, known, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_velocity_of_a_known_sample_is_noise_less_data(model: FlowModel) -> None:
    # With a network that answers with the noise itself, at levels between the 1000 too.
    draws = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(4, *model.latent_shape, generator=draws) for _ in range(2))
    sigma = torch.tensor([0.93, 0.5, 0.1234, 0.03])

    def knows(*given: object, **more: object) -> tuple[torch.Tensor]:
        return (noise,)

    condition = model.collate(model.encode(told(["a"] * 4)))
    x = flow.interpolate(clean, noise, sigma)
    v = model.velocity(knows, x, sigma, condition)  # type: ignore[arg-type]
    torch.testing.assert_close(v, flow.velocity_target(clean, noise), rtol=1e-4, atol=1e-4)
    beyond = model.velocity(knows, noise, torch.ones(4), condition)  # type: ignore[arg-type]
    assert beyond.isfinite().all(), "noise alone, of which the network knows nothing"


def test_the_schedule_is_that_of_the_trained_levels(model: FlowModel) -> None:
    for steps in (1, 4, 30):
        assert model.sigmas(steps)[0] == pytest.approx(0.936, abs=1e-3)


def test_it_keeps_the_contract(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_may_leave(folder: Path) -> None:
    conforms.frees(PROMPTS, "sdxl", path=str(folder), size=SIZE)


def test_a_path_is_computed_again_to_the_bit(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS[:2])


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(tmp_path: Path, folder: Path, algorithm: str, train: str, guidance: float) -> None:
    conforms.trains(tmp_path / "run", {"name": "sdxl", "path": str(folder), "size": SIZE}, algorithm, train, guidance)


def test_diffusers_loads_what_was_trained(tmp_path: Path, folder: Path) -> None:
    fresh = conforms.loaded("sdxl", path=str(folder), size=SIZE)
    conforms.exports(tmp_path / "lora", fresh, PROMPTS[:2])


def test_bad_options_and_folders(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"multiples of 8 .* not \[500, 512\]: try \[496, 512\]"):
        conforms.loaded("sdxl", path="nowhere", size=[500, 512])
    with pytest.raises(RecipeError, match="predicts 'v_prediction'; only networks that predict noise are read"):
        conforms.loaded("sdxl", path=str(save(tmp_path / "v", prediction_type="v_prediction")), size=SIZE)
