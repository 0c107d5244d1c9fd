"""The data `world` with the task agent: requests, what a teacher writes, and what is told of experience."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlkit.agents.summaries import Comparison, rules
from rlkit.agents.tooling import Toolbox
from rlkit.data.prompts import Mixture, WorldPrompts
from rlkit.episodes import Call, Episode, Program
from rlkit.tools.query_knowledge import QueryKnowledge
from rlkit.tools.search import Search
from rlkit.types import Prompt
from rlkit.world import atlas
from rlkit.world.grammar import COLOURS, KINDS, PLURALS, SHAPES, parse

FACTS = {*COLOURS, *SHAPES, *PLURALS, *atlas.STYLES}
PLAIN = WorldPrompts(per_step=40, group=2, task="agent")


def drawn(data: WorldPrompts, steps: int = 10) -> list[Prompt]:
    return [prompt for step in range(steps) for prompt in data.draw(0, "main", step).prompts]


def place(prompt: Prompt) -> str:
    return str(prompt.metadata["subject"]).partition(" of ")[2]


def calls(prompt: Prompt) -> list[str]:
    return [turn for turn in prompt.metadata["script"] if "<tool_call>" in turn]


def test_a_request_with_what_only_others_may_see() -> None:
    for prompt in drawn(PLAIN, 3):
        known = atlas.about(place(prompt), prompt.kind)
        assert prompt.text in [phrase.format(kind=prompt.kind, place=place(prompt)) for phrase in atlas.PHRASES]
        assert list(prompt.metadata) == ["caption", "subject", "style", "script"]
        assert prompt.metadata["caption"] == known.caption.text
        assert (prompt.metadata["subject"], prompt.metadata["style"]) == (known.subject, known.style)
        assert json.dumps(prompt.metadata["caption"]) in prompt.metadata["script"][-1]
        json.dumps(dict(prompt.metadata))


@pytest.mark.parametrize("shares", [{}, {"flawed": 0.5}, {"flawed": 0.5, "experience": 0.5}], ids=str)
def test_a_draw_is_a_pure_function_of_seed_stage_and_step(shares: dict[str, float]) -> None:
    data = replace(PLAIN, per_step=6, **shares)  # type: ignore[arg-type]

    def whole(seed: int, stage: str, step: int) -> list[tuple[Any, ...]]:
        return [(one.id, one.key, dict(one.metadata)) for one in data.draw(seed, stage, step).prompts]

    forward = [whole(0, "main", step) for step in range(5)]
    assert [whole(0, "main", step) for step in reversed(range(5))] == forward[::-1], "as a resumed run draws"
    assert whole(1, "main", 0) != forward[0] != whole(0, "next", 0)
    assert forward[1] != forward[0]


def test_shares_do_not_change_what_is_asked() -> None:
    texts = [prompt.text for prompt in drawn(PLAIN)]
    assert [prompt.text for prompt in drawn(replace(PLAIN, flawed=0.7, experience=0.3))] == texts


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_held_out_is_never_drawn(split: str) -> None:
    data = replace(PLAIN, split=split, flawed=0.5, experience=0.5)  # type: ignore[arg-type]
    seen = {place(prompt) for prompt in drawn(data, 30)}
    assert len(seen) >= min(250, len(atlas.places(split)))
    assert seen <= set(atlas.places(split))
    texts = " ".join(prompt.system + " ".join(prompt.metadata["script"]) for prompt in drawn(data, 30))
    named = set(re.findall(r"of ([A-Z]\w+ [A-Z]\w+)", texts))
    assert named
    assert named <= set(atlas.places(split)), "nor does a script or an experience name such a place"


def test_a_plain_draw_names_no_fact() -> None:
    for prompt in drawn(replace(PLAIN, flawed=0.5)):
        assert prompt.system == ""
        assert not FACTS & set(re.findall(r"\w+", prompt.text.lower()))


@pytest.mark.parametrize("split", ["held_out", "validation"])
def test_held_out_prompts_carry_neither_scripts_nor_experience(split: str) -> None:
    data = replace(PLAIN, held_out_split=split, flawed=1.0, experience=1.0)  # type: ignore[arg-type]
    panel = data.held_out(100)
    assert panel == PLAIN.held_out(100) or split == "validation"
    assert {place(prompt) for prompt in panel} <= set(atlas.places(split))
    assert {prompt.kind for prompt in panel} == set(atlas.KINDS)
    for prompt in panel:
        assert list(prompt.metadata) == ["caption", "subject", "style"]
        assert (prompt.system, prompt.turns) == ("", ())
        assert not FACTS & set(re.findall(r"\w+", prompt.text.lower()))


def test_a_share_of_the_scripts_has_a_flaw() -> None:
    def as_it_should_be(prompt: Prompt) -> bool:
        wanted = ["search", "query_knowledge"] if prompt.metadata["style"] else ["search"]
        return [re.findall(r'"name": "(\w+)".*}}<', turn) for turn in calls(prompt)] == [[one] for one in wanted]

    def share(data: WorldPrompts) -> float:
        prompts = drawn(data, 20)
        return sum(as_it_should_be(prompt) for prompt in prompts) / len(prompts)

    assert share(PLAIN) == 1
    for flawed in (0.4, 1.0):
        none = math.prod(1 - flawed * often for often in atlas.FLAWS.values())
        assert share(replace(PLAIN, flawed=flawed)) == pytest.approx(none, abs=0.05)  # 3 standard errors
    assert share(replace(PLAIN, flawed=1.0, experience=1.0)) == 1, "who is told what helps does not go wrong"


def test_a_share_of_the_prompts_is_told_what_helps() -> None:
    prompts = drawn(replace(PLAIN, experience=0.3), 20)
    told = [prompt for prompt in prompts if prompt.system]
    told_of: list[str] = []
    assert len(told) / len(prompts) == pytest.approx(0.3, abs=0.05)  # 3 standard errors
    for prompt in told:
        known = {
            "search": prompt.metadata["subject"],
            "skills": prompt.metadata["style"],
            "prompt": prompt.metadata["caption"],
        }
        first, *lines = prompt.system.splitlines()
        assert first == "Experience:"
        said = dict(line.split(": ", 1) for line in lines)
        failure = said.pop("failure", "")
        assert said
        assert said.items() <= known.items(), "and it is true"
        told_of += failure.split("; ")
    # The words are those of the rules by which training abstracts a failure, each of them often.
    wrote = [one for one in told_of if one.startswith("wrote: ")]
    assert len({*told_of} - {"", *wrote, *(f"did not ask for skill {style}" for style in atlas.STYLES)}) == 4
    assert {parse(one.removeprefix("wrote: ")).kind for one in wrote} == set(KINDS)
    for phrase in ("wrote a call that is no JSON", "called unknown tool find", "looked nothing up", "gave no answer"):
        assert told_of.count(phrase) > 0.05 * len(told), phrase
    assert all(prompt.system for prompt in drawn(replace(PLAIN, experience=1.0), 3))


def test_a_request_has_one_id_and_a_told_one_another() -> None:
    ids: dict[str, int] = {}
    for prompt in [*drawn(replace(PLAIN, experience=0.5)), *drawn(PLAIN), *PLAIN.held_out(20)]:
        assert ids.setdefault(prompt.key, prompt.id) == prompt.id
    assert len(set(ids.values())) == len(ids)
    assert len(ids) > len({key for key in ids if "\n" not in key})


@pytest.mark.parametrize("kinds", [("flag",), ("emblem",), ("emblem", "flag")])
def test_kinds_are_the_only_ones_to_train_on_and_the_panel_keeps_all(kinds: tuple[str, ...]) -> None:
    data = replace(PLAIN, kinds=kinds)
    assert {prompt.kind for prompt in drawn(data, 2)} == set(kinds)
    assert data.held_out(10) == PLAIN.held_out(10)


def test_what_it_gives() -> None:
    assert PLAIN.gives == ("prompt", "metadata", "demonstration")
    for task in ("t2i", "edit", "in_context", "caption"):
        assert "demonstration" not in WorldPrompts(per_step=1, group=1, task=task).gives  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "agent", "kinds": ("flags",)}, r"no kind of the task agent named 'flags'\. Did you mean 'flag'\?"),
        ({"task": "agent", "kinds": ("count",)}, "no kind of the task agent named 'count'"),
        ({"task": "t2i", "kinds": ("flag",)}, "no kind of caption named 'flag'"),
        ({"task": "agent", "flawed": 1.2}, r"flawed must be a share from 0 to 1, not 1\.2"),
        ({"task": "agent", "experience": -0.1}, r"experience must be a share from 0 to 1, not -0\.1"),
        ({"task": "agent", "flawed": float("nan")}, "flawed must be a share from 0 to 1, not nan"),
        ({"task": "caption", "flawed": 0.5}, "flawed is for the task agent, not caption: leave it out, or set task"),
        ({"experience": 0.5}, "experience is for the task agent, not t2i"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorldPrompts(per_step=1, group=1, **options)


def test_as_a_source_of_a_mixture() -> None:
    mixed = Mixture({"atlas": {"name": "world", "task": "agent", "flawed": 0.5}}, per_step=5, group=2)
    assert mixed.gives == PLAIN.gives
    opened = mixed.open()
    batch = opened.draw(0, "main", 3)
    assert all(prompt.metadata["script"] for prompt in batch.prompts)
    assert [prompt.text for prompt in opened.draw(0, "main", 3).prompts] == [prompt.text for prompt in batch.prompts]


def test_what_the_teacher_does_wrong_is_told_as_the_rules_of_a_step_tell_it() -> None:
    toolbox = Toolbox({"search": Search(folder="world"), "query_knowledge": QueryKnowledge(folder="world")})
    seen = set()
    for seed in range(60):
        request = atlas.draw("train", 1, np.random.default_rng(seed))[0]
        right, wrong = (episode(toolbox, atlas.script(request, np.random.default_rng(seed), f)) for f in (0.0, 1.0))
        seen |= set(rules(Comparison(request.text, right, wrong, 1.0, 0.0)).failure.split("; "))
    drawn = (atlas.failure(atlas.draw("train", 1, rng)[0], rng) for rng in map(np.random.default_rng, range(300)))
    known = {phrase for one in drawn for phrase in one.split("; ")}
    assert {one for one in seen if not one.startswith("wrote: ")} - {""} <= known


def episode(toolbox: Toolbox, script: Sequence[str]) -> Episode:
    read = [toolbox.parse(text) for text in script]
    (program,) = (one for one in read if isinstance(one, Program))
    return Episode(tuple(one for one in read if isinstance(one, Call)), program, "answer")
