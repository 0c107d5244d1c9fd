"""Qwen2-VL, Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL: language models that see the pictures of a prompt.

A prompt's pictures, its source and then its references, stand before the words of the user's turn, each as as many
tokens as the vision tower makes of it: one for 28 x 28 pixels, or 32 x 32. Its tokens have rows and columns as
positions, and the words behind go on where the longer side ends (multimodal rotary positions, M-RoPE). Positions are
computed once, with the prompt, and given with every call. Pictures are made ready by PIL, as they were in training, so
that no torchvision is needed. Pictures that come with a reply stand before its words, in the same way.

An answer cannot hold the mark that stands for a picture: there is none behind it. Its logit is so low that nothing
samples it, in a rollout and in training alike (vLLM is told so with each request, by `TokenModel.picture`). Marks of
where a picture begins and ends, and that of a video, are tokens as others are. Videos are left out.

transformers weaves Qwen3-VL's rows and columns into one another whatever the configuration says; vLLM does so only
where it says `mrope_interleaved`, and else reads pictures otherwise, without a word. What is written says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlkit.backbones import _pictures
from rlkit.backbones import _transformers as shared
from rlkit.errors import DataError, RecipeError
from rlkit.pictures import from_pil
from rlkit.types import Condition, Prompt, TokenModel

CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
MARK = "<|image_pad|>"
NEVER = -1e4  # a logit: its probability is 0, and 0 times its logarithm is 0, which it is not for minus infinity
MOST = 16  # pictures of a prompt, those of its turns among them


def positions(there: Tensor, cond: Condition) -> Tensor:
    """[3, B, L] (time, row, column): those of the prompts, then on from the last by one a token."""
    known: Tensor = cond["positions"].to(there.device)  # [B, P, 3]
    prompt: Tensor = cond["prompt"].to(there.device)  # [B]
    after: Tensor = cond["after"].to(there.device)  # [B]
    place = (there.cumsum(dim=1) - 1).clamp(min=0)  # [B, L] among a row's own tokens
    of_prompt = known.gather(1, place.clamp(max=known.shape[1] - 1)[..., None].expand(-1, -1, 3))  # [B, L, 3]
    of_answer = (after[:, None] + place - prompt[:, None])[..., None]  # [B, L, 1]
    return torch.where((place < prompt[:, None])[..., None], of_prompt, of_answer).movedim(-1, 0)


def output(net: nn.Module, ids: Tensor, there: Tensor, cond: Condition, **asked: Any) -> Any:
    """What the network says to ids [B, L], padded at either end where `there` [B, L] is false."""
    ids = torch.where(there, ids, torch.zeros_like(ids))  # padding is no picture
    pictures = {"pixel_values": cond["pixels"], "image_grid_thw": cond["grids"]} if len(cond["grids"]) else {}
    given = {"attention_mask": there.long(), "position_ids": positions(there, cond), "use_cache": False}
    return net(input_ids=ids, **given, **pictures, **asked)


def reading(mark: int) -> Any:
    """The function that gives logits, of networks for which this token stands for a part of a picture."""

    def logits(net: nn.Module, ids: Tensor, there: Tensor, cond: Condition) -> Tensor:
        """[B, L, V]"""
        result: Tensor = output(net, ids, there, cond).logits
        never = torch.arange(result.shape[-1], device=result.device) == mark
        return result.masked_fill(never, NEVER)

    return logits


def hidden(net: nn.Module, ids: Tensor, there: Tensor, cond: Condition, layer: int) -> Tensor:
    """[B, L, H] the states of a layer. At 0 the pictures' tokens are what the vision tower made of them."""
    result: Tensor = output(net, ids, there, cond, output_hidden_states=True, logits_to_keep=1).hidden_states[layer]
    return result


def collate(conditions: Sequence[Condition]) -> Condition:
    """Pixels [n, D] and grids [K, 3] of all pictures, row after row; positions [B, P, 3], padded at the end."""
    return {
        "pixels": torch.cat([one["pixels"] for one in conditions]),
        "grids": torch.cat([one["grids"] for one in conditions]),
        "positions": pad_sequence([one["positions"] for one in conditions], batch_first=True),
        "prompt": torch.tensor([len(one["ids"]) for one in conditions]),
        "after": torch.stack([one["positions"].max() + 1 for one in conditions]),
    }


