"""EditScore (arXiv 2509.23909, VectorSpaceLab/EditScore): a judge trained to score edits, behind an endpoint.

Two questions a pass. With source, instruction and picture: SC = [edit success, over-editing]. With the picture alone:
PQ = [naturalness, artifacts]. Each score is 0-25, and reasons come before scores. A pass is sqrt(min SC * min PQ) / 25;
the value is the mean over `num_pass` seeds (avg@N), as with the reference's default reduction. Components, 0..1:
semantics (min SC), quality (min PQ), following and restraint (the two of SC).

The weights (EditScore-7B and others: adapters on Qwen2.5-VL or Qwen3-VL) are served by vLLM; any other judge can answer
in the same form. The sampling and max_tokens are the reference's.

Differences from the reference code: its prompts are not shipped, so numbers do not compare with published ones unless
`prompts: {semantics: FILE, quality: FILE}` gives the original texts. PQ never sees the source, as in the reference's
`evaluate`; its `batch_evaluate` shows it. What the reference scores in spite of a failure is not scored here: a score
of 26 or -1 (there 1.118), an answer without digits (there 0.5), an answer that was cut off (there whatever digits it
has), a guess after some tries. Seeds come from the content of a question, and not from a counter. `guided` holds the
answer to a schema; the reference does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.endpoints import Endpoints
from rlkit.judging.answers import Numbers
from rlkit.judging.judge import Sampling, Scheme, Scorer, Stage, check_options, open_chat
from rlkit.judging.templates import fingerprint, optional

if TYPE_CHECKING:
    import torch

_PROMPTS = Path(__file__).with_name("prompts")
_HIGHEST = 25


def _total(answers: Mapping[str, Any]) -> tuple[float, ...]:
    following, restraint = (one / _HIGHEST for one in answers["semantics"]["score"])
    semantics, quality = min(following, restraint), min(answers["quality"]["score"]) / _HIGHEST
    return math.sqrt(semantics * quality), semantics, quality, following, restraint


_PAIR = Numbers(0, _HIGHEST, {"score": 2})
_SCHEME = Scheme(
    (
        (
            Stage("semantics", "editscore_semantics.txt", _PAIR),
            Stage("quality", "editscore_quality.txt", _PAIR),
        ),
    ),
    _total,
    ("semantics", "quality", "following", "restraint"),
)


@dataclass(frozen=True)
class EditScore:
    """EditScore: success, restraint and quality of an edit by a judge behind an endpoint, averaged over N passes."""

    endpoints: Endpoints  # {urls: [http://127.0.0.1:8000], key_env: NAME}, addresses without /v1
    model: str | None = None  # its name at the endpoint; null: the only one there (a cache of scores cannot tell which)
    prompts: Mapping[str, str] = field(default_factory=dict)  # semantics, quality: path of your own prompt file
    num_pass: int = 1  # N of avg@N: how often each sample is judged, each time with another seed
    attempts: int = 3  # how often an answer that cannot be read is asked for
    sampling: Sampling = field(default_factory=Sampling)  # {temperature: 0.7, top_p: 0.9, top_k: 20, max_tokens: 512}
    guided: bool = True  # hold answers to a JSON schema; false for endpoints that cannot
    body: Mapping[str, Any] = field(default_factory=dict)  # more fields of each request

    reads = ("prompt", "source")
    optional: tuple[str, ...] = ()  # an instance's own
    range = (0.0, 1.0)
    higher_is_better = True
    components = ("semantics", "quality", "following", "restraint")
    groupwise = False
    licence = "Apache-2.0 (EditScore's code and adapters); the base model has its own"
    size = "none here; about 9 GB at the endpoint for the 4B model"
    protocol = "EditScore, arXiv 2509.23909, with prompts of rlkit's own"
    version = "1"  # and, of an instance, its prompts' fingerprint

    def __post_init__(self) -> None:
        check_options(self.endpoints, self.attempts, self.body)
        if self.num_pass < 1:
            raise ValueError(f"num_pass must be 1 or more, not {self.num_pass}")
        shown = _SCHEME.templates(_PROMPTS, self.prompts)  # so that a bad file is found before anything runs
        object.__setattr__(self, "optional", optional(shown))
        object.__setattr__(self, "version", f"{self.version}-{fingerprint(shown)}")

    def load(self, device: torch.device) -> Scorer:
        chat = open_chat(self.endpoints, self.model, self.sampling, self.attempts, self.guided, self.body)
        return Scorer(chat, _SCHEME, _SCHEME.templates(_PROMPTS, self.prompts), self.num_pass)
