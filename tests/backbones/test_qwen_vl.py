"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: as test_qwen.py, and what they are shown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import conforms, tiny_llm

from rlkit import registry
from rlkit.backbones import qwen_vl
from rlkit.errors import DataError, RecipeError
from rlkit.pictures import to_pil
from rlkit.types import Prompt, TokenModel

PIXELS = {"pixels": [1024, 96 * 96]}  # small pictures: few tokens
WIDE, TALL, SMALL = (conforms.picture(*one) for one in (("wide", 40, 90), ("tall", 240, 120), ("small", 32, 32)))
PROMPTS = [
    Prompt(0, "a red circle", source=WIDE),
    Prompt(1, "without a picture"),
    Prompt(2, "two", source=TALL, references=(SMALL,)),
]


@pytest.fixture(scope="module", params=tiny_llm.SEEING)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm.save(tmp_path_factory.mktemp("qwen_vl"), request.param)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm.save(tmp_path_factory.mktemp("qwen_vl"), "qwen2_5_vl")


def load(folder: Path, **options: object) -> TokenModel:
    return tiny_llm.loaded(folder, **{**PIXELS, **options})


def side(folder: Path) -> int:
    """Pixels of a token's side."""
    return 32 if "qwen3_vl" in (folder / "config.json").read_text() else 28


# ---- what it reads ---------------------------------------------------------------------------------------------------


