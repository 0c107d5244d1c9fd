"""The rollout `demonstrations`: a teacher's turns as samples, the tools' words in between, and none of it lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_llm

from rlkit import registry
from rlkit.agents.tooling import Toolbox, tool_call
from rlkit.data.prompts import PromptBatch, WorldPrompts
from rlkit.dist import Processes
from rlkit.errors import DataError, RecipeError
from rlkit.language import LanguagePolicy
from rlkit.rollouts.demonstrations import Demonstrations, DemonstrationsRollout
from rlkit.types import Context, Plan, Prompt, Samples, Tokens

CPU = torch.device("cpu")
ANSWER = '<answer>{"gen_prompt": "a red circle", "reference_images": []}</answer>'
LOOK = tool_call("look", {"at": "flag"})


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LanguagePolicy]:
    folder: Path = tiny_llm.save(tmp_path_factory.mktemp("demonstrations"), "qwen3")

    def make(longest: int = 2048) -> LanguagePolicy:
        return LanguagePolicy(tiny_llm.loaded(folder, longest), None, CPU, "fp32", 0)

    return make


@pytest.fixture(scope="module")
def policy(load: Callable[..., LanguagePolicy]) -> LanguagePolicy:
    return load()


def context(training: bool = True) -> Context:
    return Context(0, "main", 2, 0, {}, Processes().gather, coming=(lambda more: None) if training else None)


def look(at: str) -> str:
    """Looks at something."""
    return f"The {at} is red."


def rollout_of(policy: LanguagePolicy, processes: Processes | None = None) -> DemonstrationsRollout:
    options = {"agent": {"writer": {"name": "local", "most": 5}, "turns": 2, "instructions": "Be quick."}}
    entry: Demonstrations = registry.build("rollouts", "demonstrations", options)
    rollout = entry.start(policy, processes or Processes())
    rollout.agent.toolbox = Toolbox({"look": look})
    return rollout


def collected(policy: LanguagePolicy, *metadata: dict[str, Any], training: bool = True, group: int = 1) -> Samples:
    prompts = tuple(Prompt(i, f"draw {i}", metadata=one) for i, one in enumerate(metadata))
    return rollout_of(policy).collect(PromptBatch(prompts, group), Plan(), context(training))


def tokens_of(samples: Samples) -> Tokens:
    assert samples.tokens is not None
    return samples.tokens


def test_what_the_teacher_wrote_is_decided_and_the_tools_are_really_asked(policy: LanguagePolicy) -> None:
    samples = collected(policy, {"script": [LOOK, "what?", ANSWER]}, {"script": (ANSWER,)})
    tokens = tokens_of(samples)
    assert policy.model.spell is not None
    for row, texts in enumerate(([LOOK, "what?", ANSWER], [ANSWER])):
        wrote = [token for text in texts for token in policy.model.spell(text)]
        assert tokens.ids[row][tokens.decided[row]].tolist() == wrote
    assert not tokens.log_prob.any()
    assert tokens.temperature == 1.0
    assert tokens.finished.tolist() == [True, True]
    long, short = samples.episodes
    assert [call.reply for call in long.calls] == ["The flag is red.", f"error: {long.calls[1].invalid}"]
    assert samples.prompts[0].turns[0].reply == "<tool_response>\nThe flag is red.\n</tool_response>"
    assert (long.ended, short.ended, short.calls) == ("answer", "answer", ())
    assert samples.texts == ("a red circle",) * 2
    assert samples.prompts[0].system == "Be quick."
    assert samples.sample_id.tolist() == [4, 5]
    (before,) = policy.models.current.read([samples.prompts[0]])
    assert tokens.ids[0, : len(before)].tolist() == before.tolist()


def test_the_limits_of_the_agent_are_not_the_teachers(policy: LanguagePolicy) -> None:
    samples = collected(policy, {"script": [LOOK, LOOK, LOOK, ANSWER]})
    assert samples.episodes[0].ended == "answer", "the agent itself would have two turns"


def test_a_script_may_end_before_its_answer(policy: LanguagePolicy) -> None:
    samples = collected(policy, {"script": [LOOK, LOOK]})
    (episode,) = samples.episodes
    assert (episode.ended, episode.program, len(episode.calls)) == ("turns", None, 2)
    assert samples.texts == ("",)
    assert tokens_of(samples).finished.tolist() == [False]


def test_a_recorded_conversation_is_said_as_it_stands(policy: LanguagePolicy) -> None:
    """Whatever tools there are now: nothing is run, and its pictures may be named."""
    call = tool_call("zoom", {"into": "x"})
    answer = ANSWER.replace("[]", '["IMG_1"]')
    said = [call, "IMG_1: a flag", call, "<tool_response>\nNothing.\n</tool_response>", answer]
    messages = [{"role": ("assistant", "tool")[i % 2], "content": text} for i, text in enumerate(said)]
    samples = collected(policy, {"messages": messages}, {"script": [LOOK, ANSWER]})
    replies = [turn.reply for turn in samples.prompts[0].turns]
    assert replies == [f"<tool_response>\n{text}\n</tool_response>" for text in ("IMG_1: a flag", "Nothing.")]
    recorded, ran = samples.episodes
    assert recorded.program is not None
    assert recorded.program.reference_images == ("IMG_1",)
    assert ran.calls[0].reply == "The flag is red."
    ending = collected(policy, {"messages": messages[:2]})
    assert ending.episodes[0].ended == "turns"


def test_the_atlas_knows_what_its_teacher_looks_up(load: Callable[..., LanguagePolicy]) -> None:
    """With a recipe's tools: no call fails, what was searched for is found, and the answer is the truth."""
    tools = {"search": {"folder": "world", "top_k": 1}, "query_knowledge": {"folder": "world"}}
    entry: Demonstrations = registry.build("rollouts", "demonstrations", {"agent": {"tools": tools}})
    rollout = entry.start(load(4096), Processes())
    prompts = WorldPrompts(6, 1, task="agent").open().draw(0, "main", 0)
    samples = rollout.collect(prompts, Plan(), context())
    rollout.close()
    assert samples.texts == tuple(prompt.metadata["caption"] for prompt in prompts.prompts)
    for prompt, episode in zip(prompts.prompts, samples.episodes, strict=True):
        assert [call.tool for call in episode.calls] == ["search", "query_knowledge"][
            : 1 + bool(prompt.metadata["style"])
        ]
        assert not any(call.invalid or call.failed for call in episode.calls)
        assert prompt.metadata["subject"] in episode.calls[0].reply
        assert episode.valid == 1.0


