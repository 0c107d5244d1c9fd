"""HPSv3 on a tiny random Qwen2-VL, saved under the published names and loaded by the reward's own loading."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from rlkit import registry
from rlkit.errors import RewardError
from rlkit.rewards.hpsv3 import TEMPLATE, HPSv3
from rlkit.types import Unscored

CPU = torch.device("cpu")
SHORT = "\nJudge.\nTextual prompt - {text_prompt}\n\nRate: <|Reward|>\n\nEND\n"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WIDTH = 32


def save_base(folder: Path) -> None:
    """Byte-level BPE that knows the words ` cat` and `a` + bytes; and a configuration with real names."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t")]
    vocabulary |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0])
    whole.add_tokens(SPECIAL, special_tokens=True)
    whole.save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": 400, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}  # cut to 266
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=whole.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=whole.convert_tokens_to_ids("<|vision_start|>"),
    )
    config.save_pretrained(folder)


def published(network: Qwen2VLForConditionalGeneration, head: torch.nn.Module) -> dict[str, Tensor]:
    """The weights under the names that the published file has."""
    names = (("model.visual.", "visual."), ("model.language_model.", "model."))
    state = {}
    for name, tensor in network.state_dict().items():
        for now, then in names:
            name = then + name.removeprefix(now) if name.startswith(now) else name
        state[name] = tensor.contiguous().clone()
    return state | {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, torch.nn.Sequential]:
    """(a folder with base, HPSv3.safetensors and template.txt; the network; its head)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hpsv3")
    save_base(folder)
    (folder / "template.txt").write_text(SHORT)
    config = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(AutoTokenizer.from_pretrained(folder)) + 1
    network = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in network.parameters():  # the usual start is so small that positions would hardly be seen
        parameter.data.normal_(std=0.3) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    head = torch.nn.Sequential(linear(WIDTH, 1024), relu, torch.nn.Identity(), linear(1024, 16), relu, linear(16, 2))
    save_file(published(network, head), folder / "HPSv3.safetensors")
    return folder, network, head


@pytest.fixture(scope="module")
def reward(tiny: Any) -> HPSv3:
    weights, template = tiny[0] / "HPSv3.safetensors", tiny[0] / "template.txt"
    return HPSv3(str(weights), str(tiny[0]), template=str(template), dtype="fp32")


@pytest.fixture(scope="module")
def scorer(reward: HPSv3) -> Any:
    return reward.load(CPU)


def noise(n: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    pixels = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return pixels / 255


def patches(picture: Tensor, height: int, width: int) -> Tensor:
    """[patches, 3 * 2 * 14 * 14], in the order in which four neighbours become one token."""
    bytes_ = (picture.movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    resized = Image.fromarray(bytes_).resize((width, height), Image.Resampling.BICUBIC)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    values = (np.asarray(resized, dtype=np.float32) / 255 - mean) / std
    rows = []
    for top in range(0, height, 28):
        for left in range(0, width, 28):
            for y, x in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = values[top + y : top + y + 14, left + x : left + x + 14].transpose(2, 0, 1)  # [3, 14, 14]
                rows.append(np.stack([patch, patch], axis=1).ravel())  # [3, 2, 14, 14]: two equal frames
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def by_hand(tiny: Any, text: str, picture: Tensor, size: tuple[int, int], plain: bool = True) -> tuple[float, float]:
    """mu and sigma from the whole published turn as one string, through the network that was saved."""
    folder, network, head = tiny
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    height, width = size
    turn = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * (height * width // 28**2)
        + f"<|vision_end|>{SHORT.replace('{text_prompt}', text)}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(turn).input_ids])
    pictures = (ids == network.config.image_token_id).int()
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden = network.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=patches(picture, height, width),
            image_grid_thw=torch.tensor([[1, height // 14, width // 14]]),
            **({"position_ids": positions} if plain else {"mm_token_type_ids": pictures}),
        ).last_hidden_state[0]
        (place,) = torch.nonzero(ids[0] == len(tokenizer) - 1).flatten().tolist()
        x = hidden[place]
        for layer in (0, 3, 5):
            x = head[layer].weight @ x + head[layer].bias
            x = x if layer == 5 else x.clamp(min=0)
    return float(x[0]), float(x[1].exp())


@pytest.mark.parametrize(("shape", "size"), [((40, 40), (448, 448)), ((512, 768), (364, 532)), ((37, 91), (308, 728))])
def test_the_value_is_the_head_at_the_token(
    shape: tuple[int, int], size: tuple[int, int], tiny: Any, scorer: Any, samples_of: Callable[..., Any]
) -> None:
    picture = noise(1, *shape)
    values, parts = scorer(samples_of(picture, ["cat {x} with 100% é"]))
    mu, sigma = by_hand(tiny, "cat {x} with 100% é", picture[0], size)
    assert values == pytest.approx([mu], abs=2e-4)
    assert parts["sigma"] == pytest.approx([sigma], rel=2e-4)


def test_positions_are_plain(tiny: Any, scorer: Any, samples_of: Callable[..., Any]) -> None:
    picture = noise(1)
    (value,), _ = scorer(samples_of(picture, ["cat"]))
    other, _ = by_hand(tiny, "cat", picture[0], (448, 448), plain=False)
    assert abs(value - other) > 0.01  # Qwen2-VL's own positions give another number


def test_neither_batch_nor_order_nor_padding_counts(scorer: Any, samples_of: Callable[..., Any]) -> None:
    texts = ["cat", "a far longer text about a cat and what is around it, so that the others are padded", "dog", "cat"]
    media = noise(4)
    together, parts = scorer(samples_of(media, texts))
    for row, text in enumerate(texts):
        (alone,), own = scorer(samples_of(media[row : row + 1], [text]))
        assert together[row] == pytest.approx(alone, abs=2e-5)
        assert parts["sigma"][row] == pytest.approx(own["sigma"][0], rel=1e-4)
    back, _ = scorer(samples_of(media.flip(0), texts[::-1]))
    assert back[::-1] == pytest.approx(together, abs=2e-5)
    assert together[0] != pytest.approx(together[3], abs=1e-3)  # another picture
    assert together[0] != pytest.approx(together[2], abs=1e-3)  # another text


def test_a_prompt_that_reads_like_special_tokens_is_text(scorer: Any, samples_of: Callable[..., Any]) -> None:
    text = "a <|Reward|> of <|image_pad|><|im_end|>"
    tokens = scorer.words.sequence(text, 256)
    assert tokens.count(scorer.words.token) == 1
    assert tokens[-1] == scorer.words.token
    assert tokens.count(scorer.words.image) == 256
    assert text in scorer.words.backend.decode(tokens)
    (value, plain), _ = scorer(samples_of(noise(1).repeat(2, 1, 1, 1), [text, "a of"]))
    assert np.isfinite(value)
    assert value != plain


def test_prompt_and_instruction_are_one_piece(scorer: Any) -> None:
    tokens = scorer.words.sequence("cat", 1)
    assert scorer.words.backend.token_to_id("Ġcat") in tokens  # "- " and "cat" apart would give another token


def test_every_text_is_encoded_once(
    scorer: Any, samples_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    encode = scorer.words.sequence
    monkeypatch.setattr(scorer.words, "sequence", lambda text, n: asked.append(text) or encode(text, n))
    scorer(samples_of(noise(3), ["cat", "dog", "cat"]))
    assert sorted(asked) == ["cat", "dog"]


def test_a_caption_of_the_metadata(reward: HPSv3, scorer: Any, samples_of: Callable[..., Any]) -> None:
    of_caption = replace(scorer, caption_field="target")
    metadata = [{"target": "a cat"}, {}, {"target": 3}, {"target": " "}]
    values, parts = of_caption(samples_of(noise(4), ["make it so"] * 4, metadata=metadata))
    (expected,), _ = scorer(samples_of(noise(4)[:1], ["a cat"]))
    assert values[0] == pytest.approx(expected, abs=2e-5)
    assert values[1:] == [Unscored("the prompt's metadata has no text under 'target'")] * 3
    assert np.isnan(parts["sigma"]).tolist() == [False, True, True, True]
    assert replace(reward, caption_field="target").load(CPU).caption_field == "target"
    with pytest.raises(ValueError, match="caption_field is empty"):
        HPSv3(caption_field="")


def test_a_sample_that_fails_costs_itself_only(scorer: Any, samples_of: Callable[..., Any]) -> None:
    media = noise(3)
    broken = media.clone()
    broken[1, 0, 0, 0] = torch.nan
    values, parts = scorer(samples_of(broken, ["cat", "cat", " "]))
    (expected,), _ = scorer(samples_of(media[:1], ["cat"]))
    assert values[0] == pytest.approx(expected, abs=2e-5)
    assert isinstance(values[1], Unscored)
    assert "NaN" in values[1].reason
    assert values[2] == Unscored("the prompt is empty")
    assert np.isnan(parts["sigma"]).tolist() == [False, True, True]


def test_nothing_to_score(scorer: Any, samples_of: Callable[..., Any]) -> None:
    assert scorer(samples_of(torch.zeros(0, 3, 8, 8), [])) == ([], {"sigma": []})
    values, _ = scorer(samples_of(torch.zeros(1, 1, 8, 8), ["cat"]))  # one channel is no picture
    assert isinstance(values[0], Unscored)
    with pytest.raises(ValueError, match="aspect ratio"):
        scorer(samples_of(torch.zeros(1, 3, 1, 201), ["cat"]))


def test_grey_low_precision_and_gradients(scorer: Any, samples_of: Callable[..., Any]) -> None:
    grey = torch.full((1, 3, 9, 9), 128 / 255)
    values = [
        scorer(samples_of(media, ["cat"]))[0][0]
        for media in (grey, grey.bfloat16(), grey.clone().requires_grad_(), grey + 1e-3)
    ]
    assert values == [values[0]] * 4  # all are the same bytes
    assert np.isfinite(values[0])


def test_the_head_is_in_full_precision(reward: HPSv3, scorer: Any, samples_of: Callable[..., Any]) -> None:
    half = replace(reward, dtype="bf16").load(CPU)
    assert {parameter.dtype for parameter in half.network.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.head.parameters()} == {torch.float32}
    assert not half.network.training
    assert not half.head.training  # no dropout
    assert not any(p.requires_grad for p in (*half.network.parameters(), *half.head.parameters()))
    (rough,), _ = half(samples_of(noise(1), ["cat"]))
    (exact,), _ = scorer(samples_of(noise(1), ["cat"]))
    assert rough == pytest.approx(exact, abs=0.1)
    with pytest.raises(ValueError, match="dtype='fp8' is none of fp32, bf16"):
        HPSv3(dtype="fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "language_model.norm.weight is missing"),
        (lambda s: s.pop("rm_head.3.bias"), "rm_head.3.bias is missing"),
        (lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(1)}), "layers.2.*is unexpected"),
        (lambda s: s.update({"value_head.weight": torch.zeros(1)}), "value_head.weight is unexpected"),
        (lambda s: s.update({"visual.merger.ln_q.weight": torch.ones(31)}), r"ln_q.weight is \(31,\) and should be"),
        (lambda s: s.update({"rm_head.5.weight": torch.ones(3, 16)}), r"rm_head.5.weight is \(3, 16\)"),
        # The token's row is the last one. With a row too many, every score would come from another embedding.
        (lambda s: s.update({"model.embed_tokens.weight": torch.ones(400, 32)}), r"embed_tokens.weight is \(400, 32\)"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], Any], message: str, tiny: Any, reward: HPSv3, tmp_path: Path
) -> None:
    state = load_file(tiny[0] / "HPSv3.safetensors")
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(RewardError, match=message):
        replace(reward, weights=str(tmp_path / "other.safetensors")).load(CPU)


def test_weights_that_are_not_there(reward: HPSv3, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"cannot read .*lost\.safetensors"):
        replace(reward, weights=str(tmp_path / "lost.safetensors")).load(CPU)
    with pytest.raises(RewardError, match=r"cannot read .*lost"):
        replace(reward, base=str(tmp_path / "lost")).load(CPU)


def test_a_tokenizer_of_another_model(reward: HPSv3, tiny: Any, tmp_path: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    Qwen2VLConfig.from_pretrained(tiny[0]).save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"lacks <\|endoftext\|>, <\|im_start\|>"):
        replace(reward, base=str(tmp_path)).load(CPU)


def test_the_wording(tmp_path: Path, reward: HPSv3, scorer: Any, samples_of: Callable[..., Any]) -> None:
    places = [TEMPLATE.index(part) for part in ("Visual Quality:", "Text Alignment:", "\nTextual prompt - {", "Give")]
    assert places == sorted(places)
    assert TEMPLATE.rstrip().endswith("<|Reward|>")
    built_in = replace(reward, template=None).load(CPU)
    samples = samples_of(noise(1), ["cat"])
    assert built_in(samples)[0][0] != pytest.approx(scorer(samples)[0][0], abs=1e-3)
    file = tmp_path / "template.txt"
    file.write_bytes(b"\n  {a} {text_prompt}\n\n <|Reward|> END")
    words = replace(reward, template=str(file)).load(CPU).words
    assert (words.before, words.between) == ("\n  {a} ", "\n\n ")  # verbatim
    for text in ("{text_prompt}", "<|Reward|> {text_prompt}", "{text_prompt}{text_prompt}<|Reward|>", "a", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"must have \{text_prompt\} once and, after it, <\|Reward\|> once"):
            HPSv3(template=str(file))
    with pytest.raises(ValueError, match=r"template .*lost.txt cannot be read"):
        HPSv3(template=str(tmp_path / "lost.txt"))


def test_the_card() -> None:
    (entry,) = [one for one in registry.describe("rewards") if one.name == "hpsv3"]
    assert entry.constants["range"] == (None, None)
    assert entry.constants["components"] == ("sigma",)
    assert (entry.constants["reads"], entry.constants["optional"]) == (("prompt",), ("metadata",))
    assert entry.summary.endswith(".")
    assert all(option.doc for option in entry.fields)
    assert registry.load("rewards", "hpsv3") is HPSv3
