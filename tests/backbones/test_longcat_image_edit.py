"""LongCat-Image-Edit of a few thousand weights, against diffusers' pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_words

from rlkit import registry
from rlkit.errors import DataError, RecipeError
from rlkit.types import FlowModel, Prompt

PROMPTS = [
    Prompt(0, "make it red", source=conforms.picture("one", 48, 40)),
    Prompt(1, "let the sign say 'no', and don't change the rest", source=conforms.picture("two")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import LongCatImagePipeline
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    path = tmp_path_factory.mktemp("longcat_image_edit") / "base"
    words = tiny_words.qwen_tokenizer()
    with conforms.seeded():
        net, vae = tiny_words.longcat(16), tiny_words.autoencoder(16)  # the pipeline knows no other
        encoder = tiny_words.vision_language(words)
    LongCatImagePipeline(tiny_words.following_size(), vae, encoder, words, None, net).save_pretrained(path)
    Qwen2VLImageProcessorPil().save_pretrained(path / "text_processor")
    index = json.loads((path / "model_index.json").read_text())
    index |= {"_class_name": "LongCatImageEditPipeline", "text_processor": ["transformers", "Qwen2VLProcessor"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def options(folder: Path) -> dict[str, Any]:
    return {"name": "longcat_image_edit", "path": str(folder), "size": [32, 48], "max_tokens": 64}


@pytest.fixture(scope="module")
def model(options: dict[str, Any]) -> FlowModel:
    return conforms.loaded(**options)


def test_the_card() -> None:
    conforms.card("longcat_image_edit")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    print(conforms.parity(model, PROMPTS))


def test_the_contract(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_can_leave(options: dict[str, Any]) -> None:
    conforms.frees(PROMPTS[:2], **options)


def test_log_probabilities_are_those_of_the_path(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(options: dict[str, Any], algorithm: str, train: str, guidance: float, tmp_path: Path) -> None:
    data = conforms.picture_prompts(tmp_path / "prompts")
    conforms.trains(tmp_path / "run", options, algorithm, train, guidance, data)


def test_diffusers_loads_the_lora(options: dict[str, Any], tmp_path: Path) -> None:
    model = conforms.loaded(**options)
    conforms.exports(tmp_path, model, PROMPTS, guidance=2.0)


@torch.no_grad()
def test_the_source_is_read_by_the_network_and_by_the_encoder(model: FlowModel) -> None:
    one, other = model.encode([PROMPTS[0], Prompt(2, "make it red", source=conforms.picture("three"))])
    assert one["tokens"].shape == other["tokens"].shape
    assert (one["tokens"] - other["tokens"]).abs().max() > 1e-3
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    answers = [
        model.velocity(model.net, x, torch.ones(1), model.collate([{**one, "source": each["source"]}]))
        for each in (one, other)
    ]
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_a_prompt_without_a_source_is_refused(model: FlowModel) -> None:
    with pytest.raises(DataError, match="has 0 pictures, and this backbone reads 1"):
        model.encode([Prompt(0, "make it red")])


def test_more_pictures_than_one_are_refused(model: FlowModel) -> None:
    two = Prompt(0, "make it red", source=conforms.picture("one"), references=(conforms.picture("two"),))
    with pytest.raises(DataError, match="has 2 pictures, and this backbone reads 1"):
        model.encode([two])


def test_a_size_that_does_not_fit_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"multiples of 16 .* try \[512, 528\]"):
        registry.build("backbones", "longcat_image_edit", {"size": [512, 530]})
