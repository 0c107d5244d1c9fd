"""What backbones that load a diffusers pipeline folder have in common: opening it, latents, schedules, sizes, words.

A folder is what `save_pretrained` of a pipeline leaves: `model_index.json` names the pipeline's class and the class of
each part, and every part has a sub-folder. It is read from disk or fetched from the Hugging Face hub. Before anything
large is fetched or read, the index has to fit the family that asks. Weights are safetensors only, no code is run from a
folder, and weights that are missing or left over are errors: a network that is partly random would train, badly.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlkit import registry
from rlkit.errors import RecipeError

WHERE = "policy.backbone.path"
NOT_FETCHED = [
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.msgpack",
    "*.h5",
    "*.onnx*",
    "*.fp16.*",
    "*.bf16.*",
    "*.non_ema.*",
]


# ---- a folder --------------------------------------------------------------------------------------------------------


def opened(path: str, revision: str | None, pipelines: Sequence[str], parts: Sequence[str]) -> Checkpoint:
    """The checkpoint at a folder or hub name, once its index says that it is of one of these pipeline classes.

    parts: the sub-folders that are needed; of a hub repository nothing else is fetched.
    """
    quiet()
    local = Path(path).expanduser()
    if not local.is_dir():
        index = _index(Path(_fetched(path, revision, ["model_index.json"])), path, pipelines)
        return Checkpoint(
            Path(_fetched(path, revision, ["model_index.json", *(f"{one}/*" for one in parts)])), path, index
        )
    if revision is not None:
        hint = "Leave `revision` out, or give the name of a hub repository as `path`."
        raise RecipeError(f"{path} is a folder and has no revision {revision!r}", where=WHERE, hint=hint)
    return Checkpoint(local, path, _index(local, path, pipelines))


def _index(folder: Path, path: str, pipelines: Sequence[str]) -> Mapping[str, Any]:
    """model_index.json. A RecipeError if there is none, or if it is of another family: then which backbone fits."""
    file = folder / "model_index.json"
    if not file.is_file():
        alone = folder / "config.json"
        found = ", which is one model: its pipeline's folder is needed" if alone.is_file() else ""
        raise RecipeError(
            f"{path} has no model_index.json{found}", where=WHERE, hint="Give a diffusers pipeline folder."
        )
    try:
        index: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{file} is not the index of a diffusers pipeline", where=WHERE) from error
    if name not in pipelines:
        fitting = [one.name for one in registry.describe("backbones") if name in one.constants.get("pipelines", ())]
        hint = f"Use the backbone {' or '.join(map(repr, fitting))}." if fitting else "No backbone reads such a one."
        raise RecipeError(
            f"{path} is a {name}, and this backbone reads {' or '.join(pipelines)}", where=WHERE, hint=hint
        )
    return index


def _fetched(path: str, revision: str | None, patterns: list[str]) -> str:
    """The folder of a hub repository's files of these patterns, downloaded unless they are there."""
    from httpx import HTTPError
    from huggingface_hub import errors, snapshot_download

    at = f"{path!r}" if revision is None else f"{path!r} at revision {revision!r}"
    try:
        return snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_FETCHED)
    except errors.GatedRepoError as error:
        hint = f"Accept it at https://huggingface.co/{path}, then run: hf auth login"
        raise RecipeError(
            f"the hub gives {at} only to those who accepted its licence", where=WHERE, hint=hint
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise RecipeError(f"{at} is neither a folder here nor a repository of the hub", where=WHERE) from error
    except errors.RevisionNotFoundError as error:
        raise RecipeError(f"the hub has no {at}", where=WHERE, hint="Leave `revision` out for the newest.") from error
    except (OSError, HTTPError) as error:  # no network, offline mode, a server's failure
        what = f"{at} is no folder here, and the hub cannot be asked for it: {_first_line(error)}"
        hint = "Without a network, give a folder, or fetch it before into the cache: hf download " + path
        raise RecipeError(what, where=WHERE, hint=hint) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline folder whose index fits."""

    folder: Path
    path: str  # as the recipe gave it
    index: Mapping[str, Any]

    @property
    def pipeline(self) -> str:
        """The class of the pipeline."""
        return str(self.index["_class_name"])

    def has(self, part: str) -> bool:
        """Whether the folder has this part: some are optional, and may be left out of the index or be null."""
        return bool((self.index.get(part) or [None])[0])

    def net(self, part: str, kind: type, device: torch.device, dtype: torch.dtype) -> Any:
        """A diffusers network with exactly the weights that its class has, in evaluation mode."""
        model, info = self._loaded(part, kind, {"torch_dtype": dtype})
        left = sorted(info["unexpected_keys"])
        if left:
            raise RecipeError(f"{self.path}/{part} has weights that {kind.__name__} has not: {_few(left)}", where=WHERE)
        return model.to(device).eval()

    def frozen(self, part: str, kind: type, device: torch.device, dtype: torch.dtype) -> Any:
        """A text encoder or an autoencoder, without gradient. Heads that it does not use may be left over."""
        from diffusers import ModelMixin

        model, _ = self._loaded(part, kind, {"torch_dtype" if issubclass(kind, ModelMixin) else "dtype": dtype})
        return model.to(device).eval().requires_grad_(False)

    def plain(self, part: str, kind: type[Any]) -> Any:
        """What has no weights: a tokenizer, a processor, a scheduler."""
        with self._reading(part):
            return kind.from_pretrained(self.folder / part)

    def _loaded(self, part: str, kind: Any, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        self._check_class(part, kind)
        with self._reading(part):
            model, info = kind.from_pretrained(
                self.folder / part, use_safetensors=True, output_loading_info=True, **options
            )
        missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
        if missing:
            raise RecipeError(f"{self.path}/{part} lacks weights of {kind.__name__}: {_few(missing)}", where=WHERE)
        return model, info

    def _check_class(self, part: str, kind: type) -> None:
        file = self.folder / part / "config.json"
        if not file.is_file():
            raise RecipeError(f"{self.path} has no {part}/config.json", where=WHERE, hint="The folder is not whole.")
        config = json.loads(file.read_text(encoding="utf-8"))
        found = [config["_class_name"]] if "_class_name" in config else config.get("architectures") or [kind.__name__]
        listed = self.index.get(part) or [None, None]
        if kind.__name__ not in (*found, listed[1]):
            what = f"{self.path}/{part} is a {' or '.join(found)}, and this backbone reads {kind.__name__}"
            raise RecipeError(what, where=WHERE)

    @contextmanager
    def _reading(self, part: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError, KeyError) as error:  # what the two libraries raise for bad files
            what = f"{self.path}/{part} cannot be read: {_first_line(error)}"
            raise RecipeError(what, where=WHERE, hint="Only safetensors are read.") from error


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def quiet() -> None:
    """No progress bars of diffusers and transformers: they draw one for every file."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # their threads would not survive a fork, and warn


# ---- sizes -----------------------------------------------------------------------------------------------------------


def check_size(size: tuple[int, int], multiple: int) -> None:
    """A ValueError with the nearest sizes that fit, unless height and width are multiples of this many pixels."""
    if all(side > 0 and side % multiple == 0 for side in size):
        return
    near = tuple(max(multiple, round(side / multiple) * multiple) for side in size)
    raise ValueError(f"size must be two multiples of {multiple} (height, width), not {list(size)}: try {list(near)}")


def latent_shape(
    channels: int, size: tuple[int, int], factor: int, multiple: int | None = None
) -> tuple[int, int, int]:
    """(C, H, W) of latents whose pixels are `factor` wide; the pixels' sides must be multiples of `multiple`.

    For what only the checkpoint's own configuration tells; `check_size` is for what the family's is known to be."""
    try:
        check_size(size, multiple or factor)
    except ValueError as error:
        raise RecipeError(f"for this checkpoint {error}", where="policy.backbone.size") from error
    return channels, size[0] // factor, size[1] // factor


# ---- latents ---------------------------------------------------------------------------------------------------------


def packed(x: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 * W/2, 4 C]: each 2x2 patch, channels slowest, as the FLUX and Qwen families."""
    n, channels, height, width = x.shape
    tiles = x.reshape(n, channels, height // 2, 2, width // 2, 2)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(n, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, H/2 * W/2, 4 C] -> [B, C, H, W]."""
    n, _, channels = tokens.shape
    tiles = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, height, width)


