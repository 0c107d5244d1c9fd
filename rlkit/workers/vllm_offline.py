"""vLLM in the learner's own process: nothing to start, and every request of a step in one batch.

Token ids go in and token ids come out. Pictures go along as pictures; vLLM spreads each over as many tokens as its
network reads, and a prompt that then is not the learner's own is refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlkit.errors import RecipeError
from rlkit.pictures import to_pil
from rlkit.workers.serving import Engine
from rlkit.workers.vllm_answers import adapter_name, answered, otherwise_spread, sampling, spans_of, too_long
from rlkit.workers.worker import Answer, Fault, Request, WorkerError

T = TypeVar("T")


@dataclass(frozen=True)
class Offline:
    """For one learner process: vLLM makes torch's default process group its own."""

    folder: Path
    engine: Engine = field(default_factory=Engine)

    def open(self, name: str = "offline") -> OfflineWorker:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            hint = "Start servers (rlkit serve-rollout), and name their addresses."
            raise RecipeError("vLLM inside of one of several learner processes", where="rollout", hint=hint)
        if not (self.folder / "config.json").is_file():
            raise WorkerError(f"{self.folder} holds no network: there is no config.json", where="folder")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it says much, several times a step
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **self.engine.environment()}  # before vllm is imported
        from vllm import LLM

        from rlkit.workers.vllm_plugin import register

        register()
        given = self.engine.arguments()
        if self.engine.receive != "none":
            from vllm.config import WeightTransferConfig

            given["weight_transfer_config"] = WeightTransferConfig(self.engine.receive)
        # A thread begins with OpenMP's number of threads, and takes over torch's with the first operation that asks.
        # vLLM's attention dies where the number changes between its two halves, so this thread asks before all else.
        thread = ThreadPoolExecutor(1, "rlkit-vllm", initializer=torch.get_num_threads)
        made = thread.submit(LLM, str(self.folder), seed=0, distributed_executor_backend="uni", **given)
        try:
            return OfflineWorker(name, made.result(), thread)
        except BaseException:
            thread.shutdown(wait=False)
            raise


class OfflineWorker:
    """A call at a time, all in the thread that made the engine; a push waits for the call that is under way."""

    at_once, batch = 1, 1 << 20

    def __init__(self, name: str, network: Any, thread: ThreadPoolExecutor) -> None:
        self.name, self._network, self._thread = name, network, thread
        self._lock = threading.Lock()
        self._paused = False
        self._adapter: Any = None
        self._adapters = 0  # loaded so far
        self._longest: int = network.llm_engine.model_config.max_model_len

    def _do(self, call: Callable[..., T], *args: Any) -> T:
        return self._thread.submit(call, *args).result()

    def answer(self, requests: Sequence[Request], seconds: float) -> list[tuple[Answer, ...] | Fault]:
        """All of one batch. `seconds` ends nothing here: what runs in this process cannot be left behind."""
        faults = [too_long(one, self._longest) for one in requests]
        with self._lock:
            whole = [one for one, fault in zip(requests, faults, strict=True) if fault is None]
            outcomes = iter(self._do(self._continue, whole))
        return [next(outcomes) if fault is None else fault for fault in faults]

    def _continue(self, asked: Sequence[Request]) -> list[tuple[Answer, ...] | Fault]:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        if not asked:
            return []
        given = [{"prompt_token_ids": one.folded()} | self._pictures(one) for one in asked]
        ways = [SamplingParams(**sampling(one), detokenize=False) for one in asked]
        try:
            told = self._network.generate(given, ways, use_tqdm=False, lora_request=self._adapter)
        except (ValueError, VLLMClientError) as error:  # vLLM refuses a request, and does not say which
            if len(asked) == 1:
                return [Fault(f"{self.name} refuses the request: {error}", again=False)]
            return [outcome for one in asked for outcome in self._continue([one])]
        except Exception as error:  # of the engine, which then is as good as dead; the pool goes on without it
            return [Fault(f"{self.name}: {type(error).__name__}: {error}")] * len(asked)
        return [self._read(one, output) for one, output in zip(asked, told, strict=True)]

    def _pictures(self, request: Request) -> dict[str, Any]:
        return {"multi_modal_data": {"image": [to_pil(one) for one in request.images]}} if request.images else {}

    def _read(self, request: Request, output: Any) -> tuple[Answer, ...] | Fault:
        if (fault := otherwise_spread(request, output.prompt_token_ids)) is not None:
            return fault
        prompt: tuple[float, ...] = ()
        if request.prompt_log_probs:
            rows = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
            prompt = (0.0, *(row[token].logprob for row, token in rows))
        answers = []
        for one in sorted(output.outputs, key=lambda choice: choice.index):
            log_probs = [row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)]
            spans = spans_of([(span.version, span.start, span.end) for span in one.weight_versions or ()])
            read = answered(one.token_ids, log_probs, spans, str(one.finish_reason), self.name, prompt)
            if isinstance(read, Fault):
                return read
            answers.append(read)
        return tuple(answers)

    def label(self) -> str:
        return str(self._do(self._network.get_weight_version))

    def stamp(self, label: str) -> None:
        self._do(self._network.update_weight_version, label)

    def pause(self) -> None:
        self._lock.acquire()
        self._paused = True
        for forget in (self._network.reset_prefix_cache, self._network.reset_mm_cache):
            self._do(forget)
        self._do(self._network.llm_engine.reset_encoder_cache)

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._lock.release()

    def abandon(self) -> None:
        self.resume()  # nothing is under way while it stands still

    def processes(self) -> int:
        return 1

    def connect(self, info: Mapping[str, Any], seconds: float) -> None:
        self._do(self._network.init_weight_transfer_engine, {"init_info": dict(info)})

    def start(self) -> None:
        self._do(self._network.start_weight_update)

    def update(self, info: Mapping[str, Any], seconds: float) -> None:
        self._do(self._network.update_weights, {"update_info": dict(info)})

    def finish(self, version: int) -> None:
        self._do(self._network.finish_weight_update, str(version))
        self._adapter = None  # an adapter of the weights before has no meaning on these

    def load_adapter(self, version: int, folder: str) -> None:
        from vllm.lora.request import LoRARequest

        self._adapters += 1  # vLLM counts from 1
        adapter = LoRARequest(adapter_name(version), self._adapters, folder)
        with self._lock:
            try:
                self._do(self._network.llm_engine.add_lora, adapter)
            except ValueError as error:
                raise WorkerError(f"refuses the adapter: {error}", where=self.name) from error
            if self._adapter is not None:
                self._do(self._network.llm_engine.remove_lora, self._adapter.lora_int_id)
            self._adapter = adapter

    def close(self) -> None:
        """End the engine and the process group that it made."""
        from vllm.distributed import cleanup_dist_env_and_memory

        try:
            self._do(self._network.llm_engine.engine_core.shutdown)
        finally:
            self._thread.submit(cleanup_dist_env_and_memory)
            self._thread.shutdown()


__all__ = ["Offline", "OfflineWorker"]
