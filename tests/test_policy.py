"""Policies: sets that are copies and stay put, LoRA that starts as the base, states that come back to the bit."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from making import told
from torch import Tensor

from rlkit import recipe, session
from rlkit.dist import Processes
from rlkit.errors import CheckpointError, RecipeError
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy, WeightSet
from rlkit.shelf import Conditions
from rlkit.types import Condition, FlowModel, Loss, Models, Prompt, Rows, generator
from rlkit.weights import Lora, ema_decay

CPU = torch.device("cpu")
TEXTS = ("a red circle", "two blue crosses", "a cyan square left of a red triangle", "")
MODES = pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])


@dataclass(frozen=True)
class PictureRows(Rows):
    x: Tensor
    sigma: Tensor
    cond: tuple[str, ...]
    weight: Tensor


def picture_rows(policy: Policy, n: int = 4, seed: int = 0) -> PictureRows:
    texts = tuple(TEXTS[i % len(TEXTS)] for i in range(n))
    policy.conditions.encode(told(texts))
    x = torch.randn(n, *policy.model.latent_shape, generator=generator("x", seed))
    sigma = torch.rand(n, generator=generator("sigma", seed))
    return PictureRows(torch.arange(n), x, sigma, texts, torch.ones(n))


def square(models: Models, rows: PictureRows) -> Loss:
    """A loss with a gradient everywhere; what it teaches does not matter."""
    v = models.current.velocity(rows.x, rows.sigma, rows.cond)
    return Loss({"square": ((v - rows.x).square().flatten(1).mean(1), rows.weight)})


@MODES
def test_guidance_combines_the_two_velocities_alike_in_every_set(
    tiny: Callable[..., Policy], tiny_model: FlowModel, lora: Lora | None
) -> None:
    plain = tiny(lora)
    guided = Policy(replace(tiny_model, net=copy.deepcopy(tiny_model.net)), lora, CPU, "fp32", 0, guidance=3.0)
    rows = picture_rows(plain)
    guided.conditions.encode(told(rows.cond))
    guided.keep("old")
    said = velocities(plain.models.current, rows)
    free = velocities(plain.models.current, replace(rows, cond=("",) * len(rows)))
    expected = free + 3.0 * (said - free)
    torch.testing.assert_close(velocities(guided.models.current, rows), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(velocities(guided.models.old, rows), velocities(guided.models.current, rows))
    assert (said - expected).abs().max() > 1e-3


@MODES
def test_old_is_known_to_be_current_until_an_update_or_a_blend(tiny: Callable[..., Policy], lora: Lora | None) -> None:
    # Losses save a call where it is true: it must never be true of weights that differ.
    policy = tiny(lora)
    rows = picture_rows(policy)
    learner = learner_of(policy)
    policy.keep("old")
    assert policy.models.old_is_current
    assert torch.equal(velocities(policy.models.old, rows), velocities(policy.models.current, rows))
    learner.step(square, policy.models, rows)
    assert not policy.models.old_is_current
    policy.blend("old", 0.5)
    assert not policy.models.old_is_current
    policy.blend("old", 0.0)
    assert policy.models.old_is_current
    assert same(policy.sets["old"], policy.snapshot()), "to the bit"
    saved = copies(policy.state())
    learner.step(square, policy.models, rows)
    moved = copies(policy.state())
    policy.load_state(saved)
    assert policy.models.old_is_current, "a resumed run makes the calls of the unbroken one"
    policy.load_state(moved)
    assert not policy.models.old_is_current
    policy.keep("old", saved_part(saved, "old"))
    assert not policy.models.old_is_current
    policy.drop("old")
    assert not policy.models.old_is_current


def saved_part(saved: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in saved.items() if key.startswith(f"{name}/")}


def learner_of(policy: Policy, ema: float | None = None, lr: float = 1e-3) -> Learner:
    return Learner(policy, LearnerOptions(lr=lr, batch=4, ema=ema), Processes())


def velocities(weights: WeightSet, rows: PictureRows) -> Tensor:
    with torch.no_grad():
        return weights.velocity(rows.x, rows.sigma, rows.cond)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file would hold: `state` itself gives the live tensors."""
    return {name: value.clone() for name, value in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- sets ------------------------------------------------------------------------------------------------------------


@MODES
def test_reference_stays_the_base_while_current_trains(tiny: Callable[..., Policy], lora: Lora | None) -> None:
    policy, base = tiny(lora), tiny()
    rows = picture_rows(policy)
    picture_rows(base)
    policy.keep_base()
    policy.keep("reference", policy.base)
    before = velocities(base.models.current, rows)
    assert torch.equal(velocities(policy.models.current, rows), before), "training starts at the base, bit for bit"
    learner = learner_of(policy)
    for _ in range(3):
        learner.step(square, policy.models, rows)
    assert torch.equal(velocities(policy.models.reference, rows), before)
    assert (velocities(policy.models.current, rows) - before).abs().max() > 1e-3
    assert torch.equal(velocities(base.models.current, rows), before)


@MODES
def test_sets_share_no_memory_with_the_weights(tiny: Callable[..., Policy], lora: Lora | None) -> None:
    # On a CPU `.detach().cpu()` is the same memory: a set made that way would follow the training it is compared with.
    policy = tiny(lora)
    policy.keep("old")
    policy.keep_base()
    kept = copies(policy.sets["old"])
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(1.0)
    assert same(policy.sets["old"], kept)
    assert policy.base is not None
    assert same(policy.base, kept)


@MODES
def test_only_what_should_train_is_trainable(tiny: Callable[..., Policy], lora: Lora | None) -> None:
    policy = tiny(lora)
    assert all("lora" in name for name in policy.trainable) == (lora is not None)
    assert {id(p) for p in policy.net.parameters() if p.requires_grad} == {id(p) for p in policy.trainable.values()}
    assert not policy.net.training, "dropout would make the ratio differ from 1 before any update"


def test_lora_adapters_are_drawn_from_the_seed_and_from_nothing_else(tiny: Callable[..., Policy]) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tiny(Lora(rank=4), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first.snapshot(), tiny(Lora(rank=4), seed=5).snapshot())
    assert not same(first.snapshot(), tiny(Lora(rank=4), seed=6).snapshot())


def test_asking_for_a_set_that_was_not_made_is_an_error(toy_policy: Policy) -> None:
    toy_policy.keep("old")
    with pytest.raises(KeyError, match="no set 'reference' in this stage; it has: current, old"):
        _ = toy_policy.models.reference
    toy_policy.drop("old")
    with pytest.raises(KeyError, match="no set 'old'"):
        _ = toy_policy.models["old"]
    toy_policy.drop("old")  # what is not there may be dropped


def test_no_gradient_reaches_a_stand_in(toy_policy: Policy) -> None:
    rows = picture_rows(toy_policy)
    toy_policy.keep("reference")
    x = rows.x.clone().requires_grad_()
    assert not toy_policy.models.reference.velocity(x, rows.sigma, rows.cond).requires_grad
    assert toy_policy.models.current.velocity(x, rows.sigma, rows.cond).requires_grad
    assert not any(tensor.requires_grad for tensor in toy_policy.sets["reference"].values())


def test_velocities_are_fp32_under_bf16(toy_policy: Policy) -> None:
    rows = picture_rows(toy_policy)
    low = Policy(toy_policy.model, None, toy_policy.device, "bf16", 0)
    low.conditions.encode(told(TEXTS))
    v, exact = velocities(low.models.current, rows), velocities(toy_policy.models.current, rows)
    assert v.dtype == torch.float32
    assert 0 < (v - exact).abs().max() < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in low.trainable.values())


