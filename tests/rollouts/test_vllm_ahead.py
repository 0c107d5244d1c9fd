"""`ahead`: steps begun before their turn, answers whose weights change half-way, groups that are too old."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from held_worker import GROUP, LATE, LONG, PROMPTS, Held, seeds
from torch import Tensor

from rlkit import registry
from rlkit.data.prompts import PromptBatch, WorldPrompts
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.language import LanguagePolicy
from rlkit.rollouts import vllm
from rlkit.rollouts._ahead import too_old
from rlkit.rollouts._token_samples import Written
from rlkit.rollouts.vllm import VLLM, VLLMRollout
from rlkit.types import Context, Plan, Samples, Span, TokenModel
from rlkit.weights import Lora
from rlkit.workers.pool import Pool
from rlkit.workers.worker import Request, WorkerError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    model = registry.build("backbones", "tiny_captioner", {}).load(CPU, torch.float32)
    assert isinstance(model, TokenModel)
    return LanguagePolicy(model, None, CPU, "fp32", 0)


Start = Callable[..., tuple[Held, VLLMRollout]]


@pytest.fixture
def start(policy: LanguagePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(ahead=1, max_age=1) -> (the worker, the rollout that asks it)."""
    made = []

    def make(**options: Any) -> tuple[Held, VLLMRollout]:
        worker = Held()
        monkeypatch.setattr(vllm, "Server", lambda url: SimpleNamespace(open=lambda: worker))
        given = {"urls": ("http://127.0.0.1:1",), "sync": "file", "folder": str(tmp_path), "tolerance": 1e3}
        given |= {"most": LONG, "patience": {"pause": 0.0, "request": LATE, "deadline": LATE}, **options}
        made.append(VLLM(**given).start(policy, Processes()))
        return worker, made[-1]

    yield make
    for one in made:
        one.close()


def asked(step: int) -> PromptBatch:
    return WorldPrompts(PROMPTS, GROUP, task="caption").open().draw(0, "main", step)


def moment(step: int, steps: int = 9, policy_set: str = "current") -> Context:
    """Of a training step in a stage of so many."""

    def coming(more: int) -> tuple[PromptBatch, Plan, Context] | None:
        there = step + more
        return None if there >= steps else (asked(there), Plan(policy_set=policy_set), moment(there, steps))

    return Context(0, "main", step, 0, {}, Processes().gather, coming=coming)


def collected(rollout: VLLMRollout, step: int, **more: Any) -> Samples:
    return rollout.collect(asked(step), Plan(), moment(step, **more))


def evaluated(rollout: VLLMRollout, policy_set: str = "current") -> Samples:
    context = Context(0, "evaluate", 0, 0, {}, Processes().gather)
    return rollout.collect(PromptBatch(asked(99).prompts, 1), Plan(policy_set=policy_set), context)


def learned(rollout: VLLMRollout, version: int) -> None:
    """A training step: other weights, of which the rollout is told."""
    with torch.no_grad():
        for parameter in rollout.policy.trainable.values():
            parameter.mul_(1.0)
    rollout.policy.updated()
    rollout.load({}, version)


def spans_of(samples: Samples) -> set[tuple[Span, ...]]:
    assert samples.tokens is not None
    return set(samples.tokens.spans)


# ---- on policy -------------------------------------------------------------------------------------------------------


def test_by_default_no_step_is_begun_before_its_turn(start: Start) -> None:
    worker, rollout = start()
    first = collected(rollout, 0)
    assert sorted(worker.asked()) == sorted(seeds(0))
    learned(rollout, 1)
    assert [one for what, one in worker.told if what == "pushed"] == [1], "weights are brought when somebody asks"
    second = collected(rollout, 1)
    assert (spans_of(first), spans_of(second)) == ({(Span(0, 0, LONG),)}, {(Span(1, 0, LONG),)})
    assert (first.refilled, second.refilled) == (0, 0)


def test_the_samples_of_a_step_are_the_same_whenever_they_were_begun(start: Start) -> None:
    (_, plain), (_, hasty) = start(), start(ahead=2, max_age=2)
    for step in range(3):
        ours, theirs = collected(plain, step), collected(hasty, step)
        assert ours.tokens is not None
        assert theirs.tokens is not None
        assert torch.equal(ours.tokens.ids, theirs.tokens.ids)
        assert torch.equal(ours.tokens.log_prob, theirs.tokens.log_prob)
        assert torch.equal(ours.sample_id, theirs.sample_id)
        assert ours.texts == theirs.texts
        assert [one.key for one in ours.prompts] == [one.key for one in theirs.prompts]


# ---- ahead -----------------------------------------------------------------------------------------------------------


