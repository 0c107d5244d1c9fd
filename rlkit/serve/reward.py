"""`rlkit serve-reward`: one reward behind HTTP, for runs on this or other machines that name `http` in their recipe.

`GET /v1/health`, `GET /v1/rewards` (what is served), `POST /v1/score` (rlkit.wire) and `GET /metrics` (Prometheus).
What cannot be scored is answered with a reason, sample by sample; an exception goes to the log under a number and never
into an answer. The scoring itself is in reward_worker.py. Encryption is a proxy's work.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import logging
import math
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.errors import PluginError, RecipeError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from rlkit.serve.reward_worker import Card, Worker
    from rlkit.wire import Question, Result

log = logging.getLogger(__name__)

TOKEN = "RLKIT_REWARD_TOKEN"
WAITING = 64  # requests taken in at a time; the next is told to come back
DEADLINE = 120.0  # seconds for one request, its way in included


# ---- the command -----------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the reward, as a recipe would name it")
    parser.add_argument("words", nargs="*", metavar="key=value", help="its options")
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1; one that others reach needs a token)")
    parser.add_argument("--port", type=int, default=8765, metavar="N", help="0 for any that is free (default: 8765)")
    token = f"a file that holds the token that clients must send (default: what {TOKEN} holds)"
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=token)
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="samples a call (default: 64)")


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop; 0 once what had been taken in is answered."""
    if options.max_batch < 1:
        raise RecipeError(f"must be 1 or more, not {options.max_batch}.", where="--max-batch")
    if not 0 <= options.port < 1 << 16:
        raise RecipeError(f"must be 0 to 65535, not {options.port}.", where="--port")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    token, given = _token(options.token_file), _options(options.words)
    serve(options.name, given, options.host, options.port, token, options.device, options.max_batch)
    return 0


