"""Unified-Bench with fake reconstructions and encoders whose cosines are known."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rlkit import cli, recipe, session
from rlkit.embedding import Pictures
from rlkit.errors import DataError, RecipeError
from rlkit.evaluation.unified_bench import INSTRUCTION, encoders_of, read_images, unified_bench
from rlkit.preprocessing import Preprocessing

CPU = torch.device("cpu")
KEEP = Preprocessing("keep", (0, 0), (0.0,) * 3, (1.0,) * 3)


def colour(pixels: Tensor) -> Tensor:
    """[N, 3]: the mean colour."""
    return pixels.mean((2, 3))


def red_and_rest(pixels: Tensor) -> Tensor:
    """[N, 2]: red, and green with blue."""
    return torch.stack([colour(pixels)[:, 0], colour(pixels)[:, 1:].sum(1)], dim=1)


ENCODERS = {
    "clip": Pictures(colour, KEEP, CPU, torch.float32),
    "dinov2": Pictures(red_and_rest, KEEP, CPU, torch.float32),
}


def plain(red: float, green: float, blue: float, height: int = 4, width: int = 4) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32)[:, None, None].expand(3, height, width).clone()


def giving(*media: Tensor) -> Any:
    return lambda images: (torch.stack(media), [f"caption {i}" for i in range(len(images))])


def test_identical_pictures_give_100_whatever_their_size() -> None:
    images = [plain(1, 0.5, 0, 4, 4), plain(0, 1, 0.2, 7, 3)]
    report = unified_bench(images, giving(plain(1, 0.5, 0, 5, 5), plain(0, 1, 0.2, 5, 5)), ENCODERS)
    assert [(row.name, row.caption) for row in report.rows] == [("0", "caption 0"), ("1", "caption 1")]
    assert report.overall.mean == pytest.approx(100, abs=1e-4)
    assert report.overall.error == pytest.approx(0, abs=1e-4)


def test_the_numbers_by_hand() -> None:
    """The second picture is red and comes back as half red, half green; the third comes back without anything red."""
    images = [plain(1, 0, 0), plain(1, 0, 0), plain(1, 1, 0)]
    report = unified_bench(images, giving(plain(1, 0, 0), plain(1, 1, 0), plain(0, 1, 1)), ENCODERS, ["a", "b", "c"])
    half = math.sqrt(0.5)
    clip, dino = [1, half, 0.5], [1, half, half]  # cosines of (1,1,0) with (0,1,1), and of (1,1) with (0,2)
    assert [row.scores["clip"] for row in report.rows] == pytest.approx([100 * one for one in clip], rel=1e-5)
    assert [row.scores["dinov2"] for row in report.rows] == pytest.approx([100 * one for one in dino], rel=1e-5)
    assert report.means["clip"].mean == pytest.approx(100 * sum(clip) / 3, rel=1e-5)
    assert report.overall.mean == pytest.approx((report.means["clip"].mean + report.means["dinov2"].mean) / 2, rel=1e-6)
    each = [50 * (one + other) for one, other in zip(clip, dino, strict=True)]
    error = math.sqrt(sum((one - sum(each) / 3) ** 2 for one in each) / 2 / 3)  # of pictures, not of numbers
    assert report.overall.error == pytest.approx(error, rel=1e-5)
    told = json.loads(json.dumps(report.as_json()))
    assert told["count"] == 3
    assert told["images"][1]["name"] == "b"
    assert told["images"][1]["overall"] == pytest.approx(100 * half, rel=1e-5)
    assert told["encoders"]["dinov2"]["mean"] == pytest.approx(report.means["dinov2"].mean)


def test_one_picture_has_no_standard_error() -> None:
    report = unified_bench([plain(1, 0, 0)], giving(plain(1, 0, 0)), ENCODERS)
    assert report.overall.error is None
    assert "±" not in report.table()


def test_what_cannot_be_scored_is_left_out_and_named() -> None:
    broken = plain(1, 0, 0)
    broken[0, 0, 0] = math.nan
    images = [plain(1, 0, 0), broken, plain(0, 1, 0)]
    report = unified_bench(images, giving(broken, plain(1, 0, 0), plain(0, 1, 0)), ENCODERS, ["a", "b", "c"])
    assert [row.name for row in report.rows] == ["c"]
    assert report.rows[0].caption == "caption 2"
    assert report.overall.mean == pytest.approx(100, abs=1e-4), "the rows that are left out must not shift the others"
    assert set(report.broken) == {"a", "b"}
    assert report.broken["a"].startswith("reconstruction: ")
    assert "left out     2\n  a: " in report.table()
    with pytest.raises(DataError, match=r"no picture can be scored.*0: reconstruction"):
        unified_bench(images[:1], giving(broken), ENCODERS)


def test_the_reconstruction_is_one_of_each_in_order() -> None:
    with pytest.raises(ValueError, match="2 pictures came back as 2 captions and 1 pictures"):
        unified_bench([plain(1, 0, 0)] * 2, giving(plain(1, 0, 0)), ENCODERS)
    with pytest.raises(DataError, match="0 pictures and 2 encoders"):
        unified_bench([], giving(), ENCODERS)
    with pytest.raises(ValueError, match="as many different names"):
        unified_bench([plain(1, 0, 0)] * 2, giving(plain(1, 0, 0), plain(1, 0, 0)), ENCODERS, ["a", "a"])


def paint(folder: Path, **colours: tuple[int, int, int]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, (name, value) in enumerate(colours.items()):
        Image.new("RGB", (4 + i, 3), value).save(folder / f"{name}.png")
    return folder


def test_the_folder_is_read_and_broken_pictures_are_named(tmp_path: Path) -> None:
    folder = paint(tmp_path / "pictures", b=(255, 0, 0), a=(0, 255, 0))
    (folder / "c.png").write_bytes(b"no picture")
    images, names, broken = read_images(folder)
    assert names == ["a.png", "b.png"]
    assert [tuple(one.shape) for one in images] == [(3, 3, 5), (3, 3, 4)]
    assert images[0][1].min() == 1
    assert list(broken) == ["c.png"]
    assert "cannot read" in broken["c.png"]


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_images(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no pictures in this folder. Known: .png"):
        read_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the 1 pictures can be read: .*a.png"):
        read_images(tmp_path)


def test_the_encoders_are_those_of_the_recipes_reward() -> None:
    plain_recipe = recipe.read("quickstart", [])
    assert encoders_of(plain_recipe, "clip, dinov2").encoders == ("clip", "dinov2")
    assert encoders_of(plain_recipe, "clip").clip_path == "openai/clip-vit-large-patch14"
    words = ["stages.main.rewards.reconstruction={weight: 1.0, clip_path: world}", "stages.main.data.task=edit"]
    words += ["policy.backbone.name=tiny_omni", "stages.main.rewards.composition=null"]
    own = encoders_of(recipe.read("quickstart", words), "clip")
    assert (own.clip_path, own.encoders) == ("world", ("clip",))


@pytest.mark.parametrize(
    ("names", "says"),
    [("dinov1", r"'dinov1' is none of .* Did you mean 'dinov\d'"), (" ,", "no encoder in"), ("clip,clip", "twice")],
)
def test_encoders_that_are_none(names: str, says: str) -> None:
    with pytest.raises(RecipeError, match=rf"--encoders: .*{says}"):
        encoders_of(recipe.read("quickstart", []), names)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a policy that gives every picture back as it is. The one that cannot be read never comes to it."""
    folder = paint(tmp_path / "pictures", a=(230, 45, 45), b=(50, 85, 240))
    (folder / "c.png").write_bytes(b"no picture")
    asked = []

    def reconstruct(setup: Any, run: Path | None, text: str) -> Any:
        assert text == INSTRUCTION
        asked.append(run)

        def back(images: Sequence[Tensor]) -> tuple[Tensor, list[str]]:
            return torch.stack([one[:, :3, :4] for one in images]), ["a plain picture"] * len(images)

        return back

    monkeypatch.setattr(session, "reconstruct", reconstruct, raising=False)
    reward = SimpleNamespace(load=lambda device: SimpleNamespace(encoders={"clip": ENCODERS["clip"]}))
    monkeypatch.setattr("rlkit.evaluation.unified_bench.encoders_of", lambda setup, names: reward)
    words = ["unified-bench", "quickstart", "--images", str(folder), "--encoders", "clip"]
    assert cli.main([*words, "--run", "somewhere", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert asked == [Path("somewhere")]
    assert told["overall"]["mean"] == pytest.approx(100, abs=1e-3)
    assert (told["count"], list(told["broken"])) == (2, ["c.png"])
    assert told["prompt"] == INSTRUCTION
    assert cli.main(words) == 0
    assert "overall      100.00 ± 0.00" in capsys.readouterr().out
