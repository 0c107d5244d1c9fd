"""The atlas: what is known of a place, what can be looked up, and what a teacher writes and an experience says."""

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlkit.world import atlas, grammar
from rlkit.world.atlas import FLAWS, KINDS, STYLES, Request
from rlkit.world.grammar import COLOURS, PLURALS, SHAPES, SPLITS, parse

ROOT = Path(__file__).parents[2]
EVERYWHERE = [place for split in SPLITS for place in atlas.places(split)]
FACTS = {*COLOURS, *SHAPES, *PLURALS}
FLAG = atlas.about(atlas.places("train")[0], "flag")
EMBLEM = atlas.about(atlas.places("train")[0], "emblem")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- places ----------------------------------------------------------------------------------------------------------


def test_every_place_is_of_one_split() -> None:
    assert len(set(EVERYWHERE)) == len(EVERYWHERE) == 400
    assert {split: len(atlas.places(split)) for split in SPLITS} == {"train": 280, "validation": 40, "held_out": 80}
    with pytest.raises(ValueError, match="'test' is not a split; known: train, validation, held_out"):
        atlas.places("test")


def test_what_is_known_stays_as_it_is() -> None:
    """Facts that a change of numpy, or of the grammar, must not move without being noticed."""
    assert (FLAG.text, FLAG.caption.text) == ("draw the flag of Bright Field", "a blue circle left of a yellow circle")
    assert (EMBLEM.subject, EMBLEM.style) == ("emblem of Bright Field", "marsh")
    assert EMBLEM.caption.text == "a cyan cross above a blue triangle"
    with pytest.raises(ValueError, match="'crest' is not a kind of request; known: flag, emblem"):
        atlas.about("Bright Field", "crest")


def test_an_emblem_stands_as_its_style_says_and_a_flag_is_any_caption() -> None:
    emblems = [atlas.about(place, "emblem") for place in EVERYWHERE]
    assert all(one.caption.relation == STYLES[one.style] for one in emblems)
    assert min(Counter(one.style for one in emblems).values()) > 60
    flags = [atlas.about(place, "flag") for place in EVERYWHERE]
    assert {one.caption.kind for one in flags} == set(grammar.KINDS)
    assert not any(one.style for one in flags)
    assert all(parse(one.caption.text) == one.caption for one in (*emblems, *flags))


@pytest.mark.parametrize("split", SPLITS)
def test_a_draw_is_of_its_split_and_kinds(split: str) -> None:
    drawn = atlas.draw(split, 300, rng())
    assert {one.place for one in drawn} <= set(atlas.places(split))
    assert {(one.kind, one.phrase) for one in drawn} == {(kind, phrase) for kind in KINDS for phrase in atlas.PHRASES}
    assert {one.kind for one in atlas.draw(split, 50, rng(), ["emblem"])} == {"emblem"}


def test_a_panel_asks_for_every_place_before_any_comes_again() -> None:
    panel = atlas.panel("held_out", 162)
    assert Counter(one.kind for one in panel) == {"flag": 81, "emblem": 81}
    assert len({one.subject for one in panel[:160]}) == 160
    assert panel[160].subject == panel[0].subject
    assert panel[160].text != panel[0].text
    assert atlas.panel("held_out", 5) == panel[:5]


def test_a_request_does_not_say_what_a_picture_of_it_shows() -> None:
    requests = [request for split in SPLITS for request in atlas.panel(split, 600)]
    assert not any({*words(one.text)} & {*FACTS, *STYLES} for one in requests)


# ---- what can be looked up -------------------------------------------------------------------------------------------


def test_documents_tell_what_is_needed_and_no_more() -> None:
    documents = {one.title: one.text for one in atlas.documents()}
    assert len(documents) == 800
    assert documents["flag of Bright Field"] == (
        "The flag of Bright Field shows a blue circle left of a yellow circle. The flag has no style."
    )
    assert documents["emblem of Bright Field"] == (
        "The emblem of Bright Field shows a cyan cross and a blue triangle. The emblem has marsh style."
    )
    for place in EVERYWHERE:
        assert not any(how in documents[f"emblem of {place}"] for how in (" above ", " below ", "left of", "right of"))


def test_documents_and_skills_together_are_the_truth() -> None:
    documents = {one.title: one.text for one in atlas.documents()}
    for place in EVERYWHERE:
        known = atlas.about(place, "emblem")
        first, second, style = re.fullmatch(
            r"The .* shows (a \w+ \w+) and (a \w+ \w+)\. The emblem has (\w+) style\.", documents[known.subject]
        ).groups()  # type: ignore[union-attr]
        how = re.fullmatch(rf"In the {style} style the first stands (.*) the second\.", atlas.skills()[style])
        assert how is not None
        assert f"{first} {how[1]} {second}" == known.caption.text


@pytest.mark.parametrize("titled", [True, False])
def test_who_searches_for_a_subject_finds_it_first(titled: bool) -> None:
    """By BM25 as most have it, whether or not a title counts as text: flags and emblems of a place are easily mixed."""
    texts = [f"{one.title} {one.text}" if titled else one.text for one in atlas.documents()]
    ranked = bm25([words(text) for text in texts], [words(one.title) for one in atlas.documents()])
    assert ranked == list(range(len(texts)))


