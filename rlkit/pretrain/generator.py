"""`rlkit pretrain-world`: make the tiny backbone that ships with rlkit, from nothing, on one machine.

Rectified flow on procedurally drawn pictures of the training captions. A validation split of its own decides when to
stop: the base should draw cleanly and still have much to learn about obeying, so that an algorithm's effect shows. A
second, short run from the first's weights may hear wrong captions for some pictures, as models do that learn from the
web: it draws as well, and obeys less than it could.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlkit import flow
from rlkit.backbones import tiny
from rlkit.pretrain.schedule import follow, rate
from rlkit.types import generator
from rlkit.world import grammar, instructions, obeys, scenes
from rlkit.world.instructions import Example


@dataclass(frozen=True)
class Pretraining:
    """Settings of one pretraining run. `samples` is the length of the schedule; `stop_strict` may end it sooner."""

    samples: int = 1_200_000
    batch: int = 96
    lr: float = 2e-3
    warmup: int = 200  # optimiser steps
    decay: float = 0.35  # share of the schedule over which the rate falls linearly to 0
    ema: float = 0.9993
    no_caption: float = 0.1  # share of empty captions, so that classifier-free guidance is possible
    wrong_captions: float = 0.0  # share of pictures told by the caption of another picture
    edit: float = 0.0  # share of each batch that edits a picture; any such share makes a network for `tiny_omni`
    in_context: float = 0.0  # share of each batch that puts what other pictures show into one
    start: str | None = None  # a folder that an earlier run wrote, to go on from its weights; None: from nothing
    seed: int = 0
    threads: int = 1
    evaluate_every: int = 60_000  # samples
    evaluate_on: int = 400  # validation captions, one picture each
    score_on: int = 1024  # captions of the validation and of the held-out split, at the end
    stop_strict: float = 1.0  # stop once the validation strict score is this high
    stop_at: int | None = None  # samples after which to stop inside the schedule; None: at its end

    def __post_init__(self) -> None:
        for name in ("no_caption", "wrong_captions", "edit", "in_context"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is a share within [0, 1), not {getattr(self, name)}")
        if self.edit + self.in_context > 1:
            raise ValueError(f"edit and in_context are shares of one batch: {self.edit} + {self.in_context} > 1")
        if self.start is not None and not (Path(self.start) / "scores.json").is_file():
            raise ValueError(f"start must be a folder that rlkit pretrain-world wrote, not {self.start!r}")

    @property
    def shares(self) -> dict[str, float]:
        """Of each task, its share of a batch."""
        return {"t2i": 1 - self.edit - self.in_context, "edit": self.edit, "in_context": self.in_context}

    @property
    def shown(self) -> int:
        """How many pictures the network sees."""
        return tiny.SHOWN if self.edit or self.in_context else 0


@dataclass(frozen=True)
class Parts:
    """The three parts of a tiny backbone, and how many pictures it sees."""

    net: nn.Module
    text_encoder: nn.Module
    autoencoder: tiny.PatchAutoencoder
    shown: int

    def condition(self, texts: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
        """What the network is told: these texts, and the examples' own pictures."""
        tokens, pooled = tiny.encode_tokens(self.text_encoder, tiny.token_ids(texts))
        told = {"tokens": tokens, "pooled": pooled}
        if self.shown:
            rendered = iter(torch.from_numpy(scenes.render_scenes([s for one in examples for s in one.shown])))
            pictures = [[next(rendered) for _ in one.shown] for one in examples]
            told["pictures"] = tiny.encode_pictures(self.autoencoder, pictures, self.shown)
        return told


