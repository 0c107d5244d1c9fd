"""`rlkit pretrain-agent`: make the tiny language model that ships with rlkit, from nothing, on one machine.

It learns to read and to copy. Chats tell it what flags, emblems and styles show in the words of the atlas, but every
fact is drawn anew for each chat, so that none can be known; what an experience holds; or any words in a row. Questions
about them have answers that stand in the chat, or, for an emblem, follow from two things in it. The loss is on the
answers alone. No chat shows a tool call or an answer's tags, none asks for a drawing, and none tells anything of a
place that the atlas holds out: the questions that decide when to stop are about those.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlkit.agents.experience import Bundle, told
from rlkit.backbones import tiny_agent as agent
from rlkit.pretrain.schedule import follow, rate
from rlkit.world import atlas, grammar
from rlkit.world.atlas import Request
from rlkit.world.grammar import Caption

KINDS = ("repeat", "experience", "flag", "style", "skill", "emblem")  # of questions; an emblem takes two statements
TOPICS = {"repeat": 0.15, "experience": 0.2, "facts": 0.65}  # of chats
FORMS = {"plain": 0.7, "quote": 0.15, "JSON": 0.15}  # in which an answer is asked for
KEYS = ("text", "title", "object", "results")  # under which an answer stands in JSON
FAILURES = ("looked nothing up", "guessed the style", "called unknown tool find", "gave no answer")
POOL = 8  # batches that are drawn together and sorted by length, so that little is padded


@dataclass(frozen=True)
class Reading:
    """Settings of one pretraining run. `chats` is the length of the schedule; `stop_right` may end it sooner."""

    chats: int = 130_000
    copying: int = 16_000  # chats at first that only repeat, from which copying is learnt soonest
    batch: int = 16
    lr: float = 2e-3
    warmup: int = 100  # optimiser steps
    decay: float = 0.4  # share of the schedule over which the rate falls linearly to 0
    ema: float = 0.998
    seed: int = 0
    threads: int = 1
    evaluate_every: int = 8_000  # chats
    evaluate_on: int = 400  # chats about places that no training chat names
    stop_right: float = 1.0  # stop once this share is right of the kind of question that is answered worst

    def __post_init__(self) -> None:
        for name in ("chats", "batch", "warmup", "threads", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.evaluate_on < 20:
            raise ValueError(f"evaluate_on must be 20 or more, for some of every kind, not {self.evaluate_on}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be a share above 0 and at most 1, not {self.decay}")


# ---- chats -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What is said to the model, and what it should say."""

    said: str
    kind: str  # one of KINDS
    answer: str


@dataclass(frozen=True)
class Chat:
    system: str
    rounds: tuple[Round, ...]


def draw(places: Sequence[str], n: int, rng: np.random.Generator, topics: Sequence[str] = tuple(TOPICS)) -> list[Chat]:
    """`n` chats about some of these places."""
    made = {"repeat": _repeating, "experience": _experienced, "facts": _factual}
    weights = np.array([TOPICS[topic] for topic in topics])
    return [made[topic](places, rng) for topic in rng.choice(topics, size=n, p=weights / weights.sum()).tolist()]


def _repeating(places: Sequence[str], rng: np.random.Generator) -> Chat:
    """Any words, so that every word that can be read can be copied; or a title."""
    rounds = []
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.3:
            text = f"{_one(list(atlas.KINDS), rng)} of {_one(places, rng)}"
        else:
            words = agent.vocabulary()
            text = " ".join(words[i] for i in rng.integers(len(words), size=int(rng.integers(2, 9))))
        rounds.append(_round("", "repeat", f"repeat: {text}", text, rng))
    return Chat("", tuple(rounds))


def _experienced(places: Sequence[str], rng: np.random.Generator) -> Chat:
    """An experience in the system's turn, and questions about what stands in its slots."""
    subject = f"{_one(list(atlas.KINDS), rng)} of {_one(places, rng)}"
    slots = {
        "search": subject,
        "skills": _one(list(atlas.STYLES), rng),
        "prompt": _caption(rng).text,
        "failure": _one(FAILURES, rng),
    }
    kept = [slot for slot in slots if rng.random() < 0.7] or ["prompt"]
    asked = [kept[i] for i in rng.permutation(len(kept))[:3].tolist()]
    bundle = Bundle(**{slot: slots[slot] for slot in kept})
    rounds = [_round("", "experience", f"what is under {slot}?", slots[slot], rng) for slot in asked]
    return Chat(told(bundle), tuple(rounds))