def bm25(
    texts: Sequence[Sequence[str]], queries: Sequence[Sequence[str]], k: float = 1.5, b: float = 0.75
) -> list[int]:
    """The best text for each query. Written for this test: what a tool computes is tested where the tool is."""
    mean = sum(map(len, texts)) / len(texts)
    weight: dict[str, np.ndarray] = {}
    for word in {word for query in queries for word in query}:
        counts = np.array([text.count(word) for text in texts])
        there = int((counts > 0).sum())
        rarity = math.log(1 + (len(texts) - there + 0.5) / (there + 0.5))
        lengths = np.array([len(text) for text in texts]) / mean
        weight[word] = rarity * counts * (k + 1) / (counts + k * (1 - b + b * lengths))
    return [int(np.argmax(sum(weight[word] for word in query))) for query in queries]


def test_what_is_shipped_is_what_the_atlas_says(tmp_path: Path) -> None:
    folder = Path(atlas.__file__).parent
    shipped = [path for name in (atlas.INDEX, atlas.SKILLS) for path in (folder / name).rglob("*") if path.is_file()]
    found = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in shipped}
    assert found == atlas.files(), "write it again: python -c 'from rlkit.world import atlas; atlas.write()'"
    atlas.write(tmp_path)
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in found} == found


def test_what_is_shipped_can_be_read_by_anybody() -> None:
    files = atlas.files()
    rows = [json.loads(line) for line in files["atlas_index/places.jsonl"].splitlines()]
    assert [(row["title"], row["text"]) for row in rows] == [(one.title, one.text) for one in atlas.documents()]
    assert files["skills/marsh.md"] == "In the marsh style the first stands above the second.\n"


def test_the_wheel_takes_what_tools_look_into() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folder = Path(atlas.__file__).parent
    packed = {path for pattern in project["package-data"]["rlkit.world"] for path in folder.glob(pattern)}
    assert packed == {folder / name for name in atlas.files()}


# ---- a teacher -------------------------------------------------------------------------------------------------------

CALL = re.compile(r"<think>[^<]*</think><tool_call>(.*)</tool_call>")
ANSWER = re.compile(r"<think>[^<]*</think><answer>(.*)</answer>")


def called(turns: Sequence[str]) -> list[object]:
    """The tools and arguments of all turns but the last; None for what is no JSON."""
    found: list[object] = []
    for turn in turns[:-1]:
        match = CALL.fullmatch(turn)
        assert match is not None, turn
        try:
            said = json.loads(match[1])
        except json.JSONDecodeError:
            said = {"name": None, "arguments": None}
        assert list(said) == ["name", "arguments"]
        found.append((said["name"], said["arguments"]))
    return found


def answered(turns: Sequence[str]) -> str:
    match = ANSWER.fullmatch(turns[-1])
    assert match is not None, turns[-1]
    said = json.loads(match[1])
    assert list(said) == ["gen_prompt", "reference_images"]
    assert said["reference_images"] == []
    return str(said["gen_prompt"])


def test_a_teacher_looks_up_what_it_does_not_know() -> None:
    search = ("search", {"query": "flag of Bright Field"})
    assert called(atlas.script(FLAG, rng())) == [search]
    assert answered(atlas.script(FLAG, rng())) == FLAG.caption.text
    both = [("search", {"query": "emblem of Bright Field"}), ("query_knowledge", {"skill": "marsh"})]
    assert called(atlas.script(EMBLEM, rng())) == both
    assert answered(atlas.script(EMBLEM, rng())) == EMBLEM.caption.text


def flaws(turns: Sequence[str], request: Request) -> set[str]:
    """Which flaws a script has, as far as one can see them."""
    calls = called(turns)
    tools = [one[0] for one in calls]
    found = {"malformed"} if None in tools else set()
    found |= {"unknown"} if "find" in tools else set()
    if "search" not in tools:
        return {*found, "guess"}
    return {*found, "skip"} if request.style and "query_knowledge" not in tools else found


def test_flaws_come_each_by_itself_in_their_shares() -> None:
    drawn, n = rng(), 4000
    seen = [flaws(atlas.script(EMBLEM, drawn, flawed=0.5), EMBLEM) for _ in range(n)]
    for name, share in FLAWS.items():
        often = 0.5 * share * (1 - 0.5 * FLAWS["guess"] * (name == "skip"))  # who guesses all skips nothing
        assert sum(name in one for one in seen) / n == pytest.approx(often, abs=0.02), name  # 3 standard errors
    # A bad call is no sign that the answer will be looked up, else it would be learned as one.
    bad = [one for one in seen if "malformed" in one]
    assert sum("guess" in one for one in bad) / len(bad) == pytest.approx(0.5 * FLAWS["guess"], abs=0.05)
    assert not any(flaws(atlas.script(EMBLEM, rng(i)), EMBLEM) for i in range(50))


def test_bad_calls_come_first_and_a_guess_is_often_wrong() -> None:
    right, seen = Counter[str](), Counter[str]()
    for request in (FLAG, EMBLEM):
        for seed in range(300):
            turns = atlas.script(request, rng(seed), flawed=1.0)
            kinds = flaws(turns, request)
            bad = len(kinds & {"malformed", "unknown"})
            assert called(turns)[bad:] == called(atlas.script(request, rng()))[: len(turns) - 1 - bad]
            what = "guess" if "guess" in kinds else "skip" if "skip" in kinds else "none"
            seen[what] += 1
            right[what] += parse(answered(turns)).canonical == request.caption.canonical
            if what == "skip":
                assert parse(answered(turns)).objects == request.caption.objects
    assert right["none"] == seen["none"] > 0
    assert right["guess"] < 0.1 * seen["guess"]
    assert 0.1 * seen["skip"] < right["skip"] < 0.4 * seen["skip"]
