"""An agent: it answers a request in turns (ReAct, arXiv 2210.03629), as GenEvolve's does (arXiv 2605.21605).

In each turn it writes its thoughts and a tool call, and is told what the tool said; its last turn is an answer, a
prompt-reference program, of which a renderer draws the picture. All episodes of a step go on together: one turn of each
is written in one call of the writer, and their tools run at the same time.

The tokens that the agent wrote are decided; the request, and what tools said, are not. What was said before stays as it
is, token for token, so that the log-probs of the rollout are those of the whole conversation.

A turn that cannot be understood is told why, and goes on. What a tool, or a policy, does wrong ends no run: an episode
that runs out of turns, calls or tokens has no program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rlkit import registry
from rlkit.agents.tooling import Pictures, Toolbox
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.episodes import Call, Episode, Program, Turn
from rlkit.errors import DataError, RecipeError, nearest
from rlkit.language import LanguagePolicy
from rlkit.rollouts._rendering import renderer, told
from rlkit.rollouts._token_samples import Spoken, Written, texts_of, tokens_of
from rlkit.types import Context, Plan, Prompt, Samples


@dataclass(frozen=True)
class Agent:
    """A policy that calls tools, turn by turn, and ends with a program, of which a renderer draws the picture."""

    kind = "tokens"
    gives = ("log_prob",)
    steps = 0  # of denoising: the renderer has its own

    # Who writes the turns: a rollout of words with its options; its `most` is the tokens of one turn.
    writer: Mapping[str, Any] = field(default_factory=lambda: {"name": "local"})
    # {NAME: {option: value}}, by the names that the agent calls them; {NAME: {tool: ENTRY, ...}} where those differ.
    tools: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    renderer: Mapping[str, Any] | None = None  # {backbone: {name: tiny}, steps: 10} or {url: ..., size: [H, W]}
    instructions: str | None = None  # what the agent is told to be; None: its tools and the form of its turns
    turns: int = 12  # of an episode, the answer's among them
    calls: int = 11  # tool calls that are made in an episode
    seconds: float = 10.0  # that a tool call may take
    observation: int = 4000  # characters of what a tool says; the rest is left out

    def __post_init__(self) -> None:
        for name, least in (("turns", 1), ("calls", 0), ("observation", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be above 0, not {self.seconds}")
        self._check_writer()
        self.built_tools()
        if self.renderer is not None:
            renderer(self.renderer, "rollout.renderer")

    @property
    def makes(self) -> tuple[str, ...]:
        return ("text", "episode") if self.renderer is None else ("text", "image", "episode")

    def _check_writer(self) -> None:
        entry, name, where = self.built_writer(), self.writer.get("name"), "rollout.writer"
        kinds = getattr(entry, "kinds", (getattr(entry, "kind", "tokens"),))
        whole = isinstance(entry, Agent) or getattr(entry, "parts", False) or getattr(entry, "reads", ())
        if "tokens" not in kinds or whole or getattr(entry, "temperature", None) is None:
            what = f"{name!r} does not write one turn after the other."
            raise RecipeError(what, where=where, hint="Use local or vllm.")
        if getattr(entry, "ahead", 0):
            what = "nobody knows what an agent will be asked next before its tools have answered."
            raise RecipeError(what, where=f"{where}.ahead", hint="Set ahead: 0.")

    @property
    def single(self) -> bool:
        return bool(getattr(self.built_writer(), "single", False))

    def missing(self) -> str:
        look = getattr(self.built_writer(), "missing", None)
        return look() if look is not None else ""

    def built_writer(self) -> Any:
        options = dict(self.writer)
        return registry.build("rollouts", str(options.pop("name", "local")), options, "rollout.writer")

    def built_tools(self) -> dict[str, Any]:
        built = {}
        for name, given in self.tools.items():
            if given is not None:
                options = dict(given)
                entry = str(options.pop("tool", name))
                built[name] = registry.build("tools", entry, options, f"rollout.tools.{name}")
        return built

    def start(self, policy: LanguagePolicy, processes: Processes) -> AgentRollout:
        return AgentRollout(self, policy, processes)


class Writes(Protocol):
    """A started rollout that answers prompts of any number, whoever asks."""

    def write(
        self, prompts: Sequence[Prompt], places: Sequence[tuple[int, ...]], plan: Plan, context: Context
    ) -> list[Written]: ...


# ---- one episode -----------------------------------------------------------------------------------------------------


class Conversation:
    """One episode under way. `prompt` and `ids` are all that stands before its newest answer, or before its next."""

    def __init__(self, place: int, prompt: Prompt, turns: int, calls: int) -> None:
        """place: of the sample in the step. turns, calls: how many it may have."""
        self.place, self.prompt, self.turns, self.allowed = place, prompt, turns, calls
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.answers: list[tuple[int, Written]] = []  # each with how many tokens stand before it
        self.calls: list[Call] = []
        self.shown: dict[str, Tensor] = {}  # pictures by the names that the agent knows them by
        self.replies: Sequence[str] | None = None  # that were recorded, and are said in the place of the tools'
        self.program: Program | None = None
        self.ended: Literal["answer", "turns", "calls", "tokens"] | None = None

    def take(self, answer: Written, text: str, read: Call | Program) -> None:
        """A turn that was written, and how it is understood."""
        self.answers.append((len(self.ids), answer))
        if isinstance(read, Program):
            problem = self._unknown(read)
            if not problem:
                self.program, self.ended = read, "answer"
                return
            read = Call(text, invalid=problem)
        if not read.invalid and sum(not call.invalid for call in self.calls) == self.allowed:
            read, self.ended = replace(read, invalid="no tool call is left: write the answer."), "calls"
        elif len(self.answers) == self.turns:
            self.ended = "turns"
        self.calls.append(read)

    def _unknown(self, program: Program) -> str:
        """What is wrong with the pictures that a program names. Those of a recorded conversation are not at hand."""
        for name in program.reference_images if self.replies is None else ():
            if name not in self.shown:
                known = f"Shown: {', '.join(self.shown)}." if self.shown else "None was shown: leave it out."
                return f"no picture named {name[:80]!r} was shown.{nearest(name, self.shown)} {known}"
        return ""

    def hear(self, call: Call, pictures: Pictures, sees: bool) -> Prompt:
        """The prompt of the next turn, once this was said to the last one. sees: the policy is given the pictures."""
        names = [f"IMG_{len(self.shown) + i}" for i in range(1, len(pictures) + 1)]
        titles = [f"{name}: {title}" for name, (title, _) in zip(names, pictures, strict=True)]
        reply = re.sub(r"<(/?)tool_response>", r"<\1tool response>", "\n".join(filter(None, [call.reply, *titles])))
        self.calls[-1] = replace(call, reply=reply)
        self.shown |= dict(zip(names, (one for _, one in pictures), strict=True))
        answer = tuple(self.answers[-1][1].ids)
        told = f"<tool_response>\n{reply}\n</tool_response>"
        turn = Turn(answer, told, tuple(one for _, one in pictures) if sees else ())
        return replace(self.prompt, turns=(*self.prompt.turns, turn))

    def go_on(self, prompt: Prompt, ids: Tensor) -> None:
        """With what stands before the next answer."""
        before = [*self.ids.tolist(), *(self.answers[-1][1].ids if self.answers else ())]
        if ids[: len(before)].tolist() != before:
            what = "does not read conversations: what was said before has to stay as it was, token for token."
            raise RecipeError(what, where="policy.backbone", hint="Choose qwen or qwen_vl, or see TokenModel.encode.")
        self.prompt, self.ids = prompt, ids

    @property
    def episode(self) -> Episode:
        assert self.ended is not None
        return Episode(tuple(self.calls), self.program, self.ended)

    @property
    def spoken(self) -> Spoken:
        finished = self.program is not None and self.answers[-1][1].finished
        return Spoken(self.ids, tuple(self.answers), finished)


# ---- the rollout -----------------------------------------------------------------------------------------------------


class AgentRollout:
    """A started `Agent`. The episodes of a process are its own: writer, tools and renderer know of no other's."""

    def __init__(self, options: Agent, policy: LanguagePolicy, processes: Processes) -> None:
        self.options, self.policy, self.processes = options, policy, processes
        entry = options.built_writer()
        self.temperature: float = entry.temperature
        self.writer: Any = entry.start(policy, processes)
        try:
            self.toolbox = Toolbox(options.built_tools(), options.seconds, options.observation)
        except ValueError as error:  # of names and signatures, which only the tools themselves know
            raise RecipeError(str(error), where="rollout.tools") from error
        self.renderer: Any = None
        if options.renderer is not None:
            self.renderer = renderer(options.renderer, "rollout.renderer").start(policy.precision, processes)
        self.instructions = self.toolbox.described() if options.instructions is None else options.instructions
        self.version = 0

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.version = version
        self.writer.load(weights, version)

    def health(self) -> str:
        return str(self.writer.health())

    def close(self) -> None:
        close = getattr(self.writer, "close", None)  # the rollout of this process has nothing to close
        for end in (close, self.toolbox.close, None if self.renderer is None else self.renderer.close):
            if end is not None:
                end()

    def collect(self, prompts: PromptBatch, plan: Plan, context: Context) -> Samples:
        """This process's share of the step's samples, an episode each."""
        turns, calls = self.options.turns, self.options.calls
        share = self.processes.share(len(prompts))
        begun = [Conversation(i, self.asked(prompts.of(i)), turns, calls) for i in share]
        self.play(begun, self.writer, plan, context)
        return self.samples(begun, prompts, context, self.temperature)

    def asked(self, prompt: Prompt) -> Prompt:
        """A request with the instructions before what its data says to the agent."""
        return replace(prompt, system="\n\n".join(filter(None, (self.instructions, prompt.system))))

    def play(
        self, conversations: Sequence[Conversation], writer: Writes, plan: Plan, context: Context, whole: bool = False
    ) -> None:
        """All of them to their ends, turn by turn. whole: one that does not fit is a DataError."""
        self.policy.conditions.forget_conversations()
        self.toolbox.renew()
        for one in conversations:
            one.go_on(one.prompt, self._read(one.prompt))
        under_way, turn = list(conversations), 0
        while under_way:
            prompts = [one.prompt for one in under_way]
            told = writer.write(prompts, [(one.place, turn) for one in under_way], plan, context)
            texts = texts_of(self.policy.model, told)
            for one, answer, text in zip(under_way, told, texts, strict=True):
                one.take(answer, text, self.toolbox.parse(text))
            under_way, turn = [one for one in under_way if one.ended is None], turn + 1
            for one, (call, pictures) in zip(under_way, self._replies(under_way), strict=True):
                self._say(one, call, pictures, whole)
            under_way = [one for one in under_way if one.ended is None]
            needed = {one.prompt.key for one in conversations}  # to write on, and to learn from
            self.policy.conditions.forget(prompt for prompt in prompts if prompt.key not in needed)

    def _replies(self, under_way: Sequence[Conversation]) -> list[tuple[Call, Pictures]]:
        """What is said to the newest turn of each: by the tools, all at once, or as it was recorded."""
        ran = iter(self.toolbox.run([one.calls[-1] for one in under_way if one.replies is None]))
        return [
            next(ran) if one.replies is None else (replace(one.calls[-1], reply=one.replies[len(one.calls) - 1]), ())
            for one in under_way
        ]

    def _say(self, one: Conversation, call: Call, pictures: Pictures, whole: bool) -> None:
        prompt = one.hear(call, pictures, self.policy.model.picture is not None)
        try:
            ids = self._read(prompt)
        except DataError:  # too long for another answer, or more pictures than it reads: the episode ends here
            if whole:
                raise
            one.ended = "tokens"
        else:
            one.go_on(prompt, ids)

    def _read(self, prompt: Prompt) -> Tensor:
        """The ids of all that stands before the next answer."""
        (ids,) = self.policy.models.current.read([prompt])
        return ids

    def samples(
        self, ended: Sequence[Conversation], prompts: PromptBatch, context: Context, temperature: float
    ) -> Samples:
        """Episodes that have ended, with their programs as texts and as pictures."""
        index = torch.tensor([one.place for one in ended], dtype=torch.int64)
        programs = {one.place: told(one.prompt, one.program, one.shown) for one in ended if one.program is not None}
        nothing = torch.zeros(len(ended), 0)
        return Samples(
            media=nothing if self.renderer is None else self.renderer.draw(programs, prompts, context),
            latents=nothing,
            prompts=tuple(one.prompt for one in ended),
            group=index // prompts.group,
            index=index,
            sample_id=context.step * len(prompts) + index,
            version=self.version,
            total=len(prompts),
            tokens=tokens_of([one.spoken for one in ended], temperature),
            texts=tuple("" if one.program is None else one.program.gen_prompt for one in ended),
            episodes=tuple(one.episode for one in ended),
        )