def test_the_next_step_is_begun_before_this_one_is_trained_on(start: Start) -> None:
    worker, rollout = start(ahead=1, max_age=1)
    gate = worker.hold(seeds(1), 0)
    collected(rollout, 0)
    worker.until("held", seeds(1))  # while nobody has told of new weights
    assert not set(seeds(2)) & set(worker.asked()), "and no step beyond it"
    learned(rollout, 1)
    assert worker.told[-1] == ("pushed", 2), "at once, since answers are under way"
    gate.set()
    second = collected(rollout, 1)
    assert spans_of(second) == {(Span(1, 0, LONG),)}, "no token was sampled before the push"
    worker.until("asked", seeds(2))
    assert all(worker.asked().count(one) == 1 for one in seeds(1))


def test_an_answer_whose_weights_changed_half_way_is_as_old_as_its_beginning(start: Start) -> None:
    worker, rollout = start(ahead=1, max_age=1)
    gate = worker.hold(seeds(1, range(4)), 2)
    collected(rollout, 0)
    worker.until("held", seeds(1, range(4)))
    worker.until("done", seeds(1, range(4, 12)))
    learned(rollout, 1)
    gate.set()
    second = collected(rollout, 1)
    assert second.tokens is not None
    assert second.tokens.spans[:4] == ((Span(0, 0, 2), Span(1, 2, LONG)),) * 4
    assert second.tokens.spans[4:] == ((Span(0, 0, LONG),),) * 8
    assert second.oldest.tolist() == [0] * 12
    assert (second.version, second.refilled) == (1, 0)


def test_only_groups_that_are_too_old_are_sampled_again_and_nothing_twice(start: Start) -> None:
    worker, rollout = start(ahead=2, max_age=1)
    late = [i for i in range(12) if i != 6]  # one answer of the second group is there before the first update
    gate = worker.hold(seeds(2, late), 0)
    collected(rollout, 0)
    worker.until("done", seeds(2, [6]))
    worker.until("held", seeds(2, late))
    learned(rollout, 1)
    gate.set()
    worker.until("done", seeds(2))
    collected(rollout, 1)
    learned(rollout, 2)
    rollout.policy.take_calls()
    third = collected(rollout, 2)
    assert third.oldest.tolist() == [1] * 4 + [2] * 4 + [1] * 4
    assert third.refilled == 1
    assert [worker.asked().count(one) for one in seeds(2)] == [1] * 4 + [2] * 4 + [1] * 4
    assert third.index.tolist() == list(range(12))
    assert [one.key for one in third.prompts] == [one.key for one in asked(2).prompts for _ in range(GROUP)]
    assert third.tokens is not None
    plain = torch.tensor([[(seed + at) % 90 for at in range(LONG)] for seed in seeds(2)])
    assert torch.equal(third.tokens.ids[third.tokens.decided].view(12, LONG), plain), "each at its place"
    # The canary's one row is among them if the last weights waited for somebody to ask: if nothing was under way.
    assert rollout.policy.take_calls() - (12 + 4) * LONG in (0, 1)


def test_the_stage_ends_and_nothing_is_begun_beyond_it(start: Start) -> None:
    worker, rollout = start(ahead=3, max_age=3)
    for step in range(2):
        collected(rollout, step, steps=2)
        learned(rollout, step + 1)
    assert sorted(worker.asked()) == sorted(seeds(0) + seeds(1))


# ---- evaluations in between ------------------------------------------------------------------------------------------


def test_an_evaluation_of_the_same_weights_is_sampled_beside_what_is_under_way(start: Start) -> None:
    worker, rollout = start(ahead=1, max_age=1)
    gate = worker.hold(seeds(1), 2)
    collected(rollout, 0)
    worker.until("held", seeds(1))
    learned(rollout, 1)
    before = [one for one in worker.told if one[0] == "pushed"]
    assert spans_of(evaluated(rollout)) == {(Span(1, 0, LONG),)}
    assert [one for one in worker.told if one[0] == "pushed"] == before
    assert not set(seeds(1)) & {which for what, which in worker.told if what == "done"}
    gate.set()
    assert spans_of(collected(rollout, 1)) == {(Span(0, 0, 2), Span(1, 2, LONG))}