@torch.no_grad()
def draw(parts: Parts, examples: Sequence[Example], seed: int, steps: int = 10) -> Tensor:
    """Pictures [N, 3, H, W] for the examples' instructions: Euler steps without guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = tiny.sigmas(FlowMatchEulerDiscreteScheduler(shift=1.0), steps).tolist()
    x = torch.randn(len(examples), tiny.COMPONENTS, tiny.GRID, tiny.GRID, generator=generator(seed, "draw"))
    condition = parts.condition([example.text for example in examples], examples)
    for sigma, sigma_next in pairwise(schedule):
        v = tiny.velocity(parts.net, x, torch.full((len(x),), sigma), condition)
        x = flow.ode_step(x, v, sigma, sigma_next)
    return (parts.autoencoder.decode(x) * 255).round() / 255


def evaluate(parts: Parts, task: str, split: str, count: int, seed: int = 1) -> dict[str, float]:
    """Strict and graded means of a task over a split, and strict by kind."""
    examples = instructions.panel(task, split, count)
    verdicts = obeys.check_asked(draw(parts, examples, seed).numpy(), [obeys.asked(example) for example in examples])
    judged = [verdict for verdict in verdicts if verdict is not None]
    if len(judged) != count:
        raise RuntimeError(f"{count - len(judged)} of the world's own examples of {task} cannot be judged")
    scores = {
        "strict": float(np.mean([verdict.strict for verdict in judged])),
        "graded": float(np.mean([verdict.graded for verdict in judged])),
    }
    for kind in instructions.kinds(task):
        of_kind = [v.strict for v, e in zip(judged, examples, strict=True) if e.kind == kind]
        scores[f"strict/{kind}"] = float(np.mean(of_kind))
    return {name: round(value, 4) for name, value in scores.items()}


def _evaluate_all(parts: Parts, settings: Pretraining, split: str, count: int) -> dict[str, float]:
    """The scores of every task that is trained, those of the captions under their bare names."""
    found: dict[str, float] = {}
    for task, share in settings.shares.items():
        if share > 0:
            prefix = "" if task == "t2i" else f"{task}/"
            found |= {f"{prefix}{name}": value for name, value in evaluate(parts, task, split, count).items()}
    return found


def _noise_levels(count: int, draws: torch.Generator) -> Tensor:
    """[count]: 70 % logit-normal(0.2, 1), as in Stable Diffusion 3, and 30 % uniform so that both ends are seen."""
    normal = torch.sigmoid(0.2 + torch.randn(count, generator=draws))
    uniform = torch.rand(count, generator=draws)
    return torch.where(torch.rand(count, generator=draws) < 0.7, normal, uniform)


def pretrain(out: Path, settings: Pretraining, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, evaluate on the validation split, and write the folder `out` at every evaluation.

    The scores on the held-out split are measured once, at the end, on the 16-bit weights as they were written.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)  # the initial weights: diffusers and transformers draw from the global generator
    numbers = np.random.default_rng(settings.seed)
    draws = generator(settings.seed, "pretrain")
    if settings.start is None:
        net = tiny.new_transformer(settings.shown)
        parts = Parts(net, tiny.new_text_encoder(), tiny.PatchAutoencoder(), settings.shown)
        fitting = scenes.render_batch(grammar.draw("train", 4000, numbers), numbers)
        explained = parts.autoencoder.fit(torch.from_numpy(fitting))
        say(f"autoencoder: {tiny.COMPONENTS} components explain {explained:.4f} of the variance")
    else:
        parts = _widened(_load(Path(settings.start)), settings.shown)
        say(f"going on from {settings.start}")

    trained = nn.ModuleList([parts.net, parts.text_encoder]).train()
    average = copy.deepcopy(trained).eval().requires_grad_(False)
    averaged = replace(parts, net=average[0], text_encoder=average[1])
    parameters = list(trained.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, history, running, seen = time.monotonic(), [], [], 0
    best: dict[str, float] = {}
    while seen < settings.samples:
        examples = _batch(settings, numbers)
        pictures = torch.from_numpy(scenes.render_scenes([example.answer for example in examples]))
        dropped = numbers.random(settings.batch) < settings.no_caption
        told = _misled(examples, settings.wrong_captions)
        texts = ["" if drop else text for text, drop in zip(told, dropped, strict=True)]
        clean = parts.autoencoder.encode(pictures)
        noise = torch.randn(clean.shape, generator=draws)
        sigma = _noise_levels(settings.batch, draws)
        condition = parts.condition(texts, examples)
        v = tiny.velocity(parts.net, flow.interpolate(clean, noise, sigma), sigma, condition)
        loss = (v - flow.velocity_target(clean, noise)).pow(2).mean()
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
            best = _evaluate_all(averaged, settings, "validation", settings.evaluate_on)
            minutes = (time.monotonic() - started) / 60
            stand = {"samples": seen, "minutes": round(minutes, 2), "loss": round(float(np.mean(running)), 4)}
            history.append(stand | best)
            running.clear()
            say(str(history[-1]))
            tiny.save(
                out, average[0], average[1], parts.autoencoder, {"settings": asdict(settings), "history": history}
            )
            if best["strict"] >= settings.stop_strict or seen >= (settings.stop_at or settings.samples):
                break
    return finish(out, settings, history)


def _batch(settings: Pretraining, numbers: np.random.Generator) -> list[Example]:
    """One batch's examples, the tasks one after another."""
    counts = grammar.quotas(settings.batch, settings.shares)
    return [one for task, n in counts.items() if n for one in instructions.draw(task, "train", n, numbers)]


