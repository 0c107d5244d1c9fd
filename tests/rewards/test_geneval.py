"""The reward geneval: what it asks a detector, what it returns, and what it leaves unscored."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlkit import registry
from rlkit.clauses import Detection, Wanted
from rlkit.rewards.geneval import GenEval, _Scorer
from rlkit.types import Prompt, Samples, Unscored
from rlkit.world.checker import check_batch
from rlkit.world.grammar import COLOURS, SHAPES, Caption, panel, parse
from rlkit.world.scenes import render_batch

MakeSamples = Callable[..., Samples]
Answer = Detection | Unscored
CPU = torch.device("cpu")
DOG, TWO_CATS = {"class": "dog", "count": 1}, {"class": "cat", "count": 2}
DOG_SEEN = Detection(torch.tensor([[1.0, 1, 5, 5]]), ("dog",), torch.tensor([0.8]))
NOTHING = Detection(torch.zeros(0, 4), (), torch.zeros(0))


class ByHand:
    """A detector with given answers, which remembers what it was asked. A picture's first pixel is its number."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = answers
        self.asked: list[tuple[int, Wanted]] = []

    def __call__(self, pictures: torch.Tensor, wanted: Sequence[Wanted]) -> list[Answer]:
        numbers = (pictures[:, 0, 0, 0] * 255).round().int().tolist()
        self.asked += zip(numbers, wanted, strict=True)
        return [self.answers[number] for number in numbers]


def pictures(n: int) -> torch.Tensor:
    return (torch.arange(n) / 255).reshape(n, 1, 1, 1).expand(n, 3, 8, 8).clone()


def prompts(*metadata: dict[str, Any]) -> list[Prompt]:
    return [Prompt(row, "whatever it says", metadata=one) for row, one in enumerate(metadata)]


