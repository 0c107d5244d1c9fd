"""The captions mean what they say, every text reads back, and the split holds meanings apart."""

import re
from collections import Counter

import numpy as np
import pytest

from rlkit.world import grammar
from rlkit.world.grammar import Caption, captions, draw, panel, parse, split, tokenize, unknown_words

EVERY = [caption for kind in grammar.KINDS for caption in captions(kind)]
SIZES = {"single": 24, "two": 552, "relation": 2208, "count": 72, "place": 96}


def test_number_of_captions() -> None:
    assert {kind: len(captions(kind)) for kind in grammar.KINDS} == SIZES
    assert len({caption.text for caption in EVERY}) == len(EVERY) == 2952


def test_kinds_are_shares() -> None:
    assert sum(grammar.KINDS.values()) == pytest.approx(1)


def test_every_text_reads_back() -> None:
    assert all(parse(caption.text) == caption for caption in EVERY)


def test_parse_ignores_case_and_spaces() -> None:
    assert parse("  A red  Circle ") == Caption("single", (("red", "circle"),))


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("a red hexagon", "'hexagon' is not a shape"),
        ("a pink circle", "'pink' is not a colour"),
        ("three pink circles", "'pink' is not a colour"),
        ("three red circle", "'circle' is not a plural shape"),
        ("three red", "found 2 words"),
        ("five red circles", "'five red circles'"),
        ("", "found ''"),
        ("red circle", "'red circle'"),
        ("a red circle beside a blue square", "'beside a blue square' cannot follow an object"),
        ("a red circle and a blue", "'a blue'"),
        ("a red circle and a blue square too", "'too' cannot follow a second object"),
        ("a red circle in the middle", "'middle' is not a place"),
        ("a red circle above a red circle", "must differ"),
    ],
)
def test_parse_names_the_culprit(text: str, culprit: str) -> None:
    with pytest.raises(ValueError, match=re.escape(culprit)):
        parse(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a red circle and a blue square", "a blue square and a red circle"),
        ("a red circle left of a blue square", "a blue square right of a red circle"),
        ("a red circle above a blue square", "a blue square below a red circle"),
    ],
)
def test_equal_meanings(one: str, other: str) -> None:
    assert parse(one).canonical == parse(other).canonical


def test_other_meanings_differ() -> None:
    pairs = [
        ("a red circle left of a blue square", "a red circle right of a blue square"),
        ("a red circle left of a blue square", "a red circle above a blue square"),
        ("a red circle and a blue square", "a blue circle and a red square"),
        ("two red circles", "three red circles"),
        ("a red circle", "a red circle in the top left"),
    ]
    assert all(parse(one).canonical != parse(other).canonical for one, other in pairs)


def test_number_of_meanings() -> None:
    meanings = {kind: len({caption.canonical for caption in captions(kind)}) for kind in grammar.KINDS}
    assert meanings == {"single": 24, "two": 276, "relation": 1104, "count": 72, "place": 96}
    assert len({caption.canonical for caption in EVERY}) == sum(meanings.values())


def test_split_sizes() -> None:
    sizes = {kind: tuple(len(split(name, kind)) for name in ("validation", "held_out")) for kind in grammar.KINDS}
    assert sizes == {"single": (4, 5), "two": (30, 40), "relation": (60, 80), "count": (9, 15), "place": (12, 20)}


def test_split_is_a_partition_by_meaning() -> None:
    splits_of: dict[str, set[str]] = {}
    for name in grammar.SPLITS:
        for caption in split(name):
            splits_of.setdefault(caption.canonical, set()).add(name)
    assert all(len(names) == 1 for names in splits_of.values())
    assert Counter(caption for name in grammar.SPLITS for caption in split(name)) == Counter(EVERY)