def test_another_set_waits_until_nothing_is_under_way(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the end of those answers would be of weights that nobody trains."""
    worker, rollout = start(ahead=1, max_age=1)
    rollout.policy.keep("ema")
    gate = worker.hold(seeds(1), 2)
    collected(rollout, 0)
    worker.until("held", seeds(1))
    learned(rollout, 1)
    waits = rollout._ahead.wait

    def waited() -> None:
        gate.set()  # the answers are held until somebody waits for them
        waits()
        assert not rollout._ahead.under_way

    monkeypatch.setattr(rollout._ahead, "wait", waited)
    evaluated(rollout, "ema")
    order = [one for one in worker.told if one[0] in ("pushed", "done")]
    assert max(order.index(("done", one)) for one in seeds(1)) < order.index(("pushed", 3))
    assert spans_of(collected(rollout, 1)) == {(Span(0, 0, 2), Span(1, 2, LONG))}
    assert ("pushed", 4) in worker.told, "training has its own weights back"
    rollout.policy.drop("ema")


def test_a_step_that_wants_another_set_than_it_was_begun_for_is_asked_for_anew(start: Start) -> None:
    worker, rollout = start(ahead=1, max_age=1)
    rollout.policy.keep("ema")
    collected(rollout, 0)
    rollout.collect(asked(1), Plan(policy_set="ema"), moment(1, policy_set="ema"))
    assert [worker.asked().count(one) for one in seeds(1)] == [2] * 12
    rollout.policy.drop("ema")


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_failure_in_the_background_is_raised_by_the_step_that_asks(start: Start) -> None:
    worker, rollout = start(ahead=1, max_age=1)
    worker.refused = set(seeds(1, [5]))
    collected(rollout, 0)
    learned(rollout, 1)
    with pytest.raises(WorkerError, match="a sample was tried 1 times, and failed: the network is on strike"):
        collected(rollout, 1)


def test_what_a_thread_raises_is_not_lost(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rollout = start(ahead=1, max_age=1)
    whole = Pool.map

    def broken(pool: Pool, requests: Sequence[Request]) -> Any:
        if requests[0].seed in seeds(1):
            raise OSError("no threads left")
        return whole(pool, requests)

    monkeypatch.setattr(Pool, "map", broken)
    collected(rollout, 0)
    with pytest.raises(OSError, match="no threads left"):
        collected(rollout, 1)


def test_close_ends_what_is_under_way(start: Start) -> None:
    worker, rollout = start(ahead=1, max_age=1)
    worker.hold(seeds(1), 2)
    collected(rollout, 0)
    worker.until("held", seeds(1))
    under_way = list(rollout._ahead._begun.values())
    rollout.close()
    done, left = wait(under_way, LATE / 2)
    assert (len(done), len(left)) == (1, 0)
    names = [what for what, _ in worker.told if what in ("abandoned", "closed")]
    assert names == ["abandoned", "closed"]


def test_close_lets_a_worker_alone_that_has_nothing_to_do(start: Start) -> None:
    worker, rollout = start(ahead=1, max_age=1)
    collected(rollout, 0, steps=1)
    rollout.close()
    assert [what for what, _ in worker.told if what in ("abandoned", "closed")] == ["closed"]


# ---- groups over processes -------------------------------------------------------------------------------------------


def test_processes_drop_the_same_groups_also_where_they_hold_no_old_answer() -> None:
    """A group of which the other process holds the old half; and a process that holds nothing at all."""

    def written(*versions: int) -> list[Written]:
        return [Written((1, 2), (0.0, 0.0), True, (Span(one, 0, 1), Span(9, 1, 2))) for one in versions]

    here, there, none = written(5, 5, 5, 4), written(3, 5), written()
    groups = [torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)]
    everyone = {1: torch.cat(groups), 2: torch.tensor([5, 5, 5, 4, 3, 5])}
    found = []
    for own, group in zip((here, there, none), groups, strict=True):
        calls: list[Tensor] = []

        def gather(values: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(values)
            return everyone[len(calls)]

        found.append(too_old(own, group, 4, gather))
        assert len(calls) == 2, "every process joins"
    assert found == [([2, 3], 1), ([0], 1), ([], 1)]


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ahead": -1}, "ahead and max_age must be 0 or more, not -1 and 0"),
        ({"max_age": -1}, "ahead and max_age must be 0 or more, not 0 and -1"),
        ({"ahead": 1, "max_age": 1}, r"ahead: 1 needs servers \(urls\)"),
        ({"ahead": 2, "urls": ("http://127.0.0.1:1",)}, "max_age is 0: .* Set max_age: 2, or ahead: 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLM(**options)


def test_adapters_go_back_by_one_push_only(tmp_path: Path) -> None:
    model = registry.build("backbones", "tiny_captioner", {}).load(CPU, torch.float32)
    adapted = LanguagePolicy(model, Lora(rank=2), CPU, "fp32", 0)
    given = {"urls": ("http://127.0.0.1:1",), "folder": str(tmp_path), "max_age": 2}
    VLLM(ahead=1, **given).start(adapted, Processes()).close()
    with pytest.raises(RecipeError, match=r"rollout.ahead.*the newest adapter and the one before.*ahead: 1, or sync"):
        VLLM(ahead=2, **given).start(adapted, Processes())
    VLLM(ahead=2, sync="gloo", **given).start(adapted, Processes()).close()


def test_each_learner_process_has_servers_of_its_own(
    policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def named(url: str) -> Any:
        worker = Held()
        worker.name = url
        return SimpleNamespace(open=lambda: worker)

    monkeypatch.setattr(vllm, "Server", named)
    options = VLLM(urls=("a", "b", "c"), sync="file", folder=str(tmp_path))
    found = []
    for rank in range(2):
        rollout = options.start(policy, Processes(rank, 2))
        found.append(list(rollout._open().workers))
    assert found == [["a", "c"], ["b"]]
    with pytest.raises(RecipeError, match="4 learner processes cannot share 3 servers"):
        options.start(policy, Processes(3, 4))._open()