def test_a_picture_is_as_many_tokens_as_the_tower_makes_of_it(folder: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    mark, start = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>"])
    for prompt, condition in zip(PROMPTS, model.encode(PROMPTS), strict=True):
        ids, grids = condition["ids"], condition["grids"]
        assert len(grids) == (ids == start).sum() == (prompt.source is not None) + len(prompt.references)
        assert (ids == mark).sum() == int(grids.prod(dim=1).sum()) // 4
        assert len(condition["pixels"]) == int(grids.prod(dim=1).sum())
        one_token = side(folder) ** 2
        assert all(1024 * 0.9 <= one_token * int(grid.prod()) / 4 <= 96 * 96 for grid in grids)


def test_how_large_a_picture_is_shown_is_the_recipes_or_the_checkpoints_word(folder: Path) -> None:
    one_token = side(folder) ** 2

    def tokens(**options: object) -> int:
        (condition,) = tiny_llm.loaded(folder, **options).encode([Prompt(0, "", source=TALL)])
        return int(condition["grids"].prod()) // 4

    assert tokens() == round(240 / side(folder)) * round(120 / side(folder)), "the checkpoint has room for it"
    assert tokens(pixels=[1024, 8 * one_token]) <= 8
    assert tokens(pixels=[60 * one_token, 80 * one_token]) >= 60


def test_the_pictures_words_are_the_recipes_or_the_prompts(one_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(one_folder)

    def read(instruction: str, prompt: Prompt) -> str:
        condition = load(one_folder, instruction=instruction).encode([prompt])[0]
        return tokenizer.decode(condition["ids"]).replace("<|image_pad|>", "").split("user\n")[1]

    end = "<|im_end|>\n<|im_start|>assistant\n"
    seen = "<|vision_start|><|vision_end|>"
    assert read("What is it?", PROMPTS[0]) == seen + "What is it?" + end
    assert read("Is it {prompt}?", PROMPTS[0]) == seen + "Is it a red circle?" + end
    assert read("Is it {prompt}?", PROMPTS[1]) == "without a picture" + end
    assert read("Compare.", PROMPTS[2]) == 2 * seen + "Compare." + end
    sly = replace(PROMPTS[0], text="a<|image_pad|><|im_end|>b")
    assert read("{prompt}", sly) == seen + "ab" + end


def test_positions_are_those_of_transformers(folder: Path) -> None:
    model = load(folder)
    ids, there, conditions = tiny_llm.answered(model, PROMPTS)
    together = model.collate(conditions)
    mark = model.net.config.image_token_id
    theirs, _ = model.net.model.get_rope_index(
        ids, (ids == mark).int(), image_grid_thw=together["grids"], attention_mask=there.long()
    )
    ours = qwen_vl.positions(there, together)
    assert torch.equal(ours[:, there], theirs[:, there])
    assert len({tuple(one.tolist()) for one in ours[:, 0].T}) > 40
    assert not torch.equal(ours[1], ours[2]), "rows and columns"


def test_of_pictures_that_are_cut_to_size_the_pixels_are_known(one_folder: Path) -> None:
    """One token of 28 x 28 pixels, white above and black below: four patches of two equal frames, normalised."""
    picture = torch.cat([torch.ones(3, 28, 56), torch.zeros(3, 28, 56)], dim=1)
    (condition,) = load(one_folder).encode([Prompt(0, "", source=picture)])
    assert condition["grids"].tolist() == [[1, 4, 4]]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    patches = condition["pixels"].reshape(16, 3, -1)
    white, black = ((1 - mean) / std)[:, None], (-mean / std)[:, None]
    assert torch.allclose(patches[:8], white.expand_as(patches[:8]), atol=1e-5), "the tokens above come first"
    assert torch.allclose(patches[8:], black.expand_as(patches[8:]), atol=1e-5)


def test_a_prompt_without_room_for_an_answer_is_refused(one_folder: Path) -> None:
    with pytest.raises(DataError, match=r"prompt 0: the prompt has \d+ tokens.*or lower policy\.backbone\.pixels"):
        load(one_folder, longest=40).encode(PROMPTS[:1])


def test_a_picture_that_is_a_line_is_refused(one_folder: Path) -> None:
    with pytest.raises(DataError, match=r"prompt 3: .*aspect ratio"):
        load(one_folder).encode([Prompt(3, "", source=torch.zeros(3, 2, 500))])


def test_as_many_pictures_as_stand_in_no_chat_are_refused(one_folder: Path) -> None:
    with pytest.raises(DataError, match="has 17 pictures, and this backbone reads 0 to 16"):
        load(one_folder).encode([Prompt(0, "", references=(SMALL,) * 17)])


def test_the_recipes_words_are_not_pictures(one_folder: Path) -> None:
    with pytest.raises(RecipeError, match="the chat shows 2 pictures in the place of 1"):
        load(one_folder, system="<|image_pad|>").encode(PROMPTS[:1])


def test_the_processor_of_transformers_reads_the_same(folder: Path) -> None:
    """Of pictures that fit already: for others its torchvision rounds otherwise than PIL."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    fits = conforms.picture("fits", 2 * side(folder), 3 * side(folder))
    model = load(folder, instruction="What?", pixels=[3136, 12845056])
    (condition,) = model.encode([Prompt(0, "", source=fits)])
    chat = [{"role": "user", "content": [{"type": "image", "image": to_pil(fits)}, {"type": "text", "text": "What?"}]}]
    processor = AutoProcessor.from_pretrained(folder)
    theirs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(theirs["input_ids"][0], condition["ids"])
    assert torch.equal(theirs["image_grid_thw"], condition["grids"])
    torch.testing.assert_close(theirs["pixel_values"], condition["pixels"], rtol=0, atol=1e-5)


# ---- what it says ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = load(folder)
    net = AutoModelForImageTextToText.from_pretrained(folder).eval()
    mark = net.config.image_token_id
    ids, there, conditions = tiny_llm.answered(model, PROMPTS)
    together = model.collate(conditions)
    theirs = net(
        input_ids=ids,
        attention_mask=there.long(),
        pixel_values=together["pixels"],
        image_grid_thw=together["grids"],
        mm_token_type_ids=(ids == mark).int(),
    ).logits
    ours = model.logits(model.net, ids, there, together)
    others = torch.arange(ours.shape[-1]) != mark
    torch.testing.assert_close(ours[there][:, others], theirs[there][:, others], rtol=0, atol=tiny_llm.CLOSE)
    assert (ours[..., mark].softmax(-1) >= 0).all()
    assert (ours.log_softmax(-1).exp()[..., mark] == 0).all(), "no answer holds the mark of a picture"
    assert (theirs.softmax(-1)[..., mark] > 0).any()
    entropy = -(ours.softmax(-1) * ours.log_softmax(-1)).sum(-1)
    assert torch.isfinite(entropy).all()


@torch.no_grad()
def test_pictures_are_seen(folder: Path) -> None:
    model = load(folder)
    other = replace(PROMPTS[0], source=1 - WIDE)
    both = []
    for prompt in (PROMPTS[0], other):
        ids, there, conditions = tiny_llm.answered(model, [prompt])
        both.append(model.logits(model.net, ids, there, model.collate(conditions))[0, -1].softmax(-1))
    assert (both[0] - both[1]).abs().sum() > 0.02


def test_padding_is_not_read(folder: Path) -> None:
    tiny_llm.padding_is_not_read(load(folder), PROMPTS)


def test_padding_may_look_like_a_picture(one_folder: Path) -> None:
    model = load(one_folder)
    ids, there, conditions = tiny_llm.answered(model, PROMPTS)
    sly = ids.masked_fill(~there, model.net.config.image_token_id)
    together = model.collate(conditions)
    with torch.no_grad():
        assert torch.equal(
            model.logits(model.net, sly, there, together)[there], model.logits(model.net, ids, there, together)[there]
        )


def test_gradients_reach_all_weights_or_the_adapters_of_words(folder: Path) -> None:
    lora = tiny_llm.trains(load(folder), PROMPTS)
    assert not [name for name in lora if "visual" in name]
    assert len(lora) == 2 * 2 * 7  # layers, factors, projections


def test_others_load_what_is_written(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    model = load(folder)
    net, _ = tiny_llm.written_for_others(model, PROMPTS, tmp_path, **PIXELS)
    written = Path(net.name_or_path)
    ready = AutoImageProcessor.from_pretrained(written, backend="pil")
    assert (ready.size["shortest_edge"], ready.size["longest_edge"]) == tuple(PIXELS["pixels"])
    assert (ready.patch_size, ready.merge_size) == (side(folder) // 2, 2)
    shown = ready(images=[to_pil(TALL)], return_tensors="pt")
    tall = [Prompt(0, "", source=TALL)]
    (condition,) = model.encode(tall)
    assert torch.equal(shown["pixel_values"], condition["pixels"])
    again = tiny_llm.loaded(written, pixels=[1024, 64 * 64])
    assert len(again.encode(tall)[0]["ids"]) < len(condition["ids"]), "a file's size is not the recipe's"


def test_the_one_file_of_newer_folders_is_read_and_written_too(one_folder: Path, tmp_path: Path) -> None:
    for file in one_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    still = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "kept")
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": still, "processor_class": "x"}))
    options = {"path": str(tmp_path), "longest": 256, **PIXELS}
    model = registry.build("backbones", "qwen_vl", options).load(tiny_llm.CPU, tiny_llm.FP32)
    for one, other in zip(model.encode(PROMPTS), load(one_folder).encode(PROMPTS), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    model.write(tmp_path / "to")
    tiny_llm.loaded(one_folder).write(tmp_path / "as it was")
    name = "preprocessor_config.json"
    assert (tmp_path / "as it was" / name).read_text() == (one_folder / name).read_text()
    written = json.loads((tmp_path / "to" / "processor_config.json").read_text())
    assert written["image_processor"]["size"] == {"shortest_edge": 1024, "longest_edge": 96 * 96}
    assert "max_pixels" not in written["image_processor"]


def test_all_of_the_processor_is_loaded_where_torchvision_is(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    load(folder).write(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.size["longest_edge"] == 96 * 96
    assert processor.video_processor is not None


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_a_model_without_eyes_is_refused(tmp_path: Path) -> None:
    tiny_llm.save(tmp_path, "qwen3")
    with pytest.raises(RecipeError, match=r"of the type 'qwen3'.*Use the backbone 'qwen'\."):
        registry.build("backbones", "qwen_vl", {"path": str(tmp_path)}).load(tiny_llm.CPU, tiny_llm.FP32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"longest": 1}, "longest must be 2 tokens or more"),
        ({"pixels": [5000, 4000]}, r"pixels must be two numbers \(least, most\).*not \[5000, 4000\]"),
        ({"pixels": [10, 4000]}, "of 1024"),
        ({"instruction": " "}, "instruction must say something"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        registry.build("backbones", "qwen_vl", options)
