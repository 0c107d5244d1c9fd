"""Z-Image of a few thousand weights, against diffusers' pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_words
from making import told

from rlkit import registry
from rlkit.errors import RecipeError
from rlkit.types import FlowModel

PROMPTS = told(["a red circle", "two blue squares left of a green one, é", ""])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = tiny_words.qwen_tokenizer()
    with conforms.seeded():
        net = tiny_words.shaken(
            ZImageTransformer2DModel(
                in_channels=4,
                dim=16,
                n_layers=2,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=tiny_words.WIDTH,
                axes_dims=[4, 2, 2],
                axes_lens=[600, 32, 32],
            )
        )
        text_encoder = Qwen3Model(Qwen3Config(**tiny_words.language_options(tokenizer)))
        vae = tiny_words.autoencoder()
    path = tmp_path_factory.mktemp("z_image") / "base"
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ZImagePipeline(schedule, vae, text_encoder, tokenizer, net).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(folder: Path) -> dict[str, Any]:
    return {"name": "z_image", "path": str(folder), "size": [16, 32], "max_tokens": 120}


@pytest.fixture(scope="module")
def model(options: dict[str, Any]) -> FlowModel:
    return conforms.loaded(**options)


def test_the_card() -> None:
    conforms.card("z_image")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    print(conforms.parity(model, PROMPTS))


def test_a_shift_that_follows_the_size_is_the_pipelines(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": True, "max_shift": 2.0}))
    other = conforms.loaded("z_image", path=str(tmp_path / "other"), size=[16, 32])
    print(conforms.parity(other, PROMPTS[:2], guidance=(1.0, 2.0)))


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


def test_words_beyond_the_longest_prompt_are_named(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    text = "word " * 40 + "end"
    lost = model.unread(text)
    assert lost[-1] == "end"
    kept = text.split()[: -len(lost)]
    read, whole = model.encode(told([text, " ".join(kept)]))
    assert len(read["tokens"]) == 120 == model.encode(told([text + " more"]))[0]["tokens"].shape[0]
    same = len(whole["tokens"]) - len("<|im_start|>assistant\n") - 20
    torch.testing.assert_close(read["tokens"][:same], whole["tokens"][:same])


def test_a_size_that_does_not_fit_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"multiples of 16 .* try \[512, 528\]"):
        registry.build("backbones", "z_image", {"size": [512, 530]})


def test_more_tokens_than_positions_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="At most 567"):
        conforms.loaded("z_image", path=str(folder), size=[16, 32], max_tokens=568)


def test_a_checkpoint_of_another_family_is_refused(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "StableDiffusion3Pipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match="is a StableDiffusion3Pipeline, and this backbone reads ZImagePipeline"):
        conforms.loaded("z_image", path=str(tmp_path))
