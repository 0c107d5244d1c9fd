"""The atlas of the tiny world: places whose flags and emblems can only be known by looking them up.

A flag is a caption. An emblem is two things in a style, and the four styles are described apart from the places: who
does not look a style up has to guess how the two stand to each other. Places are split as captions are, so that no
held-out place is asked for in training; the documents tell of all of them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from rlkit.world import grammar
from rlkit.world.grammar import SPLITS, Caption

FIRST = (
    *("Alder", "Amber", "Birch", "Bright", "Cold", "Copper", "Crow", "Deep", "East", "Elder", "Ember", "Fair"),
    *("Glass", "Grey", "High", "Iron", "Long", "Moon", "North", "Oak", "Salt", "Silver", "Stone", "Wind"),
)
SECOND = (
    *("Arch", "Bay", "Bridge", "Brook", "Castle", "Cliff", "Cove", "Dale", "Field", "Ford", "Gate", "Grove"),
    *("Haven", "Hill", "Hollow", "Island", "Lake", "March", "Mill", "Moor", "Port", "Ridge", "Vale", "Well"),
)
STYLES = MappingProxyType({"marsh": "above", "harbour": "below", "forest": "left of", "desert": "right of"})
KINDS = MappingProxyType({"flag": 0.5, "emblem": 0.5})
PHRASES = ("draw the {kind} of {place}", "paint the {kind} of {place}", "show me the {kind} of {place}")
PLACES = MappingProxyType({"held_out": 80, "validation": 40, "train": 280})
FLAWS = MappingProxyType({"malformed": 0.35, "unknown": 0.35, "skip": 0.4, "guess": 0.3})
UNHEARD = 0.2  # share of lessons without what they could say, for each slot by itself
FAILED = 0.5  # share of lessons that tell of a failure
INDEX, SKILLS = "atlas_index", "skills"  # folders beside this file, that tools look into
ATLAS_SALT = 290417


@dataclass(frozen=True)
class Request:
    """What somebody asks for, and what the atlas knows of it."""

    kind: str  # flag or emblem
    place: str
    caption: Caption  # what a picture of it shows
    style: str = ""  # of an emblem
    phrase: str = PHRASES[0]

    @property
    def text(self) -> str:
        return self.phrase.format(kind=self.kind, place=self.place)

    @property
    def subject(self) -> str:
        """What it is about, and what is searched for: the title of the document that knows."""
        return f"{self.kind} of {self.place}"


@dataclass(frozen=True)
class Document:
    title: str
    text: str


@cache
def places(split: str) -> tuple[str, ...]:
    """The places of one split."""
    if split not in SPLITS:
        raise ValueError(f"{split!r} is not a split; known: {', '.join(SPLITS)}")
    everywhere = [f"{first} {second}" for first in FIRST for second in SECOND]
    shuffled = sorted(everywhere, key=lambda name: grammar._shuffled(f"{ATLAS_SALT} {name}"))
    start = 0
    for name, count in PLACES.items():
        if name == split:
            return tuple(shuffled[start : start + count])
        start += count
    raise AssertionError(split)


@cache
def about(place: str, kind: str) -> Request:
    """What the atlas knows of a place's flag or emblem: the same on every machine."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not a kind of request; known: {', '.join(KINDS)}")
    rng = np.random.default_rng([ATLAS_SALT, *f"{kind} {place}".encode()])
    if kind == "flag":
        pool = grammar.captions(str(rng.choice(list(grammar.KINDS), p=list(grammar.KINDS.values()))))
        return Request(kind, place, pool[int(rng.integers(len(pool)))])
    pairs = grammar.captions("two")
    style = str(rng.choice(list(STYLES)))
    objects = pairs[int(rng.integers(len(pairs)))].objects
    return Request(kind, place, Caption("relation", objects, relation=STYLES[style]), style)


def draw(split: str, n: int, rng: np.random.Generator, only: Sequence[str] = ()) -> list[Request]:
    """`n` requests of a split at random, of these kinds or of all."""
    kinds = list(only or KINDS)
    weights = np.array([KINDS[kind] for kind in kinds])
    pool = places(split)
    drawn = []
    for kind in rng.choice(kinds, size=n, p=weights / weights.sum()).tolist():
        known = about(pool[int(rng.integers(len(pool)))], kind)
        phrase = PHRASES[int(rng.integers(len(PHRASES)))]
        drawn.append(Request(known.kind, known.place, known.caption, known.style, phrase))
    return drawn


