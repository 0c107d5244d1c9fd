"""Answers of a token policy from vLLM: an engine in this process, or servers on this and other machines.

The workers hold a copy of the policy's weights, which is brought up to date before they are asked: by a file, by gloo
or NCCL, or as a LoRA adapter (push.py). After every push a canary, one request whose answer the learner computes too,
proves that the weights arrived. Prompts go as token ids and come back as token ids; pictures go at the size at which
the network reads them.

A request that fails on every worker is an error: a group without some of its members would be another group.

With `ahead` the servers sample the next steps while the learner computes, and get new weights in the middle of that. An
answer is as old as its oldest token; groups that are older than `max_age` updates are sampled again, with the weights
of now. A run with `ahead: 0` can be resumed to the bit; with more, what was under way is asked for anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.language import LanguagePolicy
from rlkit.rollouts._ahead import Ahead, Told, too_old
from rlkit.rollouts._token_samples import Written, samples_of
from rlkit.types import Context, Plan, Prompt, Samples, Span, seed_of
from rlkit.workers import push
from rlkit.workers.pool import Patience, Pool
from rlkit.workers.serving import Engine, missing
from rlkit.workers.vllm_offline import Offline
from rlkit.workers.vllm_server import Server
from rlkit.workers.worker import Failure, Request, WorkerError

MEMORY = Path("/dev/shm")  # a folder in memory, where there is one
CANARY = 4  # tokens that the learner and a worker compute both


@dataclass(frozen=True)
class VLLM:
    """Samples answers with vLLM, in this process or on servers, and keeps its weights in step with the learner's.

    Without `urls` an engine is started in this process, on the policy's own weights; with them, servers are asked that
    `rlkit serve-rollout` has started on this or other machines.
    """

    kind = "tokens"
    gives = ("log_prob",)
    extra = "vllm"
    single = True  # in a process, or of the servers that it sends weights to

    most: int = 64  # tokens of an answer
    temperature: float = 1.0  # at which answers are sampled: a part of the policy, in training too
    urls: tuple[str, ...] = ()  # of servers, one for each learner process at least; none: an engine in this process
    ahead: int = 0  # steps whose answers are begun before their turn, by servers; the algorithm must correct for age
    max_age: int = 0  # updates that lie between the weights of an answer's oldest token and those that learn from it
    sync: Literal["file", "gloo", "nccl", "lora"] | None = None  # how weights get there; None: as fits
    folder: str | None = None  # that learner and workers share, for `file` and `lora`; None: in this machine's memory
    host: str = "127.0.0.1"  # the learner's address as workers reach it, for `gloo` and `nccl`
    tolerance: float | None = None  # of the canary's log-probs; None: 1e-4, and 0.1 in bf16
    dtype: Literal["auto", "float32", "bfloat16"] | None = None  # of the engine; None: as the run's precision
    cpu: bool | None = None  # the engine computes on a CPU; None: if the learner does
    sequences: int = 64  # continued at the same time
    memory: int = 1  # GB for keys and values, on a CPU
    gpu_share: float = 0.4  # of the GPU that the engine shares with the learner
    patience: Mapping[str, Any] = field(default_factory=dict)  # workers/pool.py: tries, pause, request, deadline, least
    steps: int = 0  # of denoising: there are none

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"most must be 1 token or more, not {self.most}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}: greedy choices have no density")
        if self.tolerance is not None and self.tolerance <= 0:
            raise ValueError(f"tolerance must be above 0, not {self.tolerance}")
        if self.urls and self.folder is None and self.sync in ("file", "lora"):
            raise ValueError(f"sync: {self.sync} needs a `folder` that the servers see too")
        if self.ahead < 0 or self.max_age < 0:
            raise ValueError(f"ahead and max_age must be 0 or more, not {self.ahead} and {self.max_age}")
        if self.ahead and not self.urls:
            what = f"ahead: {self.ahead} needs servers (urls): an engine in this process cannot sample while it learns"
            raise ValueError(what)
        if self.ahead and not self.max_age:
            what = f"ahead: {self.ahead} samples with weights that are one update old or more, and max_age is 0: every "
            raise ValueError(f"{what}answer would be thrown away. Set max_age: {self.ahead}, or ahead: 0")
        try:
            Patience(**self.patience)
        except TypeError as error:
            raise ValueError(f"patience: {error}") from error

    def missing(self) -> str:
        """How to install what is not there; "" where nothing is missing. Servers are others' matter."""
        return "" if self.urls else missing()

    def start(self, policy: LanguagePolicy, processes: Processes) -> VLLMRollout:
        if self.ahead > 1 and self.sync_for(policy, bool(self.urls)) == "lora":
            what = "a server keeps the newest adapter and the one before, and answers would be of older ones."
            raise RecipeError(what, where="rollout.ahead", hint="Set ahead: 1, or sync: gloo.")
        return VLLMRollout(self, policy, processes)

    def sync_for(self, policy: LanguagePolicy, served: bool) -> str:
        """How weights get to workers, in this process or served elsewhere."""
        if self.sync is not None:
            return self.sync
        if policy.lora is not None and (self.folder is not None or not served):
            return "lora"
        return "gloo" if served else "file"

    def engine_for(self, policy: LanguagePolicy, served: bool) -> Engine:
        """How vLLM is started for this policy."""
        half = policy.precision == "bf16"
        received = {"file": "rlkit_file", "gloo": "rlkit_gloo", "nccl": "nccl", "lora": "none"}
        return Engine(
            dtype=self.dtype or ("bfloat16" if half else "float32"),
            longest=policy.model.longest,
            sequences=self.sequences,
            pictures=16 if policy.model.picture is not None else 0,
            receive=received[self.sync_for(policy, served)],  # type: ignore[arg-type]
            lora_rank=None if policy.lora is None else policy.lora.rank,
            cpu=policy.device.type == "cpu" if self.cpu is None else self.cpu,
            cpu_memory=self.memory,
            gpu_share=self.gpu_share,
        )


