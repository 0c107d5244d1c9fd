"""The composition reward: what it returns, for which score, and what it leaves unscored."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlkit.rewards.composition import Composition
from rlkit.types import Prompt, Samples
from rlkit.world import instructions
from rlkit.world.grammar import draw, parse
from rlkit.world.scenes import render_batch, render_scenes


def samples_of(media: Tensor, texts: Sequence[str]) -> Samples:
    n = len(texts)
    rows = torch.arange(n)
    prompts = tuple(Prompt(index, text) for index, text in enumerate(texts))
    return Samples(media, torch.zeros(n, 1, 1, 1), prompts, rows, rows, rows, version=0, total=n)


def made(texts: list[str], shown: list[str]) -> Samples:
    images = render_batch([parse(text) for text in shown], np.random.default_rng(0))
    return samples_of(torch.from_numpy(images), texts)


TRUE, WRONG = "a red circle above a blue square", "a red circle below a blue square"


def test_strict_graded_and_mixed() -> None:
    samples = made([TRUE, WRONG], [TRUE, TRUE])
    values = {score: Composition(score=score)(samples)[0].tolist() for score in ("strict", "graded", "mixed")}
    assert values == {"strict": [1, 0], "graded": [1, 0.375], "mixed": [1, 0.1875]}
    assert Composition() == Composition(score="mixed")


def test_components_come_along() -> None:
    values, components = Composition()(made([TRUE, WRONG], [TRUE, TRUE]))
    assert set(components) == {"strict", "graded"}
    assert torch.equal(values, (components["strict"] + components["graded"]) / 2)
    assert values.dtype == torch.float32


def test_prompts_from_elsewhere_are_not_scored() -> None:
    values, components = Composition()(made(["a photo of a dog", TRUE, ""], [TRUE, TRUE, TRUE]))
    assert values.isnan().tolist() == [True, False, True]
    assert all(component.isnan().tolist() == [True, False, True] for component in components.values())
    assert values[1] == 1
    assert Composition()(made(["a dog"], [TRUE]))[0].isnan().all()


def test_values_stay_in_the_declared_range() -> None:
    rng = np.random.default_rng(1)
    rows = draw("train", 64, rng)
    media = torch.from_numpy(render_batch(rows[1:] + rows[:1], rng))
    for score in ("strict", "graded", "mixed"):
        low, high = Composition.range
        values, _ = Composition(score)(samples_of(media, [caption.text for caption in rows]))
        assert values.shape == (64,)
        assert bool(((values >= low) & (values <= high)).all())


def test_low_precision_and_gradients_are_read() -> None:
    samples = made([TRUE], [TRUE])
    assert Composition()(replace(samples, media=samples.media.to(torch.bfloat16)))[0].item() == 1
    assert Composition()(replace(samples, media=samples.media.clone().requires_grad_()))[0].item() == 1


def test_declarations() -> None:
    assert Composition.reads == ("prompt",)
    assert Composition.range == (0.0, 1.0)
    assert Composition.higher_is_better


def test_a_picture_is_judged_by_itself() -> None:
    samples = made([TRUE, WRONG, "two red circles"], [TRUE, TRUE, "two red circles"])
    together = Composition()(samples)[0]
    assert not Composition.groupwise
    for row in range(3):
        assert Composition()(samples.select(torch.tensor([row])))[0] == together[row]


def test_no_samples_and_what_it_declares() -> None:
    values, components = Composition()(samples_of(torch.zeros(0, 3, 32, 32), []))
    assert values.shape == (0,)
    assert tuple(components) == tuple(Composition().components) == ("strict", "graded")
    values, components = Composition("gated")(samples_of(torch.zeros(0, 3, 32, 32), []))
    assert values.shape == (0,)
    assert tuple(components) == Composition("gated").components == ("strict", "graded", "execution", "consistency")
    assert Composition.components == ("strict", "graded")


def test_gated_is_of_edits() -> None:
    """A caption asks for no edit: the score of edits has no number for it, and says that it needs a source."""
    values, components = Composition("gated")(made([TRUE], [TRUE]))
    assert values.isnan().all()
    assert components["execution"].isnan().all()
    assert components["strict"].tolist() == [1]
    assert list(Composition("gated").reads) == ["prompt", "source"]
    assert list(Composition("gated").optional) == []
    assert Composition("mixed").reads == Composition.reads == ("prompt",)
    with pytest.raises(ValueError, match="score='gated' judges edits, and by='caption' none"):
        Composition("gated", by="caption")


def test_an_edit_is_gated_by_its_execution() -> None:
    examples = instructions.draw("edit", "train", 64, np.random.default_rng(3))
    sources, answers = (
        torch.from_numpy(render_scenes(scenes))
        for scenes in ([one.shown[0] for one in examples], [one.answer for one in examples])
    )
    prompts = tuple(Prompt(row, one.text, source=sources[row]) for row, one in enumerate(examples))
    samples = replace(samples_of(answers, [one.text for one in examples]), prompts=prompts)
    values, components = Composition("gated")(samples)
    assert values.tolist() == [1] * 64
    assert components["consistency"].tolist() == [1] * 64
    nothing_done, parts = Composition("gated")(replace(samples, media=sources))
    come_or_go = torch.tensor([one.kind in ("add", "remove") for one in examples])
    assert nothing_done[come_or_go].tolist() == [0] * int(come_or_go.sum())
    assert nothing_done[~come_or_go].tolist() == [0.25] * int((~come_or_go).sum())
    assert (parts["consistency"][~come_or_go] == 1).all()


def test_pictures_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \[N, 3, 32, 32\]"):
        Composition()(samples_of(torch.zeros(1, 3, 64, 64), [TRUE]))


def test_a_bad_score_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"score='strickt' is none of .*did you mean 'strict'\?"):
        Composition(score="strickt")
    with pytest.raises(ValueError, match=r"strict, graded, mixed, gated$"):
        Composition(score="zzz")


@pytest.mark.parametrize("task", ["edit", "in_context"])
def test_instructions_are_judged_by_their_pictures(task: str) -> None:
    """As the data set gives them; told with the pictures of another, none means the same."""
    examples = instructions.draw(task, "train", 64, np.random.default_rng(2))
    asked = []
    for index, example in enumerate(examples):
        pictures = tuple(torch.from_numpy(render_scenes(example.shown)))
        shown = {"source": pictures[0]} if task == "edit" else {"references": pictures}
        asked.append(Prompt(index, example.text, **shown))  # type: ignore[arg-type]
    answers = torch.from_numpy(render_scenes([example.answer for example in examples]))
    samples = replace(samples_of(answers, [prompt.text for prompt in asked]), prompts=tuple(asked))
    assert Composition("strict")(samples)[0].tolist() == [1] * 64
    moved = [
        replace(one, source=other.source, references=other.references)
        for one, other in zip(asked, asked[1:] + asked[:1], strict=True)
    ]
    others = Composition("strict")(replace(samples, prompts=tuple(moved)))[0]
    assert others.nan_to_num(0).sum() <= 1
    assert Composition("strict")(samples_of(answers, [prompt.text for prompt in asked]))[0].isnan().all(), "no pictures"


def test_a_picture_that_could_not_be_made_is_not_scored() -> None:
    """A renderer that failed leaves NaN: a 0 would blame the policy."""
    samples = made([TRUE, TRUE], [TRUE, TRUE])
    samples.media[1] = math.nan
    values, parts = Composition()(samples)
    assert torch.isfinite(values).tolist() == [True, False]
    assert torch.isfinite(parts["strict"]).tolist() == [True, False]
