"""The reward server: what it takes, how it gathers and drains, and that no failure of a reward becomes a number."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from rlkit import wire
from rlkit.errors import PluginError, RecipeError
from rlkit.serve import reward as reward_server
from rlkit.serve import reward_worker
from rlkit.serve.reward_worker import Worker
from rlkit.types import Prompt, Samples

PATIENCE = 20.0  # seconds after which a test that hangs fails

TESTED = """
import threading, torch
from dataclasses import dataclass
from rlkit.types import Unscored

CALLS = []            # samples of each call
HELD, ENTERED = threading.Event(), threading.Event()
HELD.set()

@dataclass(frozen=True)
class Bright:
    slow: bool = False
    reads = ("prompt",)
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("red",)
    groupwise = False
    version = "3"

    def __call__(self, samples):
        CALLS.append(len(samples))
        ENTERED.set()
        HELD.wait(20)
        texts = [prompt.text for prompt in samples.prompts]
        if "raise" in texts:
            raise RuntimeError("secret path /somewhere/weights")
        if "exit" in texts:
            raise SystemExit
        values = [Unscored("no subject") if t == "unscored" else None if t == "none" else v
                  for t, v in zip(texts, samples.media.mean((1, 2, 3)).tolist())]
        if "short" in texts:
            values = values[1:]
        return values, {"red": samples.media[:, 0].mean((1, 2))}

class Compares(Bright):
    groupwise = True

    def __call__(self, samples):
        CALLS.append(len(samples))
        if any(p.text == "raise" for p in samples.prompts):
            raise RuntimeError
        mean = samples.media.mean((1, 2, 3))
        return torch.stack([mean[i] - mean[samples.group == g].mean() for i, g in enumerate(samples.group)])

class Loads(Bright):
    def load(self, device):
        return Loaded()

class Loaded:
    closed = []
    range = (0.0, 2.0)
    components = ()

    def __call__(self, samples):
        return torch.ones(len(samples)) * threading.get_ident()

    def close(self):
        self.closed.append(1)

class Fails(Bright):
    def load(self, device):
        import a_package_that_is_not_there
