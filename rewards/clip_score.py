"""CLIPScore: does the picture go with its prompt, in the eyes of CLIP?

Protocol: Hessel et al. 2021 (arXiv 2104.08718), as used online by DiffusionNFT: the cosine of CLIP's embeddings of the
picture and of its own prompt.

Differences from the reference code:
* The paper clips at 0 and multiplies by 2.5, torchmetrics multiplies by 100. Neither is done here: a recipe's `scale`
  and `clip` do it.
* The picture is resized in floating point and not rounded to bytes in between, so that a gradient can pass.
* A prompt that is longer than the text tower reads is cut at the same place as there, but shows in `truncated`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlkit.embedding import Clip, check_dtype, load_clip

if TYPE_CHECKING:
    from rlkit.types import Samples, Values


@dataclass(frozen=True)
class ClipScore:
    """Cosine of CLIP's embeddings of picture and prompt, with a gradient.

    It sees what is in the picture better than how many, where, and in which colour. Returns (values [N],
    {"truncated": [N]}): 1 where the end of a prompt was cut off, after 77 tokens for most checkpoints. Not scored: an
    empty prompt, and a picture with pixels that are not finite.
    """

    model: str = "openai/clip-vit-large-patch14"  # hub name or folder; zer0int/LongCLIP-L-Diffusers reads 248 tokens
    processor: str = ""  # hub name or folder of tokenizer and preprocessing; "": that of the model
    logits: bool = False  # multiply by the checkpoint's exp(logit_scale), about 100
    dtype: str = "fp32"  # or bf16

    reads = ("prompt",)
    range = (-1.0, 1.0)
    higher_is_better = True
    components = ("truncated",)
    groupwise = False
    differentiable = True
    licence = "MIT (openai/clip-vit-large-patch14)"
    size = "1.7 GB"
    protocol = "CLIPScore, arXiv 2104.08718, without its factor 2.5"
    version = "1"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.logits:
            object.__setattr__(self, "range", (-100.0, 100.0))  # CLIP's training keeps the factor at 100 or below

    def load(self, device: torch.device) -> _Scorer:
        clip = load_clip(self.model, device, self.dtype, self.processor)
        return _Scorer(clip, clip.temperature if self.logits else 1.0)


@dataclass(frozen=True)
class _Scorer:
    clip: Clip
    scale: float

    def __call__(self, samples: Samples) -> tuple[Values, dict[str, Tensor]]:
        return self.clip.agreement(samples, self.scale)
