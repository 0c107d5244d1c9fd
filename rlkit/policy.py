"""A policy: the network that is trained, and the named sets of weights that an algorithm compares it with.

A set is a dictionary of the trainable tensors and nothing else: `current` is the network's own, `reference`, `old` and
`ema` are copies that stand in for them during a call (`torch.func.functional_call`). LoRA and full fine-tuning are then
one mechanism: LoRA starts as the identity, so a copy taken at the start is the base model exactly.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlkit.errors import CheckpointError, RecipeError
from rlkit.resources import Resources, choose_attention, compile_network, model_of_size, without_encoders
from rlkit.shelf import Conditions, Shelf
from rlkit.types import FlowModel, Prompt, seed_of

Tensors = dict[str, Tensor]
ADAPTER = "rlkit"


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv 2106.09685): `alpha / rank` scales them; `targets` default to the backbone's."""

    rank: int = 16
    alpha: int | None = None  # default: 2 * rank, as in the Flow-GRPO recipes
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by."""
        return (self.alpha or 2 * self.rank) / self.rank


class WeightSet:
    """One set of a flow policy's weights, as a callable."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy = policy
        self._name = name

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[str]) -> Tensor:
        """v [B, C, H, W] in fp32 for x [B, C, H, W], sigma [B] in 0..1 and B condition keys.

        Only `current` carries gradient.
        """
        policy = self._policy
        x, sigma = x.to(policy.device), sigma.to(policy.device)
        if policy.guidance == 1:
            return self._call(x, sigma, cond)
        both = self._call(torch.cat([x, x]), torch.cat([sigma, sigma]), [*cond, *policy.conditions.untold(cond)])
        told, untold = both.chunk(2)
        return policy.model_for(x).guide(told, untold, policy.guidance)

    def _call(self, x: Tensor, sigma: Tensor, cond: Sequence[str]) -> Tensor:
        policy = self._policy
        model = policy.model_for(x)
        batch = policy.conditions.batch(cond, model)
        policy.calls += len(x)
        with policy.autocast():
            if self._name == "current":
                return model.velocity(policy.net, x, sigma, batch).float()
            with torch.no_grad():
                return model.velocity(policy.stand_in(self._name), x, sigma, batch).float()


Score = Callable[[Tensor, Sequence[Prompt]], Tensor]
"""(media [B, ...], their prompts) -> the recipe's weighted rewards [B], with gradient."""


class Models:
    """The policy's sets, by name. Asking for one that the stage did not make is an error, not a silent `current`."""

    def __init__(self, policy: Policy, score: Score | None = None) -> None:
        self._policy = policy
        self._score = score

    def __getitem__(self, name: str) -> WeightSet:
        if name != "current" and name not in self._policy.sets:
            known = ", ".join(["current", *self._policy.sets])
            raise KeyError(f"the policy has no set {name!r} in this stage; it has: {known}")
        return WeightSet(self._policy, name)

    @property
    def current(self) -> WeightSet:
        return self["current"]

    @property
    def old(self) -> WeightSet:
        return self["old"]

    @property
    def reference(self) -> WeightSet:
        return self["reference"]

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


