"""Pretraining at a size that takes seconds, and the folder that ships."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import told
from safetensors.torch import load_file

from rlkit import registry
from rlkit.backbones import tiny
from rlkit.data.prompts import WorldPrompts
from rlkit.errors import DataError, RecipeError
from rlkit.pretrain.generator import Parts, Pretraining, _load, _misled, _widened, draw, pretrain
from rlkit.types import FlowModel, Prompt
from rlkit.world import instructions, obeys, scenes

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


def test_wrong_captions_are_those_of_other_pictures_and_as_many_of_each_task_as_asked() -> None:
    numbers = np.random.default_rng(0)
    examples = [one for task in ("t2i", "edit", "in_context") for one in instructions.draw(task, "train", 20, numbers)]
    texts = [example.text for example in examples]
    told = _misled(examples, 0.25)
    for first in (0, 20, 40):
        assert told[first + 5 : first + 20] == texts[first + 5 : first + 20]
        assert sorted(told[first : first + 5]) == sorted(texts[first : first + 5])
        assert told[first : first + 5] != texts[first : first + 5]
    assert _misled(examples, 0.0) == texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrong_captions": 1.0}, "wrong_captions is a share"),
        ({"no_caption": -0.1}, "no_caption is a share"),
        ({"edit": -0.5}, "edit is a share"),
        ({"edit": 0.6, "in_context": 0.5}, "shares of one batch: 0.6 \\+ 0.5 > 1"),
        ({"start": "nowhere"}, "start must be a folder that rlkit pretrain-world wrote, not 'nowhere'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pretraining(**options)


def test_pictures_are_what_a_file_would_hold() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = Parts(tiny.new_transformer(), tiny.new_text_encoder(), tiny.PatchAutoencoder(), 0)
    pictures = draw(parts, instructions.panel("t2i", "held_out", 2), seed=0, steps=2)
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


# ---- the network that sees pictures ----------------------------------------------------------------------------------


def test_a_network_that_learns_to_see_begins_as_the_one_that_did_not(
    made: tuple[Path, dict[str, Any], list[str]],
) -> None:
    blind = _load(made[0])
    seeing = _widened(blind, tiny.SHOWN)
    examples = instructions.panel("edit", "held_out", 3)
    x = torch.randn(3, *(tiny.COMPONENTS, tiny.GRID, tiny.GRID), generator=torch.Generator().manual_seed(0))
    texts = [example.text for example in examples]
    with torch.no_grad():
        answers = [
            tiny.velocity(parts.net, x, torch.full((3,), 0.5), parts.condition(texts, examples))
            for parts in (blind, seeing)
        ]
    torch.testing.assert_close(answers[1], answers[0])
    assert _widened(seeing, tiny.SHOWN) is seeing


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory, made: tuple[Path, dict[str, Any], list[str]]) -> Path:
    """A folder for `tiny_omni`, made from another for `tiny`."""
    folder = tmp_path_factory.mktemp("omni") / "base"
    shares = replace(SHORT, samples=64, evaluate_every=64, start=str(made[0]), edit=0.4, in_context=0.35)
    with torch.random.fork_rng():
        scores = pretrain(folder, shares, lambda line: None)
    assert {"strict", "edit/strict", "in_context/strict", "edit/strict/remove"} <= scores["held_out"].keys()
    assert " edit=0.4 in_context=0.35 " in scores["command"]
    return folder


def test_what_pretraining_tells_the_network_is_what_the_backbone_tells_it(omni: Path) -> None:
    """Otherwise the base would be good at a question that nobody asks it."""
    model: FlowModel = registry.build("backbones", "tiny_omni", {"path": str(omni)}).load(CPU, torch.float32)
    assert model.tasks == ("t2i", "edit", "in_context")
    parts = _load(omni)
    for task in instructions.TASKS:
        for example in instructions.panel(task, "validation", 6):
            data = WorldPrompts(1, 1, task=task, held_out_split="validation")  # type: ignore[arg-type]
            (prompt,) = [one for one in data.held_out(6) if one.text == example.text][:1]
            (asked,) = model.encode([prompt])
            known = parts.condition([example.text], [example])
            assert asked.keys() == known.keys()
            for name, value in known.items():
                torch.testing.assert_close(asked[name][None], value.detach(), rtol=2e-3, atol=2e-3)
            shown = torch.stack(
                [*([] if prompt.source is None else [prompt.source]), *prompt.references, torch.zeros(3, 32, 32)]
            )
            assert torch.equal(shown[:-1], torch.from_numpy(scenes.render_scenes(example.shown)).reshape(-1, 3, 32, 32))


def test_a_picture_changes_what_is_drawn_once_it_is_looked_at(omni: Path) -> None:
    model: FlowModel = registry.build("backbones", "tiny_omni", {"path": str(omni)}).load(CPU, torch.float32)
    with torch.no_grad():
        model.net.pos_embed.proj.weight[:, tiny.COMPONENTS :] += 0.1  # type: ignore[index, union-attr]
    data = WorldPrompts(1, 1, task="edit").held_out(2)
    asked = model.collate(model.encode([data[0], replace(data[0], source=data[1].source)]))
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    with torch.no_grad():
        one, other = model.velocity(model.net, x, torch.full((2,), 0.5), asked)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (
            {"source": torch.zeros(3, 32, 32), "references": (torch.zeros(3, 32, 32),) * 2},
            "has 3 pictures; this backbone reads 2",
        ),
        ({"source": torch.zeros(3, 64, 48)}, "has a picture of 48x64 pixels"),
    ],
)
def test_pictures_that_cannot_be_seen_are_refused(omni: Path, pictures: dict[str, Any], message: str) -> None:
    model: FlowModel = registry.build("backbones", "tiny_omni", {"path": str(omni)}).load(CPU, torch.float32)
    with pytest.raises(DataError, match=message):
        model.encode([Prompt(id=3, text="remove the circle", **pictures)])


def test_a_folder_of_the_other_backbone_is_refused(made: tuple[Path, dict[str, Any], list[str]], omni: Path) -> None:
    for name, folder in (("tiny_omni", made[0]), ("tiny", omni)):
        with pytest.raises(RecipeError, match="pictures beside its own, as this backbone does"):
            registry.build("backbones", name, {"path": str(folder)}).load(CPU, torch.float32)


def test_pictures_lie_in_their_slots() -> None:
    autoencoder = tiny.PatchAutoencoder()
    autoencoder.fit(torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    one, two, three = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rows = tiny.encode_pictures(autoencoder, [[one, two], [], [three]], 2)
    codes = autoencoder.encode(torch.stack([one, two, three]))
    assert rows.shape == (3, 128, 4, 4)
    torch.testing.assert_close(rows[0], codes[:2].flatten(0, 1))
    assert not rows[1].any()
    torch.testing.assert_close(rows[2, :64], codes[2])
    assert not rows[2, 64:].any()


def test_the_world_can_judge_its_own_examples() -> None:
    for task in instructions.TASKS:
        panel = instructions.panel(task, "held_out", 100)
        answers = scenes.render_scenes([example.answer for example in panel])
        verdicts = obeys.check_asked(answers, [obeys.asked(example) for example in panel])
        assert sum(verdict is not None and verdict.strict == 1 for verdict in verdicts) >= 99
