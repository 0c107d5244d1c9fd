"""Requests to endpoints: in order, bounded, tried again where that may help, and always with an answer or a reason."""

import asyncio
import email.utils
import gzip
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlkit import endpoints
from rlkit.endpoints import Clock, Endpoints, Failure, Reply, Request
from rlkit.errors import RewardError

PATIENCE = 10.0  # seconds after which a test that hangs fails


class Stub:
    """A server on this machine. `answer(number of the call, handler)` gives (status, headers, body) or None: hang."""

    def __init__(self, answer: Callable[[int, BaseHTTPRequestHandler], Any]) -> None:
        stub, self.calls, self.lock = self, [], threading.Lock()
        self.released, self.arrived = threading.Event(), threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and body in one packet: the second would wait for the first to be confirmed

            def do_POST(self) -> None:
                self.body = self.rfile.read(int(self.headers["content-length"]))
                with stub.lock:
                    stub.calls.append(self.body)
                    number = len(stub.calls)
                stub.arrived.set()
                said = answer(number, self)
                if said is None:
                    stub.released.wait(PATIENCE)
                    self.close_connection = True
                    return
                status, headers, body = said
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.headers["content-length"] = "0"
                self.do_POST()

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                pass  # a client that leaves is what some tests are about

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    """stub(answer) or stub(status, status, ...): the last is given from then on."""
    made: list[Stub] = []

    def make(*answers) -> Stub:
        def scripted(number: int, handler: BaseHTTPRequestHandler):
            said = answers[min(number, len(answers)) - 1]
            return (said, {}, b"what it says") if isinstance(said, int) else said

        made.append(Stub(answers[0] if callable(answers[0]) else scripted))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Time:
    """A clock that is turned by whoever sleeps."""

    def __init__(self) -> None:
        self.time, self.pauses = 1000.0, []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.time, self.sleep, lambda: 1.0)


@pytest.fixture
def pool_of() -> Iterator[Callable[..., endpoints.Pool]]:
    """pool_of(stubs or addresses, options): a pool whose pauses take no time."""
    made: list[endpoints.Pool] = []

    def make(*where, time: Time | None = None, **options) -> endpoints.Pool:
        urls = tuple(one if isinstance(one, str) else one.url for one in where)
        made.append(Endpoints(urls, **options).open((time or Time()).clock))
        return made[-1]

    yield make
    for one in made:
        one.close()


def echo(number, handler):
    return 200, {}, handler.body


def ask(pool, count=1):
    return pool.map([Request("/x", json=i) for i in range(count)])


def test_answers_come_in_the_order_of_the_requests(stub, pool_of):
    pool = pool_of(stub(echo), stub(echo), at_once=3)
    assert [one.json() for one in ask(pool, 40)] == list(range(40))
    assert pool.map([]) == []
    assert ask(pool, 2) == [Reply(200, b"0"), Reply(200, b"1")]


def test_bytes_travel_as_they_are(stub, pool_of):
    server = stub(lambda number, handler: (201, {}, handler.body + handler.headers["content-type"].encode()))
    (answer,) = pool_of(server).map([Request("/y", content=b"\x00\xff", content_type="a/b")])
    assert answer == Reply(201, b"\x00\xffa/b")


def test_as_many_at_once_as_allowed_and_no_more(stub, pool_of):
    meeting, lock, now, most = threading.Barrier(3, timeout=PATIENCE), threading.Lock(), [0], [0]

    def answer(number, handler):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        meeting.wait()  # nobody passes before three are here
        with lock:
            now[0] -= 1
        return 200, {}, b""

    assert ask(pool_of(stub(answer), at_once=3), 9) == [Reply(200, b"")] * 9
    assert most == [3]


def test_who_is_free_is_asked(stub, pool_of):
    slow = stub(lambda number, handler: (200, {}, b"slow") if fast_done.wait(PATIENCE) else (500, {}, b""))
    fast_done = threading.Event()

    def quick(number, handler):
        if number == 9:
            fast_done.set()  # so the slow one has had one of ten
        return 200, {}, b"fast"

    answers = ask(pool_of(slow, stub(quick), at_once=1), 10)
    assert sorted(one.body for one in answers) == [b"fast"] * 9 + [b"slow"]


