"""What the agent is pretrained on, pretraining at a size that takes seconds, and the folder that ships."""

import json
import re
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from rlkit import cli
from rlkit.backbones import tiny_agent
from rlkit.pretrain import agent as pretrain_agent
from rlkit.pretrain.agent import (
    KINDS,
    Chat,
    Parts,
    Reading,
    Round,
    answered,
    assemble,
    batches,
    draw,
    evaluate,
    named,
    skill_text,
    spelled,
)
from rlkit.world import atlas, grammar
from rlkit.world.atlas import Request

SHORT = Reading(chats=192, copying=64, batch=8, warmup=2, evaluate_every=96, evaluate_on=20, seed=3)
TWO = Chat(
    "Experience:\nprompt: a red circle",
    (Round("what is under prompt?", "experience", "a red circle"), Round("repeat: Moon", "repeat", '"Moon"')),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_agent.new_tokenizer()


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    return draw(named("train"), 3000, np.random.default_rng(0))


def plain(answer: str) -> str:
    """What an answer says, whatever the form that was asked for."""
    if answer.startswith("{"):
        (value,) = json.loads(answer).values()
        return str(value)
    return str(json.loads(answer)) if answer.startswith('"') else answer


# ---- chats -----------------------------------------------------------------------------------------------------------


def test_every_answer_follows_from_what_was_said(chats: list[Chat]) -> None:
    """Word for word; but an emblem's, from what its things are and how its style says that they stand."""
    asked = set()
    for chat in chats:
        said = chat.system
        for one in chat.rounds:
            said += f"\n{one.said}"
            asked.add(one.kind)
            if one.kind != "emblem":
                assert plain(one.answer) in said
                continue
            caption = grammar.parse(plain(one.answer))
            place = re.search(r"emblem of (\w+ \w+)(\?| show\?)", one.said)
            assert place is not None
            things = grammar.Caption("two", caption.objects)
            shown = {style: atlas.document(Request("emblem", place[1], things, style)).text for style in atlas.STYLES}
            (style,) = (style for style, text in shown.items() if text in said)
            assert skill_text(style, str(caption.relation)) in said
    assert asked == set(KINDS)


def test_statements_are_worded_as_the_atlas_words_them() -> None:
    assert {style: skill_text(style, how) for style, how in atlas.STYLES.items()} == atlas.skills()
    documents = {re.sub(r"\w+ \w+ shows .*", "", one.text) for one in atlas.documents()}
    assert documents == {"The flag of ", "The emblem of "}


def test_no_fact_can_be_known(chats: list[Chat]) -> None:
    """Each style is told to mean each way about equally often, and a place's flag is told to show many things."""
    text = "\n".join(one.said for chat in chats for one in chat.rounds)
    for style in atlas.STYLES:
        found = [len(re.findall(skill_text(style, how), text)) for how in grammar.RELATIONS]
        assert min(found) > 0.8 * sum(found) / 4
    shown = set(re.findall(r"The flag of (Moon|Salt|Iron) \w+ shows ([^.]+)\.", text))
    assert len(shown) > 50


def test_no_chat_shows_how_an_agent_writes_or_tells_of_a_held_out_place(chats: list[Chat]) -> None:
    everything = "\n".join(
        text for chat in chats for text in (chat.system, *(f"{one.said}\n{one.answer}" for one in chat.rounds))
    )
    assert not re.search(r"</?(think|tool_call|answer|tool_response)>", everything)
    assert not re.search(r'"(name|arguments|query|skill|gen_prompt|reference_images)"', everything)
    about = set(re.findall(r"(?:flag|emblem) of ([A-Z]\w+ [A-Z]\w+)", everything))
    assert len(about) > 300
    assert about <= set(named("train"))
    assert not set(named("train")) & {*atlas.places("held_out"), *atlas.places("validation")}
    assert len(named("train")) + len(named("held_out")) == len(atlas.FIRST) * len(atlas.SECOND)


def test_a_chat_is_spelled_as_its_template_writes_it(tokenizer: Any, chats: list[Chat]) -> None:
    for chat in (TWO, *chats[:50]):
        messages = [{"role": "system", "content": chat.system}] if chat.system else []
        for one in chat.rounds:
            messages += [{"role": "user", "content": one.said}, {"role": "assistant", "content": one.answer}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        ids, owner = spelled(tokenizer, chat)
        assert ids == tokenizer(whole.removesuffix("\n")).input_ids
        for i, one in enumerate(chat.rounds):
            own = [token for token, at in zip(ids, owner, strict=True) if at == i]
            assert own == [*tokenizer(one.answer).input_ids, tokenizer.eos_token_id]


def test_copying_comes_first_and_equally_long_chats_come_together(tokenizer: Any) -> None:
    parts = Parts(None, tokenizer)
    drawn = list(islice(batches(parts, replace(SHORT, copying=1, batch=4)), 16))
    texts = [[tokenizer.decode(ids) for ids, _ in batch] for batch in drawn]
    assert all("repeat: " in text for batch in texts[:8] for text in batch), "until the pool is used up"
    assert not all("repeat: " in text for batch in texts[8:] for text in batch)
    spans = sorted((min(len(ids) for ids, _ in batch), max(len(ids) for ids, _ in batch)) for batch in drawn[8:])
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


# ---- what is learnt from them ----------------------------------------------------------------------------------------


def test_the_logits_are_those_before_each_token_of_an_answer(tokenizer: Any) -> None:
    """A network that says what it was given last: at an answer's token it says the one before."""
    size = len(tokenizer)

    def model(input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=one_hot(input_ids, size).float())

    parts = Parts(SimpleNamespace(model=model, lm_head=lambda states: states), tokenizer)
    ids, owner = spelled(tokenizer, TWO)
    alone = Chat("", TWO.rounds[1:])
    logits, tokens, whose = answered(parts, [(ids, owner), spelled(tokenizer, alone)])
    (line,) = tokenizer("\n").input_ids
    first = [*tokenizer("a red circle").input_ids, tokenizer.eos_token_id]
    second = [*tokenizer('"Moon"').input_ids, tokenizer.eos_token_id]
    assert tokens.tolist() == [*first, *second, *second]
    assert logits.argmax(dim=1).tolist() == [line, *first[:-1], line, *second[:-1], line, *second[:-1]]
    assert whose.tolist() == [[0, 0]] * len(first) + [[0, 1]] * len(second) + [[1, 0]] * len(second)


def test_a_chat_is_learnt_alike_alone_and_beside_a_longer_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = assemble()
    short, long = (spelled(parts.tokenizer, chat) for chat in (Chat("", TWO.rounds[1:]), TWO))
    with torch.no_grad():
        alone, together = answered(parts, [short])[0], answered(parts, [short, long])[0]
    assert torch.allclose(alone, together[: len(alone)], atol=1e-5)


def test_an_answer_is_right_if_every_token_is(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Where all is known but the end of an answer that is a style, those alone are wrong."""
    styles = {tuple(tokenizer(json.dumps(style)).input_ids) for style in atlas.STYLES}
    styles |= {tuple(tokenizer(style).input_ids) for style in atlas.STYLES}

    def nearly(parts: Parts, chats: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
        said, ids, whose = [], [], []
        for row, (tokens, owner) in enumerate(chats):
            for i in range(max(owner) + 1):
                own = [token for token, of in zip(tokens, owner, strict=True) if of == i]
                ids += own
                said += [*own[:-1], 0] if tuple(own[:-1]) in styles else own
                whose += [[row, i]] * len(own)
        return one_hot(torch.tensor(said), len(tokenizer)).float(), torch.tensor(ids), torch.tensor(whose)

    monkeypatch.setattr(pretrain_agent, "answered", nearly)
    found = evaluate(Parts(None, tokenizer), 120)
    assert found.keys() == set(KINDS)
    assert found["flag"] == found["emblem"] == found["repeat"] == found["skill"] == 1
    assert 0 < found["style"] < 0.5, "those in JSON are right"
    assert 0.5 < found["experience"] < 1, "some of its slots hold a style"


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder, what pretraining returned, what it said)."""
    folder, said = tmp_path_factory.mktemp("agent") / "base", list[str]()
    with torch.random.fork_rng():
        scores = pretrain_agent.pretrain_agent(folder, SHORT, said.append)
    return folder, scores, said


def test_the_loss_falls_and_the_scores_say_how_to_make_it_again(
    made: tuple[Path, dict[str, Any], list[str]],
) -> None:
    folder, scores, said = made
    assert [stand["chats"] for stand in scores["history"]] == [96, 192]
    assert scores["history"][-1]["loss"] < scores["history"][0]["loss"]
    assert scores["settings"] == asdict(SHORT)
    assert scores["command"].startswith("rlkit pretrain-agent --out DIR chats=192 copying=64 batch=8 ")
    assert json.loads((folder / "scores.json").read_text()) == scores
    assert set(KINDS) <= scores["history"][-1].keys()
    assert len(said) == 2


def test_it_stops_where_it_is_good_enough(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        settings = replace(SHORT, stop_right=0.0)
        scores = pretrain_agent.pretrain_agent(tmp_path / "a", settings, lambda line: None)
    assert [stand["chats"] for stand in scores["history"]] == [96]


@pytest.mark.parametrize(("word", "said"), [("chat=3", "Did you mean 'chats'?"), ("chats", "not key=value")])
def test_a_setting_that_it_has_not(word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain-agent", "--out", str(tmp_path / "new"), word]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"chats": 0}, "chats must be 1 or more, not 0"),
        ({"batch": 0}, "batch must be 1 or more, not 0"),
        ({"evaluate_on": 10}, "evaluate_on must be 20 or more"),
        ({"decay": 0.0}, "decay must be a share above 0 and at most 1, not 0.0"),
    ],
)
def test_a_setting_that_makes_no_sense(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Reading(**setting)


@pytest.mark.parametrize("shipped", [False, True], ids=["made here", "shipped"])
def test_the_folder_is_small_and_in_16_bits(made: tuple[Path, dict[str, Any], list[str]], shipped: bool) -> None:
    folder = tiny_agent.BASE if shipped else made[0]
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 2.5e6
    tensors = load_file(folder / "model.safetensors").values()
    assert {one.dtype for one in tensors} == {torch.float16}
    assert all(one.isfinite().all() for one in tensors)


def test_the_shipped_base_reads_and_copies() -> None:
    """As well as its scores say, and with the tokenizer that would be made now."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    net = Qwen3ForCausalLM.from_pretrained(tiny_agent.BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_agent.BASE)
    assert tokenizer.get_vocab() == tiny_agent.new_tokenizer().get_vocab()
    said = json.loads((tiny_agent.BASE / "scores.json").read_text())["history"][-1]
    found = evaluate(Parts(net, tokenizer), 100, seed=2)
    for kind, least in {"repeat": 0.95, "experience": 0.95, "flag": 0.8, "style": 0.7, "skill": 0.7}.items():
        assert said[kind] >= least, kind
        assert found[kind] >= said[kind] - 0.15, kind
    assert said["emblem"] >= 0.65
