"""`rlkit pretrain-captioner`: make the tiny captioner that ships with rlkit, from nothing, on one machine.

Next-token prediction of the training captions beside procedurally drawn pictures of them. The share of captions that
are true of validation pictures decides when to stop: the base should speak well, and still be wrong often enough for an
algorithm's effect to show.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlkit.backbones import tiny_captioner as captioner
from rlkit.pretrain.schedule import follow, rate
from rlkit.world import grammar, obeys, scenes

MOST = 12  # tokens of a caption: ten words and the end


@dataclass(frozen=True)
class Captioning:
    """Settings of one pretraining run. `samples` is the length of the schedule; `stop_true` may end it sooner."""

    samples: int = 500_000
    batch: int = 96
    lr: float = 2e-3
    warmup: int = 200  # optimiser steps
    decay: float = 0.4  # share of the schedule over which the rate falls linearly to 0
    ema: float = 0.999
    seed: int = 0
    threads: int = 1
    evaluate_every: int = 25_000  # samples
    evaluate_on: int = 400  # validation pictures, one caption each
    score_on: int = 1024  # pictures of the validation and of the held-out split, at the end
    stop_true: float = 1.0  # stop once this share of the validation captions is true


@dataclass(frozen=True)
class Parts:
    """The network, its tokenizer, its image processor, and the tokens before every caption."""

    net: Any
    tokenizer: Any
    reader: Any
    prompt: tuple[int, ...]


def assemble() -> Parts:
    """Untrained parts."""
    tokenizer, reader = captioner.new_tokenizer(), captioner.new_reader()
    net = captioner.new_network(tokenizer)
    asked = [{"type": "image"}, {"type": "text", "text": captioner.INSTRUCTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    text = text.replace("<|image_pad|>", "<|image_pad|>" * (captioner.SIDE // 28) ** 2)
    return Parts(net, tokenizer, reader, tuple(tokenizer(text).input_ids))


def see(parts: Parts, pictures: np.ndarray[Any, Any]) -> dict[str, Tensor]:
    """What the network is given of pictures [N, 3, 32, 32] in 0..1."""
    from PIL import Image

    pixels = (pictures.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
    seen = parts.reader([Image.fromarray(one) for one in pixels], return_tensors="pt")
    return {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}


def loss_of(parts: Parts, pictures: np.ndarray[Any, Any], texts: Sequence[str]) -> Tensor:
    """Mean cross-entropy of the captions' tokens, the end among them."""
    end, pad = parts.tokenizer.eos_token_id, parts.tokenizer.pad_token_id
    answers = [[*parts.tokenizer(text).input_ids, end] for text in texts]
    longest = max(map(len, answers))
    padded = torch.tensor([answer + [pad] * (longest - len(answer)) for answer in answers])
    ids = torch.cat([torch.tensor(parts.prompt).expand(len(texts), -1), padded], dim=1)
    labels = ids.clone()
    labels[:, : len(parts.prompt)] = -100
    labels[labels == pad] = -100
    output = parts.net(**_asked(parts, ids), **see(parts, pictures), labels=labels)
    loss: Tensor = output.loss
    return loss


@torch.no_grad()
def caption(parts: Parts, pictures: np.ndarray[Any, Any], seed: int, sampled: bool = True) -> list[str]:
    """A caption for each picture, drawn at temperature 1, or the likeliest word by word."""
    ids = torch.tensor(parts.prompt).expand(len(pictures), -1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = parts.net.generate(
            **_asked(parts, ids), **see(parts, pictures), max_new_tokens=MOST, do_sample=sampled, top_k=0
        )
    texts: list[str] = parts.tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def _asked(parts: Parts, ids: Tensor) -> dict[str, Tensor]:
    there = (ids != parts.tokenizer.pad_token_id).long()
    return {
        "input_ids": ids,
        "attention_mask": there,
        "mm_token_type_ids": (ids == parts.net.config.image_token_id).int(),
    }


def evaluate(parts: Parts, split: str, count: int, seed: int = 1) -> dict[str, float]:
    """Shares of true captions over pictures of a split: sampled, by kind of picture, and the likeliest ones."""
    captions = grammar.panel(split, count)
    pictures = scenes.render_batch(captions, np.random.default_rng(seed))
    sampled = [one.strict for one in obeys.check_captions(pictures, caption(parts, pictures, seed))]
    likeliest = [one.strict for one in obeys.check_captions(pictures, caption(parts, pictures, seed, sampled=False))]
    scores = {"true": float(np.mean(sampled)), "true_greedy": float(np.mean(likeliest))}
    for kind in grammar.KINDS:
        of_kind = [score for score, one in zip(sampled, captions, strict=True) if one.kind == kind]
        scores[f"true/{kind}"] = float(np.mean(of_kind))
    return {name: round(value, 4) for name, value in scores.items()}


def pretrain_captioner(out: Path, settings: Captioning, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, evaluate on the validation split, and write the folder `out` at every evaluation."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)  # the initial weights: transformers draws from the global generator
    numbers = np.random.default_rng(settings.seed)
    parts = assemble()
    average = copy.deepcopy(parts.net).eval().requires_grad_(False)
    averaged = Parts(average, parts.tokenizer, parts.reader, parts.prompt)
    parameters = list(parts.net.train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, history, running, seen = time.monotonic(), [], [], 0
    while seen < settings.samples:
        captions = grammar.draw("train", settings.batch, numbers)
        loss = loss_of(parts, scenes.render_batch(captions, numbers), [one.text for one in captions])
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(seen, settings.samples, settings.batch, settings.warmup, settings.decay)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        before, seen = seen, seen + settings.batch
        follow(average.parameters(), parameters, seen / settings.batch, settings.ema)
        running.append(loss.item())
        if before // settings.evaluate_every != seen // settings.evaluate_every or seen >= settings.samples:
            found = evaluate(averaged, "validation", settings.evaluate_on)
            minutes = (time.monotonic() - started) / 60
            stand = {"samples": seen, "minutes": round(minutes, 2), "loss": round(float(np.mean(running)), 4)}
            history.append(stand | found)
            running.clear()
            say(str(history[-1]))
            save(out, averaged, {"settings": asdict(settings), "history": history})
            if found["true"] >= settings.stop_true:
                break
    scores = {
        "command": "rlkit pretrain-captioner --out DIR "
        + " ".join(f"{name}={value}" for name, value in asdict(settings).items()),
        "settings": asdict(settings),
        "history": history,
        "validation": evaluate(averaged, "validation", settings.score_on),
        "held_out": evaluate(averaged, "held_out", settings.score_on),
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def save(folder: Path, parts: Parts, scores: object) -> None:
    """What transformers and vLLM load: configuration, 16-bit weights, tokenizer, image processor, chat template."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    half = torch.float16  # more mantissa than bf16, and every weight is far inside its range
    copy.deepcopy(parts.net).to(half).save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    parts.reader.save_pretrained(folder)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
