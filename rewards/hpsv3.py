"""HPSv3: what people would prefer, by a vision-language model with a small head (Ma et al. 2025, MizzenAI/HPSv3).

Qwen2-VL-7B reads one user turn: the picture, an instruction, the prompt, and the token `<|Reward|>`. The hidden state
at that token goes through a head in fp32 (hidden -> 1024 -> 16 -> 2), which gives a Gaussian over preference: the value
is its mean mu, the component `sigma` its deviation. mu has no bounds: published means of whole models go from -0.2
(SD2) to 10.6 (Kolors), so a recipe scales it, by 0.1 or 1/15 for instance.

PARITY WITH THE PUBLISHED NUMBERS IS NOT CERTIFIED: this code has not been run beside the published one, which is tied
to transformers 4.45. And the instruction is part of the protocol, of which the built-in one has the structure in other
words: it ranks alike at best. For published numbers, name in `template` a file with the published wording, instruction
and closing sentence, verbatim, blank lines included, with `{text_prompt}` and `<|Reward|>` in their places.

Every token, those of the picture too, has its plain place in the sequence for a position. The published model calls the
language model without positions, and transformers 4.45 then counts; versions that work out Qwen2-VL's own
three-dimensional positions give other numbers than the head was trained on.

Differences from the reference code
* What follows `<|Reward|>` (END, the end of the turn) is left out: attention is causal, so it changes nothing.
* Text in a prompt that reads like a special token stays text. The reference takes it for one: a prompt with
  `<|Reward|>` in it breaks there.
* `sigma` is the standard deviation. The reference returns its logarithm, as the head gives it.
* Attention is always torch's (sdpa); the reference changes to flash-attention where that is installed.
* Only pictures in memory: no paths, no addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlkit.embedding import DTYPES, check_dtype, load_state, load_tokenizer
from rlkit.errors import RewardError
from rlkit.pictures import PictureError, to_pil
from rlkit.types import Prompt, Unscored

if TYPE_CHECKING:
    from rlkit.types import Samples

PIXELS = 256 * 28 * 28  # least and most of every picture, before its sides are rounded to multiples of 28
HINT = "Use HPSv3.safetensors, and the `base` that it was trained from."
TOKEN = "<|Reward|>"
PLACE = "{text_prompt}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SYSTEM = "system\nYou are a helpful assistant."
TURN = ("<|im_start|>", SYSTEM, "<|im_end|>", "\n", "<|im_start|>", "user\n", "<|vision_start|>")
TEMPLATE = """
You judge generated pictures. Estimate how much people would like the picture above, from its Visual Quality and its \
Text Alignment, on a scale from 0 (worst) to 10 (best).

**Visual Quality:**
How good the picture is by itself:
- **Plausibility:** bodies, objects and places are built as they should be, without errors of anatomy or logic.
- **Sharpness:** everything that matters can be seen clearly, and nothing is blurred that should not be.
- **Detail:** textures, materials, light and small things such as hair and cloth are worked out.
- **Beauty:** colours, composition and mood please, fit together and show an idea.
- **Safety:** nothing harmful or indecent is shown; a picture that shows it deserves the lowest mark.

**Text Alignment:**
How well the picture shows what its text says:
- **Subjects:** those that are named are there, in the right number, looking and acting as the text says.
- **Style:** if a style is asked for, it is kept.
- **Setting:** the surroundings are those of the text, and contradict nothing in it.
- **Attributes:** colours, clothes, expressions and other properties are as named.
- **Meaning:** the whole says what the text means, and adds nothing that distorts it.
Textual prompt - {text_prompt}

