"""PickScore: which picture would people pick for this prompt?

Protocol: Kirstain et al. 2023 (arXiv 2305.01569, github.com/yuvalkirstain/PickScore): a CLIP ViT-H/14 fine-tuned on
people's choices; the score is exp(logit_scale) times the cosine of picture and prompt.

Differences from the reference code:
* It turns the scores of several pictures into probabilities by a softmax over them; here each picture has its own
  score, which is what training on it needs.
* Prompts are encoded once each, and each picture is multiplied with its own prompt only.
* The picture is resized in floating point and not rounded to bytes in between, so that a gradient can pass.
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
class PickScore:
    """People's preference as PickScore learnt it, about 16 to 24, with a gradient.

    The numbers are the protocol's own. Others divide them by 26 to come near 0..1 (Flow-GRPO, Flow-Factory, verl-omni):
    in a recipe, `scale: 0.03846`. Returns (values [N], {"truncated": [N]}): 1 where the end of a prompt was cut off,
    after 77 tokens. Not scored: an empty prompt, and a picture with pixels that are not finite.
    """

    model: str = "yuvalkirstain/PickScore_v1"  # hub name or folder
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the same, of tokenizer and preprocessing
    dtype: str = "fp32"  # or bf16

    reads = ("prompt",)
    range = (-101.0, 101.0)
    higher_is_better = True
    components = ("truncated",)
    groupwise = False
    differentiable = True
    licence = "MIT"
    size = "4 GB"
    protocol = "PickScore, arXiv 2305.01569, not divided by 26"
    version = "1"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def load(self, device: torch.device) -> _Scorer:
        return _Scorer(load_clip(self.model, device, self.dtype, self.processor or self.model))


@dataclass(frozen=True)
class _Scorer:
    clip: Clip

    def __call__(self, samples: Samples) -> tuple[Values, dict[str, Tensor]]:
        return self.clip.agreement(samples, self.clip.temperature)
