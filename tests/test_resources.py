"""What a policy does with its machine: encoders that leave, sets elsewhere, other kernels, and the same numbers."""

import copy
import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from making import told
from torch import Tensor, nn

from rlkit.backbones import flux
from rlkit.dist import Processes
from rlkit.errors import RecipeError
from rlkit.learner import Learner, LearnerOptions
from rlkit.policy import Policy
from rlkit.resources import Resources, choose_attention, compile_network
from rlkit.types import Condition, FlowModel, Loss, NoisedRows, Prompt, generator
from rlkit.weights import Lora

CPU = torch.device("cpu")
OWN, WIDE = (4, 4), (4, 8)


class Pixelwise(nn.Module):
    """A velocity field for latents of any height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4 + 1 + 8, 4)

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        pixels = x.movedim(1, -1)  # [B, h, w, 4]
        told = torch.cat([sigma[:, None], words], dim=1)[:, None, None].expand(*pixels.shape[:3], -1)
        return torch.tanh(self.mix(torch.cat([pixels, told], dim=-1))).movedim(-1, 1)


class Reader(nn.Linear):
    """An encoder that remembers where it was sent."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.sent: list[str] = []
        self.read: list[str] = []

    def to(self, device: Any) -> "Reader":  # type: ignore[override]
        self.sent.append(str(device))
        return self


