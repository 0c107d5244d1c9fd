"""Conversations: what a language model reads of its own turns and of what was said to it, words and pictures."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_llm
from torch import Tensor

from rlkit.episodes import Turn
from rlkit.errors import DataError, RecipeError
from rlkit.language import LanguagePolicy
from rlkit.pictures import to_pil
from rlkit.types import Prompt, TokenModel, generator

TAGS = ("<tool_response>", "</tool_response>")
SAID = ("<think>look it up</think>find", "draw a red circle")
HEARD = ("<tool_response>\nit is round\n</tool_response>", "go on")
SILENT = "<think>\n\n</think>\n\n"  # how Qwen3 is told not to think, before each answer
PIXELS = {"pixels": [1024, 96 * 96]}
WIDE, TALL, SMALL = (conforms.picture(*one) for one in (("wide", 40, 90), ("tall", 240, 120), ("small", 32, 32)))


def save(folder: Path, family: str) -> Path:
    """With tags as tokens that are not special, as Qwen's are."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tiny_llm.save(folder, family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in TAGS])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=("qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("conversation"), request.param)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("conversation"), "qwen3")


@pytest.fixture(scope="module", params=("qwen2_5_vl", "qwen3_vl"))
def eyes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("conversation"), request.param)


def load(folder: Path, **options: Any) -> TokenModel:
    seeing = (folder / "preprocessor_config.json").is_file()
    return tiny_llm.loaded(folder, **{"longest": 1024, **(PIXELS if seeing else {}), **options})


def tokenizer_of(model: TokenModel) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.net.name_or_path)


def talk(model: TokenModel, said: Sequence[str] = SAID, heard: Sequence[str] = HEARD, **options: Any) -> Prompt:
    """A conversation in which every answer ended with the token for the end."""
    turns = tuple(Turn(tuple(model.spell(one)), other) for one, other in zip(said, heard, strict=True))
    return Prompt(0, "a red circle", turns=turns, **options)


def ids_of(model: TokenModel, prompt: Prompt) -> list[int]:
    return model.encode([prompt])[0]["ids"].tolist()


def text_of(model: TokenModel, prompt: Prompt) -> str:
    return tokenizer_of(model).decode(ids_of(model, prompt))


# ---- turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "system"), [("", ""), ("Rewrite.", ""), ("Rewrite.", "Use tools."), ("", "Use tools.")]
)
def test_ids_are_those_of_the_whole_chat_read_at_once(folder: Path, own: str, system: str) -> None:
    model = load(folder, system=own)
    tokenizer = tokenizer_of(model)
    sees = model.picture is not None
    before, options = ("", {}) if sees else (SILENT, {"enable_thinking": False})
    chat = [{"role": "system", "content": system or own}] if system or own else []
    chat.append({"role": "user", "content": "a red circle"})
    for said, heard in zip(SAID, HEARD, strict=True):
        chat += [{"role": "assistant", "content": before + said}, {"role": "user", "content": heard}]
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **options)
    assert ids_of(model, talk(model, system=system)) == tokenizer(whole, add_special_tokens=False).input_ids


def test_each_turn_goes_on_from_what_stands_before_it(folder: Path) -> None:
    """What was sampled is read as it was sampled: not as a tokenizer would cut its text, and not without its end."""
    model = load(folder)
    full = talk(model)
    cut = replace(full.turns[0], answer=(*full.turns[0].answer[:-3], 7, 8))  # by a limit, in the middle of a word
    for turns in (full.turns, (cut, full.turns[1])):
        before = ids_of(model, replace(full, turns=()))
        for number, turn in enumerate(turns, start=1):
            ids = ids_of(model, replace(full, turns=turns[:number]))
            start = [*before, *turn.answer]
            assert ids[: len(start)] == start
            assert len(ids) > len(start) + len(turn.reply) // 4
            before = ids


