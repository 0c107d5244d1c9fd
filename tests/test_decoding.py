"""Sampling answers: the distribution, what a row may depend on, and what is read how often."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_llm
from torch import Tensor
from torch.func import functional_call

from rlkit import decoding
from rlkit.errors import LossError
from rlkit.types import Condition, Prompt, TokenModel, generator

MOST, TEMPERATURE = 12, 0.7
FAMILIES = ("qwen2.5 tied", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PICTURE, OTHER = conforms.picture("one", 60, 90), conforms.picture("other", 70, 40)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TokenModel]:
    """Models by their family, each loaded anew from a folder that is written once."""
    folders: dict[str, Path] = {}

    def model(family: str) -> TokenModel:
        if family not in folders:
            folders[family] = tiny_llm.save(tmp_path_factory.mktemp("decoding"), family)
        options = {"pixels": [1024, 96 * 96]} if family in tiny_llm.SEEING else {}
        return tiny_llm.loaded(folders[family], **options)

    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, load: Callable[[str], TokenModel]) -> TokenModel:
    return load(request.param)


def prompts(model: TokenModel) -> list[Condition]:
    """Three of different length, two with pictures where the model sees."""
    seen = "caption" in model.tasks
    return model.encode(
        [
            Prompt(0, "a red circle", source=PICTURE if seen else None),
            Prompt(1, "two"),
            Prompt(2, "", source=OTHER if seen else None, references=(PICTURE,) if seen else ()),
        ]
    )


def sampled(model: TokenModel, conditions: list[Condition], **options: Any) -> decoding.Answers:
    """With a generator for each row that `first` counts on from."""
    first = options.pop("first", 0)
    draws = [generator("row", first + i) for i in range(len(conditions))]
    settings = {"call": model.net, "most": MOST, "temperature": TEMPERATURE} | options
    return decoding.sample(model, conditions=conditions, draws=draws, **settings)


# ---- the distribution ------------------------------------------------------------------------------------------------


def drawn(shares: list[float], uniform: list[float], temperature: float = 1.0) -> tuple[list[int], list[float]]:
    logits = torch.tensor(shares).log().expand(len(uniform), -1) + 3.0
    tokens, log_probs = decoding.choose(logits, torch.tensor(uniform, dtype=torch.float64), temperature)
    return tokens.tolist(), log_probs.tolist()


def test_a_number_becomes_the_token_whose_share_it_falls_into() -> None:
    tokens, log_probs = drawn([0.25, 0.25, 0.5], [0.0, 0.24, 0.26, 0.49, 0.51, 1 - 2**-53])
    assert tokens == [0, 0, 1, 1, 2, 2]
    assert log_probs == pytest.approx([math.log(one) for one in (0.25, 0.25, 0.25, 0.25, 0.5, 0.5)])


def test_a_temperature_is_part_of_the_distribution_and_of_its_density() -> None:
    # squares of 1, 2, 3 of 14: at a temperature of a half
    tokens, log_probs = drawn([1 / 6, 2 / 6, 3 / 6], [0.9 / 14, 1.1 / 14, 4.9 / 14, 5.1 / 14], 0.5)
    assert tokens == [0, 1, 1, 2]
    assert log_probs == pytest.approx([math.log(one / 14) for one in (1, 4, 4, 9)])


def test_without_a_temperature_the_likeliest_token_is_taken() -> None:
    tokens, log_probs = drawn([0.3, 0.5, 0.2], [0.0, 0.99], 0.0)
    assert tokens == [1, 1]
    assert log_probs == pytest.approx([math.log(0.5)] * 2), "its density is that at a temperature of 1"


def test_a_token_of_no_probability_is_never_drawn() -> None:
    tokens, _ = drawn([0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.49999, 0.5, 1 - 2**-53])
    assert tokens == [1, 1, 3, 3]


def test_small_shares_of_a_large_vocabulary_are_not_rounded_away() -> None:
    shares = torch.ones(150_000)
    uniform = torch.tensor([0.123456, 0.5, 0.987654], dtype=torch.float64)
    tokens, _ = decoding.choose(shares.expand(3, -1), uniform, 1.0)
    assert (tokens - (uniform * 150_000).long()).abs().max() <= 1


def test_weights_that_have_diverged_are_not_sampled_from(load: Callable[[str], TokenModel]) -> None:
    model = load("qwen3")
    with torch.no_grad():
        model.net.lm_head.weight[3] = torch.nan
    with pytest.raises(LossError, match="logits are not finite"):
        sampled(model, prompts(model))


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def densities(model: TokenModel, condition: Condition, answer: list[int], temperature: float) -> Tensor:
    """Of an answer's tokens, by the network without memory."""
    ids = torch.cat([condition["ids"], torch.tensor(answer)])[None]
    with torch.no_grad():
        logits = model.logits(model.net, ids, torch.ones_like(ids, dtype=torch.bool), model.collate([condition]))
    said = torch.log_softmax(logits.float() / temperature, dim=-1)[0, len(condition["ids"]) - 1 : -1]
    return said.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [0.7, 1.3, 0.0])
