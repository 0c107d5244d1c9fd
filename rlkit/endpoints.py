"""Many requests to one or several HTTP endpoints at once, with an end to every wait.

Each request goes to the endpoint with the fewest under way. What may pass is tried again, a few times, after growing
pauses: a connection that fails or breaks, a try that took too long, and the statuses 408, 429, 502, 503 and 504; a 500
only once, and only elsewhere. So requests must be safe to repeat. An endpoint that failed five times in a row is
left alone for a while, then tried with one request. Whatever goes wrong, a request has an answer: a `Reply`, or a
`Failure` that says why there is none.

Not here: what is asked, and what an answer means. Redirects are not followed and proxy variables are not read, so that
the token goes nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlkit.errors import RewardError

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

LARGEST_REPLY = 64 << 20  # bytes
AGAIN = (408, 429, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before the second try, and at most before any
FAILURES, REST = 5, 5.0  # so many in a row, and an endpoint is left alone for so many seconds


@dataclass(frozen=True)
class Request:
    """A POST of JSON, or of bytes."""

    path: str  # behind the endpoint's URL, with its slash
    json: Any = None
    content: bytes | None = None
    content_type: str = "application/json"

    def __post_init__(self) -> None:
        if self.json is not None and self.content is not None:
            raise ValueError("a request has json or content, not both")

    @property
    def body(self) -> bytes:
        return json.dumps(self.json, allow_nan=False).encode() if self.content is None else self.content


@dataclass(frozen=True)
class Reply:
    """An answer with a status of 200 to 299."""

    status: int
    body: bytes

    def json(self) -> Any:
        """ValueError if it is no JSON; NaN and Infinity are none."""
        try:
            return json.loads(self.body, parse_constant=_refuse)
        except RecursionError as error:
            raise ValueError("JSON that is nested too deeply") from error


@dataclass(frozen=True)
class Failure:
    """There is no answer, and why."""

    reason: str


@dataclass(frozen=True)
class Clock:
    """What pauses are made of, so that a test need not wait for them."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.SystemRandom().random  # 0..1; spreads tries in time, and changes no result


@dataclass(frozen=True)
class Endpoints:
    """Where to ask, and how patiently. The token is in the environment: neither a recipe nor a log ever holds it."""

    urls: tuple[str, ...]  # any of them may answer any request
    key_env: str | None = None  # the environment variable that holds the bearer token; null: none is sent
    at_once: int = 32  # requests under way at each endpoint
    tries: int = 4  # of one request
    deadline: float = 120.0  # seconds for all requests of one call together
    request_timeout: float = 60.0  # seconds for one try

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("urls must be a list of one or more addresses such as http://127.0.0.1:8000")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"{url!r} is no address like http://127.0.0.1:8000 or https://host/path")
            if parts.username is not None or parts.password is not None:
                raise ValueError("an address must not hold a password: name a variable with the token in key_env")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("urls has the same address twice")
        if self.at_once < 1 or self.tries < 1:
            raise ValueError("at_once and tries must be 1 or more")
        if not all(0 < seconds < math.inf for seconds in (self.deadline, self.request_timeout)):
            raise ValueError("deadline and request_timeout must be seconds above 0")

    def open(self, clock: Clock | None = None) -> Pool:
        """Ready to be asked. Nothing is connected before the first request."""
        return Pool(self, _token(self.key_env), clock or Clock())


class Pool:
    """Connections to some endpoints, kept by a thread of its own. Any thread may ask, also one with an event loop."""

    def __init__(self, options: Endpoints, token: str, clock: Clock) -> None:
        import httpx  # a missing one is found now, and not in the middle of a step

        self._httpx, self._options, self._token, self._clock = httpx, options, token, clock
        self._lock = threading.Lock()
        self._caller: _Caller | None = None
        self._process = 0  # that the caller was started in: threads do not survive a fork
        self._closed = False

    def map(self, requests: Sequence[Request]) -> list[Reply | Failure]:
        """The answers, in order. No request raises; a pool that is closed meanwhile fails what is under way."""
        calls = [_Call("POST", one.path, one) for one in requests]
        return self._run(calls) if calls else []

    def get(self, path: str) -> Any:
        """The JSON that the first endpoint to answer gives. RewardError if none does."""
        (answer,) = self._run([_Call("GET", path)])
        where = ", ".join(self._options.urls)
        if isinstance(answer, Failure):
            hint = "Is the server running, and is the address right?"
            raise RewardError(f"GET {path} failed: {answer.reason}", where=where, hint=hint)
        try:
            return answer.json()
        except ValueError as error:
            raise RewardError(f"GET {path} gave no JSON", where=where, hint="Is the address right?") from error

    def close(self) -> None:
        with self._lock:
            self._closed = True
            caller, self._caller = self._caller, None
        if caller is not None and self._process == os.getpid():
            caller.stop()

    def _run(self, calls: Sequence[_Call]) -> list[Reply | Failure]:
        with self._lock:
            if self._closed:
                raise RuntimeError("these endpoints are closed")
            if self._caller is None or self._process != os.getpid():
                self._caller = _Caller(self._httpx, self._options, self._token, self._clock)
                self._process = os.getpid()
            future = asyncio.run_coroutine_threadsafe(self._caller.answer_all(calls), self._caller.loop)
        try:
            return future.result()
        except CancelledError:
            return [Failure("the endpoints were closed before they answered")] * len(calls)
        except BaseException:  # Ctrl+C: nobody waits for the answers any more
            future.cancel()
            raise