Give the overall rating of this picture: <|Reward|>
"""


@dataclass(frozen=True)
class HPSv3:
    """How much people would prefer the picture for its prompt (HPSv3, Qwen2-VL-7B); unbounded, about 0 to 12.

    Parity with published numbers is not certified, and needs the published wording as a file in `template`. With
    `caption_field` the picture is scored against a text of the metadata instead of the prompt, for instance a caption
    of what an edit should give. Returns (mu, {"sigma"}); a sample without a text to score against is not scored.
    """

    weights: str = "MizzenAI/HPSv3/HPSv3.safetensors"  # a file, or OWNER/REPOSITORY/FILE on the hub
    base: str = "Qwen/Qwen2-VL-7B-Instruct"  # hub name or folder, of configuration and tokenizer
    template: str | None = None  # a file with {text_prompt} and, after it, <|Reward|>; null: the built-in wording
    caption_field: str | None = None  # the key of the metadata whose text is scored against; null: the prompt
    dtype: str = "bf16"  # of the backbone, or fp32; the head is always in fp32

    reads = ("prompt",)
    optional = ("metadata",)
    range = (None, None)
    higher_is_better = True
    components = ("sigma",)
    groupwise = False
    licence = "MIT (HPSv3), Apache-2.0 (Qwen2-VL-7B)"
    size = "16.6 GB"
    protocol = "Ma et al. 2025, github.com/MizzenAI/HPSv3; parity not certified"
    version = "1"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.caption_field == "":
            raise ValueError("caption_field is empty: name a key of the metadata, or leave it out for the prompt")
        _wording(self.template)

    def load(self, device: torch.device) -> _Scorer:
        from transformers import AutoConfig, Qwen2VLImageProcessorPil

        tokenizer = load_tokenizer(self.base)
        tokenizer.add_tokens([TOKEN], special_tokens=True)
        words = _Words(tokenizer, _wording(self.template))
        config = AutoConfig.from_pretrained(self.base)
        config.text_config.vocab_size = len(tokenizer)  # the published embedding is cut to the tokens in use
        network, head = _parts(load_state(self.weights))
        return _Scorer(
            network=_network(config, network, DTYPES[self.dtype]).to(device),
            head=_head(config.text_config.hidden_size, head).to(device),
            words=words,
            processor=Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS}),
            caption_field=self.caption_field,
        )


# ------------------------------------------------------------------------------------------------- the wording


def _wording(template: str | None) -> tuple[str, str]:
    """What stands before the prompt, and what between the prompt and the token."""
    where = "the built-in template" if template is None else f"template {template}"
    try:
        text = TEMPLATE if template is None else Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read as UTF-8 text: {error}") from error
    before, _, rest = text.partition(PLACE)
    if text.count(PLACE) != 1 or text.count(TOKEN) != 1 or TOKEN not in rest:
        raise ValueError(f"{where} must have {PLACE} once and, after it, {TOKEN} once")
    return before, rest.partition(TOKEN)[0]


class _Words:
    """Prompts as tokens. The text between two special tokens is encoded in one piece, as the reference does."""

    def __init__(self, tokenizer: Any, wording: tuple[str, str]) -> None:
        self.before, self.between = wording
        self.backend = tokenizer.backend_tokenizer  # its encode changes nothing, so threads may share it
        self.backend.encode_special_tokens = True  # what reads like a special token in a prompt is text
        vocabulary = tokenizer.get_vocab()
        if lacking := [name for name in (*SPECIAL, TOKEN) if name not in vocabulary]:
            raise RewardError(f"the tokenizer of `base` lacks {', '.join(lacking)}", hint="Is it that of Qwen2-VL?")
        self.image, self.end, self.token = (vocabulary[name] for name in ("<|image_pad|>", "<|vision_end|>", TOKEN))
        self.pad = vocabulary["<|endoftext|>"]
        turn = [[vocabulary[piece]] if piece in SPECIAL else self.plain(piece) for piece in TURN]
        self.opening = [token for piece in turn for token in piece]

    def plain(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def sequence(self, prompt: str, patches: int) -> list[int]:
        """The user's turn up to the token that is scored, with a place for every patch of the picture."""
        text = self.plain(self.before + prompt + self.between)
        return [*self.opening, *[self.image] * patches, self.end, *text, self.token]


# ------------------------------------------------------------------------------------------------- the weights


