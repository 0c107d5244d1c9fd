"""Benchmarks of weight pushes: `rlkit bench sync`. Do the weights arrive, and what does bringing them cost?

Strategies. The learner of a small recipe and a vLLM engine in this process: the weights change a little, a push brings
them, the engine samples, and the learner computes the log-probs of what was sampled again. A push is timed alone, once
with its proof (the canary) and once without, in turns. `moved` is how far the same change moves log-probs of answers
that were sampled before it: what a push that brought nothing would show as a difference.

Transports. The stream of a push to another process, against the same bytes in one piece (transport.py).

Left out: `nccl`, which needs a GPU on each side, and servers, whose updates go the ways of these.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlkit import recipe
from rlkit.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from rlkit.bench.transport import Transport
    from rlkit.language import LanguagePolicy
    from rlkit.types import Samples

STRATEGIES = ("file", "gloo", "lora")
RECIPE = "world_captioner"
STAGE = "stages.main"
SMALL = (  # 16 answers
    *("run.wandb=disabled", f"{STAGE}.rollout.name=vllm", f"{STAGE}.learner.batch=16"),
    *(f"{STAGE}.data.per_step=4", f"{STAGE}.data.group=4"),
)
CHANGE = {False: 0.02, True: 0.03}  # added to weights, by whether they are LoRA's, half of which begin as zeros


@dataclass(frozen=True)
class Row:
    """One strategy."""

    strategy: str
    bytes: int  # of the weights that a push brings
    times: int  # pushes of each kind
    seconds: float  # of a push, median
    seconds_with_proof: float
    max_abs_dlogp: float  # over the tokens sampled after every push: the engine's log-prob against the learner's
    moved: float  # the least, over the changes, of the largest difference that one made
    greedy_equal: bool  # the likeliest answers, to each prompt, are the learner's own


# ---- the command -----------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    listed = ",".join(STRATEGIES)
    parser.add_argument(
        "--strategies", type=_strategies, default=STRATEGIES, metavar="A,B", help=f"(default: {listed})"
    )
    parser.add_argument("--times", type=_count, default=5, metavar="N", help="pushes of each kind (default: 5)")
    what = "that the transports carry (default: 1)"
    parser.add_argument("--gigabytes", type=_gigabytes, default=1.0, metavar="GB", help=what)
    parser.add_argument("--threads", type=_count, default=1, metavar="N", help="of torch, on each side (default: 1)")
    parser.add_argument("--json", action="store_true")


def _strategies(word: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(one.strip() for one in word.split(",")))
    for one in found:
        if one not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise argparse.ArgumentTypeError(f"no strategy named {one!r}.{nearest(one, STRATEGIES)} Known: {known}.")
    return found


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {word!r}")
    return int(word)


def _gigabytes(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0.001 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, 0.001 or more, not {word!r}")
    return value


def run(options: argparse.Namespace) -> int:
    """Transports are measured without vLLM too. Raises RlkitError."""
    from rlkit.bench import transport as bench_transport

    with _torch_as_it_was(options.threads):
        carried = bench_transport.transports(int(options.gigabytes * 1e9), options.times, options.threads)
        lacking = "" if find_spec("vllm") else without_vllm()
        rows = [strategy(name, options.times, options.threads) for name in options.strategies] if not lacking else []
    if options.json:
        found = {"rows": [asdict(one) for one in rows], "transports": [asdict(one) for one in carried]}
        print(json.dumps(found | {"threads": options.threads, "missing": lacking or None}, indent=2))
    else:
        print(table(rows, carried, options.threads) + (f"\n{lacking}" if lacking else ""))
    return 0


def without_vllm() -> str:
    from rlkit.workers.serving import INSTALL  # which imports torch

    return f"no strategy was measured: vllm is not installed. {INSTALL}"


@contextmanager
def _torch_as_it_was(threads: int) -> Iterator[None]:
    """A policy that is loaded sets switches of torch for its whole process."""
    import torch

    before, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)


def table(rows: Sequence[Row], carried: Sequence[Transport], threads: int) -> str:
    """The numbers for people."""
    lines = [f"{threads} thread{'s' if threads > 1 else ''}, {carried[0].times} times each, medians", ""]
    lines.append(f"{'transport':<12}{'GB':>8}{'seconds':>10}{'plain':>10}{'share':>8}")
    for way in carried:
        numbers = f"{way.bytes / 1e9:8.3f}{way.seconds:10.3f}{way.plain_seconds:10.3f}{way.share:8.2f}"
        lines.append(f"{way.transport:<12}{numbers}")
    if rows:
        names = f"{'strategy':<12}{'MB':>8}{'seconds':>10}{'+ proof':>10}{'|dlogp|':>10}{'moved':>8}{'greedy':>8}"
        lines += ["", names]
    for row in rows:
        times = f"{row.bytes / 1e6:8.3f}{row.seconds:10.3f}{row.seconds_with_proof:10.3f}"
        lines.append(
            f"{row.strategy:<12}{times}{row.max_abs_dlogp:10.1e}{row.moved:8.2f}"
            f"{'equal' if row.greedy_equal else 'differs':>8}"
        )
    return "\n".join(lines)


# ---- strategies ------------------------------------------------------------------------------------------------------


def strategy(name: str, times: int, threads: int = 1) -> Row:
    """Pushes to an engine in this process, after a first one that starts it."""
    from rlkit import dist, session
    from rlkit.language import LanguagePolicy

    words = [*SMALL, f"run.threads={threads}", f"{STAGE}.rollout.sync={name}"]
    setup = recipe.read(RECIPE, words + (["policy.train.lora.rank=4"] if name == "lora" else []))
    processes = dist.start(1, setup.options.device)
    policy = session.load_policy(setup, processes)
    assert isinstance(policy, LanguagePolicy)  # the recipe's backbone writes
    data = setup.stages[0].data.open()
    rollout: Any = setup.stages[0].rollout.start(policy, processes)
    try:
        return _Pushes(name, policy, rollout, data.draw(0, "main", 0)).measured(times)
    finally:
        rollout.close()


@dataclass(frozen=True)
class _Pushes:
    """A started rollout whose pushes are made here, so that they can be timed apart from the sampling."""

    name: str
    policy: LanguagePolicy
    rollout: Any  # of vllm
    prompts: Any  # PromptBatch

    def measured(self, times: int) -> Row:
        base = self.policy.snapshot()
        samples = self._sampled()
        apart, moved = [_apart(self.policy, samples)], []
        seconds: dict[bool, list[float]] = {True: [], False: []}  # by whether the push is proven
        for version in range(1, 2 * times + 1):
            self._change(base, version)
            moved.append(_apart(self.policy, samples))
            self.rollout.load({}, version)
            seconds[version % 2 == 1].append(self._push(proven=version % 2 == 1))
            samples = self._sampled()
            apart.append(_apart(self.policy, samples))
        return Row(
            strategy=self.name,
            bytes=self._bytes(),
            times=times,
            seconds=statistics.median(seconds[False]),
            seconds_with_proof=statistics.median(seconds[True]),
            max_abs_dlogp=math.nan if any(map(math.isnan, apart)) else max(apart),
            moved=min(moved),
            greedy_equal=self._greedy_equal(),
        )

    def _sampled(self) -> Samples:
        """The step's answers; pushes first where no push was made since the weights changed."""
        from rlkit.dist import Processes
        from rlkit.types import Context, Plan

        samples: Samples = self.rollout.collect(self.prompts, Plan(), Context(0, "main", 0, 0, {}, Processes().gather))
        return samples

    def _change(self, base: Mapping[str, Tensor], version: int) -> None:
        """As an optimiser's step would; always from the first weights, so that the network stays one that writes."""
        import torch

        from rlkit.types import generator

        much = CHANGE[self.policy.lora is not None]
        with torch.no_grad():
            for name, parameter in self.policy.trainable.items():
                noise = torch.randn(parameter.shape, generator=generator("bench", version, name))
                parameter.copy_(base[name] + much * noise.to(parameter.device))
        self.policy.updated()

    def _push(self, proven: bool) -> float:
        """Seconds of the push that `collect` would make."""
        canary = self.rollout._canary
        if not proven:
            self.rollout._canary = lambda name, prompt: None
        try:
            started = time.perf_counter()
            self.rollout._ready("current", self.prompts.prompts[0])
            return time.perf_counter() - started
        finally:
            self.rollout._canary = canary

    def _bytes(self) -> int:
        weights = self.policy.adapter()[0] if self.name == "lora" else self.policy.whole()
        return sum(one.nbytes for one in weights.values())

    def _greedy_equal(self) -> bool:
        from rlkit.types import generator

        prompts = self.prompts.prompts
        keys = [one.key for one in prompts]
        draws = [generator("bench", key) for key in keys]  # nothing is drawn at temperature 0
        ours = self.policy.answer(keys, draws, self.rollout.options.most, 0.0, "current").ids
        requests = [replace(self.rollout._request(one, 0), temperature=0.0) for one in prompts]
        told = self.rollout._ready("current", prompts[0]).map(requests)
        theirs = [list(self.rollout._read(one).ids) for one in told]  # WorkerError where there is no answer
        return theirs == ours


def _apart(policy: LanguagePolicy, samples: Samples) -> float:
    """The largest difference of a sampled token's log-prob from the learner's own under its present weights."""
    import torch

    tokens = samples.tokens
    assert tokens is not None
    keys = [prompt.key for prompt in samples.prompts]
    with torch.no_grad():
        ours = policy.models.current.log_probs(tokens.ids, tokens.length, keys, tokens.temperature)
    return float((ours.cpu() - tokens.log_prob)[tokens.decided].abs().max())