@dataclass(frozen=True)
class _Call:
    method: str
    path: str
    request: Request | None = None  # its body is written when it is sent: all at once would fill the memory


@dataclass(frozen=True)
class _Retry:
    """A try that failed, and may be repeated."""

    reason: str
    after: float = 0.0  # seconds that the endpoint asked for
    elsewhere: bool = False  # once, and at another endpoint


@dataclass(eq=False)
class _Place:
    """One endpoint: what is under way there, and its circuit breaker."""

    url: str
    slots: asyncio.Semaphore
    outstanding: int = 0
    failures: int = 0  # in a row
    trouble: str = ""  # the last of them
    rests_until: float | None = None
    probe: asyncio.Future[None] | None = field(default=None, repr=False)  # the one request that tries it again

    def open_at(self, now: float) -> bool:
        return self.rests_until is None or (now >= self.rests_until and self.probe is None)

    def ended(self, fine: bool | None, trouble: str, now: float) -> None:
        """Count a try. None: it was broken off, which says nothing about the endpoint."""
        if fine:
            if self.rests_until is not None:
                log.info("%s answers again", self.url)
            self.failures, self.rests_until = 0, None
        elif fine is False:
            self.failures, self.trouble = self.failures + 1, trouble
            if self.failures >= FAILURES:
                if self.rests_until is None:
                    log.warning("%s failed %d times in a row: left alone for %g s", self.url, self.failures, REST)
                self.rests_until = now + REST


