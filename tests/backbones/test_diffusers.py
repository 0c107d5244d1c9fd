"""What backbones share: which folders are refused and how, patches, sizes, schedules, words."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import parts
from torch import nn

from rlkit.backbones import _diffusers as shared
from rlkit.errors import RecipeError

CPU = torch.device("cpu")
PARTS = ["vae", "text_encoder"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder and a text encoder, said to be of FluxPipeline."""
    folder = tmp_path_factory.mktemp("shared") / "base"
    parts.autoencoder().save_pretrained(folder / "vae")
    parts.clip("CLIPTextModel", width=16).save_pretrained(folder / "text_encoder")
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "text_encoder_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "base")


def opened(path: Path | str, revision: str | None = None) -> shared.Checkpoint:
    return shared.opened(str(path), revision, ("FluxPipeline",), PARTS)


def frozen(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    return opened(folder).frozen("vae", AutoencoderKL, CPU, torch.float32)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_frozen(folder: Path) -> None:
    checkpoint = opened(folder)
    assert checkpoint.pipeline == "FluxPipeline"
    assert checkpoint.has("vae")
    assert not checkpoint.has("text_encoder_3")
    assert not checkpoint.has("tokenizer_9")
    vae = frozen(folder)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_another_family_is_refused_with_the_backbone_that_reads_it(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(RecipeError, match=r"is a StableDiffusion3Pipeline, .* reads FluxPipeline.* backbone 'sd3'"):
        opened(folder)
    index.write_text(json.dumps({"_class_name": "NeverPipeline"}))
    with pytest.raises(RecipeError, match="No backbone reads such a one"):
        opened(folder)
    index.write_text("{}")
    with pytest.raises(RecipeError, match="not the index of a diffusers pipeline"):
        opened(folder)
    index.unlink()
    with pytest.raises(RecipeError, match=r"has no model_index.json. Give a diffusers pipeline folder"):
        opened(folder)
    with pytest.raises(RecipeError, match="which is one model: its pipeline's folder is needed"):
        opened(folder / "vae")


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder and has no revision 'main'"):
        opened(folder, "main")


def test_a_name_of_nothing_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match=r"'no/such' is no folder here, and the hub .* hf download no/such"):
        opened("no/such")
    with pytest.raises(RecipeError, match="'/no/such/folder' is neither a folder here nor a repository of the hub"):
        opened("/no/such/folder")


def test_a_part_of_another_class_is_refused(folder: Path) -> None:
    from diffusers import AutoencoderDC

    with pytest.raises(RecipeError, match="vae is a AutoencoderKL, and this backbone reads AutoencoderDC"):
        opened(folder).frozen("vae", AutoencoderDC, CPU, torch.float32)
    with pytest.raises(RecipeError, match=r"has no transformer/config.json. The folder is not whole"):
        opened(folder).frozen("transformer", AutoencoderDC, CPU, torch.float32)


def test_weights_must_be_there_and_fit(folder: Path) -> None:
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file, save_file

    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = weights.pop("decoder.conv_in.weight")
    save_file(weights, file)
    with pytest.raises(RecipeError, match=r"vae lacks weights of AutoencoderKL: decoder.conv_in.weight"):
        frozen(folder)
    save_file(weights | {"decoder.conv_in.weight": gone, "added.weight": torch.zeros(3)}, file)
    with pytest.raises(RecipeError, match=r"vae has weights that AutoencoderKL has not: added.weight"):
        opened(folder).net("vae", AutoencoderKL, CPU, torch.float32)
    save_file(weights | {"decoder.conv_in.weight": gone[:2].clone()}, file)
    with pytest.raises(RecipeError, match="vae cannot be read"):
        frozen(folder)
    file.write_bytes(b"not these")
    with pytest.raises(RecipeError, match="vae cannot be read"):
        frozen(folder)


def test_a_pickle_is_not_read(folder: Path) -> None:
    from safetensors.torch import load_file

    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), folder / "vae" / "diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(RecipeError, match=r"vae cannot be read: .*Only safetensors are read"):
        frozen(folder)


def test_a_text_encoder_that_lacks_weights_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel

    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if name.endswith("final_layer_norm.weight"))]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"text_encoder lacks weights of CLIPTextModel: .*final_layer_norm"):
        opened(folder).frozen("text_encoder", CLIPTextModel, CPU, torch.float32)


# ---- latents ---------------------------------------------------------------------------------------------------------


