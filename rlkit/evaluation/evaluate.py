"""`rlkit eval --suite`: a suite's prompts drawn with several seeds and samplers, scored, and written down as they come.

OUT/evaluation.json    what is evaluated: the suite, its prompts, the checkpoint, the weights, the reward, the rollout
OUT/records.jsonl      a line for each picture: prompt, seed, sampler, scores, and the picture's file
OUT/pictures/          SAMPLER-SEED/NUMBER.png
OUT/summary.json .md   means with their intervals

Prompts are drawn in portions, and a picture's noise depends on its seed and its place in its portion alone, so that an
evaluation which was interrupted goes on where it was and ends with the pictures that it would have had. What is in
OUT is never mixed with another checkpoint, reward or list of prompts. A picture that was not scored is drawn and scored
again when the evaluation is started again; the last line of a key counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rlkit import checkpoint, dist, pictures, session
from rlkit.data.prompts import PromptBatch
from rlkit.data.tables import json_object
from rlkit.dist import Processes
from rlkit.errors import CheckpointError, DataError, RecipeError, RewardError, nearest
from rlkit.evaluation import suites
from rlkit.evaluation.formats import Case
from rlkit.evaluation.suites import Suite
from rlkit.held_out import started_rollout
from rlkit.policy import Policy
from rlkit.run import begin
from rlkit.scoring import Scoring, WeightedReward
from rlkit.stages import Setup, Stage
from rlkit.types import Context, Plan, Prompt, Samples, Scores, seed_of

SAMPLERS = ("ode", "sde")
PORTION = 16  # prompts drawn together; another number would be another noise
TOLD = ("suite", "prompts", "count", "checkpoint", "weights", "reward", "counts", "overall")  # by every evaluation
ENOUGH = 32  # pictures after which a judge that answers nothing ends the evaluation


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    suite: str
    prompts: Path | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    samplers: tuple[str, ...] = ("ode",)
    out: Path | None = None
    weights: Literal["current", "ema"] | None = None  # None: as the recipe evaluates
    count: int | None = None  # of the embedded world's panel; None: the recipe's
    judge: Mapping[str, Any] | None = None  # the judge's endpoints and model
    reward: Mapping[str, Any] | None = None  # more options of the suite's reward

    def __post_init__(self) -> None:
        for name in self.samplers:
            if name not in SAMPLERS:
                what = f"no sampler {name!r}.{nearest(name, SAMPLERS)}"
                raise RecipeError(what, where="--samplers", hint=f"Samplers: {', '.join(SAMPLERS)}.")
        for key, values in (("--seeds", self.seeds), ("--samplers", self.samplers)):
            if not values or len(set(values)) < len(values):
                raise RecipeError(f"one or more, and none twice, not {list(values)}.", where=key)


@dataclass(frozen=True)
class Record:
    """One picture."""

    key: str
    text: str
    category: str
    seed: int
    sampler: str
    scores: Mapping[str, float | None]  # the reward and its parts; None where not scored
    picture: str

    @property
    def place(self) -> tuple[str, int, str]:
        return self.key, self.seed, self.sampler


# ---- what is evaluated -----------------------------------------------------------------------------------------------


def evaluate(setup: Setup, folder: Path | None, name: str, settings: Settings) -> Path:
    """Run a suite, or the rest of it; where its records are. `name` is what the recipe is called, where no run is."""
    suite, stage = suites.named(settings.suite), setup.stages[-1]
    cases = suites.cases_of(suite, settings.prompts, stage, settings.count or stage.evaluate.held_out)
    reward = suites.reward_of(suite, stage, settings.judge, settings.reward)
    processes = dist.start(1, setup.options.device)
    policy = session.load_policy(setup, processes)
    begin(policy, stage)
    saved = None if folder is None else _load(policy, folder)
    _refuse_unfit(suite, cases, stage, policy)
    state = _state(saved, stage)
    plans = {one: plan_of(one, stage, policy, settings.weights, state) for one in settings.samplers}
    weights = next(iter(plans.values())).policy_set
    at = "base" if saved is None else f"{saved.at:06d}"
    usual = Path("evaluations") / name if folder is None else folder / "evaluations"
    out = settings.out or usual / f"{suite.name}-{at}-{weights}"
    identity = _identity(setup, suite, cases, saved, weights, reward)
    records = Records.open(out, identity)
    scoring = Scoring((reward,), 1.0, None, policy.device)  # a judge that fails is not the end of the others' records
    try:
        with started_rollout(stage, policy, processes) as rollout:
            _Evaluation(setup, policy, cases, rollout, scoring, records, state).run(plans, settings.seeds)
    finally:
        scoring.close()
    return out


def _load(policy: Any, folder: Path) -> checkpoint.Checkpoint:
    """Put a run's newest checkpoint into the policy. What is said of it is said of that very one."""
    saved = checkpoint.newest(folder)
    if saved is None:
        raise CheckpointError("no whole checkpoint", where=str(folder), hint="Give a run folder that has one.")
    policy.load_state({k.removeprefix("policy/"): v for k, v in saved.tensors.items() if k.startswith("policy/")})
    return saved


