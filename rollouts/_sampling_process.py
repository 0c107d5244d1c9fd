"""The worker's end of `processes`: a policy of its own, the sampler of `local`, and a line to the learner.

Every message has one answer. What is wrong with a request is told and the worker goes on; when the line closes, be it
that the learner was killed, the process ends, in the middle of its work too.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlkit import registry
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.policy import Policy
from rlkit.resources import Resources
from rlkit.rollouts.local import Local, LocalRollout
from rlkit.shelf import Conditions
from rlkit.types import Condition, Context, FlowModel, Prompt
from rlkit.weights import Lora
from rlkit.workers.sample_wire import pack, pack_samples, read_plan, receive, send, unpack


class Sent(Conditions):
    """Conditions that the learner has encoded. Nothing is encoded here, so `encode` finds all of them known."""

    def __init__(self, policy: Policy, known: Mapping[str, Condition], twins: Mapping[str, str]) -> None:
        super().__init__(policy.model_at)
        self._known = dict(known)
        self._encoded = set(known)
        self._twins = dict(twins)


def built(told: Mapping[str, Any]) -> LocalRollout:
    """The started sampler of the policy that the learner described."""
    torch.set_num_threads(told["threads"])
    torch.use_deterministic_algorithms(told["deterministic"])
    device = torch.device(told["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lora: Lora | None = told["lora"] and registry.construct(Lora, told["lora"], "policy.train.lora")
    half = told["precision"] == "bf16" and lora is not None  # as the learner's own policy is loaded
    name, options = told["origin"]
    model: FlowModel = registry.build("backbones", name, options, "policy.backbone").load(
        device, torch.bfloat16 if half else torch.float32
    )
    # What reads prompts has no work here.
    resources = replace(Resources(**told["resources"]), encoders="offload", conditions_in_memory=None)
    policy = Policy(model, lora, device, told["precision"], 0, told["guidance"], resources=resources)
    return Local(**told["sampler"]).start(policy, Processes(0, 1, device))  # type: ignore[return-value]


def collected(sampler: LocalRollout, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The samples of one request."""
    policy = sampler.policy
    conditions: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, column = name.partition("/")
        conditions.setdefault(int(number), {})[column] = value.to(policy.device)
    prompts, known, twins = [], {}, {}
    for place, (size, number, twin) in enumerate(told["prompts"]):
        # A text of its own stands for each condition: words, pictures and size are all in it.
        prompt = Prompt(place, f"condition {number}", size=size and tuple(size))
        prompts.append(prompt)
        if number is not None:
            known[prompt.key] = conditions[number]
        if twin is not None:
            twins[prompt.key] = f"{prompt.key} untold"
            known[twins[prompt.key]] = conditions[twin]
    policy.conditions = Sent(policy, known, twins)
    sampler.processes = Processes(told["rank"], told["count"], policy.device)
    sampler.load({}, told["version"])
    context = Context(**told["context"], state={}, gather=lambda values: values)
    samples = sampler.collect(PromptBatch(tuple(prompts), told["group"]), read_plan(told["plan"]), context)
    return pack_samples(samples, calls=policy.take_calls())


def work(line: socket.socket) -> None:
    """Answer until the line is closed."""
    sampler: LocalRollout | None = None
    holds = 0  # the number of the weights, as the learner counts them; 0: the backbone's own
    while True:
        told, tensors = unpack(receive(line))
        try:
            if told["do"] == "start":
                sampler = built(told)
                answer = pack({}, {})
            elif sampler is None:
                raise RuntimeError(f"{told['do']} came before start")
            elif told["do"] == "weights":
                holds = 0  # until all of them are there
                sampler.policy.load_state({f"current/{name}": value for name, value in tensors.items()})
                holds = told["number"]
                answer = pack({}, {})
            elif told["weights"] != holds:
                raise RuntimeError(f"this worker holds weights {holds}, and was asked for weights {told['weights']}")
            else:
                answer = collected(sampler, told, tensors)
        except Exception as error:  # the learner hears of it and raises; this process stays as it was
            traceback.print_exc()
            answer = pack({"error": f"{type(error).__name__}: {error}"}, {})
        send(line, answer)


def end_with(line: socket.socket) -> None:
    """Wait until the other end is closed, and end this process at once, whatever it does."""
    watch = select.poll()
    watch.register(line, 0)  # 0: of nothing but an end
    watch.poll()
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    line = socket.socket(fileno=int(arguments[0]))
    threading.Thread(target=end_with, args=(line,), daemon=True).start()
    try:
        work(line)
    except OSError:  # nobody is there any more
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