# ---- trying again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_a_passing_trouble_is_tried_again(status, stub, pool_of):
    server = stub(status, status, 200)
    assert ask(pool_of(server)) == [Reply(200, b"what it says")]
    assert len(server.calls) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 501])
def test_a_lasting_trouble_is_not(status, stub, pool_of):
    server = stub(status)
    assert ask(pool_of(server)) == [Failure(f"{server.url}/x answered {status}: what it says")]
    assert len(server.calls) == 1


def test_tries_come_to_an_end(stub, pool_of):
    server = stub(503)
    (answer,) = ask(pool_of(server, tries=3))
    assert answer == Failure(f"{server.url}/x answered 503: what it says (3 tries)")
    assert len(server.calls) == 3


def test_an_error_inside_is_tried_once_more_and_elsewhere(stub, pool_of):
    bad, good, alone = stub(500), stub(200), stub(500)
    assert all(isinstance(one, Reply) for one in ask(pool_of(bad, good), 8))
    assert isinstance(ask(pool_of(alone))[0], Failure)
    assert len(alone.calls) == 1
    first, second = stub(500), stub(500)
    assert isinstance(ask(pool_of(first, second))[0], Failure)
    assert (len(first.calls), len(second.calls)) == (1, 1)


def test_a_connection_that_breaks_is_tried_again(stub, pool_of):
    server = stub((200, {"content-length": "100", "connection": "close"}, b"half"), 200)
    assert ask(pool_of(server)) == [Reply(200, b"what it says")]


def test_nobody_there():
    pool = Endpoints((f"http://127.0.0.1:{closed_port()}",), tries=2).open(Time().clock)
    (answer,) = ask(pool)
    assert "ConnectError" in answer.reason
    assert "(2 tries)" in answer.reason
    pool.close()


def closed_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_pauses_double_up_to_ten_seconds(stub, pool_of):
    time = Time()
    ask(pool_of(stub(429), time=time, tries=8))
    assert time.pauses == [0.5, 1, 2, 4, 8, 10, 10]


def test_pauses_are_spread(stub):
    time = Time()
    pool = Endpoints((stub(429).url,), tries=3).open(Clock(lambda: 0.0, time.sleep, lambda: 0.0))
    ask(pool)
    pool.close()
    assert time.pauses == [0.25, 0.5]  # half of the longest


def test_the_endpoint_may_ask_for_a_longer_pause(stub, pool_of):
    later = time.time() + 30.9
    answers = [(503, {"retry-after": "7"}, b""), (429, {"retry-after": email.utils.formatdate(later)}, b"")]
    time_ = Time()
    assert isinstance(ask(pool_of(stub(*answers, (429, {"retry-after": "soon"}, b""), 200), time=time_))[0], Reply)
    assert time_.pauses[0] == 7
    assert 20 < time_.pauses[1] <= 31
    assert time_.pauses[2] == 2  # what cannot be read asks for nothing


@pytest.mark.parametrize("asked", ["121", "9" * 400])
def test_nobody_waits_beyond_the_deadline(asked, stub, pool_of):
    server, time = stub((503, {"retry-after": asked}, b"")), Time()
    (answer,) = ask(pool_of(server, time=time))
    assert "would be after the deadline" in answer.reason
    assert (len(server.calls), time.pauses) == (1, [])


def hang(number, handler):
    return None


def drip(number, handler):
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b"a")
    handler.wfile.flush()


@pytest.mark.parametrize("answer", [hang, drip])
def test_a_try_takes_so_long_and_no_longer(answer, stub, pool_of):
    server = stub(answer)
    (found,) = ask(pool_of(server, request_timeout=0.5, tries=2))
    assert found == Failure(f"{server.url} did not answer within 0.5 s (2 tries)")
    assert len(server.calls) == 2


def test_all_together_take_so_long_and_no_longer(stub, pool_of):
    server = stub(hang)
    answers = ask(pool_of(server, deadline=1.0, at_once=2), 50)
    assert answers == [Failure("no answer within the deadline of 1 s")] * 50
    assert len(server.calls) == 2  # the others were not even begun


