"""Whether a backbone does what diffusers' own pipeline does, and what training asks of it: `rlkit check-backbone NAME`.

The oracle is the model's `pipeline`: diffusers' code round the very same modules. It is given the noise that the local
rollout draws for the same seed, so pictures have to agree to the rounding of floats. Besides: LoRA's layers exist,
pictures and latents have each other's shapes, what a prompt stands beside in a batch changes nothing, and the recorded
log-probabilities of a path are what the trainer computes again, so that the ratio is 1 before any update.

With bf16 all but the autoencoder is loaded in it and the network computes under autocast, as LoRA is trained. The
pipeline then keeps its latents in bf16 too, so pictures agree to the rounding of that; and the ratio is that of rows in
the batch that they were sampled in, since others may be rounded otherwise. Not here: whether the pictures are any good.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlkit import registry
from rlkit.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rlkit.policy import Policy
    from rlkit.types import Context, FlowModel, Plan, Prompt, Samples

TEXTS = ("a red circle", "two blue squares left of a green triangle, drawn with a soft pencil")  # not of one length
NEGATIVE = "blurred"
STEPS = 3
CLOSE = 1e-4  # of |ratio - 1|
TOLERANCES = {"fp32": CLOSE, "bf16": 0.1}  # of pixels in 0..1


# ---- the command -----------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a backbone, as `rlkit list backbones` names it")
    parser.add_argument("words", nargs="*", metavar="key=value", help="its options, for instance path=FOLDER")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of denoising (default: {STEPS})")
    parser.add_argument("--guidance", type=float, default=4.0, help="compared besides 1 (default: 4)")
    what = "that it is loaded and computes in (default: fp32)"
    parser.add_argument("--precision", "--dtype", choices=tuple(TOLERANCES), default="fp32", help=what)
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    default = ", ".join(f"{close:g} with {precision}" for precision, close in TOLERANCES.items())
    parser.add_argument("--tolerance", type=float, help=f"of pixels in 0..1 (default: {default})")


def run(options: argparse.Namespace) -> int:
    """0 when every check passed, 1 when one failed."""
    import torch

    backbone = registry.build("backbones", options.name, dict(_option(word) for word in options.words))
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = options.precision
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tolerance = TOLERANCES[precision] if options.tolerance is None else options.tolerance
    with registry.importing("backbones", options.name):
        model = backbone.load(device, dtype)
    passed = True
    for one in checks(model, device, options.steps, options.guidance, tolerance, precision):
        passed = passed and one.passed is not False
        verdict = {True: "ok", False: "FAILED", None: "skipped"}[one.passed]
        print(f"{one.name:<28} {one.found:<52} {verdict}", flush=True)
    return 0 if passed else 1


def _option(word: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = word.partition("=")
    if not equals:
        raise RecipeError(f"{word!r} is no option.", where="check-backbone", hint="Write key=value, as path=FOLDER.")
    return key, yaml.safe_load(value)


# ---- the checks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    name: str
    found: str
    passed: bool | None  # None: skipped


def checks(
    model: FlowModel,
    device: torch.device,
    steps: int = STEPS,
    guidance: float = 4.0,
    tolerance: float = CLOSE,
    precision: str = "fp32",
) -> Iterator[Check]:
    """Every check of one model, in order. Nothing is trained, and the weights stay as they are."""
    prompts = example_prompts(model)
    for scale in (1.0, guidance):
        name = f"parity, guidance {scale:g}"
        if model.pipeline is None:
            yield Check(name, "there is no pipeline to compare with", None)
            continue
        apart = pixels_apart(model, prompts, device, steps, scale, precision)
        yield Check(name, f"pixels differ by {apart:.1e} at most", apart <= tolerance)
    layers = {target: linear_layers(model, target) for target in model.lora_targets}
    lost = ", ".join(target for target, count in layers.items() if not count)
    yield Check("LoRA targets", f"none called {lost}" if lost else f"{sum(layers.values())} layers", not lost)
    yield shapes(model, device)
    apart = company(model, prompts, device, precision)
    yield Check("company in a batch", f"velocities differ by {apart:.1e} at most", apart <= max(10 * CLOSE, tolerance))
    for scale in (1.0, guidance):
        off = ratio_off(model, prompts, device, scale, precision)
        yield Check(f"log-prob ratio, guidance {scale:g}", f"is off from 1 by {off:.1e} at most", off <= CLOSE)


def example_prompts(model: FlowModel) -> tuple[Prompt, ...]:
    """Two prompts of different length, with the pictures that the model's tasks ask for."""
    import torch

    from rlkit.types import Prompt, generator

    shape = picture_shape(model)

    def noise(name: str) -> Tensor:
        return torch.rand(shape, generator=generator("check-backbone", name))

    if "t2i" in model.tasks:
        return tuple(Prompt(i, text) for i, text in enumerate(TEXTS))
    if "edit" in model.tasks:
        return tuple(Prompt(i, text, source=noise(text)) for i, text in enumerate(TEXTS))
    return tuple(Prompt(i, text, references=(noise(text),)) for i, text in enumerate(TEXTS))