def bring_pictures(tower: nn.Module) -> None:
    """Let the vision tower take pictures from where they are kept: not before it reads them, and not where they are in
    the keys and values already."""

    def before(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        device = next(module.parameters()).device
        moved = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in options.items()}
        return tuple(one.to(device) if isinstance(one, Tensor) else one for one in args), moved

    tower.register_forward_pre_hook(before, with_kwargs=True)


@dataclass(frozen=True)
class QwenVL:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: describe a picture, compare pictures, or answer a prompt without one."""

    kind = "tokens"
    tasks = ("text", "caption")
    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    licence = "Apache-2.0 (Qwen2.5-VL of 3 B and 72 B: Qwen's own licences)"
    parameters = "2 B to 72 B"
    paper = "arXiv 2502.13923"
    source = "https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct"

    path: str = "Qwen/Qwen2.5-VL-7B-Instruct"  # a hub name, or a folder of transformers
    revision: str | None = None  # of the hub repository; None: its newest
    system: str = ""  # what the model is told to be; "": what its own chat template says, if anything
    # The user's words beside pictures; "{prompt}" is replaced by the prompt's text, which stands alone without any.
    instruction: str = "Describe this picture."
    pixels: tuple[int, int] | None = None  # a picture has at least and at most so many; None: as the checkpoint says
    longest: int = 4096  # tokens of prompt and answer together, pictures included

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise ValueError(f"longest must be 2 tokens or more, one of an answer, not {self.longest}")
        if self.pixels is not None and not 32 * 32 <= self.pixels[0] <= self.pixels[1]:
            what = "pixels must be two numbers (least, most) of 1024 (32 x 32) or more, the least first"
            raise ValueError(f"{what}, not {list(self.pixels)}")
        if not self.instruction.strip():
            raise ValueError("instruction must say something; '{prompt}' is replaced by the prompt's text")

    def load(self, device: torch.device, dtype: torch.dtype) -> TokenModel:
        """The network, its tokenizer, and what makes pictures ready. Conditions stay on the CPU until they are read."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = shared.opened(self.path, self.revision, self.model_types)
        tokenizer = folder.tokenizer()
        # In numbers of pixels, despite the names; given with each call, for a file's own may go by two names.
        size = None if self.pixels is None else {"shortest_edge": self.pixels[0], "longest_edge": self.pixels[1]}
        sized = {} if size is None else {"size": size}
        ready = folder.plain(Qwen2VLImageProcessorPil)
        net = folder.net(CLASSES, self.longest, device, dtype)
        mark = net.config.image_token_id
        if tokenizer.convert_tokens_to_ids(MARK) != mark:
            raise RecipeError(f"{self.path} is not whole: its tokenizer has no {MARK}", where=shared.WHERE)
        bring_pictures(net.model.visual)
        ends = shared.ends(net, tokenizer)

        def seen(prompt: Prompt) -> tuple[Tensor, Tensor]:
            """Pixels [n, D] and grids [K, 3] of a prompt's pictures and of those of its turns."""
            found = _pictures.of_conversation(prompt, MOST)
            if not found:
                width = 3 * ready.temporal_patch_size * ready.patch_size**2
                return torch.zeros(0, width, dtype=dtype), torch.zeros(0, 3, dtype=torch.int64)
            try:
                made = ready(images=found, return_tensors="pt", **sized)
            except ValueError as error:  # it refuses pictures that are 200 times as long as wide
                raise DataError(str(error), where=f"prompt {prompt.id}") from error
            return made["pixel_values"].to(dtype), made["image_grid_thw"]

        def spread(text: str, grids: Tensor) -> list[int]:
            """The ids of a piece of chat, each picture's mark as often as the tower makes tokens of it."""
            first, *rest = text.split(MARK)
            if len(rest) != len(grids):
                what = f"the chat shows {len(rest)} pictures in the place of {len(grids)}"
                hint = f"Its template has to write {MARK} for each; `system` and `instruction` may not."
                raise RecipeError(what, where="policy.backbone", hint=hint)
            counts = [int(grid.prod()) // ready.merge_size**2 for grid in grids]
            text = first + "".join(MARK * count + more for count, more in zip(counts, rest, strict=True))
            found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
            return found

        def written(prompt: Prompt, grids: Tensor) -> list[int]:
            """The ids of a conversation that shows pictures of these grids [K, 3]."""
            system, words = (shared.unmarked(tokenizer, one) for one in (prompt.system, prompt.text))
            turns = [len(turn.pictures) for turn in prompt.turns]
            own, *shown = grids.split([len(grids) - sum(turns), *turns])
            words = self.instruction.replace("{prompt}", words) if len(own) else words
            ids = spread(shared.chat(tokenizer, system or self.system, said(words, len(own))), own)
            for turn, theirs in zip(prompt.turns, shown, strict=True):
                if mark in turn.answer:
                    what = f"an answer in the conversation about {prompt.text!r} holds {MARK}, and no picture"
                    raise DataError(what, where=f"prompt {prompt.id}", hint="Take it out of the answer.")
                reply = said(shared.unmarked(tokenizer, turn.reply), len(theirs))
                behind = spread(shared.following(tokenizer, reply), theirs)
                ids += shared.joined(turn.answer, behind, ends)
            return ids

        def read(prompt: Prompt) -> Condition:
            pixels, grids = seen(prompt)
            hint = ", or lower policy.backbone.pixels" if len(grids) else ""
            hint += ", or let the conversation end after fewer turns" if prompt.turns else ""
            ids = shared.room(written(prompt, grids), self.longest, prompt.id, hint)
            kinds = (ids == mark).int()[None]
            at, _ = net.model.get_rope_index(ids[None], mm_token_type_ids=kinds, image_grid_thw=grids)  # [3, 1, P]
            return {"ids": ids, "pixels": pixels, "grids": grids, "positions": at[:, 0].T.contiguous()}

        def bare(ids: Tensor) -> Condition:
            nothing = {"ids": ids, **dict(zip(("pixels", "grids"), seen(Prompt(id=0, text="")), strict=True))}
            return nothing | {"positions": torch.arange(len(ids))[:, None].expand(-1, 3)}

        def at_size(prompt: Prompt, condition: Condition) -> tuple[Tensor, ...]:
            """Enlarged or made smaller as `ready` does it: another's resizing may round otherwise."""
            found = _pictures.of_conversation(prompt, MOST)
            sides = [(int(grid[2]) * ready.patch_size, int(grid[1]) * ready.patch_size) for grid in condition["grids"]]
            resized = [one.resize(size, ready.resample) for one, size in zip(found, sides, strict=True)]
            return tuple(from_pil(one) for one in resized)

        def write(to: Path) -> None:
            folder.write(to, size)
            if folder.config["model_type"] == "qwen3_vl":
                say_interleaved(to / "config.json")

        return TokenModel(
            net=net,
            logits=reading(mark),
            hidden=hidden,
            bare=bare,
            encode=lambda prompts: [read(prompt) for prompt in prompts],
            decode=shared.texts(tokenizer),
            ends=ends,
            longest=self.longest,
            lora_targets=words_layers(net),
            collate=collate,
            write=write,
            unread=lambda text: shared.marks(tokenizer, text),
            spell=shared.spelling(tokenizer),
            picture=mark,
            pictures=at_size,
            tasks=self.tasks,
        )


def said(words: str, pictures: int) -> Any:
    """What a turn of the user holds, as a chat's template takes it: pictures first, then words."""
    return [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": words}] if pictures else words


def say_interleaved(file: Path) -> None:
    """Let a configuration of Qwen3-VL say how its positions are laid out, which is always the same."""
    whole = json.loads(file.read_text(encoding="utf-8"))
    for name in ("rope_parameters", "rope_scaling"):  # transformers' newer name, and that of the published checkpoints
        if whole["text_config"].get(name):
            whole["text_config"][name]["mrope_interleaved"] = True
    file.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def words_layers(net: nn.Module) -> tuple[str, ...]:
    """The names of the language model's projections, whole: the vision tower's end alike."""
    linear = (name for name, module in net.named_modules() if isinstance(module, nn.Linear))
    return tuple(name for name in linear if ".language_model." in name and name.rpartition(".")[2] in shared.LAYERS)
