"""The learner: one gradient for every split, weighted means by hand, and updates that are counted as they happen."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from making import told
from torch import Tensor, nn

from rlkit.dist import Processes
from rlkit.errors import LossError
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.types import Condition, FlowModel, Loss, Models, Rows, generator
from rlkit.weights import ema_decay


@dataclass(frozen=True)
class Line(Rows):
    """Rows of a toy regression: value = slope * x, and two weights."""

    x: Tensor
    weight: Tensor
    other: Tensor


def line(x: list[float], weight: list[float] | None = None, other: list[float] | None = None) -> Line:
    ones = [1.0] * len(x)
    columns = [torch.tensor(column) for column in (x, weight or ones, other or ones)]
    return Line(torch.arange(len(x)), *columns)


class Slope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([2.0]))


def slope_policy() -> Policy:
    """One number to train. The loss reads it directly: only the learner is under test."""

    def velocity(net: nn.Module, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return x

    model = FlowModel(Slope(), velocity, lambda texts: [], lambda x: x, lambda n: torch.zeros(n), (1,), ())
    return Policy(model, None, torch.device("cpu"), "fp32", 0)


def test_the_rate_rises_stays_and_falls() -> None:
    options = LearnerOptions(lr=1.0, batch=1, warmup=4, decay=(10, 20), lr_end=0.2)
    rates = [options.rate(updates) for updates in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[15] == pytest.approx(0.6)
    assert rates[20:] == [pytest.approx(0.2)] * 5
    assert LearnerOptions(lr=1.0, batch=1).rate(10**6) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": (5, 5)}, r"decay must be \[first, last\]"),
        ({"decay": (-1, 5)}, r"decay must be \[first, last\]"),
        ({"lr_end": 0.1}, "lr_end is where `decay` ends"),
        ({"decay": (1, 5), "lr_end": 2.0}, "lr_end must be within"),
    ],
)
def test_a_decay_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerOptions(lr=1.0, batch=1, **options)


def slope_learner(**options: float | None) -> tuple[Learner, Callable[[Models, Line], Loss]]:
    policy = slope_policy()
    slope = policy.trainable["slope"]

    def loss(models: Models, rows: Line) -> Loss:
        return Loss({"rise": (slope * rows.x, rows.weight)}, {"size": rows.x.abs(), "x/deviation": rows.x.abs()})

    numbers = {"lr": 0.1, "batch": 4, "max_grad_norm": 1e9} | options
    return Learner(policy, LearnerOptions(**numbers), Processes()), loss  # type: ignore[arg-type]


def slope_of(learner: Learner) -> float:
    return learner.policy.trainable["slope"].item()


def gradient_of(learner: Learner) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in learner.parameters if parameter.grad is not None]


# ---- the mean --------------------------------------------------------------------------------------------------------


def test_the_mean_is_weighted_and_rows_of_weight_0_do_not_count() -> None:
    learner, loss = slope_learner()
    learner.gradient(loss, learner.policy.models, line([1.0, 3.0, 100.0, 5.0], weight=[1.0, 2.0, 0.0, 1.0]))
    assert learner.parameters[0].grad is not None
    assert learner.parameters[0].grad.item() == pytest.approx((1 + 6 + 5) / 4)
    metrics = learner.metrics()
    assert metrics["loss/rise"] == pytest.approx(2 * 12 / 4)
    assert metrics["size"] == pytest.approx(12 / 4)
    assert metrics["x/deviation"] == 5.0, "a maximum, over the rows that count"


def test_each_term_is_divided_by_its_own_weights() -> None:
    learner, _ = slope_learner()
    slope = learner.policy.trainable["slope"]

    def loss(models: Models, rows: Line) -> Loss:
        terms = {"a": (slope * rows.x, rows.weight), "b": (slope * rows.x**2, rows.other)}
        return Loss(terms | {"c": (slope * 7 * rows.x, rows.weight)})

    rows = line([1.0, 2.0, 3.0], weight=[1.0, 1.0, 0.0], other=[0.0, 0.0, 0.5])
    learner.gradient(loss, learner.policy.models, rows)
    assert gradient_of(learner)[0].item() == pytest.approx((1 + 2) / 2 + 9 + 7 * (1 + 2) / 2)


def test_a_mini_batch_without_a_weight_moves_nothing() -> None:
    learner, loss = slope_learner()
    learner.step(loss, learner.policy.models, line([1.0, 2.0], weight=[0.0, 0.0]))
    learner.step(loss, learner.policy.models, line([]))
    assert slope_of(learner) == 2.0
    metrics = learner.metrics()
    assert "loss/rise" not in metrics
    assert metrics["grad_norm"] == 0


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7, 12, 100])
def test_the_gradient_does_not_depend_on_the_micro_batches(toy_policy: Policy, micro_batch: int) -> None:
    rows = toy_rows(toy_policy, 12)

    def gradient(size: int | None) -> tuple[Tensor, dict[str, float]]:
        learner = Learner(toy_policy, LearnerOptions(lr=0.1, batch=12, micro_batch=size), Processes())
        learner.gradient(two_weightings, toy_policy.models, rows)
        return torch.cat([part.flatten() for part in gradient_of(learner)]).double(), learner.metrics()

    (whole, numbers), (split, same_numbers) = gradient(None), gradient(micro_batch)
    assert whole.norm() > 0.1
    assert (split - whole).norm() / whole.norm() < 1e-6
    assert same_numbers == pytest.approx(numbers, rel=1e-6)


@dataclass(frozen=True)
class ToyRows(Rows):
    x: Tensor
    sigma: Tensor
    weight: Tensor
    other: Tensor
    cond: tuple[str, ...]


def toy_rows(policy: Policy, n: int) -> ToyRows:
    draws = generator("learner")
    texts = tuple(f"prompt {i % 3}" for i in range(n))
    policy.conditions.encode(told(texts))
    x = torch.randn(n, *policy.model.latent_shape, generator=draws)
    weight, other = torch.rand(n, generator=draws), (torch.rand(n, generator=draws) < 0.3).float()
    return ToyRows(torch.arange(n), x, torch.rand(n, generator=draws), weight, other, texts)


def two_weightings(models: Models, rows: ToyRows) -> Loss:
    v = models.current.velocity(rows.x, rows.sigma, rows.cond)
    squared = (v - rows.x).square().flatten(1).mean(1)
    terms = {"near": (squared, rows.weight), "rare": (3 * v.flatten(1).sum(1), rows.other)}
    return Loss(terms | {"also": (squared**2, rows.weight)}, {"size": squared.detach()})


# ---- updates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_a_gradient_that_is_not_finite_stops_and_moves_nothing(micro_batch: int | None) -> None:
    learner, loss = slope_learner(ema=0.9, warmup=4, micro_batch=micro_batch)
    learner.step(loss, learner.policy.models, line([1.0]))
    moved, average = slope_of(learner), learner.policy.sets["ema"]["slope"].clone()
    moments = {name: value.clone() for name, value in learner.state()[0].items()}
    for broken in (math.nan, math.inf):
        with pytest.raises(LossError, match=r"the loss term 'rise' is (nan|-?inf) at row 3$") as caught:
            learner.step(loss, learner.policy.models, line([1.0, 2.0, 3.0, broken, 5.0]))
        assert caught.value.row == 3
    assert slope_of(learner) == moved
    assert torch.equal(learner.policy.sets["ema"]["slope"], average)
    assert all(torch.equal(value, moments[name]) for name, value in learner.state()[0].items())
    assert learner.state()[1] == {"updates": 1}, "neither warm-up nor average counts an update that did not happen"
    learner.step(loss, learner.policy.models, line([1.0]))
    assert slope_of(learner) < moved


def test_warmup_is_linear_in_updates() -> None:
    learner, loss = slope_learner(warmup=4, lr=0.4)
    rates = []
    for _ in range(6):
        learner.step(loss, learner.policy.models, line([1.0]))
        rates.append(learner.metrics()["lr"])
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_ema_moves_once_an_update_and_not_once_a_micro_batch() -> None:
    learner, loss = slope_learner(ema=0.9, micro_batch=1)
    average = slope_of(learner)
    for updates in range(3):
        learner.step(loss, learner.policy.models, line([1.0, 2.0, 3.0, 4.0]))
        decay = ema_decay(updates, 0.9)
        average = decay * average + (1 - decay) * slope_of(learner)
    assert learner.policy.sets["ema"]["slope"].item() == pytest.approx(average, rel=1e-6)
    assert learner.updates == 3


def test_an_average_that_is_there_is_kept_by_the_next_stage() -> None:
    policy = slope_policy()
    options = LearnerOptions(lr=0.1, batch=1, ema=0.9)
    Learner(policy, options, Processes())
    kept = policy.sets["ema"]
    Learner(policy, options, Processes())
    assert policy.sets["ema"] is kept


def test_the_gradient_is_clipped_and_its_norm_is_of_before() -> None:
    learner, loss = slope_learner(max_grad_norm=0.5)
    learner.optimizer = torch.optim.SGD(learner.parameters, lr=1.0)  # AdamW would hide the scale
    learner.options = LearnerOptions(lr=1.0, batch=4, max_grad_norm=0.5)
    learner.step(loss, learner.policy.models, line([3.0]))
    assert slope_of(learner) == pytest.approx(2.0 - 0.5, abs=1e-5)
    assert learner.metrics()["grad_norm"] == pytest.approx(3.0)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_rows_not_over_mini_batches_and_start_anew() -> None:
    learner, loss = slope_learner()
    learner.step(loss, learner.policy.models, line([1.0, 1.0, 1.0]))
    learner.step(loss, learner.policy.models, line([5.0]))
    metrics = learner.metrics()
    assert metrics["size"] == pytest.approx(2.0)
    assert metrics["x/deviation"] == 5.0
    assert metrics["grad_norm"] == pytest.approx(3.0), "the mean of 1 and 5"
    assert learner.metrics().keys() == {"lr"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0.0}, "lr must be above 0, not 0.0"),
        ({"lr": math.nan}, "lr must be above 0, not nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0"),
        ({"batch": 0}, "batch must be 1 or more, not 0"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"micro_batch": -2}, "micro_batch must be 1 or more, not -2"),
        ({"ema": 1.0}, r"ema is a decay within \[0, 1\), not 1.0"),
    ],
)
def test_option_errors(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LearnerOptions(**({"lr": 1e-3, "batch": 8} | options))  # type: ignore[arg-type]


def test_the_ends_of_a_range_are_extremes_over_all_rows_and_not_means(toy_policy: Policy) -> None:
    learner = Learner(toy_policy, LearnerOptions(lr=1e-3, batch=4), Processes())
    for part in ([0.5, 2.0], [0.25, 1.5]):
        values = torch.tensor(part)
        learner._note("mismatch/low", values, torch.ones(2))
        learner._note("mismatch/high", values, torch.ones(2))
    learner._note("mismatch/low", torch.tensor([0.1]), torch.zeros(1))  # not counted
    found = learner.metrics()
    assert found["mismatch/low"] == pytest.approx(0.25)
    assert found["mismatch/high"] == pytest.approx(2.0)
