"""Updates of a pool's workers: in which order, what proves them, and what becomes of a worker where one failed."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_fake import QUICK, WEIGHTS, Fake, complete, fakes, pools, requests

from rlkit.types import Span
from rlkit.workers import push, transfer
from rlkit.workers.pool import Pool
from rlkit.workers.push import Canary, File, Gloo, Lora, Nothing
from rlkit.workers.worker import WorkerError


@pytest.fixture
def fake() -> Iterator[Callable[[], Fake]]:
    with fakes() as make:
        yield make


@pytest.fixture
def pool_of() -> Iterator[Callable[..., Pool]]:
    with pools() as make:
        yield make


def test_an_update_by_file(fake, pool_of, tmp_path) -> None:
    one, other = fake(), fake()
    pool, by = pool_of(one, other), File(tmp_path)
    for server in (one, other):
        server.calls.clear()
    pool.push(WEIGHTS, 1, by)
    for server in (one, other):
        assert server.verbs() == [
            *("pause?mode=keep", "stamp updating-1", "start_weight_update", "update_weights"),
            *("finish_weight_update", "resume"),
        ]
        (told,) = [body["update_info"]["path"] for path, body in server.calls if path == "/update_weights"]
        assert torch.equal(dict(transfer.read_weights(Path(told)))["two"], WEIGHTS["two"])
    assert (pool.version, pool.states) == (1, {one.url: "ready", other.url: "ready"})
    pool.push(WEIGHTS, 2, by)
    by.forget(2)
    assert [one.name for one in tmp_path.iterdir()] == ["weights-2.safetensors"]


def test_an_update_by_gloo_is_one_line_a_server(fake, pool_of) -> None:
    one, other = fake(), fake()
    pool, by = pool_of(one, other), Gloo(seconds=20)
    for version in (1, 2):
        weights = {name: tensor * version for name, tensor in WEIGHTS.items()}
        pool.push(weights, version, by)
        for server in (one, other):
            assert all(torch.equal(server.received[name], tensor) for name, tensor in weights.items())
    for server in (one, other):
        assert server.verbs().count("init_weight_transfer_engine") == 1
    one.label, one.line = "default", None  # restarted: its end of the line is gone
    pool.push(WEIGHTS, 3, by)
    assert one.verbs().count("init_weight_transfer_engine") == 2
    assert other.verbs().count("init_weight_transfer_engine") == 1


def test_an_exchange_ends_with_the_first_error_of_either_side(fake, pool_of) -> None:
    """The worker says no at once; the learner does not wait for it at the line."""
    server = fake()
    pool = pool_of(server)
    server.failing["/init_weight_transfer_engine"] = (500, "no gloo here")
    with pytest.raises(WorkerError, match="no gloo here"):
        pool.push(WEIGHTS, 1, Gloo(seconds=2))


def test_a_failed_update_puts_a_worker_out_until_it_was_restarted(fake, pool_of, tmp_path) -> None:
    bad, good = fake(), fake()
    pool, by = pool_of(bad, good), File(tmp_path)
    bad.failing["/update_weights"] = (500, "half")
    pool.push(WEIGHTS, 1, by)
    assert pool.states == {bad.url: "broken", good.url: "ready"}
    assert bad.verbs()[-2:] == ["pause?mode=abort", "stamp broken-1"]
    bad.failing.clear()
    asked = len(bad.asked())
    complete(pool.map(requests(8)), 8)
    pool.push(WEIGHTS, 2, by)
    complete(pool.map(requests(8)), 8)
    assert (pool.states[bad.url], len(bad.asked())) == ("broken", asked), "it answers, and is not asked"
    bad.label = "default"  # restarted
    assert pool.look()[bad.url] == "fresh"
    complete(pool.map(requests(8)), 8)
    assert len(bad.asked()) == asked, "it has the first weights, not these"
    pool.push(WEIGHTS, 3, by)
    assert pool.states[bad.url] == "ready"


def test_what_was_under_way_at_a_broken_worker_is_asked_again(fake, pool_of, tmp_path) -> None:
    bad, good = fake(), fake()
    pool = pool_of(bad, good, at_once=4)
    begun, go = threading.Event(), threading.Event()
    bad.script = [lambda body: (begun.set(), go.wait(30))[1] and None] * 4
    bad.failing["/update_weights"] = (500, "half")
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(pool.map, requests(8))
        begun.wait(30)
        pool.push(WEIGHTS, 1, File(tmp_path))
        go.set()
        complete(found.result(), 8)
    assert {one[0].worker for one in found.result()} == {good.url}
    assert pool.retries == 4


def test_a_worker_left_half_loaded_by_another_learner(fake, pool_of) -> None:
    server = fake()
    server.label = "updating-7"
    with pytest.raises(WorkerError, match=r"its update never ended \(label 'updating-7'\)"):
        pool_of(server)


def test_a_worker_with_whole_weights_of_another_version_needs_a_push(fake, pool_of) -> None:
    server = fake()
    pool = pool_of(server)
    server.label = "12"
    (failure,) = pool.map(requests(1))
    assert (pool.states[server.url], "no worker is left" in failure.reason) == ("fresh", True)
    pool.push({}, 1, Nothing())
    complete(pool.map(requests(1)), 1)


def test_a_worker_that_an_update_never_touched_is_tried_at_the_next(fake, pool_of, tmp_path) -> None:
    bad, good = fake(), fake()
    pool = pool_of(bad, good)
    bad.failing["/pause?mode=keep"] = (500, "not now")
    bad.failing["/update_weight_version"] = (500, "not now")
    pool.push(WEIGHTS, 1, File(tmp_path))
    assert pool.states == {bad.url: "away", good.url: "ready"}
    bad.failing.clear()
    pool.push(WEIGHTS, 2, File(tmp_path))
    assert pool.states[bad.url] == "ready"


def test_labels_say_nothing_during_a_push(fake, pool_of, tmp_path) -> None:
    server = fake()
    pool = pool_of(server)
    begun, go = threading.Event(), threading.Event()

    class Held(Nothing):
        def __call__(self, worker: Any, prepared: Any, version: int) -> None:
            worker.stamp("updating-1")
            begun.set()
            go.wait(30)
            worker.stamp("1")

    with ThreadPoolExecutor(1) as thread:
        pushed = thread.submit(pool.push, WEIGHTS, 1, Held())
        begun.wait(30)
        assert pool.look() == {server.url: "ready"}
        go.set()
        pushed.result()
    assert pool.look() == {server.url: "ready"}


def test_too_few_workers_are_left(fake, pool_of, tmp_path) -> None:
    bad, good = fake(), fake()
    pool = pool_of(bad, good, patience=replace(QUICK, least=2))
    bad.failing["/start_weight_update"] = (500, "no")
    with pytest.raises(WorkerError, match=f"version 1 reached 1 of 2 workers: {bad.url} is broken: .*Restart them"):
        pool.push(WEIGHTS, 1, File(tmp_path))


def canary(*values: float) -> Canary:
    return Canary(requests(1)[0], lambda ids: values, tolerance=1e-4)


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (canary(-0.5, -1.2), "log-probs differ by 0.2"),
        (canary(-0.5, float("nan")), "log-probs differ by nan"),
        (canary(-0.5, -1.0), ""),
    ],
    ids=["other", "nan", "same"],
)
def test_the_proof_that_weights_arrived(by: Canary, message: str, fake, pool_of, tmp_path) -> None:
    server = fake()
    pool = pool_of(server)
    if not message:
        pool.push(WEIGHTS, 1, File(tmp_path, by))
        return
    with pytest.raises(WorkerError, match=message):
        pool.push(WEIGHTS, 1, File(tmp_path, by))
    assert (pool.states, server.label) == ({server.url: "broken"}, "broken-1")


def test_a_label_alone_is_no_proof(fake, pool_of, tmp_path) -> None:
    """The engine answers with the old version although the server says the new one."""
    server = fake()
    pool = pool_of(server)
    server.change = {"weight_versions": [{"version": "0", "start": 0, "end": 2}]}
    with pytest.raises(WorkerError, match="after the update to version 1"):
        pool.push(WEIGHTS, 1, File(tmp_path, canary(-0.5, -1.0)))


def test_adapters_have_names_of_their_own_and_the_one_before_stays(fake, pool_of, tmp_path) -> None:
    server = fake()
    pool, by = pool_of(server), Lora(tmp_path, {"r": 4})
    names = []
    for version in (1, 2, 5):
        pool.push(WEIGHTS, version, by)
        by.forget(version)
        ((answer,),) = pool.map(requests(1))
        names.append(server.asked()[-1]["model"])
        assert names[-1].startswith(f"rlkit-{version}-")
        assert answer.spans == (Span(version, 0, 2),)
        assert server.adapters == names[-2:]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter-2", "adapter-5"]
    pool_of(server, version=None).push(WEIGHTS, 5, Lora(tmp_path, {"r": 4}))
    assert len({*names, *server.adapters}) == 4, "the next learner's fifth is another, whatever it finds there"
    server.label, server.adapters = "default", []  # restarted
    pool.push(WEIGHTS, 6, by)
    assert len(server.adapters) == 1, "and none is unloaded that it does not have"
    pool.push(WEIGHTS, 7, File(tmp_path))
    pool.map(requests(1))
    assert server.asked()[-1]["model"] == "policy", "whole weights end the adapter"


def test_an_adapter_that_is_too_large_says_so_and_breaks_nothing(fake, pool_of, tmp_path) -> None:
    server = fake()
    pool = pool_of(server)
    message = {"error": {"message": "LoRA rank 16 is greater than max_lora_rank 8."}}
    server.failing["/v1/load_lora_adapter"] = (500, message)
    with pytest.raises(WorkerError, match=r"LoRA rank 16 is greater than max_lora_rank 8. Start .* lora_rank"):
        pool.push(WEIGHTS, 1, Lora(tmp_path, {"r": 16}))
    server.failing.clear()
    pool.push(WEIGHTS, 2, Lora(tmp_path, {"r": 4}))
    assert pool.states == {server.url: "ready"}


def test_both_sides_of_an_exchange_are_waited_for_unless_one_fails() -> None:
    """A learner at the line of a worker that said no would stand there until its timeout."""
    assert push._both(lambda: 1, lambda: 2, 10) == (1, 2)
    gone, ended = threading.Event(), []
    with pytest.raises(ZeroDivisionError):
        push._both(lambda: 1 / 0, lambda: ended.append(gone.wait(5)), 10)
    assert ended == []
    gone.set()
