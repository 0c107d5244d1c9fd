"""Qwen2, Qwen2.5 (arXiv 2412.15115) and Qwen3 (arXiv 2505.09388): language models that answer a prompt.

A prompt is a turn of the user in the chat template of the checkpoint. An answer ends with the token that ends a turn,
or a text. Qwen3 thinks before it answers unless it is told not to; the others do not know of it. In a conversation it
goes on from all that it has written, thoughts included. It sees no pictures: of those that come with a reply it reads
what the reply says of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.backbones import _transformers as shared
from rlkit.types import Condition, Prompt, TokenModel

CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def logits(net: nn.Module, ids: Tensor, there: Tensor, cond: Condition) -> Tensor:
    """[B, L, V] for ids [B, L], padded at either end where `there` [B, L] is false."""
    result: Tensor = _output(net, ids, there).logits
    return result


def hidden(net: nn.Module, ids: Tensor, there: Tensor, cond: Condition, layer: int) -> Tensor:
    """[B, L, H] the states of a layer."""
    result: Tensor = _output(net, ids, there, output_hidden_states=True, logits_to_keep=1).hidden_states[layer]
    return result


def _output(net: nn.Module, ids: Tensor, there: Tensor, **asked: Any) -> Any:
    places = (there.cumsum(dim=1) - 1).clamp(min=0)
    return net(input_ids=ids, attention_mask=there.long(), position_ids=places, use_cache=False, **asked)


def collate(conditions: Sequence[Condition]) -> Condition:
    """Nothing: all that a prompt is stands in its ids."""
    return {}


@dataclass(frozen=True)
class Qwen:
    """Qwen2, Qwen2.5 and Qwen3: language models that rewrite a prompt, or answer it."""

    kind = "tokens"
    tasks = ("text",)
    model_types = ("qwen2", "qwen3")
    licence = "Apache-2.0 (Qwen2.5 of 3 B and 72 B: Qwen's own licences)"
    parameters = "0.5 B to 72 B"
    paper = "arXiv 2412.15115"
    source = "https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct"

    path: str = "Qwen/Qwen2.5-1.5B-Instruct"  # a hub name, or a folder of transformers
    revision: str | None = None  # of the hub repository; None: its newest
    system: str = ""  # what the model is told to be; "": what its own chat template says, if anything
    thinking: bool = False  # Qwen3: a chain of thought before the answer, which counts as part of it
    longest: int = 2048  # tokens of prompt and answer together

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise ValueError(f"longest must be 2 tokens or more, one of an answer, not {self.longest}")

    def load(self, device: torch.device, dtype: torch.dtype) -> TokenModel:
        """The network and its tokenizer. Conditions stay on the CPU: they are ids."""
        folder = shared.opened(self.path, self.revision, self.model_types)
        tokenizer = folder.tokenizer()
        net = folder.net(CLASSES, self.longest, device, dtype)
        ends = shared.ends(net, tokenizer)

        def read(text: str) -> list[int]:
            found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
            return found

        def encode(prompt: Prompt) -> Condition:
            system, words = (shared.unmarked(tokenizer, one) for one in (prompt.system, prompt.text))
            ids = read(shared.chat(tokenizer, system or self.system, words, enable_thinking=self.thinking))
            for turn in prompt.turns:
                reply = shared.unmarked(tokenizer, turn.reply)
                behind = read(shared.following(tokenizer, reply, enable_thinking=self.thinking))
                ids += shared.joined(turn.answer, behind, ends)
            hint = ", or let the conversation end after fewer turns" if prompt.turns else ""
            return {"ids": shared.room(ids, self.longest, prompt.id, hint)}

        return TokenModel(
            net=net,
            logits=logits,
            hidden=hidden,
            encode=lambda prompts: [encode(prompt) for prompt in prompts],
            decode=shared.texts(tokenizer),
            ends=ends,
            longest=self.longest,
            lora_targets=shared.LAYERS,
            collate=collate,
            write=folder.write,
            unread=lambda text: shared.marks(tokenizer, text),
            spell=shared.spelling(tokenizer),
            tasks=self.tasks,
        )