"""


@pytest.fixture(scope="session")
def tested_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "served_rewards.py").write_text(TESTED)
    return folder


@pytest.fixture
def tested(tested_folder, monkeypatch):
    """The module of rewards above, without calls yet."""
    monkeypatch.syspath_prepend(tested_folder)
    import served_rewards

    served_rewards.CALLS.clear()
    served_rewards.ENTERED.clear()
    served_rewards.HELD.set()
    yield served_rewards
    served_rewards.HELD.set()


def samples_of(texts, group=None, size=4, values=None) -> Samples:
    n = len(texts)
    values = torch.arange(n) if values is None else torch.tensor(values)
    media = (values / 255).float().view(n, 1, 1, 1).expand(n, 3, size, size)
    rows = torch.arange(n)
    groups = rows if group is None else torch.tensor(group)
    prompts = tuple(Prompt(i, text) for i, text in enumerate(texts))
    return Samples(media, torch.zeros(n, 0), prompts, groups, rows, rows + 100, version=0, total=n)


def values_of(results):
    return [one.value if one.value is None else round(one.value * 255) for one in results]


@pytest.fixture
def worker_of() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(name="Bright", start=True, **options) -> Worker:
        made.append(Worker(f"served_rewards:{name}", {}, "cpu", **options))
        return made[-1].__enter__() if start else made[-1]

    yield make
    for one in made:
        if one.thread.ident:
            one.__exit__()


# ---- the worker ------------------------------------------------------------------------------------------------------


def test_what_waits_is_scored_together_and_given_back_apart(tested, worker_of):
    worker = worker_of(start=False, max_batch=5)
    sizes = [2, 2, 3, 1, 7]
    values = [[10 * i + k for k in range(n)] for i, n in enumerate(sizes)]
    answers = [worker.put(samples_of(["a"] * len(own), values=own), "") for own in values]
    with worker:
        found = [answer.result(PATIENCE) for answer in answers]
    assert [values_of(one) for one in found] == values
    assert [[one.id for one in results] for results in found] == [[100 + k for k in range(n)] for n in sizes]
    assert tested.CALLS == [4, 4, 5, 2]  # 2+2, then 3+1, and 7 in two


def test_pictures_of_another_size_wait_for_the_next_call(tested, worker_of):
    worker = worker_of(start=False)
    answers = [worker.put(samples_of(["a"], size=size), "") for size in (4, 4, 8, 8, 4)]
    with worker:
        assert [values_of(answer.result(PATIENCE)) for answer in answers] == [[0]] * 5
    assert tested.CALLS == [2, 2, 1]


def test_a_reward_that_compares_gets_one_request_at_a_time_and_whole(tested, worker_of):
    worker = worker_of("Compares", start=False, max_batch=3)
    two = [samples_of(["a"] * 4, [0, 0, 1, 1], values=values) for values in ([0, 10, 20, 60], [5, 5, 7, 9])]
    answers = [worker.put(samples, "") for samples in two]
    with worker:
        assert [values_of(answer.result(PATIENCE)) for answer in answers] == [[-5, 5, -20, 20], [0, 0, -1, 1]]
    assert tested.CALLS == [4, 4]


def test_groups_of_two_requests_stay_apart():
    one, other = samples_of(["a"] * 3, [0, 0, 9]), samples_of(["b"] * 2, [9, 9])
    merged = reward_worker._merged([one, other])
    assert merged.group.tolist() == [0, 0, 1, 3, 3]
    assert [prompt.text for prompt in merged.prompts] == ["a"] * 3 + ["b"] * 2
    assert (merged.total, merged.sample_id.tolist()) == (5, [0, 1, 2, 3, 4])


def test_a_bad_sample_costs_itself(tested, worker_of, caplog):
    results = worker_of().put(samples_of(["a", "raise", "a", "unscored", "none"]), "id-7").result(PATIENCE)
    assert values_of(results) == [0, None, 2, None, None]
    assert "id-7" in results[1].reason
    assert results[3].reason == "no subject"
    assert "NaN, infinity or None" in results[4].reason
    assert all("secret" not in one.reason for one in results)
    assert "secret path" in caplog.text  # the log has it
    assert results[2].components == pytest.approx({"red": 2 / 255})


def test_a_bad_group_costs_itself(tested, worker_of):
    samples = samples_of(["a", "raise", "a", "a"], [3, 3, 5, 5], values=[0, 1, 10, 20])
    assert values_of(worker_of("Compares").put(samples, "").result(PATIENCE)) == [None, None, -5, 5]


def test_too_few_numbers_are_no_answer(tested, worker_of):
    assert values_of(worker_of().put(samples_of(["a", "short"]), "").result(PATIENCE)) == [0, None]


def test_the_worker_survives_whatever_happens(tested, worker_of, monkeypatch):
    worker = worker_of()
    assert values_of(worker.put(samples_of(["a", "exit"]), "").result(PATIENCE)) == [0, None]
    with monkeypatch.context() as broken:
        broken.setattr(reward_worker, "_merged", lambda several: several[5])
        with pytest.raises(IndexError):
            worker.put(samples_of(["a"]), "").result(PATIENCE)
    assert values_of(worker.put(samples_of(["a"]), "").result(PATIENCE)) == [0]


def test_one_thread_loads_scores_and_closes(tested):
    with Worker("served_rewards:Loads", {}, "cpu") as worker:
        (one,) = worker.put(samples_of(["a"]), "").result(PATIENCE)
        assert one.value == pytest.approx(worker.thread.ident, rel=1e-6)
        assert worker.thread.ident != threading.get_ident()
        assert (worker.card.range, worker.card.components) == ([0.0, 2.0], [])  # of what was loaded
    assert tested.Loaded.closed == [1]


def test_who_waits_no_longer_is_not_scored(tested, worker_of):
    tested.HELD.clear()
    worker = worker_of()
    first = worker.put(samples_of(["a"]), "")
    assert tested.ENTERED.wait(PATIENCE)
    gone = worker.put(samples_of(["a", "a"]), "")
    assert gone.cancel()
    tested.HELD.set()
    first.result(PATIENCE)
    worker.put(samples_of(["a"] * 3), "").result(PATIENCE)
    assert 2 not in tested.CALLS


def test_errors_of_loading_are_raised_where_it_is_started(tested):
    with pytest.raises(PluginError, match="no reward named 'ocrr'"), Worker("ocrr", {}):
        pass
    with pytest.raises(RecipeError, match="no option 'colour'"), Worker("served_rewards:Bright", {"colour": 1}):
        pass
    with pytest.raises(PluginError, match="a_package_that_is_not_there"), Worker("served_rewards:Fails", {}):
        pass


def test_other_options_are_another_config(tested):
    configs = []
    for options in ({}, {"slow": False}, {"slow": True}):
        with Worker("served_rewards:Bright", options) as worker:
            configs.append(worker.card.config)
    assert configs[0] == configs[1] != configs[2]


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class Server:
    """The application behind uvicorn, in a thread."""

    def __init__(self, app) -> None:
        import uvicorn

        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, trust_env=False, timeout=PATIENCE)

    def score(self, samples, kind=wire.CONTENT_TYPE, headers=None, **asked):
        body = samples if isinstance(samples, bytes) else wire.encode_request(samples, **asked)
        return self.client.post("/v1/score", content=body, headers={"content-type": kind, **(headers or {})})

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        self.listener.close()


@pytest.fixture
def served(tested, worker_of) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(name="Bright", token="", **options) -> Server:
        made.append(Server(reward_server.app(worker_of(name), token, **options)))
        return made[-1]

    yield make
    tested.HELD.set()
    for one in made:
        one.close()


def test_samples_are_scored(served):
    samples = samples_of(["a", "unscored", "b"])
    question = wire.encode_request(samples, "served_rewards:Bright")
    answer = served().score(question)
    assert (answer.status_code, answer.headers["content-type"]) == (200, wire.CONTENT_TYPE)
    results = wire.decode_reply(answer.content, wire.name_of(question), [100, 101, 102])
    assert values_of(results) == [0, None, 2]


def test_the_card_says_what_is_served(served):
    said = served().client.get("/v1/rewards").json()
    (card,) = said["rewards"]
    assert said["protocol"] == "rlkit-reward/1"
    assert len(card.pop("config")) == 16
    assert card == {
        "name": "served_rewards:Bright",
        "version": "3",
        "reads": ["prompt"],
        "range": [0.0, 1.0],
        "higher_is_better": True,
        "components": ["red"],
        "groupwise": False,
        "max_batch": 64,
    }
    assert served().client.get("/v1/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", "bearer right-word", "right-word", "Bearer right-word2"]
)
def test_without_the_token_there_is_nothing_but_health(given, served, tested):
    server = served(token="right-word")
    headers = {} if given is None else {"authorization": given}
    assert server.client.get("/v1/health").status_code == 200
    answers = [server.client.get(path, headers=headers) for path in ("/v1/rewards", "/metrics")]
    answers.append(server.score(samples_of(["a"]), headers=headers))
    assert [one.status_code for one in answers] == [401] * 3
    assert not tested.CALLS
    right = {"authorization": "Bearer right-word"}
    assert server.score(samples_of(["a"]), headers=right).status_code == 200
    assert server.client.get("/v1/rewards", headers=right).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"", wire.CONTENT_TYPE, 400, "no message"),
        (b"\x80\x04.", wire.CONTENT_TYPE, 400, "no message"),
        (wire.encode_request(samples_of(["a"]))[:-3], wire.CONTENT_TYPE, 400, "damaged"),
        (wire.encode_request(samples_of(["a"])), "text/plain", 415, "content-type"),
        (wire.encode_request(samples_of(["a"]), "other"), wire.CONTENT_TYPE, 404, "no reward 'other'"),
        (wire.encode_request(samples_of(["a"]), None, "0" * 16), wire.CONTENT_TYPE, 409, "other options"),
    ],
)
def test_bad_requests_are_refused_with_a_reason(body, kind, status, said, served, tested):
    answer = served().score(body, kind)
    assert answer.status_code == status
    assert said in answer.json()["error"]
    assert not tested.CALLS


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_is_read_no_further_than_allowed(declared, served, monkeypatch):
    monkeypatch.setattr(wire, "LARGEST_BODY", 100_000)
    server, taken = served(), 0

    def pieces():
        nonlocal taken
        for _ in range(2000):
            taken += 1
            yield bytes(50_000)

    headers = {"content-type": wire.CONTENT_TYPE} | ({"content-length": "100000000"} if declared else {})
    with contextlib.suppress(httpx.TransportError):  # it may stop listening before all was said
        assert server.client.post("/v1/score", content=pieces(), headers=headers).status_code == 413
    assert taken < 2000
    assert server.client.get("/v1/health").status_code == 200


def test_too_many_are_told_to_come_back(served, tested):
    tested.HELD.clear()
    server = served(waiting=1)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(server.score, samples_of(["a"]))
        assert tested.ENTERED.wait(PATIENCE)
        answer = httpx.post(f"{server.url}/v1/score", content=b"", headers={"content-type": "a/b"}, trust_env=False)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        tested.HELD.set()
        assert first.result(PATIENCE).status_code == 200
    assert server.score(samples_of(["a"])).status_code == 200


def test_a_request_waits_so_long_and_no_longer(served, tested):
    tested.HELD.clear()
    question = wire.encode_request(samples_of(["a", "b"]))
    answer = served(deadline=1.5).score(question)
    results = wire.decode_reply(answer.content, wire.name_of(question), [100, 101])
    assert [(one.value, one.status) for one in results] == [(None, "timeout")] * 2


def test_a_failure_of_the_server_shows_a_number_and_no_traceback(served, monkeypatch):
    monkeypatch.setattr(reward_worker, "_merged", lambda several: several[5])
    answer = served().score(samples_of(["a"]))
    assert answer.status_code == 500
    assert set(answer.json()) == {"error"}
    assert "log has it under" in answer.json()["error"]


def test_numbers_for_prometheus(served):
    server = served()
    server.score(samples_of(["a", "unscored", "raise", "b"]))
    server.score(b"")
    lines = server.client.get("/metrics").text.splitlines()
    for line in (
        'rlkit_reward_requests_total{status="200"} 1.0',
        'rlkit_reward_requests_total{status="400"} 1.0',
        "rlkit_reward_samples_total 2.0",
        'rlkit_reward_unscored_total{status="failed"} 2.0',
        "rlkit_reward_seconds_count 2.0",
        "rlkit_reward_taken 0.0",
        "rlkit_reward_queue 0.0",
    ):
        assert line in lines


# ---- the command -----------------------------------------------------------------------------------------------------


def parsed(*words):
    parser = argparse.ArgumentParser()
    reward_server.arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "where", "message"),
    [
        (["composition", "--host", "0.0.0.0"], "--host", "no token"),
        (["composition", "--host", "::"], "--host", "no token"),
        (["composition", "--host", "192.168.0.7"], "--host", "no token"),
        (["composition", "--host", "my.host"], "--host", "no token"),
        (["composition", "--max-batch", "0"], "--max-batch", "1 or more"),
        (["composition", "--port", "65536"], "--port", "0 to 65535"),
        (["composition", "score"], "serve-reward", "key=value"),
        (["composition", "--token-file", "/nowhere/token"], "--token-file", "cannot be read"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(words, where, message, monkeypatch):
    monkeypatch.delenv(reward_server.TOKEN, raising=False)
    monkeypatch.setattr(reward_worker, "Worker", lambda *_: pytest.fail("it was started"))
    with pytest.raises(RecipeError, match=message) as caught:
        reward_server.run(parsed(*words))
    assert caught.value.where == where


@pytest.mark.parametrize("text", ["", " \n", "two words", "gänse"])
def test_a_token_file_without_a_token(text, tmp_path):
    (tmp_path / "token").write_text(text)
    with pytest.raises(RecipeError, match="holds no token") as caught:
        reward_server.run(parsed("composition", "--token-file", str(tmp_path / "token")))
    assert not text.strip() or text not in str(caught.value)


def test_the_token_is_the_files_or_the_environments(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv(reward_server.TOKEN, "from-environment")
    assert reward_server._token(tmp_path / "token") == "from-file"
    assert reward_server._token(None) == "from-environment"


def test_options_are_read_as_yaml():
    words = ["a=1", "b=[x, 2.5]", "c.d=null", "e=text", "f=a=b"]
    assert reward_server._options(words) == {"a": 1, "b": ["x", 2.5], "c": {"d": None}, "e": "text", "f": "a=b"}


def test_a_port_that_is_taken_is_said(served):
    server = served()
    with pytest.raises(RecipeError, match="cannot listen"):
        reward_server.serve("composition", {}, port=server.listener.getsockname()[1])


COMMAND = """
import argparse, sys
from rlkit.serve import reward as reward_server
assert "torch" not in sys.modules
parser = argparse.ArgumentParser()
reward_server.arguments(parser)
sys.exit(reward_server.run(parser.parse_args()))
"""


GATED = """
import torch
class Gated:
    def __call__(self, samples):
        open("gate").read()  # until the test has opened it and closed it
        return torch.ones(len(samples))
