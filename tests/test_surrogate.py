"""The policy gradient on a path: ratio corrections by their closed forms, masks that open where they should."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit import flow, surrogate
from rlkit.algorithms.flow_grpo import FlowGRPO
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.policy import Policy
from rlkit.rollouts.local import Local
from rlkit.types import Context, FlowRows, Prompt

MakeContext = Callable[..., Context]
D = 4096  # values a latent
PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group=3)


@dataclass(frozen=True)
class Velocity:
    """A model that answers with what it holds."""

    v: Tensor

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[str]) -> Tensor:
        return self.v


@dataclass(frozen=True)
class Fixed:
    """Models whose current and reference velocities are given tensors."""

    current: Velocity
    reference: Velocity

    @property
    def old(self) -> Velocity:
        raise AssertionError("a loss on the path has the old policy in its rows")

    @property
    def old_is_current(self) -> bool:
        raise AssertionError("nor does it ask whether it has moved")

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError

    def score(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise AssertionError


def rows_of(sigma: list[float], advantage: list[float], old_v: Tensor, level: float = 0.7) -> FlowRows:
    """One row per sigma, each 0.1 long, drawn from the policy whose velocity is `old_v`."""
    n = len(sigma)
    start = torch.tensor(sigma)
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(1))
    mean, std = flow.sde_step(x, old_v, start, start - 0.1, level, "flow", 0.9)
    x_next = mean + std * torch.randn(n, D, generator=torch.Generator().manual_seed(2))
    return FlowRows(
        row=torch.arange(n),
        x=x,
        x_next=x_next,
        sigma=start,
        sigma_next=start - 0.1,
        sigma_max=torch.tensor(0.9),
        noise_level=torch.full((n,), level),
        decision=torch.arange(n),
        old_mean=mean,
        old_log_prob=flow.log_prob(x_next, mean, std),
        advantage=torch.tensor(advantage),
        weight=torch.ones(n),
        cond=("a",) * n,
    )


def models(v: Tensor, reference: Tensor | None = None) -> Any:
    return Fixed(Velocity(v), Velocity(v if reference is None else reference))


def moved(n: int, size: float = 1e-2) -> tuple[Tensor, Tensor]:
    """(velocities of the old policy, of one that has moved)."""
    old = torch.randn(n, D, generator=torch.Generator().manual_seed(3))
    return old, old + size * torch.randn(n, D, generator=torch.Generator().manual_seed(4))


SIGMAS = [0.9, 0.5, 0.2]


def test_the_guarded_exponent_is_the_mean_of_noise_times_shift() -> None:
    # std (log-ratio + bias), as the paper has it: no bias is left, and no step is louder than another.
    old, new = moved(3, size=0.3)
    rows = rows_of(SIGMAS, [1.0, 1.0, 1.0], old)
    step = (rows.sigma, rows.sigma_next, rows.noise_level, "flow", rows.sigma_max)
    mean, std = flow.sde_step(rows.x, new, *step)
    log_ratio = flow.log_prob(rows.x_next, mean, std) - rows.old_log_prob
    bias = (mean - rows.old_mean).square().mean(1) / (2 * std.flatten() ** 2)
    expected = (log_ratio + bias) * std.flatten()
    result = surrogate.path_loss(models(new), rows, dynamics="flow", clip=1.0, trust="guard")
    torch.testing.assert_close(result.metrics["ratio/mean"].log(), expected, rtol=1e-2, atol=1e-6)
    assert (bias * std.flatten() > 10 * expected.abs()).any(), "without the correction the bias rules"


def test_the_guarded_loss_is_divided_by_the_step_length() -> None:
    old, _ = moved(3)
    rows = rows_of(SIGMAS, [1.0, -2.0, 0.5], old)
    result = surrogate.path_loss(models(old), rows, dynamics="flow", clip=1e-4, trust="guard")
    value, _ = result.terms["policy"]
    torch.testing.assert_close(value, -rows.advantage / 0.1, rtol=1e-4, atol=0)


def test_a_grown_divergence_stops_what_would_enlarge_it_and_nothing_else() -> None:
    old, new = moved(2)
    rows = rows_of([0.5, 0.5], [1.0, -1.0], old)
    free = surrogate.path_loss(models(new), rows, dynamics="flow", clip=1.0, trust="divergence")
    assert free.metrics["clip_fraction"].tolist() == [0.0, 0.0], "below the threshold nothing is left out"
    for sign in (1.0, -1.0):
        turned = rows_of([0.5, 0.5], [sign, sign], old)
        result = surrogate.path_loss(models(new), turned, dynamics="flow", clip=1e-12, trust="divergence")
        left_out = (free.metrics["ratio/mean"] - 1) * sign > 0
        assert result.metrics["clip_fraction"].bool().tolist() == left_out.tolist()
        assert (result.terms["policy"][0] == 0).tolist() == left_out.tolist()


def test_a_row_left_out_by_its_divergence_has_no_gradient() -> None:
    old, new = moved(1)
    for sign in (1.0, -1.0):
        rows = rows_of([0.5], [sign], old)
        v = new.clone().requires_grad_()
        result = surrogate.path_loss(models(v), rows, dynamics="flow", clip=1e-12, trust="divergence")
        (gradient,) = torch.autograd.grad(result.terms["policy"][0].sum(), v)
        assert bool(gradient.any()) is (result.metrics["clip_fraction"].item() == 0)


@pytest.mark.parametrize("trust", ["clip", "guard", "divergence"])
@pytest.mark.parametrize(("reduce", "density"), [("mean", "gaussian"), ("mean", "squared"), ("sum", "gaussian")])
@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_the_ratio_is_1_before_an_update_for_every_option(
    toy_policy: Policy, context: MakeContext, trust: Any, reduce: Any, density: Any, dynamics: Any
) -> None:
    if trust == "guard" and reduce == "sum":
        pytest.skip("refused by Flow-GRPO")
    algorithm = FlowGRPO(dynamics=dynamics, noise_level=0.5, trust=trust, reduce=reduce, density=density, window=4)
    samples = Local(steps=6).start(toy_policy, Processes()).collect(PROMPTS, algorithm.plan(context()), context())
    rows = FlowRows.from_path(samples, torch.ones(6), torch.ones(6, dtype=torch.bool))
    result = algorithm.loss(toy_policy.models, rows)
    assert result.metrics["ratio/deviation"].max() <= 1e-5


def test_a_sum_is_the_mean_of_D_values_to_the_Dth_power() -> None:
    old, new = moved(3, size=1e-3)
    rows = rows_of(SIGMAS, [1.0, 1.0, 1.0], old)
    mean = surrogate.path_loss(models(new), rows, dynamics="flow", clip=1.0).metrics["ratio/mean"]
    total = surrogate.path_loss(models(new), rows, dynamics="flow", clip=1.0, reduce="sum").metrics["ratio/mean"]
    torch.testing.assert_close(total.log(), mean.double().log().float() * D, rtol=2e-2, atol=1e-3)


def test_a_squared_density_is_2_variances_times_the_gaussian_one() -> None:
    old, new = moved(3)
    rows = rows_of(SIGMAS, [1.0, 1.0, 1.0], old)
    _, std = flow.sde_step(rows.x, old, rows.sigma, rows.sigma_next, 0.7, "flow", 0.9)
    gaussian = surrogate.path_loss(models(new), rows, dynamics="flow", clip=1.0).metrics["ratio/mean"].log()
    squared = surrogate.path_loss(models(new), rows, dynamics="flow", clip=1.0, density="squared")
    expected = gaussian * 2 * std.flatten() ** 2
    torch.testing.assert_close(squared.metrics["ratio/mean"].log(), expected, rtol=2e-2, atol=1e-7)


def test_noise_levels_are_the_rows_own() -> None:
    # A batch mixes steps; with calibrated noise each has its level, and one level for all would move the ratio.
    old, _ = moved(3)
    rows = rows_of(SIGMAS, [1.0, 1.0, 1.0], old, level=0.3)
    result = surrogate.path_loss(models(old), rows, dynamics="flow", clip=1e-4)
    assert result.metrics["ratio/deviation"].max() <= 1e-6
