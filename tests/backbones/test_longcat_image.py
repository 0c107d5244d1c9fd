"""LongCat-Image of a few thousand weights, against diffusers' pipeline."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from backbones import conforms, tiny_words
from making import told

from rlkit import registry
from rlkit.backbones import longcat_image
from rlkit.errors import RecipeError
from rlkit.types import FlowModel

PROMPTS = told(["a red circle", "two blue squares that don't say 'no' or \"yes\"", ""])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import LongCatImagePipeline

    path = tmp_path_factory.mktemp("longcat_image") / "base"
    words = tiny_words.qwen_tokenizer()
    with conforms.seeded():
        net, vae, encoder = tiny_words.longcat(), tiny_words.autoencoder(), tiny_words.vision_language(words)
    LongCatImagePipeline(tiny_words.following_size(), vae, encoder, words, None, net).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def options(folder: Path) -> dict[str, Any]:
    return {"name": "longcat_image", "path": str(folder), "size": [16, 32], "max_tokens": 64}


@pytest.fixture(scope="module")
def model(options: dict[str, Any]) -> FlowModel:
    return conforms.loaded(**options)


def test_the_card() -> None:
    conforms.card("longcat_image")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    print(conforms.parity(model, PROMPTS))


def test_the_contract(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_can_leave(options: dict[str, Any]) -> None:
    conforms.frees(PROMPTS[:2], **options)


def test_log_probabilities_are_those_of_the_path(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS[:2])


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_it_trains(options: dict[str, Any], algorithm: str, train: str, guidance: float, tmp_path: Path) -> None:
    conforms.trains(tmp_path, options, algorithm, train, guidance)


def test_diffusers_loads_the_lora(options: dict[str, Any], tmp_path: Path) -> None:
    model = conforms.loaded(**options)
    conforms.exports(tmp_path, model, PROMPTS[:2], guidance=2.0)


@pytest.mark.parametrize(
    "text",
    [
        "no quotation",
        "",
        "a sign 'go' here",
        'say "one two", then “three” and ‘four’',
        "it's 'not' open",
        "'it's mine' he said",
        "an open 'quote and no more",
        "‘mixed' ends” “",
        '""',
    ],
)
def test_quotations_are_cut_as_the_pipeline_cuts_them(text: str) -> None:
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

    theirs = [one for piece, quoted in split_quotation(text) for one in (piece if quoted else [piece])]
    assert [one for one in longcat_image.pieces(text) if one] == theirs


def test_words_with_an_apostrophe_are_kept() -> None:
    text = "don't say 'no', can't you"
    assert "".join(longcat_image.pieces(text)) == text
    assert [one for one in longcat_image.pieces(text) if len(one) > 1] == ["don't say ", ", can't you"]


def test_words_beyond_the_longest_prompt_are_named(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    assert model.unread("a " * 30 + "red circle") == ["circle"]
    assert model.unread("a " * 30 + "'red' circle") == ["'red'", "circle"]


def test_a_size_that_does_not_fit_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"multiples of 16 .* try \[512, 528\]"):
        registry.build("backbones", "longcat_image", {"size": [512, 530]})


def test_the_editing_checkpoint_is_the_other_backbones(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("LongCatImagePipeline", "LongCatImageEditPipeline"))
    with pytest.raises(RecipeError, match="Use the backbone 'longcat_image_edit'"):
        conforms.loaded("longcat_image", path=str(tmp_path / "other"))
