"""Does the picture show what a text of the tiny world asks for? Rules read it back; no model is involved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rlkit.embedding import unscorable_pictures
from rlkit.world.obeys import Asked, check_asked, edit_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlkit.types import Prompt, Samples
    from rlkit.world.checker import Verdict

SCORES = ("strict", "graded", "mixed", "gated")
OF_EDITS = ("execution", "consistency")
EDIT_ALONE = 0.6  # what an edit is worth that was made, in a picture of which nothing else is as it was


@dataclass(frozen=True)
class Composition:
    """Whether a picture of the embedded world is what was asked for: strict, graded, or the mean of both.

    Asked for is a caption; with a source picture an edit of it, which leaves the rest where it was; with references a
    scene that holds what they show. What pictures show is read from their pixels.

    score: 'strict' is 1 when every claim is true and nothing else is in the picture; 'graded' gives partial credit
    below .5; 'mixed' is their mean, so that a group without a fully true picture still has a signal. Report strict:
    partial credit alone can look healthy in a picture that breaks a claim. 'gated' is for edits: execution x (0.6 +
    0.4 consistency), as `vlm_judge` has it in the mode two_stage. `graded` pays as much for leaving all else as it was
    as for the edit; here that alone is worth .25 at most, and nothing where an object was to come or to go.

    by: 'prompt' judges by what was asked for; 'caption' by the metadata `caption` of a prompt, which the world's task
    caption gives: what the source was drawn from, so that a picture which repeats the source is true.

    Returns (values [N], {"strict": [N], "graded": [N]}), and with 'gated' "execution" and "consistency" too; NaN, that
    is not scored, where a prompt asks for nothing of this world, or the picture's pixels are not all finite.
    """

    score: str = "mixed"
    by: Literal["prompt", "caption"] = "prompt"

    reads = ("prompt",)  # an instance's own: with 'gated' the source too
    optional = ("source", "references")  # so is this
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("strict", "graded")  # and this: with 'gated' four
    groupwise = False
    licence = "Apache-2.0"
    size = "none"
    protocol = "this repository, rlkit/world/checker.py"
    version = "2"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            near = get_close_matches(self.score, SCORES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"score={self.score!r} is none of {', '.join(SCORES)}{hint}")
        gated = self.score == "gated"
        if gated and self.by == "caption":
            raise ValueError("score='gated' judges edits, and by='caption' none: choose another score, or by='prompt'")
        object.__setattr__(self, "reads", ("prompt", "source") if gated else ("prompt",))
        object.__setattr__(self, "optional", () if gated else ("source", "references"))
        object.__setattr__(self, "components", Composition.components + (OF_EDITS if gated else ()))

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        asked = [_asked(prompt) if self.by == "prompt" else _shown(prompt) for prompt in samples.prompts]
        images = samples.media.detach().to("cpu", torch.float32).numpy()
        verdicts = check_asked(images, asked)
        for row in unscorable_pictures(samples.media):
            verdicts[row] = None
        strict = torch.tensor([math.nan if one is None else one.strict for one in verdicts])
        graded = torch.tensor([math.nan if one is None else one.graded for one in verdicts])
        parts = {"strict": strict, "graded": graded}
        if self.score == "gated":
            execution, consistency = _of_edits(verdicts)
            parts |= {"execution": execution, "consistency": consistency}
            return execution * (EDIT_ALONE + (1 - EDIT_ALONE) * consistency), parts
        return {**parts, "mixed": (strict + graded) / 2}[self.score], parts


def _of_edits(verdicts: Sequence[Verdict | None]) -> tuple[Tensor, Tensor]:
    """Execution and consistency, [N] both; NaN where no edit was asked for."""
    parts = [edit_parts(one.clauses) if one and "edit" in one.clauses else (math.nan, math.nan) for one in verdicts]
    execution, consistency = torch.tensor(parts, dtype=torch.float32).reshape(-1, 2).unbind(1)
    return execution, consistency


def _shown(prompt: Prompt) -> Asked:
    """What a prompt's source shows. Nothing is asked for where nothing is known of that."""
    return Asked(str(prompt.metadata.get("caption", "")), None, ())


def _asked(prompt: Prompt) -> Asked:
    source = None if prompt.source is None else prompt.source.detach().to("cpu", torch.float32).numpy()
    references = (one.detach().to("cpu", torch.float32).numpy() for one in prompt.references)
    return Asked(prompt.text, source, tuple(references))
