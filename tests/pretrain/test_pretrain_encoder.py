"""Pretraining the image encoder at a size that takes seconds, what it is measured by, and the folder that ships."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlkit.embedding import WORLD, Pictures, load_pictures
from rlkit.preprocessing import Preprocessing
from rlkit.pretrain import likeness
from rlkit.pretrain.encoder import Encoding, families, inventory, loss_of, new_parts, pretrain_encoder, shown, truths
from rlkit.world import grammar, scenes
from rlkit.world.grammar import parse
from rlkit.world.scenes import Item

SHORT = Encoding(
    samples=128, batch=32, warmup=1, lr=1e-3, decay=0.5, evaluate_every=64, evaluate_on=24, score_on=24, seed=3
)
CPU = torch.device("cpu")
RED_LEFT = (Item("red", "circle", 8.0, 16.0, 5.0), Item("blue", "square", 24.0, 16.0, 5.0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder, what pretraining returned, what it said)."""
    folder, said = tmp_path_factory.mktemp("encoder") / "base", list[str]()
    with torch.random.fork_rng():
        scores = pretrain_encoder(folder, SHORT, said.append)
    return folder, scores, said


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_scores_say_how_to_make_it_again(
    made: tuple[Path, dict[str, Any], list[str]],
) -> None:
    folder, scores, said = made
    assert [stand["samples"] for stand in scores["history"]] == [64, 128]
    assert scores["history"][-1]["loss"] < scores["history"][0]["loss"]
    assert scores["settings"] == asdict(SHORT)
    assert scores["command"].startswith("rlkit pretrain-encoder --out DIR samples=128 batch=32 ")
    assert json.loads((folder / "scores.json").read_text()) == scores
    facts = {f"{prefix}{fact}" for prefix in ("", "auc/", "ordered/") for fact in likeness.FACTS}
    drawn = {"drawn/share", "drawn/true", "drawn/false", "auc/drawn", "ordered/drawn"}
    assert scores["held_out"].keys() == scores["validation"].keys() == {"same", "p05", "p95"} | facts | drawn
    assert len(said) == 2


