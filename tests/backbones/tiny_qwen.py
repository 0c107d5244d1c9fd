"""Qwen-Image and Qwen-Image-Edit at toy size: the real classes with random weights, in folders as pipelines save them.

The tokenizer learns the chats, so that each of their words is one token, as it is for the real one.
"""

import json
from pathlib import Path
from typing import Any

from backbones import conforms

from rlkit.backbones import qwen_image, qwen_image_edit

MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PROCESSOR = {  # as the checkpoints have it: the class that it names needs torchvision
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen2VLProcessor",
    "device": None,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 12845056, "shortest_edge": 3136},
    "temporal_patch_size": 2,
}
WORDS = " a red circle two blue crosses make it green"


def tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    texts = [qwen_image.CHAT, qwen_image_edit.CHAT, *qwen_image_edit.PICTURE.values(), WORDS]
    for mark in (*MARKS, "{}"):
        texts = [part for text in texts for part in text.split(mark)]
    inner = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(vocab_size=2000, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(texts, trainer)
    learned = json.loads(inner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, additional_special_tokens=list(MARKS))


def text_encoder(words: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    marks = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=marks["image_pad"],
        video_token_id=marks["video_pad"],
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def save(folder: Path, pipeline: str, zero_cond_t: bool = False) -> Path:
    """A folder of this pipeline's class. One latent pixel is 2 pixels wide."""
    import diffusers

    words = tokenizer()
    with conforms.seeded():
        net = diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, 0.4, -0.2],
            latents_std=[2.8, 1.4, 0.9, 1.9],
        )
        encoder = text_encoder(words)
        for weight in net.parameters():  # as they are drawn, what it reads hardly shows in a picture
            weight.data *= 2 if weight.ndim > 1 else 1
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    diffusers.QwenImagePipeline(scheduler, vae, encoder, words, conforms.awake(net)).save_pretrained(folder)
    if pipeline != "QwenImagePipeline":
        (folder / "processor").mkdir()
        (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"_class_name": pipeline, "processor": ["transformers", "Qwen2VLProcessor"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder
