"""DDPO: a memory of rewards per prompt that every process keeps alike and a checkpoint can hold."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlkit.algorithms.ddpo import DDPO
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, FlowRows, Prompt, Scores

MakeContext = Callable[..., Context]
PROMPTS = PromptBatch((Prompt(7, "a red circle"), Prompt(9, "two blue crosses")), group=1)


def step(policy: Policy, algorithm: DDPO, context: Context, rewards: list[float]) -> FlowRows:
    samples = Local(steps=4).start(policy, Processes()).collect(PROMPTS, algorithm.plan(context), context)
    raw = torch.tensor(rewards)[:, None]
    return algorithm.rows(samples, Scores(("one",), raw, torch.isfinite(raw), torch.ones(1)), context)


def test_an_unknown_prompt_is_compared_with_the_step_and_a_known_one_with_its_past(
    toy_policy: Policy, context: MakeContext
) -> None:
    algorithm = DDPO(memory=3, known=2)
    state: dict[str, Any] = {"rewards": {}}
    first = step(toy_policy, algorithm, context(0, sampling_steps=4, state=state), [1.0, 3.0])
    assert first.advantage[::3].tolist() == pytest.approx([-1.0, 1.0], rel=1e-3), "(1, 3): mean 2, std 1"
    second = step(toy_policy, algorithm, context(1, sampling_steps=4, state=state), [2.0, 3.0])
    # Prompt 7 remembers 1, 2: mean 1.5, std .5. Prompt 9 remembers 3, 3: it got what it always gets.
    assert second.advantage[::3].tolist() == pytest.approx([1.0, 0.0], rel=1e-3)
    assert state["rewards"] == {"7": [1.0, 2.0], "9": [3.0, 3.0]}
    for reward in (4.0, 5.0):
        step(toy_policy, algorithm, context(2, sampling_steps=4, state=state), [reward, 3.0])
    assert state["rewards"]["7"] == [2.0, 4.0, 5.0], "the last three"
    assert json.loads(json.dumps(state)) == state, "a checkpoint holds it as json"


def test_an_unscored_sample_is_neither_trained_on_nor_remembered(toy_policy: Policy, context: MakeContext) -> None:
    state: dict[str, Any] = {"rewards": {}}
    at = context(0, sampling_steps=4, state=state)
    rows = step(toy_policy, DDPO(memory=3, known=2), at, [float("nan"), 3.0])
    assert rows.weight.tolist() == [0.0] * 3 + [1.0] * 3
    assert rows.advantage.tolist() == [0.0] * 6, "nobody is left to compare with"
    assert state["rewards"] == {"9": [3.0]}


def test_groups_of_one_are_enough_and_the_ratio_is_1(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DDPO(window=2)
    assert algorithm.needs().group == 1
    rows = step(toy_policy, algorithm, context(0, sampling_steps=4, state={"rewards": {}}), [1.0, 3.0])
    assert len(rows) == 4
    assert algorithm.loss(toy_policy.models, rows).metrics["ratio/deviation"].max() <= 1e-5


def test_dpok_adds_the_divergence_from_the_pretrained_policy(toy_policy: Policy, context: MakeContext) -> None:
    algorithm = DDPO(kl=0.1)
    assert algorithm.needs().reference
    toy_policy.keep("reference")
    rows = step(toy_policy, algorithm, context(0, sampling_steps=4, state={"rewards": {}}), [1.0, 3.0])
    with torch.no_grad():
        for parameter in toy_policy.trainable.values():
            parameter.mul_(1.01)
    result = algorithm.loss(toy_policy.models, rows)
    assert (result.terms["kl"][0] > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 0.0}, "noise_level must be above 0"),
        ({"dynamics": "cps", "noise_level": 1.5}, "at most 1 with cps"),
        ({"clip": 2.0}, "clip must be above 0"),
        ({"memory": 4, "known": 5}, "known must be within"),
        ({"kl": -1.0}, "kl must be 0 or more"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPO(**options)