def test_log_probabilities_are_those_of_the_network_without_memory(model: TokenModel, temperature: float) -> None:
    conditions = prompts(model)
    answers = sampled(model, conditions, temperature=temperature)
    for condition, ids, log_probs in zip(conditions, answers.ids, answers.log_probs, strict=True):
        assert len(ids) == len(log_probs) > 0
        whole = densities(model, condition, ids, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(log_probs), whole, rtol=0, atol=1e-5)


def test_the_likeliest_answer_is_that_of_transformers(model: TokenModel) -> None:
    conditions = prompts(model)
    answers = sampled(model, conditions, temperature=0.0)
    for condition, ids in zip(conditions, answers.ids, strict=True):
        options: dict[str, Any] = {
            "input_ids": condition["ids"][None],
            "attention_mask": torch.ones(1, len(condition["ids"])),
        }
        if len(condition.get("grids", ())):
            kinds = (options["input_ids"] == model.net.config.image_token_id).int()
            options |= {"pixel_values": condition["pixels"], "image_grid_thw": condition["grids"]}
            options["mm_token_type_ids"] = kinds
        theirs = model.net.generate(**options, max_new_tokens=MOST, do_sample=False)[0, len(condition["ids"]) :]
        assert theirs.tolist() == ids
    assert len({tuple(ids) for ids in answers.ids}) > 1, "the prompts are read"


# ---- what a row depends on -------------------------------------------------------------------------------------------


def test_a_row_says_what_it_says_alone(model: TokenModel) -> None:
    conditions = [prompts(model)[i] for i in (0, 1, 2, 1, 0, 0)]
    together = sampled(model, conditions)
    for row, condition in enumerate(conditions):
        alone = sampled(model, [condition], first=row)
        assert alone.ids[0] == together.ids[row]
        assert alone.finished[0] == together.finished[row]
        assert alone.log_probs[0] == pytest.approx(together.log_probs[row], abs=1e-5)
    assert len({tuple(ids) for ids in together.ids}) == 6, "each row has randomness of its own"


def test_what_was_read_before_is_forgotten(load: Callable[[str], TokenModel]) -> None:
    """The network remembers where the pictures of a batch moved the words to; it may not be asked."""
    model = load("qwen2_5_vl")
    conditions = prompts(model)
    fresh = sampled(model, conditions[1:2]).ids
    model.net.model.rope_deltas = torch.tensor([[-40]])
    assert sampled(model, conditions[1:2]).ids == fresh
    assert sampled(model, conditions[:1]).ids != fresh


def test_a_higher_limit_makes_an_answer_longer_and_no_other(load: Callable[[str], TokenModel]) -> None:
    model = load("qwen3")
    short, long = (sampled(model, prompts(model), most=most).ids for most in (5, 40))
    assert [ids[:5] for ids in long] == short
    assert max(map(len, long)) == 40


def test_a_row_ends_with_a_token_for_the_end_or_at_a_limit(load: Callable[[str], TokenModel]) -> None:
    model = load("qwen3")
    conditions = prompts(model) * 4
    free = sampled(replace(model, ends=()), conditions, most=30)
    assert free.finished == [False] * 12
    ends = (free.ids[0][7], free.ids[5][2])  # so that some rows end, and at different times
    answers = sampled(replace(model, ends=ends), conditions, most=30)
    for ids, log_probs, whole, finished in zip(answers.ids, answers.log_probs, free.ids, answers.finished, strict=True):
        last = next((i for i, token in enumerate(whole) if token in ends), None)
        assert ids == (whole if last is None else whole[: last + 1]), "the token that ends is a part of the answer"
        assert len(log_probs) == len(ids)
        assert finished == (last is not None)
    assert len({len(ids) for ids in answers.ids}) > 3
    assert not all(answers.finished)


def test_an_answer_is_cut_where_the_sequence_is_full(load: Callable[[str], TokenModel]) -> None:
    model = replace(load("qwen3"), ends=())
    conditions = prompts(model)
    longest = max(len(one["ids"]) for one in conditions) + 2
    answers = sampled(replace(model, longest=longest), conditions)
    assert [len(ids) for ids in answers.ids] == [min(MOST, longest - len(one["ids"])) for one in conditions]
    assert answers.finished == [False] * 3
    with pytest.raises(ValueError, match=f"a prompt of {longest - 2} tokens leaves no room for an answer within"):
        sampled(replace(model, longest=longest - 2), conditions)


