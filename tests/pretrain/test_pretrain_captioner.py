"""Pretraining the captioner at a size that takes seconds, and the folder that ships."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlkit.backbones import tiny_captioner
from rlkit.backbones.tiny_captioner import TinyCaptioner
from rlkit.data.prompts import WorldPrompts
from rlkit.errors import RecipeError
from rlkit.pretrain.captioner import Captioning, assemble, loss_of, pretrain_captioner, see
from rlkit.world import grammar, instructions, scenes

SHORT = Captioning(samples=128, batch=32, warmup=2, evaluate_every=64, evaluate_on=8, score_on=8, seed=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder, what pretraining returned, what it said)."""
    folder, said = tmp_path_factory.mktemp("captioner") / "base", list[str]()
    with torch.random.fork_rng():
        scores = pretrain_captioner(folder, SHORT, said.append)
    return folder, scores, said


def test_the_loss_falls_and_the_scores_say_how_to_make_it_again(
    made: tuple[Path, dict[str, Any], list[str]],
) -> None:
    folder, scores, said = made
    assert [stand["samples"] for stand in scores["history"]] == [64, 128]
    assert scores["history"][-1]["loss"] < scores["history"][0]["loss"]
    assert scores["settings"] == asdict(SHORT)
    assert scores["command"].startswith("rlkit pretrain-captioner --out DIR samples=128 batch=32 ")
    assert json.loads((folder / "scores.json").read_text()) == scores
    assert {"true", "true_greedy", *(f"true/{kind}" for kind in grammar.KINDS)} == scores["held_out"].keys()
    assert len(said) == 2


def test_it_stops_where_it_is_good_enough(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        scores = pretrain_captioner(tmp_path / "a", replace(SHORT, stop_true=0.0), lambda line: None)
    assert [stand["samples"] for stand in scores["history"]] == [64]


def test_the_policy_is_asked_as_it_was_trained(made: tuple[Path, dict[str, Any], list[str]]) -> None:
    """The same tokens before the answer, and the same pixels: otherwise the base would be worse than its scores."""
    model = TinyCaptioner(str(made[0])).load(CPU, torch.float32)
    parts = assemble()
    (prompt,) = WorldPrompts(1, 1, task="caption").held_out(1)
    (asked,) = model.encode([prompt])
    assert tuple(asked["ids"].tolist()) == parts.prompt
    picture = scenes.render_scenes([instructions.panel("t2i", "held_out", 1)[0].answer])
    assert torch.equal(asked["pixels"], see(parts, picture)["pixel_values"])


def test_the_loss_is_the_mean_over_the_captions_tokens() -> None:
    """Over those of both captions, which are as many; the prompt's and the padding's are not among them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = assemble()
    pictures = scenes.render_batch(grammar.panel("train", 2), np.random.default_rng(0))
    texts = ["a red circle", "two blue squares"]  # three tokens and the end each
    one, other = (loss_of(parts, pictures[i : i + 1], texts[i : i + 1]) for i in range(2))
    assert loss_of(parts, pictures, texts).item() == pytest.approx((one.item() + other.item()) / 2, rel=1e-4)


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = tiny_captioner.new_tokenizer()
    for caption in (*grammar.split("train"), *grammar.split("held_out")):
        assert len(tokenizer(caption.text).input_ids) == len(caption.text.split())
        assert tokenizer.decode(tokenizer(caption.text).input_ids) == caption.text
    assert tokenizer.decode(tokenizer("Ünbekannt 漢字").input_ids) == "Ünbekannt 漢字", "any other text is bytes"


@pytest.mark.parametrize("shipped", [False, True], ids=["made here", "shipped"])
def test_the_folder_is_small_and_in_16_bits(made: tuple[Path, dict[str, Any], list[str]], shipped: bool) -> None:
    folder = tiny_captioner.BASE if shipped else made[0]
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 8e6
    tensors = load_file(folder / "model.safetensors").values()
    assert {one.dtype for one in tensors} == {torch.float16}
    assert all(one.isfinite().all() for one in tensors)
    if shipped:
        scores = json.loads((folder / "scores.json").read_text())
        assert 0.25 <= scores["held_out"]["true"] <= 0.6, "it speaks, and is still often wrong"


def test_a_folder_without_a_captioner(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no captioner in"):
        TinyCaptioner(str(tmp_path)).load(CPU, torch.float32)
