"""Conditions on disk: encoded once for all runs, whole or not there, and never those of another backbone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making import told

from rlkit import recipe, session
from rlkit.episodes import Turn
from rlkit.errors import DataError
from rlkit.policy import Policy
from rlkit.shelf import Conditions, Shelf
from rlkit.types import Condition, Prompt

CPU = torch.device("cpu")
HERE = {"name": "toy", "path": None}


def shelf(folder: Path, backbone: dict[str, object] | None = None, dtype: torch.dtype = torch.float32) -> Shelf:
    return Shelf(folder, backbone or HERE, dtype, CPU)


def conditions(policy: Policy, asked: list[str], shelf: Shelf, limit: int | None = None) -> Conditions:
    def encode(prompts: Sequence[Prompt]) -> list[Condition]:
        asked.extend(prompt.text for prompt in prompts)
        return policy.model.encode(prompts)

    return Conditions(lambda size: replace(policy.model, encode=encode), shelf=shelf, limit=limit)


def test_a_second_run_encodes_nothing_and_has_the_same_bits(toy_policy: Policy, tmp_path: Path) -> None:
    asked: list[str] = []
    first, second = (conditions(toy_policy, asked, shelf(tmp_path)) for _ in range(2))
    first.encode(told(["a", "b"]))
    second.encode(told(["b", "c", "a"]))
    assert asked == ["a", "b", "c"]
    one, other = first.batch(["a", "b"]), second.batch(["a", "b"])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pictures_are_part_of_what_is_kept(toy_policy: Policy, tmp_path: Path) -> None:
    asked: list[str] = []
    edits = [Prompt(0, "a", source=torch.zeros(3, 2, 2)), Prompt(0, "a", source=torch.ones(3, 2, 2))]
    conditions(toy_policy, asked, shelf(tmp_path)).encode(edits)
    assert len(asked) == 2


def test_a_file_that_is_damaged_is_encoded_again(toy_policy: Policy, tmp_path: Path) -> None:
    asked: list[str] = []
    conditions(toy_policy, asked, shelf(tmp_path)).encode(told(["a"]))
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    again = conditions(toy_policy, asked, shelf(tmp_path))
    again.encode(told(["a"]))
    assert asked == ["a", "a"]
    conditions(toy_policy, asked, shelf(tmp_path)).encode(told(["a"]))
    assert asked == ["a", "a"], "it was mended"
    assert not [one for one in tmp_path.rglob(".*") if one.is_file()], "no draft is left"


def test_another_backbone_another_type_and_other_weights_in_the_same_place_have_their_own(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"one")
    here = {"name": "toy", "path": str(weights)}
    kept = tmp_path / "kept"
    shelf(kept, here).put("a", {"x": torch.ones(2)})
    assert shelf(kept, here).get("a") is not None
    assert shelf(kept, here).get("b") is None
    assert shelf(kept, {**here, "name": "other"}).get("a") is None
    assert shelf(kept, here, torch.bfloat16).get("a") is None
    (weights / "model.safetensors").write_bytes(b"another")
    assert shelf(kept, here).get("a") is None


@pytest.mark.parametrize("kept", [True, False])
def test_a_recipe_names_the_folder(kept: bool, small_backbone: Path, tmp_path: Path) -> None:
    words = [f"policy.backbone.path={small_backbone}", "run.threads=1", "run.device=cpu"]
    words += [f"policy.conditions={tmp_path / 'kept'}"] if kept else []
    policy = session.load_policy(recipe.read("quickstart", words))
    policy.conditions.encode(told(["a red circle"]))
    assert len(list(tmp_path.rglob("*.safetensors"))) == kept


# ---- conversations ---------------------------------------------------------------------------------------------------


TALK = Prompt(0, "a", turns=(Turn((1, 2), "go on"),))
TOLD = Prompt(0, "a", system="Use tools.")


def test_conversations_stay_until_they_are_let_go_of(toy_policy: Policy, tmp_path: Path) -> None:
    asked: list[str] = []
    few = conditions(toy_policy, asked, shelf(tmp_path), limit=1)
    few.encode([TALK, TOLD, *told("abc")])
    assert asked == ["a", "a", "a", "b", "c"], "with turns, with a system of its own, and alone"
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3, "they never get onto the shelf"
    few.encode([TALK, TOLD])
    assert len(asked) == 5
    assert few.of(TALK.key) is few.of(TALK.key)
    few.batch([TALK.key, TOLD.key, "a", "b"])
    assert list(few._known) == ["b"], "the limit is of the others"
    few.forget_conversations()
    for one in (TALK, TOLD):
        with pytest.raises(KeyError):
            few.of(one.key)
    few.batch(["a", "b", "c"])
    few.encode([TALK, *told("abc")])
    assert asked == ["a", "a", "a", "b", "c", "a"], "they are encoded anew, and the others are not"


def test_conversations_do_not_pile_up(toy_policy: Policy) -> None:
    kept = Conditions(lambda size: toy_policy.model, negative="")
    kept.encode(told("a"))
    for step in range(3):
        kept.forget_conversations()
        kept.encode([replace(TALK, text=f"{step}"), replace(TALK, turns=(Turn((step,), "no"),))])
    assert [len(one) for one in (kept._passing, kept._known, kept._encoded, kept._twins)] == [4, 2, 6, 3]
    assert len(kept.untold(["a"])) == 1


def test_one_conversation_can_be_let_go_of(toy_policy: Policy) -> None:
    kept = Conditions(lambda size: toy_policy.model)
    kept.encode([TALK, TOLD])
    kept.forget([TALK])
    kept.of(TOLD.key)
    with pytest.raises(KeyError):
        kept.of(TALK.key)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_so_many_stay_in_memory_and_the_others_come_back_to_the_bit(toy_policy: Policy, tmp_path: Path) -> None:
    asked: list[str] = []
    kept, read = shelf(tmp_path), []
    get = kept.get
    kept.get = lambda key: read.append(key) or get(key)  # type: ignore[method-assign]
    few = conditions(toy_policy, asked, kept, limit=2)
    few.encode(told("abcd"))
    assert list(few._known) == ["c", "d"]
    read.clear()
    expected = conditions(toy_policy, [], shelf(tmp_path / "other"))
    expected.encode(told("abcd"))
    for keys in ("cd", "ab", "abcdab"):  # more than fit, too
        one, other = few.batch(list(keys)), expected.batch(list(keys))
        assert all(torch.equal(one[name], other[name]) for name in other)
        assert len(few._known) <= 2
    assert read == ["a", "b", "c", "d", "a", "b"], "what is in memory is not read"
    few.encode(told("abcd"))
    assert asked == ["a", "b", "c", "d"], "each is encoded once"
    assert read == ["a", "b", "c", "d", "a", "b"], "and read when it is used"


def test_the_one_used_last_stays(toy_policy: Policy, tmp_path: Path) -> None:
    few = conditions(toy_policy, [], shelf(tmp_path), limit=2)
    few.encode(told("ab"))
    few.batch(["a"])
    few.encode(told("c"))
    assert list(few._known) == ["a", "c"]


def test_a_file_that_is_gone_when_it_is_wanted_again(toy_policy: Policy, tmp_path: Path) -> None:
    few = conditions(toy_policy, [], shelf(tmp_path), limit=1)
    few.encode(told(["a red circle", "b"]))
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match=r"policy.conditions: the encoded prompt 'a red circle' has vanished"):
        few.batch(["a red circle"])
    with pytest.raises(KeyError):
        few.batch(["never encoded"])