# ---- an endpoint that fails ------------------------------------------------------------------------------------------


def test_an_endpoint_that_fails_five_times_is_left_alone_and_tried_again_later(stub, pool_of):
    works = threading.Event()
    server = stub(lambda number, handler: (200 if works.is_set() else 502, {}, b""))
    time = Time()
    pool = pool_of(server, time=time, tries=1)
    for _ in range(8):
        assert isinstance(ask(pool)[0], Failure)
    assert len(server.calls) == 5
    assert ask(pool)[0].reason.startswith("left alone after 5 failures in a row: ")

    time.time += 5.1
    answers = ask(pool, 6)  # one finds out for all
    assert len(server.calls) == 6
    assert all(isinstance(one, Failure) for one in answers)
    assert len(ask(pool, 3)) == 3
    assert len(server.calls) == 6

    works.set()
    time.time += 5.1
    assert ask(pool, 6) == [Reply(200, b"")] * 6
    assert len(server.calls) == 12
    works.clear()
    assert isinstance(ask(pool)[0], Failure)
    works.set()
    assert isinstance(ask(pool)[0], Reply)  # one failure after that is one, and not the sixth


def test_the_others_go_on(stub, pool_of):
    bad, good = stub(502), stub(200)
    assert all(isinstance(one, Reply) for one in ask(pool_of(bad, good, at_once=1), 40))
    assert len(bad.calls) < 10


@pytest.mark.parametrize("said", [429, (503, {"retry-after": "1"}, b""), 400, 404])
def test_one_that_is_busy_or_says_no_works(said, stub, pool_of):
    server = stub(said)
    ask(pool_of(server, tries=1), 12)
    assert len(server.calls) == 12


# ---- what must not happen --------------------------------------------------------------------------------------------


def test_the_token_is_sent_and_stays_secret(stub, pool_of, monkeypatch, caplog):
    monkeypatch.setenv("MY_TOKEN", " s3cret-word\n")
    caplog.set_level("DEBUG", "rlkit")
    server = stub(lambda number, handler: (400, {}, handler.headers["authorization"].encode()))
    pool = pool_of(server, key_env="MY_TOKEN")
    (answer,) = ask(pool)
    assert answer.reason.endswith("answered 400: Bearer ***")
    told = repr(pool) + repr(Endpoints((server.url,), key_env="MY_TOKEN")) + caplog.text
    assert "s3cret" not in told


def test_no_token_unless_it_is_named(stub, pool_of):
    server = stub(lambda number, handler: (200, {}, str(handler.headers["authorization"]).encode()))
    assert ask(pool_of(server)) == [Reply(200, b"None")]