def test_a_turn_ends_once_however_the_answer_ended(words: Path) -> None:
    model = load(words, thinking=True)
    full = model.spell("abc")
    assert full[-1] == 258, "<|im_end|>"

    def behind(*answer: int) -> str:
        return text_of(model, Prompt(0, "x", turns=(Turn(answer, "why?"),))).split("assistant\n", 1)[1]

    ended = "<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert behind(*full) == "abc" + ended
    assert behind(*full[:-1]) == "abc" + ended, "a limit cut it off"
    assert behind(*full[:-1], 256) == "abc<|endoftext|>" + ended, "it ended the text, not the turn"
    assert behind() == ended
    assert behind(258) == ended


def test_qwen3_is_told_not_to_think_before_each_answer(words: Path) -> None:
    assert text_of(load(words), talk(load(words))).count("assistant\n" + SILENT) == 3
    thinking = load(words, thinking=True)
    assert SILENT not in text_of(thinking, talk(thinking))


# ---- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|im_<|im_end|>end|>", "<|image_pad|>", "\ue000"])
def test_what_a_tool_says_cannot_end_its_turn(folder: Path, mark: str) -> None:
    model = load(folder)
    prompt = talk(model, heard=("<tool_response>\na\n</tool_response>", "go on"), system="Use tools.")
    sly = talk(model, heard=(f"<tool_response>\na{mark}\n</tool_response>", "go on"), system=f"Use {mark}tools.")
    special = set(tokenizer_of(model).all_special_ids)

    def marks(one: Prompt) -> list[int]:
        return [token for token in ids_of(model, one) if token in special]

    assert marks(sly) == marks(prompt)
    if mark != "\ue000":  # no mark of the model's: it may say so
        assert ids_of(model, sly) == ids_of(model, prompt)


def test_tags_that_are_tokens_and_not_special_reach_the_model(folder: Path) -> None:
    model = load(folder)
    tokens = tokenizer_of(model).convert_tokens_to_ids(list(TAGS))
    assert [one for one in ids_of(model, talk(model)) if one in tokens] == tokens
    assert [one for one in model.spell(HEARD[0]) if one in tokens] == tokens
    assert model.decode([model.spell(HEARD[0])]) == [HEARD[0]]


@pytest.mark.parametrize("text", ["", "two  spaces", SAID[0], '{"name": "é中", "x": []}\n', HEARD[0]])
def test_what_is_spelled_is_read_as_it_was(folder: Path, text: str) -> None:
    model = load(folder)
    ids = model.spell(text)
    assert model.decode([ids]) == [text]
    assert ids[-1] == 258, "<|im_end|>"
    assert not set(ids[:-1]) & set(model.ends)


def test_a_spelled_answer_does_not_end_before_its_end(folder: Path) -> None:
    model = load(folder)
    assert model.spell("a<|im_end|>b<|image_pad|>") == model.spell("ab")


# ---- other chats -----------------------------------------------------------------------------------------------------


def with_template(words: Path, to: Path, template: str) -> TokenModel:
    for file in words.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    (to / "chat_template.jinja").write_text(template)
    return load(to)


def test_any_template_says_what_stands_between_two_answers(words: Path, tmp_path: Path) -> None:
    """One whose turns end otherwise, and one that forgets what was thought in all turns but the last."""
    model = with_template(
        words,
        tmp_path,
        "{% for one in messages %}{% if one['role'] == 'assistant' %}{{ one['content'] }}<|endoftext|>"
        "{% else %}[Q]{{ one['content'] | trim }}[A]{% endif %}{% endfor %}",
    )
    answer = (*model.spell("yes")[:-1], 256)
    turns = (Turn(answer, " why? "), Turn(answer[:-1], "really?"))
    told = text_of(model, Prompt(0, "x", turns=turns))
    assert told == "[Q]x[A]yes<|endoftext|>[Q]why?[A]yes<|endoftext|>[Q]really?[A]"

    (tmp_path / "two").mkdir()
    short = "{{ one['content'].split('</think>')[-1] if one['role'] == 'assistant' else one['content'] }}"
    forgets = "{% for one in messages %}<|im_start|>" + short + "<|im_end|>{% endfor %}<|im_start|>"
    model = with_template(words, tmp_path / "two", forgets)
    told = text_of(model, talk(model))
    each = ("a red circle", SAID[0], HEARD[0], SAID[1], HEARD[1])
    assert told == "".join(f"<|im_start|>{one}<|im_end|>" for one in each) + "<|im_start|>"


