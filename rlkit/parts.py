"""A policy of three parts, which puts a picture into words and the words into a picture (UAE, arXiv 2509.09666).

The captioner writes, the connector turns the states that it wrote with into what the generator is conditioned on, the
generator draws. Each is a network with sets of its own. A stage trains some of them and leaves the others alone; the
algorithm sees the part of its kind, the captioner if it trains tokens and the generator if it trains a flow, as it
would see a policy of that part alone.

A gradient that reaches the generator's condition goes on through the connector and the captioner where the stage trains
them: a caption is then read again at every call. Where it trains neither, it is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlkit.errors import RecipeError
from rlkit.language import LanguagePolicy
from rlkit.policy import Models, Policy, Score
from rlkit.types import Condition, Connection, FlowModel, Prompt
from rlkit.weights import FROZEN, Lora, Tensors, Weights

UNTOLD = ""  # the key of what guidance leads away from
READER = "reader"  # the captioner's set that reads, where the connection holds it


class Connector(Weights):
    """The connector with its sets."""

    def __init__(
        self,
        connection: Connection,
        writer: LanguagePolicy,
        drawer: FlowModel,
        train: Lora | Literal["frozen"] | None,
        precision: str,
        seed: int,
    ) -> None:
        if isinstance(train, Lora):
            what = "a connector is two small layers, and has no LoRA."
            raise RecipeError(what, where="train", hint="Write {full: true} for it.")
        self.connection = connection
        (template,) = drawer.encode([Prompt(id=0, text="")])
        self.dtypes = {name: one.dtype for name, one in template.items()}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = connection.build(_width(writer), template)
        super().__init__(net, (), train, writer.device, precision, seed)

    def __call__(self, states: Tensor, there: Tensor, weights: str) -> Condition:
        """What the generator is told: states [B, T, H], there [B, T] -> a condition of B rows."""
        net = self.net if weights == "current" else self.stand_in(weights)
        return {name: one.to(self.dtypes[name]) for name, one in net(states, there).items()}

    def write(self, folder: Path) -> str:
        self.connection.write(self.net, folder)
        return f'policy.parts.CONNECTOR.backbone.path: "{folder}"'


def _width(writer: LanguagePolicy) -> int:
    """Of the captioner's states."""
    if writer.model.hidden is None:
        what = "this backbone does not tell the states that a connector reads."
        raise RecipeError(what, where="policy.parts", hint="Use qwen, qwen_vl or tiny_captioner.")
    config = writer.net.config
    return int(getattr(config, "text_config", config).hidden_size)  # type: ignore[union-attr, arg-type]