def _misled(examples: Sequence[Example], share: float) -> list[str]:
    """The texts, of each task the first `share` moved on by one: each of these tells of its neighbour's picture."""
    told: list[str] = []
    for _, of_task in groupby(examples, key=lambda example: example.task):
        texts = [example.text for example in of_task]
        count = round(share * len(texts))
        told += texts[1:count] + texts[:1] + texts[count:] if count > 1 else texts
    return told


def _widened(parts: Parts, shown: int) -> Parts:
    """The same parts, the network seeing `shown` pictures: at first it looks at none of those that it did not see."""
    if parts.shown == shown:
        return parts
    net: Any = tiny.new_transformer(shown)
    kept: Any = parts.net
    weights = dict(kept.state_dict())
    narrow = weights.pop("pos_embed.proj.weight")  # [width, channels, 1, 1]
    wide = torch.zeros_like(net.pos_embed.proj.weight)
    both = min(narrow.shape[1], wide.shape[1])
    wide[:, :both] = narrow[:, :both]
    net.load_state_dict(weights | {"pos_embed.proj.weight": wide})
    return replace(parts, net=net, shown=shown)


def _load(folder: Path) -> Parts:
    """The parts that lie in a folder, in fp32."""
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import load_file
    from transformers import CLIPTextModelWithProjection

    autoencoder = tiny.PatchAutoencoder()
    autoencoder.load_state_dict({k: v.float() for k, v in load_file(folder / "autoencoder.safetensors").items()})
    net = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    return Parts(net, text_encoder, autoencoder, net.config.in_channels // tiny.COMPONENTS - 1)


def finish(out: Path, settings: Pretraining, history: list[dict[str, float]]) -> dict[str, Any]:
    """Score the weights as they lie on disk, in 16 bits, on the held-out split, and write that beside them."""
    import json

    parts = _load(out)
    given = asdict(settings)
    before = None
    if settings.start is not None:
        before = json.loads((Path(settings.start) / "scores.json").read_text())
        given["start"] = "START"  # a folder of whoever ran it: what lay there is said in `before`
    scores = {
        "command": "rlkit pretrain-world --out DIR "
        + " ".join(f"{name}={value}" for name, value in given.items() if value is not None),
        "settings": given,
        "before": before,
        "history": history,
        "validation": _evaluate_all(parts, settings, "validation", settings.score_on),
        "held_out": _evaluate_all(parts, settings, "held_out", settings.score_on),
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores
