"""Qwen-Image of a few thousand weights, against diffusers' pipeline."""

import math
from pathlib import Path

import pytest
import torch
from backbones import conforms, tiny_qwen
from making import normal, told

from rlkit import registry
from rlkit.backbones import qwen_image
from rlkit.errors import RecipeError
from rlkit.types import FlowModel, classifier_free

PROMPTS = told(["a red circle", "two blue crosses left of a green one", ""])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen.save(tmp_path_factory.mktemp("qwen_image") / "base", "QwenImagePipeline")


@pytest.fixture(scope="module")
def model(folder: Path) -> FlowModel:
    return conforms.loaded("qwen_image", path=str(folder), size=[16, 32])


def test_the_card() -> None:
    conforms.card("qwen_image")


def test_pictures_are_those_of_the_pipeline(model: FlowModel) -> None:
    conforms.parity(model, PROMPTS)


def test_it_does_what_every_backbone_does(model: FlowModel) -> None:
    conforms.contract(model, PROMPTS)


def test_its_encoders_can_leave(folder: Path) -> None:
    conforms.frees(PROMPTS[:2], "qwen_image", path=str(folder), size=[16, 32])


def test_the_ratio_is_1_before_any_update(model: FlowModel) -> None:
    conforms.on_policy(model, PROMPTS)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_a_recipe_trains_it(folder: Path, tmp_path: Path, algorithm: str, train: str, guidance: float) -> None:
    conforms.trains(tmp_path, {"name": "qwen_image", "path": str(folder), "size": [16, 16]}, algorithm, train, guidance)


def test_diffusers_loads_what_was_trained(folder: Path, tmp_path: Path) -> None:
    model = conforms.loaded("qwen_image", path=str(folder), size=[16, 16])
    conforms.exports(tmp_path, model, PROMPTS, 3.0)


def test_larger_pictures_are_shifted_more(model: FlowModel) -> None:
    assert model.at is not None
    shift = math.exp(0.5 + (128 * 128 - 256) * (0.9 - 0.5) / (8192 - 256))  # by the scheduler's options
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    plain = shift * even / (1 + (shift - 1) * even)
    expected = 1 - (1 - plain) * (1 - 0.02) / (1 - plain[-1])  # stretched, so that it ends at 0.02
    torch.testing.assert_close(model.at((512, 512)).sigmas(4)[:-1], expected, rtol=0, atol=1e-5)


def test_the_chat_ahead_of_a_prompt_is_left_out(model: FlowModel) -> None:
    words = tiny_qwen.tokenizer()
    assert len(words(qwen_image.CHAT.split("{}")[0]).input_ids) == qwen_image.AHEAD
    behind = len(words(qwen_image.CHAT.split("{}")[1]).input_ids)
    lengths = [len(one["tokens"]) - behind for one in model.encode(PROMPTS)]
    assert lengths == [len(words(prompt.text).input_ids) for prompt in PROMPTS]


def test_a_mask_is_there_only_where_lengths_differ(model: FlowModel) -> None:
    short, long = model.encode(PROMPTS[:2])
    assert "mask" not in model.collate([short, short])
    mask = model.collate([short, long])["mask"]
    assert mask.sum(dim=1).tolist() == [len(short["tokens"]), len(long["tokens"])]


def test_a_long_prompt_is_cut_and_what_is_lost_is_named(folder: Path) -> None:
    model = conforms.loaded("qwen_image", path=str(folder), size=[16, 16], max_tokens=4)
    assert model.unread("a red circle") == []
    assert model.unread("two blue crosses two blue crosses")[-2:] == ["blue", "crosses"]
    assert len(model.encode(told(["two blue crosses two blue crosses"]))[0]["tokens"]) == 4
    conforms.parity(model, told(["two blue crosses two blue crosses", "a red circle"]), (1.0,))


def test_guidance_keeps_the_length_of_each_token() -> None:
    told_one, untold = normal(2, 4, 4, 6, seed=1), normal(2, 4, 4, 6, seed=2)
    guided = qwen_image.rescaled(told_one, untold, 4.0)
    for row in range(2):
        for top, left in ((0, 0), (2, 4)):
            patch = (row, slice(None), slice(top, top + 2), slice(left, left + 2))
            plain = classifier_free(told_one, untold, 4.0)[patch]
            torch.testing.assert_close(guided[patch].norm(), told_one[patch].norm())
            torch.testing.assert_close(guided[patch] / guided[patch].norm(), plain / plain.norm())
    torch.testing.assert_close(qwen_image.rescaled(told_one, untold, 1.0), told_one)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"size": [100, 96]}, r"try \[96, 96\]"), ({"max_tokens": 0}, "between 1"), ({"max_tokens": 2000}, "and 1024")],
)
def test_options_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        registry.build("backbones", "qwen_image", options)


def test_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    with pytest.raises(RecipeError, match="Use the backbone 'qwen_image_edit'"):
        conforms.loaded("qwen_image", path=str(tmp_path))