# ---- exponential moving average --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("updates", "decay"), [(0, 0.1), (7, 0.4706), (15, 0.64), (80, 0.9), (10**6, 0.999)])
def test_ema_warms_up(updates: int, decay: float) -> None:
    assert ema_decay(updates, 0.999) == pytest.approx(decay, abs=5e-5)


def test_blend_is_the_formula_and_moves_only_its_set(toy_policy: Policy) -> None:
    toy_policy.keep("ema")
    toy_policy.keep("old")
    old = copies(toy_policy.sets["old"])
    with torch.no_grad():
        for parameter in toy_policy.trainable.values():
            parameter.add_(1.0)
    current = toy_policy.snapshot()
    toy_policy.blend("ema", 0.9)
    for name, value in toy_policy.sets["ema"].items():
        torch.testing.assert_close(value, 0.9 * old[name] + 0.1 * current[name])
    assert same(toy_policy.sets["old"], old)
    assert same(toy_policy.snapshot(), current)


# ---- states ----------------------------------------------------------------------------------------------------------


@MODES
def test_a_saved_state_comes_back_to_the_bit_and_goes_on_alike(tiny: Callable[..., Policy], lora: Lora | None) -> None:
    policy = tiny(lora)
    rows = picture_rows(policy)
    policy.keep("old")
    learner = learner_of(policy, ema=0.9)
    for _ in range(2):
        learner.step(square, policy.models, rows)
    saved = copies(policy.state())
    moments, numbers = learner.state()
    moments = copies(moments)
    assert {name.split("/")[0] for name in saved} == {"current", "old", "ema"}
    assert {name.split("/")[0] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}

    other = tiny(lora, seed=9)
    picture_rows(other)
    continued = learner_of(other, ema=0.9)
    other.load_state(saved)
    continued.load_state(moments, numbers)
    assert same(copies(other.state()), saved)
    again, counted = continued.state()
    assert same(copies(again), moments)
    assert counted == numbers == {"updates": 2}

    learner.step(square, policy.models, rows)
    continued.step(square, other.models, rows)
    assert same(copies(other.state()), copies(policy.state()))
    assert same(copies(continued.state()[0]), copies(learner.state()[0]))
    assert not same(copies(policy.state()), saved)
    assert not same(other.sets["ema"], other.sets["old"])