def ask(samples: Samples, *answers: Answer, **options: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    values, parts = _Scorer(GenEval(**options), ByHand(*answers))(samples)
    assert isinstance(values, list)
    return values, {name: torch.as_tensor(part) for name, part in parts.items()}


# ------------------------------------------------------------------------------------------------------- values


def test_strict_graded_mixed_and_a_component_for_each_kind(samples_of: MakeSamples) -> None:
    samples = samples_of(pictures(2), prompts({"include": [DOG]}, {"include": [DOG, TWO_CATS]}))
    answers = (DOG_SEEN, replace(DOG_SEEN, labels=("cat",)))
    got = {score: ask(samples, *answers, score=score)[0] for score in ("strict", "graded", "mixed")}
    assert got == {"strict": [1, 0], "graded": [1, 0.25], "mixed": [1, 0.125]}
    assert ask(samples, *answers)[0] == got["mixed"]
    _, parts = ask(samples, *answers)
    assert tuple(parts) == GenEval.components
    assert parts["object"].tolist() == [1, 0]
    assert parts["count"].isnan().tolist() == [True, False]  # the first prompt has no such clause
    assert parts["count"][1] == 0.5
    assert all(parts[kind].isnan().all() for kind in ("colour", "position", "attribution", "exclude"))


def test_what_the_detector_is_asked(samples_of: MakeSamples) -> None:
    coloured = {**TWO_CATS, "color": "red"}
    excluding = {"include": [coloured], "exclude": [DOG], "tag": "counting"}
    samples = samples_of(pictures(3), prompts({"include": [DOG], "tag": "single_object"}, {}, excluding))
    hand = ByHand(NOTHING, NOTHING, NOTHING)
    _Scorer(GenEval(), hand)(samples)
    assert hand.asked == [(0, Wanted(("dog",), 0.3)), (2, Wanted(("cat", "dog"), 0.9, ("red",)))]


def test_thresholds_and_the_number_a_class_are_options(samples_of: MakeSamples) -> None:
    counting = {"include": [TWO_CATS], "tag": "counting"}
    cats = Detection(torch.rand(3, 4), ("cat",) * 3, torch.tensor([0.95, 0.93, 0.5]))
    one = samples_of(pictures(1), prompts(counting))
    assert ask(one, cats, score="strict")[0] == [1]
    assert ask(one, cats, score="strict", counting_threshold=0.4)[0] == [0]
    assert ask(one, cats, score="strict", counting_threshold=0.4, at_least=True)[0] == [1]
    assert ask(one, cats, score="strict", counting_threshold=0.4, most=2)[0] == [1]
    assert ask(samples_of(pictures(1), prompts({"include": [TWO_CATS]})), cats, score="strict")[0] == [0]


def test_a_sample_is_judged_by_itself(samples_of: MakeSamples) -> None:
    answers = (DOG_SEEN, NOTHING, replace(DOG_SEEN, labels=("cat",)), Unscored("no"))
    metadata = [{"include": [DOG]}, {"include": [DOG]}, {"include": [TWO_CATS, DOG]}, {"include": [DOG]}]
    together, parts = ask(samples_of(pictures(4), prompts(*metadata)), *answers)
    for row in range(4):
        alone, own = ask(samples_of(pictures(4)[[row]], prompts(metadata[row])), *answers)
        assert alone == [together[row]]
        torch.testing.assert_close(own, {name: part[[row]] for name, part in parts.items()}, equal_nan=True)
    backwards = samples_of(pictures(4).flip(0), prompts(*metadata[::-1]))
    assert ask(backwards, *answers)[0] == together[::-1]


# ----------------------------------------------------------------------------------------------------- unscored


def test_what_cannot_be_judged_is_unscored_and_says_why(samples_of: MakeSamples) -> None:
    media = pictures(5)
    media[4, 1, 2, 3] = torch.nan
    rows = prompts({}, {"include": [{**DOG, "count": 0}]}, {"include": [DOG]}, {"include": [DOG]}, {"include": [DOG]})
    broken = replace(DOG_SEEN, scores=torch.tensor([torch.nan]))
    values, parts = ask(samples_of(media, rows), DOG_SEEN, DOG_SEEN, Unscored("no such class"), broken, DOG_SEEN)
    assert [one.reason.partition(":")[0] for one in values] == [
        "the prompt's metadata has no 'include', the list of what its picture has to show",
        "include[0] has count 0; it is a whole number from 1",
        "no such class",
        "the detector's own numbers are not finite",
        "the picture has pixels that are not finite",
    ]
    assert all(part.isnan().all() for part in parts.values())


def test_a_colour_that_nobody_can_tell_is_unscored(samples_of: MakeSamples) -> None:
    one = samples_of(pictures(1), prompts({"include": [{**DOG, "color": "red"}]}))
    assert ask(one, DOG_SEEN)[0] == [
        Unscored("the detector names no colours: give the option colours a CLIP checkpoint")
    ]
    assert ask(one, replace(DOG_SEEN, colours=("red",)))[0] == [1]


def test_nothing_in_nothing_out(samples_of: MakeSamples) -> None:
    values, parts = ask(samples_of(torch.zeros(0, 3, 8, 8), []))
    assert values == []
    assert all(part.shape == (0,) for part in parts.values())


def test_a_detector_that_loses_a_picture_is_an_error(samples_of: MakeSamples) -> None:
    samples = samples_of(pictures(2), prompts({"include": [DOG]}, {"include": [DOG]}))
    with pytest.raises(ValueError, match="1 answers for 2 pictures"):
        _Scorer(GenEval(), lambda pictures, wanted: [DOG_SEEN])(samples)


def test_what_are_no_pictures_is_an_error(samples_of: MakeSamples) -> None:
    with pytest.raises(ValueError, match=r"pictures are \[N, 3, H, W\]"):
        ask(samples_of(torch.zeros(1, 1, 8, 8), prompts({"include": [DOG]})), DOG_SEEN)


# --------------------------------------------------------------------------------------------- the embedded world


def metadata_of(caption: Caption) -> dict[str, Any]:
    """A caption of the world in GenEval's words: nothing else may be in the picture."""
    count = caption.count or 1
    include: list[dict[str, Any]] = [
        {"class": shape, "count": count, "color": colour} for colour, shape in caption.objects
    ]
    if caption.relation:
        include[0]["position"] = [caption.relation, 1]
    others = {*SHAPES, "unknown"} - {shape for _, shape in caption.objects}
    return {"include": include, "exclude": [{"class": one, "count": 1} for one in sorted(others)]}


def wrong_ones(caption: Caption) -> list[Caption]:
    """Captions that differ in one claim."""
    (colour, shape), rest = caption.objects[0], caption.objects[1:]
    other = next(one for one in COLOURS if one != colour and (one, shape) not in rest)
    turned = next(one for one in SHAPES if one != shape and (colour, one) not in rest)
    wrong = [replace(caption, objects=((other, shape), *rest)), replace(caption, objects=((colour, turned), *rest))]
    if caption.count:
        wrong.append(replace(caption, count=2 if caption.count > 2 else 3))
    if caption.relation:
        wrong.append(replace(caption, objects=caption.objects[::-1]))
    if rest:
        wrong.append(Caption("single", caption.objects[:1]))
        wrong.append(replace(caption, objects=((rest[0][0], shape), (colour, rest[0][1]))))  # the colours swapped
    return [one for one in wrong if len(set(one.objects)) == len(one.objects) and one.canonical != caption.canonical]


def test_it_agrees_with_the_strict_checker_of_the_world(samples_of: MakeSamples) -> None:
    captions = [one for one in panel("train", 150) if one.kind != "place"]
    pairs = [(one, shown) for one in captions for shown in (one, *wrong_ones(one))]
    images = render_batch([shown for _, shown in pairs], np.random.default_rng(0))
    claimed = [caption for caption, _ in pairs]
    expected = [verdict.strict for verdict in check_batch(images, claimed)]
    judge = GenEval(score="strict", detector="world").load(CPU)
    values, parts = judge(samples_of(torch.from_numpy(images), prompts(*map(metadata_of, claimed))))
    assert values == expected
    assert (sum(expected), len(expected)) == (len(captions), len(pairs))  # every picture but the first is wrong
    assert len({one.kind for one in captions}) == 4
    graded = torch.as_tensor(parts["graded"])
    assert bool((graded[torch.tensor(expected) == 0] < 1).all())


def test_the_world_says_what_it_cannot_know(samples_of: MakeSamples) -> None:
    judge = GenEval(detector="world").load(CPU)
    circle = {"class": "circle", "count": 1}
    rows = prompts({"include": [DOG]}, {"include": [{**circle, "color": "pink"}]}, {"include": [circle]})
    image = torch.from_numpy(render_batch([parse("a red circle")], np.random.default_rng(0)))
    values, _ = judge(samples_of(image.expand(3, 3, 32, 32), rows))
    assert values == [Unscored("the world knows no 'dog'"), Unscored("the world knows no 'pink'"), 1.0]
    large, _ = judge(samples_of(torch.zeros(1, 3, 64, 48), rows[2:]))
    assert large == [Unscored("the world's pictures are 32x32, not 48x64")]


# ------------------------------------------------------------------------------------------------------ options


def test_ones_own_detector_is_named_by_its_function(
    samples_of: MakeSamples, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_eyes.py").write_text(
        "import torch\n"
        "from rlkit.clauses import Detection\n"
        "def load(path, device):\n"
        "    def look(pictures, wanted):\n"
        "        return [Detection(torch.zeros(1, 4), (path,), torch.ones(1), colours=('red',)) for _ in wanted]\n"
        "    return look\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = registry.build("rewards", "geneval", {"detector": "own_eyes:load", "path": "dog", "colours": None})
    rows = prompts({"include": [{**DOG, "color": "red"}]}, {"include": [{**DOG, "color": "blue"}]})
    assert reward.load(CPU)(samples_of(pictures(2), rows))[0] == [1, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "strickt"}, r"score='strickt' is none of strict, graded, mixed; did you mean 'strict'\?"),
        ({"score": "zzz"}, "graded, mixed$"),
        ({"detector": "mask2fromer"}, r"detector='mask2fromer' is none of .*; did you mean 'mask2former'\?"),
        ({"detector": "yolo"}, "nor package.module:function$"),
        ({"threshold": 1.0}, "threshold=1.0 is not within"),
        ({"counting_threshold": -0.1}, "counting_threshold=-0.1 is not within"),
        ({"most": 0}, "most=0 leaves no object"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenEval(**options)


def test_the_card_is_read_from_source() -> None:
    (entry,) = [one for one in registry.describe("rewards") if one.name == "geneval"]
    assert entry.summary.endswith(".")
    assert entry.extra == "geneval"
    assert entry.constants["reads"] == ("metadata",)
    assert entry.constants["range"] == (0.0, 1.0)
    assert entry.constants["components"] == GenEval.components
    assert all(option.doc and option.default is not None for option in entry.fields)
