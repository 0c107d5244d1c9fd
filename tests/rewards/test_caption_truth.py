"""The caption_truth reward: what counts as true, and what cannot be judged."""

import numpy as np
import pytest
import torch

from rlkit.rewards.caption_truth import CaptionTruth
from rlkit.types import Prompt, Samples
from rlkit.world.grammar import SPLITS, draw, parse
from rlkit.world.scenes import render_batch


def said(pairs: list[tuple[str | None, str]]) -> Samples:
    """(what the picture shows, None for no picture; what was said of it)."""
    rng = np.random.default_rng(0)
    shown = [None if text is None else torch.from_numpy(render_batch([parse(text)], rng)[0]) for text, _ in pairs]
    prompts = tuple(Prompt(i, "", source=picture) for i, picture in enumerate(shown))
    n, rows = len(pairs), torch.arange(len(pairs))
    nothing = torch.zeros(n, 0, 0, 0)
    texts = tuple(text for _, text in pairs)
    return Samples(nothing, nothing, prompts, rows, rows, rows, version=0, total=n, texts=texts)


BOTH = "a red circle left of a blue square"


@pytest.mark.parametrize(
    ("caption", "strict"),
    [
        (BOTH, 1),
        ("a blue square right of a red circle", 1),
        ("a blue square and a red circle", 1),
        ("A red circle and a blue square", 1),
        ("a red circle", 0),
        ("a blue square left of a red circle", 0),
        ("a red square and a blue circle", 0),
        ("a red circle left of a blue square .", 0),
        ("", 0),
        ("two things", 0),
    ],
)
def test_a_caption_is_true_or_not(caption: str, strict: float) -> None:
    values, parts = CaptionTruth("strict")(said([(BOTH, caption)]))
    assert values.tolist() == parts["strict"].tolist() == [strict]
    assert parts["words"].tolist() == [len(caption.split())]


def test_partial_credit_stays_below_half() -> None:
    values, parts = CaptionTruth()(said([(BOTH, "a red circle"), (BOTH, BOTH), (BOTH, "no caption")]))
    assert parts["graded"].tolist() == pytest.approx([0.375, 1, 0])
    assert values.tolist() == pytest.approx([0.1875, 1, 0])


def test_without_a_picture_nothing_is_scored() -> None:
    values, parts = CaptionTruth()(said([(None, BOTH), (BOTH, BOTH)]))
    assert values.isnan().tolist() == [True, False]
    assert parts["strict"].isnan().tolist() == [True, False]


def test_the_world_s_own_captions_are_true() -> None:
    rng = np.random.default_rng(1)
    captions = [caption for split in SPLITS for caption in draw(split, 200, rng)]
    pictures = torch.from_numpy(render_batch(captions, rng))
    prompts = tuple(Prompt(i, "", source=picture) for i, picture in enumerate(pictures))
    rows, nothing = torch.arange(len(captions)), torch.zeros(len(captions), 0, 0, 0)
    texts = tuple(caption.text for caption in captions)
    samples = Samples(nothing, nothing, prompts, rows, rows, rows, version=0, total=len(captions), texts=texts)
    assert CaptionTruth("strict")(samples)[0].mean() >= 0.99


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'strict'"):
        CaptionTruth("strikt")
