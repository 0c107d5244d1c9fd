"""The tiny agent's tokenizer, and how it is loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlkit.agents.experience import Bundle, told
from rlkit.backbones import tiny_agent
from rlkit.backbones.tiny_agent import TinyAgent
from rlkit.episodes import Turn
from rlkit.errors import RecipeError
from rlkit.pretrain.agent import assemble, save
from rlkit.types import Prompt
from rlkit.world import atlas, grammar

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_agent.new_tokenizer()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agent")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save(folder, assemble(), {})
    return folder


# ---- words -----------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token_with_and_without_a_space(tokenizer: Any) -> None:
    words = tiny_agent.vocabulary()
    assert {*atlas.FIRST, *atlas.SECOND, *atlas.STYLES, *grammar.COLOURS, "gen_prompt", "query_knowledge"} <= {*words}
    for text in (*words, *(f" {word}" for word in words), *tiny_agent.PUNCTUATION):
        assert len(tokenizer(text).input_ids) == 1, text


@pytest.mark.parametrize("text", ["Ünbekannt 漢字", "x1y 23\n\n  a", '{"a": [1, {"b_c": "d"}]}', "a  <tool_call > \t"])
def test_any_other_text_is_readable_byte_by_byte(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_tags_are_words_and_marks_are_none(tokenizer: Any) -> None:
    """A tag that were special would be taken out of what the policy wrote, and out of every reply."""
    text = "<think>a</think><tool_call></tool_call><answer></answer><tool_response></tool_response>"
    ids = tokenizer(text).input_ids
    assert len(ids) == 9
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(("kind", "most"), [("flag", 110), ("emblem", 155)])
def test_an_episode_is_short(tokenizer: Any, kind: str, most: int) -> None:
    request = next(one for one in atlas.panel("train", 2) if one.kind == kind)
    messages = [{"role": "user", "content": request.text}]
    replies = [f"1. {request.subject}: {atlas.document(request).text}", atlas.skills().get(request.style, "")]
    for text, reply in zip(atlas.script(request, np.random.default_rng(0)), [*replies, ""], strict=False):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
        assert len(tokenizer(text).input_ids) < 30
        messages.append({"role": "assistant", "content": text})
        messages.append({"role": "user", "content": f"<tool_response>\n{reply}\n</tool_response>"})
    whole = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
    assert len(tokenizer(whole).input_ids) <= most


def test_an_experience_has_a_token_for_each_of_its_words(tokenizer: Any) -> None:
    bundle = Bundle("flag of Moon Port", skills="marsh", prompt="a red circle", failure="looked nothing up")
    text = told(bundle)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.split()) + 5 + 4  # five colons and four new lines
    assert tokenizer.decode(ids) == text


# ---- what is loaded --------------------------------------------------------------------------------------------------


def test_a_conversation_is_read_as_its_chat_template_writes_it(untrained: Path, tokenizer: Any) -> None:
    model = TinyAgent(str(untrained), system="Read.").load(CPU, torch.float32)
    assert model.spell is not None
    first = "<think>I need it.</think>"
    turn = Turn(tuple(model.spell(first)), "<tool_response>\nNo document fits this query.\n</tool_response>")
    messages = [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": "draw the flag of Moon Port"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": turn.reply},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    (asked,) = model.encode([Prompt(0, "draw the flag of Moon Port", turns=(turn,))])
    assert asked["ids"].tolist() == tokenizer(whole).input_ids
    (own,) = model.encode([Prompt(0, "a", system="Experience:")])
    assert tokenizer.decode(own["ids"]) == (
        "<|im_start|>system\nExperience:<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_id in model.ends
    assert (model.longest, model.tasks) == (tiny_agent.LONGEST, ("text",))


def test_it_is_as_small_as_it_says(untrained: Path) -> None:
    net = TinyAgent(str(untrained)).load(CPU, torch.float32).net
    assert sum(one.numel() for one in net.parameters()) == pytest.approx(float(TinyAgent.parameters[:3]) * 1e6, rel=0.1)


def test_the_untrained_base_is_loaded_as_it_was_saved(untrained: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = assemble().net.state_dict()
    loaded = TinyAgent(str(untrained)).load(CPU, torch.float32).net.state_dict()
    assert made.keys() == loaded.keys()
    for name, one in made.items():
        assert torch.equal(one.half().float(), loaded[name]), name


def test_a_folder_without_an_agent(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no agent in") as no:
        TinyAgent(str(tmp_path)).load(CPU, torch.float32)
    assert f"rlkit pretrain-agent --out {tmp_path}" in str(no.value)


def test_no_room_for_an_answer() -> None:
    with pytest.raises(ValueError, match="longest must be 2 tokens or more, one of an answer, not 1"):
        TinyAgent(longest=1)


def test_more_room_than_the_network_has_places_for(untrained: Path) -> None:
    with pytest.raises(RecipeError, match="at most 2048 tokens"):
        TinyAgent(str(untrained), longest=2049).load(CPU, torch.float32)
