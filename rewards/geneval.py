"""GenEval's claims about objects, read from a prompt's metadata and checked by a detector.

Protocol: GenEval (Ghosh et al. 2023, arXiv 2310.11513; github.com/djghosh13/geneval) and the graded form of it that
flow_grpo trains on. A prompt's metadata holds `tag`, `include` (a list of class, count, color, position: [relation,
entry]) and `exclude` (class, count), as in GenEval's own evaluation_metadata.jsonl. A detector finds the objects: sure
by more than 0.3, or 0.9 where the tag is "counting"; 16 of a class at most; nothing suppressed beyond what the model
does itself. CLIP names the colour of each cut-out, on grey where there is a mask, out of ten words. Then
`rlkit.clauses` judges.

Differences from the reference code:
* A number is exact unless `at_least` is set, as in flow_grpo; the official evaluation accepts more and then excludes.
* The graded score is the mean of exactly one number a clause, each within 0..1. flow_grpo's count can fall far below 0,
  and its wrong position still earns three quarters.
* Where two entries share a class, their counts add up and colour tells their objects apart; no GenEval prompt does so.
* The detectors are those of transformers; by default the published Mask2Former with a Swin-S, not mmdet's. Numbers are
  close to the official ones and not the same. So are the sentences that CLIP compares with.
* A claim about a class or a colour that the models were not taught leaves the sample unscored. There, it is false.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlkit.clauses import (
    KINDS,
    Claims,
    Detection,
    Detector,
    Verdict,
    Wanted,
    judge,
    keep,
    read,
    uncoloured,
    with_colours,
)
from rlkit.embedding import unscorable_pictures
from rlkit.rewards import _colours, _detectors
from rlkit.types import Unscored, Values

if TYPE_CHECKING:
    from rlkit.types import Samples

SCORES = ("strict", "graded", "mixed")


@dataclass(frozen=True)
class GenEval:
    """Whether the objects, counts, colours and places of a prompt's metadata are in the picture, as GenEval checks.

    score: 'strict' is 1 when every claim is true; 'graded' is the share of the claims that are, with partial credit for
    numbers; 'mixed' is the mean of both, so that a group without a fully true picture has a signal too. Report strict.

    Not scored: a prompt without claims, or with one that neither the detector nor CLIP was taught to see.
    """

    score: str = "mixed"  # what is rewarded: strict, graded or mixed
    detector: str = "mask2former"  # or detr, owlv2, grounding_dino, world (the embedded one), package.module:function
    path: str | None = None  # the detector's checkpoint: a folder, a repository, repository@revision; null: the usual
    colours: str | None = "openai/clip-vit-large-patch14"  # the CLIP checkpoint that names colours; null: the detector
    at_least: bool = False  # accept more objects than wanted, as the official evaluation does
    threshold: float = 0.3  # how sure the detector has to be; OWLv2 is less sure of all it sees: try 0.1
    counting_threshold: float = 0.9  # where the prompt's tag is "counting"
    most: int = 16  # objects of a class that are looked at, the surest first

    reads = ("metadata",)
    range = (0.0, 1.0)
    higher_is_better = True
    groupwise = False
    components = ("strict", "graded", "object", "count", "colour", "position", "attribution", "exclude")
    licence = "MIT (CLIP); the detector's weights have their own: Apache-2.0 for detr, owlv2 and grounding_dino"
    size = "1.7 GB for CLIP ViT-L/14 and 0.3 GB for Mask2Former Swin-S; none for the embedded world"
    protocol = "GenEval, arXiv 2310.11513, github.com/djghosh13/geneval"
    version = "1"
    extra = "geneval"  # for mask2former alone

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            near = get_close_matches(self.score, SCORES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"score={self.score!r} is none of {', '.join(SCORES)}{hint}")
        _detectors.check(self.detector)
        for name in ("threshold", "counting_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not within 0..1; no score of a detector is above 1")
        if self.most < 1:
            raise ValueError(f"most={self.most} leaves no object; choose 1 or more")

    def load(self, device: torch.device) -> _Scorer:
        detector = _detectors.load(self.detector, self.path, device)
        own = self.colours is None or self.detector == "world"
        return _Scorer(self, detector, None if own else _colours.load(str(self.colours), device))


@dataclass(frozen=True)
class _Scorer:
    """The reward with its detector; with one made by hand, too."""

    options: GenEval
    detector: Detector
    names: _colours.ColourNames | None = None

    def __call__(self, samples: Samples) -> tuple[Values, dict[str, Values]]:
        broken = unscorable_pictures(samples.media)
        verdicts: list[Verdict | Unscored] = [Unscored(broken.get(row, "not judged")) for row in range(len(samples))]
        claimed: dict[int, Claims] = {}
        for row, prompt in enumerate(samples.prompts):
            if row not in broken:
                try:
                    claimed[row] = read(prompt.metadata)
                except ValueError as error:  # this prompt makes no claims that can be checked; others may
                    verdicts[row] = Unscored(str(error))
        media = samples.media.detach()
        for row, found in self._find(media, claimed).items():
            if isinstance(found, Unscored):
                verdicts[row] = found
            else:
                verdicts[row] = judge(claimed[row], found, self.options.at_least)
        return _columns(verdicts, self.options.score)

    def _find(self, media: Tensor, claimed: Mapping[int, Claims]) -> dict[int, Detection | Unscored]:
        """What is in each picture that makes claims, row by row, with the colours that they ask for."""
        if not claimed:
            return {}
        wanted = [self._wanted(claims) for claims in claimed.values()]
        answers = self.detector(media[list(claimed)], wanted)
        if len(answers) != len(wanted):
            raise ValueError(f"the detector gave {len(answers)} answers for {len(wanted)} pictures")
        found: dict[int, Detection | Unscored] = {}
        for row, one, answer in zip(claimed, wanted, answers, strict=True):
            usable = isinstance(answer, Unscored) or bool(answer.scores.isfinite().all())
            answer = answer if usable else _detectors.BROKEN
            found[row] = answer if isinstance(answer, Unscored) else keep(answer, one, self.options.most)
        return self._coloured(media, claimed, found)

    def _wanted(self, claims: Claims) -> Wanted:
        threshold = self.options.counting_threshold if claims.counting else self.options.threshold
        return Wanted(claims.labels, threshold, claims.colours)

    def _coloured(
        self, media: Tensor, claimed: Mapping[int, Claims], found: dict[int, Detection | Unscored]
    ) -> dict[int, Detection | Unscored]:
        """The same, with the colours named that a claim is about; all pictures' cut-outs at once."""
        places: list[tuple[int, int, str]] = []  # (picture, object, class)
        cuts: list[Tensor] = []
        for row, one in found.items():
            if isinstance(one, Unscored) or one.colours is not None or not claimed[row].colours:
                continue
            if trouble := self._unknown(claimed[row].colours):
                found[row] = Unscored(trouble)
                continue
            for thing in uncoloured(claimed[row], one):
                places.append((row, thing, one.labels[thing]))
                cuts.append(_colours.cut(media[row], one, thing))
        words = self.names(cuts, [label for _, _, label in places]) if self.names else []
        named: dict[int, dict[int, str]] = {}
        for (row, thing, _), word in zip(places, words, strict=True):
            named.setdefault(row, {})[thing] = word
        for row, own in named.items():
            one = found[row]
            assert isinstance(one, Detection)
            found[row] = with_colours(one, own)
        return found

    def _unknown(self, colours: Sequence[str]) -> str:
        """Why these colours cannot be told, if so."""
        if self.names is None:
            return "the detector names no colours: give the option colours a CLIP checkpoint"
        strange = sorted(set(colours) - set(_colours.COLOURS))
        return f"the colour {strange[0]!r} is none of {', '.join(_colours.COLOURS)}" if strange else ""


def _columns(verdicts: Sequence[Verdict | Unscored], score: str) -> tuple[Values, dict[str, Values]]:
    def column(number: Any) -> Tensor:
        return torch.tensor([math.nan if isinstance(one, Unscored) else number(one) for one in verdicts])

    parts = {"strict": column(lambda one: one.strict), "graded": column(lambda one: one.graded)}
    for kind in KINDS:
        parts[kind] = column(lambda one, kind=kind: one.mean(kind))
    numbers = {**parts, "mixed": (parts["strict"] + parts["graded"]) / 2}[score].tolist()
    values = [one if isinstance(one, Unscored) else number for one, number in zip(verdicts, numbers, strict=True)]
    return values, dict(parts)