def test_loaded_sets_share_no_memory_with_what_was_loaded(toy_policy: Policy) -> None:
    toy_policy.keep("old")
    saved = copies(toy_policy.state())
    toy_policy.load_state(saved)
    for tensor in saved.values():
        tensor.fill_(7.0)
    assert not any((tensor == 7).any() for tensor in toy_policy.state().values())


def test_a_state_holds_no_base_and_no_alias(toy_policy: Policy) -> None:
    toy_policy.keep_base()
    toy_policy.keep("reference", toy_policy.base)
    assert {name.split("/")[0] for name in toy_policy.state()} == {"current"}
    toy_policy.keep("ema")
    toy_policy.keep("reference", toy_policy.sets["ema"])
    assert {name.split("/")[0] for name in toy_policy.state()} == {"current", "ema"}
    toy_policy.keep("reference")
    assert {name.split("/")[0] for name in toy_policy.state()} == {"current", "ema", "reference"}


def test_weights_of_another_policy_are_refused(toy_policy: Policy) -> None:
    saved = copies(toy_policy.state())
    narrow = saved | {"current/out.bias": torch.zeros(1)}  # would broadcast
    with pytest.raises(CheckpointError, match=r"out\.bias has shape \(16,\) here, shape \(1,\) there"):
        toy_policy.load_state(narrow)
    del saved["current/mix.weight"]
    with pytest.raises(CheckpointError, match=r"mix\.weight has shape \(28, 25\) here, no such tensor there"):
        toy_policy.load_state(saved)


# ---- export ----------------------------------------------------------------------------------------------------------


