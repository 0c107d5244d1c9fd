"""FLUX.2 at toy size: dev with Mistral 3, klein with Qwen3; the real classes with random weights.

The text encoders have as many layers as are read, so that the layers' numbers are tested, and are 8 wide.
"""

import json
from pathlib import Path
from typing import Any

import torch
from backbones import conforms, tiny_words

MISTRAL_CHAT = (
    "{{ bos_token }}{% for one in messages %}{% set text = one['content'][0]['text'] %}"
    "{% if one['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)
MISTRAL_MARKS = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]


def mistral_tokenizer() -> Any:
    """Words of the system message are tokens, others are spelt; `<s>` comes first, as it does for the real one."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=MISTRAL_MARKS,
        show_progress=False,
    )
    inner.train_from_iterator([SYSTEM_MESSAGE, " a red circle two blue crosses"], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = MISTRAL_CHAT
    return tokenizer


def language(words: Any, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": words.pad_token_id,
    }


def mistral(words: Any) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 28,
    }
    mark = words.convert_tokens_to_ids("[IMG]")
    config = Mistral3Config(text_config=language(words, 30), vision_config=vision, image_token_index=mark)
    return Mistral3ForConditionalGeneration(config).eval()


def qwen(words: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**language(words, 27))).eval()


def save(folder: Path, klein: bool, distilled: bool = False) -> Path:
    """A folder of dev or of klein. A latent pixel is 4 pixels wide."""
    import diffusers

    words = tiny_words.qwen_tokenizer() if klein else mistral_tokenizer()
    with conforms.seeded():
        net = diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=not klein,
        )
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
        ).eval()
        vae.bn.running_mean.copy_(torch.randn(16))
        vae.bn.running_var.copy_(torch.rand(16) + 0.5)
        encoder = qwen(words) if klein else mistral(words)
        for weight in net.parameters():  # as they are drawn, what it reads hardly shows in a picture
            weight.data *= 2 if weight.ndim > 1 else 1
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = (scheduler, vae, encoder, words, conforms.awake(net))
    if klein:
        diffusers.Flux2KleinPipeline(*parts, is_distilled=distilled).save_pretrained(folder)
    else:
        diffusers.Flux2Pipeline(*parts).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert bool(index.get("is_distilled")) == distilled
    return folder