@pytest.mark.parametrize("kind", grammar.KINDS)
def test_training_knows_every_part_of_each_kind(kind: str) -> None:
    def parts(rows: tuple[Caption, ...]) -> set[object]:
        objects = {part for caption in rows for thing in caption.objects for part in thing}
        return objects | {part for caption in rows for part in (caption.relation, caption.count, caption.place)}

    assert parts(split("train", kind)) == parts(captions(kind))


def test_training_knows_every_word() -> None:
    words = {word for caption in EVERY for word in caption.text.split()}
    assert {word for caption in split("train") for word in caption.text.split()} == words


def test_split_is_pinned() -> None:
    # A released base was trained on this split: a change would put its training captions into the held-out set.
    assert [caption.text for caption in split("held_out", "single")] == [
        "a red circle",
        "a blue square",
        "a yellow circle",
        "a purple triangle",
        "a cyan cross",
    ]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'test' is not a split"):
        split("test")
    with pytest.raises(ValueError, match="'digits' is not a kind"):
        captions("digits")


def test_draw_follows_weights_and_split() -> None:
    rows = draw("train", 4000, np.random.default_rng(0))
    counts = Counter(caption.kind for caption in rows)
    assert all(abs(counts[kind] / 4000 - weight) < 0.03 for kind, weight in grammar.KINDS.items())
    assert set(rows) <= set(split("train"))
    assert rows == draw("train", 4000, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["validation", "held_out"])
@pytest.mark.parametrize("n", [128, 256, 400])
def test_panel_is_proportional_and_varied(name: str, n: int) -> None:
    rows = panel(name, n)
    counts = Counter(caption.kind for caption in rows)
    assert len(rows) == n
    assert all(abs(counts[kind] - n * weight) < 1 for kind, weight in grammar.KINDS.items())
    assert len(set(rows)) >= 60
    for kind in grammar.KINDS:
        uses = Counter(caption for caption in rows if caption.kind == kind)
        assert max(uses.values()) - min(uses.values()) <= 1


def test_panel_prefixes_are_stratified() -> None:
    rows = panel("held_out", 256)
    for prefix in (16, 50, 100, 200):
        counts = Counter(caption.kind for caption in rows[:prefix])
        assert all(abs(counts[kind] - prefix * weight) <= 1.5 for kind, weight in grammar.KINDS.items())


def test_small_panels() -> None:
    assert panel("held_out", 0) == []
    assert [len(panel("held_out", n)) for n in range(12)] == list(range(12))


def test_tokens() -> None:
    tokens = tokenize("A red circle")
    assert len(tokens) == grammar.LENGTH
    assert [grammar.VOCABULARY[token] for token in tokens] == ["<bos>", "a", "red", "circle", "<eos>"] + ["<pad>"] * 7
    named = {"<pad>": grammar.PAD, "<unk>": grammar.UNK, "<bos>": grammar.BOS, "<eos>": grammar.EOS}
    assert named == {word: token for token, word in enumerate(grammar.VOCABULARY[:4])}
    assert grammar.PAD == 0
    assert grammar.EOS != 2  # for which CLIP's text encoder pools at the largest id instead of at <eos>


def test_every_caption_is_in_the_vocabulary() -> None:
    assert len(set(grammar.VOCABULARY)) == len(grammar.VOCABULARY)
    assert all(grammar.UNK not in tokenize(caption.text) for caption in EVERY)
    assert not any(unknown_words(caption.text) for caption in EVERY)
    assert len({tuple(tokenize(caption.text)) for caption in EVERY}) == len(EVERY)


def test_edit_words_are_in_the_vocabulary() -> None:
    assert unknown_words("make turn into remove add the put from reference it") == []


def test_unknown_words() -> None:
    assert unknown_words("a Fluffy red dog") == ["fluffy", "dog"]
    assert tokenize("a fluffy dog")[2:4] == [grammar.UNK] * 2


def test_long_texts_are_refused() -> None:
    assert len(tokenize("a " * 10)) == grammar.LENGTH
    with pytest.raises(ValueError, match="has 11 words; at most 10 fit"):
        tokenize("a " * 11)
