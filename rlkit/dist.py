"""Processes: one, or several under torchrun, with the few collective operations that the loop needs.

Nothing else in rlkit talks to `torch.distributed`. Backends start by one line in `LAUNCH`; after the start, the number
of processes and the backend are what was asked, or the run stops.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor

from rlkit.errors import DistributedError

LAUNCH = {
    "ddp": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node={n}"),
        # Seconds that a process has after Ctrl+C to end its step and save; torchrun would kill it after 30.
        *("--shutdown-timeout=600", "-m", "rlkit.cli"),
    ],
}


def launch_command(processes: int, arguments: Sequence[str], backend: str = "ddp") -> list[str]:
    """The command line that starts `processes` copies of `rlkit ARGUMENTS` joined to one group."""
    return [part.format(n=processes) for part in LAUNCH[backend]] + list(arguments)


@dataclass(frozen=True)
class Processes:
    """This process among its peers. With one process every operation is the identity."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's contiguous part of `total` positions. Parts differ by one at most; the first is never empty
        before the others, since the first process writes the record and needs pictures for it."""
        return range(-(-total * self.rank // self.count), -(-total * (self.rank + 1) // self.count))

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of each process, any n, even 0 -> all of them in rank order, on the CPU. Every process must call."""
        if self.count == 1:
            return values
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        torch.distributed.all_gather(sizes, torch.tensor([len(values)], device=self.device))
        longest = int(max(int(size) for size in sizes))
        padded = torch.zeros((longest, *values.shape[1:]), dtype=values.dtype, device=self.device)
        padded[: len(values)] = values.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).to(values.device)

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes, in fp64 on the way so that the order of ranks does not show in fp32."""
        if self.count == 1:
            return values
        total = values.double().to(self.device)
        torch.distributed.all_reduce(total)
        return total.to(values.device, values.dtype)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def same_everywhere(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite with the first process's values."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), 0)  # the same memory

    def any(self, flag: bool) -> bool:
        """True on every process when it is true on one, so that all of them stop together."""
        return bool(self.gather(torch.tensor([flag])).any())

    def wait(self) -> None:
        if self.count > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def start(asked: int = 1, device: str = "auto") -> Processes:
    """Join the group that the launcher made, and check that it is the one that was asked for.

    Raises DistributedError where the number of processes is not `asked`: a launcher that quietly started one process,
    or several that do not know each other, would train on a fraction of the data and report it as a success.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != asked:
        raise DistributedError(
            f"{asked} processes were asked for, but the launcher made {world}",
            where="--nproc",
            hint=f"Start with: rlkit train RECIPE --nproc {asked}",
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    kind, _, number = chosen.partition(":")
    if number and asked > 1:
        what = f"{asked} processes cannot share the one device {device}"
        raise DistributedError(what, where="run.device", hint=f"Use run.device={kind}: each process takes its own.")
    if kind == "cuda":
        index = int(number or local)
        if index >= torch.cuda.device_count():
            which = f"CUDA device {index}" if torch.cuda.is_available() else "CUDA device"
            raise DistributedError(f"no {which} is available", where="run.device", hint="Use run.device=cpu")
        torch.cuda.set_device(index)
    place = torch.device("cuda", index) if kind == "cuda" else torch.device(chosen)
    if asked == 1:
        return Processes(device=place)
    backend = "nccl" if kind == "cuda" else "gloo"
    # Imported after the group exists, as diffusers would, it keeps a reference to the group: its threads then outlive
    # `close`, and now and then abort the interpreter while it ends, after all the work is done.
    importlib.import_module("torch._dynamo")
    torch.distributed.init_process_group(backend)
    found, size = torch.distributed.get_backend(), torch.distributed.get_world_size()
    if (found, size) != (backend, asked):
        raise DistributedError(f"asked for {asked} processes over {backend}, got {size} over {found}", where="--nproc")
    return Processes(torch.distributed.get_rank(), asked, place)