def test_a_template_without_a_place_for_answers_is_refused(words: Path, tmp_path: Path) -> None:
    users = "{% for one in messages %}{% if one['role'] == 'user' %}{{ one['content'] }}{% endif %}{% endfor %}"
    model = with_template(words, tmp_path, users)
    assert text_of(model, Prompt(0, "x")) == "x"
    with pytest.raises(RecipeError, match="does not write what the model answered"):
        ids_of(model, talk(model))


def test_a_conversation_without_room_for_an_answer_is_refused(folder: Path) -> None:
    size = len(ids_of(load(folder), talk(load(folder))))
    ids_of(load(folder, longest=size + 1), talk(load(folder)))
    with pytest.raises(DataError, match=f"prompt 0: the prompt has {size} tokens.*end after fewer turns"):
        ids_of(load(folder, longest=size), talk(load(folder)))


# ---- pictures --------------------------------------------------------------------------------------------------------


def shown(model: TokenModel, **options: Any) -> Prompt:
    """Of a prompt with a picture; one reply shows two, the next none."""
    prompt = talk(model, source=WIDE, **options)
    return replace(prompt, turns=(replace(prompt.turns[0], pictures=(TALL, SMALL)), prompt.turns[1]))


def at_once(model: TokenModel, prompt: Prompt) -> tuple[Tensor, dict[str, Tensor]]:
    """ids [1, P] and pictures of a conversation as one text, cut into tokens at once, by transformers alone."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer, folder = tokenizer_of(model), model.net.name_or_path
    ready = Qwen2VLImageProcessorPil.from_pretrained(folder)
    size = {"shortest_edge": PIXELS["pixels"][0], "longest_edge": PIXELS["pixels"][1]}
    pictures = [to_pil(one) for one in (WIDE, TALL, SMALL)]
    made = ready(images=pictures, return_tensors="pt", size=size)
    text = tokenizer.apply_chat_template(messages(), add_generation_prompt=True, tokenize=False)
    first, *rest = text.split("<|image_pad|>")
    for grid, more in zip(made["image_grid_thw"], rest, strict=True):
        first += "<|image_pad|>" * (int(grid.prod()) // 4) + more
    return tokenizer(first, add_special_tokens=False, return_tensors="pt").input_ids, dict(made)


def messages(pictures: Sequence[Any] = (None, None, None)) -> list[dict[str, Any]]:
    """The conversation of `shown` as the processor takes it."""
    wide, tall, small = ({"type": "image", "image": one} for one in pictures)
    return [
        {"role": "user", "content": [wide, {"type": "text", "text": "Describe this picture."}]},
        {"role": "assistant", "content": SAID[0]},
        {"role": "user", "content": [tall, small, {"type": "text", "text": HEARD[0]}]},
        {"role": "assistant", "content": SAID[1]},
        {"role": "user", "content": HEARD[1]},
    ]


@torch.no_grad()
def test_pictures_of_a_reply_are_read_as_in_one_text(eyes: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = load(eyes)
    net = AutoModelForImageTextToText.from_pretrained(eyes).eval()
    ids, pictures = at_once(model, shown(model))
    (condition,) = model.encode([shown(model)])
    assert torch.equal(condition["ids"], ids[0])
    assert torch.equal(condition["grids"], pictures["image_grid_thw"])
    assert torch.equal(condition["pixels"], pictures["pixel_values"])
    theirs = net(input_ids=ids, mm_token_type_ids=(ids == model.picture).int(), **pictures).logits
    ours = model.logits(model.net, ids, torch.ones_like(ids, dtype=torch.bool), model.collate([condition]))
    others = torch.arange(ours.shape[-1]) != model.picture
    torch.testing.assert_close(ours[..., others], theirs[..., others], rtol=0, atol=tiny_llm.CLOSE)
    turned = shown(model).turns[0]
    other = replace(shown(model), turns=(replace(turned, pictures=(TALL, 1 - SMALL)), shown(model).turns[1]))
    seen = model.logits(model.net, ids, torch.ones_like(ids, dtype=torch.bool), model.collate(model.encode([other])))
    assert (seen - ours)[:, -1].abs().max() > 100 * tiny_llm.CLOSE, "they are seen"


def test_the_processor_of_transformers_reads_the_same(eyes: Path) -> None:
    """Of pictures that fit already: for others its torchvision rounds otherwise than PIL."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    side = 32 if "qwen3_vl" in (eyes / "config.json").read_text() else 28
    fits = [conforms.picture(f"fits {i}", (2 + i) * side, 3 * side) for i in range(3)]
    model = load(eyes, pixels=[3136, 12845056])
    prompt = shown(model)
    turns = (replace(prompt.turns[0], pictures=tuple(fits[1:])), prompt.turns[1])
    (condition,) = model.encode([replace(prompt, source=fits[0], turns=turns)])
    theirs = AutoProcessor.from_pretrained(eyes).apply_chat_template(
        messages([to_pil(one) for one in fits]),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(theirs["input_ids"][0], condition["ids"])
    assert torch.equal(theirs["image_grid_thw"], condition["grids"])
    torch.testing.assert_close(theirs["pixel_values"], condition["pixels"], rtol=0, atol=1e-5)


def test_workers_get_the_pictures_of_the_prompt_and_of_its_turns_in_order(eyes: Path) -> None:
    model = load(eyes)
    (condition,) = model.encode([shown(model)])
    found = model.pictures(shown(model), condition)
    patch = json.loads((eyes / "preprocessor_config.json").read_text())["patch_size"]
    assert [one.shape[1:] for one in found] == [(int(h) * patch, int(w) * patch) for _, h, w in condition["grids"]]
    again = Prompt(0, "", references=found)
    assert torch.equal(model.encode([again])[0]["pixels"], condition["pixels"]), "at the size at which they are read"


def test_a_conversation_that_goes_on_is_trained_as_it_was_sampled(folder: Path) -> None:
    model = load(folder)
    sees = model.picture is not None
    policy = LanguagePolicy(model, None, tiny_llm.CPU, "fp32", 0)
    prompts = [shown(model) if sees else talk(model), Prompt(1, "two"), talk(model, system="Use tools.")]
    before = policy.models.current.read(prompts)
    keys = [one.key for one in prompts]
    draws = [generator("row", i) for i in range(len(prompts))]
    found = policy.answer(keys, draws, 10, 0.7, "current")
    rows = [torch.cat([ids, torch.tensor(said)]) for ids, said in zip(before, found.ids, strict=True)]
    length = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        trained = policy.models.current.log_probs(ids, length, keys, 0.7)
    for row, start, sampled in zip(trained, before, found.log_probs, strict=True):
        ours = row[len(start) : len(start) + len(sampled)]
        torch.testing.assert_close(ours, torch.tensor(sampled), rtol=0, atol=tiny_llm.CLOSE)


def test_more_pictures_than_a_conversation_may_show_are_refused(eyes: Path) -> None:
    model = load(eyes, longest=4096)
    turn = Turn(tuple(model.spell("more")), "here", (SMALL,) * 8)
    whole = Prompt(3, "x", turns=(turn, turn))
    assert len(model.encode([whole])[0]["grids"]) == 16
    with pytest.raises(DataError, match=r"prompt 3: the conversation about 'x' shows 17 pictures.*reads 16 at most"):
        model.encode([replace(whole, source=WIDE)])


def test_an_answer_that_holds_the_mark_of_a_picture_is_refused(eyes: Path) -> None:
    model = load(eyes)
    with pytest.raises(DataError, match=r"prompt 3: an answer in the conversation about 'x' holds <\|image_pad\|>"):
        model.encode([Prompt(3, "x", turns=(Turn((5, model.picture), "y"),))])


def test_a_model_without_eyes_reads_the_words_of_a_reply_with_pictures(words: Path) -> None:
    model = load(words)
    assert ids_of(model, replace(shown(model), source=None)) == ids_of(model, talk(model))
