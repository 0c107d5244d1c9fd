"""A vision-language model as a judge, behind an OpenAI-compatible endpoint: requests, and rounds of questions.

What it is shown is in templates.py; how its answers are read, which nothing in a prompt can change, in answers.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rlkit.endpoints import Endpoints, Failure, Pool, Reply, Request
from rlkit.errors import RewardError, nearest
from rlkit.judging.answers import Checklist, Form, Prose, Unreadable
from rlkit.judging.templates import ASKED, PICTURES, TEXTS, Template, material, quoted, read_template
from rlkit.types import Samples, Unscored, seed_of

OURS = ("messages", "model", "seed", "n", "stream", "response_format", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class Sampling:
    """How the judge writes where it writes more than one token. The defaults are EditScore's."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int | None = 20  # null: not sent, for endpoints that do not know it
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be 0 or more, and top_p above 0 and at most 1")
        if self.max_tokens < 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError("max_tokens and top_k must be 1 or more")


@dataclass(frozen=True)
class Question:
    """Messages, and the form that the answer must have. turn: the same question is asked once for each number."""

    messages: Sequence[Mapping[str, Any]]
    form: Form
    turn: int = 0

    @property
    def key(self) -> str:
        """What seeds are made of: the content, so that neither order nor company changes an answer."""
        content = json.dumps([self.messages, repr(self.form), self.turn]).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Chat:
    """One model behind some endpoints. An answer that cannot be read is asked for again with another seed."""

    pool: Pool
    model: str
    sampling: Sampling = Sampling()
    attempts: int = 3
    guided: bool = True
    body: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """What each answer says, or Unscored; in order. Equal questions are asked once."""
        keys = [question.key for question in questions]
        unique = dict(zip(keys, questions, strict=True))
        answers: dict[str, Any] = {}
        waiting = list(unique)
        for attempt in range(self.attempts):
            if not waiting:
                break
            replies = self.pool.map([self._request(unique[key], seed_of(key, attempt)) for key in waiting])
            again = []
            for key, reply in zip(waiting, replies, strict=True):
                form = unique[key].form
                try:
                    answers[key] = _answer(reply, form)
                except Unreadable as error:
                    tries = "" if attempt == 0 else f" (the last of {attempt + 1} answers)"
                    answers[key] = Unscored(f"{error}{tries}")
                    again += [key] if form.sampled else []
            waiting = again
        return [answers[key] for key in keys]

    def close(self) -> None:
        self.pool.close()

    def _request(self, question: Question, seed: int) -> Request:
        sampling = self.sampling
        fields = {
            "model": self.model,
            "messages": list(question.messages),
            "seed": seed % 2**31,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            **self.body,
            **question.form.fields(self.guided),
        }
        sent = {key: value for key, value in fields.items() if value is not None}
        return Request("/v1/chat/completions", json=sent)


def _answer(reply: Reply | Failure, form: Form) -> Any:
    if isinstance(reply, Failure):
        return Unscored(reply.reason)  # the endpoints have tried again already
    try:
        (choice,) = reply.json()["choices"]
    except (ValueError, KeyError, TypeError) as error:
        raise Unreadable("the reply is no chat completion with one choice") from error
    if not isinstance(choice, Mapping):
        raise Unreadable("the reply is no chat completion with one choice")
    return form.read(choice)


def check_options(endpoints: Endpoints, attempts: int, body: Mapping[str, Any]) -> None:
    """What the options of every judge have in common. ValueError says what to do."""
    for url in endpoints.urls:
        if url.rstrip("/").endswith(("/v1", "/chat/completions")):
            raise ValueError(f"write the address {url!r} without /v1: it is added")
    if attempts < 1:
        raise ValueError(f"attempts must be 1 or more, not {attempts}")
    if taken := sorted(set(OURS) & set(body)):
        raise ValueError(f"body must not set {', '.join(taken)}: the reward does")


def open_chat(
    endpoints: Endpoints, model: str | None, sampling: Sampling, attempts: int, guided: bool, body: Mapping[str, Any]
) -> Chat:
    """Ready to ask. Without a model, the endpoint is asked for the only one that it serves."""
    pool = endpoints.open()
    try:
        return Chat(pool, model or _only_model(pool), sampling, attempts, guided, body)
    except BaseException:  # nobody else holds the pool yet
        pool.close()
        raise


def _only_model(pool: Pool) -> str:
    try:
        served = [str(one["id"]) for one in pool.get("/v1/models")["data"]]
    except (KeyError, TypeError) as error:
        raise RewardError("/v1/models gave no list of models", hint="Set the option model.") from error
    if len(served) != 1:
        what = f"the endpoint serves {len(served)} models: {', '.join(served) or 'none'}"
        raise RewardError(what, hint="Set the option model to one of them.")
    return served[0]


# ---------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Stage:
    """One question of a scheme. Later rounds can name its answer as $NAME."""

    name: str
    file: str  # of its prompt
    form: Form | Callable[[Mapping[str, Any]], Form]  # a function of the earlier answers where it depends on them
    once: bool = False  # it is about the prompt alone: asked once, and remembered