def _state(saved: checkpoint.Checkpoint | None, stage: Stage) -> dict[str, Any]:
    """What the stage's algorithm remembers, such as noise levels that it has calibrated."""
    if saved is None or saved.numbers["stage"] != stage.name:
        return {}
    tensors = {k.removeprefix("state/"): v for k, v in saved.tensors.items() if k.startswith("state/")}
    return tensors | dict(saved.numbers["state"])


def plan_of(sampler: str, stage: Stage, policy: Any, weights: str | None, state: dict[str, Any]) -> Plan:
    """How a sampler draws. sde: the dynamics that the stage's algorithm trains with, at every step but the last, whose
    noise would stay in the picture; over as many steps as in training, which its noise levels are of."""
    if weights is not None and weights != "current" and weights not in policy.sets:
        hint = "Leave --weights out, or train with learner.ema."
        raise RecipeError(f"there is no set {weights!r} of these weights.", where="--weights", hint=hint)
    chosen = weights or stage.evaluate.weights
    chosen = chosen if chosen in policy.sets else "current"
    if sampler == "ode":
        return Plan(steps=stage.evaluate.steps, policy_set=chosen)
    where, hint = f"stages.{stage.name}.algorithm", "Use --samplers ode."
    if stage.algorithm.needs().kind == "tokens":
        raise RecipeError("writes, and has no stochastic sampler of pictures.", where=where, hint=hint)
    steps = stage.rollout.steps
    own = stage.algorithm.plan(Context(0, "evaluation", 0, steps, state, Processes().gather))
    if own.dynamics == "ode":
        what = f"{type(stage.algorithm).__name__} samples without noise: it has no stochastic sampler."
        raise RecipeError(what, where=where, hint=hint)
    return Plan(dynamics=own.dynamics, noise_level=own.noise_level, window=(0, max(1, steps - 1)), policy_set=chosen)


def _refuse_unfit(suite: Suite, cases: Sequence[Case], stage: Stage, policy: Any) -> None:
    made = getattr(stage.rollout, "makes", ("text",) if stage.algorithm.needs().kind == "tokens" else ("image",))
    if "image" not in made:
        hint = "An agent has `rollout.renderer`; a captioner is measured by `rlkit eval` without a suite."
        raise RecipeError("gives no pictures to score.", where=f"stages.{stage.name}.rollout", hint=hint)
    asked = {"edit": any(one.asked.source for one in cases), "in_context": any(one.asked.references for one in cases)}
    if isinstance(policy, Policy):  # others read pictures by their own rules
        for task, wanted in asked.items():
            if wanted and task not in policy.model.tasks:
                what = f"draws {' and '.join(policy.model.tasks)}, and the suite {suite.name} needs {task}."
                raise RecipeError(what, where="policy.backbone", hint="Choose another suite, or a recipe for the task.")


