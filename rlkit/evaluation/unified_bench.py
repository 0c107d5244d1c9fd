"""`rlkit unified-bench`: Unified-Bench, does a policy that puts pictures into words draw the same pictures from them?

Protocol: UAE (Unified-GRPO), the paper's section 3 and tables 1 and 5: caption -> generate -> compare. Each picture of
a folder is captioned with the paper's instruction, the caption is drawn by the same model, and the two pictures are
compared by CLIP, LongCLIP, DINOv2 and DINOv3: of each the mean cosine over the pictures, times 100, and overall the
plain mean of the encoders' numbers.

Differences from the paper:
* Its 100 pictures are not published: the folder is yours, and numbers of two folders do not compare.
* It names no checkpoints: the encoders are those of the reward `reconstruction`, with the recipe's paths where the
  recipe names that reward.
* Its instruction is the prompt. A captioner reads that as its recipe says: `qwen_vl` as it stands with `instruction:
  "{prompt}"`, else in the recipe's own words, which are those that it was trained with.
* Standard errors over pictures are ours, and so is what happens to a picture that cannot be read or scored: it is left
  out of every mean, counted and named.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit import recipe, registry
from rlkit.errors import DataError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from rlkit.embedding import Pictures
    from rlkit.stages import Setup

REWARD = "reconstruction"  # whose encoders these are
# Quoted from section 3 of the paper.
INSTRUCTION = (
    "You are a helpful assistant. Your task is to provide an accurate description based on the content of the image, "
    "helping the generation model to create an image based on your description. Ensure that your description is clear "
    "and comprehensive, so that the generation model can produce an image that closely matches the content of the "
    "image based on your input."
)
Reconstruct = Callable[["Sequence[Tensor]"], "tuple[Tensor, list[str]]"]


# --------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Row:
    """One picture: its caption, and in each encoder its cosine with what was drawn from that, times 100."""

    name: str
    caption: str
    scores: Mapping[str, float]

    @property
    def overall(self) -> float:
        return statistics.fmean(self.scores.values())


@dataclass(frozen=True)
class Mean:
    """Over pictures. The standard error of one picture is not known."""

    mean: float
    error: float | None


@dataclass(frozen=True)
class Report:
    """The pictures that were scored, and why the others were not."""

    rows: tuple[Row, ...]
    broken: Mapping[str, str]  # a picture's name -> the reason
    encoders: tuple[str, ...]

    @property
    def means(self) -> dict[str, Mean]:
        """Of each encoder."""
        return {name: _mean([row.scores[name] for row in self.rows]) for name in self.encoders}

    @property
    def overall(self) -> Mean:
        """The plain mean of the encoders' means. Its error knows that a picture easy for one is easy for the others."""
        return _mean([row.overall for row in self.rows])

    def as_json(self) -> dict[str, Any]:
        return {
            "count": len(self.rows),
            "overall": asdict(self.overall),
            "encoders": {name: asdict(one) for name, one in self.means.items()},
            "broken": dict(self.broken),
            "prompt": INSTRUCTION,
            "images": [
                {"name": row.name, "caption": row.caption, "scores": dict(row.scores), "overall": row.overall}
                for row in self.rows
            ],
        }

    def table(self) -> str:
        """Lines for a terminal."""
        lines = [f"{name:<12} {_in_words(one)}" for name, one in (self.means | {"overall": self.overall}).items()]
        lines.append(f"{'pictures':<12} {len(self.rows)}")
        if self.broken:
            lines.append(f"{'left out':<12} {len(self.broken)}")
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.broken.items())])


def _mean(values: Sequence[float]) -> Mean:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(statistics.fmean(values), error)


def _in_words(one: Mean) -> str:
    return f"{one.mean:6.2f}" + ("" if one.error is None else f" ± {one.error:.2f}")


# ------------------------------------------------------------------------------------------------ the benchmark


