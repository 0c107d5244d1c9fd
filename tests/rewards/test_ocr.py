"""The OCR reward: what each mode pays for, what it refuses to be fooled by, and how well it reads rendered text.

The arithmetic is tested with a reader that says what each picture holds; the last part reads with the real networks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlkit.rewards import ocr
from rlkit.rewards.ocr import OCR
from rlkit.types import Prompt, Samples, Unscored

SamplesOf = Callable[..., Samples]
CPU = torch.device("cpu")


def asking(*spans: str, text: str = "a sign") -> Prompt:
    return Prompt(0, text, target_text=spans)


def numbered(n: int) -> Tensor:
    """Pictures [n, 3, 4, 4] whose red channel is their number."""
    media = torch.zeros(n, 3, 4, 4)
    media[:, 0] = torch.arange(n).view(n, 1, 1) / 255
    return media


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch, samples_of: SamplesOf) -> Callable[..., Any]:
    """score(prompts, lines of each picture, areas, **options) -> (values, components), without the networks."""

    def run(
        prompts: Sequence[Prompt | str], lines: Sequence[Sequence[str]], areas: Sequence[float] = (), **options: Any
    ) -> Any:
        def reader(picture: np.ndarray) -> Any:
            number = int(picture[0, 0, 2])  # red is the last channel: the reader wants BGR
            return ocr._Reading(tuple(lines[number]), areas[number] if areas else 0.1)

        monkeypatch.setattr(ocr, "_reader", lambda detector_side: reader)
        return OCR(**options).load(CPU)(samples_of(numbered(len(prompts)), prompts))

    return run


HACKS = {
    "right": ["OPEN"],
    "tiled": ["OPEN OPEN OPEN"],
    "superset": ["REOPENED99"],
    "letter": ["OVEN"],
    "blank": [],
}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("ned", [1, 1 / 3, 0.4, 0.75, 0]),
        ("substring", [1, 1, 1, 0.75, 0]),  # flow_grpo's numbers, its two holes included
        ("exact", [1, 0, 0, 0, 0]),
    ],
)
def test_what_each_mode_pays(mode: str, expected: list[float], score: Callable[..., Any]) -> None:
    values, components = score([asking("OPEN")] * 5, list(HACKS.values()), mode=mode)
    assert values == pytest.approx(expected)
    assert components["similarity"] == pytest.approx([1, 1 / 3, 0.4, 0.75, 0])
    assert components["extra"] == [0, 8, 6, 0, 0]
    assert components["boxes"] == [1, 1, 1, 1, 0]


def test_the_default_mode_pays_1_for_the_text_alone(score: Callable[..., Any]) -> None:
    values, _ = score([asking("OPEN")] * 5, list(HACKS.values()))
    assert [name for name, value in zip(HACKS, values, strict=True) if value == 1] == ["right"]


def test_tiles_count_as_one_text_whatever_the_lines(score: Callable[..., Any]) -> None:
    values, components = score([asking("OPEN")] * 2, [["OPEN", "OPEN", "OPEN"], ["OP", "EN"]])
    assert values == pytest.approx([1 / 3, 1])
    assert components["boxes"] == [3, 2]
    assert components["extra"] == [8, 0]


def test_text_beyond_most_area_costs(score: Callable[..., Any]) -> None:
    prompts, lines, areas = [asking("OPEN")] * 4, [["OPEN"]] * 4, [0.0, 0.5, 0.8, 1.0]
    for mode in ocr.MODES:
        values, components = score(prompts, lines, areas, mode=mode, most_area=0.4)
        assert values == pytest.approx([1, 0.8, 0.5, 0.4])
        assert components["area"] == areas
        assert components["similarity"] == [1, 1, 1, 1], "before the price of the area"
    assert score(prompts, lines, areas, most_area=1.0)[0] == [1, 1, 1, 1]
    assert score(prompts, lines, areas)[0] == pytest.approx([1, 1, 0.625, 0.5])


def test_where_the_wanted_text_comes_from(score: Callable[..., Any]) -> None:
    prompts = [
        asking("OPEN", text='a sign that says "CLOSED"'),  # target_text is first
        'a sign that says "OPEN"',
        "a sign that says “OPEN”",
        "a sign that says 「OPEN」",
        "a sign that says 『OPEN』",
    ]
    assert score(prompts, [["OPEN"]] * 5)[0] == [1] * 5
    assert score(prompts, [["CLOSED"]] * 5)[0][0] < 0.5


@pytest.mark.parametrize("prompt", ["a sign that says OPEN", "", 'an empty "" sign', asking(" "), asking("", "\n")])
def test_without_a_wanted_text_nothing_is_scored(prompt: Prompt | str, score: Callable[..., Any]) -> None:
    values, components = score([prompt, asking("OPEN")], [["OPEN"], ["OPEN"]])
    assert isinstance(values[0], Unscored)
    assert "target_text" in values[0].reason
    assert values[1] == 1
    assert {name: column[0] for name, column in components.items()} == dict.fromkeys(OCR.components)


def test_several_spans_stand_in_any_order(score: Callable[..., Any]) -> None:
    prompt = 'a sign "CAFE" below a sign "OPEN"'
    lines = [["OPEN", "CAFE"], ["CAFE", "OPEN"], ["CAFE"], ["OPEN", "OPEN"]]
    assert score([prompt] * 4, lines)[0] == pytest.approx([1, 1, 0.5, 0.5])
    assert score([prompt] * 4, lines, mode="exact")[0] == [1, 1, 0, 0]
    assert score([prompt] * 4, lines, mode="substring")[0] == pytest.approx([1, 1, 0.5, 0.5])


def test_capitals_spaces_and_look_alikes(score: Callable[..., Any]) -> None:
    prompts, lines = [asking("Bill's Oil 10")], [["BILL’S", "OIL 10"]]
    assert score(prompts, lines, mode="exact")[0] == [1]
    assert score(prompts, lines, mode="exact", keep_spaces=True)[0] == [1]
    assert score(prompts, [["BILL’SOIL 10"]], mode="exact", keep_spaces=True)[0] == [0]
    assert score(prompts, [["BlLL'S OIL IO"]], mode="exact")[0] == [0]
    assert score(prompts, [["BlLL'S OIL IO"]], mode="exact", fold_look_alikes=True)[0] == [1]
    assert score([asking("ＯＰＥＮ")], [["open"]], mode="exact")[0] == [1]


def test_a_reader_that_fails_scores_nothing(monkeypatch: pytest.MonkeyPatch, samples_of: SamplesOf) -> None:
    def reader(picture: np.ndarray) -> Any:
        if picture[0, 0, 2] == 1:
            raise RuntimeError("out of memory")
        return ocr._Reading(("OPEN",), 0.1)

    monkeypatch.setattr(ocr, "_reader", lambda detector_side: reader)
    media = numbered(4)
    media[2, 1, 0, 0] = torch.nan
    values, components = OCR().load(CPU)(samples_of(media, [asking("OPEN")] * 4))
    assert values[0] == values[3] == 1
    assert values[1] == Unscored("the text reader failed: RuntimeError: out of memory"), "never the 0 of wrong text"
    assert isinstance(values[2], Unscored)
    assert "NaN or infinite" in values[2].reason
    assert components["similarity"] == [1, None, None, 1]
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], not \[4, 1, 3, 4, 4\]"):
        OCR().load(CPU)(samples_of(media[:, None], [asking("OPEN")] * 4))


def test_options() -> None:
    with pytest.raises(ValueError, match=r"mode='substr' is none of ned, substring, exact; did you mean 'substring'\?"):
        OCR(mode="substr")
    for area in (0.0, 1.1):
        with pytest.raises(ValueError, match="most_area"):
            OCR(most_area=area)
    for side in (16, 5000):
        with pytest.raises(ValueError, match=f"detector_side={side} must be 32 to 2000"):
            OCR(detector_side=side)


# ------------------------------------------------------------------------------------- with the real networks

PHRASES = ("COFFEE", "BAKERY", "Hello World", "Flow 2026", "EXIT 42", "Fresh Fish", "LIBRARY", "Thank You", "Reward")
PHRASES += ("SALE 50%", "Good Morning", "GARDEN PARTY")  # 6 to 12 characters


def rendered(text: str, size: int, kind: str = "plain", share: float = 0.8) -> Tensor:
    """[3, size, size]: the text in one line that takes this share of the width."""
    rng = np.random.default_rng(size)
    ink, ground = {"plain": ("black", "white"), "colour": ("khaki", "midnightblue")}.get(kind, ("white", "black"))
    image = Image.new("RGB", (size, size), ground)
    if kind == "texture":
        coarse = rng.integers(20, 130, (size // 8, size // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    width = ImageFont.load_default(100).getlength(text) / 100  # of the line, in heights of the font
    font = ImageFont.load_default(share * size / width)
    ImageDraw.Draw(image).text((size / 2, size / 2), text, fill=ink, font=font, anchor="mm")
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255


@pytest.fixture(scope="module")
def scorer() -> Any:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return OCR().load(CPU)


@pytest.mark.parametrize(("size", "least"), [(64, 0.8), (128, 1.0), (256, 1.0)])
def test_how_well_rendered_text_is_read(size: int, least: float, scorer: Any, samples_of: SamplesOf) -> None:
    """Measured on all 36 pairs of phrase and ground: 35 exact at 64 pixels (mean .997), all at 128 and at 256."""
    kinds = ("plain", "colour", "texture") * 4
    media = torch.stack([rendered(*one) for one in zip(PHRASES, [size] * 12, kinds, strict=True)])
    values, components = scorer(samples_of(media, [asking(phrase) for phrase in PHRASES]))
    assert np.mean([value == 1 for value in values]) >= least, dict(zip(PHRASES, values, strict=True))
    assert np.mean(values) > 0.97
    assert all(0.05 < area < 0.3 for area in components["area"])
    wrong, _ = scorer(samples_of(media[:3], [asking(phrase) for phrase in PHRASES[3:6]]))
    assert max(wrong) < 0.5


def test_the_area_is_that_of_the_text(scorer: Any, samples_of: SamplesOf) -> None:
    """Against the box of the ink itself: the detector draws its boxes a little wider."""
    media = torch.stack([rendered("OPEN", 128, share=share) for share in (0.4, 0.8)])
    _, components = scorer(samples_of(media, [asking("OPEN")] * 2))
    for area, picture in zip(components["area"], media, strict=True):
        rows, columns = (torch.nonzero(picture[0].lt(0.5).any(axis)) for axis in (1, 0))
        ink = int((rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)) / 128**2
        assert ink < area < 2.5 * ink
    assert components["boxes"] == [1, 1]


def test_a_tiled_picture_is_seen_through(scorer: Any, samples_of: SamplesOf) -> None:
    tile = rendered("OPEN", 128)[:, 40:88]
    media = torch.cat([tile] * 4, dim=1)[None, :, :192]
    values, components = scorer(samples_of(media, [asking("OPEN")]))
    assert values[0] < 0.3
    assert components["boxes"] == [4]
    assert components["extra"] == [12]


def test_no_text_no_reward(scorer: Any, samples_of: SamplesOf) -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    media = torch.cat([torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), noise])
    values, components = scorer(samples_of(media, [asking("OPEN")] * 3))
    assert values == [0, 0, 0]
    assert components["area"] == components["boxes"] == [0, 0, 0]


def test_values_do_not_depend_on_the_batch_or_on_earlier_calls(scorer: Any, samples_of: SamplesOf) -> None:
    media = torch.stack([rendered(phrase, 64, share=0.5) for phrase in PHRASES[:4]])
    samples = samples_of(media, [asking("COFFEE")] * 4)
    together = scorer(samples)[0]
    alone = [scorer(samples.select(torch.tensor([row])))[0][0] for row in (3, 2, 1, 0)]
    assert together == alone[::-1]
    assert scorer(samples_of(media[:0], []))[0] == []


@pytest.mark.parametrize("shape", [(1, 1), (2, 50), (8, 8), (16, 60), (60, 16)])
def test_pictures_of_any_size(shape: tuple[int, int], scorer: Any, samples_of: SamplesOf) -> None:
    media = torch.full((1, 3, *shape), 0.7, dtype=torch.bfloat16)
    assert scorer(samples_of(media, [asking("OPEN")]))[0] == [0]


def test_colours_are_not_swapped(samples_of: SamplesOf, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(ocr, "_reader", lambda side: lambda picture: seen.append(picture) or ocr._Reading((), 0.0))
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 6)
    OCR().load(CPU)(samples_of(red, [asking("OPEN")]))
    assert seen[0].shape == (4, 6, 3)
    assert seen[0][0, 0].tolist() == [0, 0, 255], "BGR, as OpenCV has it"
    assert seen[0].flags.c_contiguous
