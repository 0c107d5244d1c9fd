"""`rlkit pretrain-connector`: make the connector that ships between the tiny captioner and the tiny generator.

UAE trains its decoder on 700,000 long captions before its three stages begin (its section 2). Here the generator has a
text encoder of its own, and the connector learns to say what that says: from the states with which the captioner reads
a caption, those of the encoder at the same words, and its pooled vector, by least squares. Only the connector is
trained, and not to the end: the stages after it should have something to do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit import flow
from rlkit.backbones import projector
from rlkit.backbones.projector import Projector
from rlkit.backbones.tiny import Tiny
from rlkit.backbones.tiny_captioner import BASE, TinyCaptioner
from rlkit.language import LanguagePolicy
from rlkit.parts import Connector, Parts
from rlkit.policy import Policy
from rlkit.types import Condition, Prompt, generator
from rlkit.weights import FROZEN
from rlkit.world import grammar, obeys


@dataclass(frozen=True)
class Connecting:
    """Settings of one pretraining run."""

    captions: int = 8192  # of the training split, read once
    steps: int = 3000  # optimiser steps
    batch: int = 256
    lr: float = 2e-3  # falls linearly to 0
    width: int = 256  # of the connector's inner layer
    seed: int = 0
    threads: int = 1
    evaluate_every: int = 500  # steps
    evaluate_on: int = 256  # validation captions, one picture each
    score_on: int = 1024  # captions of the validation and of the held-out split, at the end


@dataclass(frozen=True)
class Neighbours:
    """The shipped captioner and generator, frozen, and the connector between them."""

    policy: Parts
    tokenize: Callable[[str], list[int]]  # a caption as the captioner writes it, its end included

    def told(self, captions: Sequence[grammar.Caption]) -> list[Prompt]:
        """Captions as the generator's prompts. The captioner reads them by themselves, so any picture would do."""
        asked = Prompt(id=0, text="", source=torch.zeros(3, 32, 32))
        prompts = [
            replace(asked, id=row, text=caption.text, asked=asked, answer=tuple(self.tokenize(caption.text)))
            for row, caption in enumerate(captions)
        ]
        self.policy.conditions.encode(prompts)
        return prompts


def assemble(settings: Connecting) -> Neighbours:
    """With an untrained connector."""
    from transformers import AutoTokenizer

    device = torch.device("cpu")
    captioner, drawn = TinyCaptioner().load(device, torch.float32), Tiny().load(device, torch.float32)
    writer = LanguagePolicy(captioner, FROZEN, device, "fp32", settings.seed)
    drawer = Policy(drawn, FROZEN, device, "fp32", settings.seed)
    connection = Projector(width=settings.width).load(device, torch.float32)
    connector = Connector(connection, writer, drawn, None, "fp32", settings.seed)
    policy = Parts({"captioner": writer, "connector": connector, "generator": drawer})
    policy.stage({"connector": ()}, "flow")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return Neighbours(policy, lambda text: [*tokenizer(text).input_ids, captioner.ends[0]])


def apart(said: Condition, wanted: Condition) -> Tensor:
    """How far the connector's condition is from the encoder's: mean squares of tokens and of the pooled vector.

    The encoder's first token is the beginning of every text; the connector's first is that of the first word. Behind
    the last word both fill up, and the connector's last place has nothing to say.
    """
    tokens = (said["tokens"][:, :-1] - wanted["tokens"][:, 1:]).pow(2).mean()
    return tokens + (said["pooled"] - wanted["pooled"]).pow(2).mean()


@torch.no_grad()
def evaluate(neighbours: Neighbours, split: str, count: int, seed: int = 1, steps: int = 10) -> dict[str, float]:
    """How true the generator's pictures are of the captions that the captioner reads to it."""
    drawer = neighbours.policy.drawer
    captions = grammar.panel(split, count)
    keys = [prompt.key for prompt in neighbours.told(captions)]
    x = torch.randn(count, *drawer.model.latent_shape, generator=generator(seed, "draw"))
    for sigma, sigma_next in pairwise(drawer.model.sigmas(steps).tolist()):
        v = drawer.models.current.velocity(x, torch.full((count,), sigma), keys)
        x = flow.ode_step(x, v, sigma, sigma_next)
    drawn = (drawer.model.decode(x) * 255).round() / 255
    verdicts = obeys.check_asked(drawn.numpy(), [obeys.Asked(caption.text, None, ()) for caption in captions])
    judged = [verdict for verdict in verdicts if verdict is not None]
    scores = {"strict": np.mean([one.strict for one in judged]), "graded": np.mean([one.graded for one in judged])}
    return {name: round(float(value), 4) for name, value in scores.items()}


def pretrain_connector(out: Path, settings: Connecting, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, evaluate on the validation split, and write the folder `out`."""
    torch.set_num_threads(settings.threads)
    numbers, started = np.random.default_rng(settings.seed), time.monotonic()
    neighbours = assemble(settings)
    policy, model = neighbours.policy, neighbours.policy.drawer.model
    prompts = neighbours.told(grammar.draw("train", settings.captions, numbers))
    wanted = model.collate(model.encode(prompts))
    optimizer = torch.optim.AdamW(policy.trainable.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    history: list[dict[str, float]] = []
    for step in range(settings.steps):
        rows = numbers.choice(len(prompts), settings.batch, replace=False).tolist()
        said = policy.conditions.batch([prompts[row].key for row in rows])
        loss = apart(said, {name: one[rows] for name, one in wanted.items()})
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / settings.steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        policy.updated()
        if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
            stand = {"step": step + 1, "seconds": round(time.monotonic() - started), "loss": round(loss.item(), 4)}
            history.append(stand | evaluate(neighbours, "validation", settings.evaluate_on))
            say(str(history[-1]))
    projector.write(policy.connector.net, out, torch.float16)
    projector.read(policy.connector.net, out)  # type: ignore[arg-type]  # what is scored is what was written
    given = asdict(settings)
    scores = {
        "command": "rlkit pretrain-connector --out DIR " + " ".join(f"{name}={value}" for name, value in given.items()),
        "settings": given,
        "history": history,
        "validation": evaluate(neighbours, "validation", settings.score_on),
        "held_out": evaluate(neighbours, "held_out", settings.score_on),
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return scores
