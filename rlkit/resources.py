"""How a policy uses its machine: where its parts live, which kernels compute, and what of a model can be let go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from rlkit.errors import RecipeError, nearest
from rlkit.types import Condition, FlowModel, Prompt


@dataclass(frozen=True)
class Resources:
    """How a policy uses its machine: where things live, and what computes. It changes no number beyond rounding.

    encoders: what reads prompts, often larger than what is trained. With `free` all prompts are read before the first
    step, so the data must have an end.
    """

    encoders: Literal["keep", "offload", "free"] = "keep"  # offload: on the CPU between calls; free: let go
    conditions_in_memory: int | None = None  # encoded prompts at most, the others on the shelf; None: all
    sets: Literal["device", "cpu"] = "device"  # where the copies (old, reference, ema) are when nothing calls them
    attention: str | None = None  # one of diffusers' attention backends, such as flash or _native_cudnn; None: torch's
    compile: bool | str = False  # by torch.compile; true: its inductor, or the name of another of its backends

    def __post_init__(self) -> None:
        if self.conditions_in_memory is not None and self.conditions_in_memory < 1:
            raise ValueError(f"conditions_in_memory must be 1 or more, not {self.conditions_in_memory}")
        if self.attention == "":
            raise ValueError("attention must be the name of a backend, or null")
        if self.compile == "":
            raise ValueError("compile must be true, false or the name of one of torch.compile's backends")


def model_of_size(model: FlowModel, size: tuple[int, int]) -> FlowModel:
    """The model for pictures of this (height, width). RecipeError if it does not draw them."""
    wanted = f"{size[0]} x {size[1]} (height x width)"
    if model.at is not None:
        try:
            return model.at(size)
        except ValueError as error:  # the backbone's own check of its `size`
            raise RecipeError(f"cannot draw {wanted}: {error}", where="policy.backbone") from error
    with torch.no_grad():
        blank = torch.zeros(1, *model.latent_shape, device=next(model.net.parameters()).device)
        own = tuple(model.decode(blank).shape[-2:])
    if own == size:
        return model
    what = f"{type(model.net).__name__} draws {own[0]} x {own[1]} alone, and a prompt asks for {wanted}."
    raise RecipeError(what, where="policy.backbone", hint="Leave the size out of the data, or use another backbone.")


def without_encoders(model: FlowModel, unread: Mapping[str, list[str]]) -> FlowModel:
    """The model without all that holds its encoders; what was unread of these texts is remembered."""

    def too_late(what: str) -> RecipeError:
        what = f"{what} was not asked for before the encoders were let go."
        return RecipeError(what, where="policy.encoders", hint="Use `offload`, or `keep`.")

    def encode(prompts: Sequence[Prompt]) -> list[Condition]:
        raise too_late(f"the prompt {prompts[0].text!r}")

    def at(size: tuple[int, int]) -> FlowModel:
        raise too_late(f"a picture of {size[0]} x {size[1]}")

    return replace(model, encoders=(), encode=encode, unread=lambda text: unread.get(text, []), pipeline=None, at=at)


def choose_attention(net: nn.Module, name: str) -> None:
    """Have diffusers compute attention this way. RecipeError for a name that it does not know or cannot use."""
    where = "policy.attention"
    if not callable(getattr(net, "set_attention_backend", None)):
        what = f"{type(net).__name__} is not one of diffusers' networks, which can choose."
        raise RecipeError(what, where=where, hint="Leave it out.")
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [one.value for one in AttentionBackendName]
    if name not in known:
        hint = f"Known: {', '.join(known)}."
        raise RecipeError(f"diffusers has no attention backend {name!r}.{nearest(name, known)}", where=where, hint=hint)
    processors = [getattr(module, "processor", None) for module in net.modules()]
    if not any("_attention_backend" in dir(one) for one in processors):
        what = f"the attention layers of {type(net).__name__} are of diffusers' older kind, which computes it one way."
        raise RecipeError(what, where=where, hint="Leave it out.")
    try:
        net.set_attention_backend(name)  # type: ignore[operator]
    except (RuntimeError, ValueError, ImportError) as error:  # what it needs is not installed, or not on this machine
        raise RecipeError(f"{name} cannot be used here: {error}", where=where, hint="Use `native`.") from error


def compile_network(net: nn.Module, backend: str) -> None:
    """Have torch compile the blocks that the network repeats, where its class names them, or else all of it."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        hint = f"Known: {', '.join(known)}."
        what = f"torch.compile has no backend {backend!r}.{nearest(backend, known)}"
        raise RecipeError(what, where="policy.compile", hint=hint)
    if getattr(net, "_repeated_blocks", None):
        net.compile_repeated_blocks(backend=backend)  # type: ignore[operator]
    else:
        net.compile(backend=backend)