def picture_shape(model: FlowModel) -> tuple[int, ...]:
    """[3, H, W] of what it decodes."""
    import torch

    device = next(model.net.parameters()).device
    with torch.no_grad():
        return tuple(model.decode(torch.zeros(1, *model.latent_shape, device=device)).shape[1:])


def linear_layers(model: FlowModel, target: str) -> int:
    """How many linear layers of the network have this name, or end with it."""
    from torch import nn

    named = [f".{name}" for name, module in model.net.named_modules() if isinstance(module, nn.Linear)]
    return sum(name.endswith(f".{target}") for name in named)


def shapes(model: FlowModel, device: torch.device) -> Check:
    """Latents become pictures in 0..1, and those become latents again."""
    import torch

    with torch.no_grad():
        media = model.decode(torch.randn(2, *model.latent_shape, device=device))
        fits = media.shape[:2] == (2, 3) and media.ndim == 4 and bool(((media >= 0) & (media <= 1)).all())
        found = f"{list(model.latent_shape)} -> {list(media.shape[1:])}"
        if model.encode_media is not None:
            again = tuple(model.encode_media(media).shape)
            fits, found = fits and again == (2, *model.latent_shape), f"{found} -> {list(again[1:])}"
    return Check("latents and pictures", found, fits)


def pixels_apart(
    model: FlowModel,
    prompts: Sequence[Prompt],
    device: torch.device,
    steps: int = STEPS,
    guidance: float = 1.0,
    precision: str = "fp32",
) -> float:
    """The largest difference of a pixel in 0..1 between the local rollout's pictures and the pipeline's."""
    import torch

    if model.pipeline is None:
        raise RecipeError("this backbone has no pipeline to compare with", where="policy.backbone")
    policy = _policy(model, device, guidance, precision)
    noise = initial_noise(model, len(prompts)).to(device)
    with torch.no_grad(), _computing_as(policy):
        ours = model.decode(collected(policy, prompts, _plan("ode"), steps).latents.to(device))
        theirs = model.pipeline(prompts, noise, steps, guidance, NEGATIVE).to(device)
    if ours.shape != theirs.shape:
        raise RecipeError(f"the pipeline draws {list(theirs.shape)}, and the backbone {list(ours.shape)}")
    return float((ours - theirs).abs().max())