"""


def until(condition):
    """Its first value that is not None."""
    for _ in range(int(PATIENCE * 100)):
        if (found := condition()) is not None:
            return found
        threading.Event().wait(0.01)
    raise TimeoutError


def test_sigterm_answers_what_was_taken_in(tmp_path):
    (tmp_path / "gated.py").write_text(GATED)
    os.mkfifo(tmp_path / "gate")
    command = [sys.executable, "-c", COMMAND, "gated:Gated", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, reward_server.TOKEN: "a-token", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    question = wire.encode_request(samples_of(["a", "b"]))
    headers = {"content-type": wire.CONTENT_TYPE, "authorization": "Bearer a-token"}

    def arrived():
        with contextlib.suppress(OSError):  # nobody reads yet
            return os.open(tmp_path / "gate", os.O_WRONLY | os.O_NONBLOCK)

    def deaf():
        try:
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
        except ConnectionRefusedError:
            return True

    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as server, ThreadPoolExecutor(1) as thread:
        try:
            url = server.stdout.readline().split()[-1]
            ask = {"content": question, "headers": headers, "trust_env": False, "timeout": PATIENCE}
            answer = thread.submit(httpx.post, f"{url}/v1/score", **ask)
            gate = until(arrived)
            server.send_signal(signal.SIGTERM)
            assert until(deaf)
            os.close(gate)
            results = wire.decode_reply(answer.result().content, wire.name_of(question), [100, 101])
            assert [one.value for one in results] == [1, 1]
            assert server.wait(PATIENCE) == 0
            said = server.stderr.read()
            assert "Traceback" not in said
            assert "a-token" not in said
        finally:
            server.kill()
