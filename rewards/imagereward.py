"""ImageReward: what people would prefer, by BLIP with a small head (Xu et al. 2023, THUDM/ImageReward).

BLIP's picture encoder (ViT-L/16 at 224 pixels) and its text encoder (BERT's size), which looks at the picture by
cross-attention. The first token's last hidden state goes through five linear layers, without activations between them,
to one number r; the value is (r - 0.16717) / 1.03334, which has mean 0 and deviation 1 on the authors' data and lies
about between -2 and 2. The text encoder reads 35 tokens; of a longer prompt it does not see the end, which is logged.

Here on transformers' BLIP classes, whose layers are the same; the published weights are renamed, and every tensor has
to be there and of its shape. The published numbers have not been compared with.

Differences from the reference code
* Pictures go through the encoders together, and the prompts of a group are tokenised once.
* Text in a prompt that reads like a special token ([SEP], [CLS]) stays text; the reference takes it for one.
* Weights are read as tensors only (`weights_only`), strictly; the reference reads pickles, and skips what does not fit.
* Left out: the two projections to BLIP's common space and the two tokens added to the vocabulary. No score uses them.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlkit.embedding import load_state, load_tokenizer
from rlkit.errors import RewardError
from rlkit.pictures import PictureError, to_pil
from rlkit.types import Unscored

if TYPE_CHECKING:
    from PIL import Image

    from rlkit.types import Samples

log = logging.getLogger(__name__)

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the head's numbers on the authors' data
LENGTH = 35  # tokens, with the first and the last
SIDE = 224  # pixels
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
VOCABULARY = 30524  # of bert-base-uncased, and two that are not used here
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")
NAMES = (  # in this order: (published, here)
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.", r"vision.encoder.layers.\1."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\.encoder\.layers\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
)


@dataclass(frozen=True)
class ImageReward:
    """How much people would prefer the picture for its prompt (ImageReward, BLIP-large); about -2 to 2.

    Reads the first 35 tokens of a prompt. A sample with an empty prompt is not scored.
    """

    weights: str = "THUDM/ImageReward/ImageReward.pt"  # a file, or OWNER/REPOSITORY/FILE on the hub
    tokenizer: str = "google-bert/bert-base-uncased"  # hub name or folder

    reads = ("prompt",)
    range = (None, None)
    higher_is_better = True
    components = ()
    groupwise = False
    licence = "Apache-2.0"
    size = "1.8 GB"
    protocol = "Xu et al. 2023, github.com/THUDM/ImageReward"
    version = "1"

    def load(self, device: torch.device) -> _Scorer:
        tokenizer = load_tokenizer(self.tokenizer)
        if len(tokenizer) + 2 != VOCABULARY:
            what = f"the tokenizer has {len(tokenizer)} tokens and should have {VOCABULARY - 2}"
            raise RewardError(what, hint="Give `tokenizer` that of bert-base-uncased.")
        network = _Network()
        _fill(network, self.weights)
        return _Scorer(network.to(device).eval().requires_grad_(False), _Words(tokenizer))


# ------------------------------------------------------------------------------------------------- the network


class _Network(nn.Module):
    """The two encoders and the head."""

    def __init__(self) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision = BlipVisionConfig(**VISION, image_size=SIDE, patch_size=16, layer_norm_eps=1e-6)
        text = BlipTextConfig(
            **TEXT,
            encoder_hidden_size=VISION["hidden_size"],
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            layer_norm_eps=1e-12,
            is_decoder=True,  # gives it cross-attention
            bos_token_id=None,
            sep_token_id=None,
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = nn.Sequential(
            nn.Linear(TEXT["hidden_size"], 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """[N]. pixels: [N, 3, side, side], normalised; tokens: [N, length], 0 where there is none."""
        seen = self.vision(pixel_values=pixels).last_hidden_state  # [N, patches + 1, width]
        read = self.text(
            input_ids=tokens,
            attention_mask=(tokens != 0).long(),
            encoder_hidden_states=seen,
            is_decoder=False,  # every token sees every other
        ).last_hidden_state
        return ((self.head(read[:, 0]) - MEAN) / DEVIATION).squeeze(1)


def _fill(network: nn.Module, weights: str) -> None:
    """The published tensors, under the names that they have here."""
    try:
        state = load_state(weights)
        named = {_renamed(name): tensor for name, tensor in state.items() if not UNUSED.fullmatch(name)}
        network.load_state_dict(named)  # strict: it names what is missing, unexpected, or of another shape
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        what = f"{weights} does not hold the weights of ImageReward: {error}"
        raise RewardError(what, hint="Use ImageReward.pt.") from error


def _renamed(name: str) -> str:
    for published, here in NAMES:
        name = re.sub(published, here, name)
    return name


# --------------------------------------------------------------------------------------------------- scoring


class _Words:
    """Prompts as tokens, cut and filled up to LENGTH."""

    def __init__(self, tokenizer: Any) -> None:
        self.first, self.last = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.backend = tokenizer.backend_tokenizer  # its encode changes nothing, so threads may share it
        self.backend.encode_special_tokens = True  # what reads like a special token in a prompt is text
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, text: str) -> tuple[list[int], bool]:
        """(LENGTH tokens, whether the end is cut off)."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        tokens = [self.first, *ids[: LENGTH - 2], self.last]
        return tokens + [0] * (LENGTH - len(tokens)), len(ids) > LENGTH - 2


@dataclass(frozen=True)
class _Scorer:
    """The model, loaded. One call is one batch: the recipe's `batch` bounds the memory."""

    network: nn.Module
    words: _Words
    told: set[str] = field(default_factory=set)  # prompts whose cut is logged already

    @torch.inference_mode()
    def __call__(self, samples: Samples) -> list[float | Unscored]:
        values: list[float | Unscored] = [Unscored("the prompt is empty")] * len(samples)
        pictures, texts, rows = [], [], []
        for row, prompt in enumerate(samples.prompts):
            if not prompt.text.strip():
                continue
            try:
                pictures.append(_pixels(to_pil(samples.media[row])))
            except PictureError as error:
                values[row] = Unscored(str(error))
                continue
            texts.append(prompt.text)
            rows.append(row)
        if rows:
            device = next(self.network.parameters()).device
            numbers = self.network(torch.stack(pictures).to(device), self.tokens(texts).to(device))
            for row, number in zip(rows, numbers.tolist(), strict=True):
                values[row] = number
        return values

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """[N, LENGTH]; every text is encoded once."""
        encoded = {text: self.words(text) for text in dict.fromkeys(texts)}
        for text, (_, cut) in encoded.items():
            if cut and text not in self.told:
                self.told.add(text)
                log.warning("ImageReward reads %d tokens, and not the end of this prompt: %r", LENGTH, text)
        return torch.tensor([encoded[text][0] for text in texts])


def _pixels(picture: Image.Image) -> Tensor:
    """[3, SIDE, SIDE]: the middle square of the picture, its shorter side resized to SIDE, normalised."""
    from PIL import Image

    width, height = (int(SIDE * side / min(picture.size)) for side in picture.size)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    pixels = torch.from_numpy(np.array(resized)).movedim(-1, 0)  # [3, SIDE, SIDE] bytes
    mean, deviation = (torch.tensor(one)[:, None, None] for one in (PIXEL_MEAN, PIXEL_DEVIATION))
    return (pixels.float() / 255 - mean) / deviation