def ratio_off(
    model: FlowModel,
    prompts: Sequence[Prompt],
    device: torch.device,
    guidance: float = 1.0,
    precision: str = "fp32",
) -> float:
    """The largest |ratio - 1| when each recorded step of a stochastic path is computed again.

    In fp32 each row by itself; in bf16 in the company that it had, since a batch's size may decide how it is rounded.
    """
    import torch

    from rlkit import flow

    policy = _policy(model, device, guidance, precision)
    path = collected(policy, prompts, _plan("flow"), 4).path
    if path is None:
        raise RuntimeError("the local rollout has recorded no path")
    together = len(prompts) if precision == "bf16" else 1
    worst = 0.0
    with torch.no_grad():
        for rows in torch.arange(len(prompts)).split(together):
            keys = [prompts[i].key for i in rows.tolist()]
            for k in range(len(path.sigmas) - 1):
                x, following = (path.states[rows, at].to(device) for at in (k, k + 1))
                sigma, sigma_next, level = float(path.sigmas[k]), float(path.sigmas[k + 1]), float(path.noise_levels[k])
                v = policy.models.current.velocity(x, torch.full((len(rows),), sigma), keys)
                mean, std = flow.sde_step(x, v, sigma, sigma_next, level, "flow", path.sigma_max)
                again = flow.log_prob(following, mean, std).cpu()
                worst = max(worst, float((torch.exp(again - path.log_prob[rows, k]) - 1).abs().max()))
    return worst


def company(model: FlowModel, prompts: Sequence[Prompt], device: torch.device, precision: str = "fp32") -> float:
    """The largest difference that being in a batch with the other prompts makes to a prompt's velocity."""
    import torch

    from rlkit.types import generator

    policy = _policy(model, device, 1.0, precision)
    policy.conditions.encode(prompts)
    keys = [prompt.key for prompt in prompts]
    x = torch.randn(len(keys), *model.latent_shape, generator=generator("check-backbone", "company"))
    sigma = torch.linspace(0.9, 0.3, len(keys))
    with torch.no_grad():
        together = policy.models.current.velocity(x, sigma, keys)
        alone = [policy.models.current.velocity(x[i : i + 1], sigma[i : i + 1], [key]) for i, key in enumerate(keys)]
    return float((together - torch.cat(alone)).abs().max())


# ---- sampling --------------------------------------------------------------------------------------------------------


def collected(policy: Policy, prompts: Sequence[Prompt], plan: Plan, steps: int) -> Samples:
    """One sample a prompt by the local rollout."""
    from rlkit.data.prompts import PromptBatch
    from rlkit.dist import Processes

    rollout = registry.build("rollouts", "local", {"steps": steps}).start(policy, Processes())
    samples: Samples = rollout.collect(PromptBatch(tuple(prompts), 1), plan, _context(steps))
    return samples


def initial_noise(model: FlowModel, count: int) -> Tensor:
    """[count, C, H, W] that `collected` begins with."""
    import torch

    context = _context(STEPS)
    return torch.stack(
        [torch.randn(*model.latent_shape, generator=context.generator("noise", i)) for i in range(count)]
    )


def _context(steps: int) -> Context:
    from rlkit.dist import Processes
    from rlkit.types import Context

    return Context(0, "check-backbone", 0, steps, {}, Processes().gather)


def _plan(dynamics: Any) -> Plan:
    from rlkit.types import Plan

    if dynamics == "ode":
        return Plan()
    return Plan(dynamics=dynamics, noise_level=0.7, window=(0, 3), record=True)


def _policy(model: FlowModel, device: torch.device, guidance: float, precision: str) -> Policy:
    """The model with weights that stay as they are: of a network with adapters, as they are switched on."""
    from rlkit.policy import Policy

    return Policy(model, None, device, precision, 0, guidance, NEGATIVE)


@contextmanager
def _computing_as(policy: Policy) -> Iterator[None]:
    """The network computes in the policy's precision whoever calls it, and what else a pipeline does stays as it is."""
    forward = policy.net.forward

    def lowered(*given: Any, **named: Any) -> Any:
        with policy.autocast():
            return forward(*given, **named)

    policy.net.forward = lowered
    try:
        yield
    finally:
        del policy.net.forward  # the class's own is there again
