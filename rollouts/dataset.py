"""Pairs of pictures that somebody chose between, in the place of samples: what offline preference training eats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlkit import registry
from rlkit.data.prompts import Picture, PromptBatch
from rlkit.dist import Processes
from rlkit.errors import DataError, RecipeError
from rlkit.policy import Policy
from rlkit.types import Context, Plan, Prompt, Samples


@dataclass(frozen=True)
class Dataset:
    """Samples nothing: hands out the pairs of a data set as groups of two, the chosen picture first.

    Prompts without pictures are those of an evaluation, which has to show what the policy draws: they are sampled by
    the rollout `local`, with these `steps`.
    """

    kind = "flow"
    gives = ("preference",)
    reads = ("pair",)  # of the data

    steps: int = 10  # denoising steps of an evaluation
    batch: int | None = None  # pictures in one pass of the encoder or the network; None: all

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be 1 or more, not {self.steps}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch must be 1 or more, not {self.batch}")

    def start(self, policy: Policy, processes: Processes) -> DatasetRollout:
        return DatasetRollout(self, policy, processes)


class DatasetRollout:
    """A started `Dataset`."""

    def __init__(self, options: Dataset, policy: Policy, processes: Processes) -> None:
        if policy.model.encode_media is None:
            what = f"the policy's backbone ({type(policy.net).__name__}) cannot encode pictures."
            raise RecipeError(what, where="policy.backbone", hint="Choose one with `encode_media`, or sample online.")
        self.options, self.policy, self.processes = options, policy, processes
        self.encode = policy.model.encode_media
        self.version = 0
        sampling = {"steps": options.steps, "batch": options.batch}
        self.sampler: Any = registry.build("rollouts", "local", sampling).start(policy, processes)
        with torch.no_grad():
            blank = torch.zeros(1, *policy.model.latent_shape, device=policy.device)
            self.shape = tuple(policy.model.decode(blank).shape[1:])  # (3, H, W) of what the policy draws

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.version = version
        self.sampler.load(weights, version)

    def health(self) -> str:
        return str(self.sampler.health())

    @torch.no_grad()
    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the pairs; of prompts without pictures, what the policy draws."""
        if not any(isinstance(prompt.metadata.get("chosen"), Picture) for prompt in prompts.prompts):
            samples: Samples = self.sampler.collect(prompts, plan, context)
            return samples
        share = self.processes.share(len(prompts))
        index = torch.arange(share.start, share.stop)
        mine = tuple(prompts.prompts[i // 2] for i in share)
        self.policy.conditions.encode(mine)
        chosen = index % 2 == 0
        pictures = [self._picture(prompt, first) for prompt, first in zip(mine, chosen.tolist(), strict=True)]
        media = torch.stack(pictures) if pictures else torch.zeros(0, *self.shape)
        return Samples(
            media=media,
            latents=self._latents(media),
            prompts=mine,
            group=index // 2,
            index=index,
            sample_id=context.step * len(prompts) + index,
            version=self.version,
            total=len(prompts),
            preference=chosen,
        )

    def _picture(self, prompt: Prompt, chosen: bool) -> Tensor:
        """[3, H, W] in 0..1. Resizing is not ours to do: it would be another picture than the one that was judged."""
        picture: Picture = prompt.metadata["chosen" if chosen else "rejected"]
        pixels = torch.from_numpy(picture.read()).permute(2, 0, 1)
        if tuple(pixels.shape) != self.shape:
            sizes = [f"{shape[2]}x{shape[1]}" for shape in (pixels.shape, self.shape)]
            what = f"the {picture.key} picture is {sizes[0]}, but the policy draws {sizes[1]}"
            raise DataError(what, where=picture.where, hint=f"Give the pictures the size {sizes[1]}.")
        return pixels.float() / 255

    def _latents(self, media: Tensor) -> Tensor:
        """[N, C, H, W] fp32, on the CPU."""
        if not len(media):
            return torch.zeros(0, *self.policy.model.latent_shape)
        parts = [self.encode(part.to(self.policy.device)) for part in media.split(self.options.batch or len(media))]
        return torch.cat(parts).float().cpu()
