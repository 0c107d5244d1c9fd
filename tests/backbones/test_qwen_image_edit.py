"""Qwen-Image-Edit and its Plus pipeline, a few thousand weights each, against diffusers' pipelines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_qwen
from torch import Tensor

from rlkit import registry
from rlkit.backbones import qwen_image_edit
from rlkit.backbones.qwen_image_edit import ONE, PLUS
from rlkit.errors import DataError, RecipeError
from rlkit.types import FlowModel, Prompt

picture = conforms.picture
SOURCES = (
    Prompt(0, "make it red", source=picture("a", 40, 64)),
    Prompt(1, "two blue crosses, and make it green", source=picture("b", 64, 40)),
    Prompt(2, "", source=picture("c", 48, 48)),
)
SEVERAL = (
    Prompt(0, "make it red", source=picture("a", 40, 64)),
    Prompt(1, "a red circle on it", source=picture("b", 64, 40), references=(picture("d"), picture("e", 20, 60))),
    Prompt(2, "", references=(picture("c", 64, 40),)),
)
OPTIONS = {"size": [16, 32], "picture_area": 32 * 32}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-VL is shown 4 tokens a picture in the place of 196: quicker, and the text counts for more."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    assert pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE == qwen_image_edit.READ_AREA
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(qwen_image_edit, "READ_AREA", 64 * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline. That of Plus is like 2511's: the time of picture tokens is 0."""
    made: dict[str, Path] = {}

    def at(pipeline: str) -> Path:
        if pipeline not in made:
            made[pipeline] = tiny_qwen.save(tmp_path_factory.mktemp(pipeline) / "base", pipeline, pipeline == PLUS)
        return made[pipeline]

    return at


def load(folder: Path, **options: Any) -> FlowModel:
    return conforms.loaded("qwen_image_edit", path=str(folder), **(OPTIONS | options))


@pytest.fixture(scope="module")
def one(folder: Callable[[str], Path]) -> FlowModel:
    return load(folder(ONE))


@pytest.fixture(scope="module")
def plus(folder: Callable[[str], Path]) -> FlowModel:
    return load(folder(PLUS))


def test_the_card() -> None:
    conforms.card("qwen_image_edit")


def test_pictures_are_those_of_the_pipeline(one: FlowModel) -> None:
    conforms.parity(one, SOURCES)


def test_pictures_are_those_of_the_pipeline_that_reads_several(plus: FlowModel) -> None:
    conforms.parity(plus, SEVERAL)


def test_it_does_what_every_backbone_does(one: FlowModel, plus: FlowModel) -> None:
    conforms.contract(one, SOURCES)
    conforms.contract(plus, SEVERAL)


@pytest.mark.parametrize("pipeline", [ONE, PLUS])
def test_its_encoders_can_leave(folder: Callable[[str], Path], pipeline: str) -> None:
    conforms.frees(SOURCES[:2], "qwen_image_edit", path=str(folder(pipeline)), **OPTIONS)


def test_the_ratio_is_1_before_any_update(plus: FlowModel) -> None:
    conforms.on_policy(plus, SEVERAL)


@pytest.mark.parametrize(("algorithm", "train", "guidance"), conforms.RUNS)
def test_a_recipe_trains_it(
    folder: Callable[[str], Path], tmp_path: Path, algorithm: str, train: str, guidance: float
) -> None:
    several = train == "lora"
    options = {"name": "qwen_image_edit", "path": str(folder(PLUS if several else ONE)), "size": [16, 16]}
    data = conforms.picture_prompts(tmp_path / "data", references=2 if several else 0)
    conforms.trains(tmp_path / "run", options | {"picture_area": 1024}, algorithm, train, guidance, data)


