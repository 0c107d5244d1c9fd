"""A worker for tests of `ahead`, in this process: it computes nothing, and samples one token at a time.

Each token bears the version that the worker has at that moment, and can be held until the test lets go. Nothing is
timed; whoever waits, waits for an event.
"""

import threading
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rlkit.rollouts.vllm import CANARY
from rlkit.types import Span, seed_of
from rlkit.workers.worker import FRESH, Answer, Fault, Request

LONG = 6  # tokens of an answer; a canary has 4
PROMPTS, GROUP = 3, 4
LATE = 10.0  # seconds after which what is waited for will not come any more


def seeds(step: int, places: Sequence[int] = range(PROMPTS * GROUP), seed: int = 0) -> list[int]:
    """Of a step's requests, by which the worker knows them."""
    return [seed_of(seed, "main", step, "answer", i) % (1 << 31) for i in places]


class Held:
    """A worker whose answers can be held before a token. `told`: what happened, in order."""

    at_once, batch, name = 64, 1, "held"

    def __init__(self) -> None:
        self.version = FRESH
        self.told: list[tuple[str, Any]] = []
        self.gates: dict[int, tuple[int, threading.Event]] = {}  # seed -> (token, what it waits for)
        self.refused: set[int] = set()
        self.ended = False
        self._standing, self._paused = threading.Lock(), False
        self._news = threading.Condition()

    def hold(self, chosen: Sequence[int], token: int) -> threading.Event:
        """Answers to these seeds wait before this token."""
        gate = threading.Event()
        self.gates |= dict.fromkeys(chosen, (token, gate))
        return gate

    def say(self, what: str, which: Any) -> None:
        with self._news:
            self.told.append((what, which))
            self._news.notify_all()

    def until(self, what: str, which: Sequence[int]) -> None:
        with self._news:
            wanted = {(what, one) for one in which}
            assert self._news.wait_for(lambda: wanted <= set(self.told), LATE), f"{what}: not all of {which}"

    def asked(self) -> list[int]:
        """The seeds of all requests so far but those of canaries."""
        with self._news:
            return [which for what, which in self.told if what == "asked"]

    # ---- the words of a worker ---------------------------------------------------------------------------------------

    def answer(self, requests: Sequence[Request], seconds: float) -> list[tuple[Answer, ...] | Fault]:
        return [self._one(one) for one in requests]

    def _one(self, request: Request) -> tuple[Answer, ...] | Fault:
        seed, canary, versions = request.seed or 0, request.most == CANARY, []
        if not canary:
            self.say("asked", seed)
        if seed in self.refused:
            return Fault("the network is on strike", again=False)
        for at in range(request.most):
            token, gate = self.gates.get(seed, (-1, threading.Event()))
            if at == token:
                self.say("held", seed)
                assert gate.wait(LATE)
                if self.ended:
                    return Fault("aborted")
            with self._standing:
                versions.append(int(self.version))
        lengths = [(version, len(list(same))) for version, same in groupby(versions)]
        spans, start = [], 0
        for version, length in lengths:
            spans.append(Span(version, start, start + length))
            start += length
        if not canary:
            self.say("done", seed)
        ids = tuple((seed + at) % 90 for at in range(request.most))
        return (Answer(ids, (-0.5,) * request.most, tuple(spans), False, self.name),)

    def label(self) -> str:
        return self.version

    def stamp(self, label: str) -> None:
        self.version = label

    def pause(self) -> None:
        self._standing.acquire()
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._standing.release()

    def start(self) -> None:
        return None

    def update(self, info: Mapping[str, Any], seconds: float) -> None:
        assert Path(info["path"]).exists()

    def finish(self, version: int) -> None:
        self.version = str(version)
        self.say("pushed", version)

    def abandon(self) -> None:
        self.ended = True
        self.say("abandoned", 0)
        for _, gate in self.gates.values():
            gate.set()

    def close(self) -> None:
        self.say("closed", 0)