class _Caller:
    """What runs in the pool's thread: an event loop, a client, and the endpoints."""

    def __init__(self, module: Any, options: Endpoints, token: str, clock: Clock) -> None:
        self.options, self.clock, self.token, self.httpx = options, clock, token, module
        self.loop = asyncio.new_event_loop()
        self.places = [_Place(url.rstrip("/"), asyncio.Semaphore(options.at_once)) for url in options.urls]
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})
        connections = module.Limits(max_connections=None, max_keepalive_connections=options.at_once * len(self.places))
        encrypted = any(url.startswith("https") for url in options.urls)  # else certificates need not be loaded
        self.client: httpx.AsyncClient = module.AsyncClient(
            headers=headers, timeout=options.request_timeout, limits=connections, trust_env=False, verify=encrypted
        )
        self.thread = threading.Thread(target=self.loop.run_forever, name="rlkit-endpoints", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self.client.aclose()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def answer_all(self, calls: Sequence[_Call]) -> list[Reply | Failure]:
        until = self.loop.time() + self.options.deadline
        answers: list[Reply | Failure] = [Failure("it was never asked")] * len(calls)
        waiting = iter(enumerate(calls))  # one for all workers: who is free takes the next

        async def work() -> None:
            for row, call in waiting:
                answers[row] = await self.answer(call, until)

        workers = min(len(calls), self.options.at_once * len(self.places))
        await asyncio.gather(*(work() for _ in range(workers)))
        return answers

    async def answer(self, call: _Call, until: float) -> Reply | Failure:
        late = Failure(f"no answer within the deadline of {self.options.deadline:g} s")
        if self.loop.time() >= until:
            return late
        try:
            content = None if call.request is None else call.request.body
            async with asyncio.timeout_at(until):
                answer = await self.persist(call, content, until)
        except TimeoutError:
            return late
        except Exception as error:  # of one request, for instance an address or a body that cannot be written
            answer = Failure(f"{type(error).__name__}: {error}")
        return Failure(self.without_token(answer.reason)) if isinstance(answer, Failure) else answer

    async def persist(self, call: _Call, content: bytes | None, until: float) -> Reply | Failure:
        """Try, and try again."""
        last, moved, outcome = None, False, _Retry("")
        for attempt in range(self.options.tries):
            place = await self.place(last)
            if place is None:
                outcome = _Retry(f"left alone after {FAILURES} failures in a row: {self.places[0].trouble}")
            else:
                answer = await self.ask(place, call, content)
                if not isinstance(answer, _Retry):
                    return answer
                last, outcome = place, answer
            if attempt + 1 == self.options.tries or (outcome.elsewhere and (moved or len(self.places) == 1)):
                break
            moved = moved or outcome.elsewhere
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * (1 + self.clock.jitter()) / 2
            pause = max(pause, outcome.after)
            if self.loop.time() + pause >= until:
                return Failure(f"{outcome.reason}; another try in {pause:.3g} s would be after the deadline")
            await self.clock.sleep(pause)
        return Failure(f"{outcome.reason} ({attempt + 1} {'try' if attempt == 0 else 'tries'})")

    async def place(self, last: _Place | None) -> _Place | None:
        """The endpoint with the fewest requests under way, another than the last where there is one; None: all rest."""
        while True:
            now = self.clock.now()
            free = [one for one in self.places if one.open_at(now)]
            if free:
                return min(free, key=lambda one: (one is last, one.outstanding))
            probes = [one.probe for one in self.places if one.probe is not None]
            if not probes:
                return None
            await asyncio.wait(probes, return_when=asyncio.FIRST_COMPLETED)

    async def ask(self, place: _Place, call: _Call, content: bytes | None) -> Reply | Failure | _Retry:
        """One try at one endpoint."""
        probe = self.loop.create_future() if place.rests_until is not None else None
        place.probe = probe or place.probe
        place.outstanding += 1
        fine: bool | None = None
        answer: Reply | Failure | _Retry = _Retry("it was broken off")
        try:
            async with place.slots, asyncio.timeout(self.options.request_timeout):
                answer, fine = await self.send(place.url + call.path, call, content)
        except TimeoutError:
            fine = False
            answer = _Retry(f"{place.url} did not answer within {self.options.request_timeout:g} s")
        except self.httpx.TransportError as error:
            fine = False
            answer = _Retry(f"{place.url}: {type(error).__name__}: {error}".rstrip(": "))
        finally:
            place.outstanding -= 1
            place.ended(fine, answer.reason if isinstance(answer, _Retry) else "", self.clock.now())
            if probe is not None:
                probe.set_result(None)
                place.probe = None
        return answer

    async def send(self, url: str, call: _Call, content: bytes | None) -> tuple[Reply | Failure | _Retry, bool]:
        """(what came back, whether the endpoint works)."""
        headers = {} if call.request is None else {"content-type": call.request.content_type}
        async with self.client.stream(call.method, url, content=content, headers=headers) as response:
            too_large = Failure(f"{url} answered more than {LARGEST_REPLY >> 20} MiB")
            body = bytearray()
            if int(response.headers.get("content-length", 0)) > LARGEST_REPLY:
                return too_large, True
            async for piece in response.aiter_raw():  # not unpacked: a few bytes may become any number
                body += piece
                if len(body) > LARGEST_REPLY:
                    return too_large, True
        status = response.status_code
        if response.headers.get("content-encoding", "identity") != "identity":
            return Failure(f"{url} answered with a content-encoding that was not asked for"), True
        if 200 <= status < 300:
            return Reply(status, bytes(body)), True
        reason = f"{url} answered {status}{_excerpt(body)}"
        if status in AGAIN or status == 500:
            after = _asked_pause(response.headers)
            busy = status == 429 or (status == 503 and after is not None)  # it works, and has too much to do
            return _Retry(reason, after or 0.0, elsewhere=status == 500), busy
        return Failure(reason + ("; redirects are not followed" if 300 <= status < 400 else "")), True

    def without_token(self, text: str) -> str:
        return text.replace(self.token, "***") if self.token else text


def _token(variable: str | None) -> str:
    if variable is None:
        return ""
    token = os.environ.get(variable, "").strip()
    hint = f"Run: export {variable}=..., or take key_env out."
    if not token:
        raise RewardError(f"the environment has no {variable}, which key_env names", where="endpoints", hint=hint)
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise RewardError(f"what {variable} holds is no token", where="endpoints", hint=hint)
    return token


def _asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _excerpt(body: bytes | bytearray) -> str:
    """The beginning of an error's text, in one line."""
    text = " ".join(bytes(body[:400]).decode(errors="replace").split())
    return f": {text[:200]}" if text else ""


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


__all__ = ["Clock", "Endpoints", "Failure", "Pool", "Reply", "Request"]
