"""A teacher's conversations in the place of samples: what a cold start by cross-entropy learns from.

A prompt's metadata has one of two:

script    the texts that the teacher wrote, turn by turn. The tools are really asked, as the agent's calls are.
messages  a conversation that was recorded: [{"role": "assistant", "content": ...}, {"role": "tool", "content": ...},
          ...]. Its replies are said as they stand; nothing is run.

What the teacher wrote is decided, and nobody's log-probs are known for it: they are 0. A script may end before its
answer. In an evaluation the agent itself answers, whatever the prompts come with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.errors import DataError, RecipeError
from rlkit.language import LanguagePolicy
from rlkit.rollouts._token_samples import Written
from rlkit.rollouts.agent import Agent, Conversation
from rlkit.types import Context, Plan, Prompt, Samples

ROLES = ("assistant", "tool")


@dataclass(frozen=True)
class Demonstrations:
    """Hands out a teacher's conversations, their tools really called; in evaluations the agent itself answers."""

    kind = "tokens"
    gives = ()
    reads = ("demonstration",)  # of the data
    steps = 0  # of denoising: the renderer has its own

    agent: Agent = field(default_factory=Agent)  # the options of the rollout `agent`

    @property
    def makes(self) -> tuple[str, ...]:
        return self.agent.makes

    def missing(self) -> str:
        return self.agent.missing()

    def start(self, policy: LanguagePolicy, processes: Processes) -> DemonstrationsRollout:
        return DemonstrationsRollout(self, policy, processes)


class DemonstrationsRollout:
    """A started `Demonstrations`."""

    def __init__(self, options: Demonstrations, policy: LanguagePolicy, processes: Processes) -> None:
        if policy.model.spell is None:
            what = "the policy's backbone does not say how a text is spelled (`TokenModel.spell`)."
            raise RecipeError(what, where="policy.backbone", hint="Choose qwen or qwen_vl.")
        self.policy, self.processes = policy, processes
        self.agent = options.agent.start(policy, processes)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.agent.load(weights, version)

    def health(self) -> str:
        return self.agent.health()

    def close(self) -> None:
        self.agent.close()

    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the demonstrations; in an evaluation, of what the agent does."""
        if context.coming is None:
            return self.agent.collect(prompts, plan, context)
        scripts: dict[int, Script] = {}
        begun = []
        for i in self.processes.share(len(prompts)):
            prompt = prompts.of(i)
            scripts[i] = script = script_of(prompt)
            turns = len(script.texts)
            one = Conversation(i, self.agent.asked(prompt), turns, calls=turns)
            one.replies = script.replies
            begun.append(one)
        self.agent.play(begun, Teacher(self.policy, scripts), plan, context, whole=True)
        for one in begun:
            if len(one.answers) < one.turns:
                hint = "Leave out what stands behind the answer."
                what = f"the demonstration goes on behind its answer: turn {len(one.answers)} of {one.turns}"
                raise DataError(what, where=f"prompt {one.prompt.id}", hint=hint)
        return self.agent.samples(begun, prompts, context, temperature=1.0)


@dataclass(frozen=True)
class Script:
    texts: tuple[str, ...]  # what the teacher wrote
    replies: tuple[str, ...] | None  # what was said in between; None: the tools say it


class Teacher:
    """Writes what stands in the scripts, by their samples' places."""

    def __init__(self, policy: LanguagePolicy, scripts: Mapping[int, Script]) -> None:
        self.policy, self.scripts = policy, scripts

    def write(
        self, prompts: Sequence[Prompt], places: Sequence[tuple[int, ...]], plan: Plan, context: Context
    ) -> list[Written]:
        assert self.policy.model.spell is not None
        written = []
        for prompt, before, (i, turn) in zip(prompts, self.policy.models.current.read(prompts), places, strict=True):
            ids = self.policy.model.spell(self.scripts[i].texts[turn])
            longest, total = self.policy.model.longest, len(before) + len(ids)
            if total > longest:
                what = f"the demonstration has {total} tokens up to turn {turn + 1}, and `longest` gives {longest}"
                hint = "Raise policy.backbone.longest, shorten what tools say, or leave it out."
                raise DataError(what, where=f"prompt {prompt.id}", hint=hint)
            written.append(Written(ids, [0.0] * len(ids), finished=True))
        return written


def script_of(prompt: Prompt) -> Script:
    """What a prompt's metadata demonstrates. DataError where it is nothing that can be followed."""
    where = f"prompt {prompt.id}"
    script, messages = prompt.metadata.get("script"), prompt.metadata.get("messages")
    if (script is None) == (messages is None):
        lacking = "no demonstration" if script is None else "two demonstrations"
        hint = "Its metadata needs `script`, a list of texts, or `messages`, a recorded conversation."
        raise DataError(f"{prompt.text[:80]!r} has {lacking}", where=where, hint=hint)
    if messages is not None:
        return _recorded(messages, where)
    if not _is_list(script) or not script or not all(isinstance(one, str) for one in script):
        raise DataError(f"`script` must be a list of texts, not {str(script)[:80]!r}", where=where)
    return Script(tuple(script), None)


def _recorded(messages: Any, where: str) -> Script:
    hint = 'For instance [{"role": "assistant", "content": "..."}, {"role": "tool", "content": "..."}].'
    if not _is_list(messages) or not messages:
        raise DataError("`messages` must be a list of turns", where=where, hint=hint)
    for number, one in enumerate(messages):
        role = ROLES[number % 2]
        if not isinstance(one, Mapping) or one.get("role") != role or not isinstance(one.get("content"), str):
            what = f"messages[{number}] must have the role {role!r} and a text as content, not {str(one)[:80]}"
            raise DataError(what, where=where, hint=f"The agent and its tools speak in turns. {hint}")
    texts = tuple(one["content"] for one in messages[::2])
    return Script(texts, tuple(_unwrapped(one["content"]) for one in messages[1::2]))


def _unwrapped(text: str) -> str:
    """A reply without the tags that every reply gets."""
    kept = text.strip()
    if kept.startswith("<tool_response>") and kept.endswith("</tool_response>"):
        return kept.removeprefix("<tool_response>").removesuffix("</tool_response>").strip("\n")
    return text


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
