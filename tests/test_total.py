"""Several rewards to one number: the forms by hand, and gates."""

import math

import pytest
import torch
from torch import Tensor

from rlkit.total import Gate, Total

WEIGHTS = torch.tensor([1.0, 3.0, 0.0])
VALUES = torch.tensor([[0.16, 0.81, 9.0], [0.5, 0.0, 9.0], [1.0, 1.0, 9.0]])


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("sum", [2.59, 0.5, 4.0]),
        ("geometric_mean", [0.16**0.25 * 0.81**0.75, 0.0, 1.0]),
        ("product", [0.16 * 0.81**3, 0.0, 1.0]),
        ("minimum", [0.16, 0.0, 1.0]),
    ],
)
def test_the_forms(form: str, expected: list[float]) -> None:
    torch.testing.assert_close(Total(form)(VALUES, WEIGHTS, {}), torch.tensor(expected))  # type: ignore[arg-type]


def test_the_geometric_mean_of_equal_weights_is_vies() -> None:
    """sqrt(SC * PQ), at (8, 2) and (0, 10): a picture that ignores its instruction is worth nothing."""
    values = torch.tensor([[8.0, 2.0], [0.0, 10.0]])
    assert Total("geometric_mean")(values, torch.ones(2), {}).tolist() == pytest.approx([4.0, 0.0])


@pytest.mark.parametrize("form", ["geometric_mean", "product", "minimum"])
def test_a_negative_number_has_no_total_and_a_missing_one_neither(form: str) -> None:
    values = torch.tensor([[-0.1, 0.5], [math.nan, 0.5], [0.5, 0.5]])
    total = Total(form)(values, torch.ones(2), {})  # type: ignore[arg-type]
    assert total.isnan().tolist() == [True, True, False]


def test_a_gate_bounds_the_total_where_its_condition_holds() -> None:
    columns = {"judge/following": torch.tensor([0.4, 0.4, 0.6, math.nan])}
    values = torch.tensor([[1.0], [0.1], [1.0], [1.0]])
    gate = Gate("judge/following < 0.5", at_most=0.2)
    total = Total(gates=(gate,))(values, torch.ones(1), columns)
    assert total[:3].tolist() == pytest.approx([0.2, 0.1, 1.0])
    assert total[3].isnan(), "what the gate cannot see is not let through"


@pytest.mark.parametrize(
    ("sign", "expected"), [("<", [1, 0, 0]), ("<=", [1, 1, 0]), (">", [0, 0, 1]), (">=", [0, 1, 1])]
)
def test_every_comparison(sign: str, expected: list[int]) -> None:
    gate = Gate(f"a {sign} -0.5", at_most=0.0)
    total = Total(gates=(gate,))(torch.ones(3, 1), torch.ones(1), {"a": torch.tensor([-1.0, -0.5, 0.0])})
    assert total.tolist() == [1.0 - one for one in expected]


@pytest.mark.parametrize("when", ["", "a", "a = 1", "a < b", "a < 1 and b < 2", "< 1"])
def test_what_is_no_condition(when: str) -> None:
    with pytest.raises(ValueError, match=r"is no condition\. Write NAME < 0\.5"):
        Gate(when, at_most=0.0)


def test_the_total_passes_the_gradient_on() -> None:
    leaf = torch.tensor([[0.5, 0.25], [0.5, 0.25]], requires_grad=True)
    gate = Gate("a < 0.4", at_most=0.1)
    Total("product", (gate,))(leaf, torch.ones(2), {"a": leaf[:, 1] + torch.tensor([0.0, 1.0])}).sum().backward()
    gradient: Tensor = leaf.grad  # type: ignore[assignment]
    assert gradient.tolist() == [[0.0, 0.0], [0.25, 0.5]], "a bounded total is flat"
