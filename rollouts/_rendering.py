"""Pictures of an agent's programs: by a generator that nothing trains, in this process, or by an HTTP endpoint.

The members of a group are drawn from the same noise, or by the same seed, so that only their programs differ.

Without a program there is nothing to draw, and the picture is black; so it is for a program that the generator refuses,
for instance one with more references than it reads: both are the policy's own doing. An endpoint that fails is not: the
picture is then NaN, which a reward of pictures marks as not scored, and which masks the whole sample.
"""

from __future__ import annotations

import base64
import binascii
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlkit import registry
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.endpoints import Endpoints, Failure, Reply, Request
from rlkit.episodes import Program
from rlkit.errors import DataError, RecipeError
from rlkit.pictures import PictureError, data_uri, read
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.shelf import Conditions
from rlkit.types import Context, Plan, Prompt, seed_of

log = logging.getLogger(__name__)

PATH = "/v1/images/generations"


def told(prompt: Prompt, program: Program, shown: Mapping[str, Tensor]) -> Prompt:
    """What a program tells a generator: nothing of the request but its size."""
    references = tuple(shown[name] for name in dict.fromkeys(program.reference_images) if name in shown)
    return Prompt(id=prompt.id, text=program.gen_prompt, references=references, size=prompt.size)


def renderer(options: Mapping[str, Any], where: str) -> Generator | Endpoint:
    """What a recipe says of it: a `backbone`, or the `url` of an endpoint."""
    if ("url" in options) == ("backbone" in options):
        hint = "Write for instance {backbone: {name: tiny}}, or {url: http://127.0.0.1:8000, size: [1024, 1024]}."
        raise RecipeError("draws with a backbone or at a url: one of the two.", where=where, hint=hint)
    return registry.construct(Endpoint if "url" in options else Generator, options, where, what="renderer")


# ---- in this process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generator:
    """A generator of ours, as its backbone gives it."""

    backbone: Mapping[str, Any]
    steps: int = 10  # denoising steps, without exploration noise
    guidance: float = 1.0
    batch: int | None = None  # pictures in one forward pass; None: all

    def __post_init__(self) -> None:
        Local(steps=self.steps, batch=self.batch)  # for its checks
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number, 0 or more, not {self.guidance}")
        entry = self._entry()
        kind = getattr(entry, "kind", "flow")
        if kind != "flow":
            what = f"{self.backbone.get('name')!r} draws no pictures: it is a backbone of the kind {kind}."
            raise RecipeError(what, where="rollout.renderer.backbone")

    def _entry(self) -> Any:
        options = dict(self.backbone)
        return registry.build("backbones", str(options.pop("name", "")), options, "rollout.renderer.backbone")

    def start(self, precision: str, processes: Processes) -> Generating:
        with registry.importing("backbones", str(self.backbone["name"]), "rollout.renderer.backbone"):
            half = torch.bfloat16 if precision == "bf16" else torch.float32
            model = self._entry().load(processes.device, half)
        policy = Policy(model, "frozen", processes.device, precision, 0, self.guidance)
        return Generating(policy, Local(steps=self.steps, batch=self.batch), processes)