def _identity(
    setup: Setup,
    suite: Suite,
    cases: Sequence[Case],
    saved: checkpoint.Checkpoint | None,
    weights: str,
    reward: WeightedReward,
) -> dict[str, Any]:
    """All that its numbers depend on, but for seeds and samplers: more of these may come later."""
    plain = setup.recipe
    stage, policy = plain["stages"][setup.stages[-1].name], dict(plain["policy"])
    for key in ("conditions", "conditions_in_memory", "encoders", "sets"):  # change no number
        policy.pop(key, None)
    options: dict[str, Any] = asdict(reward.reward)  # type: ignore[call-overload]
    options.pop("endpoints", None)  # a judge may move
    taken = None
    if saved is not None:
        taken = {"at": saved.at, "sha256": _digest((saved.folder / "manifest.json").read_text())}
    found = {
        "suite": suite.name,
        "prompts": _digest([[one.key, one.category, one.asked.meaning(), _told(one)] for one in cases]),
        "count": len(cases),
        "checkpoint": taken,
        "policy": policy,
        "weights": weights,
        "reward": {"name": suite.reward, "version": getattr(reward.reward, "version", ""), **options},
        "counts": suite.counts,
        "overall": suite.overall,
        "rollout": stage["rollout"],
        "steps": setup.stages[-1].evaluate.steps,
        "precision": setup.options.precision,
        "portion": PORTION,
    }
    plainly: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plainly


