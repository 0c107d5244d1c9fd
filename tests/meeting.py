"""Processes that are threads, for what gathers several times in a row."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[Tensor], Tensor]


class Meeting:
    """Where threads wait for what the others gather."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.brought: list[Tensor] = [torch.zeros(0)] * count

    def run(self, works: Sequence[Callable[[Gather], Any]]) -> list[Any]:
        """What each work returns; each is given a `gather` that needs the others. An error in one is raised here."""
        results: list[Any] = [None] * len(works)
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = works[rank](lambda values: self._gather(rank, values))
            except BaseException as error:  # nobody waits for this one any more
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(works))]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        if errors:
            raise errors[0]
        return results

    def _gather(self, rank: int, values: Tensor) -> Tensor:
        self.brought[rank] = values
        self.barrier.wait()
        found = torch.cat(self.brought)
        self.barrier.wait()
        return found