class Told:
    """What the generator is told of answers, under the keys of their prompts. It stands where other policies have their
    encoded prompts, and speaks as those do."""

    def __init__(self, writer: LanguagePolicy, connector: Connector, drawer: FlowModel, negative: str | None) -> None:
        self._writer, self._connector = writer, connector
        self._untold = None if negative is None else drawer.encode([Prompt(id=0, text=negative)])[0]
        self._prompts: dict[str, Prompt] = {}
        self._states: dict[str, Tensor] = {}  # [T, H] of a captioner that the stage leaves alone
        self._kept: dict[tuple[str, str], Condition] = {}  # by (set, key), of these weights:
        self._moment: tuple[int, int] | None = None

    def renew(self) -> None:
        """Forget all: other answers come."""
        self._prompts.clear()
        self._states.clear()
        self._kept.clear()

    def encode(self, prompts: Iterable[Prompt]) -> None:
        """Take note of answers. What they were answers to is read by the captioner."""
        new = {prompt.key: prompt for prompt in prompts if prompt.key not in self._prompts}
        for prompt in new.values():
            if prompt.asked is None:
                raise ValueError(f"{prompt.text!r} is no answer of the captioner: the rollout `relay` gives those")
        self._writer.conditions.encode([prompt.asked for prompt in new.values() if prompt.asked is not None])
        self._prompts |= new

    def forget(self, prompts: Iterable[Prompt]) -> None:
        self._writer.conditions.forget(prompts)

    def untold(self, keys: Sequence[str]) -> list[str]:
        return [UNTOLD for _ in keys]

    def batch(self, keys: Sequence[str], model: FlowModel | None = None, weights: str = "current") -> Condition:
        """{"name": [B, ...]}, with gradient where the stage trains what it comes from."""
        said = [key for key in keys if key != UNTOLD]
        carries = torch.is_grad_enabled() and weights == "current"
        live = carries and (self._reads_live() or _trains(self._connector))
        told = self._read(said, weights) if live else self._remembered(said, weights)
        if len(said) == len(keys):
            return told
        assert self._untold is not None
        untold = self._untold
        place = [-1 if key == UNTOLD else sum(one != UNTOLD for one in keys[:at]) for at, key in enumerate(keys)]
        return {name: torch.cat([one, untold[name][None]])[place] for name, one in told.items()}

    def _remembered(self, keys: Sequence[str], weights: str) -> Condition:
        """Without gradient; each is read once by the same weights."""
        moment = (self._writer.moment(), self._connector.moment())
        if moment != self._moment:
            self._kept.clear()
            self._moment = moment
        new = [key for key in dict.fromkeys(keys) if (weights, key) not in self._kept]
        if new:
            with torch.no_grad():
                told = self._read(new, weights)
            for row, key in enumerate(new):
                self._kept[weights, key] = {name: one[row] for name, one in told.items()}
        kept = [self._kept[weights, key] for key in keys]
        return {name: torch.stack([one[name] for one in kept]) for name in kept[0]}

    def _reads_live(self) -> bool:
        """Whether the weights that read are among those that the stage trains."""
        return _trains(self._writer) and READER not in self._writer.sets

    def _read(self, keys: Sequence[str], weights: str) -> Condition:
        writer, connector = (weights if weights in one.sets else "current" for one in (self._writer, self._connector))
        writer = READER if READER in self._writer.sets else writer
        if self._reads_live():
            states = self._states_of(keys, writer)
        else:
            new = [key for key in dict.fromkeys(keys) if key not in self._states]
            with torch.no_grad():
                self._states |= zip(new, self._states_of(new, writer) if new else [], strict=True)
            states = [self._states[key] for key in keys]
        lengths = torch.tensor([len(one) for one in states], device=states[0].device)
        padded = pad_sequence(states, batch_first=True)  # [B, T, H]
        there = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return self._connector(padded, there, connector)

    def _states_of(self, keys: Sequence[str], weights: str) -> list[Tensor]:
        """[T, H] for each: the captioner reads what it answered, by itself or behind what it was asked."""
        policy, model, reads = self._writer, self._writer.model, self._connector.connection.reads
        assert model.hidden is not None
        prompts = [self._prompts[key] for key in keys]
        answers = [torch.tensor(prompt.answer, dtype=torch.int64) for prompt in prompts]
        if self._connector.connection.sees or reads == "picture":
            conditions = [policy.conditions.of(prompt.asked.key) for prompt in prompts if prompt.asked is not None]
            before = [one["ids"].cpu() for one in conditions]
        else:
            conditions, before = [model.bare(one) for one in answers], [answers[0][:0]] * len(answers)
        rows = [torch.cat(both) for both in zip(before, answers, strict=True)]
        ids = pad_sequence(rows, batch_first=True).to(policy.device)
        length = torch.tensor([len(row) for row in rows], device=policy.device)
        there = torch.arange(ids.shape[1], device=policy.device) < length[:, None]
        net = policy.net if weights == "current" else policy.stand_in(weights)
        policy.calls += len(rows)
        with policy.autocast():
            batch = model.collate(conditions)
            states = model.hidden(net, ids, there, batch, 0 if reads == "picture" else -1).float()  # [B, L, H]
        if reads == "picture":
            return [one[row == model.picture] for one, row in zip(states, ids, strict=True)]
        first = [len(one) if reads == "answer" else len(row) - 1 for one, row in zip(before, rows, strict=True)]
        return [one[start:end] for one, start, end in zip(states, first, length.tolist(), strict=True)]


def _trains(part: Weights) -> bool:
    return any(tensor.requires_grad for tensor in part.trainable.values())