def grid_ids(height: int, width: int, first: int = 0, like: Tensor | None = None) -> Tensor:
    """[height * width, 3]: (first, row, column) of each token, for rotary positions as FLUX has them."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.full_like(rows, first), rows, columns], dim=-1).reshape(height * width, 3)
    return ids.float() if like is None else ids.to(like.device, like.dtype)


def decode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Latents [N, C, h, w] -> pictures [N, 3, H, W] in 0..1, fp32, by an AutoencoderKL. The gradient flows through."""
    scale, shift = _scale_and_shift(vae)

    def decode(latents: Tensor) -> Tensor:
        codes = latents.to(vae.device, vae.dtype) / scale + shift
        pictures: Tensor = vae.decode(codes, return_dict=False)[0]
        return (pictures.float() * 0.5 + 0.5).clamp(0, 1)

    return decode


def encode_with(vae: Any) -> Callable[[Tensor], Tensor]:
    """Pictures [N, 3, H, W] in 0..1 -> latents [N, C, h, w] fp32: the mode of an AutoencoderKL's distribution."""
    scale, shift = _scale_and_shift(vae)

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        pixels = (2 * pictures - 1).to(vae.device, vae.dtype)
        codes: Tensor = vae.encode(pixels).latent_dist.mode()
        return ((codes - shift) * scale).float()

    return encode


