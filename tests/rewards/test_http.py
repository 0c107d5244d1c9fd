"""The reward `http`: as if the reward were here, and where it is not reached or believed, a reason and no number."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from rlkit import cli, endpoints, registry, wire
from rlkit.errors import RecipeError, RewardError
from rlkit.rewards.http import _There
from rlkit.serve import reward as reward_server
from rlkit.serve.reward_worker import Worker
from rlkit.tracking import Metrics
from rlkit.types import Prompt, Unscored
from rlkit.world.grammar import draw
from rlkit.world.scenes import render_batch

CPU = torch.device("cpu")
PATIENCE = 20.0  # seconds after which a test that hangs fails

ELSEWHERE = """
import os, torch
from dataclasses import dataclass

CALLS, SEEN = [], []

@dataclass(frozen=True)
class Bright:
    scale: float = 1.0
    range = (0.0, 2.0)
    components = ("red",)
    groupwise = False
    higher_is_better = True

    def __call__(self, samples):
        CALLS.append(len(samples))
        SEEN.extend(samples.prompts)
        if any(prompt.text == "wait" for prompt in samples.prompts) and os.path.exists("gate"):
            open("gate").read()
        return samples.media.mean((1, 2, 3)) * self.scale, {"red": samples.media[:, 0].mean((1, 2))}

class Compares(Bright):
    groupwise = True

class Least(Bright):
    higher_is_better = False
"""


@pytest.fixture(scope="session")
def elsewhere_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "elsewhere.py").write_text(ELSEWHERE)
    return folder


@pytest.fixture
def elsewhere(elsewhere_folder, monkeypatch):
    monkeypatch.syspath_prepend(elsewhere_folder)
    import elsewhere

    elsewhere.CALLS.clear()
    elsewhere.SEEN.clear()
    return elsewhere


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Pauses that a test need not wait for."""
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.001)


@pytest.fixture
def open_things() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def served(open_things, elsewhere) -> Callable[..., str]:
    """served(name, options, token): the address of a server in this process."""
    import uvicorn

    def make(name="elsewhere:Bright", options=None, token="", port=0) -> str:
        worker = open_things.enter_context(Worker(name, options or {}, "cpu"))
        listener = socket.create_server(("127.0.0.1", port))
        app = reward_server.app(worker, token)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(PATIENCE)

        open_things.callback(stop)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    return make


@pytest.fixture
def http(open_things) -> Callable[..., object]:
    """http(address, options): what a recipe's entry loads to."""

    def make(*urls, endpoints=None, **options):
        reward = registry.build("rewards", "http", {"endpoints": {"urls": list(urls), **(endpoints or {})}, **options})
        return open_things.enter_context(contextlib.closing(reward.load(CPU)))

    return make