class Parts:
    """The three of them as one policy. `stage` says which of them train and which one acts; before that, all train."""

    def __init__(self, parts: Mapping[str, Weights]) -> None:
        """parts: by the recipe's names. One writes, one connects and one draws."""
        self.parts = dict(parts)
        self.writer_name, self.writer = _only(parts, LanguagePolicy, "tokens")
        self.connector_name, self.connector = _only(parts, Connector, "connection")
        self.drawer_name, self.drawer = _only(parts, Policy, "flow")
        negative = None if self.drawer.guidance == 1 else self.drawer.conditions.negative
        self.conditions = Told(self.writer, self.connector, self.drawer.model, negative)
        self.drawer.conditions = self.conditions  # type: ignore[assignment]
        self.device, self.precision = self.drawer.device, self.drawer.precision
        self.trained: tuple[str, ...] = tuple(parts)
        self.kind = "flow"

    def refuse_unknown(self, trained: Mapping[str, Sequence[str]], where: str) -> None:
        """RecipeError for a word that stands in the name of no tensor of its part."""
        for name, words in trained.items():
            tensors = self.parts[name].trainable
            for word in words:
                if not any(word in key for key in tensors):
                    hint = f"Its tensors have names such as {next(iter(tensors))!r}."
                    what = f"no weight of the {name} that is trained is named {word!r}."
                    raise RecipeError(what, where=f"{where}.{name}.only", hint=hint)

    def stage(self, trained: Mapping[str, Sequence[str]], kind: str) -> None:
        """Train these parts alone, by an algorithm of this kind: of each all that can be trained, or the tensors whose
        names hold one of these words. Other parts' sets are let go."""
        self.trained, self.kind = tuple(name for name in self.parts if name in trained), kind
        for name, part in self.parts.items():
            words = trained.get(name, ())
            for key, tensor in part.trainable.items():
                tensor.requires_grad_(name in trained and (not words or any(word in key for word in words)))
            if name not in trained:
                for kept in set(part.sets) - {READER}:
                    part.drop(kept)
        held = self.connector.connection.held and READER not in self.writer.sets
        if held and kind == "tokens" and self.writer_name in trained:
            self.writer.keep(READER)
        self.conditions.renew()

    @property
    def acting(self) -> Policy | LanguagePolicy:
        """The part whose decisions the algorithm trains."""
        return self.writer if self.kind == "tokens" else self.drawer

    @property
    def model(self) -> Any:
        return self.acting.model

    @property
    def models(self) -> Any:
        return self.acting.models

    def models_with(self, score: Score) -> Any:
        return self.writer.models if self.kind == "tokens" else Models(self.drawer, score)

    # ---- what a learner and a checkpoint see: names begin with the part's --------------------------------------------

    def _active(self) -> dict[str, Weights]:
        return {name: self.parts[name] for name in self.trained if self.parts[name].trainable}

    @property
    def trainable(self) -> Tensors:
        return {key: one for group in self.groups.values() for key, one in group.items()}

    @property
    def groups(self) -> dict[str, Tensors]:
        """The tensors that the stage trains, by part; names begin with the part's."""
        return {
            name: {f"{name}/{key}": one for key, one in part.trainable.items() if one.requires_grad}
            for name, part in self._active().items()
        }

    @property
    def sets(self) -> dict[str, Tensors]:
        names = dict.fromkeys(kept for part in self._active().values() for kept in part.sets)
        return {
            kept: _joined({name: part.sets[kept] for name, part in self._active().items() if kept in part.sets})
            for kept in names
        }

    @property
    def base(self) -> Tensors:
        return _joined({name: part.base or {} for name, part in self._active().items()})

    def keep(self, name: str, tensors: Tensors | None = None) -> None:
        for part, one in self._active().items():
            one.keep(name, None if tensors is None else _of(tensors, part))

    def keep_base(self) -> None:
        for part in self.parts.values():
            part.keep_base()

    def adopt(self, name: str) -> None:
        for part in self._active().values():
            part.adopt(name)

    def drop(self, name: str) -> None:
        for part in self.parts.values():
            part.drop(name)

    def blend(self, name: str, decay: float) -> None:
        for part in self._active().values():
            part.blend(name, decay)

    def updated(self) -> None:
        for part in self._active().values():
            part.updated()

    @property
    def calls(self) -> int:
        return sum(part.calls for part in self.parts.values())

    @calls.setter
    def calls(self, count: int) -> None:
        for part in self.parts.values():
            part.calls = 0
        self.drawer.calls = count

    def take_calls(self) -> int:
        return sum(part.take_calls() for part in self.parts.values())

    def state(self) -> Tensors:
        """ "set/part/parameter" -> tensor, also of parts that this stage leaves alone and another has trained."""
        found: Tensors = {}
        for name, part in self.parts.items():
            for key, tensor in part.state().items():
                kept, _, rest = key.partition("/")
                found[f"{kept}/{name}/{rest}"] = tensor
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        for name, part in self.parts.items():
            own: Tensors = {}
            for key, tensor in tensors.items():
                kept, of, rest = key.split("/", 2)
                if of == name:
                    own[f"{kept}/{rest}"] = tensor
            if part.trainable or own:
                part.load_state(own)

    def export(self, folder: Path, weights: str = "current") -> str:
        lines = []
        for name, part in self.parts.items():
            if part.trainable:
                lines.append(part.export(folder / name, weights if weights in part.sets else "current"))
            if READER in part.sets:
                lines.append(part.export(folder / READER, READER))
        return "; ".join(lines)


def _only(parts: Mapping[str, Weights], kind: type[Any], called: str) -> tuple[str, Any]:
    found = {name: part for name, part in parts.items() if isinstance(part, kind)}
    if len(found) != 1:
        what = f"{len(found)} parts are of the kind {called}, and one has to be."
        raise RecipeError(what, where="policy.parts", hint="A captioner, a connector and a generator make a policy.")
    return next(iter(found.items()))


def _joined(parts: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    return {f"{name}/{key}": one for name, tensors in parts.items() for key, one in tensors.items()}


def _of(tensors: Mapping[str, Tensor], part: str) -> Tensors:
    return {key.removeprefix(f"{part}/"): one for key, one in tensors.items() if key.startswith(f"{part}/")}


__all__ = ["FROZEN", "Connector", "Parts", "Told"]