def _scale_and_shift(vae: Any) -> tuple[float, float]:
    if vae.config.latents_mean is not None or vae.config.latents_std is not None:
        raise RecipeError("this autoencoder normalises each channel by itself, which is not read here", where=WHERE)
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


def vae_factor(vae: Any) -> int:
    """Pixels a side of one latent pixel of an AutoencoderKL."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def drawn(pipeline: Any, **options: Any) -> Tensor:
    """What a diffusers pipeline draws with these options: pictures [N, 3, H, W] in 0..1, fp32."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), _in_its_own_type(pipeline.vae):
        pictures: Tensor = pipeline(**options, output_type="pt").images
    return pictures.float()


@contextmanager
def _in_its_own_type(vae: Any) -> Iterator[None]:
    """The autoencoder is given its own data type: it stays in fp32 where a pipeline has all the rest in bf16."""

    def cast(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda given, *more, **named: call(given.to(vae.dtype), *more, **named)

    vae.encode, vae.decode = cast(vae.encode), cast(vae.decode)
    try:
        yield
    finally:
        del vae.encode, vae.decode  # the class's own are there again


# ---- schedules -------------------------------------------------------------------------------------------------------


def mu_of(scheduler: Any, tokens: int, largest: float = 1.15) -> float | None:
    """The shift for pictures of this many tokens, a line between two points of the scheduler's configuration.

    None where the scheduler has a fixed shift. `largest` stands in for a `max_shift` that the configuration lacks.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", largest)
    slope = (high - low) / (many - few)
    return float(tokens * slope + low - slope * few)


def sigmas_with(scheduler: Any, mu: float | None = None, even: bool = True) -> Callable[[int], Tensor]:
    """steps -> [steps+1] fp32 of a FlowMatchEulerDiscreteScheduler, shifted as it is configured, down to 0.

    even: it is given 1, 1 - 1/steps, ..., 1/steps to shift, as most pipelines do; else it spaces them itself.
    """
    import numpy as np

    def sigmas(steps: int) -> Tensor:
        if even:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        else:
            scheduler.set_timesteps(steps, mu=mu)
        result: Tensor = scheduler.sigmas.to("cpu", torch.float32).clone()
        return result

    return sigmas


# ---- words and layers ------------------------------------------------------------------------------------------------


def clip_states(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Of one of CLIP's text encoders: its hidden states but for the last layer [N, L, D], and its first output: the
    projected end token [N, P] where it has a projection."""
    ids = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2], output[0]


def t5_states(encoder: Any, tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """[N, length, D] of a T5 encoder that reads its padding too, as diffusers' pipelines have it."""
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    states: Tensor = encoder(tokenizer(list(texts), **options).input_ids.to(encoder.device))[0]
    return states


def cut_words(tokenizer: Any, text: str, longest: int) -> list[str]:
    """The words of a text that are lost, in whole or part, when it is cut to `longest` tokens with the special ones."""
    every = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    if len(every) <= longest:
        return []
    kept = tokenizer(text, truncation=True, max_length=longest, return_offsets_mapping=True)["offset_mapping"]
    end = max(last for _, last in kept)
    return [match.group() for match in re.finditer(r"\S+", text) if match.end() > end]


def present(net: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """The LoRA targets, once each is known to be the end of the name of a linear layer."""
    names = [f".{name}" for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    lost = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if lost:
        raise RecipeError(
            f"{type(net).__name__} has no linear layers called {', '.join(lost)}", where="policy.backbone"
        )
    return tuple(targets)