def unified_bench(
    images: Sequence[Tensor],
    reconstruct: Reconstruct,
    encoders: Mapping[str, Pictures],
    names: Sequence[str] | None = None,
) -> Report:
    """Caption, generate, compare. images: each [3, H, W] in 0..1 of any size; names: theirs, else their numbers.

    reconstruct: pictures -> (media [N, 3, h, w] in 0..1, their captions), in the same order. DataError if nothing can
    be scored.
    """
    import torch

    names = [str(i) for i in range(len(images))] if names is None else names
    if not images or not encoders:
        raise DataError(f"nothing to compare: {len(images)} pictures and {len(encoders)} encoders")
    if len(names) != len(images) or len(set(names)) < len(names):
        raise ValueError(f"{len(images)} pictures need as many different names, not {list(names)}")
    with torch.no_grad():
        media, captions = reconstruct(images)
        if len(media) != len(images) or len(captions) != len(images):
            what = f"{len(images)} pictures came back as {len(captions)} captions and {len(media)} pictures"
            raise ValueError(f"{what}; reconstruct gives one of each, in the same order")
        reasons = _unscorable(images, media)
        kept = [i for i in range(len(images)) if i not in reasons]
        if not kept:
            raise DataError(
                "no picture can be scored", hint="; ".join(f"{names[i]}: {why}" for i, why in reasons.items())
            )
        cosines = {name: _cosines([images[i] for i in kept], media[kept], one) for name, one in encoders.items()}
    rows = [
        Row(names[i], captions[i], {name: 100 * values[at] for name, values in cosines.items()})
        for at, i in enumerate(kept)
    ]
    return Report(tuple(rows), {names[i]: why for i, why in reasons.items()}, tuple(encoders))


def _unscorable(images: Sequence[Tensor], media: Tensor) -> dict[int, str]:
    """Row -> why, for pictures that an encoder cannot read, or whose reconstruction it cannot."""
    from rlkit.embedding import unscorable_pictures

    reasons = {row: f"reconstruction: {why}" for row, why in unscorable_pictures(media).items()}
    for row, image in enumerate(images):
        reasons |= dict.fromkeys([row] if unscorable_pictures(image[None]) else [], "its pixels are not finite")
    return reasons


def _cosines(images: Sequence[Tensor], media: Tensor, encoder: Pictures) -> list[float]:
    import torch

    wanted = torch.cat([encoder(image[None]) for image in images])  # one by one: sizes differ
    cosines: list[float] = (encoder(media) * wanted).sum(-1).tolist()
    return cosines


def read_images(folder: Path) -> tuple[list[Tensor], list[str], dict[str, str]]:
    """(pictures [3, H, W] in 0..1, their names, those that cannot be read with the reason). DataError without any."""
    from rlkit.data.picture_folders import read_folder

    images, names, broken = [], [], {}
    for row in read_folder(folder, "source", INSTRUCTION, {}):
        assert row.source is not None  # it was asked for
        name = row.source.name()
        try:
            source = row.read().source
        except DataError as error:
            broken[name] = str(error)
            continue
        assert source is not None
        images.append(source)
        names.append(name)
    if not images:
        reasons = "; ".join(broken.values())
        raise DataError(f"none of the {len(broken)} pictures can be read: {reasons}", where=str(folder))
    return images, names, broken


# -------------------------------------------------------------------------------------------------- the command


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="RECIPE key=value", help="a recipe's name or file, and changes")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run whose newest weights are measured")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="of pictures, of any sizes")
    parser.add_argument(
        "--encoders", default="clip,longclip,dinov2,dinov3", metavar="NAMES", help="(default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="every picture's numbers and caption too")


def run(options: argparse.Namespace) -> int:
    name, *overrides = options.words
    setup = recipe.read(name, overrides)
    reward = encoders_of(setup, options.encoders)
    images, names, broken = read_images(options.images)

    from rlkit import dist, session

    device = dist.start(1, setup.options.device).device
    encoders = reward.load(device).encoders  # before the policy: what they lack should not be found out after it
    report = unified_bench(images, session.reconstruct(setup, options.run, INSTRUCTION), encoders, names)
    report = Report(report.rows, {**broken, **report.broken}, report.encoders)
    print(json.dumps(report.as_json(), indent=2) if options.json else report.table())
    return 0


def encoders_of(setup: Setup, names: str) -> Any:
    """The reward `reconstruction` with these encoders, a comma between them: the recipe's own paths, where it names it.
    RecipeError for an encoder that it does not know."""
    rewards = [one for stage in setup.stages for one in stage.rewards if (one.entry or one.name) == REWARD]
    options = asdict(rewards[-1].reward) if rewards else {}  # type: ignore[call-overload]
    chosen = [one.strip() for one in names.split(",") if one.strip()]
    if not chosen:
        raise RecipeError(f"no encoder in {names!r}.", where="--encoders", hint="For instance clip,dinov2")
    return registry.build("rewards", REWARD, options | {"encoders": chosen}, where="--encoders")
