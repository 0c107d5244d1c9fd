"""The program_truth reward: what means the same, what is partly right, and what cannot be judged."""

import itertools

import pytest
import torch

from rlkit.rewards.program_truth import ProgramTruth, likeness
from rlkit.types import Prompt, Samples
from rlkit.world import grammar
from rlkit.world.grammar import parse


def said(pairs: list[tuple[str | None, str]]) -> Samples:
    """(what the atlas says, None for nothing; the gen_prompt)."""
    prompts = tuple(
        Prompt(i, "draw it", metadata={} if truth is None else {"caption": truth}) for i, (truth, _) in enumerate(pairs)
    )
    nothing, rows = torch.zeros(len(pairs), 0), torch.arange(len(pairs))
    texts = tuple(text for _, text in pairs)
    return Samples(nothing, nothing, prompts, rows, rows, rows, version=0, total=len(pairs), texts=texts)


BOTH = "a red circle left of a blue square"


@pytest.mark.parametrize(
    ("truth", "text", "strict"),
    [
        (BOTH, BOTH, 1),
        (BOTH, "a blue square right of a red circle", 1),
        (BOTH, "A red circle LEFT of a blue square", 1),
        (BOTH, "a blue square left of a red circle", 0),
        (BOTH, "a red circle and a blue square", 0),
        (BOTH, "a red circle above a blue square", 0),
        ("a red circle and a blue square", "a blue square and a red circle", 1),
        ("a red circle above a blue square", "a blue square below a red circle", 1),
        ("two red circles", "two red circles", 1),
        ("two red circles", "a red circle", 0),
        ("a red circle", "a red circle .", 0),
        ("a red circle", "something", 0),
        ("a red circle", "", 0),
    ],
)
def test_a_program_is_right_or_not(truth: str, text: str, strict: float) -> None:
    values, parts = ProgramTruth("strict")(said([(truth, text)]))
    assert values.tolist() == parts["strict"].tolist() == [strict]
    assert (parts["graded"].item() == 1) == bool(strict)


@pytest.mark.parametrize(
    ("truth", "text", "graded"),
    [
        # objects; number; relation or place: half of their mean
        (BOTH, "a red circle above a blue square", (1 + 1 + 1 + 0) / 8),
        (BOTH, "a red circle and a blue square", (1 + 1 + 1 + 0) / 8),
        (BOTH, "a blue square left of a red circle", (1 + 1 + 1 + 0) / 8),
        (BOTH, "a blue square right of a green circle", (1 + 0.25 + 1 + 1) / 8),
        (BOTH, "a green cross left of a red circle", (1 + 0 + 1 + 0) / 8),
        (BOTH, "a red square left of a blue circle", (0.25 + 0.25 + 1 + 0) / 8),
        (BOTH, "a red circle", (1 + 0 + 0.5 + 0) / 8),
        (BOTH, "a green circle in the top left", (0.25 + 0 + 0.5 + 0) / 8),
        ("a red circle", "two red circles", (1 + 0.5) / 4),
        ("a red circle", "a blue square", (0 + 1) / 4),
        ("a red circle", "a red square", (0.25 + 1) / 4),
        ("two red circles", "four red crosses", (0.25 + 0.5) / 4),
        ("two red circles", "a red circle and a red square", (1 + 0 + 1) / 6),
        ("a red circle in the top left", "a blue cross in the top left", (0 + 1 + 1) / 6),
        ("a red circle in the top left", "a red circle in the top right", (1 + 1 + 0) / 6),
        ("a red circle", "no caption at all", 0),
    ],
)
def test_each_right_fact_counts(truth: str, text: str, graded: float) -> None:
    values, parts = ProgramTruth()(said([(truth, text), (truth, truth)]))
    assert parts["graded"].tolist() == pytest.approx([graded, 1])
    assert values.tolist() == pytest.approx([graded / 2, 1]), "mixed is the mean of both"
    assert ProgramTruth("graded")(said([(truth, text)]))[0].tolist() == pytest.approx([graded])


def test_likeness_is_symmetric_and_below_half_unless_both_mean_the_same() -> None:
    some = [caption for kind in grammar.KINDS for caption in grammar.captions(kind)[::37]]
    for one, other in itertools.product(some, some):
        found = likeness(one, other)
        assert found == likeness(other, one), (one.text, other.text)
        assert found == 1 if one.canonical == other.canonical else 0 <= found < 0.5, (one.text, other.text)


def test_how_a_relation_is_told_does_not_matter() -> None:
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    others = [caption for kind in grammar.KINDS for caption in grammar.captions(kind)[::97]]
    for caption in grammar.captions("relation")[::173]:
        first, second = (" ".join(one) for one in caption.objects)
        same = parse(f"a {second} {mirrored[str(caption.relation)]} a {first}")
        assert likeness(caption, same) == 1
        assert [likeness(same, one) for one in others] == [likeness(caption, one) for one in others]


def test_without_a_truth_nothing_is_scored() -> None:
    values, parts = ProgramTruth()(said([(None, BOTH), (BOTH, BOTH), ("a portrait", "a portrait")]))
    assert values.isnan().tolist() == [True, False, True]
    assert parts["strict"].isnan().tolist() == parts["graded"].isnan().tolist() == [True, False, True]


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'strict'"):
        ProgramTruth("strikt")
