"""Quoted spans, the plain form of a text, and distances with known answers."""

from itertools import pairwise, product

import pytest

from rlkit.textmatch import MOST_ORDERS, containment, distance, orders, plain, quoted, similarity


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ('a sign that says "OPEN"', ("OPEN",)),
        ('"one" and “two” and 「三」 and 『four』', ("one", "two", "三", "four")),
        ('the words "fresh bread" over "cakes"', ("fresh bread", "cakes")),
        ("a sign that says OPEN", ()),
        ("it's a dog's life", ()),
        ('an empty "" sign, and a blank "  " one', ()),
        ('a 10" pizza', ()),
        ("", ()),
        ('““twice”” and "don’t"', ("twice", "don’t")),
        ('two lines: "HAPPY\nDAYS"', ("HAPPY\nDAYS",)),
    ],
)
def test_quoted_spans(text: str, spans: tuple[str, ...]) -> None:
    assert quoted(text) == spans


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello  World ", "helloworld"),
        ("ＯＰＥＮ　２４", "open24"),  # full width, as recognisers of Chinese print it
        ("Straße", "strasse"),
        ("ﬁn", "fin"),
        ("e\u0301te\u0301", "été"),  # composed or not, it is the same text
        ("DON’T", "don't"),
        ("A–B", "a-b"),
        ("营业", "营业"),
        ("", ""),
        (" \n\t", ""),
    ],
)
def test_plain_form(text: str, expected: str) -> None:
    assert plain(text) == expected
    assert plain(expected) == expected, "the plain form of a plain form is itself"


def test_spaces_and_look_alikes_are_options() -> None:
    assert plain(" Hello \n World ", keep_spaces=True) == "hello world"
    assert plain("IO15|") == "io15|"
    assert plain("IO15|", fold_look_alikes=True) == plain("lOIS1", fold_look_alikes=True) == "lolsl"
    assert plain("OPEN", fold_look_alikes=True) != plain("OVEN", fold_look_alikes=True)


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("open", "opened", 2),
        ("open", "reopened99", 6),
        ("open", "openopenopen", 8),
        ("abcdef", "badcfe", 4),  # a swap of neighbours is two steps
        ("a", "bbbb", 4),
        ("营业中", "营业", 1),
    ],
)
def test_distance(a: str, b: str, steps: int) -> None:
    assert distance(a, b) == distance(b, a) == steps


def test_distance_is_a_metric_on_all_short_texts() -> None:
    texts = ["".join(letters) for length in range(4) for letters in product("ab", repeat=length)]
    apart = {(a, b): distance(a, b) for a in texts for b in texts}
    for a, b in apart:
        assert (apart[a, b] == 0) == (a == b)
        assert abs(len(a) - len(b)) <= apart[a, b] <= max(len(a), len(b))
        assert all(apart[a, b] <= apart[a, c] + apart[c, b] for c in texts)


def test_similarity_counts_what_is_too_much() -> None:
    assert similarity("open", "open") == 1
    assert similarity("open", "oven") == 0.75
    assert similarity("open", "openopenopen") == pytest.approx(1 / 3)
    assert similarity("open", "reopened99") == pytest.approx(0.4)
    assert similarity("open", "") == 0
    assert similarity("", "") == 1
    falling = [similarity("open", "open" + "x" * more) for more in range(10)]
    assert all(a > b for a, b in pairwise(falling))


def test_containment_does_not() -> None:
    assert containment("open", "openopenopen") == containment("open", "reopened99") == 1
    assert containment("open", "oven") == 0.75
    assert containment("open", "") == 0
    assert containment("open", "zzzzzzzzzzzz") == 0, "never below 0"


def test_orders() -> None:
    assert set(orders(["a", "b", "c"])) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert list(orders(["one", "two"], " ")) == ["one two", "two one"]
    assert list(orders(["open"])) == ["open"]
    assert list(orders(["a", "a"])) == ["aa"], "each once"
    many = [str(i) for i in range(MOST_ORDERS + 1)]
    assert list(orders(many)) == ["".join(many)]
