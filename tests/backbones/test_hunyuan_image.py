"""HunyuanImage 2.1 of a few thousand weights, against diffusers' pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from backbones import conforms, tiny_words
from making import told

from rlkit import registry
from rlkit.backbones import hunyuan_image
from rlkit.errors import RecipeError
from rlkit.types import FlowModel

PROMPTS = told(["a red circle", "two blue squares say \"no\" and 'yes sir'", "a “wide” green one"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import (
        AutoencoderKLHunyuanImage,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    words, letters = tiny_words.qwen_tokenizer(), ByT5Tokenizer()
    with conforms.seeded():
        net = tiny_words.shaken(
            HunyuanImageTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=tiny_words.WIDTH,
                text_embed_2_dim=12,
                rope_axes_dim=(4, 4),
            )
        )
        vae = AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.7,
        )
        language = tiny_words.vision_language(words, layers=4)
        size = {"d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        glyph = T5EncoderModel(T5Config(vocab_size=len(letters), is_encoder_decoder=False, use_cache=False, **size))
    path = tmp_path_factory.mktemp("hunyuan_image") / "base"
    schedule = FlowMatchEulerDiscreteScheduler(shift=5.0)
    HunyuanImagePipeline(schedule, vae, language, words, glyph, letters, net).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(folder: Path) -> dict[str, Any]:
    return {"name": "hunyuan_image", "path": str(folder), "size": [32, 64], "max_tokens": 300}


@pytest.fixture(scope="module")
def model(options: dict[str, Any]) -> FlowModel:
    return conforms.loaded(**options)


def test_the_card() -> None:
    conforms.card("hunyuan_image")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    print(conforms.parity(model, PROMPTS))


def test_a_batch_without_quotations_is_the_pipelines(model: FlowModel) -> None:
    print(conforms.parity(model, told(["a red circle", "two blue squares"])))


def test_the_contract(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_may_leave(options: dict[str, Any]) -> None:
    conforms.frees(PROMPTS, **options)


def test_log_probabilities_are_those_of_the_path(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS[:2])


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(options: dict[str, Any], algorithm: str, train: str, guidance: float, tmp_path: Path) -> None:
    conforms.trains(tmp_path, options, algorithm, train, guidance)


def test_diffusers_loads_the_lora(options: dict[str, Any], tmp_path: Path) -> None:
    conforms.exports(tmp_path, conforms.loaded(**options), PROMPTS[:2], guidance=2.0)


def test_words_that_are_not_read_are_named(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    assert model.unread("word " * 60 + "end")[-1] == "end"
    assert len(model.encode(told(["word " * 70]))[0]["tokens"]) == 300
    assert model.unread(f'it says "{"many words " * 12}end"') == ["end"]


def test_quotations_are_found_by_kind() -> None:
    assert hunyuan_image.glyphs("no text") == ""
    assert hunyuan_image.glyphs("a \"b c\" and 'd', “e” ‘f’") == 'Text "d". Text "b c". Text "f". Text "e". '


def test_a_size_that_does_not_fit_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"multiples of 32 .* try \[2048, 1024\]"):
        registry.build("backbones", "hunyuan_image", {"size": [2048, 1030]})


@pytest.mark.parametrize("option", ["use_meanflow", "guidance_embeds"])
def test_a_distilled_checkpoint_is_refused(folder: Path, tmp_path: Path, option: str) -> None:
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: True}))
    with pytest.raises(RecipeError, match="is a distilled HunyuanImage"):
        conforms.loaded("hunyuan_image", path=str(tmp_path / "other"))