def sized_model() -> FlowModel:
    """A model of any even size, whose conditions say the size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, reader = Pixelwise(), Reader()

    def at(size: tuple[int, int]) -> FlowModel:
        if size[0] % 2 or size[1] % 2:
            raise ValueError(f"size must be two multiples of 2, not {list(size)}")

        @torch.no_grad()
        def encode(prompts: Sequence[Prompt]) -> list[Condition]:
            reader.read += [prompt.text for prompt in prompts]
            noise = (torch.randn(8, generator=generator("sized", prompt.text)) for prompt in prompts)
            return [{"words": reader(one) + size[1]} for one in noise]

        return FlowModel(
            net=net,
            velocity=lambda net, x, sigma, cond: net(x, sigma, cond["words"]),
            encode=encode,
            decode=lambda latents: torch.sigmoid(latents[:, :3]).repeat_interleave(2, -1).repeat_interleave(2, -2),
            sigmas=lambda steps: torch.linspace(1, 0, steps + 1) ** (1 + size[1] / 8),
            latent_shape=(4, size[0] // 2, size[1] // 2),
            lora_targets=("mix",),
            unread=lambda text: [word for word in text.split() if word == "xyzzy" and reader.read is not None],
            guide=lambda told, untold, guidance: untold + guidance * size[1] * (told - untold),
            encoders=(reader,),
            at=at,
            pipeline=lambda *given: reader(torch.zeros(8)),
        )

    return at(OWN)


def reader_of(policy: Policy) -> Reader:
    (reader,) = policy.model.encoders
    assert isinstance(reader, Reader)
    return reader


def sized_policy(guidance: float = 1.0, **resources: Any) -> Policy:
    return Policy(sized_model(), None, CPU, "fp32", 0, guidance, resources=Resources(**resources))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"conditions_in_memory": 0}, "conditions_in_memory must be 1 or more, not 0"),
        ({"attention": ""}, "attention must be the name of a backend"),
        ({"compile": ""}, "compile must be true, false or the name"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Resources(**options)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_there_is_one_model_a_size() -> None:
    policy = sized_policy()
    wide = policy.model_at(WIDE)
    assert wide.latent_shape == (4, 2, 4)
    assert policy.model_at(WIDE) is wide
    assert policy.model_at(None) is policy.model
    assert policy.model_for(torch.zeros(3, 4, 2, 4)) is wide
    assert policy.model_for(torch.zeros(3, 4, 2, 2)) is policy.model
    with pytest.raises(RecipeError, match=r"cannot draw 3 x 4 \(height x width\): size must be two multiples"):
        policy.model_at((3, 4))


def test_a_backbone_of_one_size_refuses_others(toy_policy: Policy) -> None:
    assert toy_policy.model_at((4, 4)).latent_shape == toy_policy.model.latent_shape
    with pytest.raises(RecipeError, match=r"ToyNet draws 4 x 4 alone, and a prompt asks for 4 x 6 \(height x width\)"):
        toy_policy.conditions.encode([Prompt(0, "a", size=(4, 6))])


def test_velocities_and_pictures_are_those_of_the_size_of_the_latents() -> None:
    policy = sized_policy(guidance=2.0)
    prompts = [Prompt(0, "a"), Prompt(1, "a", size=WIDE)]
    policy.conditions.encode(prompts)
    for prompt in prompts:
        here = sized_model().at(prompt.size or OWN)  # type: ignore[misc]
        x, sigma = torch.randn(1, *here.latent_shape, generator=generator("x")), torch.tensor([0.5])
        conditions = (here.collate(here.encode(told([text]))) for text in ("a", ""))
        with_words, without = (here.velocity(policy.net, x, sigma, one) for one in conditions)
        found = policy.models.current.velocity(x, sigma, [prompt.key])
        torch.testing.assert_close(found, here.guide(with_words, without, 2.0))
        assert policy.models.decode(x).shape == (1, 3, *(prompt.size or OWN))


# ---- encoders --------------------------------------------------------------------------------------------------------


def test_encoders_that_stay_are_never_moved() -> None:
    policy = sized_policy()
    policy.conditions.encode(told(["a", "b"]))
    assert reader_of(policy).sent == []


def test_encoders_come_once_for_all_prompts_of_a_call() -> None:
    policy = sized_policy(guidance=2.0, encoders="offload")
    reader = reader_of(policy)
    assert reader.sent == ["cpu"], "they begin elsewhere"
    policy.device = torch.device("meta")  # where the reader says that it was sent
    prompts = [Prompt(0, "a"), Prompt(1, "b"), Prompt(2, "b", size=WIDE)]
    policy.conditions.encode(prompts)
    assert reader.sent == ["cpu", "meta", "cpu"]
    assert reader.read == ["a", "", "b", "b", ""]
    policy.conditions.encode(prompts)
    assert reader.sent == ["cpu", "meta", "cpu"], "nothing is new: nothing moves"
    stays = sized_policy(guidance=2.0)
    stays.conditions.encode(prompts)
    for prompt in prompts:
        assert torch.equal(*(one.conditions.batch([prompt.key])["words"] for one in (policy, stays)))


def test_encoders_leave_after_a_failure_too() -> None:
    policy = sized_policy(encoders="offload")
    policy.device = torch.device("meta")

    def broken(prompts: Sequence[Prompt]) -> list[Condition]:
        raise RuntimeError("out of memory")

    policy.model = replace(policy.model, encode=broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.conditions.encode(told("a"))
    assert reader_of(policy).sent == ["cpu", "meta", "cpu"]


def test_what_is_let_go_is_gone_and_what_was_encoded_stays() -> None:
    policy, stays = (sized_policy(guidance=2.0, encoders=one) for one in ("free", "keep"))
    alive = weakref.ref(reader_of(policy))
    prompts = [Prompt(0, "a xyzzy"), Prompt(1, "b", size=WIDE)]
    policy.free_encoders(iter(prompts), ["a xyzzy", "b"])
    gc.collect()
    assert alive() is None, "its memory has returned"
    stays.conditions.encode(prompts)
    for prompt in prompts:
        x = torch.randn(1, *stays.model_at(prompt.size).latent_shape, generator=generator("x"))
        found, expected = (one.models.current.velocity(x, torch.tensor([0.5]), [prompt.key]) for one in (policy, stays))
        assert torch.equal(found, expected)
        assert torch.equal(policy.models.decode(x), stays.models.decode(x))
        assert torch.equal(policy.model_at(prompt.size).sigmas(3), stays.model_at(prompt.size).sigmas(3))
    assert policy.model.unread("a xyzzy") == ["xyzzy"]
    policy.conditions.encode(prompts)  # what is there may be asked for again
    with pytest.raises(RecipeError, match=r"policy.encoders: the prompt 'c' was not asked for before .* Use `offload`"):
        policy.conditions.encode(told("c"))
    with pytest.raises(RecipeError, match="a picture of 8 x 8 was not asked for before"):
        policy.conditions.encode([Prompt(2, "b", size=(8, 8))])


def test_pictures_are_let_go_as_they_are_encoded() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def prompts() -> Iterator[Prompt]:
        for i in range(3):
            gc.collect()
            assert not any(one() is not None for one in seen[:-1]), "only the one before may still be there"
            source = torch.full((3, 4, 4), i / 4)
            seen.append(weakref.ref(source))
            yield Prompt(i, "a", source=source)

    sized_policy(encoders="free").free_encoders(prompts(), [])


# ---- sets ------------------------------------------------------------------------------------------------------------


def trained(policy: Policy) -> dict[str, Tensor]:
    """What three updates leave, with an average and a copy that is blended."""
    keys = ["a red circle", "two blue crosses"]
    policy.conditions.encode(told(keys))
    x = torch.randn(2, *policy.model.latent_shape, generator=generator("x"))
    sigma, weight = torch.tensor([0.3, 0.7]), torch.ones(2)
    rows = NoisedRows(torch.arange(2), x, x.flip(0), sigma, weight, weight, tuple(keys))

    def loss(models: Any, rows: NoisedRows) -> Loss:
        v = models.current.velocity(rows.clean, rows.sigma, rows.cond)
        old = models.old.velocity(rows.clean, rows.sigma, rows.cond)
        return Loss({"one": ((v - old - rows.noise).square().flatten(1).mean(1), rows.weight)})

    policy.keep_base()
    policy.keep("reference", policy.base)
    policy.keep("old")
    learner = Learner(policy, LearnerOptions(lr=1e-2, batch=2, ema=0.9), Processes())
    for _ in range(3):
        learner.step(loss, policy.models, rows)
        policy.blend("old", 0.5)
    assert policy.sets["reference"] is policy.base, "an alias stays one"
    with torch.no_grad():
        v = policy.models.reference.velocity(x, sigma, keys)
    return {name: one.clone() for name, one in policy.state().items()} | {"v": v}


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["full", "lora"])
def test_sets_that_live_elsewhere_are_the_same_to_the_bit(tiny_model: FlowModel, lora: Lora | None) -> None:
    found = []
    for sets in ("device", "cpu"):
        model = replace(tiny_model, net=copy.deepcopy(tiny_model.net))
        policy = Policy(model, lora, CPU, "fp32", 0, resources=Resources(sets=sets))  # type: ignore[arg-type]
        found.append(trained(policy))
        again = Policy(
            replace(tiny_model, net=copy.deepcopy(tiny_model.net)),
            lora,
            CPU,
            "fp32",
            0,
            resources=Resources(sets=sets),  # type: ignore[arg-type]
        )
        again.load_state(policy.state())
        assert all(torch.equal(one, policy.state()[name]) for name, one in again.state().items())
    assert found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        assert torch.equal(one, found[1][name]), name


def test_sets_visit_the_device_for_a_call(toy_policy: Policy) -> None:
    # `meta` stands for an accelerator: it tells where a tensor is.
    policy = Policy(toy_policy.model, None, CPU, "fp32", 0, resources=Resources(sets="cpu"))
    policy.keep("old")
    policy.net.to("meta")
    policy.device = torch.device("meta")
    x, sigma, pooled = torch.zeros(2, 4, 2, 2), torch.ones(2), torch.zeros(2, 8)
    v = policy.stand_in("old")(x.to("meta"), sigma.to("meta"), pooled.to("meta"))
    assert v.device.type == "meta", "all of its weights came along"
    assert {one.device.type for one in policy.sets["old"].values()} == {"cpu"}


# ---- kernels ---------------------------------------------------------------------------------------------------------


def small_flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=0,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        )


def test_attention_is_chosen_or_refused(toy_policy: Policy, tiny_model: FlowModel) -> None:
    net = small_flux()
    choose_attention(net, "native")
    assert {str(one._attention_backend.value) for one in net.attn_processors.values()} == {"native"}
    with pytest.raises(RecipeError, match=r"policy.attention: .* no attention backend 'natve'. Did you mean 'native'"):
        choose_attention(net, "natve")
    with pytest.raises(RecipeError, match=r"policy.attention: flash cannot be used here: .*flash-attn"):
        choose_attention(net, "flash")
    with pytest.raises(RecipeError, match=r"policy.attention: ToyNet is not one of diffusers' networks"):
        Policy(toy_policy.model, None, CPU, "fp32", 0, resources=Resources(attention="native"))
    with pytest.raises(RecipeError, match=r"attention layers of SD3Transformer2DModel are of diffusers' older kind"):
        choose_attention(tiny_model.net, "native")


def test_compiling_names_what_it_cannot_use(toy_policy: Policy) -> None:
    with pytest.raises(RecipeError, match=r"compile: torch.compile has no backend 'aot_eagre'. Did you mean 'aot_e"):
        Policy(toy_policy.model, None, CPU, "fp32", 0, resources=Resources(compile="aot_eagre"))


def test_repeated_blocks_are_compiled_and_else_the_whole(toy_policy: Policy) -> None:
    net = small_flux()
    compile_network(net, "eager")
    compiled = [name for name, one in net.named_modules() if one._compiled_call_impl is not None]
    assert compiled == ["transformer_blocks.0"]
    compile_network(toy_policy.net, "eager")
    assert toy_policy.net._compiled_call_impl is not None


def test_compiled_blocks_have_the_numbers_of_others_with_lora_sets_and_checkpointing() -> None:
    """The blocks are compiled once for gradients and once without, and sets stand in for the weights they were
    compiled with."""
    found = []
    torch.compiler.reset()
    for compile in (False, "aot_eager"):
        policy = Policy(
            flux_model(), Lora(rank=2), CPU, "fp32", 0, checkpointing=True, resources=Resources(compile=compile)
        )
        policy.keep("old")
        with torch.no_grad():
            for i, parameter in enumerate(policy.trainable.values()):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator("moved", i)))
        policy.conditions.encode(told("ab"))
        x, sigma = torch.randn(2, *policy.model.latent_shape, generator=generator("x")), torch.tensor([0.3, 0.7])
        v = policy.models.current.velocity(x, sigma, "ab")
        v.square().mean().backward()
        gradients = [one.grad for one in policy.trainable.values() if one.grad is not None]
        found.append([v.detach(), policy.models.old.velocity(x, sigma, "ab"), *gradients])
    torch.compiler.reset()
    assert len(found[0]) == 2 + len(policy.trainable)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert (found[1][0] - found[1][1]).abs().max() > 1e-3, "the sets differ"
    assert max(float(gradient.abs().max()) for gradient in found[1][2:]) > 1e-3


def flux_model() -> FlowModel:
    def encode(prompts: Sequence[Prompt]) -> list[Condition]:
        draws = [generator("flux", prompt.text) for prompt in prompts]
        return [{"tokens": torch.randn(5, 24, generator=d), "pooled": torch.randn(16, generator=d)} for d in draws]

    return FlowModel(
        net=small_flux(),
        velocity=partial(flux.velocity, None),
        encode=encode,
        decode=lambda latents: latents[:, :3],
        sigmas=lambda steps: torch.linspace(1, 0, steps + 1),
        latent_shape=(4, 4, 4),
        lora_targets=flux.ATTENTION,
    )