def grey(n, size=2):
    """Pictures of n different shades."""
    shade = torch.arange(n)
    colours = torch.stack([shade % 256, shade // 256, torch.zeros(n, dtype=torch.int64)], 1) / 255
    return colours.float().view(n, 3, 1, 1).expand(n, 3, size, size)


# ---- as if it were here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_a_reward_elsewhere_gives_the_numbers_of_the_reward_here(codec, served, http, samples_of):
    rng = np.random.default_rng(0)
    captions = draw("train", 12, rng)
    media = torch.from_numpy(render_batch(captions[6:] + captions[:6], rng)).mul(255).round().div(255)
    texts = [caption.text for caption in captions[:11]] + ["a photograph of a dog"]
    samples = samples_of(media, texts)
    values, components = http(served("composition", {"score": "graded"}), codec=codec)(samples)
    expected, parts = registry.build("rewards", "composition", {"score": "graded"})(samples)
    assert values[:-1] == pytest.approx(expected[:-1].tolist())
    assert len(set(values[:-1])) > 2
    assert isinstance(values[-1], Unscored)
    assert set(components) == set(parts)
    for name, column in components.items():
        assert column[:-1] == pytest.approx(parts[name][:-1].tolist())
        assert column[-1] is None


def test_all_that_a_reward_may_read_arrives(served, http, samples_of, elsewhere):
    shared, reference = torch.full((3, 5, 7), 0.2), torch.full((3, 2, 2), 0.4)
    prompt = Prompt(5, "wörds", "count", {"include": [{"count": 2}]}, ("STOP",), shared, (reference,))
    http(served())(samples_of(grey(2), [prompt, Prompt(6, "b")]))
    one, other = elsewhere.SEEN
    assert (one, other) == (prompt, Prompt(6, "b"))
    assert torch.equal(one.source, shared)
    assert torch.equal(one.references[0], reference)
    assert (other.source, other.references) == (None, ())


def test_no_samples_ask_nothing(served, http, samples_of, elsewhere):
    assert http(served())(samples_of(torch.zeros(0, 3, 4, 4), [])) == ([], {"red": []})
    assert not elsewhere.CALLS


def test_ten_thousand_samples_keep_their_order(served, http, samples_of):
    n = 10_000
    values, parts = http(served(), codec="raw", max_pictures=256)(samples_of(grey(n, 1), [Prompt(0, "a")] * n))
    assert values == pytest.approx(grey(n, 1).mean((1, 2, 3)).tolist())
    assert parts["red"] == pytest.approx(grey(n, 1)[:, 0, 0, 0].tolist())


def test_requests_hold_so_many_samples(served, http, samples_of, elsewhere):
    http(served(), max_pictures=3, endpoints={"at_once": 1})(samples_of(grey(7), ["a"] * 7))
    assert elsewhere.CALLS == [3, 3, 1]


def test_groups_stay_whole_if_they_are_compared(served, http, samples_of, elsewhere):
    group = [0, 1, 0, 1, 2, 2, 2, 2, 2, 7]
    values, _ = http(served("elsewhere:Compares"), max_pictures=3)(samples_of(grey(10), ["a"] * 10, group))
    assert values == pytest.approx(grey(10).mean((1, 2, 3)).tolist())
    assert sorted(elsewhere.CALLS) == [1, 2, 2, 5]


def test_requests_hold_no_more_bytes_than_are_taken(served, http, samples_of, monkeypatch):
    client, samples = http(served(), codec="raw"), samples_of(grey(10, 32), ["a"] * 10)
    sent = []
    send = client.pool.map
    monkeypatch.setattr(client.pool, "map", lambda requests: sent.extend(requests) or send(requests))
    monkeypatch.setattr(wire, "LARGEST_BODY", 3 * 32 * 32 * 4)
    values, _ = client(samples)
    assert values == pytest.approx(grey(10).mean((1, 2, 3)).tolist())
    assert len(sent) == 4  # three pictures each
    with_source = [Prompt(i, "a", source=torch.full((3, 32, 32), i / 255)) for i in range(10)]
    sent.clear()
    assert client(replace(samples, prompts=tuple(with_source)))[0] == pytest.approx(values)
    assert len(sent) == 10


# ---- what is lost ----------------------------------------------------------------------------------------------------


def bad_ones():
    good = Prompt(0, "good")
    return {
        "text": replace(good, text="x" * 20_000),
        "metadata": replace(good, metadata={"a": torch.zeros(1)}),
        "source": replace(good, source=torch.full((3, 2, 2), torch.nan)),
        "reference": replace(good, references=(torch.zeros(3, 1, 5000),)),
    }


@pytest.mark.parametrize("what", [*bad_ones(), "picture"])
def test_a_sample_that_cannot_be_sent_is_lost_alone(what, served, http, samples_of):
    media, prompts = grey(9).clone(), [Prompt(i, "good") for i in range(9)]
    if what == "picture":
        media[4] = torch.nan
    else:
        prompts[4] = bad_ones()[what]
    values, components = http(served())(samples_of(media, prompts))
    assert values[4].reason.startswith("not sent: ")
    assert components["red"][4] is None
    assert values[:4] + values[5:] == pytest.approx([i / 255 / 3 for i in range(9) if i != 4])


def test_pictures_that_are_too_large_are_not_sent(served, http, samples_of, elsewhere):
    values, _ = http(served())(samples_of(torch.zeros(2, 3, 1, 4097), ["a", "b"]))
    assert all("1 to 4096 pixels a side" in value.reason for value in values)
    assert not elsewhere.CALLS


def test_a_group_that_cannot_be_sent_is_lost_alone(served, http, samples_of):
    media = grey(6).clone()
    media[2] = torch.nan
    values, _ = http(served("elsewhere:Compares"))(samples_of(media, ["a"] * 6, [0, 0, 1, 1, 2, 2]))
    assert [isinstance(value, Unscored) for value in values] == [False, False, True, True, False, False]


# ---- servers that are not what they should be ------------------------------------------------------------------------

CARD = {
    "name": "r",
    "range": [0.0, None],
    "components": [],
    "groupwise": False,
    "config": "c",
    "higher_is_better": True,
}


@pytest.fixture
def stub(open_things) -> Callable[..., str]:
    """stub(answer, said): a server whose `/v1/rewards` says `said`, and that answers questions with `answer(body)`,
    which gives (status, headers, body), or None to hang."""

    def make(answer=None, said=None) -> str:
        released = threading.Event()
        card = {"protocol": "rlkit-reward/1", "rewards": [CARD]} if said is None else said

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", -1

            def do_GET(self) -> None:
                self.reply(200, {}, card if isinstance(card, bytes) else json.dumps(card).encode())

            def do_POST(self) -> None:
                given = answer(self.rfile.read(int(self.headers["content-length"])))
                if given is None:
                    released.wait(PATIENCE)
                    self.close_connection = True
                else:
                    self.reply(*given)

            def reply(self, status, headers, body) -> None:
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # it had heard enough
                    self.wfile.write(body)
                    self.wfile.flush()

            def log_message(self, *_) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, *_) -> None:
                pass

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        open_things.callback(server.shutdown)
        open_things.callback(released.set)
        return f"http://127.0.0.1:{server.server_port}"

    return make


def reply(body, change=lambda rows: rows, question=None):
    """A well-formed answer, all ones, but for what `change` does."""
    n = len(wire.decode_request(body).samples)
    rows = [{"id": i, "value": 1.0, "components": {}, "status": "ok", "reason": ""} for i in range(n)]
    header = {"question": question or wire.name_of(body), "results": change(rows)}
    text = json.dumps(header).encode()  # which writes NaN as NaN
    rest = len(text).to_bytes(4, "big") + text
    return 200, {}, b"rlkit-reward/1\n" + hashlib.sha256(rest).digest() + rest


def with_value(value):
    return lambda body: reply(body, lambda rows: [{**rows[0], "value": value}, *rows[1:]])


BAD = {
    "500": (lambda body: (500, {}, b"oops"), "answered 500: oops"),
    "404": (lambda body: (404, {}, b""), "answered 404"),
    "redirect": (lambda body: (302, {"location": "http://127.0.0.1:9/"}, b""), "redirects are not followed"),
    "garbage": (lambda body: (200, {}, b"\x80\x04K\x00."), "not to be trusted: this is no message"),
    "nothing": (lambda body: (200, {}, b""), "not to be trusted: this is no message"),
    "json": (lambda body: (200, {}, b'{"scores": [1, 1]}'), "not to be trusted: this is no message"),
    "cut off": (lambda body: (200, {}, reply(body)[2][:-1]), "not to be trusted: the message is damaged"),
    "nan": (with_value(float("nan")), "not to be trusted: the header is no JSON"),
    "infinite": (with_value(10**400), "no finite number"),
    "text": (with_value("1.0"), "wrong type"),
    "too few": (lambda body: reply(body, lambda rows: rows[1:]), "1 answers for 2 samples"),
    "too many": (lambda body: reply(body, lambda rows: [*rows, *rows]), "4 answers for 2 samples"),
    "turned round": (lambda body: reply(body, lambda rows: rows[::-1]), "not in the order"),
    "another's": (lambda body: reply(body, question="0" * 16), "answers another question"),
    "huge": (lambda body: (200, {}, bytes(2 << 20)), "answered more than 1 MiB"),
    "hangs": (lambda body: None, "did not answer within"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_answer_costs_its_request_and_says_why(case, stub, http, samples_of, monkeypatch):
    monkeypatch.setattr(endpoints, "LARGEST_REPLY", 1 << 20)
    answer, reason = BAD[case]

    def second_is_bad(body):
        texts = [prompt.text for prompt in wire.decode_request(body).samples.prompts]
        return answer(body) if "bad" in texts else reply(body)

    options = {"request_timeout": 1.0 if case == "hangs" else PATIENCE, "tries": 2}
    samples = samples_of(grey(6), ["good", "good", "good", "bad", "good", "good"])
    values, _ = http(stub(second_is_bad), max_pictures=2, endpoints=options)(samples)
    assert values[:2] + values[4:] == [1.0] * 4
    assert all(isinstance(value, Unscored) and reason in value.reason for value in values[2:4]), values[2:4]


def test_a_reason_travels(stub, http, samples_of):
    lost = {"value": None, "status": "failed", "reason": "no face found"}
    there = http(stub(lambda body: reply(body, lambda rows: [rows[0], {**rows[1], **lost}])))
    assert there(samples_of(grey(2), ["a", "b"]))[0] == [1.0, Unscored("no face found")]


@pytest.mark.parametrize(
    ("said", "options", "message"),
    [
        ({"protocol": "rlkit-reward/2", "rewards": [CARD]}, {}, r"rlkit-reward/1 was expected.*rlkit-reward/2"),
        ({"status": "ok"}, {}, "it speaks null"),
        ([1], {}, "it speaks null"),
        (b"<html>", {}, "gave no JSON"),
        ({"protocol": "rlkit-reward/1", "rewards": [CARD]}, {"name_there": "s"}, r"no reward 's'.*Served there: r"),
        ({"protocol": "rlkit-reward/1", "rewards": [CARD, {**CARD, "name": "s"}]}, {}, r"name_there.*r, s"),
        ({"protocol": "rlkit-reward/1", "rewards": []}, {}, "Served there: none"),
        ({"protocol": "rlkit-reward/1", "rewards": [{"name": "r"}]}, {}, "lacks 'higher_is_better'"),
        ({"protocol": "rlkit-reward/1", "rewards": [{**CARD, "range": 5}]}, {}, "list of rewards"),
        ({"protocol": "rlkit-reward/1", "rewards": [{**CARD, "higher_is_better": False}]}, {}, "less of r is better"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_before_the_first_step(said, options, message, stub, http):
    with pytest.raises(RewardError, match=message):
        http(stub(said=said), **options)


def test_one_of_several_rewards_is_asked_by_name(stub, http, samples_of):
    def answer(body):
        assert wire.decode_request(body).reward == "s"
        return reply(body)

    said = {"protocol": "rlkit-reward/1", "rewards": [CARD, {**CARD, "name": "s", "range": [None, 5]}]}
    there = http(stub(answer, said), name_there="s")
    assert there.range == (None, 5.0)
    assert there(samples_of(grey(1), ["a"]))[0] == [1.0]


def test_the_card_is_remembered(served, http):
    there = http(served())
    assert (there.range, there.components) == ((0.0, 2.0), ("red",))


def test_nobody_there_is_said(http):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(RewardError, match="Is the server running"):
        http(url)


def test_the_token_is_needed_and_not_shown(served, http, samples_of, monkeypatch):
    url = served(token="right-word")
    monkeypatch.setenv("TOKEN_THERE", "wrong-word")
    with pytest.raises(RewardError, match="answered 401") as caught:
        http(url, endpoints={"key_env": "TOKEN_THERE"})
    assert "wrong-word" not in str(caught.value)
    monkeypatch.setenv("TOKEN_THERE", "right-word")
    there = http(url, endpoints={"key_env": "TOKEN_THERE"})
    assert there(samples_of(grey(2), ["a", "b"]))[0] == pytest.approx([0, 1 / 255 / 3])


def test_a_server_with_other_options_is_not_believed(served, http, samples_of):
    first, other = served(options={"scale": 1.0}), served(options={"scale": 2.0})
    there = http(first, other, max_pictures=1, endpoints={"at_once": 1})  # the second is asked when the first is busy
    values, _ = there(samples_of(grey(8), ["a"] * 8))
    refused = [value for value in values if isinstance(value, Unscored)]
    scored = [(i, value) for i, value in enumerate(values) if not isinstance(value, Unscored)]
    assert refused
    assert all("answered 409" in value.reason for value in refused)
    assert all(value == pytest.approx(i / 255 / 3) for i, value in scored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs 'endpoints'"),
        ({"endpoints": {"urls": []}}, "one or more addresses"),
        ({"endpoints": {"urls": ["http://a"], "key": "secret"}}, "no option 'key'"),
        ({"endpoints": {"urls": ["http://a"]}, "max_pictures": 257}, "1 to 256"),
        ({"endpoints": {"urls": ["http://a"]}, "codec": "jpeg"}, "codec"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(RecipeError, match=message):
        registry.build("rewards", "http", options)


# ---- a server that is killed -----------------------------------------------------------------------------------------

COMMAND = "import sys; from rlkit.serve.reward import serve; serve('elsewhere:Bright', {}, port=int(sys.argv[1]))"


def started(folder: Path, port: int) -> tuple[subprocess.Popen[str], int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", COMMAND, str(port)]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline().rpartition(":")[2])


def test_a_server_that_is_killed_costs_what_it_had_and_is_asked_again(tmp_path, http, samples_of, monkeypatch, caplog):
    monkeypatch.setattr(endpoints, "REST", 0.0)
    caplog.set_level("INFO", "rlkit.endpoints")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    os.mkfifo(tmp_path / "gate")
    samples = samples_of(grey(5), ["a", "a", "wait", "a", "a"])
    expected = pytest.approx([i / 255 / 3 for i in range(5)])

    server, port = started(tmp_path, 0)
    with contextlib.ExitStack() as ending, ThreadPoolExecutor(1) as thread:
        ending.callback(server.wait)
        ending.callback(server.kill)
        there = http(f"http://127.0.0.1:{port}", max_pictures=1, endpoints={"at_once": 1})
        answer = thread.submit(there, samples)
        with open(tmp_path / "gate", "w"):  # returns when the third sample is being scored
            server.kill()
            server.wait()
        values, _ = answer.result(PATIENCE)
    assert values[:2] == pytest.approx([0, 1 / 255 / 3])
    assert all(isinstance(value, Unscored) and "ConnectError" in value.reason for value in values[2:])
    assert "failed 5 times in a row" in caplog.text

    (tmp_path / "gate").unlink()
    server, again = started(tmp_path, port)
    with contextlib.ExitStack() as ending:
        ending.callback(server.wait)
        ending.callback(server.kill)
        assert again == port
        assert there(samples)[0] == expected
    assert "answers again" in caplog.text


def test_a_run_goes_on_while_its_server_is_killed_and_started_again(tmp_path, small_backbone, monkeypatch):
    """What was lost is masked and counted; the step without any number teaches nothing, and the next has all again."""
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    servers = [started(tmp_path, 0)]
    port, asked = servers[0][1], []
    inside = _There.__call__

    def ask(self, samples):
        asked.append(len(samples))
        if len(asked) == 3:  # the first evaluation and the first step had their numbers
            servers[0][0].kill()
            servers[0][0].wait()
        if len(asked) == 4:
            servers.append(started(tmp_path, port))
        return inside(self, samples)

    monkeypatch.setattr(_There, "__call__", ask)
    folder = tmp_path / "run"
    where = f"endpoints: {{urls: ['http://127.0.0.1:{port}'], tries: 2, request_timeout: {PATIENCE}}}"
    words = [
        *("train", "quickstart", "--quiet", f"policy.backbone.path={small_backbone}", f"run.dir={folder}"),
        *("run.threads=1", "run.wandb=disabled", "run.device=cpu", "run.max_unscored=1.0", "stages.main.steps=3"),
        *("stages.main.data.per_step=2", "stages.main.data.group=4", "stages.main.learner.batch=16"),
        *("stages.main.evaluate={every: 0, held_out: 8, ends: null}", "stages.main.rollout.steps=8"),
        f"stages.main.rewards={{composition: null, http: {{{where}}}}}",
        *("stages.main.expect=null",),
    ]
    try:
        assert cli.main(words) == 0
    finally:
        for server, _ in servers:
            server.kill()
            server.wait()
    rows = [row for row in Metrics.read(folder) if row["kind"] == "train"]
    assert [row["unscored"] for row in rows] == [0.0, 1.0, 0.0]
    assert rows[1]["grad_norm"] == 0.0, "nothing was learned from what nobody scored"
    assert rows[0]["grad_norm"] > 0
    assert rows[2]["grad_norm"] > 0
    assert len(servers) == 2
