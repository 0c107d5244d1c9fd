"""The colour-area reward: a gradient that points to the right colours, and what it cannot see."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlkit.rewards.colour_area import ColourArea, areas, expected
from rlkit.rewards.composition import Composition
from rlkit.types import Prompt, Samples
from rlkit.world.grammar import COLOURS, SHAPES, Caption, draw, parse
from rlkit.world.obeys import goals
from rlkit.world.scenes import CANVAS, CROWDED_RADII, EXTENTS, RADII, Item, render_batch, render_scenes


def samples_of(media: Tensor, texts: Sequence[str]) -> Samples:
    n = len(texts)
    rows = torch.arange(n)
    prompts = tuple(Prompt(index, text) for index, text in enumerate(texts))
    return Samples(media, torch.zeros(n, 1, 1, 1), prompts, rows, rows, rows, version=0, total=n)


def colours(caption: Caption) -> set[str]:
    return {colour for colour, _ in caption.objects}


def drawn(n: int, seed: int = 0) -> tuple[list[Caption], Tensor]:
    rng = np.random.default_rng(seed)
    captions = draw("train", n, rng)
    return captions, torch.from_numpy(render_batch(captions, rng))


def with_gradient(samples: Samples) -> tuple[Tensor, Tensor]:
    media = samples.media.clone().requires_grad_()
    values = ColourArea()(replace(samples, media=media))
    (gradient,) = torch.autograd.grad(values.nansum(), media)
    return values.detach(), gradient


def test_true_pictures_score_nearly_1_and_those_of_other_captions_lower() -> None:
    captions, media = drawn(400)
    texts = [caption.text for caption in captions]
    true = ColourArea()(samples_of(media, texts))
    assert true.min() > 0.95
    assert true.mean() > 0.995
    other = ColourArea()(samples_of(media.roll(1, 0), texts))  # each caption with its neighbour's picture
    shown = captions[-1:] + captions[:-1]
    apart = torch.tensor([not colours(a) & colours(b) for a, b in zip(captions, shown, strict=True)])
    assert int(apart.sum()) > 150
    assert (other[apart] < true[apart] - 0.2).all()
    assert other[apart].mean() < 0.35
    some = torch.tensor([colours(a) != colours(b) for a, b in zip(captions, shown, strict=True)])
    assert (other[some] < true[some]).all()
    assert other[some].mean() < 0.5


def test_a_wrong_colour_has_a_gradient_towards_the_right_one() -> None:
    captions, media = drawn(300)
    other = [caption.text for caption in captions[1:] + captions[:1]]
    differ = [colours(a) != colours(parse(text)) for a, text in zip(captions, other, strict=True)]
    samples = samples_of(media, other)
    before, gradient = with_gradient(samples)
    size = gradient.flatten(1).norm(dim=1)
    assert gradient.isfinite().all()
    assert (size[differ] > 0.01).all()
    step = 0.5 * gradient / size.clamp(min=1e-6)[:, None, None, None]
    after = ColourArea()(replace(samples, media=(media + step).clamp(0, 1)))
    assert (after[differ] > before[differ]).all()


@pytest.mark.parametrize(
    ("wanted", "shown"), [("red", "cyan"), ("green", "purple"), ("yellow", "blue"), ("cyan", "green")]
)
def test_climbing_repaints_an_object(wanted: str, shown: str) -> None:
    # Opposite colours are the hardest. At a temperature of .04, yellow does not come from blue: the softmax is flat.
    item = Item(shown, "circle", 16, 16, 5.2)
    samples = samples_of(torch.from_numpy(render_scenes([(item,)])), [f"a {wanted} circle"])
    first = float(ColourArea()(samples)[0])
    for _ in range(200):
        _, gradient = with_gradient(samples)
        step = 0.3 * gradient / gradient.norm().clamp(min=1e-6)
        samples = replace(samples, media=(samples.media + step).clamp(0, 1))
    assert first < 0.8
    assert float(ColourArea()(samples)[0]) > 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_those_of_the_drawn_shapes(shape: str) -> None:
    radius = 5.0
    extent = radius * EXTENTS[shape]
    arm = 0.45 * radius
    exact = {
        "circle": np.pi * extent**2,
        "square": 4 * extent**2,
        "triangle": 2 * extent**2,
        "cross": 8 * extent * arm - 4 * arm**2,
    }[shape]
    picture = torch.from_numpy(render_scenes([(Item("green", shape, 15.3, 17.1, radius),)]))
    found = 32 * 32 * areas(picture, temperature=0.02)[0]
    at = list(COLOURS).index("green")
    assert float(found[at]) == pytest.approx(exact, rel=0.06)
    assert found.sum() - found[at] < 0.03 * exact


def test_objects_of_a_caption_add_up_and_crowds_are_drawn_smaller() -> None:
    texts = ("a red circle", "a blue cross", "a red circle and a blue cross")
    red, blue, both = (expected(parse(text), 0.1) for text in texts)
    empty = areas(torch.from_numpy(render_scenes([()])), 0.1)
    torch.testing.assert_close(both, red + blue - empty)
    assert (both[1] >= both[0]).all()
    assert float((red - empty)[1, 0] / (red - empty)[0, 0]) == pytest.approx((RADII[1] / RADII[0]) ** 2, rel=0.05)
    two, four = (expected(parse(f"{number} red circles"), 0.1) for number in ("two", "four"))
    assert float((two - empty)[0, 0]) == pytest.approx(2 * float((red - empty)[0, 0]), rel=1e-4)
    assert float((four - empty)[1, 0]) < 3 * float((red - empty)[1, 0])


def test_what_is_missing_and_what_is_too_much_both_cost() -> None:
    def value(*items: Item) -> float:
        samples = samples_of(torch.from_numpy(render_scenes([items])), ["a red circle"])
        return float(ColourArea()(samples)[0])

    right = value(Item("red", "circle", 8, 8, 5))
    assert right > 0.99
    assert value() < 0.25
    assert value(Item("red", "circle", 8, 8, 2.5)) < 0.7
    assert value(Item("red", "circle", 16, 16, 11)) < 0.8
    assert value(Item("red", "circle", 8, 8, 5), Item("green", "circle", 24, 24, 5)) < 0.8
    assert value(Item("green", "circle", 24, 24, 5)) < 0.3


def test_it_sees_neither_shapes_nor_places() -> None:
    """Why it is not a judge: composition refuses all of these."""
    cases = {
        "a red circle": "a red square",
        "a red circle above a blue square": "a red circle below a blue square",
        "a green cross in the top left": "a green cross in the bottom right",
    }
    media = torch.from_numpy(render_batch([parse(text) for text in cases.values()], np.random.default_rng(0)))
    samples = samples_of(media, list(cases))
    assert ColourArea()(samples).min() > 0.95
    assert Composition("strict")(samples)[0].tolist() == [0, 0, 0]


def test_of_an_edit_it_is_told_the_goal() -> None:
    circle, square = Item("red", "circle", 9, 9, 5), Item("blue", "square", 22, 22, 5)
    green, blue = replace(circle, colour="green"), Item("blue", "circle", 22, 9, 4.5)
    cases: list[tuple[str, tuple[Item, ...], bool]] = [
        ("make the circle green", (green, square), True),
        ("make the circle green", (square, green), True),
        ("make the circle green", (circle, square), False),
        ("remove the square", (circle,), True),
        ("remove the square", (circle, square), False),
        ("add a blue circle", (circle, square, blue), True),
        ("add a blue circle", (circle, square), False),
    ]
    texts = [text for text, _, _ in cases]
    source = torch.from_numpy(render_scenes([(circle, square)]))[0]
    samples = samples_of(torch.from_numpy(render_scenes([made for _, made, _ in cases])), texts)
    prompts = tuple(Prompt(row, text, source=source) for row, text in enumerate(texts))
    values = ColourArea()(replace(samples, prompts=prompts))
    for value, (text, _, right) in zip(values.tolist(), cases, strict=True):
        assert (value > 0.95) == right, text
    assert ColourArea()(samples).isnan().all(), "an edit of nothing"


def test_a_caption_beside_a_source_is_a_caption() -> None:
    """As where a picture is put into words, and the words into a picture."""
    samples = samples_of(torch.from_numpy(render_scenes([(Item("red", "circle", 9, 9, 5),)])), ["a red circle"])
    told = replace(samples, prompts=(Prompt(0, "a red circle", source=torch.zeros(3, 64, 64)),))
    assert torch.equal(ColourArea()(told), ColourArea()(samples))


def test_of_the_last_object_removed_there_is_nothing_to_see() -> None:
    item = Item("red", "circle", 9, 9, 5)
    source, empty = torch.from_numpy(render_scenes([(item,), ()]))
    prompts = (Prompt(0, "remove the circle", source=source),) * 2
    samples = samples_of(torch.stack([empty, source]), ["remove the circle"] * 2)
    gone, there = ColourArea()(replace(samples, prompts=prompts)).tolist()
    assert gone > 0.99
    assert there < 0.3


def test_prompts_from_elsewhere_are_not_scored_and_spoil_no_gradient() -> None:
    _, media = drawn(3)
    values, gradient = with_gradient(samples_of(media, ["a photo of a dog", "two cyan crosses", ""]))
    assert values.isnan().tolist() == [True, False, True]
    assert gradient.isfinite().all(), "0 times NaN is NaN"
    assert [bool(row.any()) for row in gradient] == [False, True, False]
    assert ColourArea()(samples_of(media[:0], [])).shape == (0,)


def test_a_picture_without_a_direction_has_a_finite_gradient() -> None:
    background = torch.from_numpy(CANVAS)[None, :, None, None].expand(1, 3, 32, 32)  # the cosine is 0 / 0 everywhere
    values, gradient = with_gradient(samples_of(background, ["a red circle"]))
    assert values[0] < 0.25
    assert gradient.isfinite().all()
    assert gradient.any()


def test_values_stay_in_the_declared_range_on_noise_and_in_low_precision() -> None:
    captions, media = drawn(64)
    texts = [caption.text for caption in captions]
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for pictures in (noise, torch.ones_like(noise), media.flip(0)):
        values = ColourArea()(samples_of(pictures, texts))
        assert bool(((values >= 0) & (values <= 1)).all())
    low = ColourArea()(samples_of(media.to(torch.bfloat16), texts))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, ColourArea()(samples_of(media, texts)), rtol=0, atol=0.02)


def test_declarations() -> None:
    assert ColourArea.reads == ("prompt",)
    assert ColourArea.range == (0.0, 1.0)
    assert ColourArea.higher_is_better
    assert ColourArea.differentiable
    with pytest.raises(ValueError, match=r"temperature must be above 0, not 0.0"):
        ColourArea(0.0)


def test_what_an_edit_keeps_may_have_the_size_that_it_had_among_three() -> None:
    """Of three objects one is removed: the others are as small as three have to be, and are not asked to grow."""
    things = [("red", "circle", 7.0), ("blue", "square", 16.0), ("green", "cross", 25.0)]
    scene = tuple(Item(colour, shape, x, 16.0, CROWDED_RADII[0]) for colour, shape, x in things)
    source, media = (torch.from_numpy(render_scenes([shown])) for shown in (scene, scene[:2]))
    (edit,) = [
        text for text in ("remove the cross", "remove the green cross") if goals([(text, source[0].numpy())])[0]
    ][:1]
    samples = samples_of(media, [edit])
    samples = replace(samples, prompts=(replace(samples.prompts[0], source=source[0]),))
    assert float(ColourArea()(samples)) > 0.99


def test_a_temperature_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        ColourArea(temperature=float("nan"))
