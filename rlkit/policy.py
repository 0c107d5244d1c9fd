"""A flow policy: the network that draws, with its sets of weights and the conditions that it is given.

What sets are, and what of the network is trained, is in `weights`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit.errors import RecipeError
from rlkit.resources import Resources, model_of_size, without_encoders
from rlkit.shelf import Conditions, Shelf
from rlkit.types import Condition, FlowModel, Prompt
from rlkit.weights import ADAPTER, Lora, Sets, Weights


class WeightSet:
    """One set of a flow policy's weights, as a callable."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy = policy
        self._name = name

    def told(self, cond: Sequence[str], like: Tensor) -> Condition:
        """What these B keys stand for, for calls with latents like these [B, C, H, W]. A loss that calls several times
        has it read once, and its gradient is collected."""
        policy = self._policy
        keys = cond if policy.guidance == 1 else [*cond, *policy.conditions.untold(cond)]
        return policy.conditions.batch(keys, policy.model_for(like), self._name)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[str] | Condition) -> Tensor:
        """v [B, C, H, W] in fp32 for x [B, C, H, W], sigma [B] in 0..1 and B condition keys, or what is `told` by them.

        Only `current` carries gradient.
        """
        policy = self._policy
        x, sigma = x.to(policy.device), sigma.to(policy.device)
        told = cond if isinstance(cond, Mapping) else self.told(cond, x)
        if policy.guidance == 1:
            return self._call(x, sigma, told)
        both = self._call(torch.cat([x, x]), torch.cat([sigma, sigma]), told)
        one, other = both.chunk(2)
        return policy.model_for(x).guide(one, other, policy.guidance)

    def _call(self, x: Tensor, sigma: Tensor, batch: Condition) -> Tensor:
        policy = self._policy
        model = policy.model_for(x)
        policy.calls += len(x)
        with policy.autocast():
            if self._name == "current":
                return model.velocity(policy.net, x, sigma, batch).float()
            with torch.no_grad():
                return model.velocity(policy.stand_in(self._name), x, sigma, batch).float()


Score = Callable[[Tensor, Sequence[Prompt]], Tensor]
"""(media [B, ...], their prompts) -> the recipe's weighted rewards [B], with gradient."""


class Models(Sets[WeightSet]):
    """A flow policy's sets, and what a differentiable reward needs besides."""

    def __init__(self, policy: Policy, score: Score | None = None) -> None:
        super().__init__(policy, WeightSet)
        self._policy = policy
        self._score = score

    @property
    def old_is_current(self) -> bool:
        """Whether `old` would answer exactly what `current` answers, so that one of the two calls can be saved."""
        return self._policy.is_current("old")

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1, not rounded, so that the gradient flows through."""
        return self._policy.model_for(latents).decode(latents)

    def score(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B] the recipe's weighted rewards of these pictures, with gradient."""
        if self._score is None:
            raise RuntimeError("these models have no rewards: they were not made for a stage")
        return self._score(media, prompts)


class Policy(Weights):
    """One flow network with its sets. `train` is None (all weights) or a `Lora`.

    `guidance` other than 1 is classifier-free guidance against `negative`, in the form that the backbone has for it. It
    is the policy's own: sampling, training and every set have it alike, so the ratio cannot be off by it, and the
    gradient flows through both halves.
    """

    def __init__(
        self,
        model: FlowModel,
        train: Lora | Literal["frozen"] | None,
        device: torch.device,
        precision: str,
        seed: int,
        guidance: float = 1.0,
        negative: str = "",
        checkpointing: bool = False,
        shelf: Shelf | None = None,
        resources: Resources | None = None,
    ) -> None:
        super().__init__(model.net, model.lora_targets, train, device, precision, seed, checkpointing, resources)
        self.model = model
        self.guidance = guidance
        self.origin: tuple[str, Mapping[str, Any]] | None = None  # the backbone's name and options
        self._sizes: dict[tuple[int, int], FlowModel] = {}
        untold = None if guidance == 1 else negative
        limit = self.resources.conditions_in_memory
        if limit is not None and shelf is None:
            hint = "Set policy.conditions to a folder, from which the others come back."
            raise RecipeError("needs a shelf.", where="policy.conditions_in_memory", hint=hint)
        self.conditions = Conditions(self.model_at, untold, shelf, self._encoders_near, limit)
        if self.resources.encoders == "offload":
            self._move_encoders(torch.device("cpu"))
        self.models = Models(self)

    def write(self, folder: Path) -> str:
        """Write the current weights as diffusers loads them, or the adapter alone; returns the line that does it."""
        if self.lora is None:
            self.net.save_pretrained(folder)  # type: ignore[operator]
            return f'{type(self.net).__name__}.from_pretrained("{folder}")'
        self.net.save_lora_adapter(folder, adapter_name=ADAPTER)  # type: ignore[operator]
        # diffusers looks for a pickle unless it is told otherwise.
        return f'transformer.load_lora_adapter("{folder}", prefix=None, use_safetensors=True)'

    def models_with(self, score: Score) -> Models:
        """The sets, with the rewards of a stage."""
        return Models(self, score)

    def model_at(self, size: tuple[int, int] | None) -> FlowModel:
        """The model for pictures of this (height, width); None: of the backbone's own. RecipeError if it draws none."""
        if size is None:
            return self.model
        if size not in self._sizes:
            self._sizes[size] = model_of_size(self.model, size)
        return self._sizes[size]

    def model_for(self, latents: Tensor) -> FlowModel:
        """The model whose latents [B, C, H, W] these are."""
        shape = tuple(latents.shape[1:])
        return next((one for one in self._sizes.values() if one.latent_shape == shape), self.model)

    @contextmanager
    def _encoders_near(self) -> Iterator[None]:
        """The encoders are on the device, once for all that is encoded meanwhile."""
        if self.resources.encoders != "offload":
            yield
            return
        self._move_encoders(self.device)
        try:
            yield
        finally:
            self._move_encoders(torch.device("cpu"))

    def _move_encoders(self, device: torch.device) -> None:
        for encoder in self.model.encoders:
            encoder.to(device)

    def free_encoders(self, prompts: Iterable[Prompt], texts: Sequence[str]) -> None:
        """Encode these prompts, which is all that will ever be asked for, and let the encoders go with their memory.

        texts: those whose unread words somebody may still ask for.
        """
        for prompt in prompts:  # one by one: a picture that it holds is then let go too
            self.model_at(prompt.size)
            self.conditions.encode([prompt])
        unread = {text: self.model.unread(text) for text in texts}
        self.model = without_encoders(self.model, unread)
        self._sizes = {size: without_encoders(one, unread) for size, one in self._sizes.items()}
        gc.collect()  # a model's closures know one another
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
