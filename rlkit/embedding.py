"""Frozen encoders: pictures, and texts for CLIP, as unit vectors. What the rewards that compare such vectors share.

Weights are frozen, so a gradient is kept for a picture that asks for one, and for nothing else. Vectors are fp32
whatever the network runs in: bf16 keeps three digits, and the members of a group differ in the third.
Not here: what a reward makes of the vectors.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlkit.errors import RewardError
from rlkit.preprocessing import Preprocessing
from rlkit.types import Samples, Unscored, Values

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOWERS = {  # the picture encoder in each kind of checkpoint
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "dinov2": "Dinov2Model",
    "dinov3_vit": "DINOv3ViTModel",
}
WORLD = Path(__file__).parent / "backbones" / "world_encoder_base"  # what `rlkit pretrain-encoder` made
AT_ONCE = 64  # pictures or texts in one pass, so that memory does not grow with the number of samples


def check_dtype(name: str) -> None:
    """For a reward's `__post_init__`."""
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r} is none of {', '.join(DTYPES)}; fp32 is exact, bf16 is quicker on a GPU")


def feature_tensor(output: Any) -> Tensor:
    """The vectors [N, E] in what a network returned: transformers 5 wraps what it used to return as a tensor."""
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "text_embeds", "pooler_output"):  # a tower without projection has only the last
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise TypeError(f"a {type(output).__name__} holds no embedding; choose a checkpoint of CLIP, DINOv2 or DINOv3")


def unit(vectors: Tensor) -> Tensor:
    """[N, E] -> [N, E] fp32 of length 1."""
    return functional.normalize(vectors.float(), dim=-1)


def unscorable_pictures(media: Tensor) -> dict[int, str]:
    """Row -> why, for pictures that no encoder can read. ValueError for what are not pictures at all."""
    if media.ndim != 4 or media.shape[1] != 3:
        raise ValueError(f"pictures are [N, 3, H, W] in 0..1, not {list(media.shape)}")
    broken = ~torch.isfinite(media.detach()).flatten(1).all(dim=1)
    return dict.fromkeys(torch.nonzero(broken).flatten().tolist(), "the picture has pixels that are not finite")


def nothing(media: Tensor) -> Tensor:
    """[N] NaN: no picture is scored. Where a gradient is asked for, it is 0."""
    return torch.where(
        torch.zeros(len(media), dtype=torch.bool, device=media.device), media.flatten(1).sum(1), math.nan
    )


def spread(scored: Tensor, reasons: Mapping[int, str], n: int) -> Tensor:
    """[n] with the numbers of the rows that have no reason against them, in their order, and NaN elsewhere."""
    rows = torch.tensor([row for row in range(n) if row not in reasons], dtype=torch.int64, device=scored.device)
    return torch.full((n,), math.nan, device=scored.device).index_put((rows,), scored)


def answer(values: Tensor, reasons: Mapping[int, str]) -> Values:
    """What a reward returns: [N] numbers, with the reason in the place of a missing one where no gradient is asked."""
    if not reasons or values.requires_grad:
        return values
    return [Unscored(reasons[row]) if row in reasons else value for row, value in enumerate(values.tolist())]


@dataclass(frozen=True)
class Pictures:
    """A frozen picture encoder: media [N, 3, H, W] in 0..1 of any size -> [N, E] unit vectors on its device."""

    features: Callable[[Tensor], Any]
    preprocessing: Preprocessing
    device: torch.device
    dtype: torch.dtype

    def __call__(self, media: Tensor) -> Tensor:
        return torch.cat([self._vectors(some) for some in media.split(AT_ONCE)])

    def _vectors(self, media: Tensor) -> Tensor:
        pixels = self.preprocessing(media.to(self.device, torch.float32))
        return unit(feature_tensor(self.features(pixels.to(self.dtype))))


@dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP model."""

    pictures: Pictures
    text_features: Callable[..., Any]  # (input_ids=, attention_mask=) -> features
    tokenizer: Any
    longest: int  # tokens that the text tower can read, begin and end included
    temperature: float  # exp(logit_scale), read before the weights were rounded to bf16
    lock: Any = field(default_factory=threading.Lock)  # a tokenizer keeps the length it cuts at as state

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[N, E] unit vectors and [N] fp32, 1 where a text was too long and its end was cut off. Each text is encoded
        once, however often it comes: the members of a group share theirs."""
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        tokens, cut = self._tokens(list(place))
        found = [self.text_features(input_ids=ids, attention_mask=seen) for ids, seen in tokens]
        vectors = torch.cat([unit(feature_tensor(one)) for one in found])
        rows = torch.tensor([place[text] for text in texts], device=vectors.device)
        return vectors[rows], torch.tensor(cut, device=vectors.device)[rows].float()

    def _tokens(self, texts: list[str]) -> tuple[list[tuple[Tensor, Tensor]], list[bool]]:
        """Batches of (ids, attention mask), each [n, L], and whether each text lost its end."""
        batches, cut = [], []
        for first in range(0, len(texts), AT_ONCE):
            some = texts[first : first + AT_ONCE]
            with self.lock:
                whole = self.tokenizer(some, verbose=False)["input_ids"]
                short = self.tokenizer(
                    some,
                    padding=True,
                    padding_side="right",  # the mask is causal: what stands behind the end is not seen
                    truncation=True,
                    max_length=self.longest,
                    return_tensors="pt",
                )
            cut += [len(ids) > self.longest for ids in whole]
            device = self.pictures.device
            batches.append((short["input_ids"].to(device), short["attention_mask"].to(device)))
        return batches, cut

    def agreement(self, samples: Samples, scale: float = 1.0) -> tuple[Values, dict[str, Tensor]]:
        """`scale` times the cosine of each picture with its own prompt, and {"truncated": [N]}, 1 where the prompt was
        cut off. A prompt without words has no direction that means anything, so it is not scored."""
        n, device = len(samples), samples.media.device
        reasons = unscorable_pictures(samples.media)
        blank = [row for row, prompt in enumerate(samples.prompts) if not prompt.text.strip()]
        reasons |= dict.fromkeys(blank, "the prompt is empty, so there is nothing to compare the picture with")
        rows = [row for row in range(n) if row not in reasons]
        if not rows:
            return answer(nothing(samples.media), reasons), {"truncated": nothing(samples.media).detach()}
        pictures = self.pictures(samples.media if len(rows) == n else samples.media[rows])
        texts, cut = self.texts([samples.prompts[row].text for row in rows])
        values = scale * (pictures * texts).sum(-1)  # row by row: no [N, N] of which only the diagonal is wanted
        truncated = spread(cut.to(device), reasons, n)
        return answer(spread(values.to(device), reasons, n), reasons), {"truncated": truncated}


