"""What was learnt from good and bad tries at a request: bundles of texts, how they are told, and a memory of them.

A bundle has five slots (GenEvolve, arXiv 2605.21605). `told` is what a model reads of it. The memory finds the bundle
of the most similar request, by the cosine of embeddings: of hashed words, or of a text-embedding model.
Not here: who compares the tries (summaries.py), and who is taught with it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from rlkit.errors import RecipeError
from rlkit.types import State

SLOTS = ("search", "references", "skills", "prompt", "failure")
SIZE = 4096  # of the vectors of `words`: large enough that two words seldom share a place of it
# What any request may say, whatever it is about: two that differ in these alone ask for the same.
PLAIN = frozenset(
    (
        *("a", "an", "and", "for", "is", "it", "its", "me", "my", "of", "or", "please", "some", "that", "the", "this"),
        *("us", "you", "your", "create", "draw", "drawing", "generate", "image", "make", "paint", "painting"),
        *("picture", "render", "show"),
    )
)
Embed = Callable[[Sequence[str]], Tensor]  # texts -> [N, D] fp32, each of length 1


@dataclass(frozen=True)
class Bundle:
    """What to do about a request, and what not to do; "" where there is nothing to say."""

    search: str = ""  # what to look up
    references: str = ""  # pictures that helped
    skills: str = ""  # what to read first
    prompt: str = ""  # how the picture was described
    failure: str = ""  # what went wrong in a worse try


def told(bundle: Bundle) -> str:
    """What a teacher reads of a bundle, a line for each slot that says something; "" for one that says nothing."""
    said = [(slot, " ".join(getattr(bundle, slot).split())) for slot in SLOTS]  # no slot can begin another's line
    lines = [f"{slot}: {text}" for slot, text in said if text]
    return "\n".join(["Experience:", *lines]) if lines else ""


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A request, what was learnt from it, and the training step that did."""

    request: str
    bundle: Bundle
    step: int


@dataclass(frozen=True)
class Memory:
    """The last `capacity` entries, the oldest first, with the embeddings of their requests."""

    capacity: int = 500
    entries: tuple[Entry, ...] = ()
    vectors: Tensor = field(default_factory=lambda: torch.zeros(0, 0))  # [M, D] fp32

    def __len__(self) -> int:
        return len(self.entries)

    def with_new(self, entries: Sequence[Entry], vectors: Tensor) -> Memory:
        """This memory and these entries after it, less the oldest that are too many. vectors [len(entries), D]"""
        if not entries:
            return self
        if len(self) and self.vectors.shape[1] != vectors.shape[1]:
            what = f"the memory has embeddings of {self.vectors.shape[1]} numbers, and the new ones {vectors.shape[1]}"
            raise RecipeError(what, where="embedding", hint="Go on with the embedding that the run began with.")
        kept = (*self.entries, *entries)[-self.capacity :]
        table = torch.cat([self.vectors, vectors.float().cpu()]) if len(self) else vectors.float().cpu()
        return Memory(self.capacity, kept, table[-self.capacity :].clone())

    def find(self, vectors: Tensor, at_least: float) -> list[Bundle | None]:
        """The bundle of the request that is most similar to each of vectors [N, D], where their cosine is `at_least`
        that or more; of equally similar ones the newest."""
        if not len(self) or not len(vectors):
            return [None] * len(vectors)
        # Rounded: how a product is split into blocks shows in its last bits, and would choose among equals.
        cosine = (vectors.cpu().double() @ self.vectors.double().T).round(decimals=6)  # [N, M]
        best = len(self) - 1 - cosine.flip(1).argmax(1)
        near = cosine.gather(1, best[:, None])[:, 0] >= at_least
        pairs = zip(best.tolist(), near.tolist(), strict=True)
        return [self.entries[place].bundle if there else None for place, there in pairs]

    def state(self) -> State:
        """Tensors and json that `remembered` makes the same memory of."""
        entries = [{"request": one.request, "step": one.step, **asdict(one.bundle)} for one in self.entries]
        return {"experience": entries, "experience_vectors": self.vectors}


