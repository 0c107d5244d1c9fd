"""Qwen's language models, with and without eyes, at toy size: the real classes with random weights, saved as theirs.

Weights are drawn five times as wide as for training, so that what a model says depends on all that it reads. Heads are
32 wide, which is what vLLM's attention on a CPU takes. The vocabulary is larger than the tokenizer's, as theirs are.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from backbones import conforms, tiny_words
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit import registry
from rlkit.backbones import _transformers
from rlkit.types import Condition, Prompt, TokenModel

CPU, FP32 = torch.device("cpu"), torch.float32
CLOSE = 1e-5
PROJECTION = "model.layers.0.self_attn.q_proj"
WORDS = ("qwen2", "qwen2.5 tied", "qwen3")
SEEING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEMPLATE = (  # as theirs: a system's turn in any case, pictures as marks, and Qwen3's way not to think
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for one in messages %}<|im_start|>{{ one['role'] }}\n"
    "{% if one['content'] is string %}{{ one['content'] }}{% else %}{% for part in one['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PADDED = 8  # rows of the embedding that are no token
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
VISION = {"depth": 2, "num_heads": 2, "initializer_range": 0.1}
EYES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    },
    "qwen3_vl": {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 64,
    },
}


def save(folder: Path, family: str) -> Path:
    """A folder with config, weights, tokenizer and, of a model that sees, what makes pictures ready."""
    tokenizer = tiny_words.qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.eos_token = "<|im_end|>"
    with conforms.seeded():
        net = _net(family, tokenizer)
        conforms.awake(net)
    net.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family in SEEING:
        _pictures(folder, 16 if family == "qwen3_vl" else 14, family)
    return folder


def _net(family: str, tokenizer: Any) -> Any:
    import transformers

    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = TEXT | ids | {"vocab_size": len(tokenizer) + PADDED}
    if family in WORDS:
        kind = "Qwen3" if family == "qwen3" else "Qwen2"
        config = getattr(transformers, f"{kind}Config")(**text, tie_word_embeddings="tied" in family)
        return getattr(transformers, f"{kind}ForCausalLM")(config)
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    marks = {option: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for option, name in names.items()}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=VISION | EYES[family], **marks, tie_word_embeddings=False
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _pictures(folder: Path, patch: int, family: str) -> None:
    """As the checkpoints have it: two files, and the class that is named needs torchvision."""
    shared = {
        "image_mean": [0.5, 0.5, 0.5] if family == "qwen3_vl" else [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.5, 0.5, 0.5] if family == "qwen3_vl" else [0.26862954, 0.26130258, 0.27577711],
        "merge_size": 2,
        "patch_size": patch,
        "temporal_patch_size": 2,
    }
    processor = "Qwen3VLProcessor" if family == "qwen3_vl" else "Qwen2_5_VLProcessor"
    processor = "Qwen2VLProcessor" if family == "qwen2_vl" else processor
    still = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": processor}
    moving = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    size = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "min_pixels": 3136, "max_pixels": 12845056}
    (folder / "preprocessor_config.json").write_text(json.dumps(shared | still | size))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(shared | {"video_processor_type": moving}))


# ---- what every token backbone has to do -----------------------------------------------------------------------------


def loaded(folder: Path, longest: int = 256, **options: Any) -> TokenModel:
    """The family's entry on the CPU in fp32."""
    name = "qwen_vl" if (folder / "preprocessor_config.json").is_file() else "qwen"
    return registry.build("backbones", name, {"path": str(folder), "longest": longest, **options}).load(CPU, FP32)


def answered(model: TokenModel, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, list[Condition]]:
    """ids [N, L] and where they are there: each prompt with an answer of its own length, padded at the end."""
    conditions = model.encode(prompts)
    words = torch.Generator().manual_seed(0)
    rows = [torch.cat([one["ids"], torch.randint(256, (3 + i,), generator=words)]) for i, one in enumerate(conditions)]
    there = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True, padding_value=7), there, conditions


