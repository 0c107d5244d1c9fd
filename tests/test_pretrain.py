"""Pretraining at a size that takes seconds, and the folder that ships."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import told
from safetensors.torch import load_file

from rlkit import registry
from rlkit.backbones import tiny
from rlkit.pretrain import Pretraining, _misled, draw, pretrain
from rlkit.types import FlowModel
from rlkit.world import grammar

SHORT = Pretraining(
    samples=384, batch=32, warmup=4, seed=3, evaluate_every=128, evaluate_on=10, score_on=10, threads=1
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder, what pretrain returned, what it said)."""
    folder, said = tmp_path_factory.mktemp("pretrain") / "base", list[str]()
    with torch.random.fork_rng():
        scores = pretrain(folder, SHORT, said.append)
    return folder, scores, said


def test_the_loss_falls(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    history = made[1]["history"]
    assert [stand["samples"] for stand in history] == [128, 256, 384]
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]


def test_scores_say_how_to_make_it_again(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, returned, said = made
    scores = json.loads((folder / "scores.json").read_text())
    assert scores == returned
    assert scores["settings"] == asdict(SHORT)
    assert scores["command"].startswith("rlkit pretrain-world --out DIR samples=384 batch=32 ")
    assert " seed=3 " in scores["command"]
    for split in ("validation", "held_out"):
        assert {"strict", "graded"} <= scores[split].keys()
    assert len(said) == 1 + len(scores["history"])


def test_the_folder_loads_and_draws(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    model: FlowModel = registry.build("backbones", "tiny", {"path": str(made[0])}).load(CPU, torch.float32)
    (condition,) = model.encode(told(["a red circle"]))
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = model.velocity(model.net, x, torch.tensor([0.5]), {name: c[None] for name, c in condition.items()})
    assert v.shape == x.shape
    assert v.isfinite().all()
    assert model.decode(x).shape == (1, 3, 32, 32)
    assert next(model.net.parameters()).dtype == torch.float32


def test_the_seed_decides(made: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    short = replace(SHORT, samples=32, evaluate_every=32, evaluate_on=10)
    with torch.random.fork_rng():
        first, again, other = (
            pretrain(tmp_path / name, replace(short, seed=seed), lambda line: None)["history"][0]["loss"]
            for name, seed in (("a", 1), ("b", 1), ("c", 2))
        )
    assert first == again != other


def test_a_second_run_goes_on_from_the_first_and_tells_of_it(
    made: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    short = replace(SHORT, samples=32, lr=1e-9, ema=0.0, evaluate_every=32, start=str(made[0]), wrong_captions=0.5)
    with torch.random.fork_rng():
        scores = pretrain(tmp_path / "second", short, lambda line: None)
    assert scores["before"] == made[1]
    assert "start=START" in scores["command"], "no folder of this machine"
    assert not [file for file in (tmp_path / "second").rglob("*.json") if str(made[0]) in file.read_text()]
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model", "autoencoder"):
        old, new = (load_file(folder / f"{part}.safetensors") for folder in (made[0], tmp_path / "second"))
        for name, tensor in old.items():
            torch.testing.assert_close(new[name], tensor, rtol=2e-3, atol=1e-6)


def test_wrong_captions_are_those_of_other_pictures_and_as_many_as_asked() -> None:
    captions = grammar.panel("train", 20)
    told = _misled(captions, 0.25)
    assert told[5:] == captions[5:]
    assert sorted(told[:5], key=str) == sorted(captions[:5], key=str)
    assert all(a is not b for a, b in zip(told[:5], captions[:5], strict=True))
    assert _misled(captions, 0.0) == captions
    assert len(told) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrong_captions": 1.0}, "wrong_captions is a share"),
        ({"no_caption": -0.1}, "no_caption is a share"),
        ({"start": "nowhere"}, "start must be a folder that rlkit pretrain-world wrote, not 'nowhere'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pretraining(**options)


def test_pictures_are_what_a_file_would_hold() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = tiny.new_transformer(), tiny.new_text_encoder(), tiny.PatchAutoencoder()
    pictures = draw(*parts, ["a red circle", ""], seed=0, steps=2)
    assert pictures.shape == (2, 3, 32, 32)
    assert torch.equal(pictures, (pictures * 255).round() / 255)


@pytest.mark.parametrize("shipped", [False, True], ids=["made here", "shipped"])
def test_the_folder_is_small_and_in_16_bits(made: tuple[Path, dict[str, Any], list[str]], shipped: bool) -> None:
    folder = tiny.BASE if shipped else made[0]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= 8e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 3
    for file in weights:
        tensors = load_file(file).values()
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
        assert all(tensor.isfinite().all() for tensor in tensors)
    scores = json.loads((folder / "scores.json").read_text())
    assert "seed" in scores["settings"]
    assert scores["history"]
