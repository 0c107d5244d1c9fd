"""Weight sync: what a rollout samples bears the version that was pushed."""

from collections.abc import Callable

from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.sync import SharedMemory
from rlkit.types import Context, Plan, Prompt


def test_samples_bear_the_version_pushed(toy_policy: Policy, context: Callable[..., Context]) -> None:
    rollout = Local(steps=2).start(toy_policy, Processes())
    prompts = PromptBatch((Prompt(0, "a red circle"),), 2)
    versions = [rollout.collect(prompts, Plan(), context()).version]
    for version in (1, 7):
        SharedMemory().push(rollout, version)
        versions.append(rollout.collect(prompts, Plan(), context()).version)
    assert versions == [0, 1, 7]
