"""vLLM's own server as a worker, on this or another machine.

Token ids go in and token ids come out, by `/inference/v1/generate` (a server started with --enable-scale-out), which
also says which weights sampled each token and takes pictures; or by `/v1/completions`, which does neither: answers
during which the weights changed are then thrown away.

The server tells the log-probs of what it sampled from only with --logprobs-mode processed_logprobs, and takes weights
only with VLLM_SERVER_DEV_MODE=1; serving.py starts one with all of that. `key_env` guards requests, not the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlkit.endpoints import LARGEST_REPLY, Endpoints
from rlkit.errors import nearest
from rlkit.pictures import data_uri
from rlkit.types import Span
from rlkit.workers.vllm_answers import ADAPTER, adapter_name, answered, otherwise_spread, sampling, spans_of, too_long
from rlkit.workers.worker import FRESH, Answer, Fault, Request, WorkerError

if TYPE_CHECKING:
    import httpx

AGAIN = (404, 408, 429, 500, 502, 503, 504)  # 404: this server lacks the network, another may have it
SAID = 300  # characters of an error's text that are repeated


@dataclass(frozen=True)
class Server:
    """Where one is, and what it serves."""

    url: str
    model: str = "policy"  # the name that it serves the network under
    key_env: str | None = None  # the environment variable that holds its token; null: none is sent
    at_once: int = 64  # requests under way
    route: Literal["generate", "completions"] = "generate"
    seconds: float = 60.0  # the longest wait for an answer that needs no sampling and carries no weights

    def __post_init__(self) -> None:
        Endpoints((self.url,), self.key_env, self.at_once, request_timeout=self.seconds)  # for its checks
        if self.route not in ("generate", "completions"):
            raise ValueError(f"route must be generate or completions, not {self.route!r}.")

    def open(self) -> ServerWorker:
        """Ready to be asked; nothing is connected before."""
        import httpx

        token = "" if self.key_env is None else os.environ.get(self.key_env, "").strip()
        if self.key_env is not None and (not token or not token.isascii() or not token.isprintable() or " " in token):
            hint = f"Run: export {self.key_env}=..., or take key_env out."
            raise WorkerError(f"the environment's {self.key_env} holds no token", where="key_env", hint=hint)
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.at_once)
        client = httpx.Client(
            base_url=self.url.rstrip("/"), headers=headers, timeout=self.seconds, limits=limits, trust_env=False
        )
        return ServerWorker(self, client, token)


class ServerWorker:
    batch = 1

    def __init__(self, options: Server, client: httpx.Client, token: str) -> None:
        self.name, self.at_once = options.url.rstrip("/"), options.at_once
        self._options, self._client, self._token = options, client, token
        self._longest: int | None = None  # tokens; known once the server was looked at
        self._adapter: tuple[int, str] | None = None  # version and name of the one that answers
        self._loaded: list[str] = []  # adapters that the server has, the oldest first

    # ---- requests ----------------------------------------------------------------------------------------------------

    def answer(self, requests: Sequence[Request], seconds: float) -> list[tuple[Answer, ...] | Fault]:
        return [self._answer(one, seconds) for one in requests]

    def _answer(self, request: Request, seconds: float) -> tuple[Answer, ...] | Fault:
        if (fault := too_long(request, self._longest)) is not None:
            return fault
        adapter = self._adapter
        model = self._options.model if adapter is None else adapter[1]
        try:
            if self._options.route == "generate":
                told = self._json("POST", "/inference/v1/generate", _generate(request, model), seconds)
                return self._read(request, told, adapter)
            if request.images:
                return Fault("/v1/completions takes no pictures: give this server `route: generate`", again=False)
            before = self.label()
            told = self._json("POST", "/v1/completions", _completions(request, model), seconds)
            if self.label() != before:
                return Fault(f"{self.name} got new weights during the answer, and does not say which tokens are whose")
            return self._read(request, _as_generated(told, before), adapter)
        except _Refused as error:
            return Fault(str(error), again=error.status in AGAIN)
        except WorkerError as error:
            return Fault(str(error))
        except (
            AttributeError,
            KeyError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:  # an answer of another shape than vLLM's
            return Fault(f"{self.name} gave an answer that cannot be read ({type(error).__name__}: {error})")

    def _read(self, request: Request, told: Any, adapter: tuple[int, str] | None) -> tuple[Answer, ...] | Fault:
        if (fault := otherwise_spread(request, told.get("prompt_token_ids"))) is not None:
            return fault
        prompt: tuple[float, ...] = ()
        if request.prompt_log_probs:
            rows = zip(told["prompt_logprobs"][1:], request.ids[1:], strict=True)
            prompt = (0.0, *(row[str(token)]["logprob"] for row, token in rows))
        answers = []
        for one in sorted(told["choices"], key=lambda choice: choice["index"]):
            ids = one["token_ids"]
            log_probs = [row["logprob"] for row in one["logprobs"]["content"]]
            given = [(span["version"], span["start"], span["end"]) for span in one.get("weight_versions") or ()]
            spans = spans_of(given) if adapter is None else [Span(adapter[0], 0, len(ids))]
            read = answered(ids, log_probs, spans, one["finish_reason"], self.name, prompt)
            if isinstance(read, Fault):
                return read
            answers.append(read)
        if len(answers) != request.n:
            return Fault(f"{self.name} gave {len(answers)} answers and not {request.n}")
        return tuple(answers)

    # ---- weights -----------------------------------------------------------------------------------------------------

    def label(self) -> str:
        if self._longest is None:
            self._meet()
        label = str(self._field("/weight_info", "weight_version"))
        if label == FRESH:  # it may have been started again, and then has no adapter
            self._adapter, self._loaded = None, []
        return label

    def _meet(self) -> None:
        """See that it serves the network that is meant, how long sequences may be, and what adapters are left there."""
        try:
            cards = {card["id"]: card for card in self._field("/v1/models", "data")}
        except (KeyError, TypeError) as error:
            raise WorkerError("the list of models cannot be read", where=f"{self.name}/v1/models") from error
        if self._options.model not in cards:
            what = f"serves {', '.join(map(repr, cards)) or 'nothing'}, not {self._options.model!r}."
            hint = nearest(self._options.model, cards).strip() or "Start it with --served-model-name, or name it here."
            raise WorkerError(what, where=self.name, hint=hint)
        self._longest = cards[self._options.model].get("max_model_len")
        self._loaded = [one for one in cards if one.startswith(ADAPTER)]

    def _field(self, path: str, name: str) -> Any:
        told = self._json("GET", path)
        if not isinstance(told, dict) or name not in told:
            raise WorkerError(f"the answer has no {name!r}: is this vLLM's server?", where=self.name + path)
        return told[name]

    def stamp(self, label: str) -> None:
        self._json("POST", "/update_weight_version", {"new_version": label})

    def pause(self) -> None:
        self._json("POST", "/pause?mode=keep")

    def resume(self) -> None:
        self._json("POST", "/resume")

    def abandon(self) -> None:
        self._json("POST", "/pause?mode=abort")

    def processes(self) -> int:
        return int(self._field("/get_world_size", "world_size"))

    def connect(self, info: Mapping[str, Any], seconds: float) -> None:
        self._json("POST", "/init_weight_transfer_engine", {"init_info": dict(info)}, seconds)

    def start(self) -> None:
        self._json("POST", "/start_weight_update")

    def update(self, info: Mapping[str, Any], seconds: float) -> None:
        self._json("POST", "/update_weights", {"update_info": dict(info)}, seconds)

    def finish(self, version: int) -> None:
        self._json("POST", "/finish_weight_update", {"weight_version": str(version)})
        self._adapter = None  # an adapter of the weights before has no meaning on these

    def load_adapter(self, version: int, folder: str) -> None:
        """The one before stays: a request that was just sent still names it."""
        name = adapter_name(version)
        self._json("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, plain=True)
        self._loaded.append(name)
        self._adapter = (version, name)
        while len(self._loaded) > 2:
            self._json("POST", "/v1/unload_lora_adapter", {"lora_name": self._loaded.pop(0)}, plain=True)

    def close(self) -> None:
        self._client.close()

    # ---- HTTP --------------------------------------------------------------------------------------------------------

    def _json(self, method: str, path: str, body: Any = None, seconds: float | None = None, plain: bool = False) -> Any:
        """What the server answers; None where that is plain text. WorkerError if there is no answer."""
        import httpx

        try:
            wait = self._options.seconds if seconds is None else seconds
            with self._client.stream(method, path, json=body, timeout=wait) as response:
                read = bytearray()
                for part in response.iter_raw():
                    read += part
                    if len(read) > LARGEST_REPLY:
                        raise WorkerError(f"answered more than {LARGEST_REPLY >> 20} MiB", where=self.name + path)
        except httpx.TimeoutException:
            raise WorkerError(f"no answer within {wait:g} s", where=self.name + path) from None
        except httpx.TransportError as error:
            text = f"{type(error).__name__}: {error}".rstrip(": ")
            raise WorkerError(self._without_token(text), where=self.name + path) from None
        if response.status_code != 200:
            text = _said(path.partition("?")[0], response.status_code, bytes(read))
            raise _Refused(response.status_code, self._without_token(text), self.name)
        try:
            return None if plain else json.loads(bytes(read))
        except ValueError as error:
            raise WorkerError("the answer is no JSON: is this vLLM's server?", where=self.name + path) from error

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text


class _Refused(WorkerError):
    """An answer with another status than 200."""

    def __init__(self, status: int, what: str, where: str) -> None:
        super().__init__(what, where=where)
        self.status = status


HINTS = {  # (path, status) -> what to do
    ("/inference/v1/generate", 403): "Start it with --enable-scale-out, or give this server `route: completions`.",
    ("/weight_info", 404): "Start it with VLLM_SERVER_DEV_MODE=1 in its environment.",
    ("/v1/load_lora_adapter", 404): "Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.",
}


def _said(path: str, status: int, body: bytes) -> str:
    text = " ".join(body[:4000].decode(errors="replace").split())
    with suppress(ValueError, KeyError, TypeError):  # not vLLM's form: as it is
        text = json.loads(body)["error"]["message"]
    hint = HINTS.get((path, status), "")
    if "max_lora_rank" in text:
        hint = "Start the workers with a lora_rank that is large enough (--max-lora-rank)."
    return f"answered {status}" + (f": {text[:SAID]}" if text else "") + (f" {hint}" if hint else "")


def _generate(request: Request, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {"token_ids": request.folded(), "sampling_params": sampling(request), "model": model}
    if request.images:
        parts = [{"type": "image_url", "url": data_uri(one)} for one in request.images]
        body |= {"content_parts": parts, "return_token_ids": True}
    return body


def _completions(request: Request, model: str) -> dict[str, Any]:
    return {"prompt": list(request.ids), "model": model, "return_token_ids": True, **sampling(request)}


def _as_generated(told: Any, label: str) -> dict[str, Any]:
    """A completion in the form of the other route; all its tokens are of the weights of this label."""
    choices = []
    for one in told["choices"]:
        ids, log_probs = one["token_ids"], one["logprobs"]["token_logprobs"]
        choices.append(
            {
                "index": one["index"],
                "token_ids": ids,
                "logprobs": {"content": [{"logprob": value} for value in log_probs]},
                "finish_reason": one["finish_reason"],
                "weight_versions": [{"version": label, "start": 0, "end": len(ids)}],
            }
        )
    return {"choices": choices, "prompt_logprobs": told["choices"][0].get("prompt_logprobs")}


__all__ = ["Server", "ServerWorker"]