@dataclass(frozen=True)
class Scheme:
    """What is asked about a sample, in rounds, and how the answers become numbers."""

    rounds: tuple[tuple[Stage, ...], ...]
    total: Callable[[Mapping[str, Any]], tuple[float, ...]]  # answers by stage -> the value, then the components
    components: tuple[str, ...]

    @property
    def said(self) -> tuple[str, ...]:
        """The stages whose answers are words, which later prompts may show."""
        return tuple(one.name for now in self.rounds for one in now if isinstance(one.form, Prose | Checklist))

    def templates(self, folder: Path, own: Mapping[str, str]) -> dict[str, Template]:
        """The prompts by stage, from this folder or, where `own` has a path for the stage, from there."""
        stages = [stage.name for now in self.rounds for stage in now]
        for name in own:
            if name not in stages:
                raise ValueError(f"prompts has {name!r}.{nearest(name, stages)} Prompts here: {', '.join(stages)}")
        found: dict[str, Template] = {}
        for now in self.rounds:
            known = (*TEXTS, *PICTURES, *(name for name in self.said if name in found))
            for stage in now:
                path = Path(own[stage.name]) if stage.name in own else folder / stage.file
                found[stage.name] = read_template(path, ASKED if stage.once else known)
        if not any("picture" in template.names for template in found.values()):
            raise ValueError("none of the prompts shows $picture")
        return found


@dataclass
class Case:
    """One pass over one sample."""

    turn: int
    texts: Mapping[str, str]
    pictures: Mapping[str, Sequence[str]]
    answers: dict[str, Any] = field(default_factory=dict)
    trouble: Unscored | None = None


class Scorer:
    """Asks a scheme's questions about each sample, `num_pass` times, and averages."""

    def __init__(self, chat: Chat, scheme: Scheme, templates: Mapping[str, Template], num_pass: int = 1) -> None:
        self._chat, self._scheme, self._templates, self._num_pass = chat, scheme, templates, num_pass
        self._shown = {name for template in templates.values() for name in template.names}
        self._once: dict[tuple[str, str], Any] = {}  # (stage, prompt) -> its answer
        self.fingerprint = chat.model  # the endpoint's only one may be another tomorrow

    def __call__(self, samples: Samples) -> tuple[list[float | Unscored], dict[str, list[float | None]]]:
        uris: dict[int, str] = {}
        rows = [
            self._cases(material(media, prompt, self._shown, uris))
            for media, prompt in zip(samples.media, samples.prompts, strict=True)
        ]
        for stages in self._scheme.rounds:
            self._round(stages, [case for cases in rows for case in cases if case.trouble is None])
        results = [self._mean(cases) for cases in rows]
        values = [one if isinstance(one, Unscored) else one[0] for one in results]
        parts = enumerate(self._scheme.components, 1)
        return values, {
            name: [None if isinstance(one, Unscored) else one[position] for one in results] for position, name in parts
        }

    def close(self) -> None:
        self._chat.close()

    def _cases(self, found: tuple[dict[str, str], dict[str, list[str]]] | Unscored) -> list[Case]:
        if isinstance(found, Unscored):
            return [Case(0, {}, {}, trouble=found)]
        return [Case(turn, *found) for turn in range(self._num_pass)]

    def _round(self, stages: Sequence[Stage], cases: Sequence[Case]) -> None:
        asked: list[tuple[Case, Stage]] = []
        questions = []
        for case in cases:
            said = {name: quoted(case.answers[name]) for name in self._scheme.said if name in case.answers}
            for stage in stages:
                key = (stage.name, case.texts["instruction"])
                if stage.once and key in self._once:
                    case.answers[stage.name] = self._once[key]
                    continue
                form = stage.form(case.answers) if callable(stage.form) else stage.form
                messages = self._templates[stage.name].fill({**case.texts, **said}, case.pictures)
                questions.append(Question(messages, form, 0 if stage.once else case.turn))
                asked.append((case, stage))
        for (case, stage), answer in zip(asked, self._chat.ask(questions), strict=True):
            if isinstance(answer, Unscored):
                case.trouble = case.trouble or Unscored(f"{stage.name}: {answer.reason}")
                continue
            case.answers[stage.name] = answer
            if stage.once:
                self._once[stage.name, case.texts["instruction"]] = answer

    def _mean(self, cases: Sequence[Case]) -> tuple[float, ...] | Unscored:
        """Over the passes that gave a number, if those are more than half."""
        totals = [self._scheme.total(case.answers) for case in cases if case.trouble is None]
        if 2 * len(totals) <= len(cases):
            return next(case.trouble for case in cases if case.trouble is not None)
        return tuple(fmean(column) for column in zip(*totals, strict=True))


__all__ = ["Chat", "Question", "Sampling", "Scheme", "Scorer", "Stage", "check_options", "open_chat"]
