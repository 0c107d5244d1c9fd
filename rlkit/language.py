"""A token policy: the network that writes, with its sets of weights and the prompts that it has read.

What sets are, and what of the network is trained, is in `weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit import decoding, tokens
from rlkit.errors import RecipeError
from rlkit.resources import Resources
from rlkit.shelf import Conditions, Shelf
from rlkit.types import Prompt, TokenModel
from rlkit.weights import ADAPTER, Lora, Sets, Tensors, Weights


class TokenSet:
    """One set of a token policy's weights, as a callable."""

    def __init__(self, policy: LanguagePolicy, name: str) -> None:
        self._policy = policy
        self._name = name

    def log_probs(self, ids: Tensor, length: Tensor, cond: Sequence[str], temperature: float = 1.0) -> Tensor:
        """[B, L] fp32: log p of each token of ids [B, L] given those before it, 0 at the first and behind `length` [B].

        cond: the keys of the B prompts, whose pictures the network sees. Only `current` carries gradient.
        """
        policy = self._policy
        ids, length = ids.to(policy.device), length.to(policy.device)
        there = torch.arange(ids.shape[1], device=policy.device) < length[:, None]
        batch = policy.conditions.batch(cond)
        policy.calls += len(ids)
        with policy.autocast(), torch.set_grad_enabled(torch.is_grad_enabled() and self._name == "current"):
            net = policy.net if self._name == "current" else policy.stand_in(self._name)
            logits = policy.model.logits(net, ids, there, batch)
        return tokens.log_probs(logits, ids, temperature) * there

    def read(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """The ids [P] of all that stands before the next answer to each; their keys are then known."""
        conditions = self._policy.conditions
        conditions.encode(prompts)
        return [conditions.of(prompt.key)["ids"] for prompt in prompts]


class LanguagePolicy(Weights):
    """One network that continues texts, with its sets. `train` is None (all weights) or a `Lora`."""

    def __init__(
        self,
        model: TokenModel,
        train: Lora | Literal["frozen"] | None,
        device: torch.device,
        precision: str,
        seed: int,
        checkpointing: bool = False,
        shelf: Shelf | None = None,
        resources: Resources | None = None,
    ) -> None:
        super().__init__(model.net, model.lora_targets, train, device, precision, seed, checkpointing, resources)
        self.model = model
        if self.resources.encoders == "free":
            what = "a token policy has no encoders beside its network."
            raise RecipeError(what, where="policy.encoders", hint="Leave it out.")
        limit = self.resources.conditions_in_memory
        self.conditions = Conditions(lambda size: model, None, shelf, limit=limit)
        self.models = Sets(self, TokenSet)

    def models_with(self, score: object) -> Sets[TokenSet]:
        """The sets. Rewards have no gradient with respect to words."""
        return self.models

    @torch.no_grad()
    def answer(
        self,
        keys: Sequence[str],
        draws: Sequence[torch.Generator],
        most: int,
        temperature: float,
        name: str,
        top_p: float = 1.0,
    ) -> decoding.Answers:
        """One answer to each prompt, by its key, of at most `most` tokens, by a set of the weights.

        draws: the randomness of each, which nothing else depends on. top_p: see `decoding`.
        """
        conditions = [self.conditions.of(key) for key in keys]
        net = self.net if name == "current" else self.stand_in(name)
        with self.autocast():
            found = decoding.sample(self.model, net, conditions, draws, most, temperature, top_p)
        self.calls += sum(len(ids) for ids in found.ids)
        return found

    def whole(self, name: str = "current") -> Tensors:
        """All weights of a set by the names that transformers gives them, adapters merged into what they adapt."""
        trained = self.trainable if name == "current" else self.sets[name]
        everything = {key: value.detach() for key, value in (self.net.state_dict() | trained).items()}
        found = {key.replace(".base_layer.", "."): one for key, one in everything.items() if ".lora_" not in key}
        if self.lora is not None:
            for key, down in everything.items():
                if key.endswith(f".lora_A.{ADAPTER}.weight"):
                    layer = key.removesuffix(f".lora_A.{ADAPTER}.weight")
                    up = everything[f"{layer}.lora_B.{ADAPTER}.weight"]
                    kept = found[f"{layer}.weight"]
                    change = self.lora.scale * up.float() @ down.float()
                    found[f"{layer}.weight"] = (kept.float() + change).to(kept.dtype)
        return found

    def adapter(self, name: str = "current") -> tuple[Tensors, dict[str, Any]]:
        """The LoRA weights of a set by the names that PEFT gives them, and their adapter_config.json."""
        if self.lora is None:
            raise RecipeError("all weights are trained: there is no adapter.", where="policy.train")
        trained = self.trainable if name == "current" else self.sets[name]
        weights = {f"base_model.model.{key.replace(f'.{ADAPTER}.', '.')}": one.detach() for key, one in trained.items()}
        layers = {key.split(".lora_")[0] for key in trained}
        said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": ""}
        numbers = {"r": self.lora.rank, "lora_alpha": self.lora.scale * self.lora.rank}
        return weights, {**said, **numbers, "target_modules": sorted(layers)}

    def write_base(self, folder: Path) -> None:
        """The network without adapters, with all that transformers and vLLM load beside it."""
        from safetensors.torch import save_file

        self.model.write(folder)
        plain = {key: one for key, one in self.net.state_dict().items() if ".lora_" not in key}
        kept: Tensors = {}
        places: set[int] = set()
        for key, one in plain.items():  # tied weights once: safetensors takes no two names for one memory
            if one.data_ptr() not in places:
                kept[key.replace(".base_layer.", ".")] = one.detach().cpu().contiguous()
                places.add(one.data_ptr())
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    def write(self, folder: Path) -> str:
        """The weights with all that transformers and vLLM load beside them, or the adapter alone."""
        self.net.save_pretrained(folder)  # type: ignore[operator]
        if self.lora is not None:
            return f'model.load_adapter("{folder}")'
        self.model.write(folder)
        return f'{type(self.net).__name__}.from_pretrained("{folder}")'