@torch.no_grad()
def padding_is_not_read(model: TokenModel, prompts: Sequence[Prompt]) -> None:
    """A row says what it says alone, padded at the end, at the start, and beside others."""
    ids, there, conditions = answered(model, prompts)
    together = model.logits(model.net, ids, there, model.collate(conditions))
    assert together.shape[:2] == ids.shape
    for row, (one, real) in enumerate(zip(ids, there, strict=True)):
        short = one[real][None]
        own = model.collate(conditions[row : row + 1])
        alone = model.logits(model.net, short, torch.ones_like(short, dtype=torch.bool), own)[0]
        torch.testing.assert_close(together[row][real], alone, rtol=0, atol=CLOSE)
        late = torch.cat([torch.full((1, 5), 9), short], dim=1)
        at_the_start = model.logits(model.net, late, torch.arange(late.shape[1])[None] >= 5, own)[0, 5:]
        torch.testing.assert_close(at_the_start, alone, rtol=0, atol=CLOSE)
    other = ids.clone()
    other[:, 4] = 11
    moved = (model.logits(model.net, other, there, model.collate(conditions)) - together).abs()
    assert moved[:, :4].max() == 0, "nobody sees what comes"
    assert moved[:, 5][there[:, 5]].max() > 100 * CLOSE, "what was said is read"


def gradients(model: TokenModel, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Of the mean log-probability of what was said, for all that is trained."""
    ids, there, conditions = answered(model, prompts)
    model.net.zero_grad()
    said = model.logits(model.net, ids, there, model.collate(conditions)).float().log_softmax(-1)
    (said[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * there[:, 1:]).sum().div(there.sum()).backward()
    return {name: one.grad.clone() for name, one in model.net.named_parameters() if one.grad is not None}


def trains(model: TokenModel, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The gradient reaches every weight, and every LoRA factor once it is added; activations kept, or computed again.

    Returns those of the factors, and leaves the model with them.
    """
    from peft import LoraConfig

    runs: list[int] = []
    middle = model.net.get_submodule(model.lora_targets[0] if "." in model.lora_targets[0] else PROJECTION)
    middle.register_forward_hook(lambda *_: runs.append(1))
    full = gradients(model, prompts)
    silent = [name for name, _ in model.net.named_parameters() if name not in full]
    assert not silent, silent
    assert len(runs) == 1
    model.net.enable_gradient_checkpointing()
    again = gradients(model, prompts)
    assert len(runs) == 3, "activations were kept, not computed again"
    for name, one in full.items():
        torch.testing.assert_close(again[name], one, rtol=1e-4, atol=1e-6)
    model.net.requires_grad_(False)
    targets = list(model.lora_targets)
    model.net.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets), "rlkit")
    lora = gradients(model, prompts)
    assert lora
    assert all("lora_" in name and one.abs().max() > 0 for name, one in lora.items())
    assert {name.split(".")[-4] for name in lora} == set(_transformers.LAYERS)
    return lora


@torch.no_grad()
def written_for_others(model: TokenModel, prompts: Sequence[Prompt], folder: Path, **options: Any) -> tuple[Any, Any]:
    """The folder, once the weights lie beside, is loaded by transformers in one line each, and says the same."""
    import transformers

    folder = folder / "not there yet"
    model.write(folder)
    assert not list(folder.glob("*.safetensors*"))
    model.net.save_pretrained(folder)
    net = getattr(transformers, type(model.net).__name__).from_pretrained(folder, dtype=FP32).eval()
    ids, there, conditions = answered(model, prompts)
    together = model.collate(conditions)
    assert torch.equal(model.logits(net, ids, there, together), model.logits(model.net, ids, there, together))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    again = loaded(folder, model.longest, **options)
    for one, other in zip(model.encode(prompts), again.encode(prompts), strict=True):
        assert torch.equal(one["ids"], other["ids"])
    return net, tokenizer
