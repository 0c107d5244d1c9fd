"""A vision-language model behind an OpenAI-compatible endpoint says how good a picture is, in one of several ways.

yes_no          P(yes) / (P(yes) + P(no)) of the first token (as Flow-Factory's `vllm_evaluate` does)
scale           the expectation of a digit 1-5 over the first token's probabilities; (x - 1) / 4
viescore        VIEScore (arXiv 2312.14867), as GEdit-Bench uses it for edits: SC = min of [success, over-editing] and
                PQ = min of [naturalness, artifacts], 0-10 each; sqrt(SC * PQ) / 10. PQ is asked without the source
two_stage       FIRM (arXiv 2603.12247), editing: the differences between source and picture are written down first;
                with them in hand execution and consistency are scored 1-5. execution * (0.6 + 0.4 * consistency), both
                mapped to 0..1
plan            FIRM, generation: a checklist is made of the prompt, once; the picture is scored 1-5 on each item and
                for quality. instruction * (0.4 + 0.6 * quality), both mapped to 0..1; instruction is the items' mean
firm_edit, firm_gen   other names of two_stage and plan, for FIRM-Edit-8B and FIRM-Gen-8B
unified_reward  UnifiedReward (arXiv 2503.05236): alignment, coherence and style 1-5, answered in its three lines;
                their mean, (x - 1) / 4
omnicontext     OmniContext (OmniGen2, arXiv 2506.18871): prompt following PF and subject consistency SC 0-10, against
                the reference pictures; sqrt(PF * SC) / 10
editreward      the two questions of EditReward (arXiv 2509.26346), instruction following and visual quality,
                1-4, asked of any judge; their mean, (x - 1) / 3. This is not EditReward's trained network, whose heads
                give numbers and no text: that one runs in its own environment and is reached by the reward `http`
kscore          KScore of Gen-Searcher (arXiv 2603.28767), which GenEvolve (arXiv 2605.21605) trains its agent with too:
                0.1 faithfulness + 0.4 visual correctness + 0.4 text accuracy + 0.1 aesthetics, each 0, 0.5 or 1. It is
                the request that counts, and not what an agent made of it. Where no text is asked for (the prompt's
                `target_text` is empty) text accuracy counts 0.5, as published, so that 0.8 is the best there is; its
                component is then left out. An episode that ended without a program scores 0 without a question: it is
                the policy that failed, and not the judge. The judge is shown the prompt's reference pictures and the
                truth in words (metadata `truth`, else `caption`), as far as there are any

All answers but those of the first two modes are sampled, `num_pass` times, and averaged. Every component is 0..1,
except `raw` of `scale`, which is 1-5.

Differences from the reference code: the prompt texts are this project's own, in plain English, so that numbers do not
compare with published ones; give the original texts in `prompts` where that matters. An answer that is cut off,
refused, not exactly of its form or out of range is asked for again with another seed and then not scored, where the
references put 0, a middle value or a random number. Capitals and leading spaces of tokens are folded, and where the
labels have less than half of the probability, nothing is scored. FIRM's judge gives one score for following the prompt;
here each item of the checklist has its own, so that their number can be checked. KScore's judge always has the true
picture beside it, says itself whether text is asked for, and is asked at temperature 0; here the truth is words and
references, and `target_text` says it, which is the same for all of a group. Levels are asked for as 0, 1 and 2: whole
numbers, that a schema can hold the judge to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlkit.endpoints import Endpoints
from rlkit.errors import nearest
from rlkit.judging.answers import Checklist, Lines, Numbers, Prose, Tokens
from rlkit.judging.judge import Sampling, Scheme, Scorer, Stage, check_options, open_chat
from rlkit.judging.templates import fingerprint, legible, optional, reads
from rlkit.types import Unscored

if TYPE_CHECKING:
    from rlkit.types import Samples

_PROMPTS = Path(__file__).with_name("prompts")


# ------------------------------------------------------------------------------ answers by stage -> value, components


def _yes_no(answers: Mapping[str, Any]) -> tuple[float, ...]:
    found = answers["answer"]
    coverage = sum(found.values())
    return found["yes"] / coverage, coverage


def _scale(answers: Mapping[str, Any]) -> tuple[float, ...]:
    found = answers["answer"]
    coverage = sum(found.values())
    raw = sum(int(digit) * probability for digit, probability in found.items()) / coverage
    return (raw - 1) / 4, raw, coverage


def _viescore(answers: Mapping[str, Any]) -> tuple[float, ...]:
    semantics, quality = (min(answers[name]["score"]) / 10 for name in ("semantics", "quality"))
    return math.sqrt(semantics * quality), semantics, quality


def _two_stage(answers: Mapping[str, Any]) -> tuple[float, ...]:
    execution, consistency = ((answers["scores"][name][0] - 1) / 4 for name in ("execution", "consistency"))
    return execution * (0.6 + 0.4 * consistency), execution, consistency


def _plan(answers: Mapping[str, Any]) -> tuple[float, ...]:
    items, (quality,) = answers["scores"]["items"], answers["scores"]["quality"]
    instruction, quality = (sum(items) / len(items) - 1) / 4, (quality - 1) / 4
    return instruction * (0.4 + 0.6 * quality), instruction, quality


def _plan_form(answers: Mapping[str, Any]) -> Numbers:
    return Numbers(1, 5, {"items": len(answers["checklist"]), "quality": None})


def _unified_reward(answers: Mapping[str, Any]) -> tuple[float, ...]:
    parts = [(answers["scores"][name][0] - 1) / 4 for name in _ASPECTS]
    return sum(parts) / len(parts), *parts


def _omnicontext(answers: Mapping[str, Any]) -> tuple[float, ...]:
    following, consistency = (answers[name]["score"][0] / 10 for name in ("following", "consistency"))
    return math.sqrt(following * consistency), following, consistency


def _editreward(answers: Mapping[str, Any]) -> tuple[float, ...]:
    instruction, quality = ((answers[name]["score"][0] - 1) / 3 for name in ("instruction", "quality"))
    return (instruction + quality) / 2, instruction, quality


def _kscore(answers: Mapping[str, Any]) -> tuple[float, ...]:
    parts = [answers["scores"][name][0] / 2 for name in _KSCORE]
    return sum(weight * part for weight, part in zip(_KSCORE.values(), parts, strict=True)), *parts


class _ForPrograms:
    """KScore: asks where there is a program, and counts text where some is asked for."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.fingerprint = scorer.fingerprint

    def __call__(self, samples: Samples) -> tuple[list[float | Unscored], dict[str, list[float | None]]]:
        n = len(samples.prompts)
        drawn = [row for row in range(n) if not samples.episodes or samples.episodes[row].program is not None]
        found, parts = self._scorer(samples.select(torch.tensor(drawn, dtype=torch.int64)))
        values: list[float | Unscored] = [0.0] * n
        columns: dict[str, list[float | None]] = {name: [0.0] * n for name in parts}
        for at, row in enumerate(drawn):
            value, text = found[at], parts["text"][at]
            if not isinstance(value, Unscored) and text is not None and not legible(samples.prompts[row]):
                value += _KSCORE["text"] * (0.5 - text)
            values[row] = value
            for name, column in columns.items():
                column[row] = parts[name][at]
        for row, prompt in enumerate(samples.prompts):
            columns["text"][row] = columns["text"][row] if legible(prompt) else None
        return values, columns

    def close(self) -> None:
        self._scorer.close()


