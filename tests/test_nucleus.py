"""Sampling from the likeliest tokens alone: which they are, how often each comes, and what is told of them."""

import math

import pytest
import torch
from backbones import tiny_llm

from rlkit import decoding, registry
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.language import LanguagePolicy
from rlkit.rollouts.local import Local
from rlkit.types import Context, Plan, Prompt, generator

ASKED = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two")), group=4)
KEYS = [prompt.key for prompt in ASKED.prompts for _ in range(4)]
SHARES = [0.05, 0.4, 0.1, 0.3, 0.15]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LanguagePolicy:
    model = tiny_llm.loaded(tiny_llm.save(tmp_path_factory.mktemp("nucleus"), "qwen3"))
    made = LanguagePolicy(model, None, tiny_llm.CPU, "fp32", 0)
    made.conditions.encode(ASKED.prompts)
    return made


def draws() -> list[torch.Generator]:
    return [generator("row", i) for i in range(len(KEYS))]


def drawn(
    shares: list[float], uniform: list[float], temperature: float = 1.0, top_p: float = 1.0
) -> tuple[list[int], list[float]]:
    logits = torch.tensor(shares).log().expand(len(uniform), -1) + 3.0
    tokens, log_probs = decoding.choose(logits, torch.tensor(uniform, dtype=torch.float64), temperature, top_p)
    return tokens.tolist(), log_probs.tolist()


def kept(top_p: float, shares: list[float] = SHARES) -> list[float]:
    return decoding.nucleus(torch.tensor([shares], dtype=torch.float64), top_p)[0].tolist()


@pytest.mark.parametrize(
    ("top_p", "places"),
    [
        (0.01, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.94, [1, 2, 3, 4]),
        (0.96, [*range(5)]),
    ],
)
def test_the_nucleus_is_the_smallest_set_of_the_likeliest_tokens(top_p: float, places: list[int]) -> None:
    assert kept(top_p) == [share if i in places else 0 for i, share in enumerate(SHARES)]


def test_a_set_that_has_the_share_exactly_is_enough() -> None:
    assert kept(0.75, [0.25, 0.5, 0.125, 0.125]) == [0.25, 0.5, 0, 0]
    assert kept(0.5, [0.25, 0.25, 0.25, 0.25]) == [0.25, 0.25, 0, 0], "of equally likely ones the first"


def test_each_row_has_a_nucleus_of_its_own() -> None:
    rows = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.3, 0.6]], dtype=torch.float64)
    assert (decoding.nucleus(rows, 0.8) > 0).tolist() == [[True, False, False], [False, True, True]]


def test_tokens_come_from_the_nucleus_as_often_as_they_are_likely_within_it() -> None:
    """Of .4, .3 and .15 in their order in the vocabulary, over a grid of numbers that is finer than any share."""
    uniform = ((torch.arange(1700, dtype=torch.float64) + 0.5) / 1700).tolist()
    tokens, log_probs = drawn(SHARES, uniform, top_p=0.8)
    counts = [tokens.count(token) for token in range(5)]
    assert counts == [0, 800, 0, 600, 300]
    assert log_probs == pytest.approx([math.log(SHARES[token]) for token in tokens]), "those of the whole distribution"
    assert drawn(SHARES, [0.0, 1 - 2**-53], top_p=0.8)[0] == [1, 4]


def test_a_temperature_comes_before_the_nucleus() -> None:
    # squares of 1, 2, 3 of 14: the likeliest has 9 / 14 at a temperature of a half, and 1 / 2 at 1
    assert set(drawn([1 / 6, 2 / 6, 3 / 6], [0.0, 0.5, 0.999], 0.5, top_p=0.6)[0]) == {2}
    assert set(drawn([1 / 6, 2 / 6, 3 / 6], [0.0, 0.5, 0.999], 1.0, top_p=0.6)[0]) == {1, 2}
    assert drawn([0.3, 0.5, 0.2], [0.99], 0.0, top_p=0.1) == ([1], pytest.approx([math.log(0.5)]))


def test_all_tokens_are_no_nucleus(policy: LanguagePolicy) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "nucleus", lambda *_: pytest.fail("nothing is left out"))
        usual = policy.answer(KEYS, draws(), 8, 0.7, "current")
        assert policy.answer(KEYS, draws(), 8, 0.7, "current", top_p=1.0) == usual
    assert policy.answer(KEYS, draws(), 8, 0.7, "current", top_p=0.3) != usual


def test_the_rollout_samples_from_the_nucleus_and_tells_what_training_computes(policy: LanguagePolicy) -> None:
    context = Context(0, "main", 0, 1, {}, Processes().gather)
    outside = {}
    for top_p in (0.3, 1.0):
        tokens = Local(most=8, top_p=top_p).start(policy, Processes()).collect(ASKED, Plan(), context).tokens
        assert tokens is not None
        with torch.no_grad():
            trained = policy.models.current.log_probs(tokens.ids, tokens.length, KEYS)
            there = torch.arange(tokens.ids.shape[1]) < tokens.length[:, None]
            logits = policy.model.logits(policy.net, tokens.ids, there, {})
        torch.testing.assert_close(trained[tokens.decided], tokens.log_prob[tokens.decided], rtol=0, atol=1e-5)
        probabilities = logits[:, :-1].double().softmax(-1)  # [N, L - 1, V]
        inside = decoding.nucleus(probabilities.flatten(0, 1), 0.3 + 1e-6).view_as(probabilities) > 0
        chosen = inside.gather(-1, tokens.ids[:, 1:, None])[..., 0]
        outside[top_p] = int((~chosen & tokens.decided[:, 1:]).sum())
    assert outside[0.3] == 0
    assert outside[1.0] > 10


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.01, math.nan])
def test_a_recipe_is_told_what_top_p_may_be(top_p: float) -> None:
    with pytest.raises(RecipeError, match="top_p must be above 0 and at most 1"):
        registry.build("rollouts", "local", {"top_p": top_p})
