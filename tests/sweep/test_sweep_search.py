"""What a sweep searches with: the values that are drawn, who is stopped early, and where bayes looks next."""

import math
import re
from statistics import NormalDist

import numpy as np
import pytest

from rlkit.sweep import bayes as sweep_bayes
from rlkit.sweep.space import parameter
from rlkit.sweep.stop import Hyperband

# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "low", "middle", "high"),
    [
        ({"value": 7}, 7, 7, 7),
        ({"values": ["a", "b", "c"]}, "a", "b", "c"),
        ({"values": ["a", "b"], "probabilities": [0.0, 1.0]}, "b", "b", "b"),
        ({"values": ["a", "b"], "probabilities": [0.75, 0.25]}, "a", "a", "b"),
        ({"min": 1, "max": 4}, 1, 3, 4),
        ({"min": 1.0, "max": 4}, 1.0, 2.5, 4.0),
        ({"min": 1, "max": 9, "q": 4, "distribution": "q_uniform"}, 4, 4, 8),
        ({"min": 0.3, "max": 0.9, "q": 0.3, "distribution": "q_uniform"}, 0.3, 0.6, 0.9),
        ({"min": -2, "max": 4, "distribution": "log_uniform"}, math.exp(-2), math.e, math.exp(4)),
        ({"min": 1e-5, "max": 1e-1, "distribution": "log_uniform_values"}, 1e-5, 1e-3, 1e-1),
        ({"min": 1, "max": 100, "q": 5, "distribution": "q_log_uniform_values"}, 5, 10, 100),
        ({"min": 0, "max": 2, "q": 2, "distribution": "q_log_uniform"}, 2, 2, 6),
    ],
)
def test_a_value_lies_at_its_share_of_the_probability(node, low, middle, high):
    one = parameter("key", node)
    found = [one.at(share) for share in (0.0, 0.5, 1.0)]
    assert found == [pytest.approx(end, rel=1e-5) if isinstance(end, float) else end for end in (low, middle, high)]
    assert [type(value) for value in found] == [type(end) for end in (low, middle, high)]
    assert [one.at(0.0), one.at(1.0)] == found[::2]


def test_normal_values_have_the_normal_s_quantiles():
    share = NormalDist().cdf(1.0)
    cases = {"normal": 5.0, "log_normal": math.exp(5), "q_normal": 5, "q_log_normal": 148}
    for name, expected in cases.items():
        one = parameter("key", {"distribution": name, "mu": 3, "sigma": 2})
        assert one.at(share) == pytest.approx(expected, rel=1e-5), name
        assert one.place(one.at(share))[0] == pytest.approx(share, abs=0.01)
    assert math.isfinite(parameter("key", {"distribution": "normal"}).at(0.0))


def test_what_a_grid_has_points_for():
    assert parameter("key", {"min": 2, "max": 4}).listed() == [2, 3, 4]
    assert parameter("key", {"min": 0, "max": 9, "q": 3, "distribution": "q_uniform"}).listed() == [0, 3, 6]
    tenths = parameter("key", {"min": 0.0, "max": 0.3, "q": 0.1, "distribution": "q_uniform"})
    assert tenths.listed() == [0.0, 0.1, 0.2], "as W&B counts, without max"
    with pytest.raises(ValueError, match=r"no end of uniform.*method: random"):
        parameter("key", {"min": 0.0, "max": 1.0}).listed()


def test_where_values_lie():
    assert parameter("key", {"values": [10, 1, 100]}).place(10) == (0.5,), "numbers by their order"
    corners = [parameter("key", {"values": ["a", "b"]}).place(value) for value in "ab"]
    assert math.dist(*corners) == pytest.approx(1)
    assert parameter("key", {"value": 3}).place(3) == ()
    logarithmic = parameter("key", {"min": 1e-5, "max": 1e-1, "distribution": "log_uniform_values"})
    assert logarithmic.place(1e-4) == pytest.approx((0.25,))


