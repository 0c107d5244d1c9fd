"""Text in pictures: is what was asked for to be legible there, and nothing besides?

Protocol: the OCR reward of flow_grpo (github.com/yifan123/flow_grpo, `ocr.py`), with PP-OCRv6 (small) in the place of
PaddleOCR 2.9: the package rapidocr carries the models, so nothing is downloaded, and one CPU core reads 15 to 30 small
pictures a second.

Wanted text W and text R that was read, both in the plain form of textmatch.py; d is Levenshtein's distance:
    ned        1 - d(W, R) / max(|W|, |R|)
    substring  1 if R holds W, else 1 - min(d(W, R), |W|) / |W|          flow_grpo's formula
    exact      1 if R is W, else 0
The value is that, times most_area / area where the boxes of the text cover more than most_area of the picture.

Differences from the reference code:
* `ned` is the default. flow_grpo's shortcut pays 1 for a picture tiled with the text, and for "REOPENED99" when "OPEN"
  was asked for: a policy finds that. `mode: substring` with `most_area: 1` is flow_grpo's reward.
* The text comes from the prompt's target_text, if it has one, and from all its quoted spans, not only the first; curly
  and CJK quotes count. Without either the sample is not scored; flow_grpo raises.
* Several spans may stand in any order. `substring` is then the mean over them.
* Texts are compared after NFKC and case folding, not after lower().
* A reader that fails gives no score; flow_grpo gives 0, the score of wrong text.
* The detector enlarges pictures to 320 pixels, not to 736: as exact at 64 to 256 pixels, in a quarter of the time. The
  classifier that turns lines by 180 degrees is off: it turns tiny text that is upright.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlkit.pictures import PictureError, to_uint8
from rlkit.textmatch import containment, orders, plain, quoted, similarity
from rlkit.types import Unscored

if TYPE_CHECKING:
    from rlkit.types import Prompt, Samples

MODES = ("ned", "substring", "exact")
Parts = dict[str, float]


@dataclass(frozen=True)
class OCR:
    """Is the wanted text legible in the picture, and no other? Read by PP-OCRv6 on one CPU core.

    The wanted text is the prompt's target_text, or what the prompt has between quotation marks. The default mode is
    `ned`: it counts what is too much like what is missing, so that only the text itself, once, is worth 1, and it falls
    letter by letter, so that a group has a signal. `substring` is hacked by repetition; `exact` is for evaluation, and
    gives most groups one value.

    Components: area, the share of the picture within boxes of text; boxes, how many lines were read; extra, how many
    characters were read beyond the length of the wanted text; similarity, `ned` before the price of its area. A reward
    that rises together with area or extra is being hacked.

    It reads printed text well from 64 pixels on, if a line fills most of the width and has at most some nine letters;
    small, blurred or slanted text less well. Wrongly read characters are mostly I, l and 1: see fold_look_alikes.
    """

    mode: str = "ned"  # ned, substring (flow_grpo's, which forgives extra text) or exact
    most_area: float = 0.5  # share of the picture that text may cover; beyond it, the value falls
    keep_spaces: bool = False  # whether spaces count; recognisers often miss them
    fold_look_alikes: bool = False  # whether 0 and o; 1, i, | and l; 5 and s are the same letter
    detector_side: int = 320  # the shorter side to which the detector enlarges a picture

    reads = ("prompt",)
    optional = ("target_text",)
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("area", "boxes", "extra", "similarity")
    groupwise = False
    licence = "Apache-2.0 (PP-OCRv6 and rapidocr)"
    size = "31 MB within the package, 230 MB of memory"
    protocol = "flow_grpo (github.com/yifan123/flow_grpo), without its shortcut for contained text"
    version = "1"
    extra = "ocr"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            near = get_close_matches(self.mode, MODES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mode={self.mode!r} is none of {', '.join(MODES)}{hint}")
        if not 0 < self.most_area <= 1:
            raise ValueError(f"most_area={self.most_area:g} must be above 0 and at most 1, which is no limit")
        if not 32 <= self.detector_side <= 2000:
            raise ValueError(f"detector_side={self.detector_side} must be 32 to 2000 pixels; 320 is enough for most")

    def load(self, device: torch.device) -> _Scorer:
        """The reader runs on the CPU whatever the device, and leaves the accelerator to the policy."""
        return _Scorer(self, _reader(self.detector_side))


@dataclass(frozen=True)
class _Reading:
    """What was read in one picture."""

    lines: tuple[str, ...]  # from top to bottom, and from left to right
    area: float  # share of the picture within their boxes


Reader = Callable[[np.ndarray], _Reading]


def wanted(prompt: Prompt) -> tuple[str, ...]:
    """The spans of text that a prompt asks for; none if it asks for none."""
    return tuple(span for span in prompt.target_text if span.strip()) or quoted(prompt.text)


def agreement(mode: str, spans: Sequence[str], lines: Sequence[str], tidy: Callable[[str], str]) -> tuple[float, Parts]:
    """(value before the price of its area, {"similarity", "extra"}). The spans may stand in any order."""
    read = tidy(" ".join(lines))
    spans = [tidy(span) for span in spans]
    texts = [tidy(text) for text in orders(spans, " ")]
    near = max(similarity(text, read) for text in texts)
    values = {
        "ned": near,
        "substring": sum(containment(span, read) for span in spans) / len(spans),
        "exact": float(read in texts),
    }
    return values[mode], {"similarity": near, "extra": float(max(0, len(read) - len(texts[0])))}


@dataclass(frozen=True)
class _Scorer:
    options: OCR
    reader: Reader

    def __call__(self, samples: Samples) -> tuple[list[float | Unscored], dict[str, list[float | None]]]:
        if samples.media.ndim != 4 or samples.media.shape[1] != 3:
            raise ValueError(f"it reads pictures [N, 3, H, W], not {list(samples.media.shape)}")
        rows = [self._one(picture, prompt) for picture, prompt in zip(samples.media, samples.prompts, strict=True)]
        components = {name: [parts.get(name) for _, parts in rows] for name in OCR.components}
        return [value for value, _ in rows], components

    def _one(self, picture: Tensor, prompt: Prompt) -> tuple[float | Unscored, Parts]:
        spans = [span for span in wanted(prompt) if self._tidy(span)]
        if not spans:
            return Unscored("no text is asked for: give the prompt target_text, or put the text in quotes"), {}
        try:
            reading = self.reader(np.ascontiguousarray(to_uint8(picture)[..., ::-1]))  # BGR, as OpenCV has it
        except PictureError as error:
            return Unscored(str(error)), {}
        except Exception as error:  # somebody else's code: a failure of it is no statement about the text
            return Unscored(f"the text reader failed: {type(error).__name__}: {error}"), {}
        value, parts = agreement(self.options.mode, spans, reading.lines, self._tidy)
        price = min(1.0, self.options.most_area / reading.area) if reading.area else 1.0
        return value * price, {**parts, "area": reading.area, "boxes": float(len(reading.lines))}

    def _tidy(self, text: str) -> str:
        return plain(text, self.options.keep_spaces, self.options.fold_look_alikes)


def _reader(detector_side: int) -> Reader:
    import onnxruntime  # noqa: F401  rapidocr does not ask for it, and says so only at the first picture
    from rapidocr import RapidOCR

    engine = RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.log_level": "error",  # it warns of every picture without text
            "Det.limit_side_len": detector_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    blank = np.zeros((48, 64, 3), np.uint8)
    for detect in (True, False):  # loads both networks now: a missing one is then an error of load()
        engine(blank, use_det=detect)

    def read(picture: np.ndarray) -> _Reading:
        found: Any = engine(picture, use_det=True)  # said each time: the engine keeps what the last call was given
        lines = getattr(found, "txts", None) or ()  # without any text the answer may be of another type
        return _Reading(tuple(lines), _covered(found.boxes, picture.shape[:2]) if lines else 0.0)

    return read


def _covered(boxes: np.ndarray, size: tuple[int, ...]) -> float:
    """The share of a picture (height, width) within quadrilaterals [boxes, 4, (x, y)]; what overlaps counts twice."""
    x, y = np.asarray(boxes, np.float64).transpose(2, 0, 1)  # [boxes, 4] each
    doubled = (x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(1)  # the shoelace formula
    return min(1.0, float(np.abs(doubled).sum()) / 2 / (size[0] * size[1]))