def test_a_deterministic_run_draws_the_same(load: Callable[[str], TokenModel]) -> None:
    model = load("qwen3")
    usual = sampled(model, prompts(model))
    torch.use_deterministic_algorithms(True)
    try:
        assert sampled(model, prompts(model)) == usual
    finally:
        torch.use_deterministic_algorithms(False)


# ---- which weights, and what they read -------------------------------------------------------------------------------


def test_another_set_of_weights_may_stand_in(load: Callable[[str], TokenModel]) -> None:
    model = load("qwen2.5 tied")
    conditions = prompts(model)
    name = "model.layers.0.mlp.down_proj.weight"
    weights = {name: -model.net.get_parameter(name).detach()}
    other = sampled(model, conditions, call=lambda *args, **options: functional_call(model.net, weights, args, options))
    assert other.ids != sampled(model, conditions).ids
    with torch.no_grad():
        model.net.get_parameter(name).neg_()
    assert sampled(model, conditions) == other


def watched(model: TokenModel) -> tuple[Callable[..., Any], list[tuple[int, int, bool]]]:
    """The network, and what it is asked to read: rows, columns, and whether pictures."""
    read: list[tuple[int, int, bool]] = []

    def call(**options: Any) -> Any:
        read.append((*options["input_ids"].shape, "pixel_values" in options))
        return model.net(**options)

    return call, read


def test_each_token_is_read_once_and_a_shared_prompt_once_for_all(load: Callable[[str], TokenModel]) -> None:
    model = replace(load("qwen3_vl"), ends=())
    one, two, _ = prompts(model)
    call, read = watched(model)
    answers = sampled(model, [one, two, one, one], call=call, most=4)
    assert read == [(2, len(one["ids"]), True), *[(4, 1, False)] * 3], "the last token is not read at all"
    copies = [dict(one), two, dict(one), dict(one)]  # as long as they are other objects, they are other prompts
    call, read = watched(model)
    assert sampled(model, copies, call=call, most=4).ids == answers.ids
    assert read[0] == (4, len(one["ids"]), True)


def test_rows_that_ended_leave_once_they_are_half(load: Callable[[str], TokenModel]) -> None:
    model = replace(load("qwen3"), ends=())
    conditions = prompts(model)
    room = [len(one["ids"]) for one in conditions]
    assert room[1] < room[0]
    tight = replace(model, longest=room[0] + 2)  # row 0 has two tokens, and row 1 as many as the limit
    call, read = watched(model)
    answers = sampled(tight, [conditions[0], conditions[1]], call=call, most=6)
    assert [len(ids) for ids in answers.ids] == [2, 6]
    assert [rows for rows, _, _ in read] == [2, 2, 1, 1, 1, 1]
    assert answers.ids[1] == sampled(tight, [conditions[1]], first=1, most=6).ids[0]


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_it_remembers_where_training_computes_activations_again(load: Callable[[str], TokenModel], family: str) -> None:
    model = load(family)
    usual = sampled(model, prompts(model))
    model.net.enable_gradient_checkpointing()
    again = sampled(model, prompts(model))
    assert again.ids == usual.ids
    for condition, ids, log_probs in zip(prompts(model), again.ids, again.log_probs, strict=True):
        torch.testing.assert_close(
            torch.tensor(log_probs), densities(model, condition, ids, TEMPERATURE), atol=1e-5, rtol=0
        )


def test_a_model_is_sampled_without_gradient(load: Callable[[str], TokenModel]) -> None:
    model = load("qwen3")
    seen = []
    model.net.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    sampled(model, prompts(model), most=2)
    assert seen == [False, False]


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_no_prompts_are_no_answers(load: Callable[[str], TokenModel]) -> None:
    assert sampled(load("qwen3"), []) == decoding.Answers([], [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 0}, "most must be 1 or more, not 0"),
        ({"temperature": -0.1}, "temperature must be 0 .* or more, not -0.1"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1 \(all tokens\), not 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_p": math.nan}, "top_p must be above 0"),
    ],
)
def test_what_can_not_be_sampled_is_refused(
    load: Callable[[str], TokenModel], options: dict[str, float], message: str
) -> None:
    model = load("qwen3")
    with pytest.raises(ValueError, match=message):
        sampled(model, prompts(model), **options)


def test_each_row_needs_a_generator(load: Callable[[str], TokenModel]) -> None:
    model = load("qwen3")
    with pytest.raises(ValueError, match="3 rows need a generator each, not 1 in all"):
        decoding.sample(model, model.net, prompts(model), [generator("one")], MOST, 1.0)