@pytest.mark.parametrize(
    ("key", "node", "said"),
    [
        ("key", [1, 2], "must be a mapping"),
        ("key", {}, "says not what to try"),
        ("key", {"min": 1}, "int_uniform needs max"),
        ("key", {"min": 1, "max": "1e-4", "distribution": "uniform"}, "write 1.0e-4"),
        ("key", {"min": 2, "max": 1}, "min must be below max"),
        ("key", {"min": 0.5, "max": 2, "distribution": "int_uniform"}, "whole number"),
        ("key", {"min": 0, "max": 1, "distribution": "log_uniform_values"}, "above 0"),
        (
            "key",
            {"min": 0, "max": 1000, "distribution": "log_uniform"},
            "is beyond all numbers; log_uniform_values takes",
        ),
        ("key", {"min": 0, "max": 1000, "distribution": "q_log_uniform"}, "q_log_uniform_values takes"),
        ("key", {"min": 0, "max": 1, "distribution": ["uniform"]}, "no distribution ['uniform']"),
        ("key", {"values": [1, 2], "probabilities": ["5e-1", 0.5]}, "a probability must be a number, not '5e-1'"),
        ("key", {"min": 0, "max": 1, "distribution": "log_uniform_value"}, "Did you mean 'log_uniform_values'"),
        ("key", {"min": 0, "max": 1, "distribution": "beta"}, "no distribution 'beta'"),
        ("key", {"min": 0.0, "max": 1.0, "sigma": 3}, "uniform has no 'sigma'"),
        ("key", {"min": 1, "max": 2, "q": 0, "distribution": "q_uniform"}, "q must be above 0"),
        ("key", {"min": 1, "max": 2, "q": 5, "distribution": "q_uniform"}, "no multiple of q"),
        ("key", {"values": []}, "values is empty"),
        ("key", {"values": "abc"}, "must be a list"),
        ("key", {"values": [1, None]}, "Put it in quotes: 'null'"),
        ("key", {"values": [{"a": 1}]}, "Put it in quotes"),
        ("key", {"values": [[1, [None]]]}, "Put it in quotes"),
        ("key", {"values": [1, 2], "probabilities": [1.0]}, "2 values need as many probabilities"),
        ("key", {"values": [1, 2], "probabilities": [0.7, 0.7]}, "1 in all"),
        ("key", {"parameters": {"a": {"value": 1}}}, "Write the dotted key"),
        ("stages.main.rewards.my.package:Reward", {"value": 1}, "no key that W&B takes"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused(key, node, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parameter(key, node)


# ---- hyperband -------------------------------------------------------------------------------------------------------


def test_the_brackets_are_those_of_wandb():
    assert Hyperband(min_iter=3, eta=2).brackets()[:5] == [3, 6, 12, 24, 48]
    assert Hyperband(max_iter=27, s=2).brackets() == [3, 9]
    assert Hyperband(max_iter=10, s=5, eta=2).brackets() == [1, 2, 5]
    assert Hyperband(min_iter=1, eta=1.5).brackets()[:5] == [1, 2, 3, 5, 7]


def test_who_is_behind_at_a_bracket_is_stopped():
    """The example of W&B's own engine: brackets at 1 and 2, eta 2, a lower value is better."""
    hyperband = Hyperband(max_iter=5, eta=2, s=2)
    assert hyperband.brackets() == [1, 2]
    losses = {"a": [10, 9], "b": [10, 10], "c": [10, 8, 8], "d": [10, 7, 7], "e": [10, 6, 6]}
    running = ["b", "c", "d"]  # at the second value: 6 7 8 9 10, so 8 is the limit
    assert hyperband.losers(losses, running, maximize=False) == {"b": 2}
    gains = {name: [-value for value in values] for name, values in losses.items()}
    assert hyperband.losers(gains, running, maximize=True) == {"b": 2}
    assert hyperband.losers(losses, [], maximize=False) == {}
    assert hyperband.losers(losses, ["new"], maximize=False) == {}, "no value yet"


def test_a_trial_goes_on_between_brackets_and_alone():
    hyperband = Hyperband(min_iter=2, eta=3)
    assert hyperband.losers({"good": [9, 9], "bad": [1]}, ["bad"], maximize=True) == {}
    assert hyperband.losers({"good": [9, 9], "bad": [1, 1]}, ["good", "bad"], maximize=True) == {"bad": 2}
    assert hyperband.losers({"bad": [1, 1]}, ["bad"], maximize=True) == {}


def test_without_strict_the_best_value_so_far_counts():
    values = {"good": [0, 5], "falls": [6, 1]}
    assert Hyperband(min_iter=2).losers(values, ["falls"], maximize=True) == {"falls": 2}
    assert Hyperband(min_iter=2, strict=False).losers(values, ["falls"], maximize=True) == {}


# ---- bayes -----------------------------------------------------------------------------------------------------------


def test_the_expected_improvement_has_its_closed_form():
    found = sweep_bayes.improvement(np.array([0.0, 3.0, -40.0]), np.array([2.0, 1e-9, 1.0]), 0.0)
    assert found == pytest.approx([2 / math.sqrt(2 * math.pi), 3.0, 0.0])


def test_the_process_passes_through_what_it_saw_and_knows_nothing_far_away():
    points, values = np.array([[0.0], [0.5]]), np.array([1.0, -1.0])
    mean, deviation = sweep_bayes.posterior(points, values, np.array([[0.0], [0.5], [99.0]]), 0.2, 1e-9)
    assert mean == pytest.approx([1.0, -1.0, 0.0], abs=1e-6)
    assert deviation == pytest.approx([0.0, 0.0, 1.0], abs=1e-3)


def test_noise_is_found_where_one_setting_brings_different_values():
    points = np.repeat(np.linspace(0, 1, 4), 3)[:, None]
    clean = np.sin(3 * points[:, 0])
    luck = np.tile([-1.0, 0.0, 1.0], 4)
    assert sweep_bayes.likeliest(points, clean - clean.mean())[1] == min(sweep_bayes.NOISES)
    assert sweep_bayes.likeliest(points, luck)[1] == max(sweep_bayes.NOISES)


def test_the_search_comes_near_the_top_and_waits_for_what_is_under_way():
    rng = np.random.default_rng(0)
    points, empty = rng.random((3, 2)), np.zeros((0, 2))

    def height(x):
        return -((x - np.array([0.3, 0.8])) ** 2).sum(-1)

    for _ in range(12):
        candidates = rng.random((200, 2))
        chosen = sweep_bayes.propose(points, height(points), empty, candidates)
        points = np.concatenate([points, candidates[[chosen]]])
    assert height(points).max() > -0.01, "random points come as near as this one time in ten"
    candidates = rng.random((200, 2))
    first = sweep_bayes.propose(points[:4], height(points[:4]), empty, candidates)
    assert sweep_bayes.propose(points[:4], height(points[:4]), candidates[[first]], candidates) != first
    assert sweep_bayes.propose(empty, np.zeros(0), empty, candidates) == 0