def _told(case: Case) -> list[str]:
    """What of a prompt only its reward reads."""
    metadata = json.dumps(case.asked.prompt.metadata, default=str, sort_keys=True)
    return [metadata, *case.asked.prompt.target_text, *(one.name() for one in case.truth)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


# ---- its records -----------------------------------------------------------------------------------------------------


@dataclass
class Records:
    """The records of one evaluation, on disk and at hand."""

    folder: Path
    identity: Mapping[str, Any]
    found: dict[tuple[str, int, str], Record]

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any] | None = None) -> Records:
        """Those of a folder. identity: what is to be evaluated there; DataError where it holds another evaluation."""
        file = folder / "evaluation.json"
        if identity is not None and not file.is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise DataError("holds other files and no evaluation", where=str(folder), hint="Choose another --out.")
            folder.mkdir(parents=True, exist_ok=True)
            _replace(file, json.dumps(identity, indent=1))
        if not file.is_file():
            hint = "It has no evaluation.json. A run's are RUN/evaluations/SUITE-STEP-WEIGHTS."
            raise DataError("there is no evaluation in this folder", where=str(folder), hint=hint)
        there = json_object(file.read_text(encoding="utf-8"), str(file))
        lacking = [key for key in TOLD if key not in there]
        if lacking:
            what = f"this evaluation does not say its {', '.join(map(repr, lacking))}"
            raise DataError(what, where=str(file), hint="Evaluate again, into another --out.")
        if identity is not None and there != identity:
            differ = [key for key in identity.keys() | there.keys() if there.get(key) != identity.get(key)]
            what = f"this folder has an evaluation that differs in {', '.join(sorted(differ))}"
            raise DataError(what, where=str(folder), hint="Choose another --out.")
        of = _digest(there)
        if identity is not None:
            _mend(folder / "records.jsonl")
        return cls(folder, there, {one.place: one for one in _read(folder / "records.jsonl", of)})

    def add(self, rows: Sequence[Record]) -> None:
        """Flushed to the disk: what is written down has been."""
        of = _digest(self.identity)
        with (self.folder / "records.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"of": of, **asdict(one)}, ensure_ascii=False) + "\n" for one in rows)
            file.flush()
            os.fsync(file.fileno())
        self.found |= {one.place: one for one in rows}

    def scored(self, place: tuple[str, int, str]) -> bool:
        one = self.found.get(place)
        return one is not None and one.scores.get(self.identity["counts"]) is not None


def _mend(file: Path) -> None:
    """Take off a last line that was cut off by a kill: what is appended would go on in it."""
    if file.is_file():
        text = file.read_bytes()
        with file.open("r+b") as stream:
            stream.truncate(text.rfind(b"\n") + 1)


def _read(file: Path, of: str) -> Iterator[Record]:
    """The records of a file. What is behind its last whole line is still being written."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        where = f"{file}:{number}"
        record = json_object(line, where)
        if record.pop("of", None) != of:
            what = "this record is of another checkpoint, or of other prompts"
            raise DataError(what, where=where, hint="Choose another --out, or remove the line.")
        try:
            yield Record(**record)
        except TypeError as error:
            raise DataError(f"this is no record: {error}", where=where, hint="Remove the line.") from error


def _replace(file: Path, text: str) -> None:
    """Written whole or not at all."""
    draft = file.with_name(f".{file.name}")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(file)


# ---- its run ---------------------------------------------------------------------------------------------------------


@dataclass
class _Evaluation:
    setup: Setup
    policy: Any
    cases: Sequence[Case]
    rollout: Any
    scoring: Scoring
    records: Records
    state: dict[str, Any]
    seen: int = 0  # pictures of this start
    lost: int = 0  # of them, without a score

    def run(self, plans: Mapping[str, Plan], seeds: Sequence[int]) -> None:
        for portion in range(math.ceil(len(self.cases) / PORTION)):
            here = self.cases[portion * PORTION : (portion + 1) * PORTION]
            asked: tuple[Prompt, ...] = ()
            for sampler, plan in plans.items():
                for seed in seeds:
                    left = [i for i, one in enumerate(here) if not self.records.scored((one.key, seed, sampler))]
                    if left:
                        asked = asked or tuple(one.asked.read() for one in here)
                        samples = self.drawn(portion, asked, plan, seed)
                        self.keep(portion, here, left, sampler, seed, samples)
            self.policy.conditions.forget(asked)
            print(f"{min(len(self.cases), (portion + 1) * PORTION)} of {len(self.cases)} prompts", file=sys.stderr)

    def drawn(self, portion: int, asked: tuple[Prompt, ...], plan: Plan, seed: int) -> Samples:
        """A portion as a whole, whatever is left of it, since a picture's noise is that of its place."""
        steps = self.setup.stages[-1].rollout.steps
        context = Context(seed, "evaluation", portion, steps, self.state, Processes().gather)
        torch.manual_seed(seed_of(seed, "evaluation", portion))  # rlkit draws nothing there, but somebody's reward may
        samples: Samples = self.rollout.collect(PromptBatch(asked, 1), plan, context)
        if samples.media.ndim != 4:
            raise RecipeError("a suite is of pictures, and this policy gives none.", where="--suite")
        return samples

    def keep(
        self, portion: int, here: Sequence[Case], left: Sequence[int], sampler: str, seed: int, samples: Samples
    ) -> None:
        """Score the pictures of the prompts that are left, and write them down."""
        wanted = samples.select(torch.tensor(left))
        shown = [self._shown(prompt, here[i]) for prompt, i in zip(wanted.prompts, left, strict=True)]
        scores = self.scoring(replace(wanted, prompts=tuple(shown)), Processes().gather, held_out=True)
        folder = self.records.folder / "pictures" / f"{sampler}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for at, i in enumerate(left):
            file = folder / f"{portion * PORTION + i:05d}.png"
            file.write_bytes(pictures.png(wanted.media[at]))
            named = str(file.relative_to(self.records.folder))
            one = here[i]
            text = one.asked.prompt.text
            rows.append(Record(one.key, text, one.category, seed, sampler, _numbers(scores, at), named))
        self.records.add(rows)
        self._stop_where_nothing_is_scored(rows)

    def _shown(self, prompt: Prompt, case: Case) -> Prompt:
        """The prompt as the reward sees it: with the true pictures, which the policy was not shown."""
        if not case.truth:
            return prompt
        return replace(prompt, references=replace(case.asked, source=None, references=case.truth).read().references)

    def _stop_where_nothing_is_scored(self, rows: Sequence[Record]) -> None:
        counts, most = self.records.identity["counts"], self.setup.options.max_unscored
        self.seen += len(rows)
        self.lost += sum(one.scores.get(counts) is None for one in rows)
        if self.seen >= ENOUGH and self.lost > most * self.seen:
            raise RewardError(
                f"{self.lost} of {self.seen} pictures were not scored",
                where=counts,
                hint=f"Mend the reward, or raise run.max_unscored (now {most:g}), and start again: it goes on here.",
            )


def _numbers(scores: Scores, row: int) -> dict[str, float | None]:
    columns = {name: scores.raw[:, i] for i, name in enumerate(scores.names)} | dict(scores.components)
    numbers = {name: float(values[row]) for name, values in columns.items()}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
