"""Pref-GRPO (arXiv 2508.20751): the share of its group that a picture beats, compared in pairs by a judge.

Scores of single pictures lie close together, and dividing by their spread in the group blows up noise; which of two
pictures is better is an easier question. Every pair of a group is compared, G (G - 1) / 2 questions, or each picture
with `opponents` others: its neighbours on a ring in the order of the pictures' hashes. A win counts 1, a tie .5; the
value is the mean over a picture's comparisons, so a judge without contradictions gives k / (G - 1). Equal pictures tie
unasked.

Judges favour a place. Which picture stands first is drawn from the pictures' own content, or, with `both_orders`, each
pair is asked both ways and the two answers are averaged: a judge that always says "first" then ties everything.

Differences from the reference code: the prompts are this project's own; the answer is JSON and read strictly, and a
comparison that failed leaves out that pair alone; a picture may meet fewer opponents than its whole group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlkit.endpoints import Endpoints
from rlkit.judging.answers import Choice
from rlkit.judging.judge import Chat, Question, Sampling, check_options, open_chat
from rlkit.judging.templates import TEXTS, Template, fingerprint, material, optional, read_template, reads
from rlkit.types import Unscored, generator

if TYPE_CHECKING:
    from rlkit.types import Samples

_PROMPTS = Path(__file__).with_name("prompts")
_SHOWN = (*TEXTS, "first", "second", "source", "references")
_FORM = Choice("better", ("first", "second", "tie"))
_WORTH = {"first": 1.0, "second": 0.0, "tie": 0.5}  # to the first picture


@dataclass(frozen=True)
class Pairwise:
    """Win rate within the group, by pairwise comparisons of a vision-language model behind an endpoint (Pref-GRPO)."""

    endpoints: Endpoints  # {urls: [http://127.0.0.1:8000], key_env: NAME}, addresses without /v1
    model: str | None = None  # its name at the endpoint; null: the only one there (a cache of scores cannot tell which)
    template: str = "pairwise"  # pairwise, pairwise_edit (shows the source), or the path of your own prompt file
    opponents: int | None = None  # comparisons a picture, an even number; null: with its whole group
    both_orders: bool = False  # ask each pair both ways round: twice the questions, no favourite place
    attempts: int = 3  # how often an answer that cannot be read is asked for
    sampling: Sampling = field(default_factory=Sampling)  # {temperature: 0.7, top_p: 0.9, top_k: 20, max_tokens: 512}
    guided: bool = True  # hold answers to a JSON schema; false for endpoints that cannot
    body: Mapping[str, Any] = field(default_factory=dict)  # more fields of each request

    reads = ("prompt",)  # an instance's own: what its prompt file shows
    optional: tuple[str, ...] = ()  # an instance's own
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("comparisons",)
    groupwise = True
    licence = "that of the model behind the endpoint"
    size = "none here; the endpoint's model"
    protocol = "Pref-GRPO, arXiv 2508.20751, with prompts of rlkit's own"
    version = "1"  # and, of an instance, its prompt's fingerprint

    def __post_init__(self) -> None:
        check_options(self.endpoints, self.attempts, self.body)
        if self.opponents is not None and (self.opponents < 2 or self.opponents % 2):
            raise ValueError(f"opponents must be an even number of 2 or more, as many on either side: {self.opponents}")
        shown = {"pair": self._prompt()}  # so that a bad file is found before anything runs
        object.__setattr__(self, "reads", reads(shown))
        object.__setattr__(self, "optional", optional(shown))
        object.__setattr__(self, "version", f"{self.version}-{fingerprint(shown)}")

    def load(self, device: torch.device) -> _Scorer:
        chat = open_chat(self.endpoints, self.model, self.sampling, self.attempts, self.guided, self.body)
        return _Scorer(chat, self._prompt(), self.opponents, self.both_orders)

    def _prompt(self) -> Template:
        built_in = self.template in ("pairwise", "pairwise_edit")
        path = _PROMPTS / f"{self.template}.txt" if built_in else Path(self.template)
        template = read_template(path, _SHOWN)
        if not {"first", "second"} <= set(template.names):
            raise ValueError(f"{path} must show $first and $second")
        return template


@dataclass(frozen=True)
class _Picture:
    """One sample of a group, ready to be shown."""

    row: int
    sample: int  # its id
    texts: Mapping[str, str]
    shown: Mapping[str, Sequence[str]]  # name -> data URIs
    digest: str  # of the picture

    @property
    def uri(self) -> Sequence[str]:
        return self.shown["picture"]


Duel = tuple[_Picture, _Picture]


class _Scorer:
    def __init__(self, chat: Chat, template: Template, opponents: int | None, both_orders: bool) -> None:
        self._chat, self._template, self._opponents, self._both_orders = chat, template, opponents, both_orders

    def __call__(self, samples: Samples) -> tuple[list[float | Unscored], dict[str, list[float | None]]]:
        values: list[float | Unscored] = [Unscored("a group of one has nobody to compare with")] * len(samples)
        counts: list[float | None] = [None] * len(samples)
        duels: list[Duel] = []
        uris: dict[int, str] = {}
        for group in samples.group.unique():
            ready = []
            for row in torch.nonzero(samples.group == group).flatten().tolist():
                found = material(samples.media[row], samples.prompts[row], self._template.names, uris)
                if isinstance(found, Unscored):
                    values[row] = found
                else:
                    ready.append(_Picture(row, int(samples.sample_id[row]), *found, _digest(found[1]["picture"][0])))
            duels += pairs(ready, self._opponents)
        met: dict[int, list[float | Unscored]] = {}
        for (one, other), worth in zip(duels, self._judged(duels), strict=True):
            met.setdefault(one.row, []).append(worth)
            met.setdefault(other.row, []).append(worth if isinstance(worth, Unscored) else 1 - worth)
        for row, outcomes in met.items():
            valid = [worth for worth in outcomes if not isinstance(worth, Unscored)]
            failed = next((worth for worth in outcomes if isinstance(worth, Unscored)), None)
            if valid:
                values[row], counts[row] = sum(valid) / len(valid), float(len(valid))
            elif failed is not None:
                values[row] = Unscored(f"none of its {len(outcomes)} comparisons succeeded: {failed.reason}")
        return values, {"comparisons": counts}

    def close(self) -> None:
        self._chat.close()

    def _judged(self, duels: Sequence[Duel]) -> list[float | Unscored]:
        """What each duel is worth to its first picture."""
        asked: list[tuple[int, bool]] = []  # (duel, whether its pictures changed places)
        questions = []
        worths: list[list[float | Unscored]] = [[] for _ in duels]
        for number, (one, other) in enumerate(duels):
            if one.digest == other.digest:
                worths[number].append(0.5)
                continue
            for swapped in (False, True) if self._both_orders else (_coin(one, other),):
                first, second = (other, one) if swapped else (one, other)
                pictures = {**one.shown, "first": first.uri, "second": second.uri}
                questions.append(Question(self._template.fill(one.texts, pictures), _FORM))
                asked.append((number, swapped))
        for (number, swapped), answer in zip(asked, self._chat.ask(questions), strict=True):
            if isinstance(answer, Unscored):
                worths[number].append(answer)
            else:
                worths[number].append(1 - _WORTH[answer] if swapped else _WORTH[answer])
        return [_mean(one) for one in worths]


def pairs(ready: Sequence[_Picture], opponents: int | None) -> list[Duel]:
    """Who meets whom in a group, whatever the order in which it comes. The hashes are as good as a shuffle."""
    ring = sorted(ready, key=lambda one: (one.digest, one.sample))
    size = len(ring)
    if opponents is None or opponents >= size - 1:
        return list(combinations(ring, 2))
    return [(ring[i], ring[(i + d) % size]) for d in range(1, opponents // 2 + 1) for i in range(size)]


def _mean(worths: Sequence[float | Unscored]) -> float | Unscored:
    """With one of two orders missing there is no comparison: what is left has a favourite place."""
    valid = [worth for worth in worths if not isinstance(worth, Unscored)]
    failed = [worth for worth in worths if isinstance(worth, Unscored)]
    return failed[0] if failed else sum(valid) / len(valid)


def _coin(one: _Picture, other: _Picture) -> bool:
    """Whether the pictures change places: a draw of its own for each pair, in either order of the two."""
    low, high = sorted((one.digest, other.digest))
    heads = bool(torch.randint(2, (), generator=generator("order", low, high)))
    return heads if one.digest == low else not heads


def _digest(uri: str) -> str:
    return hashlib.blake2b(uri.encode(), digest_size=16).hexdigest()