def test_diffusers_loads_what_was_trained(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(folder(PLUS))
    conforms.exports(tmp_path, model, SEVERAL, 3.0)


def test_each_checkpoint_says_what_it_can_do(one: FlowModel, plus: FlowModel) -> None:
    assert one.tasks == ("edit",)
    assert plus.tasks == ("edit", "in_context")


def test_every_picture_is_read(plus: FlowModel) -> None:
    def drawn(prompt: Prompt) -> Tensor:
        x = torch.zeros(1, *plus.latent_shape)
        with torch.no_grad():
            return plus.velocity(plus.net, x, torch.ones(1), plus.collate(plus.encode([prompt])))

    before = drawn(SEVERAL[1])
    changed = picture("other", 32, 32)
    others = [
        replace(SEVERAL[1], source=changed),
        *(
            replace(SEVERAL[1], references=tuple(changed if i == j else r for j, r in enumerate(SEVERAL[1].references)))
            for i in range(2)
        ),
    ]
    for other in others:
        assert (drawn(other) - before).abs().max() > 1e-4


def test_pictures_are_brought_to_their_area(plus: FlowModel) -> None:
    (condition,) = plus.encode([SEVERAL[1]])
    sides = [qwen_image_edit.fitted((w, h), 1024) for h, w in ((64, 40), (32, 32), (20, 60))]
    assert condition["grids"].tolist() == [[h // 4, w // 4] for w, h in sides]
    assert len(condition["pictures"]) == condition["grids"].prod(dim=1).sum()
    assert qwen_image_edit.fitted((1600, 900), 1024 * 1024) == (1376, 768)


def test_the_encoder_gives_pictures_two_axes_of_positions(one: FlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    seen: list[Tensor | None] = []
    usual = Qwen2_5_VLModel.compute_3d_position_ids

    def watched(self: Any, *args: Any, **options: Any) -> Tensor | None:
        seen.append(usual(self, *args, **options))
        return seen[-1]

    monkeypatch.setattr(Qwen2_5_VLModel, "compute_3d_position_ids", watched)
    one.encode(SOURCES[:1])
    (positions,) = seen
    assert positions is not None, "the encoder was not told which tokens are pictures"
    time, row, column = positions[:, 0]
    assert not torch.equal(row, column)
    assert not torch.equal(time, row)


def test_too_many_pictures_or_none(one: FlowModel, plus: FlowModel) -> None:
    with pytest.raises(DataError, match="has 2 pictures, and this backbone reads 1"):
        one.encode([replace(SOURCES[0], references=(picture("d"),))])
    with pytest.raises(DataError, match="has 4 pictures, and this backbone reads 1 to 3"):
        plus.encode([replace(SOURCES[0], references=(picture("d"),) * 3)])
    with pytest.raises(DataError, match=r"prompt 7: .* has 0 pictures"):
        plus.encode([Prompt(7, "nothing to edit")])


def test_a_long_prompt_is_cut_and_what_is_lost_is_named(folder: Callable[[str], Path]) -> None:
    model = load(folder(ONE), max_tokens=4)
    long = "two blue crosses two blue crosses"
    assert model.unread(long)[-2:] == ["blue", "crosses"]
    whole, cut, short = (
        load(folder(ONE), max_tokens=limit).encode([replace(SOURCES[0], text=text)])[0]["tokens"]
        for limit, text in ((9, long), (4, long), (9, ""))
    )
    assert len(cut) == len(short) + 4 < len(whole)


def test_a_prompt_cannot_stand_for_a_picture(one: FlowModel) -> None:
    texts = ("make it red", "make<|image_pad|> it red")
    plain, marked = one.encode([replace(SOURCES[0], text=text) for text in texts])
    assert torch.equal(plain["tokens"], marked["tokens"])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"size": [100, 96]}, r"try \[96, 96\]"), ({"max_tokens": 0}, "between 1"), ({"picture_area": 9}, "32 x 32")],
)
def test_options_that_cannot_be(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        registry.build("backbones", "qwen_image_edit", options)


def test_the_reader_agrees_with_that_of_transformers() -> None:
    pytest.importorskip("torchvision", reason="transformers' own processor needs it")
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from rlkit.pictures import to_pil

    words, pictures = tiny_qwen.tokenizer(), Qwen2VLImageProcessorPil()
    theirs = Qwen2VLProcessor(image_processor=pictures, tokenizer=words, video_processor=Qwen2VLVideoProcessor())
    chat = qwen_image_edit.CHAT.format("".join(qwen_image_edit.PICTURE[PLUS].format(i) for i in (1, 2)), "make it red")
    shown = [to_pil(picture("a", 40, 64)), to_pil(picture("b", 64, 90))]
    expected = theirs(text=[chat], images=shown, padding=True, return_tensors="pt")
    found = qwen_image_edit.Reader(words, pictures)([chat], shown)
    assert set(found) | {"mm_token_type_ids"} == set(expected)
    for name, column in found.items():
        torch.testing.assert_close(column, expected[name], rtol=0, atol=0)
