"""Making the embedded world's connector: what it is taught, and that what ships is what the command says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlkit.backbones import projector
from rlkit.pretrain.connector import Connecting, apart, assemble, pretrain_connector
from rlkit.world import grammar

SHORT = Connecting(captions=24, steps=6, batch=8, lr=5e-3, evaluate_every=6, evaluate_on=4, score_on=4)


def test_a_short_run_comes_nearer_to_the_encoder_and_writes_what_a_recipe_reads(tmp_path: Path) -> None:
    untrained, made = assemble(SHORT), assemble(SHORT)
    pretrain_connector(tmp_path, SHORT, lambda line: None)
    projector.read(made.policy.connector.net, tmp_path)  # type: ignore[arg-type]
    far = []
    for neighbours in (untrained, made):
        prompts = neighbours.told(grammar.panel("validation", 16))
        model = neighbours.policy.drawer.model
        with torch.no_grad():
            said = neighbours.policy.conditions.batch([prompt.key for prompt in prompts])
        far.append(float(apart(said, model.collate(model.encode(prompts)))))
    assert far[1] < 0.8 * far[0]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["settings"]["captions"] == 24
    assert {"validation", "held_out", "history", "command"} <= scores.keys()


def test_the_connectors_places_are_those_of_the_words() -> None:
    """The encoder begins with a token for the beginning, the connector with the first word."""
    wanted = {"tokens": torch.arange(8.0).reshape(1, 4, 2), "pooled": torch.zeros(1, 3)}
    said = {"tokens": wanted["tokens"].roll(-1, dims=1), "pooled": torch.ones(1, 3)}
    assert float(apart(said, wanted)) == pytest.approx(1.0)
    assert float(apart(wanted, wanted)) == pytest.approx(4.0)


def test_only_the_connector_is_trained() -> None:
    policy = assemble(SHORT).policy
    assert {name.split("/")[0] for name in policy.trainable} == {"connector"}
    assert not any(p.requires_grad for part in (policy.writer, policy.drawer) for p in part.net.parameters())


def test_what_ships_is_small_and_says_how_it_was_made() -> None:
    weights = load_file(projector.BASE / projector.WEIGHTS)
    assert {one.dtype for one in weights.values()} == {torch.float16}
    assert sum(file.stat().st_size for file in projector.BASE.iterdir()) < 300_000
    scores = json.loads((projector.BASE / "scores.json").read_text())
    assert scores["command"].startswith("rlkit pretrain-connector --out DIR ")
    assert 0 < scores["held_out"]["strict"] < 0.2, "the stages have something to do"
