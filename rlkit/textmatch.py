"""Is this the text that was asked for? Quoted spans, a plain form to compare in, and how far two texts are apart.

Pure functions of strings. What reads the text out of a picture, and what a mismatch costs, is a reward's to say.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import permutations

QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"))
MOST_ORDERS = 4  # spans of which every order is tried: 24 orders; of more, only the order given

_QUOTED = re.compile("|".join(f"{re.escape(a)}([^{re.escape(a + b)}]*){re.escape(b)}" for a, b in QUOTES))
_SPACE = re.compile(r"\s+")
_TYPOGRAPHY = str.maketrans(
    {**dict.fromkeys("‘’‛′`", "'"), **dict.fromkeys("“”„″", '"'), **dict.fromkeys("‐‑‒–—−", "-")}
)
_LOOK_ALIKE = str.maketrans({"0": "o", **dict.fromkeys("1i|", "l"), "5": "s"})


def quoted(text: str) -> tuple[str, ...]:
    """What stands between quotation marks, in the order of the text; blank spans are left out."""
    spans = ("".join(group or "" for group in match.groups()) for match in _QUOTED.finditer(text))
    return tuple(span for span in spans if span.strip())


def plain(text: str, keep_spaces: bool = False, fold_look_alikes: bool = False) -> str:
    """The form in which texts are compared: NFKC, no capitals, straight quotes and dashes, and no spaces.

    keep_spaces: runs of white space become one space each, and none at the ends.
    fold_look_alikes: 0 and o, 1, i, | and l, 5 and s are the same letter.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())  # a fold may need composing
    folded = _SPACE.sub(" " if keep_spaces else "", folded.translate(_TYPOGRAPHY)).strip()
    return folded.translate(_LOOK_ALIKE) if fold_look_alikes else folded


def distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest characters to insert, delete or replace to make one text of the other."""
    row = list(range(len(b) + 1))  # from the empty text to each start of b
    for i, left in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (left != right))
    return row[-1]


def similarity(wanted: str, found: str) -> float:
    """1 - distance / length of the longer text: 1 for equal texts only. What is too much costs like what is missing."""
    longer = max(len(wanted), len(found))
    return 1 - distance(wanted, found) / longer if longer else 1.0


def containment(wanted: str, found: str) -> float:
    """1 where `found` holds `wanted` anywhere, else 1 - distance / length of `wanted`, and never below 0.

    What is too much costs nothing once the text is there, so a picture tiled with it is right too.
    """
    if wanted in found:
        return 1.0
    return 1 - min(distance(wanted, found), len(wanted)) / len(wanted)


def orders(spans: Sequence[str], between: str = "") -> Iterable[str]:
    """The spans as one text, in every order: a picture may show them in any, and is read from the top."""
    if len(spans) > MOST_ORDERS:
        return (between.join(spans),)
    return dict.fromkeys(between.join(order) for order in permutations(spans))
