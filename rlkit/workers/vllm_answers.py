"""What vLLM is asked for one request, and how its answer is read: the same in this process and over HTTP.

Sampling is exactly softmax(logits / temperature), without the token that stands for a picture: the learner's networks
give it no probability. Every other option of vLLM that would change the distribution is switched off in each request,
as are the defaults that a network's folder may bring.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from rlkit.types import Span
from rlkit.workers.worker import Answer, Fault, Request

ADAPTER = "rlkit-"  # how the names of our adapters begin
LOWEST = -9000.0  # vLLM writes -9999 for a log-prob that is NaN or minus infinity
NEVER = -100.0  # the lowest that vLLM's routes let through; e^-100 of another token's probability is 0 in fp32


def adapter_name(version: int) -> str:
    """A name that no adapter had before: what vLLM computed is kept under it, also for the next learner."""
    return f"{ADAPTER}{version}-{os.urandom(4).hex()}"


def sampling(request: Request) -> dict[str, Any]:
    """vLLM's sampling parameters. Nothing is left to a default."""
    return {
        "n": request.n,
        "max_tokens": request.most,
        "temperature": request.temperature,
        "seed": request.seed,
        "stop_token_ids": list(request.ends),
        "ignore_eos": True,  # those of the request end an answer, and no others
        "logprobs": 0,  # of the sampled token alone
        "prompt_logprobs": 0 if request.prompt_log_probs else None,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # Added before the temperature and before the log-probs are taken (processed_logprobs).
        "logit_bias": None if request.picture_token is None else {request.picture_token: NEVER},
    }


def too_long(request: Request, longest: int | None) -> Fault | None:
    """A request that no worker of this length can take."""
    if longest is None or len(request.ids) + request.most <= longest:
        return None
    asked = f"a prompt of {len(request.ids)} tokens and an answer of up to {request.most}"
    hint = "Shorten them, or start the workers with a larger `longest`."
    return Fault(f"{asked} are more than the {longest} that a worker holds. {hint}", again=False)


def otherwise_spread(request: Request, read: Sequence[int] | None) -> Fault | None:
    """A prompt that the worker did not read as the learner does."""
    if not request.images or read is None or tuple(read) == request.ids:
        return None
    counts = [sum(one == request.picture_token for one in ids) for ids in (read, request.ids)]
    what = f"the worker spreads the pictures over {counts[0]} tokens, the learner over {counts[1]}"
    return Fault(f"{what}. Both must load the same processor from the same folder.", again=False)


def answered(
    ids: Sequence[int],
    log_probs: Sequence[float],
    spans: Sequence[Span],
    reason: str,
    worker: str,
    prompt: tuple[float, ...] = (),
) -> Answer | Fault:
    """One continuation, or what is wrong with it."""
    if reason not in ("stop", "length"):
        return Fault(f"{worker} ended the answer with {reason!r}")
    if len(ids) != len(log_probs) or not ids:
        return Fault(f"{worker} gave {len(ids)} tokens and {len(log_probs)} log-probs")
    if not all(LOWEST < one < math.inf for one in log_probs):
        return Fault(f"{worker} gave a log-prob that is not finite: are its weights?")
    covered = [one for span in spans for one in range(span.start, span.end)]
    if covered != list(range(len(ids))):
        return Fault(f"{worker} does not say which weights sampled each token")
    return Answer(tuple(ids), tuple(log_probs), tuple(spans), reason == "stop", worker, prompt)


def spans_of(given: Sequence[tuple[str, int, int]]) -> list[Span]:
    """Spans with versions; those of a label that is none (weights that nobody pushed, or half of them) are left out."""
    return [Span(int(label), start, end) for label, start, end in given if label.isdecimal()]