def _parts(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The published tensors under the present names: those of the network, and those of the head."""
    network: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in state.items():
        room, _, rest = name.partition(".")
        if room == "visual":
            network[name] = tensor
        elif room == "model":
            network[f"language_model.{rest}"] = tensor
        elif room == "rm_head":
            head[rest] = tensor
        elif name != "lm_head.weight":  # it would predict words
            raise RewardError(f"these are not the weights of HPSv3: {name} is unexpected", hint=HINT)
    return network, head


def _network(config: Any, state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Qwen2-VL without its word head, every tensor there and of its shape."""
    from transformers import Qwen2VLModel

    with torch.device("meta"):
        _same(state, Qwen2VLModel(config).state_dict())
    network = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation="sdpa"
    )
    return network.eval().requires_grad_(False)


def _head(width: int, state: dict[str, Tensor]) -> nn.Module:
    head = nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    _same(state, head.state_dict(), "rm_head.")
    head.load_state_dict(state)  # copied into fp32, whatever they are stored as
    return head.eval().requires_grad_(False)


def _same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], under: str = "") -> None:
    """RewardError unless both have the same names and shapes."""
    wrong = [f"{under}{name} is missing" for name in wanted if name not in found]
    wrong += [f"{under}{name} is unexpected" for name in found if name not in wanted]
    shapes = [(name, tuple(found[name].shape), tuple(wanted[name].shape)) for name in wanted if name in found]
    wrong += [f"{under}{name} is {one} and should be {other}" for name, one, other in shapes if one != other]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RewardError(f"these are not the weights of HPSv3: {'; '.join(wrong[:5])}{more}", hint=HINT)


# --------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class _Scorer:
    """The model, loaded. One call is one batch: the recipe's `batch` bounds the memory."""

    network: Any
    head: nn.Module
    words: _Words
    processor: Any
    caption_field: str | None

    @torch.inference_mode()
    def __call__(self, samples: Samples) -> tuple[list[float | Unscored], dict[str, list[float]]]:
        values: list[float | Unscored] = [Unscored("not asked")] * len(samples)
        sigmas = [float("nan")] * len(samples)
        pictures, texts, rows = [], [], []
        for row, prompt in enumerate(samples.prompts):
            text = _text(prompt, self.caption_field)
            if isinstance(text, Unscored):
                values[row] = text
                continue
            try:
                pictures.append(to_pil(samples.media[row]))
            except PictureError as error:
                values[row] = Unscored(str(error))
                continue
            texts.append(text)
            rows.append(row)
        if rows:
            mu, log_sigma = self.ask(pictures, texts).unbind(1)
            for row, mean, sigma in zip(rows, mu.tolist(), log_sigma.exp().tolist(), strict=True):
                values[row], sigmas[row] = mean, sigma
        return values, {"sigma": sigmas}

    def ask(self, pictures: Sequence[Any], texts: Sequence[str]) -> Tensor:
        """[N, 2]: mu and the logarithm of sigma."""
        seen = self.processor(list(pictures), return_tensors="pt")
        grid = seen["image_grid_thw"]  # [N, 3] patches; all pictures of a call have one size
        patches = int(grid[0].prod()) // self.processor.merge_size**2
        tokens = {text: self.words.sequence(text, patches) for text in set(texts)}
        lengths = torch.tensor([len(tokens[text]) for text in texts])
        ids = torch.full((len(texts), int(lengths.max())), self.words.pad)  # padded on the right
        for row, text in enumerate(texts):
            ids[row, : lengths[row]] = torch.tensor(tokens[text])
        places = torch.arange(ids.shape[1])
        device = next(self.head.parameters()).device
        hidden = self.network(
            input_ids=ids.to(device),
            attention_mask=(places < lengths[:, None]).long().to(device),
            position_ids=places.expand_as(ids).to(device),  # plain places, for the picture's tokens too
            pixel_values=seen["pixel_values"].to(device),
            image_grid_thw=grid.to(device),
            use_cache=False,
        ).last_hidden_state  # [N, length, width]
        last = hidden[torch.arange(len(texts), device=device), lengths.to(device) - 1]
        return self.head(last.float()).cpu()


def _text(prompt: Prompt, field: str | None) -> str | Unscored:
    """What the picture is scored against."""
    if field is None:
        return prompt.text if prompt.text.strip() else Unscored("the prompt is empty")
    text = prompt.metadata.get(field)
    if isinstance(text, str) and text.strip():
        return text
    return Unscored(f"the prompt's metadata has no text under {field!r}")
