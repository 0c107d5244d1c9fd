"""The nouns that travel between rooms: plans, samples, scores, rows, losses, and the protocols of the catalogues.

Axes, used everywhere: N samples, G group size, S recorded decisions per sample (denoising steps or tokens),
C H W, D condition, R rewards, B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path as Path_
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from rlkit.episodes import Episode, Turn

State = dict[str, Any]
"""What an algorithm remembers between steps: tensors and json values. It is saved in every checkpoint."""

Condition = Mapping[str, Tensor]
"""What a network is conditioned on, one prompt, no batch axis: `{"tokens": [L, D], "pooled": [D]}`."""


@dataclass(frozen=True)
class Prompt:
    """One row of a data set. `id` is unique in its data set and is what groups are keyed by."""

    id: int
    text: str
    kind: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    target_text: tuple[str, ...] = ()  # what should be legible in the picture
    source: Tensor | None = field(default=None, compare=False, repr=False)  # [3, H, W] in 0..1, to edit or to repeat
    references: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)  # [3, H, W] each
    size: tuple[int, int] | None = None  # height and width of the picture wanted; None: as the backbone says
    # Where a policy wrote this text: what it was asked, and the token ids of its answer.
    asked: Prompt | None = field(default=None, compare=False, repr=False)
    answer: tuple[int, ...] = ()
    # A conversation: what a language model is told to be, in the place of its backbone's `system`, and what it has
    # written and been told so far. It writes next.
    system: str = ""
    turns: tuple[Turn, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """What a policy's condition is kept under: all that a network is told by this prompt."""
        if self.asked is not None:  # two answers may read alike and be of other tokens
            return hashlib.sha256(repr((self.asked.key, self.answer)).encode()).hexdigest()
        pictures = (*([] if self.source is None else [self.source]), *self.references)
        sized = "" if self.size is None else f"\n{self.size[0]}x{self.size[1]}"
        spoken = f"\n{self._conversation()}" if self.system or self.turns else ""
        if not pictures:
            return self.text + sized + spoken
        digest = hashlib.sha256(b"source" if self.source is not None else b"")
        for one in pictures:
            _digest_picture(digest, one)
        return f"{self.text}\n{digest.hexdigest()}{sized}{spoken}"

    def _conversation(self) -> str:
        digest = hashlib.sha256(repr((self.system, [(one.answer, one.reply) for one in self.turns])).encode())
        for number, turn in enumerate(self.turns):
            for one in turn.pictures:
                digest.update(f"turn {number}".encode())
                _digest_picture(digest, one)
        return digest.hexdigest()