def test_in_an_evaluation_the_agent_itself_answers(policy: LanguagePolicy) -> None:
    """Also where the prompts come with scripts: a teacher's score is not the policy's."""
    asked = ({}, {"script": [ANSWER]})
    samples = collected(policy, *asked, training=False)
    assert [one.ended for one in samples.episodes] == ["turns", "turns"]
    assert tokens_of(samples).log_prob.any(dim=1).all()
    prompts = tuple(Prompt(i, f"draw {i}", metadata=one) for i, one in enumerate(asked))
    own = rollout_of(policy).agent.collect(PromptBatch(prompts, 1), Plan(), context(False))
    assert torch.equal(tokens_of(own).ids, tokens_of(samples).ids)


def test_each_process_hands_out_its_share(policy: LanguagePolicy) -> None:
    prompts = tuple(Prompt(i, f"draw {i}", metadata={"script": [LOOK] * i + [ANSWER]}) for i in range(3))
    batch = PromptBatch(prompts, 2)
    shares = [rollout_of(policy, Processes(rank, 2)).collect(batch, Plan(), context()) for rank in range(2)]
    assert [one.index.tolist() for one in shares] == [[0, 1, 2], [3, 4, 5]]
    assert [len(one.calls) for share in shares for one in share.episodes] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "prompt 1: 'draw 1' has no demonstration"),
        ({"script": [ANSWER], "messages": []}, "has two demonstrations"),
        ({"script": []}, "`script` must be a list of texts"),
        ({"script": ANSWER}, "`script` must be a list of texts"),
        ({"script": [3]}, "`script` must be a list of texts"),
        ({"messages": []}, "`messages` must be a list of turns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] must have the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}] * 2}, r"messages\[1\] must have the role 'tool'"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\] must have .* a text as content"),
        ({"script": [ANSWER, LOOK]}, "goes on behind its answer: turn 1 of 2"),
    ],
)
def test_what_demonstrates_nothing_is_refused(policy: LanguagePolicy, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as no:
        collected(policy, {"script": [ANSWER]}, metadata)
    assert no.value.where == "prompt 1"


def test_a_script_that_does_not_fit_is_refused_with_numbers(load: Callable[..., LanguagePolicy]) -> None:
    """Never cut: half a demonstration would teach to stop there."""
    size = int(tokens_of(collected(load(), {"script": [LOOK, ANSWER]})).length[0])
    collected(load(size), {"script": [LOOK, ANSWER]})
    with pytest.raises(DataError, match=f"prompt 0: the demonstration has {size} tokens up to turn 2.* {size - 1}"):
        collected(load(size - 1), {"script": [LOOK, ANSWER]})
    with pytest.raises(DataError, match=r"prompt 0: the prompt has \d+ tokens, and `longest` gives 200"):
        collected(load(200), {"script": [LOOK, ANSWER]})


def test_a_backbone_that_cannot_spell_is_refused(load: Callable[..., LanguagePolicy]) -> None:
    policy = load()
    policy.model = replace(policy.model, spell=None)
    with pytest.raises(RecipeError, match=r"policy\.backbone: .*TokenModel\.spell"):
        rollout_of(policy)


def test_it_needs_data_that_demonstrates_and_makes_what_the_agent_makes() -> None:
    drawing = {"agent": {"renderer": {"backbone": {"name": "tiny"}}}}
    entry = registry.build("rollouts", "demonstrations", drawing)
    assert entry.reads == ("demonstration",)
    assert entry.makes == ("text", "image", "episode")
    assert "log_prob" not in entry.gives, "nobody knows them: a policy gradient is refused"
    with pytest.raises(RecipeError, match="Did you mean 'turns'"):
        registry.build("rollouts", "demonstrations", {"agent": {"trns": 3}})