@MODES
def test_the_line_that_export_returns_loads_the_trained_weights(
    tiny: Callable[..., Policy], tmp_path: Path, lora: Lora | None
) -> None:
    from diffusers import SD3Transformer2DModel

    policy, fresh = tiny(lora), tiny()
    rows = picture_rows(policy)
    learner_of(policy).step(square, policy.models, rows)
    line = policy.export(tmp_path / "weights")
    transformer = copy.deepcopy(fresh.net)
    loaded = eval(line, {"SD3Transformer2DModel": SD3Transformer2DModel, "transformer": transformer})
    exported = Policy(replace(fresh.model, net=loaded or transformer), None, policy.device, "fp32", 0)
    picture_rows(exported)
    picture_rows(fresh)
    trained = velocities(policy.models.current, rows)
    torch.testing.assert_close(velocities(exported.models.current, rows), trained, rtol=0, atol=1e-6)
    assert (velocities(fresh.models.current, rows) - trained).abs().max() > 1e-3
    assert not [file for file in (tmp_path / "weights").rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


# ---- conditions ------------------------------------------------------------------------------------------------------


def test_each_text_is_encoded_once(tiny_model: FlowModel) -> None:
    asked: list[str] = []

    def encode(prompts: Sequence[Prompt]) -> list[Condition]:
        asked.extend(prompt.text for prompt in prompts)
        return tiny_model.encode(prompts)

    conditions = Conditions(lambda size: replace(tiny_model, encode=encode))
    conditions.encode(told(["a red circle", "a red circle", "two blue crosses"]))
    conditions.encode(iter(told(["two blue crosses", "a red circle", "a red square"])))
    conditions.encode([])
    assert asked == ["a red circle", "two blue crosses", "a red square"]
    batch = conditions.batch(["a red square", "a red circle", "a red square"])
    assert {len(column) for column in batch.values()} == {3}
    assert all(torch.equal(column[0], column[2]) for column in batch.values())
    with pytest.raises(KeyError):
        conditions.batch(["a text never encoded"])


def test_a_text_is_encoded_alike_whatever_it_is_encoded_with(tiny_model: FlowModel) -> None:
    # The padding must not depend on the longest text of a batch: rollout and training see different batches.
    together = Conditions(lambda size: tiny_model)
    together.encode(told(TEXTS))
    for text in TEXTS:
        alone = Conditions(lambda size: tiny_model)
        alone.encode(told([text]))
        one, other = alone.batch([text]), together.batch([text])
        assert {name: column.shape for name, column in one.items()} == {n: c.shape for n, c in other.items()}
        for name, column in one.items():
            torch.testing.assert_close(column, other[name], rtol=0, atol=1e-5)


def test_export_of_the_average_leaves_the_current_weights_alone(tiny: Callable[..., Policy], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = tiny()
    policy.keep("ema")
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(1.0)
    before = policy.snapshot()
    policy.export(tmp_path / "weights", "ema")
    written = load_file(tmp_path / "weights" / "diffusion_pytorch_model.safetensors")
    for name, parameter in policy.trainable.items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(written[name], policy.sets["ema"][name])
        assert not torch.equal(written[name], before[name])


# ---- prompts with pictures -------------------------------------------------------------------------------------------


def test_the_key_of_a_prompt_holds_its_pictures() -> None:
    picture, other = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    prompts = [
        *(Prompt(0, "a"), Prompt(0, "b"), Prompt(0, "a", source=picture), Prompt(0, "a", source=other)),
        *(Prompt(0, "a", references=(picture,)), Prompt(0, "a", references=(picture, other))),
        *(Prompt(0, "a", source=picture, references=(other,)), Prompt(0, "a", source=picture.reshape(3, 2, 8))),
    ]
    assert len({prompt.key for prompt in prompts}) == len(prompts)
    assert prompts[0].key == "a", "a text alone is its own key"
    assert Prompt(7, "a", metadata={"x": 1}, source=picture.clone()).key == prompts[2].key


def test_the_twin_of_an_edit_keeps_its_source(toy_policy: Policy) -> None:
    """True classifier-free guidance of an edit is against other words, not against no picture."""
    conditions = Conditions(toy_policy.model_at, negative="blurred")
    source = torch.zeros(3, 4, 4)
    edit, plain = Prompt(0, "make it red", source=source), Prompt(1, "red")
    conditions.encode([edit, plain])
    assert conditions.untold([plain.key, edit.key]) == ["blurred", Prompt(0, "blurred", source=source).key]
    assert conditions.batch(conditions.untold([edit.key]))["pooled"].shape == (1, 8)


# ---- memory ----------------------------------------------------------------------------------------------------------


@MODES
def test_computing_activations_again_changes_no_gradient(tiny_model: FlowModel, lora: Lora | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = replace(tiny_model, net=copy.deepcopy(tiny_model.net))
        policy = Policy(model, lora, CPU, "fp32", 0, checkpointing=checkpointing)
        calls: list[int] = []
        first = policy.net.get_submodule("transformer_blocks.0")
        first.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        rows = picture_rows(policy)
        policy.models.current.velocity(rows.x, rows.sigma, rows.cond).square().mean().backward()
        gradients.append({name: one.grad for name, one in policy.trainable.items() if one.grad is not None})
        assert len(calls) == 1 + checkpointing, "the blocks are computed a second time in the backward pass"
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_a_network_that_cannot_compute_again_is_refused(toy_policy: Policy) -> None:
    with pytest.raises(RecipeError, match="cannot compute its activations again"):
        Policy(toy_policy.model, None, CPU, "fp32", 0, checkpointing=True)


def test_what_lora_leaves_frozen_is_kept_in_half_the_digits_with_bf16(small_backbone: Path) -> None:
    words = [f"policy.backbone.path={small_backbone}", "run.threads=1", "run.device=cpu"]
    kept = {}
    lora, full = "{lora: {rank: 2}, full: null}", "{full: true}"
    for precision, train in (("bf16", lora), ("bf16", full), ("fp32", lora)):
        setup = recipe.read("quickstart", [*words, f"run.precision={precision}", f"policy.train={train}"])
        policy = session.load_policy(setup)
        frozen = {one.dtype for one in policy.net.parameters() if not one.requires_grad}
        kept[precision, train == lora] = frozen, {one.dtype for one in policy.trainable.values()}
        rows = picture_rows(policy)
        v = policy.models.current.velocity(rows.x, rows.sigma, rows.cond)
        assert v.dtype == torch.float32
        v.square().mean().backward()
        assert all(one.grad is None or one.grad.dtype == torch.float32 for one in policy.trainable.values())
    assert kept == {
        ("bf16", True): ({torch.bfloat16}, {torch.float32}),
        ("bf16", False): (set(), {torch.float32}),
        ("fp32", True): ({torch.float32}, {torch.float32}),
    }