# ------------------------------------------------------------------------------------------------------------- modes

_ASPECTS = ("Alignment", "Coherence", "Style")
_KSCORE = {"faithfulness": 0.1, "visual": 0.4, "text": 0.4, "aesthetics": 0.1}
_PAIR = Numbers(0, 10, {"score": 2})
_ONE = Numbers(0, 10, {"score": 1})
_RUBRIC = Numbers(1, 4, {"score": 1})

_TWO_STAGE = Scheme(
    (
        (Stage("differences", "two_stage_differences.txt", Prose()),),
        (Stage("scores", "two_stage_scores.txt", Numbers(1, 5, {"execution": None, "consistency": None})),),
    ),
    _two_stage,
    ("execution", "consistency"),
)
_PLAN = Scheme(
    (
        (Stage("checklist", "plan_checklist.txt", Checklist(), once=True),),
        (Stage("scores", "plan_scores.txt", _plan_form),),
    ),
    _plan,
    ("instruction", "quality"),
)
MODES = {
    "yes_no": Scheme(((Stage("answer", "yes_no.txt", Tokens(("yes", "no"))),),), _yes_no, ("coverage",)),
    "scale": Scheme(((Stage("answer", "scale.txt", Tokens(("1", "2", "3", "4", "5"))),),), _scale, ("raw", "coverage")),
    "viescore": Scheme(
        (
            (
                Stage("semantics", "viescore_semantics.txt", _PAIR),
                Stage("quality", "viescore_quality.txt", _PAIR),
            ),
        ),
        _viescore,
        ("semantics", "quality"),
    ),
    "two_stage": _TWO_STAGE,
    "plan": _PLAN,
    "firm_edit": _TWO_STAGE,
    "firm_gen": _PLAN,
    "unified_reward": Scheme(
        ((Stage("scores", "unified_reward.txt", Lines(1, 5, _ASPECTS)),),),
        _unified_reward,
        ("alignment", "coherence", "style"),
    ),
    "omnicontext": Scheme(
        (
            (
                Stage("following", "omnicontext_following.txt", _ONE),
                Stage("consistency", "omnicontext_consistency.txt", _ONE),
            ),
        ),
        _omnicontext,
        ("following", "consistency"),
    ),
    "editreward": Scheme(
        (
            (
                Stage("instruction", "editreward_instruction.txt", _RUBRIC),
                Stage("quality", "editreward_quality.txt", _RUBRIC),
            ),
        ),
        _editreward,
        ("instruction", "quality"),
    ),
    "kscore": Scheme(
        ((Stage("scores", "kscore.txt", Numbers(0, 2, dict.fromkeys(_KSCORE))),),), _kscore, tuple(_KSCORE)
    ),
}


