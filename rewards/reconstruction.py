"""Reconstruction: how much does the picture look like its source, in the eyes of frozen picture encoders?

Protocol: UAE's Unified-GRPO and its Unified-Bench (the paper's section on the reward, and its table 1): a source
picture is put into words, the words into a picture, and the two pictures are compared: the cosine of their embeddings.
The reward is CLIP's; Unified-Bench is the plain mean over CLIP, LongCLIP, DINOv2 and DINOv3, times 100.

Differences from the reference code:
* The paper names no checkpoints: the defaults here are ours, and so its table's numbers are not to be expected exactly.
* `clip_path: world` is the encoder that ships with rlkit, 0.4 M parameters made by `rlkit pretrain-encoder`: for the
  embedded world's 32x32 pictures of coloured shapes, and for nothing else. It hardly sees relations (left of, above).
* CLIP's vectors are those after the projection, DINO's the class token after the last norm.
* Values are -1..1: a recipe's `scale` makes per cents of them.
* Pictures are resized in floating point and not rounded to bytes in between: the paper's cold start trains the
  generator through this score. No gradient goes to the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlkit.embedding import Pictures, answer, check_dtype, load_pictures, nothing, spread, unscorable_pictures
from rlkit.errors import nearest

if TYPE_CHECKING:
    from rlkit.types import Prompt, Samples, Values

ENCODERS = ("clip", "longclip", "dinov2", "dinov3")


@dataclass(frozen=True)
class Reconstruction:
    """Likeness of the picture to its prompt's source: cosine in CLIP, LongCLIP, DINOv2 or DINOv3, with a gradient.

    Returns (values [N], {encoder: [N]}): the plain mean over `encoders`, and each of them. Not scored: a prompt without
    a source, and a source or a picture that no encoder can read.
    """

    encoders: tuple[str, ...] = ("clip",)  # Unified-GRPO's; Unified-Bench: [clip, longclip, dinov2, dinov3]
    clip_path: str = "openai/clip-vit-large-patch14"  # hub name or folder, as those below; world: the embedded world's
    longclip_path: str = "zer0int/LongCLIP-L-Diffusers"  # only its picture encoder is read
    dinov2_path: str = "facebook/dinov2-base"
    dinov3_path: str = "facebook/dinov3-vitb16-pretrain-lvd1689m"  # behind a licence that has to be accepted on the hub
    dtype: str = "fp32"  # or bf16

    reads = ("source",)
    range = (-1.0, 1.0)
    higher_is_better = True
    components = ("clip", "longclip", "dinov2", "dinov3")
    groupwise = False
    differentiable = True
    licence = "MIT (CLIP, LongCLIP), Apache-2.0 (DINOv2), DINOv3 License"
    size = "1.2 GB for clip; 3.1 GB for all four"
    protocol = "UAE: Unified-GRPO's reward and Unified-Bench"
    version = "1"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if not self.encoders:
            raise ValueError(f"encoders is empty; choose among {', '.join(ENCODERS)}")
        for name in self.encoders:
            if name not in ENCODERS:
                raise ValueError(f"encoder {name!r} is none of {', '.join(ENCODERS)}.{nearest(name, ENCODERS)}")
        if len(set(self.encoders)) < len(self.encoders):
            raise ValueError(f"encoders={list(self.encoders)} names one twice; the mean is over different ones")

    def load(self, device: torch.device) -> _Scorer:
        return _Scorer({name: load_pictures(self._path(name), device, self.dtype) for name in self.encoders})

    def _path(self, encoder: str) -> str:
        return {
            "clip": self.clip_path,
            "longclip": self.longclip_path,
            "dinov2": self.dinov2_path,
            "dinov3": self.dinov3_path,
        }[encoder]


@dataclass(frozen=True)
class _Scorer:
    encoders: Mapping[str, Pictures]

    def __call__(self, samples: Samples) -> tuple[Values, dict[str, Tensor]]:
        n, media = len(samples), samples.media
        reasons = unscorable_pictures(media) | unscorable_sources(samples.prompts)
        rows = [row for row in range(n) if row not in reasons]
        if not rows:
            return answer(nothing(media), reasons), {name: nothing(media).detach() for name in self.encoders}
        pictures = media if len(rows) == n else media[rows]
        sources, which = distinct([samples.prompts[row].source for row in rows])
        parts = {}
        for name, encoder in self.encoders.items():
            wanted = torch.cat([encoder(source.detach()[None]) for source in sources])  # one by one: sizes differ
            cosine = (encoder(pictures) * wanted[which]).sum(-1)
            parts[name] = spread(cosine.to(media.device), reasons, n)
        values = torch.stack(list(parts.values())).mean(0)
        return answer(values, reasons), {name: part.detach() for name, part in parts.items()}


def unscorable_sources(prompts: Sequence[Prompt]) -> dict[int, str]:
    reasons = {}
    for row, prompt in enumerate(prompts):
        source = prompt.source
        if source is None:
            reasons[row] = "the prompt has no source picture"
        elif source.ndim != 3 or source.shape[0] != 3:
            reasons[row] = f"the source is {list(source.shape)}, not [3, H, W]"
        elif not torch.isfinite(source).all():
            reasons[row] = "the source has pixels that are not finite"
    return reasons


def distinct(sources: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The different pictures, and for each source which of them it is. A group shares its source, by value at least."""
    found: dict[tuple[object, ...], int] = {}
    pictures: list[Tensor] = []
    known: dict[int, int] = {}  # the same object need not be read again
    which = []
    for source in sources:
        assert source is not None  # those without are not scored
        if id(source) not in known:
            pixels = source.detach().to("cpu", torch.float32).contiguous().numpy()
            key = (*source.shape, hashlib.blake2b(pixels.tobytes()).digest())
            if key not in found:
                found[key] = len(pictures)
                pictures.append(source)
            known[id(source)] = found[key]
        which.append(known[id(source)])
    return pictures, which
