"""A server that speaks vLLM's words and computes nothing, for tests of workers, their pool and their updates.

It answers a prompt of L tokens with the tokens (L, seed), so that an answer tells which request it belongs to.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rlkit.workers import transfer
from rlkit.workers.pool import Patience, Pool
from rlkit.workers.push import Nothing
from rlkit.workers.vllm_server import Server
from rlkit.workers.worker import Request

QUICK = Patience(pause=0.0, request=20.0, deadline=40.0)
WEIGHTS = {"one": torch.arange(4.0), "two": torch.ones(2, 3)}


class Fake:
    """A server with vLLM's routes. `script`: what becomes of the next requests to sample; () and it answers."""

    def __init__(self) -> None:
        self.label, self.longest, self.model = "default", 64, "policy"
        self.calls: list[tuple[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.adapters: list[str] = []
        self.script: list[Callable[[Any], Any]] = []
        self.failing: dict[str, tuple[int, str]] = {}  # path -> what it answers
        self.change: dict[str, Any] = {}  # of each choice
        self.end = threading.Event()
        self.line: transfer.Line | None = None
        self.received: dict[str, torch.Tensor] = {}
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(*fake.told(self.path, None))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "null")
                fake.headers.append(dict(self.headers))
                self.reply(*fake.told(self.path, body))

            def reply(self, status: int, answer: Any) -> None:
                text = answer if isinstance(answer, str) else json.dumps(answer)
                if status == 0:  # the connection breaks
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                return None

        class Http(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                return None

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.end.set()
        self.http.shutdown()
        self.http.server_close()

    def told(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.calls.append((path, body))
            samples = path in ("/inference/v1/generate", "/v1/completions")
            step = self.script.pop(0) if samples and self.script else None
        if path in self.failing:
            return self.failing[path]
        if step is not None and (outcome := step(body)) is not None:
            return outcome
        if path == "/inference/v1/generate":
            return 200, self.sampled(body)
        if path == "/v1/completions":
            ids = [len(body["prompt"]), body["seed"]]
            row = {"index": 0, "token_ids": ids, "logprobs": {"token_logprobs": [-0.5, -1.0]}, "finish_reason": "stop"}
            return 200, {"choices": [row | self.change]}
        return 200, self.control(path, body)

    def sampled(self, body: Any) -> Any:
        ids = [len(body["token_ids"]), body["sampling_params"]["seed"]]
        rows = [{"token_id": one, "logprob": value} for one, value in zip(ids, (-0.5, -1.0), strict=True)]
        spans = [{"version": self.label, "start": 0, "end": 2}]
        choice = {"token_ids": ids, "logprobs": {"content": rows}, "finish_reason": "stop", "weight_versions": spans}
        count = body["sampling_params"]["n"]
        return {"choices": [{"index": at} | choice | self.change for at in reversed(range(count))]}

    def control(self, path: str, body: Any) -> Any:
        if path == "/weight_info":
            return {"weight_version": self.label}
        if path == "/v1/models":
            return {"data": [{"id": one, "max_model_len": self.longest} for one in (self.model, *self.adapters)]}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/update_weight_version":
            self.label = body["new_version"]
        elif path == "/finish_weight_update":
            self.label = body["weight_version"]
        elif path == "/v1/load_lora_adapter":
            self.adapters.append(body["lora_name"])
        elif path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
        elif path == "/init_weight_transfer_engine":
            info = body["init_info"]
            self.line = transfer.dial(info["host"], info["port"], 1, info["world_size"], info["seconds"])
        elif path == "/update_weights" and "names" in body["update_info"]:
            assert self.line is not None
            self.received = dict(self.line.receive(transfer.read_description(**body["update_info"])))
        return {}

    def asked(self) -> list[Any]:
        return [body for path, body in self.calls if path in ("/inference/v1/generate", "/v1/completions")]

    def verbs(self) -> list[str]:
        """The routes that change it, in order; stamps with what they write."""
        stamp = "/update_weight_version"
        quiet = ("/weight_info", "/v1/models", "/get_world_size", "/inference/v1/generate")
        return [f"stamp {body['new_version']}" if p == stamp else p[1:] for p, body in self.calls if p not in quiet]


def status(code: int, text: str = "trouble") -> Callable[[Any], Any]:
    return lambda body: (code, {"error": {"message": text}})


@contextmanager
def fakes() -> Iterator[Callable[[], Fake]]:
    """fakes()() -> a new server; all are closed in the end."""
    made: list[Fake] = []

    def make() -> Fake:
        made.append(Fake())
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()


@contextmanager
def pools() -> Iterator[Callable[..., Pool]]:
    """pools()(server, ..., option=...) -> a pool of them, which has got a version unless that is None."""
    made: list[Pool] = []

    def make(*servers: Fake, patience: Patience = QUICK, version: int | None = 0, **options: Any) -> Pool:
        workers = [Server(one.url, **{"seconds": 10.0} | options).open() for one in servers]
        made.append(Pool(workers, patience))
        if version is not None:
            made[-1].push({}, version, Nothing())
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()


def requests(count: int) -> list[Request]:
    return [Request(tuple(range(1, 2 + row)), 4, seed=100 + row, ends=(9,)) for row in range(count)]


def complete(found: list[Any], count: int) -> None:
    """Every request has its own answer, once."""
    assert [one[0].ids for one in found] == [(row + 1, 100 + row) for row in range(count)]
