"""Steps to come: their answers are asked for in the background, while the learner is at work on the step before.

Only the asking is done there. Requests are built, weights pushed and answers read by the thread that trains: a policy
is not to be touched by two. What is under way stands still for a push and goes on with the new weights, token by token
of the version that its spans name; a group of which one answer is too old is too old as a whole, since its members are
compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import torch
from torch import Tensor

from rlkit.rollouts._token_samples import Written
from rlkit.workers.pool import Pool
from rlkit.workers.worker import Answer, Failure, Request, WorkerError

Told = list[tuple[Answer, ...] | Failure]


class Ahead:
    """What was asked for, by the step that will want it. All of it is to be of one set of the weights."""

    def __init__(self, steps: int) -> None:
        """steps: how many, beside the one that is asked for now."""
        self.policy_set = ""
        self._begun: dict[int, Future[Told]] = {}
        self._threads = ThreadPoolExecutor(steps + 1, "rlkit-ahead")

    def has(self, step: int, policy_set: str) -> bool:
        return step in self._begun and policy_set == self.policy_set

    def begin(self, step: int, pool: Pool, requests: Sequence[Request], policy_set: str) -> None:
        """Ask for a step. What was asked of another set is of no use then."""
        if policy_set != self.policy_set:
            self.wait()
            self._begun, self.policy_set = {}, policy_set
        self._begun[step] = self._threads.submit(pool.map, requests)

    def take(self, step: int) -> Told:
        """The answers of a step that was begun, once all of them are there. Raises what its thread raised."""
        return self._begun.pop(step).result()

    @property
    def under_way(self) -> bool:
        return not all(one.done() for one in self._begun.values())

    def wait(self) -> None:
        """Until nothing is under way; the answers stay for those who will ask for them."""
        wait(self._begun.values())

    def close(self, pool: Pool) -> None:
        """End what is under way, and the pool with it: nobody will ask for it any more."""
        if self.under_way:
            for worker in pool.workers.values():
                with suppress(WorkerError):  # one that is gone has nothing under way
                    worker.abandon()
                    worker.resume()
        pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def too_old(
    written: Sequence[Written], group: Tensor, oldest: int, gather: Callable[[Tensor], Tensor]
) -> tuple[list[int], int]:
    """(the answers here [N] whose group [N] has a token of weights before `oldest`, on any process; how many groups).

    Every process must call, also one without answers: all drop the same groups.
    """
    versions = torch.tensor([min(span.version for span in one.spans) for one in written], dtype=torch.int64)
    everyone, versions = gather(group), gather(versions)
    stale = everyone[versions < oldest].unique()
    return torch.isin(group, stale).nonzero().flatten().tolist(), len(stale)