def _options(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words with YAML values; a dotted key is an option of an option."""
    from omegaconf import OmegaConf

    for word in words:
        if "=" not in word:
            raise RecipeError(f"must be key=value, not {word!r}.", where="serve-reward")
    options = OmegaConf.to_container(OmegaConf.from_dotlist(list(words)), resolve=False)
    assert isinstance(options, dict)
    return {str(key): value for key, value in options.items()}


def _token(file: Path | None) -> str:
    """Of the file, else of the environment; "" if neither is there."""
    where, text = f"the environment's {TOKEN}", os.environ.get(TOKEN, "")
    if file is not None:
        where = str(file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file} cannot be read: {error}.", where="--token-file") from error
    token = text.strip()
    if (file is not None and not token) or not (token.isascii() and token.isprintable()) or " " in token:
        hint = "Write one long random word of ASCII letters and digits."
        raise RecipeError(f"{where} holds no token.", where="--token-file", hint=hint)
    return token


def serve(
    name: str,
    options: Mapping[str, Any],
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str = "",
    device: str | None = None,
    max_batch: int = 64,
) -> None:
    """Load the reward, print the address, and answer until SIGTERM or Ctrl+C. To be called in the main thread."""
    if not token and not _loopback(host):
        hint = f"Give --token-file, or set {TOKEN}; or take the default host, which only this machine reaches."
        raise RecipeError(f"{host} is open to other machines, and there is no token.", where="--host", hint=hint)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        hint = "Run: pip install 'rlkit-visual[serve]'"
        raise PluginError(f"serving a reward needs {error.name!r}, which is not installed.", hint=hint) from error
    from rlkit.serve.reward_worker import Worker

    try:  # before the reward is loaded, which may take minutes: clients wait meanwhile
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RecipeError(f"cannot listen at {host}:{port}: {error.strerror}.", where="--port") from error
    with listener, Worker(name, options, device, max_batch) as worker:
        drain = math.ceil(DEADLINE)  # seconds
        config = uvicorn.Config(
            app(worker, token),
            timeout_graceful_shutdown=drain,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
        )
        # uvicorn catches these, answers what it has, and repeats them for the handlers before it: that is to be ignored
        before = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {name} at http://{shown}:{listener.getsockname()[1]}", flush=True)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            for one, how in before.items():
                signal.signal(one, how)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- HTTP ------------------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """A request that is not scored: what its sender is told."""

    def __init__(self, status: int, what: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(what)
        self.status, self.what, self.headers = status, what, headers


class Metrics:
    """What Prometheus reads. Kept by the server and not by the process, so that two servers do not mix."""

    def __init__(self, worker: Worker) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        own = CollectorRegistry()
        self.registry, self.taken = own, 0  # requests that are taken in and not yet answered
        self.requests = Counter("rlkit_reward_requests", "Requests to score, by status", ["status"], registry=own)
        self.scored = Counter("rlkit_reward_samples", "Samples that were scored", registry=own)
        self.unscored = Counter("rlkit_reward_unscored", "Samples that were not, by why", ["status"], registry=own)
        self.seconds = Histogram("rlkit_reward_seconds", "From a request's arrival to its answer", registry=own)
        taken = Gauge("rlkit_reward_taken", "Requests taken in and not yet answered", registry=own)
        taken.set_function(lambda: self.taken)
        waiting = Gauge("rlkit_reward_queue", "Requests that wait for the reward", registry=own)
        waiting.set_function(worker.jobs.qsize)

    def count(self, results: Sequence[Result]) -> None:
        for one in results:
            (self.unscored.labels(one.status) if one.value is None else self.scored).inc()


def app(worker: Worker, token: str = "", deadline: float = DEADLINE, waiting: int = WAITING) -> Starlette:
    """The server as an ASGI application."""
    from prometheus_client import generate_latest
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from rlkit import wire

    metrics = Metrics(worker)
    decoders = ThreadPoolExecutor(2, "rlkit-decode")  # pictures are large, and the event loop must not wait

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refusal(401, "the token is missing or wrong", {"www-authenticate": "Bearer"})

    async def health(request: Request) -> Response:  # without a token: it says nothing but that
        return JSONResponse({"status": "ok"})

    async def rewards(request: Request) -> Response:
        check_token(request)
        return JSONResponse({"protocol": wire.PROTOCOL, "rewards": [asdict(worker.card)]})

    async def numbers(request: Request) -> Response:
        check_token(request)
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    async def score(request: Request) -> Response:
        status, metrics.taken = 500, metrics.taken + 1
        try:
            check_token(request)
            if metrics.taken > waiting:
                raise Refusal(503, "too many requests are waiting", {"retry-after": "1"})
            with metrics.seconds.time():
                answer = await scored(request)
            status = 200
        except Refusal as refusal:
            status = refusal.status
            raise
        finally:
            metrics.taken -= 1
            metrics.requests.labels(str(status)).inc()
        return Response(answer, media_type=wire.CONTENT_TYPE)

    async def scored(request: Request) -> bytes:
        loop = asyncio.get_running_loop()
        until = loop.time() + deadline
        try:
            async with asyncio.timeout_at(until):
                body = await _body(request)
                question = await loop.run_in_executor(decoders, wire.decode_request, body)
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {deadline:g} s") from None
        except wire.WireError as error:
            raise Refusal(400, str(error)) from error
        _check_question(question, worker.card)
        answer = asyncio.wrap_future(worker.put(question.samples, question.id))
        try:
            async with asyncio.timeout_at(until):
                results = await answer
        except TimeoutError:  # the future is cancelled: a request that is not begun never will be
            reason = f"no score within the server's {deadline:g} s"
            ids = question.samples.sample_id.tolist()
            results = [wire.Result(id, None, status="timeout", reason=reason) for id in ids]
        metrics.count(results)
        return wire.encode_reply(question.id, results)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return JSONResponse({"error": error.what}, error.status, dict(error.headers or {}))

    async def broken(request: Request, error: Exception) -> Response:
        number = os.urandom(4).hex()
        log.error("error %s", number, exc_info=error)
        return JSONResponse({"error": f"the server failed; its log has it under {number}"}, 500)

    routes = [
        Route("/v1/health", health),
        Route("/v1/rewards", rewards),
        Route("/v1/score", score, methods=["POST"]),
        Route("/metrics", numbers),
    ]
    return Starlette(routes=routes, exception_handlers={Refusal: refused, Exception: broken})


def _check_question(question: Question, card: Card) -> None:
    if question.reward not in (None, card.name):
        raise Refusal(404, f"no reward {question.reward[:100]!r} here; there is {card.name!r}")
    if question.config not in ("", card.config):
        raise Refusal(409, f"{card.name} is now served with other options, or in another version")


async def _body(request: Request) -> bytes:
    """The request's body, as far as its size is allowed; what is declared is not believed, but may condemn."""
    from starlette.requests import ClientDisconnect

    from rlkit.wire import CONTENT_TYPE, LARGEST_BODY

    if request.headers.get("content-type") != CONTENT_TYPE:  # also: no web page can send it unasked to a local server
        raise Refusal(415, f"the content-type must be {CONTENT_TYPE}")
    declared = request.headers.get("content-length", "0")
    headers = {"connection": "close"}  # else the rest would be read, and thrown away
    too_large = Refusal(413, f"a request has at most {LARGEST_BODY} bytes", headers)
    if declared.isdecimal() and int(declared) > LARGEST_BODY:
        raise too_large
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > LARGEST_BODY:
                raise too_large
    except ClientDisconnect:
        raise Refusal(400, "the request was broken off") from None
    return bytes(body)
