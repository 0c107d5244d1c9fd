"""Caption, then picture: the rollout of a policy of three parts (UAE's reconstruction loop, arXiv 2509.09666).

Each prompt shows a picture. The captioner writes what it shows, the connector reads the states that it wrote with, the
generator draws from those. Whose decisions the samples record depends on the algorithm's kind:

tokens   every member of a group is a caption of its own, with one picture; all pictures of a group grow from the same
         noise, so that only the captions differ. The prompts are the captioner's.
flow     one caption a prompt, which all members of a group draw, by the plan of the algorithm. The prompts are the
         captions, under which the generator is told what they say.

Both give captions and pictures to the rewards. With a connector that reads the picture itself nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlkit import registry
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.parts import Parts
from rlkit.rollouts.local import Local
from rlkit.types import Context, Plan, Prompt, Samples


@dataclass(frozen=True)
class Relay:
    """Captions by one part of the policy, and pictures of them by another, in this process or with vLLM's captions."""

    kinds = ("flow", "tokens")
    gives = ("path", "log_prob")
    makes = ("text", "image")
    reads = ("source",)
    parts = True  # for a policy of three parts alone

    steps: int = 10  # denoising steps
    batch: int | None = None  # pictures in one forward pass; None: all
    pictures: int = 1  # of each caption where captions are trained; what they score is averaged
    # Who writes: a rollout of words with its options.
    writer: Mapping[str, Any] = field(default_factory=lambda: {"name": "local"})

    def __post_init__(self) -> None:
        Local(steps=self.steps, batch=self.batch)  # for its checks
        if self.pictures < 1:
            raise ValueError(f"pictures must be 1 or more, not {self.pictures}")
        kinds = getattr(self.captions(), "kinds", (getattr(self.captions(), "kind", ""),))
        if "tokens" not in kinds or isinstance(self.captions(), Relay):
            what = f"{self.writer.get('name')!r} writes no captions: it is a rollout of {' and '.join(kinds)}"
            raise RecipeError(what, where="rollout.writer", hint="Use local or vllm.")

    def captions(self) -> Any:
        """The rollout that writes."""
        options = dict(self.writer)
        name = options.pop("name", "local")
        return registry.build("rollouts", name, options, "rollout.writer")

    def missing(self) -> str:
        look = getattr(self.captions(), "missing", None)
        return look() if look is not None else ""

    def start(self, policy: Parts, processes: Processes) -> RelayRollout:
        return RelayRollout(self, policy, processes)


class RelayRollout:
    """A started `Relay`."""

    def __init__(self, options: Relay, policy: Parts, processes: Processes) -> None:
        self.options, self.policy, self.processes = options, policy, processes
        self._drawing = Local(steps=options.steps, batch=options.batch).start(policy.drawer, processes)
        writer = options.captions()
        self._writing = writer.start(policy.writer, processes)
        # One caption for all members of a group, which several processes may hold: each then writes all captions.
        self._alone = self._writing
        if processes.count > 1 and policy.kind == "flow":
            if not isinstance(writer, Local):
                what = (
                    "several learner processes would all ask the same servers for the captions of a generator's stage."
                )
                raise RecipeError(what, where="rollout.writer", hint="Use {name: local} there.")
            self._alone = writer.start(policy.writer, Processes())

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        for one in (self._drawing, self._writing, self._alone):
            one.load(weights, version)

    def health(self) -> str:
        return f"captions: {self._writing.health()}, pictures: {self._drawing.health()}"

    def close(self) -> None:
        for one in (self._writing, self._alone):
            close = getattr(one, "close", None)  # the rollout of this process has nothing to close
            if close is not None:
                close()

    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the step's samples."""
        self.policy.conditions.renew()
        context = replace(context, sampled=None)  # half of a sample is nothing to score
        if self.policy.kind == "tokens":
            return self._captions(prompts, plan, context)
        return self._pictures(prompts, plan, replace(context, coming=None))

    def _captions(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """Samples of the captioner, each with a picture, or with several as its `shots`."""
        said = self._writing.collect(prompts, self._of("writer", plan), context)
        each = {index: _told(prompt, text, ids) for index, prompt, text, ids in _written(said)}
        shown = Plan(steps=plan.steps, shared_noise=True, policy_set=self._of("drawer", plan).policy_set)
        drawn = [
            self._drawing.collect(replace(prompts, each=each), shown, _round(context, number))
            for number in range(self.options.pictures)
        ]
        samples = replace(said, media=drawn[0].media, latents=drawn[0].latents, sigmas=drawn[0].sigmas)
        if len(drawn) == 1:
            return samples
        rows = torch.arange(len(said)).repeat_interleave(len(drawn))  # [N * k]
        media, latents = (
            torch.stack(columns, dim=1).flatten(0, 1) for columns in zip(*map(_pixels, drawn), strict=True)
        )
        return replace(samples, shots=replace(said.select(rows), media=media, latents=latents))

    def _pictures(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """Samples of the generator, each of a caption."""
        if self.policy.connector.connection.reads == "picture":
            told = tuple(replace(prompt, asked=prompt) for prompt in prompts.prompts)
            return self._drawing.collect(replace(prompts, prompts=told), self._of("drawer", plan), context)
        writing = self._writing if prompts.group == 1 else self._alone
        said = writing.collect(
            PromptBatch(prompts.prompts, 1), self._of("writer", Plan(policy_set=plan.policy_set)), context
        )
        written = {index: _told(prompt, text, ids) for index, prompt, text, ids in _written(said)}
        told = tuple(written.get(place, prompt) for place, prompt in enumerate(prompts.prompts))
        drawn: Samples = self._drawing.collect(replace(prompts, prompts=told), self._of("drawer", plan), context)
        return replace(drawn, texts=tuple(prompt.text for prompt in drawn.prompts))

    def _of(self, part: str, plan: Plan) -> Plan:
        """The plan with the set that it names where this part has it; a part that the stage leaves alone has none."""
        sets = (self.policy.writer if part == "writer" else self.policy.drawer).sets
        return plan if plan.policy_set in sets else replace(plan, policy_set="current")


def _round(context: Context, number: int) -> Context:
    """The same step with other noise; the first picture's is that of any other rollout."""
    return replace(context, stage=f"{context.stage} picture {number}") if number else context


def _pixels(samples: Samples) -> tuple[Tensor, Tensor]:
    return samples.media, samples.latents


def _told(prompt: Prompt, text: str, ids: tuple[int, ...]) -> Prompt:
    """What a captioner answered to a prompt, as the generator's."""
    return replace(prompt, text=text, asked=prompt, answer=ids)


def _written(said: Samples) -> Iterator[tuple[int, Prompt, str, tuple[int, ...]]]:
    """Of each answer: its place in the step, its prompt, its text, and its token ids, the end included."""
    tokens = said.tokens
    assert tokens is not None
    rows = zip(tokens.ids, tokens.prompt.tolist(), tokens.length.tolist(), strict=True)
    ids = [tuple(row[start:end].tolist()) for row, start, end in rows]
    return zip(said.index.tolist(), said.prompts, said.texts, ids, strict=True)
