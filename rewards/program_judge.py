"""A language model behind an OpenAI-compatible endpoint says whether an agent's program is adequate to the request.

The program is what an agent answers: a prompt for a generator, and the pictures that it chose as references (GenEvolve,
arXiv 2605.21605, whose reward is half of this kind and half KScore). No picture is looked at, so a good program is not
blamed for a weak generator. Three aspects, 0 to 4 each: facts, completeness, references; the value is the mean of the
three, divided by 4.

What is right stands in the prompt's metadata, as `truth` or else `caption`; without either the judge goes by what it
knows. References are shown as a tool's reply listed them, "NAME: title"; which tool that was is not checked.

A sample without a program (its text is empty) scores 0 and is not asked about: that the agent came to no answer is its
own failure, not the judge's. What the judge fails at is not scored.

Differences from the text reward of Gen-Searcher (arXiv 2603.28767), which GenEvolve builds on: it asks for one number
of five levels and shows the true picture, here there are three numbers, and the truth is words; the prompt is this
project's own; answers are read strictly, where the reference takes the nearest level and gives 0 to an answer that it
cannot read. A program is asked about once; set the temperature to 0 for a judge that always says the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlkit.endpoints import Endpoints
from rlkit.errors import RewardError
from rlkit.judging.answers import Numbers
from rlkit.judging.judge import Chat, Question, Sampling, check_options, open_chat
from rlkit.judging.templates import TEXTS, Template, fingerprint, optional, quoted, read_template, reads, texts_of
from rlkit.types import Unscored

if TYPE_CHECKING:
    import torch

    from rlkit.episodes import Episode
    from rlkit.types import Samples

_PROMPT = Path(__file__).with_name("prompts") / "program_judge.txt"
_SHOWN = (*TEXTS, "program", "titles")
_HIGHEST = 4
_ASPECTS = ("facts", "complete", "references")
_FORM = Numbers(0, _HIGHEST, dict.fromkeys(_ASPECTS))


@dataclass(frozen=True)
class ProgramJudge:
    """A language model behind an endpoint judges an agent's program, no picture: facts, completeness, references."""

    endpoints: Endpoints  # {urls: [http://127.0.0.1:8000], key_env: NAME}, addresses without /v1
    model: str | None = None  # its name at the endpoint; null: the only one there (a cache of scores cannot tell which)
    template: str | None = None  # the path of your own prompt file; it must show $program, and may show $titles, $truth
    attempts: int = 3  # how often an answer that cannot be read is asked for
    sampling: Sampling = field(default_factory=Sampling)  # {temperature: 0.7, top_p: 0.9, top_k: 20, max_tokens: 512}
    guided: bool = True  # hold answers to a JSON schema; false for endpoints that cannot
    body: Mapping[str, Any] = field(default_factory=dict)  # more fields of each request

    reads = ("prompt", "text")  # an instance's own: what its prompt file shows
    optional = ("metadata", "episode")  # so is this
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("facts", "complete", "references")
    groupwise = False
    licence = "that of the model behind the endpoint"
    size = "none here; the endpoint's model"
    protocol = "three aspects with a prompt of rlkit's own, after the text reward of Gen-Searcher, arXiv 2603.28767"
    version = "1"  # and, of an instance, its prompt's fingerprint

    def __post_init__(self) -> None:
        check_options(self.endpoints, self.attempts, self.body)
        shown = {"program": self._prompt()}  # so that a bad file is found before anything runs
        object.__setattr__(self, "reads", (*reads(shown), "text"))
        chosen = ("episode",) if "titles" in shown["program"].names else ()
        object.__setattr__(self, "optional", (*optional(shown), *chosen))
        object.__setattr__(self, "version", f"{self.version}-{fingerprint(shown)}")

    def load(self, device: torch.device) -> _Scorer:
        chat = open_chat(self.endpoints, self.model, self.sampling, self.attempts, self.guided, self.body)
        return _Scorer(chat, self._prompt())

    def _prompt(self) -> Template:
        path = _PROMPT if self.template is None else Path(self.template)
        template = read_template(path, _SHOWN)
        if "program" not in template.names:
            raise ValueError(f"{path} must show $program")
        return template


class _Scorer:
    def __init__(self, chat: Chat, template: Template) -> None:
        self._chat, self._template = chat, template
        self.fingerprint = chat.model  # the endpoint's only one may be another tomorrow

    def __call__(self, samples: Samples) -> tuple[list[float | Unscored], dict[str, list[float | None]]]:
        if len(samples.texts) != len(samples.prompts):
            hint = "program_judge is for rollouts that write, such as agent."
            raise RewardError("these samples have no texts to judge", hint=hint)
        rows = [self._question(samples, row) for row in range(len(samples.prompts))]
        answers = iter(self._chat.ask([row for row in rows if isinstance(row, Question)]))
        parts = [_parts(next(answers) if isinstance(row, Question) else row) for row in rows]
        values = [one if isinstance(one, Unscored) else fmean(one) for one in parts]
        return values, {
            name: [None if isinstance(one, Unscored) else one[position] for one in parts]
            for position, name in enumerate(_ASPECTS)
        }

    def close(self) -> None:
        self._chat.close()

    def _question(self, samples: Samples, row: int) -> Question | Unscored | None:
        """None: there is no program to ask about."""
        program = samples.texts[row]
        if not program.strip():
            return None
        texts = texts_of(samples.prompts[row], self._template.names)
        if isinstance(texts, Unscored):
            return texts
        chosen = quoted(titles(samples.episodes[row])) if samples.episodes else ""
        more = {"program": quoted(program), "titles": chosen or "none"}
        return Question(self._template.fill({**texts, **more}, {}), _FORM)


def _parts(answer: Mapping[str, tuple[float, ...]] | Unscored | None) -> tuple[float, ...] | Unscored:
    if isinstance(answer, Unscored):
        return answer
    return tuple(0.0 if answer is None else answer[name][0] / _HIGHEST for name in _ASPECTS)


def titles(episode: Episode) -> tuple[str, ...]:
    """The references of its program, each as the line "NAME: title" of a reply that showed it, or by its name alone."""
    if episode.program is None:
        return ()
    lines = [line.strip() for call in episode.calls for line in call.reply.splitlines()]
    return tuple(
        next((line for line in lines if line.startswith(f"{name}: ")), name)
        for name in episode.program.reference_images
    )