@dataclass(frozen=True)
class VLMJudge:
    """A vision-language model behind an endpoint judges each picture: by yes or no, on a scale, or in stages.

    Modes: yes_no, scale, viescore, two_stage, plan, firm_edit, firm_gen, unified_reward, omnicontext, editreward,
    kscore; the head of this file says what each computes. Thinking models have to be told not to think where the first
    token is read: body: {chat_template_kwargs: {enable_thinking: false}}.
    """

    endpoints: Endpoints  # {urls: [http://127.0.0.1:8000], key_env: NAME}, addresses without /v1
    model: str | None = None  # its name at the endpoint; null: the only one there (a cache of scores cannot tell which)
    mode: str = "yes_no"  # what is asked, and how the answers become a number
    prompts: Mapping[str, str] = field(default_factory=dict)  # stage of the mode: path of your own prompt file
    num_pass: int = 1  # how often each sample is judged; the mean is taken
    attempts: int = 3  # how often an answer that cannot be read is asked for
    sampling: Sampling = field(default_factory=Sampling)  # {temperature: 0.7, top_p: 0.9, top_k: 20, max_tokens: 512}
    guided: bool = True  # hold answers to a JSON schema; false for endpoints that cannot
    body: Mapping[str, Any] = field(default_factory=dict)  # more fields of each request

    reads = ("prompt",)  # an instance's own: what the prompts of its mode show
    optional = ()  # so is this: what they show where there is any
    range = (0.0, 1.0)
    higher_is_better = True
    components = (
        "coverage",
        "raw",
        "semantics",
        "quality",
        "execution",
        "consistency",
        "instruction",
        "alignment",
        "coherence",
        "style",
        "following",
        "faithfulness",
        "visual",
        "text",
        "aesthetics",
    )  # an instance's own: those of its mode
    groupwise = False
    licence = "that of the model behind the endpoint"
    size = "none here; the endpoint's model"
    protocol = "one of eleven modes: VIEScore, FIRM, OmniContext, KScore and others, with prompts of rlkit's own"
    version = "1"  # and, of an instance, its prompts' fingerprint

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is none of {', '.join(MODES)}.{nearest(self.mode, MODES)}")
        check_options(self.endpoints, self.attempts, self.body)
        if self.num_pass < 1:
            raise ValueError(f"num_pass must be 1 or more, not {self.num_pass}")
        if self.num_pass > 1 and self.mode in ("yes_no", "scale"):
            raise ValueError(f"mode {self.mode} reads probabilities, which are the same each time: leave num_pass at 1")
        shown = self._scheme.templates(_PROMPTS, self.prompts)  # so that a bad file is found before anything runs
        object.__setattr__(self, "reads", reads(shown))
        looked_at = (*optional(shown), *(("target_text", "episode") if self.mode == "kscore" else ()))
        object.__setattr__(self, "optional", tuple(dict.fromkeys(looked_at)))
        object.__setattr__(self, "components", self._scheme.components)
        object.__setattr__(self, "version", f"{self.version}-{fingerprint(shown)}")

    def load(self, device: torch.device) -> Scorer | _ForPrograms:
        chat = open_chat(self.endpoints, self.model, self.sampling, self.attempts, self.guided, self.body)
        scorer = Scorer(chat, self._scheme, self._scheme.templates(_PROMPTS, self.prompts), self.num_pass)
        return _ForPrograms(scorer) if self.mode == "kscore" else scorer

    @property
    def _scheme(self) -> Scheme:
        return MODES[self.mode]