@pytest.mark.parametrize("held", [None, "", "  ", "two words", "line\nbreak", "gänse"])
def test_a_token_that_is_not_there_is_said_at_once(held, monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if held is not None:
        monkeypatch.setenv("MY_TOKEN", held)
    with pytest.raises(RewardError, match="MY_TOKEN") as caught:
        Endpoints(("http://127.0.0.1:1",), key_env="MY_TOKEN").open()
    assert not held or not held.strip() or held not in str(caught.value)


def test_redirects_are_not_followed(stub, pool_of):
    elsewhere = stub(200)
    (answer,) = ask(pool_of(stub((307, {"location": elsewhere.url + "/x"}, b""))))
    assert answer.reason.endswith("answered 307; redirects are not followed")
    assert not elsewhere.calls


def test_proxy_variables_are_not_read(stub, pool_of, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    assert ask(pool_of(stub(200))) == [Reply(200, b"what it says")]


@pytest.mark.parametrize("headers", [{}, {"content-length": "", "connection": "close"}], ids=["declared", "not"])
def test_a_huge_answer_is_refused(headers, stub, pool_of, monkeypatch):
    monkeypatch.setattr(endpoints, "LARGEST_REPLY", 1 << 20)
    fits, huge = stub((200, headers, bytes(1 << 20))), stub((200, headers, bytes((1 << 20) + 1)))
    assert len(ask(pool_of(fits))[0].body) == 1 << 20
    assert ask(pool_of(huge)) == [Failure(f"{huge.url}/x answered more than 1 MiB")]
    assert len(huge.calls) == 1


def test_a_packed_answer_is_refused(stub, pool_of):
    server = stub((200, {"content-encoding": "gzip"}, gzip.compress(bytes(1 << 20))))
    assert "content-encoding" in ask(pool_of(server))[0].reason


def test_a_request_that_cannot_be_written_fails_alone(stub, pool_of):
    pool = pool_of(stub(echo))
    bad, good = pool.map([Request("/x", json=math.nan), Request("/x", json={"a": "\ud800"})])
    assert "JSON compliant" in bad.reason
    assert good.json() == {"a": "\ud800"}
    with pytest.raises(ValueError, match="not both"):
        Request("/x", json=1, content=b"1")


@pytest.mark.parametrize("body", [b"NaN", b'{"a": Infinity}', b"{", b"\xff", b"[" * 200_000, b""])
def test_an_answer_is_json_or_an_error(body):
    with pytest.raises(ValueError):  # noqa: PT011  (of several kinds)
        Reply(200, body).json()


# ---- asked from anywhere ---------------------------------------------------------------------------------------------


def test_from_within_an_event_loop_and_from_threads(stub, pool_of):
    pool = pool_of(stub(echo))

    async def inside():
        return ask(pool, 3)

    assert len(asyncio.run(inside())) == 3
    assert len(asyncio.run(inside())) == 3  # another loop
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: pool.map([Request("/x", json=[i, j]) for j in range(5)]), range(8)))
    assert [[one.json() for one in row] for row in found] == [[[i, j] for j in range(5)] for i in range(8)]


def test_closing_ends_what_is_under_way(stub, pool_of):
    server = stub(hang)
    pool = pool_of(server)
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(ask, pool, 3)
        assert server.arrived.wait(PATIENCE)
        pool.close()
        assert answers.result(PATIENCE) == [Failure("the endpoints were closed before they answered")] * 3
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        ask(pool)
    pool_of(server).close()  # never asked


FORK = """
import os, sys, json
from rlkit.endpoints import Endpoints, Request
assert "httpx" not in sys.modules and "torch" not in sys.modules
pool = Endpoints((sys.argv[1],)).open()
assert pool.map([Request("/x", json=1)])[0].json() == 1
child = os.fork()
if not child:
    os._exit(0 if pool.map([Request("/x", json=2)])[0].json() == 2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert pool.map([Request("/x", json=3)])[0].json() == 3
pool.close()
"""


def test_a_forked_process_asks_for_itself(stub):
    command = [sys.executable, "-W", "ignore", "-c", FORK, stub(echo).url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- get, and the options --------------------------------------------------------------------------------------------


def test_get_gives_json_of_the_first_that_answers(stub, pool_of):
    answer = stub((200, {}, json.dumps({"a": [1]}).encode()))
    dead = f"http://127.0.0.1:{closed_port()}"
    assert pool_of(dead, answer).get("/v1") == {"a": [1]}


@pytest.mark.parametrize(("said", "why"), [(404, "answered 404"), ((200, {}, b"<html>"), "no JSON")])
def test_get_that_fails_says_where(said, why, stub, pool_of):
    server = stub(said)
    with pytest.raises(RewardError, match=why) as caught:
        pool_of(server, tries=1).get("/v1/models")
    assert server.url in str(caught.value)
    assert "/v1/models" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": ()}, "one or more"),
        ({"urls": "http://a"}, "no address"),
        ({"urls": ("127.0.0.1:80",)}, "no address"),
        ({"urls": ("ftp://a",)}, "no address"),
        ({"urls": ("http://a?x=1",)}, "no address"),
        ({"urls": ("http://user:word@a",)}, "key_env"),
        ({"urls": ("http://a", "http://a")}, "twice"),
        ({"at_once": 0}, "at_once"),
        ({"tries": 0}, "tries"),
        ({"deadline": 0.0}, "deadline"),
        ({"request_timeout": math.inf}, "request_timeout"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoints(**{"urls": ("http://127.0.0.1:1",), **options})
    assert "word@" not in str(caught.value)
