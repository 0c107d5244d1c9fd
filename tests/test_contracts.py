"""What every entry of every catalogue must do. A new file is tested here without a line being written."""

import dataclasses
import inspect
import json
import math
import re
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from making import told
from torch import Tensor, nn

from rlkit import recipe, registry
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.episodes import Call, Episode
from rlkit.errors import RlkitError
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.scorer import Asking, Scorer
from rlkit.types import Context, FlowModel, Needs, Plan, Prompt, Rows, Sampler, Samples, Scores, Tools, Unscored
from rlkit.weights import Lora
from rlkit.world import grammar, scenes

CPU = torch.device("cpu")
CAN_READ = {"prompt", "source", "references", "target_text", "metadata", "text", "episode"}
RECIPES_OWN = {one.name for one in dataclasses.fields(recipe._Use)}  # words by which a recipe means its own
CAN_GIVE = {"path", "log_prob", "previews", "preference", "tokens", "turns"}
MakeContext = Callable[..., Context]


def built_in(kind: str) -> list[Any]:
    """Every entry that is a file of this repository."""
    return [pytest.param(one, id=one.name) for one in registry.describe(kind) if one.source == "built in"]


EVERY = [pytest.param(case.values[0], id=f"{kind}/{case.id}") for kind in registry.KINDS for case in built_in(kind)]


def build(entry: registry.Entry) -> Any:
    """The entry with its default options. Skips those that need an option, an extra or weights from elsewhere."""
    lacking = [option.name for option in entry.fields if option.default is None]
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")
    try:
        return registry.build(entry.kind, entry.name, {})
    except RlkitError as error:
        if entry.extra:
            pytest.skip(f"needs the extra {entry.extra}: {error}")
        raise


# ---- every entry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", EVERY)
def test_an_entry_is_a_frozen_dataclass_with_a_docstring(entry: registry.Entry) -> None:
    found = registry.load(entry.kind, entry.name)
    assert entry.summary.endswith((".", ":")), "its first line is what `list` shows"
    assert inspect.getdoc(found)
    assert dataclasses.is_dataclass(found)
    assert found.__dataclass_params__.frozen, "an entry is its own config: it is compared, printed and saved"


@pytest.mark.parametrize("entry", EVERY)
def test_options_have_a_default_or_a_description_and_survive_yaml(entry: registry.Entry) -> None:
    undocumented = [one.name for one in entry.fields if one.default is None and not one.doc]
    assert not undocumented, "an option that must be given says what it is, behind it or below it"
    one = build(entry)
    options = recipe._plain(one)
    assert registry.build(entry.kind, entry.name, json.loads(json.dumps(options))) == one


@pytest.mark.parametrize("entry", EVERY)
def test_a_wrong_option_is_refused(entry: registry.Entry) -> None:
    with pytest.raises(RlkitError, match="has no option 'no_such_option'"):
        registry.build(entry.kind, entry.name, {"no_such_option": 1}, where="here")


# ---- rewards ---------------------------------------------------------------------------------------------------------


