"""What tests of tools share."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Served:
    """A search endpoint on this machine, and what it was asked."""

    url: str
    asked: list[tuple[str, str, Any]] = field(default_factory=list)  # path, authorization, JSON


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Served]]:
    """endpoint(status, answer): one that always answers this, an object as JSON."""
    servers: list[ThreadingHTTPServer] = []

    def make(status: int, answer: Any) -> Served:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["content-length"])))
                served.asked.append((self.path, self.headers.get("authorization", ""), content))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        served = Served(f"http://127.0.0.1:{server.server_port}/find")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return served

    yield make
    for one in servers:
        one.shutdown()
        one.server_close()