def _factual(places: Sequence[str], rng: np.random.Generator) -> Chat:
    """Statements about one to three flags and emblems and about styles, told at once or as they are asked for."""
    chosen = [places[i] for i in rng.permutation(len(places))[: int(rng.integers(1, 4))].tolist()]
    subjects = [_invented(place, rng) for place in chosen]
    hows = {style: _one(list(atlas.STYLES.values()), rng) for style in atlas.STYLES}
    questions: list[tuple[str, str, str, list[str]]] = []  # kind, text, answer, the statements that it follows from
    for one in subjects:
        document = atlas.document(one)
        stated = document.text if rng.random() < 0.5 else f"1. {document.title}: {document.text}"
        if not one.style:
            questions.append(("flag", _asking(one.subject, rng), one.caption.text, [stated]))
            continue
        skill, how = skill_text(one.style, hows[one.style]), hows[one.style]
        shown = Caption("relation", one.caption.objects, relation=how)
        both = [
            ("style", f"which style is the {one.subject}?", one.style, [stated]),
            ("skill", f"what does the {one.style} style say?", f"the first stands {how} the second", [skill]),
        ]
        questions += [both[int(rng.integers(2))]] if rng.random() < 0.5 else []
        questions.append(("emblem", _asking(one.subject, rng), shown.text, [stated, skill]))
    others = [skill_text(style, how) for style, how in hows.items() if rng.random() < 0.25]
    if rng.random() < 0.7:
        order = rng.permutation(len(questions)).tolist()
        everything = list(dict.fromkeys([*others, *(text for question in questions for text in question[3])]))
        first = [everything[i] for i in rng.permutation(len(everything)).tolist()]
    else:
        order, first = list(range(len(questions))), others
    rounds, said = [], set[str]()
    for kind, question, answer, needed in (questions[i] for i in order):
        new = [text for text in dict.fromkeys([*first, *needed]) if text not in said]
        said.update(new)
        first = []
        rounds.append(_round(("\n" if rng.random() < 0.5 else " ").join(new), kind, question, answer, rng))
    return Chat("", tuple(rounds))


def skill_text(style: str, how: str) -> str:
    """What the atlas would say of a style in which things stand like this."""
    return f"In the {style} style the first stands {how} the second."


def _invented(place: str, rng: np.random.Generator) -> Request:
    """A flag or an emblem that shows anything at all."""
    if rng.random() < 0.4:
        return Request("flag", place, _caption(rng))
    pairs = grammar.captions("two")
    return Request("emblem", place, pairs[int(rng.integers(len(pairs)))], _one(list(atlas.STYLES), rng))


def _caption(rng: np.random.Generator) -> Caption:
    pool = grammar.captions(_one(list(grammar.KINDS), rng))
    return pool[int(rng.integers(len(pool)))]


def _asking(subject: str, rng: np.random.Generator) -> str:
    return f"what does the {subject} show?" if rng.random() < 0.5 else f"what is the {subject}?"


def _round(before: str, kind: str, question: str, answer: str, rng: np.random.Generator) -> Round:
    """A question behind the statements, or before them, with the form in which it wants its answer."""
    form = str(rng.choice(list(FORMS), p=list(FORMS.values())))
    if form == "quote":
        question, answer = f"quote: {question}", json.dumps(answer)
    if form == "JSON":
        key = _one(KEYS, rng)
        question, answer = f"write {key} as JSON: {question}", json.dumps({key: answer})
    parts = [part for part in (before, question) if part]
    return Round("\n".join(parts if rng.random() < 0.6 else parts[::-1]), kind, answer)


def _one(names: Sequence[str], rng: np.random.Generator) -> str:
    return names[int(rng.integers(len(names)))]


# ---- a network that learns them --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    net: Any
    tokenizer: Any


def assemble() -> Parts:
    """Untrained parts."""
    tokenizer = agent.new_tokenizer()
    return Parts(agent.new_network(tokenizer), tokenizer)


def spelled(tokenizer: Any, chat: Chat) -> tuple[list[int], list[int]]:
    """A chat's tokens as the chat template writes it, and for each the number of the answer it is part of, or -1."""
    pieces = [(f"<|im_start|>system\n{chat.system}<|im_end|>\n", -1)] if chat.system else []
    for i, one in enumerate(chat.rounds):
        pieces.append((f"<|im_start|>user\n{one.said}<|im_end|>\n<|im_start|>assistant\n", -1))
        pieces.append((f"{one.answer}<|im_end|>", i))
        pieces.append(("\n", -1))
    ids, owner = list[int](), list[int]()
    for written, (_, i) in zip(tokenizer([text for text, _ in pieces]).input_ids, pieces, strict=True):
        ids += written
        owner += [i] * len(written)
    return ids[:-1], owner[:-1]  # nothing follows the last answer