class Generating:
    """A started `Generator`. Its policy is no part of the run's: nothing trains, averages or saves it."""

    def __init__(self, policy: Policy, local: Local, processes: Processes) -> None:
        self.policy, self.processes = policy, processes
        self._drawing: Any = local.start(policy, processes)

    def draw(self, programs: Mapping[int, Prompt], prompts: PromptBatch, context: Context) -> Tensor:
        """[N, 3, H, W] of this process's share of the step. programs: what is to be drawn, by the sample's place."""
        policy, group = self.policy, prompts.group
        share = self.processes.share(len(prompts))
        untold = None if policy.guidance == 1 else ""
        policy.conditions = Conditions(policy.model_at, untold)  # programs are new at every step
        shown = "in_context" in policy.model.tasks
        told = {i: one if shown else replace(one, references=()) for i, one in programs.items()}
        drawn = {i: one for i, one in told.items() if self._takes(one)}
        of_group: dict[int, Prompt] = {}
        for i, one in drawn.items():
            of_group.setdefault(i // group, one)
        # Where there is nothing to draw, another member's picture is: from the same noise it is computed once.
        each = {}
        for i in share or range(1):
            asked = prompts.prompts[i // group]
            other = of_group.get(i // group, Prompt(id=asked.id, text=asked.text, size=asked.size))
            each[i] = drawn.get(i, other)
        moment = replace(context, sampled=None, coming=None)
        media: Tensor = self._drawing.collect(replace(prompts, each=each), Plan(shared_noise=True), moment).media
        there = torch.tensor([i in drawn for i in share], dtype=torch.bool)
        return torch.where(there.view(-1, 1, 1, 1), media, 0.0)

    def _takes(self, program: Prompt) -> bool:
        """Whether the generator reads it. A policy may write what it likes, and must not end the run with it."""
        try:
            self.policy.conditions.encode([program])
        except DataError as error:
            log.warning("a program is not drawn, and its picture is black: %s", error)
            return False
        return True

    def close(self) -> None:
        """There is nothing to end."""


# ---- elsewhere -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """A server that draws: POST /v1/images/generations, as OpenAI's; references go as data URIs in `image`."""

    url: str  # without /v1
    size: tuple[int, int]  # height and width of every picture
    model: str | None = None  # None: it is not said, and the server has one
    key_env: str | None = None  # the environment variable that holds the bearer token
    seconds: float = 120.0  # for one try
    deadline: float = 1800.0  # seconds for all pictures of a step together
    tries: int = 4  # of one picture
    at_once: int = 8

    def __post_init__(self) -> None:
        self._endpoints()
        if self.url.rstrip("/").endswith(("/v1", "/generations")):
            raise ValueError(f"write the address {self.url!r} without /v1: it is added")
        if min(self.size) < 1:
            raise ValueError(f"size is [height, width] in pixels, not {list(self.size)}")

    def _endpoints(self) -> Endpoints:
        return Endpoints((self.url,), self.key_env, self.at_once, self.tries, self.deadline, self.seconds)

    def start(self, precision: str, processes: Processes) -> Asking:
        return Asking(self, self._endpoints().open(), processes)


class Asking:
    """A started `Endpoint`."""

    def __init__(self, options: Endpoint, pool: Any, processes: Processes) -> None:
        self.options, self.processes = options, processes
        self._pool = pool

    def draw(self, programs: Mapping[int, Prompt], prompts: PromptBatch, context: Context) -> Tensor:
        """[N, 3, H, W] of this process's share of the step. programs: what is to be drawn, by the sample's place."""
        share = self.processes.share(len(prompts))
        media = torch.zeros(len(share), 3, *self.options.size)
        asked = [i for i in share if i in programs]
        answers = self._pool.map([self._request(programs[i], i // prompts.group, context) for i in asked])
        lost = []
        for i, answer in zip(asked, answers, strict=True):
            found = self._picture(answer)
            media[i - share.start] = math.nan if isinstance(found, str) else found
            lost += [found] if isinstance(found, str) else []
        if lost:
            log.warning("%d of %d programs were not drawn, and are not scored: %s", len(lost), len(asked), lost[0])
        return media

    def _request(self, program: Prompt, group: int, context: Context) -> Request:
        height, width = self.options.size
        seed = seed_of(context.seed, context.stage, context.step, "group noise", group) % (1 << 31)
        sent: dict[str, Any] = {"prompt": program.text, "n": 1, "size": f"{width}x{height}", "seed": seed}
        sent |= {"response_format": "b64_json"}
        if self.options.model is not None:
            sent["model"] = self.options.model
        if program.references:
            sent["image"] = [data_uri(one) for one in program.references]
        return Request(PATH, json=sent)

    def _picture(self, answer: Reply | Failure) -> Tensor | str:
        """[3, H, W] in 0..1, or why there is none."""
        if isinstance(answer, Failure):
            return answer.reason
        try:
            said = answer.json()["data"][0]["b64_json"]
            picture = read(base64.b64decode(said, validate=True))
        except (ValueError, KeyError, IndexError, TypeError, binascii.Error, PictureError) as error:
            return f"the reply holds no picture: {type(error).__name__}: {error}"
        if tuple(picture.shape[1:]) != self.options.size:
            height, width = self.options.size
            return f"the picture is {picture.shape[2]}x{picture.shape[1]}, and {width}x{height} was asked for"
        return picture

    def close(self) -> None:
        self._pool.close()


__all__ = ["Endpoint", "Generator", "renderer", "told"]
