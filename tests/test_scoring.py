"""Scoring: what was not scored is masked and counted, and stops the run when it is too much. It is never a 0."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlkit import advantage
from rlkit.errors import RewardError
from rlkit.scoring import Scoring, WeightedReward
from rlkit.total import Gate, Total
from rlkit.types import Context, Samples, Scores

MakeSamples = Callable[..., Samples]


def fixed(values: Sequence[float | None] | Tensor) -> Callable[[Samples], Sequence[float | None] | Tensor]:
    return lambda samples: values


def score(
    samples: Samples,
    max_unscored: float = 1.0,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
    weights: Mapping[str, float] | None = None,
    **rewards: Callable[[Samples], object],
) -> Scores:
    weighted = [WeightedReward(name, reward, (weights or {}).get(name, 1.0)) for name, reward in rewards.items()]  # type: ignore[arg-type]
    return Scoring(tuple(weighted), max_unscored)(samples, gather)


@pytest.fixture
def six(samples_of: MakeSamples) -> Samples:
    """Three groups of two."""
    return samples_of(["one", "one", "two", "two", "three", "three"], group=2)


def test_two_rewards_are_weighted_and_kept_apart(six: Samples) -> None:
    first, second = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], torch.arange(6)
    scores = score(six, first=fixed(first), second=fixed(second), weights={"first": 2.0, "second": -0.5})
    assert scores.names == ("first", "second")
    assert scores.weights.tolist() == [2.0, -0.5]
    torch.testing.assert_close(scores.raw, torch.tensor([first, second.tolist()]).T)
    torch.testing.assert_close(scores.total, 2 * torch.tensor(first) - 0.5 * second)
    assert scores.raw.dtype == scores.total.dtype == torch.float32
    assert scores.scored.all()


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_is_masked_and_counted(
    six: Samples, missing: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scores = score(six, good=fixed([1.0] * 6), bad=fixed([0.5, 0.5, missing, 0.5, 0.5, 0.5]))
    assert scores.valid.tolist() == [[True, i != 2] for i in range(6)]
    assert scores.scored.tolist() == [i != 2 for i in range(6)]
    assert not math.isfinite(scores.raw[2, 1]), "a 0 would be a verdict"
    assert scores.total.tolist() == [1.5, 1.5, 0.0, 1.5, 1.5, 1.5]
    assert "reward 'bad' did not score 1 of 6 samples (masked): it returned NaN, infinity or None" in caplog.text
    assert "'good'" not in caplog.text


def test_too_much_unscored_stops_the_run(six: Samples) -> None:
    values = fixed([None, 0.5, math.nan, 0.5, 0.5, 0.5])
    assert int(score(six, max_unscored=2 / 6, sharp=values).scored.sum()) == 4
    with pytest.raises(RewardError) as caught:
        score(six, max_unscored=0.3, good=fixed([1.0] * 6), sharp=values)
    assert caught.value.where == "rewards.sharp"
    assert caught.value.what == "reward 'sharp' scored only 4 of 6 samples: it returned NaN, infinity or None"
    assert "run.max_unscored (now 0.3)" in caught.value.hint


def test_the_share_is_over_all_processes(six: Samples) -> None:
    # Three samples of six are lost here, and none of the other process's six.
    half = fixed([None, None, None, 0.5, 0.5, 0.5])

    def gather(values: Tensor) -> Tensor:
        other = torch.tensor([6]) if values.ndim == 1 else torch.zeros_like(values)
        return torch.cat([values, other])

    assert int(score(six, max_unscored=0.25, gather=gather, half=half).scored.sum()) == 3
    with pytest.raises(RewardError, match="scored only 9 of 12 samples"):
        score(six, max_unscored=0.24, gather=gather, half=half)
    with pytest.raises(RewardError, match="scored only 3 of 6 samples"):
        score(six, max_unscored=0.25, half=half)


def test_a_reward_that_raises_costs_only_its_group(six: Samples, caplog: pytest.LogCaptureFixture) -> None:
    def picky(samples: Samples) -> tuple[Tensor, Mapping[str, Tensor]]:
        if any(prompt.text == "two" for prompt in samples.prompts):
            raise RuntimeError("cannot read 'two'")
        values = samples.index.float()
        return values, {"half": values / 2}

    with caplog.at_level(logging.WARNING):
        scores = score(six, picky=picky)
    assert scores.scored.tolist() == [True, True, False, False, True, True]
    assert scores.raw[scores.scored, 0].tolist() == [0, 1, 4, 5]
    assert scores.components["picky/half"][scores.scored].tolist() == [0, 0.5, 2, 2.5]
    assert scores.components["picky/half"].isnan().tolist() == [False, False, True, True, False, False]
    assert "did not score 2 of 6 samples (masked): RuntimeError: cannot read 'two'" in caplog.text


def test_a_reward_that_always_raises_stops_the_run_with_its_first_words(six: Samples) -> None:
    def broken(samples: Samples) -> Tensor:
        raise OSError("no server")

    with pytest.raises(RewardError, match=r"reward 'broken' scored only 0 of 6 samples: OSError: no server"):
        score(six, max_unscored=0.99, broken=broken)


@pytest.mark.parametrize("values", [torch.zeros(5), torch.zeros(6, 1), torch.zeros(()), [0.0] * 7])
def test_a_wrong_length_is_an_error_and_is_never_spread(six: Samples, values: Tensor | list[float]) -> None:
    with pytest.raises(
        RewardError, match=r"ValueError: the reward returned shape \(.*\) for 6 samples; it must be \(6,\)"
    ):
        score(six, max_unscored=0.5, long=fixed(values))


def test_a_component_of_a_wrong_length_is_an_error_too(six: Samples) -> None:
    with pytest.raises(RewardError, match="for 6 samples"):
        score(six, max_unscored=0.5, parts=lambda samples: (torch.zeros(6), {"part": torch.zeros(3)}))


def test_components_carry_their_rewards_name_and_do_not_count(six: Samples) -> None:
    scores = score(
        six,
        first=lambda samples: (torch.ones(6), {"part": [0.5, None, 1, 1, 1, 1]}),
        second=lambda samples: (torch.ones(6), {"part": torch.zeros(6, dtype=torch.bool)}),
    )
    assert set(scores.components) == {"first/part", "second/part"}
    assert scores.components["first/part"].isnan().tolist() == [False, True] + [False] * 4
    assert scores.components["second/part"].dtype == torch.float32
    assert scores.total.tolist() == [2.0] * 6
    assert scores.scored.all()


def test_rewards_see_the_whole_share_in_one_call(six: Samples) -> None:
    sizes: list[int] = []

    def groupwise(samples: Samples) -> Tensor:
        sizes.append(len(samples))
        return samples.group.float()

    score(six, groupwise=groupwise)
    assert sizes == [6]


def test_a_process_without_samples_asks_no_reward(six: Samples) -> None:
    def never(samples: Samples) -> Tensor:
        raise AssertionError("asked")

    scores = score(six.select(torch.arange(0)), never=never)
    assert scores.raw.shape == (0, 1)
    assert scores.total.shape == (0,)


def test_no_gradient_passes_a_reward(six: Samples) -> None:
    weight = torch.ones(6, requires_grad=True)
    assert not score(six, leaf=fixed(weight * 2)).total.requires_grad


def test_the_gradient_is_that_of_the_rewards_that_count(six: Samples) -> None:
    def smooth(samples: Samples) -> Tensor:
        return samples.media.square().mean((1, 2, 3))

    def blind(samples: Samples) -> Tensor:
        raise AssertionError("asked")

    media = six.media + 0.5
    rewards = (WeightedReward("blind", blind, 0.0), WeightedReward("smooth", smooth, -2.0))
    leaf = media.clone().requires_grad_()
    total = Scoring(rewards).with_gradient(leaf, six.prompts)
    torch.testing.assert_close(total, torch.full((6,), -0.5))
    (gradient,) = torch.autograd.grad(total.sum(), leaf)
    torch.testing.assert_close(gradient, -2 * 2 * media / media[0].numel())


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.1])
def test_a_reward_that_counts_must_pass_a_gradient(six: Samples, weight: float) -> None:
    def blind(samples: Samples) -> Tensor:
        return samples.media.detach().mean((1, 2, 3))

    scoring = Scoring((WeightedReward("blind", blind, weight),))
    with pytest.raises(RewardError, match="reward 'blind' passes no gradient back to the picture") as caught:
        scoring.with_gradient(six.media.clone().requires_grad_(), six.prompts)
    assert caught.value.where == "rewards.blind"


def test_a_reward_that_is_only_watched_masks_nobody(six: Samples) -> None:
    scores = score(six, good=fixed([1.0] * 6), watched=fixed([None] * 6), weights={"watched": 0.0})
    assert scores.scored.all()
    assert scores.total.tolist() == [1.0] * 6
    assert not scores.valid[:, 1].any(), "what it did not score is still known"


# ---- what the recipe makes of the numbers ----------------------------------------------------------------------------


class Worse:
    """Less is better."""

    higher_is_better = False
    range = (0.0, 4.0)

    def __call__(self, samples: Samples) -> Tensor:
        return torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 1.0])


def alone(values: Tensor) -> Tensor:
    return values


def test_a_number_is_turned_shifted_scaled_and_clipped_and_kept_as_it_was(six: Samples) -> None:
    entry = WeightedReward("worse", Worse(), 2.0, shift=-4.0, scale=0.25, clip=(0.25, 1.0))
    scores = Scoring((entry,))(six, alone)
    assert scores.raw[:, 0].tolist() == [0, 1, 2, 3, 4, 1]
    assert scores.used[:, 0].tolist() == [1, 0.75, 0.5, 0.25, 0.25, 0.75]
    assert scores.total.tolist() == [2, 1.5, 1, 0.5, 0.5, 1.5]
    assert entry.bounds == (0.25, 1.0)
    assert WeightedReward("worse", Worse(), 1.0).bounds == (-4.0, 0.0)
    assert WeightedReward("any", fixed([]), 1.0, scale=-2.0).bounds == (-math.inf, math.inf)  # type: ignore[arg-type]


def test_the_gradient_is_that_of_the_value(six: Samples) -> None:
    class Dark:
        higher_is_better = False

        def __call__(self, samples: Samples) -> Tensor:
            return samples.media.mean((1, 2, 3))

    leaf = six.media.clone().requires_grad_()
    total = Scoring((WeightedReward("dark", Dark(), 2.0, shift=-1.0, scale=0.5),)).with_gradient(leaf, six.prompts)
    torch.testing.assert_close(total, 1 - leaf.mean((1, 2, 3)))


def test_a_reward_for_evaluation_is_not_asked_in_training(six: Samples) -> None:
    asked: list[int] = []

    def slow(samples: Samples) -> Tensor:
        asked.append(len(samples))
        return torch.full((len(samples),), 0.5)

    scoring = Scoring((WeightedReward("fast", fixed([1.0] * 6), 1.0), WeightedReward("slow", slow, 0.0, "evaluation")))  # type: ignore[arg-type]
    assert scoring(six, alone).names == ("fast",)
    assert not asked
    held_out = scoring(six, alone, held_out=True)
    assert held_out.names == ("fast", "slow")
    assert held_out.raw[:, 1].tolist() == [0.5] * 6
    assert held_out.total.tolist() == [1.0] * 6


def test_a_total_that_is_more_than_a_sum(six: Samples) -> None:
    def judge(samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor([0.64] * 6), {"following": torch.tensor([0.9, 0.9, 0.2, 0.2, 0.9, math.nan])}

    rewards = (WeightedReward("judge", judge, 1.0), WeightedReward("looks", fixed([0.25] * 6), 1.0))  # type: ignore[arg-type]
    total = Total("geometric_mean", (Gate("judge/following < 0.5", at_most=0.1),))
    scores = Scoring(rewards, max_unscored=0.2, total=total)(six, alone)
    assert scores.total[:5].tolist() == pytest.approx([0.4, 0.4, 0.1, 0.1, 0.4])
    assert scores.scored.tolist() == [True] * 5 + [False], "what the gate cannot see is masked"
    with pytest.raises(RewardError, match="1 of 6 samples have no total: a gate reads a component that was not given"):
        Scoring(rewards, max_unscored=0.1, total=total)(six, alone)


def test_what_a_scoring_loaded_is_closed(six: Samples) -> None:
    class Loaded:
        def __init__(self) -> None:
            self.open = 0

        def load(self, device: torch.device) -> "Loaded":
            self.open += 1
            return self

        def __call__(self, samples: Samples) -> Tensor:
            return torch.zeros(len(samples))

        def close(self) -> None:
            self.open -= 1

    reward = Loaded()
    scoring = Scoring((WeightedReward("loaded", reward, 1.0),))
    assert reward.open == 0, "nothing is loaded before it is needed"
    scoring(six, alone)
    scoring(six, alone)
    assert reward.open == 1
    scoring.close()
    assert reward.open == 0


# ---- which advantage -------------------------------------------------------------------------------------------------


def test_several_rewards_are_normalised_one_by_one_unless_the_recipe_says_otherwise(
    six: Samples, context: Callable[..., Context]
) -> None:
    """A reward with a large scale rules a sum: GDPO gives each its weight."""
    large, small = [0.0, 100.0] * 3, [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    both = score(six, large=fixed(large), small=fixed(small))
    one = score(six, large=fixed(large), small=fixed(small), weights={"small": 0.0})
    formed = replace(both, combined=both.total)
    here = context()
    shared = (4 / 6 * 4) ** 0.5 / 2  # the root mean square of 0, 0, -2, 2, -2, 2, by which they are divided, halved
    expected = [0, 0, -1 / shared, 1 / shared, -1 / shared, 1 / shared]
    assert advantage.of_step(None, six, both, here).tolist() == pytest.approx(expected, abs=1e-3)
    assert advantage.of_step(None, six, one, here).tolist() == pytest.approx([-1, 1] * 3, abs=1e-4)
    assert advantage.of_step("group_norm", six, both, here).tolist() == pytest.approx([-1, 1] * 3, abs=1e-4)
    assert advantage.of_step(None, six, formed, here).tolist() == pytest.approx([-1, 1] * 3, abs=1e-4)
    assert advantage.of_step(None, six, one, here, "no_std").tolist() == pytest.approx([-50, 50] * 3)


def test_gdpo_passes_over_what_is_only_watched(six: Samples, context: Callable[..., Context]) -> None:
    rewards = {"a": fixed([0.0, 1.0] * 3), "b": fixed([0.0, 1.0] * 3), "watched": fixed([None] * 6)}
    scores = score(six, weights={"watched": 0.0}, **rewards)
    assert advantage.of_step(None, six, scores, context()).tolist() == pytest.approx([-1, 1] * 3, abs=1e-3)
