"""Weights that are trained, and the named sets that an algorithm compares them with, whatever the network computes.

A set is a dictionary of the trainable tensors and nothing else: `current` is the network's own, `reference`, `old` and
`ema` are copies that stand in for them during a call (`torch.func.functional_call`). LoRA and full fine-tuning are then
one mechanism: LoRA starts as the identity, so a copy taken at the start is the base model exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlkit.errors import CheckpointError, RecipeError
from rlkit.resources import Resources, choose_attention, compile_network
from rlkit.types import seed_of

Tensors = dict[str, Tensor]
ADAPTER = "rlkit"
FROZEN: Literal["frozen"] = "frozen"


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


class Weights(ABC):
    """One network with its sets. `train` is None (all weights), a `Lora`, on `targets` unless it names its own, or
    `FROZEN`: no weight is ever trained."""

    def __init__(
        self,
        net: nn.Module,
        targets: Sequence[str],
        train: Lora | Literal["frozen"] | None,
        device: torch.device,
        precision: str,
        seed: int,
        checkpointing: bool = False,
        resources: Resources | None = None,
    ) -> None:
        self.net = net
        self.device = device
        self.precision = precision
        self.lora = train if isinstance(train, Lora) else None
        self.resources = resources = resources or Resources()
        self.calls = 0  # rows that went through the network since they were last taken; guidance doubles them
        self.net.eval()  # dropout would make the ratio differ from 1 before any update
        if checkpointing:
            compute_again(net)
        if resources.attention is not None:
            choose_attention(net, resources.attention)
        net.requires_grad_(train is None)
        if isinstance(train, Lora):
            self._add_lora(train, targets, seed)
        self.trainable: Tensors = {}
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # the optimiser's master copy; autocast lowers it per call
                self.trainable[name] = parameter
        self.sets: dict[str, Tensors] = {}
        self._updates = 0
        self.copies: dict[str, int] = {}  # sets that equalled the current weights to the bit, and when: see `moment`
        self.base: Tensors | None = None
        if resources.compile:
            compile_network(net, "inductor" if resources.compile is True else resources.compile)

    def take_calls(self) -> int:
        """Rows through the network since this was last asked: what an algorithm costs on any machine."""
        calls, self.calls = self.calls, 0
        return calls

    def _add_lora(self, lora: Lora, targets: Sequence[str], seed: int) -> None:
        from peft import LoraConfig

        config = LoraConfig(
            r=lora.rank,
            lora_alpha=round(lora.scale * lora.rank),
            init_lora_weights="gaussian",
            target_modules=list(lora.targets or targets),
        )
        with torch.random.fork_rng():  # peft draws A from the global generator
            torch.manual_seed(seed_of(seed, "lora"))
            self.net.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]

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

    @torch.no_grad()
    def adopt(self, name: str) -> None:
        """Go on with the weights of a set as the current ones."""
        for key, parameter in self.trainable.items():
            parameter.copy_(self.sets[name][key])
        self.updated()
        self._note_copy(name, True)

    def drop(self, name: str) -> None:
        self.sets.pop(name, None)
        self.copies.pop(name, None)

    def is_current(self, name: str) -> bool:
        """Whether a set is known to equal the current weights to the bit."""
        return self.copies.get(name) == self.moment()

    def updated(self) -> None:
        """To be called after an optimiser's step."""
        self._updates += 1

    def moment(self) -> int:
        """A number that grows whenever a current weight is written to. torch counts each tensor's changes in place, but
        not those of a fused optimiser."""
        return self._updates + sum(parameter._version for parameter in self.trainable.values())

    def _note_copy(self, name: str, equal: bool) -> None:
        self.copies.pop(name, None)
        if equal:
            self.copies[name] = self.moment()

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
        return self.write(folder)

    @abstractmethod
    def write(self, folder: Path) -> str:
        """Write the current weights for others to load; returns the line that loads them."""

    def use(self, name: str) -> None:
        """Make a set's weights the current ones."""
        if name != "current":
            self._put(self.sets[name])

    @torch.no_grad()
    def _put(self, tensors: Tensors) -> None:
        for name, parameter in self.trainable.items():
            parameter.copy_(tensors[name])


One = TypeVar("One", covariant=True)


class Sets(Generic[One]):
    """A policy's sets as callables, by name. One that the stage did not make is an error, not a silent `current`."""

    def __init__(self, weights: Any, make: Callable[[Any, str], One]) -> None:
        """make(weights, name). The weights stay an attribute, so that a copy of a policy has its own sets."""
        self._weights, self._make = weights, make

    def __getitem__(self, name: str) -> One:
        if name != "current" and name not in self._weights.sets:
            known = ", ".join(["current", *self._weights.sets])
            raise KeyError(f"the policy has no set {name!r} in this stage; it has: {known}")
        return self._make(self._weights, name)

    @property
    def current(self) -> One:
        return self["current"]

    @property
    def old(self) -> One:
        return self["old"]

    @property
    def reference(self) -> One:
        return self["reference"]


def compute_again(net: nn.Module) -> None:
    """Have activations computed again in the backward pass. RecipeError where the network cannot."""
    if getattr(net, "_supports_gradient_checkpointing", False):  # diffusers
        net.enable_gradient_checkpointing()  # type: ignore[operator]
    elif getattr(net, "supports_gradient_checkpointing", False):  # transformers, which looks at the mode
        dropping = [name for name, one in net.named_modules() if isinstance(one, nn.Dropout) and one.p > 0]
        if dropping:
            what = f"{type(net).__name__} drops activations at random in the mode that this needs: {dropping[0]}."
            raise RecipeError(what, where="policy.checkpointing", hint="Leave it out.")
        net.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        net.train()
    else:
        what = f"{type(net).__name__} cannot compute its activations again."
        raise RecipeError(what, where="policy.checkpointing", hint="Leave it out.")


def ema_decay(step: float, longest: float) -> float:
    """Warm-up of an exponential moving average: min((1 + k) / (10 + k), longest) after k updates (Flow-GRPO's code)."""
    return min((1 + step) / (10 + step), longest)
