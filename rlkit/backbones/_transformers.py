"""What backbones that load a language model of transformers have in common: its folder, its chat, its tokens.

A folder is what `save_pretrained` of a model and its tokenizer leaves: `config.json` says of which type it is. It is
read from disk or fetched from the Hugging Face hub, and nothing large is fetched before the type fits. Weights are
safetensors only, no code is run from a folder, and weights that are missing or left over are errors. An output layer
that shares the embedding's weights is not in the file, and is not missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlkit import registry
from rlkit.backbones import _diffusers
from rlkit.errors import DataError, RecipeError, nearest

WHERE = _diffusers.WHERE
PICTURES = ("preprocessor_config.json", "processor_config.json")  # either says how pictures are made ready
FILES = (  # all but the weights
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json"),
    *(*PICTURES, "video_preprocessor_config.json"),
)
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
END = "<|im_end|>"
ANSWER = "\ue000"  # of private use: it stands for an answer where a chat's template is asked what comes behind one


# ---- a folder --------------------------------------------------------------------------------------------------------


def opened(path: str, revision: str | None, model_types: Sequence[str]) -> Checkpoint:
    """The checkpoint at a folder or hub name, once its configuration says that it is of one of these types."""
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            hint = "Leave `revision` out, or give the name of a hub repository as `path`."
            raise RecipeError(f"{path} is a folder and has no revision {revision!r}", where=WHERE, hint=hint)
        return Checkpoint(local, path, _config(local, path, model_types))
    config = _config(Path(_diffusers._fetched(path, revision, ["config.json"])), path, model_types)
    wanted = [*FILES, "*.safetensors", "*.safetensors.index.json"]
    return Checkpoint(Path(_diffusers._fetched(path, revision, wanted)), path, config)


def _config(folder: Path, path: str, model_types: Sequence[str]) -> Mapping[str, Any]:
    """config.json. A RecipeError if there is none, or if it is of another family: then which backbone fits."""
    file = folder / "config.json"
    if not file.is_file():
        whole = (folder / "model_index.json").is_file()
        hint = "It is a diffusers pipeline: give the folder of a language model." if whole else ""
        raise RecipeError(f"{path} has no config.json", where=WHERE, hint=hint or "Give a folder of transformers.")
    try:
        config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name = str(config["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file} is not the configuration of a model of transformers", where=WHERE) from error
    if name not in model_types:
        takes = {one.name: one.constants.get("model_types", ()) for one in registry.describe("backbones")}
        fitting = [entry for entry, types in takes.items() if name in types]
        hint = f"Use the backbone {' or '.join(map(repr, fitting))}." if fitting else "No backbone reads such a one."
        near = "" if fitting else nearest(name, model_types)
        what = f"{path} is a model of the type {name!r}, and this backbone reads {', '.join(model_types)}"
        raise RecipeError(what, where=WHERE, hint=hint + near)
    return config


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose type fits."""

    folder: Path
    path: str  # as the recipe gave it
    config: Mapping[str, Any]

    def net(self, classes: Mapping[str, str], longest: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The network of this type's class with exactly the weights that it has, in evaluation mode."""
        import transformers

        kind = getattr(transformers, classes[self.config["model_type"]])
        quiet()
        with self._reading():
            net, info = kind.from_pretrained(self.folder, use_safetensors=True, output_loading_info=True, dtype=dtype)
        for found, verb in (("missing_keys", "lacks weights of"), ("unexpected_keys", "has weights that are not in")):
            if info[found]:
                names = _diffusers._few(sorted(info[found]))
                raise RecipeError(f"{self.path} {verb} {kind.__name__}: {names}", where=WHERE)
        most = net.config.get_text_config().max_position_embeddings
        if longest > most:
            what = f"this checkpoint reads at most {most} tokens, prompt and answer together, and not {longest}"
            raise RecipeError(what, where="policy.backbone.longest")
        can_recompute(net)
        return net.to(device).eval()

    def tokenizer(self) -> Any:
        """With its chat template, which older folders of models that see keep in a file of its own."""
        from transformers import AutoTokenizer

        with self._reading():
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        alone = self.folder / "chat_template.json"
        if tokenizer.chat_template is None and alone.is_file():
            tokenizer.chat_template = json.loads(alone.read_text(encoding="utf-8"))["chat_template"]
        if tokenizer.chat_template is None:
            hint = "Take a model that was made to follow instructions, or put a chat_template.jinja into the folder."
            raise RecipeError(f"{self.path} has no chat template", where=WHERE, hint=hint)
        return tokenizer

    def plain(self, kind: type[Any]) -> Any:
        """What has no weights and is not the tokenizer."""
        with self._reading():
            return kind.from_pretrained(self.folder)

    def write(self, folder: Path, size: Mapping[str, int] | None = None) -> None:
        """The folder's files but the weights, as they are. size: of pictures, in pixels, in the place of theirs."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            file = self.folder / name
            if not file.is_file():
                continue
            text = file.read_text(encoding="utf-8")
            if name in PICTURES and size is not None:
                text = _resized(text, size)
            (folder / name).write_text(text, encoding="utf-8")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, KeyError) as error:  # what transformers raises for bad files
            what = f"{self.path} cannot be read: {_diffusers._first_line(error)}"
            raise RecipeError(what, where=WHERE, hint="Only safetensors are read.") from error


def _resized(text: str, size: Mapping[str, int]) -> str:
    whole = json.loads(text)
    part = whole.get("image_processor", whole)  # beside that for videos, or alone
    part["size"] = dict(size)
    for old in ("min_pixels", "max_pixels"):  # another way to say it, that older files have too
        part.pop(old, None)
    return json.dumps(whole, indent=2) + "\n"


def quiet() -> None:
    """No progress bars, of which transformers draws one for every file."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # their threads would not survive a fork, and warn


# ---- words -----------------------------------------------------------------------------------------------------------


def ends(net: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: those of the generation's configuration, the tokenizer's, and that of a turn."""
    listed = net.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    if END in tokenizer.get_vocab():
        found.add(tokenizer.convert_tokens_to_ids(END))
    return tuple(sorted(one for one in found if one is not None and one < net.get_input_embeddings().num_embeddings))


def marks(tokenizer: Any, text: str) -> list[str]:
    """The tokenizer's special marks in a text: with them, a prompt could end its turn or claim to be a picture."""
    special = (one.content for one in tokenizer.added_tokens_decoder.values() if one.special)
    return [one for one in special if one in text]


def unmarked(tokenizer: Any, text: str) -> str:
    """The text without special marks, and without those that appear when others are taken out."""
    while found := marks(tokenizer, text):
        for one in found:
            text = text.replace(one, "")
    return text


def chat(tokenizer: Any, system: str, content: Any, **options: Any) -> str:
    """A request as the model was trained to read it, up to where its answer starts."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    return text


def following(tokenizer: Any, content: Any, **options: Any) -> str:
    """What stands between an answer and the next one: the end of its turn, what the user says to it, and the beginning
    of the next. Of the checkpoint's own template; no answer changes it, nor what came before."""
    messages = [
        {"role": "user", "content": "-"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": content},
    ]
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    _, found, behind = text.partition(ANSWER)
    if not found:
        hint = "A conversation of several turns needs a template that does."
        raise RecipeError("the chat template does not write what the model answered", where=WHERE, hint=hint)
    return behind


def joined(answer: Sequence[int], behind: Sequence[int], ends: Sequence[int]) -> list[int]:
    """An answer as it was sampled, and what stands between it and the next. The token that ends its turn is there once:
    the answer's own, or where a limit or another token ended the answer, that of the template."""
    for place, token in enumerate(behind):
        if token in ends:
            return [*answer, *behind[place + 1 if [*answer[-1:]] == [token] else 0 :]]
    return [*answer, *behind]


def room(ids: Sequence[int], longest: int, prompt: int, hint: str = "") -> torch.Tensor:
    """[P] int64, once there is room for an answer behind it."""
    if len(ids) >= longest:
        what = f"the prompt has {len(ids)} tokens, and `longest` gives {longest} to prompt and answer together"
        more = f"Raise policy.backbone.longest, or shorten the prompt{hint}."
        raise DataError(what, where=f"prompt {prompt}", hint=more)
    return torch.tensor(ids, dtype=torch.int64)


def texts(tokenizer: Any) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """Answers -> what they say, without special marks."""

    def decode(answers: Sequence[Sequence[int]]) -> list[str]:
        return [tokenizer.decode(list(one), skip_special_tokens=True) for one in answers]

    return decode


def spelling(tokenizer: Any) -> Callable[[str], list[int]]:
    """What an answer says -> its ids and the token that ends it. Special marks in it are left out, as in a prompt."""
    end = tokenizer.convert_tokens_to_ids(END) if END in tokenizer.get_vocab() else tokenizer.eos_token_id

    def spell(text: str) -> list[int]:
        return [*tokenizer(unmarked(tokenizer, text), add_special_tokens=False).input_ids, end]

    return spell


# ---- memory ----------------------------------------------------------------------------------------------------------


def can_recompute(net: Any) -> None:
    """Give a network of transformers the two names by which those of diffusers are asked to compute activations again.

    transformers' own way does so in training mode alone, with dropout, and drops the keys and values that sampling
    keeps, gradient or none. This one does so wherever there is a gradient.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    def enable(self: nn.Module) -> None:
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = MethodType(_again, layer)

    net._supports_gradient_checkpointing = True
    net.enable_gradient_checkpointing = MethodType(enable, net)


def _again(layer: Any, *args: Any, **options: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_grad_enabled():
        return forward(layer, *args, **options)
    return checkpoint(forward, layer, *args, use_reentrant=False, **options)
