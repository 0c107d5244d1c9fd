"""vLLM's own OpenAI server in a process group of its own, for tests: started, waited for, killed, stopped.

It runs on a CPU as well as it can on a small machine: one thread, 1 GB for keys and values, no compiling. Nothing is
looked for outside this machine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

READY_WITHIN = 600  # seconds; it takes about 60 where nothing else runs
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # the sampler's kernels would be compiled at the first request
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"),
    # A prompt whose reading is split over two steps ends the engine if the request has a seed: vLLM turns a generator
    # back, which torch cannot do on a CPU ("CPU Generator does not use offset").
    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),
)


@dataclass(frozen=True)
class Server:
    """One that answers."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def running(self) -> int:
        """Requests that the engine works at."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{")))

    def kill_worker(self) -> None:
        """End the process that holds the model, as one that ran out of memory is ended. The server follows it.

        Not the engine above it: that one would leave 160 MB of shared memory behind.
        """
        workers = [pid for pid in _descendants(self.process.pid) if b"VLLM::Worker" in _command(pid)]
        assert workers, f"no worker among the descendants of {self.process.pid}"
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


@contextmanager
def vllm_server(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Serve the model of this folder until the block ends. folder: for its log and its caches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "vllm.log"
    # `vllm serve` asks for the version of the distribution vllm, which is called vllm-cpu here.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), *OPTIONS, *options]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / "cache")}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    finally:
        _stop(process)


def _wait(server: Server) -> None:
    for _ in range(READY_WITHIN):
        with suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=10).status_code == 200:
                return
        with suppress(subprocess.TimeoutExpired):
            server.process.wait(1)
            break
    end = server.log.read_text(errors="replace")[-6000:]
    raise RuntimeError(f"vLLM gave no server (exit status {server.process.poll()}). The end of its log:\n{end}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Politely first, so that it removes its shared memory; then whatever is left of its group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    children = [int(one) for task in Path(f"/proc/{pid}/task").glob("*/children") for one in _read(task).split()]
    return [*children, *(one for child in children for one in _descendants(child))]


def _command(pid: int) -> bytes:
    return _read(Path(f"/proc/{pid}/cmdline"))


def _read(path: Path) -> bytes:
    with suppress(OSError):  # it has ended meanwhile
        return path.read_bytes()
    return b""