def panel(split: str, n: int) -> list[Request]:
    """A fixed list of `n` requests: kinds in turn, every place before any comes again, then with another phrase."""
    pool, kinds = places(split), tuple(KINDS)
    rows = []
    for i in range(n):
        turn, at = divmod(i // len(kinds), len(pool))
        known = about(pool[at], kinds[i % len(kinds)])
        rows.append(Request(known.kind, known.place, known.caption, known.style, PHRASES[turn % len(PHRASES)]))
    return rows


# ---- what can be looked up -------------------------------------------------------------------------------------------


def documents() -> tuple[Document, ...]:
    """One about each flag and each emblem of every place."""
    everywhere = [place for split in SPLITS for place in places(split)]
    return tuple(document(about(place, kind)) for place in everywhere for kind in KINDS)


def document(known: Request) -> Document:
    """What the atlas says of one flag or emblem. Of how an emblem's things stand it gives the style alone.

    A flag's says so much of its style too: two documents of one place, of which one were much longer, would not be
    ranked by whether a flag or an emblem was searched for (BM25 prefers the shorter one).
    """
    style = f"{known.style} style" if known.style else "no style"
    return Document(known.subject, f"The {known.subject} shows {shown(known)}. The {known.kind} has {style}.")


def shown(known: Request) -> str:
    return Caption("two", known.caption.objects).text if known.style else known.caption.text


def skills() -> dict[str, str]:
    """What is to be known of each style, by its name."""
    return {style: f"In the {style} style the first stands {how} the second." for style, how in STYLES.items()}


def files() -> dict[str, str]:
    """What the two folders hold: paths from here, and texts."""
    lines = "".join(json.dumps(asdict(one)) + "\n" for one in documents())
    told = {f"{SKILLS}/{name}.md": text + "\n" for name, text in skills().items()}
    return {f"{INDEX}/places.jsonl": lines, **told}


def write(folder: Path = Path(__file__).parent) -> None:
    """Makes the two folders again, when the atlas has changed."""
    for name, text in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


# ---- a teacher -------------------------------------------------------------------------------------------------------


def script(request: Request, rng: np.random.Generator, flawed: float = 0.0) -> tuple[str, ...]:
    """What a teacher writes, turn by turn, to answer a request; what is said to it in between is not its own.

    flawed: how much of FLAWS there is: each comes by itself, in this share of its own share of the episodes, so that
    none is a sign of another's absence. malformed: a call that is no JSON, at first. unknown: a tool that is not there,
    at first. skip: the style of an emblem is guessed, and of a flag, that has none, all. guess: nothing is found out.
    """
    flaws = {name for name, share in FLAWS.items() if rng.random() < flawed * share}
    search = call("search", {"query": request.subject}, f"I need the {request.subject}.")
    turns = []
    if "malformed" in flaws:
        turns.append(search.replace("}}", "}"))
    if "unknown" in flaws:
        turns.append(search.replace('"search"', '"find"'))
    if "guess" in flaws or ("skip" in flaws and not request.style):
        return (*turns, answer(grammar.draw("train", 1, rng)[0].text, "I know it."))
    turns.append(search)
    caption = request.caption
    if "skip" in flaws:
        caption = Caption("relation", caption.objects, relation=str(rng.choice(list(STYLES.values()))))
    elif request.style:
        turns.append(call("query_knowledge", {"skill": request.style}, f"I need the {request.style} style."))
    return (*turns, answer(caption.text, "Now I know it."))


def call(tool: str, arguments: dict[str, str], thought: str) -> str:
    said = json.dumps({"name": tool, "arguments": arguments})
    return f"<think>{thought}</think><tool_call>{said}</tool_call>"


def answer(gen_prompt: str, thought: str) -> str:
    said = json.dumps({"gen_prompt": gen_prompt, "reference_images": []})
    return f"<think>{thought}</think><answer>{said}</answer>"


def lesson(request: Request, rng: np.random.Generator) -> dict[str, str]:
    """What experience with a request may have to say, by the slots of an experience; "" where it has nothing to.

    All of it is true, and slots are left out at random, so that who learns to read it reads what there is. A failure is
    told in the words that the rules of summaries.py have for it.
    """
    known = {"search": request.subject, "skills": request.style, "prompt": request.caption.text}
    slots = {slot: text if rng.random() >= UNHEARD else "" for slot, text in known.items()}
    if not any(slots.values()):
        slots["search"] = known["search"]  # a lesson says something
    return {**slots, "failure": failure(request, rng) if rng.random() < FAILED else ""}


def failure(request: Request, rng: np.random.Generator) -> str:
    """What may have gone wrong in a try at a request."""
    bad = ["wrote a call that is no JSON", "called unknown tool find"]
    missed = ["looked nothing up", *([f"did not ask for skill {request.style}"] if request.style else [])]
    said = [phrase for phrase in (*bad, *missed) if rng.random() < 0.4]
    wrong = grammar.draw("train", 1, rng)[0].text
    ended = rng.random()
    if ended < 0.15:
        said.append("gave no answer")
    elif ended < 0.75 or not said:
        said.append(f"wrote: {wrong}")
    return "; ".join(said)
