"""The colour of a cut-out: what is cut out, and which word is chosen."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit.clauses import Detection
from rlkit.preprocessing import Preprocessing
from rlkit.rewards._colours import COLOURS, GREY, ColourNames, cut

RGB = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class ByMean:
    """In the place of CLIP: a picture is its mean colour, a text the colour that it names and the thing it is about."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.passes: list[tuple[int, ...]] = []
        plain = Preprocessing("short", (8, 8), (0.0,) * 3, (1.0,) * 3, (8, 8), "bilinear")
        self.pictures = SimpleNamespace(
            preprocessing=plain, device=torch.device("cpu"), dtype=torch.float32, features=self._features
        )

    def _features(self, pixels: Tensor) -> Tensor:
        self.passes.append(tuple(pixels.shape))
        return pixels.mean((2, 3))

    def texts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        self.said += texts
        vectors = [RGB.get(next(one for one in COLOURS if one in text.split()), (-1.0, -1, -1)) for text in texts]
        vectors = [v[::-1] if "liar" in text else v for v, text in zip(vectors, texts, strict=True)]
        return torch.tensor(vectors), torch.zeros(len(texts))


def flat(colour: str, height: int = 6, width: int = 9) -> Tensor:
    return torch.tensor(RGB[colour])[:, None, None].expand(3, height, width)


def names(clip: ByMean) -> ColourNames:
    return ColourNames(clip)  # type: ignore[arg-type]


def test_each_cut_out_gets_the_word_that_fits_best() -> None:
    clip = ByMean()
    cuts = [flat("red"), flat("blue", 3, 3), flat("green", 20, 4), flat("red")]
    assert names(clip)(cuts, ["dog"] * 4) == ["red", "blue", "green", "red"]
    assert clip.passes == [(4, 3, 8, 8)]  # of any size, in one pass
    assert len(clip.said) == 30  # ten colours in three sentences
    assert sum("dog" in text for text in clip.said) == 20


def test_sentences_are_about_the_thing_that_was_found() -> None:
    """Two of three sentences about a liar say blue for red, and they outweigh the third."""
    assert names(ByMean())([flat("red")] * 3, ["dog", "liar", "dog"]) == ["red", "blue", "red"]


def test_many_cut_outs_come_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.rewards._colours.AT_ONCE", 2)
    clip = ByMean()
    assert names(clip)([flat(one) for one in ("red", "green", "blue")], ["dog", "cat", "dog"]) == [
        "red",
        "green",
        "blue",
    ]
    assert [shape[0] for shape in clip.passes] == [2, 1]


def test_nothing_to_name_asks_nobody() -> None:
    assert names(None)([], []) == []  # type: ignore[arg-type]


def seen(*box: float, mask: Tensor | None = None) -> Detection:
    return Detection(torch.tensor([box]), ("dog",), torch.ones(1), None if mask is None else mask[None])


PICTURE = torch.arange(3 * 6 * 8).reshape(3, 6, 8) / 255


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((1, 2, 4, 5), (2, 5), (1, 4)),
        ((1.4, 2.6, 3.2, 4.1), (2, 5), (1, 4)),  # outwards to whole pixels
        ((-5, -5, 20, 20), (0, 6), (0, 8)),
        ((3, 3, 3, 3), (3, 4), (3, 4)),  # one pixel at least
        ((20, 9, 30, 12), (5, 6), (7, 8)),
        ((-9, -9, -5, -5), (0, 1), (0, 1)),
    ],
)
def test_the_cut_stays_in_the_picture(box: Any, rows: Any, columns: Any) -> None:
    assert torch.equal(cut(PICTURE, seen(*box), 0), PICTURE[:, slice(*rows), slice(*columns)])


def test_around_a_mask_it_is_grey() -> None:
    """Else the colour of what surrounds an object would be taken for its own."""
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:4, 3:5] = True
    picture = torch.where(mask, flat("red", 6, 8), flat("blue", 6, 8))
    whole = cut(picture, seen(0, 0, 8, 6, mask=mask), 0)
    assert torch.equal(whole[:, 2:4, 3:5], flat("red", 2, 2))
    assert (whole[:, ~mask] == GREY).all()
    assert torch.tensor(GREY * 255).item() == pytest.approx(153)
    clip = ByMean()
    assert names(clip)([whole, picture], ["dog"] * 2) == ["red", "blue"]


def test_a_sliver_is_shortened_to_its_middle() -> None:
    """The rest would be cut off anyway, after it had grown to thousands of pixels."""
    wide = torch.rand(3, 6, 100)
    assert torch.equal(cut(wide, seen(0, 1, 100, 3), 0), wide[:, 1:3, 46:54])
    high = wide.movedim(1, 2)
    assert torch.equal(cut(high, seen(1, 0, 3, 100), 0), high[:, 46:54, 1:3])
