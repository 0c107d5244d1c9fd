"""Devices as their makers describe them, and this machine's processor as a short measurement finds it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from rlkit.errors import RecipeError, nearest

WHERE = "--gpus"
NODE = 8  # devices of one machine; beyond, gradients travel over the network
NETWORK = 50e9  # bytes a second and device between machines: 400 Gbit/s each


@dataclass(frozen=True)
class Device:
    """One device. Dense peaks: what sparsity would add is not there."""

    name: str
    bf16: float  # FLOP/s, with sums in fp32
    fp32: float  # FLOP/s of plain fp32: rlkit leaves TF32 off
    memory: float  # bytes
    bandwidth: float  # bytes a second, to its own memory
    link: float  # bytes a second, one way, to its neighbours in the machine
    efficiency: float = 0.4  # share of the peak that a transformer's forward and backward passes reach


DEVICES = {
    "H200": Device("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9),
    "H100": Device("H100", 989e12, 67e12, 80e9, 3.35e12, 450e9),
    "A100-80": Device("A100-80", 312e12, 19.5e12, 80e9, 2.0e12, 300e9),
    "L40S": Device("L40S", 362e12, 91.6e12, 48e9, 0.864e12, 32e9),
    "4090": Device("4090", 165e12, 82.6e12, 24e9, 1.008e12, 32e9),
}
CPU = "cpu"
OF_MATMUL = 0.45  # of a processor's speed in one matrix product, what a whole network reaches (see docs/plan.md)


@dataclass(frozen=True)
class Machine:
    """What a recipe would run on."""

    device: Device
    count: int

    @property
    def link(self) -> float:
        """Bytes a second at which a device exchanges gradients with the others."""
        return self.device.link if self.count <= NODE else min(self.device.link, NETWORK)


def check(text: str) -> tuple[int, str]:
    """(how many, which name of the table) of `8xH200`, `H200` or `cpu`. RecipeError for another."""
    found = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(\S+)", text.strip())
    count, name = (int(found[1] or 1), found[2]) if found else (0, text)
    if count < 1:
        raise RecipeError(f"{text!r} is no number of devices.", where=WHERE, hint="Write for instance 8xH200, or cpu.")
    known = {one.casefold(): one for one in (*DEVICES, CPU)}
    if name.casefold() not in known:
        what = f"no device named {name!r} in the table.{nearest(name, known.values())}"
        raise RecipeError(what, where=WHERE, hint=f"Known: {', '.join(known.values())}.")
    return count, known[name.casefold()]


def machine(text: str, threads: int | None = None) -> Machine:
    """The machine of these words; threads: of torch, where the processor is measured."""
    count, name = check(text)
    return Machine(processor(threads) if name == CPU else DEVICES[name], count)


def processor(threads: int | None = None, seconds: float = 1.0) -> Device:
    """This machine's processor: the best of many products of matrices, and of copies, within about so many seconds.

    With one thread the time is the processor's own, so that others who use the machine do not count.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    clock = time.process_time if (threads or before) == 1 else time.perf_counter
    try:
        a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
        flops = 2 * 1024**3 / _fastest(lambda: torch.mm(a, b), clock, 0.8 * seconds)
        source, target = torch.rand(1 << 22), torch.empty(1 << 22)
        bandwidth = 2 * source.nbytes / _fastest(lambda: target.copy_(source), clock, 0.2 * seconds)
    finally:
        torch.set_num_threads(before)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device("this processor", flops, flops, memory, bandwidth, bandwidth, OF_MATMUL)


def _fastest(action: Callable[[], object], clock: Callable[[], float], seconds: float) -> float:
    best, used = float("inf"), 0.0
    while used < seconds:
        started = clock()
        action()
        took = max(clock() - started, 1e-9)
        best, used = min(best, took), used + took
    return best