def test_patches_are_those_of_the_flux_pipeline() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 8)
    tokens = shared.packed(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(shared.unpacked(tokens, 6, 8), x)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 4, CPU, torch.float32)
    assert torch.equal(shared.grid_ids(3, 4), ids)
    assert shared.grid_ids(3, 4, first=2)[:, 0].unique().tolist() == [2]


def test_pictures_survive_an_autoencoder_that_scales_and_shifts(folder: Path) -> None:
    vae = frozen(folder)
    media = torch.rand(2, 3, 16, 8)
    latents = shared.encode_with(vae)(media)
    assert latents.shape == (2, 4, 8, 4)
    plain = vae.encode(2 * media - 1).latent_dist.mode()
    torch.testing.assert_close(latents, (plain - 0.1) * 1.5)
    expected = (vae.decode(plain).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shared.decode_with(vae)(latents), expected)
    assert shared.vae_factor(vae) == 2
    vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(RecipeError, match="normalises each channel by itself"):
        shared.decode_with(vae)


def test_sizes_that_do_not_fit_come_with_the_nearest_that_do() -> None:
    shared.check_size((512, 768), 16)
    for size, near in (((500, 512), r"\[496, 512\]"), ((3, 20), r"\[16, 16\]"), ((0, 32), r"\[16, 32\]")):
        with pytest.raises(ValueError, match=f"multiples of 16.*try {near}"):
            shared.check_size(size, 16)
    assert shared.latent_shape(4, (32, 48), 8, 16) == (4, 4, 6)
    with pytest.raises(RecipeError, match=r"policy.backbone.size: for this checkpoint size must .* of 16"):
        shared.latent_shape(4, (32, 40), 8, 16)


# ---- schedules, words, layers ----------------------------------------------------------------------------------------


def test_schedules_are_shifted_by_their_configuration() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    fixed = Euler(shift=3.0)
    assert shared.mu_of(fixed, 4096) is None
    even = shared.sigmas_with(fixed)(4)
    torch.testing.assert_close(even, torch.tensor([1, 0.9, 0.75, 0.5, 0]))
    assert shared.sigmas_with(fixed, even=False)(4)[-2] == pytest.approx(0.0089, abs=1e-4), (
        "its own last step is near 0"
    )
    grows = Euler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    assert shared.mu_of(grows, 256) == pytest.approx(0.5)
    assert shared.mu_of(grows, 4096) == pytest.approx(1.15)
    mu = shared.mu_of(grows, 1024)
    assert mu is not None
    assert shared.sigmas_with(grows, mu)(2)[1] == pytest.approx(math.exp(mu) / (math.exp(mu) + 1))


def test_words_that_are_cut_off() -> None:
    tokenizer = parts.t5_tokenizer()
    assert shared.cut_words(tokenizer, "ab cd ef", 10) == []
    assert shared.cut_words(tokenizer, "ab cd ef", 9) == ["ef"], "cut in part"
    assert shared.cut_words(tokenizer, "ab cd ef", 4) == ["cd", "ef"]
    assert shared.cut_words(tokenizer, "", 1) == []


def test_layers_for_lora_have_to_be_there() -> None:
    net = nn.ModuleDict({"a": nn.ModuleDict({"to_q": nn.Linear(2, 2)}), "norm": nn.LayerNorm(2)})
    assert shared.present(net, ("to_q",)) == ("to_q",)
    for lost in ("o_q", "norm", "to_k"):
        with pytest.raises(RecipeError, match=f"has no linear layers called {lost}"):
            shared.present(net, ("to_q", lost))


def test_an_autoencoder_is_given_its_own_type_by_a_pipeline_of_another() -> None:
    vae = parts.autoencoder()
    latents = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)

    class Pipeline:
        def set_progress_bar_config(self, disable: bool) -> None: ...

        def __call__(self, fails: bool, output_type: str) -> SimpleNamespace:
            pixels = vae.decode(latents, return_dict=False)[0]
            assert vae.encode(pixels.bfloat16()).latent_dist.mode().dtype == torch.float32
            if fails:
                raise RuntimeError("out of memory")
            return SimpleNamespace(images=pixels)

    whole = Pipeline()
    whole.vae = vae  # type: ignore[attr-defined]
    assert shared.drawn(whole, fails=False).dtype == torch.float32
    with pytest.raises(RuntimeError, match="out of memory"):
        shared.drawn(whole, fails=True)
    assert not {"encode", "decode"} & set(vars(vae)), "it is left as it was"