# --------------------------------------------------------------------------------------------------- loading


def load_clip(name: str, device: torch.device, dtype: str, processor: str = "") -> Clip:
    """A CLIP checkpoint by hub name or folder. `processor`: where its tokenizer and preprocessing are, if elsewhere."""
    from transformers import CLIPModel

    network = load_network(CLIPModel, name)
    return clip_of(network, load_tokenizer(processor or name), preprocessing_of(processor or name), device, dtype)


def clip_of(network: Any, tokenizer: Any, preprocessing: Preprocessing, device: torch.device, dtype: str) -> Clip:
    """A CLIPModel with fp32 weights, made ready."""
    temperature = float(network.logit_scale.detach().float().exp())
    frozen(network, device, dtype)
    pictures = Pictures(network.get_image_features, preprocessing, device, DTYPES[dtype])
    longest = network.config.text_config.max_position_embeddings
    return Clip(pictures, network.get_text_features, tokenizer, longest, temperature)


def load_pictures(name: str, device: torch.device, dtype: str) -> Pictures:
    """The picture encoder alone of a checkpoint of CLIP (LongCLIP too), DINOv2 or DINOv3; "world": the embedded
    world's, which ships with rlkit."""
    import transformers

    with _explained(name):
        config = transformers.AutoConfig.from_pretrained(_place(name))
    if config.model_type not in TOWERS:
        raise RewardError(f"{name!r} is a {config.model_type} checkpoint", hint=f"Known: {', '.join(TOWERS)}.")
    if config.model_type == "clip":  # the width of the projection stands outside, and inside often a default
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
        network = load_network(transformers.CLIPVisionModelWithProjection, name, config=config)
    else:
        network = load_network(getattr(transformers, TOWERS[config.model_type]), name)
    return Pictures(frozen(network, device, dtype), preprocessing_of(name), device, DTYPES[dtype])


def frozen(network: Any, device: torch.device, dtype: str) -> Any:
    return network.to(device, DTYPES[dtype]).eval().requires_grad_(False)


def load_network(kind: Any, name: str | None, **options: Any) -> Any:
    """A network of transformers in fp32. What the checkpoint lacks would be random numbers, so that is an error."""
    with _explained(name or "the state dict"), _quiet():
        place = None if name is None else _place(name)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        network, report = kind.from_pretrained(place, dtype=torch.float32, **options)
    lacking = sorted({*report["missing_keys"], *(weight for weight, *_ in report["mismatched_keys"])})
    if lacking:
        what = f"{name!r} lacks {len(lacking)} weights of a {kind.__name__}, for instance {lacking[0]!r}"
        raise RewardError(what, hint="Choose a checkpoint of that architecture.")
    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without a line for each weight of a tower that is not wanted; what is missing is reported by us."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    with _explained(name):
        return AutoTokenizer.from_pretrained(_place(name))


def preprocessing_of(name: str) -> Preprocessing:
    from transformers.image_processing_base import ImageProcessingMixin  # reads the file and builds nothing

    with _explained(name):
        config, _ = ImageProcessingMixin.get_image_processor_dict(_place(name))
    try:
        return Preprocessing.from_config(config)
    except KeyError as error:
        raise RewardError(f"the preprocessor_config.json of {name!r} has no {error}") from error
    except ValueError as error:
        raise RewardError(f"the preprocessor_config.json of {name!r}: {error}") from error


def load_state(place: str) -> dict[str, Tensor]:
    """The tensors in a file: a path, or OWNER/REPOSITORY/FILE on the hub. Tensors only: nothing in it is executed."""
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    with _explained(place):
        file = Path(place).expanduser()
        if not file.is_file():
            parts = place.split("/", 2)
            if place.startswith((".", "~", "/")) or len(parts) < 3:
                raise FileNotFoundError("there is no such file")
            file = Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2]))
    if file.suffix == ".safetensors":
        return load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    return dict(state.get("state_dict", state))


def _place(name: str) -> str:
    if name == "world":
        return str(WORLD)
    if name.startswith((".", "~", "/")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError("there is no such folder")
    return str(Path(name).expanduser()) if name.startswith("~") else name


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Around reading a checkpoint: what was looked for, and how to get it."""
    try:
        yield
    except OSError as error:
        first = str(error).strip().partition("\n")[0]
        hint = "Check the path."
        if not name.startswith((".", "~", "/")):
            repository = " ".join(["/".join(name.split("/")[:2]), *name.split("/", 2)[2:]])
            hint = f"Give the path of a copy, or fetch it where there is a network: hf download {repository}"
        raise RewardError(f"cannot read {name!r}: {first}", hint=hint) from error
