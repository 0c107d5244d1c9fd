"""Mixtures: sources by weight, each through its own epochs, and nothing counted that could not be counted again."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlkit import recipe
from rlkit.data.prompts import FilePrompts, Mixture, Prompts, WorldPrompts
from rlkit.errors import DataError, RecipeError
from rlkit.types import seed_of


def lines(folder: Path, name: str, count: int, **options: Any) -> dict[str, Any]:
    """A source whose prompts are called after it."""
    (folder / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(count)))
    return {"name": "prompts", "path": str(folder / f"{name}.txt"), **options}


def two(folder: Path, per_step: int = 6, **options: Any) -> Prompts:
    sources = {"a": lines(folder, "a", 12, weight=2, **options), "b": lines(folder, "b", 5, weight=1, **options)}
    return Mixture(sources, per_step, 1).open()


def texts(data: Prompts, step: int) -> list[str]:
    return [prompt.text for prompt in data.draw(0, "main", step).prompts]


def test_each_source_has_its_share_and_walks_through_its_epochs(tmp_path: Path) -> None:
    data = two(tmp_path)
    drawn = [text for step in range(200) for text in texts(data, step)]
    of = {name: [text for text in drawn if text.startswith(name)] for name in "ab"}
    assert abs(len(of["a"]) / 1200 - 2 / 3) < 4 * (2 / 9 / 1200) ** 0.5, "four standard errors"
    for name, count in (("a", 12), ("b", 5)):
        epochs = [of[name][k : k + count] for k in range(0, len(of[name]) // count * count, count)]
        assert len(epochs) > 20
        assert all(len(set(epoch)) == count for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 10


def test_shares_vary_from_step_to_step_and_with_the_seed(tmp_path: Path) -> None:
    data = two(tmp_path)
    counts = [sum(text.startswith("a") for text in texts(data, step)) for step in range(60)]
    assert len(set(counts)) > 2
    other = [sum(p.text.startswith("a") for p in data.draw(1, "main", step).prompts) for step in range(60)]
    assert counts != other


def test_a_resumed_run_draws_the_same(tmp_path: Path) -> None:
    data = two(tmp_path)
    forward = [texts(data, step) for step in range(40)]
    assert texts(two(tmp_path), 39) == forward[39]
    again = two(tmp_path)
    assert [texts(again, step) for step in reversed(range(40))] == forward[::-1]


def test_ids_and_kinds_tell_sources_apart(tmp_path: Path) -> None:
    sources = {name: {**lines(tmp_path, "a", 4)} for name in ("one", "other")}
    sources["world"] = {"name": "world"}
    data = Mixture(sources, 30, 2).open()
    batch = data.draw(0, "main", 0)
    assert (len(batch), batch.group) == (60, 2)
    owners: dict[int, set[str]] = {}
    for prompt in batch.prompts:
        owners.setdefault(prompt.id, set()).add(prompt.kind)
    assert all(len(one) == 1 for one in owners.values())
    kinds = {prompt.kind for prompt in batch.prompts}
    assert {"one", "other"} < kinds
    assert "world" not in kinds, "the world's own kinds stay"
    assert seed_of("one", 3) in {prompt.id for prompt in data.held_out(9)} | set(owners)


def test_sources_are_shuffled_apart(tmp_path: Path) -> None:
    sources = {name: {**lines(tmp_path, "a", 30)} for name in ("one", "other")}
    prompts = [p for step in range(8) for p in Mixture(sources, 4, 1).open().draw(0, "main", step).prompts]
    orders = [[p.text for p in prompts if p.kind == name][:8] for name in sources]
    assert orders[0] != orders[1]


def test_what_is_given_is_what_all_give(tmp_path: Path) -> None:
    edits = {"name": "world", "task": "edit", "weight": 2}
    captions = {"name": "world", "task": "t2i"}
    assert Mixture({"edits": edits}, 4, 2).gives == ("prompt", "metadata", "source")
    assert Mixture({"edits": edits, "t2i": captions}, 4, 2).gives == ("prompt", "metadata")
    shown = {"name": "images", "path": str(tmp_path), "text": "x"}
    assert Mixture({"edits": edits, "shown": shown}, 4, 2).gives == ("prompt", "metadata", "source")
    batch = Mixture({"edits": edits, "t2i": captions}, 40, 1).open().draw(0, "main", 0)
    assert {prompt.source is not None for prompt in batch.prompts} == {True, False}


def test_a_source_that_is_null_is_left_out(tmp_path: Path) -> None:
    data = Mixture({"a": lines(tmp_path, "a", 3), "b": None}, 3, 1).open()
    assert sorted(texts(data, 0)) == ["a 0", "a 1", "a 2"]


# ---- held out, and everything ----------------------------------------------------------------------------------------


def test_held_out_prompts_have_the_same_shares(tmp_path: Path) -> None:
    held = {name: lines(tmp_path, f"{name}_held", 9)["path"] for name in "ab"}
    sources = {
        "a": {**lines(tmp_path, "a", 4), "held_out_path": held["a"], "weight": 3},
        "b": {**lines(tmp_path, "b", 4), "held_out_path": held["b"], "weight": 2.0},
        "c": lines(tmp_path, "c", 4, weight=7),
    }
    data = Mixture(sources, 4, 1).open()
    for count, expected in ((10, (6, 4)), (7, (4, 3)), (1, (1, 0))):
        panel = data.held_out(count)
        assert tuple(Counter(prompt.kind for prompt in panel)[name] for name in "ab") == expected
        assert len({prompt.text for prompt in panel}) == count
        assert all("held" in prompt.text for prompt in panel)
    assert Mixture({"c": sources["c"]}, 4, 1).open().held_out(5) == ()


def test_everything_is_that_of_all_sources(tmp_path: Path) -> None:
    data = two(tmp_path, held_out_share=0.3)
    everything = data.everything()
    assert everything is not None
    assert len(everything) == 17
    drawn = {prompt.id: prompt for step in range(40) for prompt in data.draw(0, "main", step).prompts}
    drawn |= {prompt.id: prompt for prompt in data.held_out(40)}
    assert {prompt.id: prompt for prompt in everything} == drawn
    assert sorted(data.texts()) == sorted(prompt.text for prompt in drawn.values())
    world = {"world": {"name": "world"}, "a": lines(tmp_path, "a", 3)}
    assert Mixture(world, 4, 1).open().everything() is None
    assert WorldPrompts(4, 1).open().everything() is None


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_step_of_several_sources_is_of_one_size(tmp_path: Path) -> None:
    sources = {
        "a": lines(tmp_path, "a", 12, weight=1, sizes=[[8, 8], [8, 16]]),
        "b": lines(tmp_path, "b", 12, weight=1, sizes=[[8, 8]], held_out_share=0.3),
    }
    data = Mixture(sources, 4, 1).open()
    steps = [data.draw(0, "main", step).prompts for step in range(300)]
    assert all(len({prompt.size for prompt in step}) == 1 for step in steps)
    assert {prompt.size for step in steps for prompt in step} == {(8, 8), (8, 16)}
    assert any(len({prompt.kind for prompt in step}) == 2 for step in steps)
    share = sum(prompt.kind == "a" for step in steps for prompt in step) / 1200
    assert abs(share - 0.5) < 0.1, "sizes do not move the weights"
    seen = [prompt.text for step in steps for prompt in step if prompt.kind == "a" and prompt.size == (8, 16)]
    count = len(set(seen))
    assert all(len(set(seen[k : k + count])) == count for k in range(0, len(seen) - count + 1, count))
    assert {prompt.size for prompt in data.held_out(6)} == {(8, 8)}


def test_sizes_are_given_to_all_sources_or_to_none(tmp_path: Path) -> None:
    sources = {"a": lines(tmp_path, "a", 3, sizes=[[8, 8]]), "world": {"name": "world"}}
    with pytest.raises(DataError, match="source 'a' has sizes and 'world' has none: no step could have both"):
        Mixture(sources, 4, 1).open()


# ---- options ---------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "no source": ({}, "sources must name one or more"),
    "only null": ({"a": None}, "sources must name one or more"),
    "no name": ({"a": {}}, r"sources\.a\.name must be one of world, prompts, images, hub, not None"),
    "a typo in a name": ({"a": {"name": "wrld"}}, r"sources\.a\.name must be .*'wrld'\. Did you mean 'world'\?"),
    "pairs": ({"a": {"name": "pairs", "path": "x"}}, r"sources\.a\.name must be one of"),
    "a mixture": ({"a": {"name": "mixture", "sources": {}}}, r"sources\.a\.name must be one of"),
    "a typo in an option": ({"a": {"name": "world", "taks": "edit"}}, r"sources\.a: .* 'taks'\. Did you mean 'task'\?"),
    "a missing option": ({"a": {"name": "prompts"}}, r"sources\.a: .*needs 'path'"),
    "an option that does not fit": ({"a": {"name": "world", "kinds": ["x"]}}, r"sources\.a: .*no kind of caption"),
    "prompts a step": ({"a": {"name": "world", "per_step": 3}}, r"sources\.a\.per_step is said of the mixture"),
    "a group": ({"a": {"name": "world", "group": 3}}, r"sources\.a\.group is said of the mixture as a whole"),
    "a weight of 0": ({"a": {"name": "world", "weight": 0}}, r"sources\.a\.weight must be a number above 0, not 0"),
    "a weight without end": (
        {"a": {"name": "world", "weight": float("inf")}},
        "weight must be a number above 0, not inf",
    ),
    "a weight in words": ({"a": {"name": "world", "weight": "2"}}, r"weight must be a number above 0, not '2'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sources_that_cannot_be_mixed(case: str) -> None:
    sources, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        Mixture(sources, 4, 2)


def resolved(sources: str) -> dict[str, Any]:
    """The data of the built-in recipe with these sources in its place, all defaults filled in."""
    words = f"stages.main.data={{name: mixture, sources: {{{sources}}}, per_step: 12, group: 16}}"
    plain: dict[str, Any] = recipe.read("quickstart", [words]).recipe["stages"]["main"]["data"]
    return plain


def test_a_recipe_says_it_and_its_resolved_form_says_the_same_again(tmp_path: Path) -> None:
    file = lines(tmp_path, "a", 3)["path"]
    said = f"a: {{name: prompts, path: {file}, weight: 2, sizes: [[8, 8]]}}, t2i: {{name: world, task: t2i}}"
    plain = resolved(said)
    assert plain["sources"]["a"] == {"name": "prompts", "path": file, "weight": 2, "sizes": [[8, 8]]}
    assert Mixture(**{key: value for key, value in plain.items() if key != "name"}).per_step == 12
    with pytest.raises(RecipeError, match=r"stages\.main\.data.*sources\.a: .*'pth'.*Did you mean 'path'\?"):
        resolved("a: {name: prompts, pth: x}")


def test_a_source_is_built_as_the_recipe_builds_data(tmp_path: Path) -> None:
    (entry,) = Mixture({"a": lines(tmp_path, "a", 3, sizes=[[8, 8]])}, 4, 2)._entries().values()
    assert entry == FilePrompts(str(tmp_path / "a.txt"), 4, 2, sizes=((8, 8),))