def test_the_same_seed_makes_the_same_weights(made: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    with torch.random.fork_rng():
        pretrain_encoder(tmp_path / "again", SHORT, lambda line: None)
        pretrain_encoder(tmp_path / "other", replace(SHORT, seed=4), lambda line: None)
    first, again, other = (
        load_file(one / "model.safetensors") for one in (made[0], tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_it_stops_where_it_is_asked_to(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        scores = pretrain_encoder(tmp_path / "a", replace(SHORT, stop_at=64, score_on=4), lambda line: None)
    assert [stand["samples"] for stand in scores["history"]] == [64]
    assert scores["command"].endswith(" stop_at=64")


def test_only_the_picture_tower_is_written(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    names = {name.split(".")[0] for name in load_file(made[0] / "model.safetensors")}
    assert names == {"vision_model", "visual_projection"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 30}, "batch=30 is not made of whole families of 4"),
        ({"family": 0}, "families of 0"),
        ({"samples": 0}, "samples must be above 0"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"decay": 0.0}, "decay is a share"),
        ({"stop_at": 0}, "stop_at must be above 0"),
        ({"noise": -0.1}, "noise is a standard deviation"),
    ],
)
def test_bad_settings(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Encoding(**options)


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_every_caption_that_is_true_of_a_scene_is_a_positive() -> None:
    texts = [
        *("a red circle left of a blue square", "a red circle and a blue square", "a blue square and a red circle"),
        *(
            "a blue square right of a red circle",
            "a red circle right of a blue square",
            "a red square and a blue circle",
        ),
        *("a red circle", "a red circle above a blue square"),
    ]
    assert truths([parse(text) for text in texts], [RED_LEFT]).tolist() == [[True] * 4 + [False] * 4]
    alone = RED_LEFT[:1]
    texts = ["a red circle", "two red circles", "a red circle in the top left", "a red circle in the bottom left"]
    assert truths([parse(text) for text in texts], [alone]).tolist() == [[True, False, False, True]]


def test_the_loss_by_hand() -> None:
    """Of N times the same picture and caption, with tutors that say nothing: log N for what cannot be told apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = new_parts()
    for name in ("colour", "shape", "inventory"):
        for parameter in parts[name].parameters():
            torch.nn.init.zeros_(parameter)
    captions, drawn = [parse("a red circle")] * 4, [RED_LEFT[:1]] * 4
    pictures = torch.from_numpy(scenes.render_scenes(drawn))
    there = 1 + (8 / 16 - 1) ** 2 + 0**2  # one of a thing, and its place
    wanted = math.log(4) + math.log(7) + math.log(5) + there
    assert loss_of(parts, captions, drawn, pictures, 10.0).item() == pytest.approx(wanted, rel=1e-5)


def test_what_the_tutors_are_told() -> None:
    named = {fact: table.reshape(4, 4) for fact, table in shown([RED_LEFT[:1]]).items()}
    assert named["colour"][1, 0] == 0, "the first colour, where the circle is"
    assert named["shape"][2, 1] == 0
    assert (named["colour"][:, 2:] == 6).all(), "no colour in the right half"
    assert (named["shape"][:, 2:] == 4).all()
    count, places = inventory([RED_LEFT, (RED_LEFT[0], replace(RED_LEFT[0], x=20.0, y=8.0))])
    assert count.sum(1).tolist() == [2, 2]
    assert (count[0, 0], count[1, 0]) == (1, 2), "red circles are the first of all things"
    assert places[0, 0].tolist() == [-0.5, 0]
    assert places[1, 0].tolist() == [-0.125, -0.25], "of two the mean"


def test_families_differ_in_one_fact_and_relations_and_places_always_do() -> None:
    chosen = families(200, 4, np.random.default_rng(0))
    train = set(grammar.split("train"))
    assert len(chosen) == 800
    for first in range(0, 800, 4):
        caption, *others = chosen[first : first + 4]
        near = likeness.neighbours(caption, ("train",))
        assert all(one in train and any(one in some for some in near.values()) for one in others)
        assert others[0] in list(near.values())[-1]
        if caption.kind in ("relation", "place") and caption.kind in near:
            assert replace(others[0], **{caption.kind: getattr(caption, caption.kind)}) == caption


# ---- how it is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("a red circle", {"colour": 5, "shape": 3, "number": 3}),
        ("two red circles", {"colour": 5, "shape": 3, "number": 3}),
        ("a red circle in the top left", {"colour": 5, "shape": 3, "place": 3}),
        ("a red circle and a blue square", {"colour": 10, "shape": 6, "binding": 1, "number": 2}),
        ("a red circle above a red square", {"colour": 10, "shape": 4, "number": 2, "relation": 3}),
    ],
)
def test_the_neighbours_of_a_caption(text: str, counts: dict[str, int]) -> None:
    found = likeness.neighbours(parse(text), grammar.SPLITS)
    assert {fact: len(some) for fact, some in found.items()} == counts
    assert not any(one.canonical == parse(text).canonical for some in found.values() for one in some)


def test_neighbours_come_from_the_splits_that_are_named() -> None:
    train = set(grammar.split("train"))
    for caption in grammar.panel("held_out", 50):
        found = [one for some in likeness.neighbours(caption, ("train",)).values() for one in some]
        assert train.issuperset(found)


def test_area_under_the_curve_by_hand() -> None:
    assert likeness.auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == 3.5 / 4


def blind(pixels: Tensor) -> Tensor:
    return torch.ones(len(pixels), 2)


def hue(pixels: Tensor) -> Tensor:
    """[N, 3]: how much each channel is above the background."""
    return pixels.sum((2, 3)) - torch.tensor(grammar.BACKGROUND) / 255 * scenes.SIZE**2


def test_the_measures_of_encoders_that_are_known() -> None:
    keep = Preprocessing("keep", (0, 0), (0.0,) * 3, (1.0,) * 3)
    found = likeness.evaluate(Pictures(blind, keep, CPU, torch.float32), "validation", 60)
    assert (found["same"], found["colour"], found["p05"], found["p95"]) == pytest.approx((1, 1, 1, 1), abs=1e-4)
    assert {found[f"auc/{fact}"] for fact in likeness.FACTS} == {0.5}
    assert {found[f"ordered/{fact}"] for fact in likeness.FACTS} == {0.0}
    found = likeness.evaluate(Pictures(hue, keep, CPU, torch.float32), "validation", 60)
    assert found["auc/colour"] > 0.9
    assert found["ordered/colour"] > 0.9
    assert abs(found["auc/place"] - 0.5) < 0.25, "a mean colour knows no place"
    drawn = likeness.evaluate_drawn(Pictures(blind, keep, CPU, torch.float32), "validation", 8)
    assert (drawn["auc/drawn"], drawn["ordered/drawn"], drawn["drawn/true"]) == pytest.approx((0.5, 0.5, 1), abs=1e-4)
    assert 0 < drawn["drawn/share"] < 1


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shipped", [False, True], ids=["made here", "shipped"])
def test_the_folder_is_small_and_in_16_bits(made: tuple[Path, dict[str, Any], list[str]], shipped: bool) -> None:
    folder = WORLD if shipped else made[0]
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 2e6
    tensors = load_file(folder / "model.safetensors").values()
    assert {one.dtype for one in tensors} == {torch.float16}
    assert all(one.isfinite().all() for one in tensors)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPVisionModelWithProjection"]
    encoder = load_pictures(str(folder), CPU, "fp32")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = encoder.preprocessing.mean[0], encoder.preprocessing.std[0]
    torch.testing.assert_close(encoder.preprocessing(picture), (picture - mean) / std)  # as it is: nothing is blurred


def test_the_shipped_encoder_tells_every_fact_but_relations() -> None:
    scores = json.loads((WORLD / "scores.json").read_text())
    found = likeness.evaluate(load_pictures("world", CPU, "fp32"), "validation", 120)
    for measured in (scores["held_out"], found):
        assert min(measured[f"auc/{fact}"] for fact in likeness.FACTS if fact != "relation") > 0.9
        assert measured["p95"] - measured["p05"] > 0.4, "cosines that all lie close together teach nothing"
    assert scores["held_out"]["ordered/drawn"] > 0.85, "of one caption's pictures, the true ones are rewarded"
