"""A policy: the network that is trained, and the named sets of weights that an algorithm compares it with.

A set is a dictionary of the trainable tensors and nothing else: `current` is the network's own, `reference`, `old` and
`ema` are copies that stand in for them during a call (`torch.func.functional_call`). LoRA and full fine-tuning are then
one mechanism: LoRA starts as the identity, so a copy taken at the start is the base model exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlkit.errors import CheckpointError, RecipeError
from rlkit.shelf import Shelf
from rlkit.types import Condition, FlowModel, Prompt, seed_of

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


class Conditions:
    """Encoded prompts by their key, encoded once. With a `negative` text each has a twin that says this instead."""

    def __init__(self, model: FlowModel, negative: str | None = None, shelf: Shelf | None = None) -> None:
        self._model = model
        self._negative = negative
        self._shelf = shelf
        self._known: dict[str, Condition] = {}
        self._twins: dict[str, str] = {}

    def encode(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            self._encode(prompt)
            if self._negative is not None and prompt.key not in self._twins:
                twin = replace(prompt, text=self._negative)  # the same pictures: only the words are untold
                self._encode(twin)
                self._twins[prompt.key] = twin.key

    def _encode(self, prompt: Prompt) -> None:
        key = prompt.key
        if key in self._known:
            return
        kept = self._shelf.get(key) if self._shelf else None
        if kept is None:  # one by one: beside others its last bits would depend on what was known
            (kept,) = self._model.encode([prompt])
            if self._shelf:
                self._shelf.put(key, kept)
        self._known[key] = kept

    def untold(self, keys: Sequence[str]) -> list[str]:
        """The keys of their twins."""
        return [self._twins[key] for key in keys]

    def batch(self, keys: Sequence[str]) -> Condition:
        """{"name": [B, ...]} for B keys, each encoded before."""
        return self._model.collate([self._known[key] for key in keys])


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
        return policy.model.guide(told, untold, policy.guidance)

    def _call(self, x: Tensor, sigma: Tensor, cond: Sequence[str]) -> Tensor:
        policy = self._policy
        batch = policy.conditions.batch(cond)
        policy.calls += len(x)
        with policy.autocast():
            if self._name == "current":
                return policy.model.velocity(policy.net, x, sigma, batch).float()
            with torch.no_grad():
                return policy.model.velocity(policy.stand_in(self._name), x, sigma, batch).float()


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
        return self._policy.model.decode(latents)

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
    ) -> None:
        self.model = model
        self.net: nn.Module = model.net
        self.device = device
        self.precision = precision
        self.lora = train
        self.guidance = guidance
        self.calls = 0  # rows that went through the network since they were last taken; guidance doubles them
        self.conditions = Conditions(model, None if guidance == 1 else negative, shelf)
        self.net.eval()  # dropout would make the ratio differ from 1 before any update
        if checkpointing:
            if not getattr(self.net, "_supports_gradient_checkpointing", False):
                what = f"{type(self.net).__name__} cannot compute its activations again."
                raise RecipeError(what, where="policy.checkpointing", hint="Leave it out.")
            self.net.enable_gradient_checkpointing()  # type: ignore[operator]
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

    def take_calls(self) -> int:
        """Rows through the network since this was last asked: what an algorithm costs on any machine."""
        calls, self.calls = self.calls, 0
        return calls

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def stand_in(self, name: str) -> Any:
        """The network with a set's tensors in place of its own, for the length of a call."""
        tensors = self.sets[name]
        return lambda *args, **kwargs: functional_call(self.net, tensors, args, kwargs)

    def snapshot(self) -> Tensors:
        """A copy of the trainable tensors. `clone`, since on a CPU `.detach().cpu()` is the same memory."""
        return {name: parameter.detach().clone() for name, parameter in self.trainable.items()}

    def keep(self, name: str, tensors: Tensors | None = None) -> None:
        """Make a set: a copy of the current weights, or the tensors given."""
        self.sets[name] = self.snapshot() if tensors is None else tensors
        self._note_copy(name, tensors is None)

    def keep_base(self) -> None:
        """Remember the weights as the backbone gave them, before any training."""
        self.base = self.snapshot()

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
        torch._foreach_lerp_([kept[key] for key in self.trainable], list(self.trainable.values()), 1 - decay)
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
            self.sets[name] = {key: tensors[f"{name}/{key}"].to(self.device).clone() for key in self.trainable}
            equal = all(torch.equal(self.sets[name][key], value) for key, value in self.trainable.items())
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