def answered(parts: Parts, chats: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """For every token of an answer: the logits [T, V], the token [T], and chat and answer that it is of [T, 2]."""
    width = max(len(ids) for ids, _ in chats)
    pad = parts.tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in chats])  # [B, L]
    owner = torch.tensor([row + [-1] * (width - len(row)) for _, row in chats])
    wanted = owner[:, 1:] >= 0
    states = parts.net.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # nothing sees what comes later
    logits: Tensor = parts.net.lm_head(states[wanted])
    return logits, ids[:, 1:][wanted], torch.stack([wanted.nonzero()[:, 0], owner[:, 1:][wanted]], dim=1)


@torch.no_grad()
def evaluate(parts: Parts, count: int, seed: int = 1) -> dict[str, float]:
    """The share of answers that are right to the last token, by kind, about places that training does not name."""
    rng = np.random.default_rng(seed)
    chats = draw(named("held_out"), count, rng)
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for start in range(0, count, 50):
        some = chats[start : start + 50]
        logits, ids, owner = answered(parts, [spelled(parts.tokenizer, chat) for chat in some])
        wrong = {(int(row), int(i)) for row, i in owner[logits.argmax(dim=1) != ids].tolist()}
        for row, chat in enumerate(some):
            for i, one in enumerate(chat.rounds):
                found[one.kind].append((row, i) not in wrong)
    return {kind: round(float(np.mean(right)), 4) for kind, right in found.items()}


def named(split: str) -> tuple[str, ...]:
    """Those of the atlas that are held out, and those of nowhere else: any two names that are not among them."""
    if split == "held_out":
        return (*atlas.places("held_out"), *atlas.places("validation"))
    never = set(named("held_out"))
    everywhere = (f"{first} {second}" for first in atlas.FIRST for second in atlas.SECOND)
    return tuple(place for place in everywhere if place not in never)


def batches(parts: Parts, settings: Reading) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Chats without end, those of a batch about equally long."""
    rng, pool, drawn = np.random.default_rng(settings.seed), named("train"), 0
    while True:
        topics = ("repeat",) if drawn < settings.copying else tuple(TOPICS)
        chats = [spelled(parts.tokenizer, chat) for chat in draw(pool, POOL * settings.batch, rng, topics)]
        chats.sort(key=lambda chat: len(chat[0]))
        drawn += len(chats)
        for i in rng.permutation(POOL).tolist():
            yield chats[i * settings.batch : (i + 1) * settings.batch]


def pretrain_agent(out: Path, settings: Reading, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train, evaluate on held-out places, and write the folder `out` at every evaluation."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)  # the initial weights: transformers draws from the global generator
    parts = assemble()
    averaged = Parts(copy.deepcopy(parts.net).eval().requires_grad_(False), parts.tokenizer)
    parameters = list(parts.net.train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    scores: dict[str, Any] = {
        "command": "rlkit pretrain-agent --out DIR "
        + " ".join(f"{name}={value}" for name, value in asdict(settings).items()),
        "settings": asdict(settings),
        "history": [],
    }
    started, running, seen = time.monotonic(), list[float](), 0
    for chats in batches(parts, settings):
        logits, ids, _ = answered(parts, chats)
        loss = F.cross_entropy(logits, ids)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(seen, settings.chats, settings.batch, settings.warmup, settings.decay)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        before, seen = seen, seen + settings.batch
        follow(averaged.net.parameters(), parameters, seen / settings.batch, settings.ema)
        running.append(loss.item())
        if before // settings.evaluate_every != seen // settings.evaluate_every or seen >= settings.chats:
            found = evaluate(averaged, settings.evaluate_on)
            minutes = (time.monotonic() - started) / 60
            stand = {"chats": seen, "minutes": round(minutes, 2), "loss": round(float(np.mean(running)), 4)}
            scores["history"].append(stand | found)
            running.clear()
            say(str(scores["history"][-1]))
            save(out, averaged, scores)
            if seen >= settings.chats or min(found.values()) >= settings.stop_right:
                break
    return scores


def save(folder: Path, parts: Parts, scores: object) -> None:
    """What transformers and vLLM load: configuration, 16-bit weights, tokenizer, chat template."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    half = torch.float16  # more mantissa than bf16, and every weight is far inside its range
    copy.deepcopy(parts.net).to(half).save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