def _digest_picture(digest: Any, picture: Tensor) -> None:
    digest.update(repr(tuple(picture.shape)).encode())
    digest.update((picture.detach().cpu() * 255).round().to(torch.uint8).contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Unscored:
    """In the place of a reward's number: there is none, and why. It is masked and counted, and never becomes a 0."""

    reason: str


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of its surroundings, so that a recipe can be refused before anything is loaded."""

    kind: Literal["flow", "tokens"] = "flow"
    path: bool = False  # the states of the sampling path, not only its end
    log_prob: bool = False  # a density for each recorded step: rules out ODE sampling
    group: int = 1  # the smallest group that gives an advantage
    window: int | None = None  # recorded steps a sample; None: all but the last
    last_start: int = 0  # the latest step at which the window may start
    train_fraction: float = 1.0  # share of the recorded steps that become rows
    rows: int | None = None  # rows a sample, where there is no path
    pairs: int | None = None  # rows a group, where rows are pairs of its members
    advantage: bool = False  # the policy's gradient is 0 where all scores of a group are equal
    rewards: bool = True  # it reads scores: a stage without rewards is refused
    preference: bool = False  # pairs of which somebody chose one
    old: bool = False  # a copy of the weights that sampled, refreshed by `after`
    reference: bool = False
    previews: bool = False  # completions of intermediate states
    differentiable: bool = False  # rewards must pass a gradient to the picture
    corrects: bool = False  # it weighs samples for the weights that made them: older ones, or an engine's copy

    def trained(self, recorded: int) -> int:
        """How many of a sample's recorded steps become rows."""
        return max(1, round(self.train_fraction * recorded))


@dataclass(frozen=True)
class Plan:
    """How an algorithm wants one step sampled."""

    dynamics: Literal["flow", "dance", "cps", "ode"] = "ode"
    noise_level: float | tuple[float, ...] = 0.0  # one for all steps, or one for each step of the schedule
    window: tuple[int, int] | None = None  # (first step, how many) that are stochastic or recorded; None: every step
    shared_noise: bool = False  # one initial noise per group
    record: bool = False  # keep the path inside the window
    steps: int | None = None  # denoising steps; None: as the rollout says
    solver: Literal["euler", "dpm"] = "euler"  # of the noiseless steps; dpm is DPM-Solver++(2M)
    tail: int | None = None  # steps after the window, spread over the rest of the schedule; None: all of them
    completions: int | None = None  # previews: ODE steps from each recorded state to its picture; 0: those of the path
    policy_set: str = "current"

    def level(self, step: int) -> float:
        """The noise level of one step of the schedule."""
        return self.noise_level if isinstance(self.noise_level, int | float) else self.noise_level[step]


@dataclass(frozen=True)
class Path:
    """The recorded decisions of every sample: the K steps of the window, in fp32.

    Sigmas come from the scheduler once, here, and the trainer never computes them again.
    """

    states: Tensor  # [N, K+1, C, H, W]
    means: Tensor  # [N, K, C, H, W]
    log_prob: Tensor  # [N, K]; NaN for a noiseless step, which has no density
    sigmas: Tensor  # [K+1]
    noise_levels: Tensor  # [K]
    steps: Tensor  # [K] int64, positions in the schedule
    sigma_max: float  # the schedule's second sigma (Flow-SDE's patch at sigma = 1)


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of an answer, all sampled by one version of the weights."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Tokens:
    """The sequences of N samples, prompt and answer, as the policy that sampled saw them: never tokenised again.

    An answer may hold tokens that others wrote (what a tool said): they are part of the sequence, and not decided.
    """

    ids: Tensor  # [N, L] int64, padded at the end
    length: Tensor  # [N] int64, without the padding
    prompt: Tensor  # [N] int64, how many of them are the prompt
    decided: Tensor  # [N, L] bool: tokens that the policy chose
    log_prob: Tensor  # [N, L] fp32 of each decided token under the weights that sampled it; 0 elsewhere
    finished: Tensor  # [N] bool: ended by a token for the end; false: cut off by a limit
    temperature: float  # of the distribution sampled from: softmax(logits / temperature)
    spans: tuple[tuple[Span, ...], ...] = ()  # [N] the versions that sampled each answer; (): the samples' one version

    def select(self, positions: Tensor) -> Tokens:
        chosen = positions.tolist()
        return Tokens(
            self.ids[positions],
            self.length[positions],
            self.prompt[positions],
            self.decided[positions],
            self.log_prob[positions],
            self.finished[positions],
            self.temperature,
            tuple(self.spans[i] for i in chosen) if self.spans else (),
        )


@dataclass(frozen=True)
class Samples:
    """What a rollout returns: this process's share of the step's N_total samples, in ascending `index`.

    Of a token policy: `tokens` and `texts`; it draws nothing, so that media and latents are [N, 0].
    """

    media: Tensor  # [N, C, H, W] in 0..1, rounded to 1/255
    latents: Tensor  # [N, C, H, W] fp32, clean
    prompts: tuple[Prompt, ...]
    group: Tensor  # [N] int64
    index: Tensor  # [N] int64, position among all samples of this step over all processes
    sample_id: Tensor  # [N] int64, unique in the stage
    version: int  # of the weights that sampled
    total: int  # N_total
    path: Path | None = None
    sigmas: Tensor | None = None  # [T+1] the schedule that sampled; None for pictures that nobody sampled
    preference: Tensor | None = None  # [N] bool, true for the preferred half of each pair of a data set
    previews: Samples | None = None  # [M] completions of recorded states; what members share is there once
    preview_of: Tensor | None = None  # [N, K] int64, the preview that completes this decision's state; -1: none
    tokens: Tokens | None = None
    texts: tuple[str, ...] = ()  # [N] the answers of a token policy
    shots: Samples | None = None  # [N * k] k pictures of each sample, neighbours, whose scores are averaged
    episodes: tuple[Episode, ...] = ()  # [N] what an agent did before its answer, whose gen_prompt `texts` then holds
    refilled: int = 0  # groups of the step, over all processes, that were too old and were sampled again

    @property
    def oldest(self) -> Tensor:
        """[N] int64, the oldest version of the weights that had a part in each sample."""
        spans = () if self.tokens is None else self.tokens.spans
        found = [min((span.version for span in one), default=self.version) for one in spans]
        return torch.tensor(found if spans else [self.version] * len(self), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, positions: Tensor) -> Samples:
        """The samples at these positions, in this order; paths and previews stay behind: rewards do not read them."""
        return replace(
            self,
            media=self.media[positions],
            latents=self.latents[positions],
            prompts=tuple(self.prompts[i] for i in positions.tolist()),
            group=self.group[positions],
            index=self.index[positions],
            sample_id=self.sample_id[positions],
            preference=None if self.preference is None else self.preference[positions],
            tokens=None if self.tokens is None else self.tokens.select(positions),
            texts=tuple(self.texts[i] for i in positions.tolist()) if self.texts else (),
            episodes=tuple(self.episodes[i] for i in positions.tolist()) if self.episodes else (),
            path=None,
            previews=None,
            preview_of=None,
            shots=None,
        )


@dataclass(frozen=True)
class Scores:
    """Every reward of every sample, raw and weighted, with validity; the breakdown survives to the log."""

    names: tuple[str, ...]
    raw: Tensor  # [N, R] as the rewards returned them; NaN where not scored
    valid: Tensor  # [N, R] bool
    weights: Tensor  # [R]
    components: Mapping[str, Tensor] = field(default_factory=dict)  # "reward/component" -> [N]
    previews: Scores | None = None  # of the samples' previews, [M, R]
    values: Tensor | None = None  # [N, R] raw, turned so that more is better, shifted, scaled, clipped; None: as raw
    combined: Tensor | None = None  # [N] where the total is more than a weighted sum; NaN where not scored

    @property
    def scored(self) -> Tensor:
        """[N] bool: every reward that counts gave a number. A sample with one missing is masked whole."""
        counted = (self.valid | (self.weights == 0)).all(dim=1)
        return counted if self.combined is None else counted & torch.isfinite(self.combined)

    @property
    def used(self) -> Tensor:
        """[N, R] what the total is made of: `values` where there are any, else the rewards' own numbers."""
        return self.raw if self.values is None else self.values

    @property
    def total(self) -> Tensor:
        """[N] fp32: the weighted sum, or what the recipe's `total` makes of it; 0 where not scored, which `scored`
        masks."""
        values = torch.where(self.valid, self.used, torch.zeros_like(self.used))
        total = values @ self.weights if self.combined is None else self.combined
        return torch.where(self.scored, total, torch.zeros(len(values)))


@dataclass(frozen=True)
class Rows:
    """What one optimiser step eats. Columns share the first axis; `row` is global over all processes."""

    row: Tensor  # [B] int64

    def __len__(self) -> int:
        return len(self.row)

    def columns(self) -> dict[str, Tensor | tuple[Any, ...]]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def select(self, positions: Tensor) -> Self:
        """The rows at these positions, in this order. Scalars of all rows (tensors without axes) stay."""
        chosen: dict[str, Any] = {}
        for name, column in self.columns().items():
            if isinstance(column, tuple):
                chosen[name] = tuple(column[i] for i in positions.tolist())
            else:
                chosen[name] = column[positions] if column.ndim else column
        return replace(self, **chosen)

    def to(self, device: torch.device) -> Self:
        """The same rows with their tensors on a device."""
        moved = {name: c if isinstance(c, tuple) else c.to(device) for name, c in self.columns().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def batches(self, size: int, context: Context, epoch: int = 0) -> Iterator[Self]:
        """Mini-batches of `size` global rows, in an order drawn from the run's seed alone.

        Every process walks through the same partition of the global rows and takes the rows that it holds,
        possibly none: it still joins the reduction.
        """
        total = context.total_rows(len(self))
        order = torch.randperm(total, generator=context.generator("batches", epoch))
        position = torch.full((total,), -1, dtype=torch.int64)
        position[self.row] = torch.arange(len(self))
        for chunk in order.split(size):
            mine = position[chunk]
            yield self.select(mine[mine >= 0])


@dataclass(frozen=True)
class FlowRows(Rows):
    """One row per recorded denoising step: all that a policy gradient needs to replay it."""

    x: Tensor  # [B, C, H, W]
    x_next: Tensor  # [B, C, H, W]
    sigma: Tensor  # [B]
    sigma_next: Tensor  # [B]
    sigma_max: Tensor  # [] the schedule's second sigma
    noise_level: Tensor  # [B]
    decision: Tensor  # [B] int64, the step's position in the schedule
    old_mean: Tensor  # [B, C, H, W] of the policy that sampled
    old_log_prob: Tensor  # [B]
    advantage: Tensor  # [B]
    weight: Tensor  # [B] 0 where the sample was not scored
    cond: tuple[str, ...]  # [B] keys into the condition cache

    @classmethod
    def from_path(cls, samples: Samples, advantage: Tensor, scored: Tensor, trained: Tensor | None = None) -> FlowRows:
        """Unroll the path: row = index * K + k. advantage and scored (bool): [N] or, per decision, [N, K].

        `trained`: positions [K'] of the recorded steps that become rows; None: all of them.
        What was not scored is blank: a state that overflowed would make the gradient NaN, 0 times NaN being NaN.
        """
        path = samples.path
        if path is None:
            raise ValueError("these samples carry no path: the plan must set record=True")
        n, k = path.log_prob.shape
        advantage, scored = (one if one.ndim == 2 else one[:, None].expand(n, k) for one in (advantage, scored))
        trained = torch.arange(k) if trained is None else trained
        scored, k = scored[:, trained], len(trained)

        def kept(values: Tensor) -> Tensor:  # [N, K, ...] -> [N*K', ...]
            blank = scored.reshape(n, k, *(1,) * (values.ndim - 2))
            return torch.where(blank, values[:, trained], 0.0).flatten(0, 1)

        return cls(
            row=(samples.index[:, None] * k + torch.arange(k)).flatten(),
            x=kept(path.states[:, :-1]),
            x_next=kept(path.states[:, 1:]),
            sigma=path.sigmas[:-1][trained].repeat(n),
            sigma_next=path.sigmas[1:][trained].repeat(n),
            sigma_max=torch.tensor(path.sigma_max),
            noise_level=path.noise_levels[trained].repeat(n),
            decision=path.steps[trained].repeat(n),
            old_mean=kept(path.means),
            old_log_prob=kept(path.log_prob),
            advantage=kept(advantage),
            weight=scored.to(torch.float32).flatten(),
            cond=tuple(prompt.key for prompt in samples.prompts for _ in range(k)),
        )


@dataclass(frozen=True)
class NoisedRows(Rows):
    """One row per (finished sample, fresh sigma, fresh noise): what forward-process losses eat. No path is needed."""

    clean: Tensor  # [B, C, H, W]
    noise: Tensor  # [B, C, H, W]
    sigma: Tensor  # [B]
    advantage: Tensor  # [B]
    weight: Tensor  # [B] 0 where the sample was not scored
    cond: tuple[str, ...]  # [B] keys into the condition cache

    @classmethod
    def from_samples(
        cls, samples: Samples, advantage: Tensor, scored: Tensor, sigmas: Tensor, context: Context
    ) -> NoisedRows:
        """K rows a sample: row = index * K + k. advantage [N]; scored [N] bool; sigmas [N, K].

        The noise is drawn by a generator of its own for each sample, so it does not depend on which process holds it.
        """
        n, k = sigmas.shape
        shape = samples.latents.shape[1:]
        draws = [torch.randn(k, *shape, generator=context.generator("noise", i)) for i in samples.index.tolist()]
        blank = scored.reshape(n, *(1,) * len(shape))  # NaN times a weight of 0 is NaN
        return cls(
            row=(samples.index[:, None] * k + torch.arange(k)).flatten(),
            clean=torch.where(blank, samples.latents, 0.0).repeat_interleave(k, dim=0),
            noise=torch.cat(draws) if draws else torch.zeros(0, *shape),
            sigma=sigmas.flatten(),
            advantage=torch.where(scored, advantage, 0.0).repeat_interleave(k),
            weight=scored.to(torch.float32).repeat_interleave(k),
            cond=tuple(prompt.key for prompt in samples.prompts for _ in range(k)),
        )


@dataclass(frozen=True)
class Loss:
    """Per-row values with their weights. The learner alone takes weighted means, term by term, over all processes.

    Terms whose weights are the same tensor share one normaliser. Metrics are detached [B] tensors, averaged with
    `weight`.
    """

    terms: Mapping[str, tuple[Tensor, Tensor]]  # name -> (value [B], weight [B])
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # name -> [B]


class TokenPolicy(Protocol):
    """One set of a token policy's weights, as a callable."""

    def log_probs(self, ids: Tensor, length: Tensor, cond: Sequence[str], temperature: float = 1.0) -> Tensor:
        """[B, L] fp32: log p of each token given those before it, 0 at the first and in the padding.

        ids [B, L] int64, padded at the end; length [B]; cond: B keys, for the pictures of the prompts.
        """

    def read(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """The ids [P] of all that stands before the next answer to each; their keys are then known. DataError for one
        that is too long."""


class VelocityModel(Protocol):
    """One set of a flow policy's weights, as a callable."""

    def told(self, cond: Sequence[str], like: Tensor) -> Condition:
        """What B keys stand for, read once for several calls with latents like these."""

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[str] | Condition) -> Tensor:
        """v = noise - data (rectified flow). x: [B, C, H, W]; sigma: [B] in 0..1; cond: [B] keys, or what is `told`."""


class Models(Protocol):
    """A policy's sets as callables. A loss sees these, never modules."""

    @property
    def current(self) -> VelocityModel: ...

    @property
    def old(self) -> VelocityModel: ...

    @property
    def reference(self) -> VelocityModel: ...

    @property
    def old_is_current(self) -> bool:
        """Whether `old` would answer exactly what `current` answers, so that one of the two calls can be saved."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1, not rounded: the gradient flows through."""

    def score(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B] the recipe's weighted rewards, with gradient. RewardError if one of them has none."""


def seed_of(*key: object) -> int:
    """A 63-bit seed for a key such as (seed, stage, step, sample id, purpose); equal on every process and machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: object) -> torch.Generator:
    """A CPU generator of its own for this key. Randomness has no other source, so it never depends on rank or order."""
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass(frozen=True)
class Context:
    """Where a step stands: keyed randomness, the collective operations, the algorithm's state."""

    seed: int
    stage: str
    step: int
    sampling_steps: int  # of the rollout
    state: State
    gather: Callable[[Tensor], Tensor]  # [n, ...] of each process -> [sum n, ...] of all, in rank order
    sampled: Callable[[Samples], None] | None = None  # told of each part of a step that is finished before the others
    # What the step that many steps on will ask for (prompts, plan, context), as far as is known now; None beyond the
    # stage's last. None altogether where no step follows, as in an evaluation.
    coming: Callable[[int], tuple[Any, Plan, Context] | None] | None = None

    def generator(self, *purpose: object) -> torch.Generator:
        return generator(self.seed, self.stage, self.step, *purpose)

    def total_rows(self, here: int) -> int:
        return int(self.gather(torch.tensor([here], dtype=torch.int64)).sum())


@dataclass(frozen=True)
class Tools:
    """What an algorithm may use before the first step of its stage, to calibrate itself."""

    context: Context  # of the start; step 0, no state
    sample: Callable[[Plan, int], tuple[Samples, Scores]]  # (plan, round) -> this process's share of a step, scored


def stacked(conditions: Sequence[Condition]) -> Condition:
    """Conditions of equal shapes as one batch."""
    return {name: torch.stack([one[name] for one in conditions]) for name in conditions[0]}


def classifier_free(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """v("") + guidance (v(text) - v("")): classifier-free guidance, arXiv 2207.12598."""
    return untold + guidance * (told - untold)


@dataclass(frozen=True)
class FlowModel:
    """What a flow backbone's `load()` gives: the network, which is trained, and its frozen encode and decode."""

    net: nn.Module
    velocity: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]  # (net, x, sigma [B], batched condition)
    encode: Callable[[Sequence[Prompt]], list[Condition]]  # one condition a prompt: its text, and pictures it has
    decode: Callable[[Tensor], Tensor]  # latents [N, C, H, W] -> media [N, 3, H, W] in 0..1
    sigmas: Callable[[int], Tensor]  # number of steps -> [steps+1] fp32, from sigma_max down to 0
    latent_shape: tuple[int, ...]
    lora_targets: tuple[str, ...]
    unread: Callable[[str], list[str]] = lambda text: []  # words the text encoder does not know, or cuts off
    encode_media: Callable[[Tensor], Tensor] | None = None  # media in 0..1 -> latents; None: it only decodes
    collate: Callable[[Sequence[Condition]], Condition] = stacked  # conditions of one batch, padded where they differ
    guide: Callable[[Tensor, Tensor, float], Tensor] = classifier_free  # (v told, v untold, guidance) -> v
    tasks: tuple[str, ...] = ("t2i",)  # of "t2i", "edit" (a source) and "in_context" (references)
    # Frozen modules that `encode` alone calls: a policy may move them away between calls, or let them go.
    encoders: tuple[nn.Module, ...] = ()
    # (height, width) -> the same modules for pictures of this size: latents, schedule, encoding. None: one size only.
    at: Callable[[tuple[int, int]], FlowModel] | None = None
    start: float = 1.0  # how large the initial noise is: its sigma, where the noisiest level is below 1
    # What diffusers' own pipeline draws with these very modules: (prompts, noise [N, C, H, W], steps, guidance,
    # negative) -> media [N, 3, H, W] in 0..1. The oracle of parity; None: there is no such pipeline.
    pipeline: Callable[[Sequence[Prompt], Tensor, int, float, str], Tensor] | None = None


@dataclass(frozen=True)
class TokenModel:
    """What a token backbone's `load()` gives: a network that continues texts, with or without pictures in them."""

    net: nn.Module
    # (net, ids [B, L], there [B, L] bool, batched condition) -> logits [B, L, V]; those at i are for token i + 1.
    logits: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    # "ids" [P]: all that stands before the next answer, the turns of a conversation among it; and pictures.
    encode: Callable[[Sequence[Prompt]], list[Condition]]
    decode: Callable[[Sequence[Sequence[int]]], list[str]]  # answers as texts, without the tokens that end them
    ends: tuple[int, ...]  # tokens that end an answer
    longest: int  # tokens of a prompt and its answer
    lora_targets: tuple[str, ...]
    collate: Callable[[Sequence[Condition]], Condition]  # conditions of one batch; what `logits` is given
    write: Callable[[Path_], None]  # all but the weights (configuration, tokenizer, processor), for others to load
    unread: Callable[[str], list[str]] = lambda text: []
    spell: Callable[[str], list[int]] | None = None  # an answer as its ids, the token that ends it included
    picture: int | None = None  # the token that pictures fill; None: it sees none
    # (net, ids [B, L], there [B, L] bool, batched condition, layer) -> states [B, L, H]: those of a layer, 0 being what
    # the first one is given, pictures among it, and -1 the last, normed. None: it does not tell.
    hidden: Callable[[nn.Module, Tensor, Tensor, Condition, int], Tensor] | None = None
    # ids [P] -> the condition of these words alone: no picture, no chat.
    bare: Callable[[Tensor], Condition] = lambda ids: {"ids": ids}
    # (prompt, its condition) -> its pictures [3, H, W] in 0..1 at the size at which the network reads them.
    pictures: Callable[[Prompt, Condition], tuple[Tensor, ...]] = lambda prompt, condition: ()
    tasks: tuple[str, ...] = ("text",)  # of "text" and "caption" (a picture in the prompt)


@dataclass(frozen=True)
class Connection:
    """What a connector's `load()` gives: how a language model's states become what a generator is conditioned on."""

    # (width of the states, a condition of the generator) -> the network (states [B, T, H], there [B, T] bool) -> a
    # batched condition with the names and shapes of that one.
    build: Callable[[int, Condition], nn.Module]
    reads: Literal["answer", "last", "picture"]  # states of the answer's tokens, of its last, or the pictures' own
    sees: bool  # the answer is read behind what it answers, the picture there; false: it is read by itself
    held: bool  # answers are read by the weights from before the first stage that trains how they are written
    write: Callable[[nn.Module, Path_], None]  # for `load` to find again


@runtime_checkable
class Backbone(Protocol):
    """A frozen dataclass that can load a network."""

    def load(self, device: torch.device, dtype: torch.dtype) -> FlowModel | TokenModel | Connection: ...


Values = Tensor | Sequence["float | Unscored | None"]
"""One number a sample, [N]; NaN, None or `Unscored(reason)` where there is none."""


class Reward(Protocol):
    """Samples in, one number a sample out; or (numbers, {component: numbers}).

    Nothing else is required. An entry of the catalogue also says, as class constants, read without importing it:
    reads: of "prompt", "metadata", "target_text", "source", "references", what it cannot do without.
    optional: those that it looks at where there are any.
    range: (least, most), None for an end that it has not. A number outside is not counted.
    higher_is_better: false turns the sign where the reward is trained on.
    components: the names of its parts.
    groupwise: true if a sample's number depends on the others of its group; it is then given whole groups.
    differentiable: true if it passes a gradient to the picture.
    licence, size, protocol: of the weights behind it, what they take, and where the way of scoring is described.
    version: raised when the same options would give other numbers; part of the key of cached scores.

    One that has to load something has `load(device)`, called once before the first samples, which returns what is then
    called with samples (and closed, if that has `close`). The entry itself holds options only. What was loaded may know
    its `range` better than the entry, and may have a `fingerprint`, which the key of cached scores then holds.
    """

    def __call__(self, samples: Samples) -> Values | tuple[Values, Mapping[str, Values]]: ...


class Sampler(Protocol):
    """A rollout that was started: it samples for one stage, with the weights that it was last given.

    One that holds something, a process, an engine or a folder, also has `close()`, which is called once.
    """

    def collect(self, prompts: Any, plan: Plan, context: Context) -> Samples:
        """This process's share of a step's samples, of the `PromptBatch` and the weights that the plan names."""
        ...

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """The learner's weights have changed, for the version-th time. {}: they are where this samples from already."""
        ...

    def health(self) -> str:
        """In a few words."""
        ...


class Rollout(Protocol):
    """Where sampling runs: a frozen dataclass of options. `rollouts/local.py` is what the others are tested against.

    An entry of the catalogue also says, as class constants or properties, where it differs from what is assumed:
    kind, kinds: "flow" or "tokens", the policies that it samples with.
    gives: of "path", "log_prob", "previews", "preference", what an algorithm may ask of its samples.
    reads: of "source", "pair", "demonstration", what it cannot do without of the data.
    makes: of "image", "text", "episode", what its samples hold for rewards to read.
    parts: true if it samples with a policy of several parts.
    single: true if a process can have one alone.
    ahead: how many steps it samples in advance.
    missing(): how to install what this machine lacks for it; "" where nothing is missing. Asked before a run begins.
    """

    steps: int  # denoising steps; 0 where nothing is denoised

    def start(self, policy: Any, processes: Any) -> Sampler: ...


class Algorithm(Protocol):
    """A frozen dataclass of options with these functions. Subclass it for the defaults of four of them."""

    def needs(self) -> Needs:
        """What these options ask for; read before anything is loaded."""
        ...

    def start(self, tools: Tools) -> State:
        """What to remember from step to step; called once a stage, before its first step and not after a resume."""
        return {}

    def plan(self, context: Context) -> Plan:
        """How to sample this step; the same on every process."""
        return Plan()

    def rows(self, samples: Samples, scores: Scores, context: Context) -> Rows:
        """This process's samples as training rows. Advantages are born here, over all processes."""
        ...

    def before(self, models: Models, rows: Any, size: int) -> Any:
        """Once a step, before its first update: what only the weights that sampled can say of the rows. `size` of them
        fit one forward pass."""
        return rows

    def loss(self, models: Models, rows: Any) -> Loss:
        """Per-row values; no means."""
        ...

    def after(self, policy: Any, context: Context) -> None:
        """Once the step's updates are done: refresh `old`, count, remember."""
        return None


__all__ = [
    "Algorithm",
    "Backbone",
    "Condition",
    "Connection",
    "Context",
    "FlowModel",
    "FlowRows",
    "Loss",
    "Models",
    "Needs",
    "NoisedRows",
    "Path",
    "Plan",
    "Prompt",
    "Reward",
    "Rollout",
    "Rows",
    "Sampler",
    "Samples",
    "Scores",
    "Span",
    "State",
    "TokenModel",
    "TokenPolicy",
    "Tokens",
    "Tools",
    "Unscored",
    "Values",
    "VelocityModel",
    "classifier_free",
    "generator",
    "seed_of",
    "stacked",
]
