"""A reward on a reward server: `rlkit serve-reward NAME`, or anything that speaks the protocol `rlkit-reward/1`.

Pictures travel without loss, texts and metadata as JSON, and nothing is pickled. What the server could not score, or
what was lost on the way, has no score and a reason; the rest of the batch counts. The server's answer is checked:
that it belongs to the question, that it has one answer a sample in the same order, and that numbers are finite.

What the server says of its reward when the run starts has to stay true: if it is started again with other options, its
answers are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlkit import wire
from rlkit.endpoints import Endpoints, Failure, Pool, Reply, Request
from rlkit.errors import RewardError, nearest
from rlkit.types import Samples, Unscored

if TYPE_CHECKING:
    from torch import Tensor

Column = list["float | Unscored"]


@dataclass(frozen=True)
class Http:
    """A reward that is served elsewhere, by `rlkit serve-reward` on this or another machine."""

    endpoints: Endpoints  # {urls: [http://127.0.0.1:8765], key_env: RLKIT_REWARD_TOKEN, ...}; all serve the same
    name_there: str | None = None  # of the rewards there; null: its only one
    max_pictures: int = 64  # samples a request, unless a group is larger
    codec: Literal["png", "raw"] = "png"  # raw: three times as many bytes and no packing, for a fast network

    reads = ("prompt",)
    optional = ("metadata", "target_text", "source", "references")  # sent as far as the samples have them
    range = (None, None)  # the server's, once it is loaded
    higher_is_better = True
    components = ()  # the server's, once it is loaded
    groupwise = True  # the reward there may be
    licence = "of the reward there"
    size = "none here"
    protocol = "rlkit-reward/1"
    version = "1"

    def __post_init__(self) -> None:
        if not 1 <= self.max_pictures <= wire.PICTURES:
            raise ValueError(f"max_pictures must be 1 to {wire.PICTURES}, not {self.max_pictures}")

    def load(self, device: torch.device) -> _There:
        """Asks what is served, so that a wrong address, token or name is found before the first step."""
        pool = self.endpoints.open()
        try:
            return _There(self, pool, _card(pool.get("/v1/rewards"), self))
        except BaseException:
            pool.close()
            raise


@dataclass(frozen=True)
class _Card:
    """What the server says of its reward, as far as it matters here."""

    name: str
    range: tuple[float | None, float | None]
    components: tuple[str, ...]
    groupwise: bool
    config: str


class _There:
    """The reward at the other end."""

    def __init__(self, options: Http, pool: Pool, card: _Card) -> None:
        self.options, self.pool, self.card = options, pool, card
        self.range, self.components = card.range, card.components
        self.fingerprint = f"{card.name} {card.config}"  # what is served may change behind its address

    def close(self) -> None:
        self.pool.close()

    def __call__(self, samples: Samples) -> tuple[Column, dict[str, list[float | None]]]:
        n = len(samples)
        values: Column = [Unscored("it was not asked")] * n
        parts: dict[str, list[float | None]] = {name: [None] * n for name in self.components}
        questions: list[tuple[Tensor, bytes]] = []
        for rows in _calls(samples, self.card.groupwise, self.options.max_pictures):
            for asked, message in self._encode(samples, rows):
                if isinstance(message, Unscored):
                    _put(values, asked, message)
                else:
                    questions.append((asked, message))
        answers = self.pool.map([Request("/v1/score", None, body, wire.CONTENT_TYPE) for _, body in questions])
        for (rows, body), answer in zip(questions, answers, strict=True):
            results = _results(answer, body, len(rows))
            if isinstance(results, Unscored):
                _put(values, rows, results)
                continue
            for row, one in zip(rows.tolist(), results, strict=True):
                values[row] = Unscored(one.reason) if one.value is None else one.value
                for name, number in one.components.items():  # also those that the card does not list
                    parts.setdefault(name, [None] * n)[row] = number
        return values, parts

    def _encode(self, samples: Samples, rows: Tensor) -> Iterator[tuple[Tensor, bytes | Unscored]]:
        """The messages for these samples. What breaks a limit is halved, until it is the one that does."""
        own = replace(samples.select(rows), sample_id=torch.arange(len(rows)))  # whose ids may not be unique
        try:
            yield rows, wire.encode_request(own, self.card.name, self.card.config, self.options.codec)
        except wire.WireError as error:
            groups = own.group.unique() if self.card.groupwise else torch.arange(len(rows))
            if len(groups) < 2:
                yield rows, Unscored(f"not sent: {error}")
                return
            first = torch.isin(own.group if self.card.groupwise else own.sample_id, groups[: len(groups) // 2])
            yield from self._encode(samples, rows[first])
            yield from self._encode(samples, rows[~first])


def _calls(samples: Samples, groupwise: bool, most: int) -> Iterator[Tensor]:
    """Positions of the samples of each request: at most so many, or one group, and no more bytes than are taken."""
    if groupwise:
        units = [torch.nonzero(samples.group == one).flatten().tolist() for one in samples.group.unique()]
    else:
        units = [[row] for row in range(len(samples))]
    own = samples.media[:1].numel()
    held: list[int] = []
    size = 0
    for unit in units:
        more = sum(own + _others(samples, row) for row in unit)  # a picture packs to no more than its pixels, nearly
        if held and (len(held) + len(unit) > most or size + more > wire.LARGEST_BODY * 0.9):
            yield torch.tensor(held)
            held, size = [], 0
        held, size = held + unit, size + more
    if held:
        yield torch.tensor(held)


def _others(samples: Samples, row: int) -> int:
    """The pixels of the pictures that a prompt brings along."""
    prompt = samples.prompts[row]
    return sum(one.numel() for one in (prompt.source, *prompt.references) if one is not None)


def _results(answer: Reply | Failure, question: bytes, n: int) -> list[wire.Result] | Unscored:
    if isinstance(answer, Failure):
        return Unscored(answer.reason)
    try:
        return wire.decode_reply(answer.body, wire.name_of(question), range(n))
    except wire.WireError as error:
        return Unscored(f"the server's answer is not to be trusted: {error}")


def _put(values: Column, rows: Tensor, reason: Unscored) -> None:
    for row in rows.tolist():
        values[row] = reason


def _card(said: Any, options: Http) -> _Card:
    """Of the reward that is meant, from what `/v1/rewards` says."""
    where = ", ".join(options.endpoints.urls)
    protocol = said.get("protocol") if isinstance(said, Mapping) else None
    if protocol != wire.PROTOCOL:
        hint = "Use the same version of rlkit at both ends."
        what = f"a server of the protocol {wire.PROTOCOL} was expected, and it speaks {json.dumps(protocol)[:100]}"
        raise RewardError(what, where=where, hint=hint)
    try:
        cards = {str(one["name"]): one for one in said["rewards"]}
        name = options.name_there or (next(iter(cards)) if len(cards) == 1 else "")
        if name not in cards:
            known = ", ".join(cards) or "none"
            what = f"there is no reward {name!r}.{nearest(name, cards)}" if name else "name_there has to say which"
            raise RewardError(what, where=where, hint=f"Served there: {known}.")
        card = cards[name]
        if not card["higher_is_better"]:
            what = f"less of {name} is better, which a reward from elsewhere cannot say"
            raise RewardError(what, where=where, hint="Serve one that turns its sign.")
        low, high = (None if one is None else float(one) for one in card["range"])
        parts = tuple(map(str, card["components"]))
        return _Card(name, (low, high), parts, bool(card["groupwise"]), str(card["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RewardError(f"its list of rewards lacks {error}", where=where, hint="Is it an rlkit server?") from error