class VLLMRollout:
    """A started `VLLM`. The first step starts the engine, or looks for the servers."""

    def __init__(self, options: VLLM, policy: LanguagePolicy, processes: Processes) -> None:
        self.options, self.policy, self.processes = options, policy, processes
        self.sync = options.sync_for(policy, bool(options.urls))
        self.version = 0  # the learner's
        self.pushed = 0  # the workers': one a push
        self.learners: dict[int, int] = {}  # of each push the learner's version
        self._holds: tuple[str, int] | None = None  # the set that workers have, and when it was taken
        self._pool: Pool | None = None
        self._temporary = tempfile.TemporaryDirectory(prefix="rlkit-", dir=MEMORY if MEMORY.is_dir() else None)
        self._folder = Path(options.folder) if options.folder else Path(self._temporary.name)
        self._by: Any = None
        self._ahead = Ahead(options.ahead)
        self._prompt: Prompt | None = None  # of the last step: what a canary asks

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """The learner has new weights. They are brought when somebody asks: an evaluation may want others first. Only
        answers that are under way get them at once."""
        self.version = version
        self._holds = None
        if self._ahead.under_way and self._prompt is not None:
            self._ready(self._ahead.policy_set, self._prompt)

    def health(self) -> str:
        return "ok" if self._pool is None else ", ".join(f"{k}: {v}" for k, v in self._pool.look().items())

    def close(self) -> None:
        if self._pool is not None:
            self._ahead.close(self._pool)
        self._pool = None
        self._temporary.cleanup()

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the step's samples."""
        share = self.processes.share(len(prompts))
        index = torch.arange(share.start, share.stop)
        self._prompt = prompts.prompts[(share or range(1))[0] // prompts.group]
        pool = self._ready(plan.policy_set, self._prompt)
        if self.options.ahead > 0 and context.coming is not None:
            written, refilled = self._written_ahead(pool, prompts, index, plan, context)
        else:
            asked = [prompts.prompts[i // prompts.group] for i in share]
            written, refilled = self.write(asked, [(i,) for i in share], plan, context), 0
        samples = samples_of(self.policy, prompts, index, written, self.options.temperature, self.version, context)
        return replace(samples, refilled=refilled)

    def write(
        self, prompts: Sequence[Prompt], places: Sequence[tuple[int, ...]], plan: Plan, context: Context
    ) -> list[Written]:
        """One answer to each prompt, whoever asks, now. Each has a seed of its own, keyed by its place."""
        if not prompts:
            return []
        pool = self._ready(plan.policy_set, prompts[0])
        requests = self._requests(prompts, places, context)
        self.policy.calls += sum(one.most for one in requests)
        return [self._read(one) for one in pool.map(requests)]

    def _written_ahead(
        self, pool: Pool, prompts: PromptBatch, index: Tensor, plan: Plan, context: Context
    ) -> tuple[list[Written], int]:
        """(the answers at these places [N] of the step, none of them too old; how many groups were asked for again)."""
        requests = self._share(prompts, context)
        written = [self._read(one) for one in self._told_ahead(pool, requests, plan, context)]
        group, oldest = index // prompts.group, self.version - self.options.max_age
        again, refilled = too_old(written, group, oldest, context.gather)
        fresh = pool.map([requests[row] for row in again]) if again else []
        for row, one in zip(again, fresh, strict=True):
            written[row] = self._read(one)
        self.policy.calls += sum(one.most for one in requests) + sum(requests[row].most for row in again)
        return written, refilled

    def _told_ahead(self, pool: Pool, requests: Sequence[Request], plan: Plan, context: Context) -> Told:
        """What the workers say to the requests of this step, and those of the next ones are begun meanwhile."""
        name, step = plan.policy_set, context.step
        if not self._ahead.has(step, name):
            self._ahead.begin(step, pool, requests, name)
        for more in range(1, self.options.ahead + 1):
            coming = None if self._ahead.has(step + more, name) or context.coming is None else context.coming(more)
            if coming is not None and coming[1].policy_set == name:  # workers hold one set at a time
                self._ahead.begin(step + more, pool, self._share(coming[0], coming[2]), name)
        return self._ahead.take(step)

    def _share(self, prompts: PromptBatch, context: Context) -> list[Request]:
        """One for each sample of this process's share of a step."""
        share = self.processes.share(len(prompts))
        return self._requests([prompts.prompts[i // prompts.group] for i in share], [(i,) for i in share], context)

    def _requests(
        self, prompts: Sequence[Prompt], places: Sequence[tuple[int, ...]], context: Context
    ) -> list[Request]:
        """One for each prompt, each with a seed of its own."""
        self.policy.conditions.encode(prompts)
        key = (context.seed, context.stage, context.step, "answer")
        return [self._request(prompt, seed_of(*key, *at)) for prompt, at in zip(prompts, places, strict=True)]

    def _request(self, prompt: Prompt, seed: int) -> Request:
        model, condition = self.policy.model, self.policy.conditions.of(prompt.key)
        ids = tuple(condition["ids"].tolist())
        return Request(
            ids=ids,
            most=min(self.options.most, model.longest - len(ids)),
            temperature=self.options.temperature,
            seed=seed % (1 << 31),
            ends=model.ends,
            images=model.pictures(prompt, condition),
            picture_token=model.picture,
        )

    def _read(self, told: Sequence[Any] | Failure) -> Written:
        if isinstance(told, Failure):
            what = f"a sample was tried {told.attempts} times, and failed: {told.reason}"
            raise WorkerError(what, where="rollout", hint="Look at the servers, or raise rollout.patience.tries.")
        (answer,) = told
        spans = tuple(Span(self.learners.get(one.version, one.version), one.start, one.end) for one in answer.spans)
        return Written(answer.ids, answer.log_probs, answer.finished, spans)

    # ---- weights -----------------------------------------------------------------------------------------------------

    def _ready(self, name: str, prompt: Prompt) -> Pool:
        """The pool, its workers holding this set of the weights as it is now."""
        wanted = (name, self.policy.moment())
        if self._pool is None:
            self._pool = self._open()
        if self._holds != wanted:
            if name != self._ahead.policy_set:
                self._ahead.wait()  # of another set no token may get into those answers
            self.pushed += 1
            self.learners[self.pushed] = self.version
            by = self._push(name, prompt)
            weights = self.policy.adapter(name)[0] if self.sync == "lora" else self.policy.whole(name)
            self._pool.push(weights, self.pushed, by)
            if isinstance(by, push.File | push.Lora):
                by.forget(self.pushed)
            self._holds = wanted
        return self._pool

    def _push(self, name: str, prompt: Prompt) -> Any:
        canary = self._canary(name, prompt)
        if self.sync == "file":
            self._by = push.File(self._folder, canary)
        elif self.sync == "lora":
            self._by = push.Lora(self._folder, self.policy.adapter(name)[1], canary)
        else:
            lines = {} if self._by is None else {"_lines": self._by._lines}
            kind = push.Gloo if self.sync == "gloo" else push.Nccl
            self._by = kind(host=self.options.host, canary=canary, **lines)
        return self._by

    def _canary(self, name: str, prompt: Prompt) -> push.Canary:
        self.policy.conditions.encode([prompt])  # its step may be over, and the prompt forgotten
        request = self._request(prompt, seed_of("canary", self.pushed))
        request = replace(request, most=min(CANARY, request.most))

        def ours(ids: tuple[int, ...]) -> Sequence[float]:
            whole = torch.tensor([[*request.ids, *ids]])
            with torch.no_grad():
                told = self.policy.models[name].log_probs(
                    whole, torch.tensor([whole.shape[1]]), [prompt.key], self.options.temperature
                )
            return [float(one) for one in told[0, len(request.ids) :]]

        half = self.policy.precision == "bf16"
        return push.Canary(request, ours, self.options.tolerance or (0.1 if half else 1e-4))

    def _open(self) -> Pool:
        options = self.options
        patience = Patience(**options.patience)
        if options.urls:
            # Each learner process has servers of its own: two that push to one would stop and start it for each other.
            own = options.urls[self.processes.rank :: self.processes.count]
            if not own:
                what = f"{self.processes.count} learner processes cannot share {len(options.urls)} servers."
                raise RecipeError(what, where="rollout.urls", hint="Start a server for each (rlkit serve-rollout).")
            return Pool([Server(url).open() for url in own], patience)
        if self.processes.count > 1:
            hint = "Start servers with rlkit serve-rollout, and give their `urls`."
            raise RecipeError("an engine cannot share one of several learner processes.", where="rollout", hint=hint)
        folder = Path(self._temporary.name) / "network"
        self.policy.write_base(folder)
        return Pool([Offline(folder, options.engine_for(self.policy, served=False)).open()], patience)