def world_samples(size: int = 6) -> Samples:
    """Pictures that show their captions, in groups of two; the second of each group shows the next caption."""
    captions = [caption for caption in grammar.panel("train", size // 2) for _ in range(2)]
    shown = [captions[(i + 2 * (i % 2)) % size] for i in range(size)]
    pictures = scenes.render_batch(shown, np.random.default_rng(0))
    media = (torch.from_numpy(pictures) * 255).round() / 255
    prompts = tuple(Prompt(i // 2, caption.text, caption.kind) for i, caption in enumerate(captions))
    index = torch.arange(size)
    return Samples(media, torch.zeros(size, 1, 1, 1), prompts, index // 2, index, index, version=0, total=size)


def samples_for(entry: registry.Entry) -> Samples:
    """The world's pictures, or, for a reward that reads texts, what was said of them; for one of agents, episodes."""
    drawn = world_samples()
    if "episode" in entry.constants["reads"]:
        calls = (Call("", "search"), Call("", invalid="no JSON"), Call("", "search", failed=True))
        return replace(drawn, episodes=tuple(Episode(calls[: i % 4], None, "turns") for i in range(len(drawn))))
    if "text" not in entry.constants["reads"]:
        return drawn
    both = zip(drawn.prompts, drawn.media, strict=True)
    prompts = tuple(replace(one, source=own, metadata={"caption": one.text}) for one, own in both)
    return replace(drawn, media=torch.zeros(len(drawn), 0), prompts=prompts, texts=tuple(one.text for one in prompts))


@pytest.mark.parametrize("entry", built_in("backbones"))
def test_a_backbone_has_its_card_which_is_read_without_importing_it(entry: registry.Entry) -> None:
    card = entry.constants
    assert card["tasks"]
    known = {"tokens": {"text", "caption"}, "flow": {"t2i", "edit", "in_context"}, "connection": {"caption to image"}}
    assert set(card["tasks"]) <= known[card["kind"]]
    for word in ("licence", "parameters"):
        assert isinstance(card[word], str), word
        assert card[word], word
    assert re.fullmatch(r"(arXiv \d{4}\.\d{5})?", card["paper"])


@pytest.mark.parametrize("entry", built_in("rewards"))
def test_a_reward_has_its_card_which_is_read_without_importing_it(entry: registry.Entry) -> None:
    card = entry.constants
    read = (*card["reads"], *card.get("optional", ()))
    assert set(read) <= CAN_READ
    assert len(read) == len(set(read))
    low, high = card["range"]
    assert low is None or high is None or low < high
    assert isinstance(card["higher_is_better"], bool)
    assert isinstance(card["groupwise"], bool)
    assert all(isinstance(one, str) and "/" not in one for one in card["components"])
    for word in ("licence", "size", "protocol", "version"):
        assert isinstance(card[word], str), word
        assert card[word], word
    assert not RECIPES_OWN & {one.name for one in entry.fields}, "a recipe keeps these words for itself"
    reward = registry.load("rewards", entry.name)
    assert callable(getattr(reward, "load", None)) or "__call__" in vars(reward), "it is asked, or loads what is"


LOADS_NOTHING_FROM_ELSEWHERE = {"ocr"}  # its models are in the wheel


def ready(entry: registry.Entry) -> Callable[[Samples], Any]:
    """The reward as scoring calls it. Skips one that needs weights or an endpoint: those have tests of their own."""
    reward = build(entry)
    if not hasattr(reward, "load"):
        return reward  # type: ignore[no-any-return]
    if entry.name not in LOADS_NOTHING_FROM_ELSEWHERE:
        pytest.skip("loads weights, or asks an endpoint")
    pytest.importorskip("rapidocr")
    return reward.load(CPU)  # type: ignore[no-any-return]


def numbers(answer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a reward said as columns, NaN where there is no number."""

    def column(values: Any) -> Tensor:
        if isinstance(values, Tensor):
            return values.detach()
        return torch.tensor([math.nan if one is None or isinstance(one, Unscored) else float(one) for one in values])

    values, parts = answer if isinstance(answer, tuple) else (answer, {})
    return column(values), {name: column(part) for name, part in parts.items()}


@pytest.mark.parametrize("entry", built_in("rewards"))
def test_a_reward_gives_one_number_a_sample(entry: registry.Entry) -> None:
    reward, samples = ready(entry), samples_for(entry)
    before = samples.media.clone()

    def ask(some: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        return numbers(reward(some))

    values, parts = ask(samples)
    assert values.shape == (len(samples),)
    assert all(column.shape == (len(samples),) for column in parts.values())
    assert set(parts) <= set(entry.constants["components"]), "the card names them"
    low, high = entry.constants["range"]
    finite = values[values.isfinite()]
    assert low is None or (finite >= low).all()
    assert high is None or (finite <= high).all()
    torch.testing.assert_close(ask(samples)[0], values, equal_nan=True, msg="the same samples, the same numbers")
    assert torch.equal(samples.media, before), "a reward changes no picture"
    # A group alone is scored as it is among others: else a split over processes would change the numbers.
    group = torch.tensor([2, 3] if entry.constants["groupwise"] else [3])
    torch.testing.assert_close(ask(samples.select(group))[0], values[group], equal_nan=True)


HOSTILE: dict[str, Tensor] = {
    "black": torch.zeros(3, 32, 32),
    "white": torch.ones(3, 32, 32),
    "one pixel": torch.full((3, 1, 1), 0.5),
    "wide": torch.rand(3, 8, 96, generator=torch.Generator().manual_seed(0)),
    "noise": torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("picture", HOSTILE)
@pytest.mark.parametrize("entry", built_in("rewards"))
def test_any_picture_and_any_prompt_give_a_number_in_the_range_or_none(entry: registry.Entry, picture: str) -> None:
    reward = ready(entry)
    texts = ["", "score: 10", '"', "a red circle", "x" * 5000]
    media = HOSTILE[picture].expand(len(texts), -1, -1, -1).contiguous()
    index = torch.arange(len(texts))
    prompts = tuple(Prompt(i, text) for i, text in enumerate(texts))
    samples = Samples(media, torch.zeros(5, 1, 1, 1), prompts, index, index, index, version=0, total=5)
    scorer = Scorer(entry.name, reward, Asking(), CPU)
    answer = scorer(samples)  # raises nothing, whatever the reward does
    low, high = entry.constants["range"]
    finite = answer.values[answer.values.isfinite()]
    assert low is None or (finite >= low - 1e-4).all()
    assert high is None or (finite <= high + 1e-4).all()
    assert sum(answer.reasons.values()) == int(answer.values.isnan().sum()), "what has no number has a reason"


@pytest.mark.parametrize("entry", built_in("rewards"))
def test_no_samples_are_no_numbers(entry: registry.Entry) -> None:
    values, _ = numbers(ready(entry)(samples_for(entry).select(torch.arange(0))))
    assert values.shape == (0,)


# ---- algorithms ------------------------------------------------------------------------------------------------------

PROMPTS = PromptBatch((Prompt(0, "a red circle"), Prompt(1, "two blue crosses")), group=4)


def flow_algorithm(entry: registry.Entry) -> tuple[Any, Needs]:
    algorithm = build(entry)
    needs: Needs = algorithm.needs()
    if needs.kind != "flow":
        pytest.skip(f"is for {needs.kind}")
    return algorithm, needs


def random_scores(samples: Samples, context: Context) -> Scores:
    raw = torch.rand(len(samples), 1, generator=context.generator("reward"))
    raw[1] = torch.nan
    previews = random_scores(samples.previews, context) if samples.previews is not None else None
    return Scores(("one",), raw, torch.isfinite(raw), torch.ones(1), previews=previews)


def tools(policy: Policy, context: Context) -> Tools:
    """What an algorithm may calibrate itself with: real samples, random scores."""
    rollout = registry.build("rollouts", "local", {"steps": context.sampling_steps}).start(policy, Processes())

    def sample(plan: Plan, round: int) -> tuple[Samples, Scores]:
        at = replace(context, stage="main start", step=round)
        samples = rollout.collect(PROMPTS, plan, at)
        return samples, random_scores(samples, at)

    return Tools(context, sample)


def stepped(entry: registry.Entry, policy: Policy, context: Context) -> tuple[Any, Samples, Rows]:
    """Half a training step: plan, collect, score at random, rows."""
    algorithm, needs = flow_algorithm(entry)
    for name in ("old", "reference"):
        if getattr(needs, name):
            policy.keep(name)
    at = replace(context, state=algorithm.start(tools(policy, context)))
    rollout = registry.build("rollouts", "local", {"steps": context.sampling_steps})
    samples = rollout.start(policy, Processes()).collect(PROMPTS, algorithm.plan(at), at)
    return algorithm, samples, algorithm.rows(samples, random_scores(samples, at), at)


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_needs_follow_from_the_options_alone(entry: registry.Entry) -> None:
    algorithm = build(entry)
    needs = algorithm.needs()
    assert isinstance(needs, Needs)
    assert needs == algorithm.needs()
    assert getattr(algorithm, "kind", needs.kind) == needs.kind
    assert needs.group >= 1
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}", entry.constants["paper"]), (
        "`rlkit list algorithms` shows each with its paper"
    )


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_a_plan_depends_on_seed_and_step_only(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    algorithm, needs = flow_algorithm(entry)
    for name in ("old", "reference"):
        toy_policy.keep(name)
    for step in range(5):
        at = context(step, state=algorithm.start(tools(toy_policy, context())))
        plan = algorithm.plan(at)
        assert isinstance(plan, Plan)
        torch.manual_seed(step)
        assert algorithm.plan(at) == plan
        assert not needs.log_prob or plan.dynamics != "ode", "an ODE has no density"
        assert not needs.path or plan.record
        first, count = plan.window or (0, at.sampling_steps)
        assert first >= 0
        assert count >= 1
        assert first + count <= at.sampling_steps


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_a_state_can_be_saved(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    state = build(entry).start(tools(toy_policy, context()))
    json.dumps({name: value for name, value in state.items() if not isinstance(value, Tensor)})


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_rows_are_numbered_over_all_processes(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    _, _, rows = stepped(entry, toy_policy, context())
    assert isinstance(rows, Rows)
    assert dataclasses.is_dataclass(rows)
    assert rows.row.dtype == torch.int64
    assert sorted(rows.row.tolist()) == list(range(len(rows))), "0 .. rows - 1, each once"
    assert all(len(column) == len(rows) for column in rows.columns().values() if not is_scalar(column))
    batches = list(rows.batches(5, context()))
    assert sorted(int(row) for batch in batches for row in batch.row) == list(range(len(rows)))


def is_scalar(column: object) -> bool:
    return isinstance(column, Tensor) and column.ndim == 0


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_losses_and_metrics_are_per_row(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    algorithm, _, rows = stepped(entry, toy_policy, context())
    with torch.no_grad():
        for parameter in toy_policy.trainable.values():
            parameter.mul_(1.001)  # off the point at which much is 0
    whole = algorithm.loss(toy_policy.models, rows)
    assert whole.terms
    assert not any(values.requires_grad for values in whole.metrics.values())
    some = torch.tensor([len(rows) - 1, 0, len(rows) // 2])
    part = algorithm.loss(toy_policy.models, rows.select(some))
    for name, (values, weight) in whole.terms.items():
        assert values.shape == weight.shape == (len(rows),)
        assert (weight >= 0).all()
        assert not weight.requires_grad
        torch.testing.assert_close(part.terms[name][0], values[some], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(part.terms[name][1], weight[some])
    for name, values in whole.metrics.items():
        torch.testing.assert_close(part.metrics[name], values[some], rtol=1e-4, atol=1e-6)


def moved(policy: Policy) -> None:
    """Off the point at which much is 0, by less than any clip."""
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.mul_(1.0001)


def gradient(policy: Policy, algorithm: Any, rows: Rows, micro_batch: int | None = None) -> Tensor:
    learner = Learner(policy, LearnerOptions(lr=1.0, batch=len(rows), micro_batch=micro_batch), Processes())
    learner.gradient(algorithm.loss, policy.models, rows)
    found = torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None])
    learner.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_a_ratio_is_1_before_any_update(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    algorithm, _, rows = stepped(entry, toy_policy, context())
    result = algorithm.loss(toy_policy.models, rows)
    if "ratio/deviation" not in result.metrics:
        pytest.skip("has no ratio")
    (weight,) = {id(weight): weight for _, weight in result.terms.values()}.values()
    assert 0 < (weight > 0).sum() < len(weight), "a sample was not scored, and what it holds is blank"
    assert result.metrics["ratio/deviation"][weight > 0].max() <= 1e-5
    assert result.metrics["clip_fraction"][weight > 0].max() == 0


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_the_gradient_does_not_depend_on_how_rows_are_split(
    entry: registry.Entry, toy_policy: Policy, context: MakeContext
) -> None:
    algorithm, _, rows = stepped(entry, toy_policy, context())
    moved(toy_policy)
    whole = gradient(toy_policy, algorithm, rows)
    assert whole.norm() > 0
    shuffled = rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)))
    for part in (gradient(toy_policy, algorithm, rows, 3), gradient(toy_policy, algorithm, shuffled, 5)):
        assert (part - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_every_term_of_a_loss_has_a_gradient(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    # Guards a KL that was computed under no_grad: it is shown, weighted, and pulls nobody.
    algorithm, _, _ = stepped(entry, toy_policy, context())
    if "kl" in {option.name for option in entry.fields}:
        algorithm = replace(algorithm, kl=0.5)
        toy_policy.keep("reference")
    at = replace(context(), state=algorithm.start(tools(toy_policy, context())))
    rollout = registry.build("rollouts", "local", {"steps": at.sampling_steps}).start(toy_policy, Processes())
    samples = rollout.collect(PROMPTS, algorithm.plan(at), at)
    rows = algorithm.rows(samples, random_scores(samples, at), at)
    moved(toy_policy)
    terms = algorithm.loss(toy_policy.models, rows).terms
    assert ("kl" in terms) == ("kl" in {option.name for option in entry.fields})
    for name, (values, weight) in terms.items():
        parameters = list(toy_policy.trainable.values())
        found = torch.autograd.grad((values * weight).sum(), parameters, retain_graph=True, allow_unused=True)
        assert any(one is not None and bool(one.any()) for one in found), f"the term {name!r} pulls nobody"


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_equal_scores_teach_nothing(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    algorithm, needs = flow_algorithm(entry)
    if not needs.advantage:
        pytest.skip("does not compare samples")
    for name in ("old", "reference"):
        if getattr(needs, name):
            toy_policy.keep(name)
    at = replace(context(), state=algorithm.start(tools(toy_policy, context())))
    rollout = registry.build("rollouts", "local", {"steps": at.sampling_steps}).start(toy_policy, Processes())
    samples = rollout.collect(PROMPTS, algorithm.plan(at), at)

    def flat(of: Samples) -> Scores:
        return Scores(("one",), torch.full((len(of), 1), 0.7), torch.ones(len(of), 1, dtype=torch.bool), torch.ones(1))

    scores = flat(samples)
    if samples.previews is not None:
        scores = replace(scores, previews=flat(samples.previews))
    found = gradient(toy_policy, algorithm, algorithm.rows(samples, scores, at))
    assert found.abs().max() <= 1e-7


@pytest.mark.parametrize("entry", built_in("algorithms"))
def test_a_loss_moves_the_current_weights_only(entry: registry.Entry, toy_policy: Policy, context: MakeContext) -> None:
    algorithm, _, rows = stepped(entry, toy_policy, context())
    result = algorithm.loss(toy_policy.models, rows)
    sum((values * weight).sum() for values, weight in result.terms.values()).backward()  # type: ignore[union-attr]
    gradients = [parameter.grad for parameter in toy_policy.trainable.values()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any((gradient != 0).any() for gradient in gradients if gradient is not None)
    assert not any(tensor.requires_grad for kept in toy_policy.sets.values() for tensor in kept.values())


# ---- backbones -------------------------------------------------------------------------------------------------------

SHIPPED = ("tiny",)  # with weights in this repository; others are tested where their weights are


@pytest.fixture(scope="module", params=[case for case in built_in("backbones") if case.id in SHIPPED])
def model(request: pytest.FixtureRequest) -> FlowModel:
    loaded = registry.build("backbones", request.param.name, {}).load(CPU, torch.float32)
    assert isinstance(loaded, FlowModel)
    return loaded


def test_the_shipped_backbones_are_there() -> None:
    assert set(SHIPPED) <= set(registry.names("backbones"))


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 40])
def test_sigmas_descend_from_their_largest_to_0(model: FlowModel, steps: int) -> None:
    sigmas = model.sigmas(steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() < 0).all()
    assert 0.9 < sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert torch.equal(model.sigmas(steps), sigmas), "a scheduler's memory may not show"


def condition_of(model: FlowModel, texts: list[str]) -> dict[str, Tensor]:
    rows = model.encode(told(texts))
    assert len(rows) == len(texts)
    return dict(model.collate(rows))


@torch.no_grad()
def test_velocities_keep_shape_and_dtype_and_rows_apart(model: FlowModel) -> None:
    texts = ["a red circle", "two blue crosses", "", "a cyan square left of a red triangle"]
    x = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.7, 0.3, 0.02])
    condition = condition_of(model, texts)
    assert not any(column.requires_grad for column in condition.values())
    v = model.velocity(model.net, x, sigma, condition)
    assert (v.shape, v.dtype) == (x.shape, x.dtype)
    assert v.isfinite().all()
    alone = model.velocity(model.net, x[2:3], sigma[2:3], condition_of(model, texts[2:3]))
    torch.testing.assert_close(alone, v[2:3], rtol=0, atol=1e-4)
    other = model.velocity(model.net, x, sigma, condition_of(model, texts[::-1]))
    assert (other - v).abs().max() > 1e-3, "the text is read"


@torch.no_grad()
def test_decoded_latents_are_pictures(model: FlowModel) -> None:
    latents = 3 * torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    media = model.decode(latents)
    assert media.shape[:2] == (2, 3)
    assert media.ndim == 4
    assert media.min() >= 0
    assert media.max() <= 1
    torch.testing.assert_close(model.decode(latents[1:]), media[1:])


def test_lora_targets_are_linear_layers_of_the_network(model: FlowModel) -> None:
    names = {name: module for name, module in model.net.named_modules() if name}
    for target in model.lora_targets:
        found = [module for name, module in names.items() if name == target or name.endswith(f".{target}")]
        assert found, target
        assert all(isinstance(module, nn.Linear) for module in found), target
    assert not model.net.training


def test_unread_names_the_words_that_are_lost(model: FlowModel) -> None:
    assert model.unread("a red circle") == []
    assert all(word in "a zyxwvut circle" for word in model.unread("a zyxwvut circle"))


def test_lora_attaches(tiny: Callable[..., Policy]) -> None:
    policy = tiny(Lora(rank=2))
    layers = {name.rsplit(".lora_", 1)[0] for name in policy.trainable}
    assert {target for target in policy.model.lora_targets if any(layer.endswith(target) for layer in layers)} == set(
        policy.model.lora_targets
    )


# ---- rollouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", built_in("rollouts"))
def test_a_rollout_says_what_it_gives_and_starts(entry: registry.Entry) -> None:
    rollout = registry.load("rollouts", entry.name)
    assert set(rollout.gives) <= CAN_GIVE
    assert set(getattr(rollout, "kinds", None) or (rollout.kind,)) <= {"flow", "tokens"}
    assert list(inspect.signature(rollout.start).parameters)[1:3] == ["policy", "processes"]
    assert hasattr(rollout, "steps") or "steps" in {one.name for one in dataclasses.fields(rollout)}
    started = typing.get_type_hints(rollout.start)["return"]
    for one in typing.get_args(started) or (started,):
        for name in ("collect", "load", "health"):
            ours = list(inspect.signature(getattr(one, name)).parameters)
            assert ours == list(inspect.signature(getattr(Sampler, name)).parameters), (one, name)


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(registry.recipes()))
def test_a_recipe_composes_and_fits_together(name: str) -> None:
    setup = recipe.read(name)
    assert setup.stages
    assert recipe.resolve(setup.recipe) == setup, "what a run folder keeps is the same run"


@pytest.mark.parametrize("name", sorted(registry.recipes()))
def test_a_recipe_opens_with_its_command(name: str) -> None:
    text = registry.recipes()[name].read_text(encoding="utf-8")
    comment = text.split("\n\n")[0] if text.startswith("#") else ""
    assert f"rlkit train {name}" in comment
    assert "healthy run" in comment.lower()