class Policy:
    """One flow network with its sets. `train` is None (all weights) or a `Lora`.

    `guidance` other than 1 is classifier-free guidance against `negative`, in the form that the backbone has for it. It
    is the policy's own: sampling, training and every set have it alike, so the ratio cannot be off by it, and the
    gradient flows through both halves.
    """

    def __init__(
        self,
        model: FlowModel,
        train: Lora | None,
        device: torch.device,
        precision: str,
        seed: int,
        guidance: float = 1.0,
        negative: str = "",
        checkpointing: bool = False,
        shelf: Shelf | None = None,
        resources: Resources | None = None,
    ) -> None:
        self.model = model
        self.resources = resources = resources or Resources()
        self._sizes: dict[tuple[int, int], FlowModel] = {}
        self.net: nn.Module = model.net
        self.device = device
        self.precision = precision
        self.lora = train
        self.guidance = guidance
        self.calls = 0  # rows that went through the network since they were last taken; guidance doubles them
        untold = None if guidance == 1 else negative
        limit = resources.conditions_in_memory
        if limit is not None and shelf is None:
            hint = "Set policy.conditions to a folder, from which the others come back."
            raise RecipeError("needs a shelf.", where="policy.conditions_in_memory", hint=hint)
        self.conditions = Conditions(self.model_at, untold, shelf, self._encoders_near, limit)
        if resources.encoders == "offload":
            self._move_encoders(torch.device("cpu"))
        self.net.eval()  # dropout would make the ratio differ from 1 before any update
        if checkpointing:
            if not getattr(self.net, "_supports_gradient_checkpointing", False):
                what = f"{type(self.net).__name__} cannot compute its activations again."
                raise RecipeError(what, where="policy.checkpointing", hint="Leave it out.")
            self.net.enable_gradient_checkpointing()  # type: ignore[operator]
        if resources.attention is not None:
            choose_attention(self.net, resources.attention)
        if train is None:
            self.net.requires_grad_(True)
        else:
            self._add_lora(train, seed)
        self.trainable: Tensors = {}
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # the optimiser's master copy; autocast lowers it per call
                self.trainable[name] = parameter
        self.sets: dict[str, Tensors] = {}
        self._updates = 0
        self.copies: dict[str, int] = {}  # sets that equalled the current weights to the bit, and when: see `_moment`
        self.base: Tensors | None = None
        self.models = Models(self)
        if resources.compile:
            compile_network(self.net, "inductor" if resources.compile is True else resources.compile)

    def _add_lora(self, lora: Lora, seed: int) -> None:
        from peft import LoraConfig

        self.net.requires_grad_(False)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=round(lora.scale * lora.rank),
            init_lora_weights="gaussian",
            target_modules=list(lora.targets or self.model.lora_targets),
        )
        with torch.random.fork_rng():  # peft draws A from the global generator
            torch.manual_seed(seed_of(seed, "lora"))
            self.net.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]

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

    def take_calls(self) -> int:
        """Rows through the network since this was last asked: what an algorithm costs on any machine."""
        calls, self.calls = self.calls, 0
        return calls

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def stand_in(self, name: str) -> Any:
        """The network with a set's tensors in place of its own, for the length of a call."""
        tensors = self.sets[name]
        if self.resources.sets == "cpu":
            tensors = {key: value.to(self.device, non_blocking=True) for key, value in tensors.items()}
        return lambda *args, **kwargs: functional_call(self.net, tensors, args, kwargs)

    def snapshot(self) -> Tensors:
        """A copy of the trainable tensors. `clone`, since on a CPU `.detach().cpu()` is the same memory."""
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}

    def keep(self, name: str, tensors: Tensors | None = None) -> None:
        """Make a set: a copy of the current weights, or the tensors given."""
        self.sets[name] = self._stored(self.snapshot() if tensors is None else tensors)
        self._note_copy(name, tensors is None)

    def _stored(self, tensors: Tensors) -> Tensors:
        """A set where sets live: itself if it is there, since what has two names stays one."""
        if self.resources.sets == "device" or all(value.device.type == "cpu" for value in tensors.values()):
            return tensors
        # Memory that is pinned can be copied to an accelerator while the processor goes on.
        pinned = self.device.type == "cuda"
        kept = {name: torch.empty_like(value, device="cpu", pin_memory=pinned) for name, value in tensors.items()}
        return {name: one.copy_(tensors[name]) for name, one in kept.items()}

    def keep_base(self) -> None:
        """Remember the weights as the backbone gave them, before any training."""
        self.base = self._stored(self.snapshot())

    def drop(self, name: str) -> None:
        self.sets.pop(name, None)
        self.copies.pop(name, None)

    def is_current(self, name: str) -> bool:
        """Whether a set is known to equal the current weights to the bit."""
        return self.copies.get(name) == self._moment()

    def updated(self) -> None:
        """To be called after an optimiser's step."""
        self._updates += 1

    def _moment(self) -> int:
        """A number that grows whenever a current weight is written to. torch counts each tensor's changes in place, but
        not those of a fused optimiser."""
        return self._updates + sum(parameter._version for parameter in self.trainable.values())

    def _note_copy(self, name: str, equal: bool) -> None:
        self.copies.pop(name, None)
        if equal:
            self.copies[name] = self._moment()

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """set <- decay * set + (1 - decay) * current, in place."""
        kept = self.sets[name]
        if self.resources.sets == "device":
            torch._foreach_lerp_([kept[key] for key in self.trainable], list(self.trainable.values()), 1 - decay)
        else:  # one by one, and on the device: its rounding is not the processor's
            for key, parameter in self.trainable.items():
                there = kept[key].to(parameter.device)
                torch._foreach_lerp_([there], [parameter], 1 - decay)
                kept[key].copy_(there)
        self._note_copy(name, decay == 0)

    def state(self) -> Tensors:
        """What a checkpoint needs: "set/parameter" -> tensor. The base is the backbone's, and an alias is no set."""
        kept = {"current": {k: v.detach() for k, v in self.trainable.items()}}
        for name, tensors in self.sets.items():
            if tensors is not self.base and not (name == "reference" and tensors is self.sets.get("ema")):
                kept[name] = tensors
        return {f"{name}/{key}": value for name, tensors in kept.items() for key, value in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Every current tensor must be there with its shape."""
        for key, parameter in self.trainable.items():
            saved = tensors.get(f"current/{key}")
            if saved is None or saved.shape != parameter.shape:  # copy_ would broadcast
                found = "no such tensor" if saved is None else f"shape {tuple(saved.shape)}"
                what = f"{key} has shape {tuple(parameter.shape)} here, {found} there"
                hint = "Use the backbone and `policy.train` that they were trained with."
                raise CheckpointError(f"these weights are of another policy: {what}.", hint=hint)
            parameter.copy_(saved)
        names = {key.split("/", 1)[0] for key in tensors} - {"current"}
        for name in sorted(names):
            loaded = {key: tensors[f"{name}/{key}"].to(self.device).clone() for key in self.trainable}
            equal = all(torch.equal(loaded[key], value) for key, value in self.trainable.items())
            self.sets[name] = self._stored(loaded)
            self._note_copy(name, equal)

    def export(self, folder: Path, weights: str = "current") -> str:
        """Write one set of the weights for others to load; returns the line that loads them."""
        if weights != "current":
            kept = self.snapshot()
            self.use(weights)
            try:
                return self.export(folder)
            finally:
                self._put(kept)
        if self.lora is None:
            self.net.save_pretrained(folder)  # type: ignore[operator]
            return f'{type(self.net).__name__}.from_pretrained("{folder}")'
        self.net.save_lora_adapter(folder, adapter_name=ADAPTER)  # type: ignore[operator]
        # diffusers looks for a pickle unless it is told otherwise.
        return f'transformer.load_lora_adapter("{folder}", prefix=None, use_safetensors=True)'

    def use(self, name: str) -> None:
        """Make a set's weights the current ones."""
        if name != "current":
            self._put(self.sets[name])

    @torch.no_grad()
    def _put(self, tensors: Tensors) -> None:
        for name, parameter in self.trainable.items():
            parameter.copy_(tensors[name])


def ema_decay(step: int, longest: float) -> float:
    """Warm-up of an exponential moving average: min((1 + k) / (10 + k), longest) after k updates (Flow-GRPO's code)."""
    return min((1 + step) / (10 + step), longest)