def remembered(state: Mapping[str, Any], capacity: int) -> Memory:
    """The memory that a state holds; an empty one where it holds none."""
    saved = state.get("experience", [])[-capacity:]
    slots = [one.name for one in fields(Bundle)]
    entries = [Entry(one["request"], Bundle(**{slot: one[slot] for slot in slots}), one["step"]) for one in saved]
    vectors = state.get("experience_vectors", torch.zeros(0, 0))
    return Memory(capacity, tuple(entries), vectors[-capacity:] if entries else torch.zeros(0, 0))


# ---- embeddings ------------------------------------------------------------------------------------------------------


def words(text: str) -> Tensor:
    """Hashed words and pairs of neighbours, in small letters, as a vector of length 1; the same on every machine. [D]

    Each has two places of the vector, so that one that is shared by chance counts for little. Words of PLAIN do not
    count, unless there are no others. Two requests of n words, of which the last differs, then have the cosine
    (2n - 3) / (2n - 1), which up to six words is below .84; with one that differs within they have less.
    """
    every = re.findall(r"\w+", text.casefold())
    said = [word for word in every if word not in PLAIN] or every
    vector = torch.zeros(SIZE)
    for piece in dict.fromkeys((*said, *map(" ".join, pairwise(said)))):  # each counts once
        for number in struct.unpack("<QQ", hashlib.blake2b(piece.encode(), digest_size=16).digest()):
            vector[number % SIZE] += 1.0 if number >> 63 else -1.0
    return vector / vector.norm().clamp(min=1e-12)


@dataclass(frozen=True)
class Embedding:
    """What makes vectors of requests: `words`, or `model`, a text-embedding model of transformers."""

    name: Literal["words", "model"] = "words"
    path: str | None = None  # model: a folder or a hub name, for instance Qwen/Qwen3-Embedding-0.6B
    device: str = "cpu"  # model: where it runs
    longest: int = 512  # model: tokens of a request; what is behind them is not read
    batch: int = 32  # model: requests at once

    def __post_init__(self) -> None:
        if (self.path is None) == (self.name == "model"):
            raise ValueError("path is where the embedding `model` is, and only that: say name: model with a path")
        for name, value in (("longest", self.longest), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, not {value}")

    def open(self) -> Embed:
        """Ready to embed; a model is read now."""
        if self.path is None:
            return lambda texts: torch.stack([words(text) for text in texts]) if texts else torch.zeros(0, SIZE)
        return _model(self.path, torch.device(self.device), self.longest, self.batch)


def _model(path: str, device: torch.device, longest: int, batch: int) -> Embed:
    """The last hidden state of each text's last token, as Qwen3-Embedding has it. Both sides of a comparison are
    requests, so that neither gets the instruction that its card puts before a query."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        net = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError) as error:  # what transformers raises for a folder that is none of its own
        hint = "Give a folder or a hub name of a text-embedding model with safetensors."
        what = f"{path} cannot be read: {str(error).strip().splitlines()[0]}"
        raise RecipeError(what, where="embedding.path", hint=hint) from error

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        return ids or [tokenizer.eos_token_id or 0]

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        found = [torch.zeros(0, net.config.hidden_size)]
        every = [ids_of(text) for text in texts]
        for some in (every[i : i + batch] for i in range(0, len(every), batch)):
            length = torch.tensor([len(ids) for ids in some])
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in some], batch_first=True)
            there = (torch.arange(padded.shape[1]) < length[:, None]).long()  # behind the text: a causal model
            states = net(input_ids=padded.to(device), attention_mask=there.to(device)).last_hidden_state
            last = states[torch.arange(len(some)), length.to(device) - 1].float()
            found.append(torch.nn.functional.normalize(last, dim=-1).cpu())
        return torch.cat(found)

    return embed


__all__ = ["SLOTS", "Bundle", "Embed", "Embedding", "Entry", "Memory", "remembered", "told", "words"]
