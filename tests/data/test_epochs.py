"""Epochs, held-out shares, sizes of steps, and what takes a broken picture's place: all by files and step alone."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlkit.data.epochs import Choices, Listed, listed
from rlkit.data.picture_files import Picture, Unread
from rlkit.errors import DataError
from rlkit.types import Prompt, seed_of


def row(i: int, text: str | None = None, size: tuple[int, int] | None = None, source: Path | None = None) -> Unread:
    picture = None
    if source is not None:
        picture = Picture("source", f"row {i}", 0, [{"source": source.name}], source.parent)
    return Unread(Prompt(id=i, text=f"picture {i}" if text is None else text, size=size), picture)


def rows(count: int) -> list[Unread]:
    return [row(i) for i in range(count)]


def painted(folder: Path, count: int, broken: Sequence[int] = (), missing: Sequence[int] = ()) -> list[Unread]:
    """Rows with a source each, of which some cannot be read or are not there."""
    for i in range(count):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.png")
        if i in broken:
            (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:40])
        if i in missing:
            (folder / f"{i}.png").unlink()
    return [row(i, source=folder / f"{i}.png") for i in range(count)]


def opened(given: Sequence[Unread], per_step: int = 4, kept: Sequence[Unread] = (), **choices: object) -> Listed:
    return listed(given, kept, Choices(per_step, 1, **choices), "a.jsonl")  # type: ignore[arg-type]


def ids(data: Listed, step: int, stage: str = "main") -> list[int]:
    return [prompt.id for prompt in data.draw(0, stage, step).prompts]


# ---- epochs ----------------------------------------------------------------------------------------------------------


def test_the_order_of_an_epoch_is_the_permutation_of_its_key() -> None:
    orders = [np.random.default_rng(seed_of(0, "main", epoch, "epoch")).permutation(6) for epoch in range(2)]
    expected = [int(i) for order in orders for i in order]
    assert [i for step in range(3) for i in ids(opened(rows(6)), step)] == expected
    one_size = opened(rows(6), sizes=((8, 8),))
    assert [i for step in range(3) for i in ids(one_size, step)] == expected, "one size changes no order"


# ---- held out --------------------------------------------------------------------------------------------------------


def held_texts(data: Listed) -> set[str]:
    return {data.sieve.rows[i].prompt.text for members in data.kept.values() for i in members}


def test_a_share_is_held_out_wherever_a_prompt_stands_and_whatever_joins_it() -> None:
    few, more = opened(rows(400), held_out_share=0.25), opened(rows(600), held_out_share=0.25)
    held = held_texts(few)
    assert 70 < len(held) < 130
    assert held == held_texts(opened(rows(400)[::-1], held_out_share=0.25))
    assert held <= held_texts(more)
    assert held_texts(more) - held == {f"picture {i}" for i in range(400, 600)} & held_texts(more)
    assert held != held_texts(opened(rows(400), held_out_share=0.25, held_out_salt="b"))
    assert held < held_texts(opened(rows(400), held_out_share=0.5)), "a larger share holds out more, not others"


def test_what_is_held_out_is_never_trained_on_not_even_as_a_copy() -> None:
    twice = [*rows(40), *(replace(one, prompt=replace(one.prompt, id=100 + i)) for i, one in enumerate(rows(40)))]
    data = opened(twice, per_step=8, held_out_share=0.3)
    drawn = {prompt.text for step in range(10) for prompt in data.draw(0, "main", step).prompts}
    assert len(drawn) + len(held_texts(data)) == 40
    assert not drawn & held_texts(data)


def test_the_first_held_out_prompts_do_not_depend_on_the_order_of_the_file() -> None:
    texts = [
        [prompt.text for prompt in opened(given, held_out_share=0.3).held_out(4)]
        for given in (rows(60), rows(60)[::-1])
    ]
    assert texts[0] == texts[1]
    assert texts[0] != sorted(texts[0], key=lambda text: int(text.split()[1]))


def test_pictures_count_for_what_a_prompt_means_and_folders_do_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        painted(tmp_path / name, 40)

    def kept(folder: str) -> set[int]:
        given = [
            replace(one, prompt=replace(one.prompt, text="make it blue")) for one in painted(tmp_path / folder, 40)
        ]
        data = opened(given, held_out_share=0.3)
        return {i for members in data.kept.values() for i in members}

    assert 0 < len(kept("a")) < 40
    assert kept("a") == kept("b")


def test_a_share_that_holds_none_or_all_out_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"a\.jsonl: held_out_share: 0\.001 holds 0 of 5 prompts out\. Change the share"
    ):
        opened(rows(5), held_out_share=0.001)
    with pytest.raises(DataError, match=r"holds 5 of 5 prompts out"):
        opened(rows(5), held_out_share=0.999)


# ---- sizes -----------------------------------------------------------------------------------------------------------

TALL, WIDE, SQUARE = (16, 8), (8, 16), (8, 8)


def mixed(tall: int, wide: int) -> list[Unread]:
    return [row(i, size=(32, 17) if i < tall else (15, 32)) for i in range(tall + wide)]


@pytest.mark.parametrize(("tall", "wide", "per_step"), [(6, 3, 4), (10, 1, 4), (8, 4, 4), (5, 7, 3)])
def test_a_step_is_of_one_size_and_each_prompt_is_seen_equally_often(tall: int, wide: int, per_step: int) -> None:
    data = opened(mixed(tall, wide), per_step, sizes=(TALL, WIDE))
    cycle = (tall + wide) * per_step  # prompts in which every count is whole
    steps = [data.draw(0, "main", step).prompts for step in range(2 * cycle // per_step)]
    assert all(len({prompt.size for prompt in step}) == 1 for step in steps)
    assert {prompt.size: prompt.id < tall for step in steps for prompt in step} == {TALL: True, WIDE: False}
    assert set(Counter(prompt.id for step in steps for prompt in step).values()) == {2 * per_step}


def test_within_its_size_a_prompt_is_seen_once_an_epoch() -> None:
    data = opened(mixed(6, 3), 2, sizes=(TALL, WIDE))
    seen: dict[object, list[int]] = {TALL: [], WIDE: []}
    for step in range(36):
        for prompt in data.draw(0, "main", step).prompts:
            seen[prompt.size].append(prompt.id)
    for size, count in ((TALL, 6), (WIDE, 3)):
        epochs = [tuple(seen[size][k : k + count]) for k in range(0, len(seen[size]) // count * count, count)]
        assert all(len(set(epoch)) == count for epoch in epochs)
        assert len(set(epochs)) > 1


def test_sizes_come_in_turn_and_not_one_after_the_other() -> None:
    data = opened(mixed(64, 64), 2, sizes=(TALL, WIDE))
    sizes = [data.draw(0, "main", step).prompts[0].size for step in range(64)]
    for k in range(2, 65):
        assert abs(sizes[:k].count(TALL) - k / 2) <= 1.5
    assert sizes[:8] != sizes[8:16] or sizes[:8] != sizes[16:24], "drawn, not a fixed pattern"


def test_steps_of_several_sizes_are_a_pure_function_of_the_step() -> None:
    forward = [ids(opened(mixed(7, 4), 4, sizes=(TALL, WIDE)), step) for step in range(30)]
    data = opened(mixed(7, 4), 4, sizes=(TALL, WIDE))
    assert [ids(data, step) for step in reversed(range(30))] == forward[::-1]


@pytest.mark.parametrize(
    ("said", "expected"),
    [((512, 512), (8, 8)), ((1000, 480), TALL), ((9, 16), WIDE), ((40, 40), (32, 32)), ((6, 7), (8, 8))],
)
def test_the_nearest_shape_wins_and_of_one_shape_the_nearest_area(
    said: tuple[int, int], expected: tuple[int, int]
) -> None:
    sizes = (TALL, WIDE, (8, 8), *([(32, 32)] if said == (40, 40) else []))
    (prompt,) = opened([row(0, size=said)], 1, sizes=sizes).draw(0, "main", 0).prompts
    assert prompt.size == expected


def test_without_a_size_a_prompt_has_the_shape_of_its_source_and_else_one_by_chance(tmp_path: Path) -> None:
    Image.new("RGB", (30, 14)).save(tmp_path / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 14)).save(tmp_path / "turned.png", exif=turned)
    given = [row(0, source=tmp_path / "wide.png"), row(1, source=tmp_path / "turned.png")]
    given.append(row(2, size=(16, 8), source=tmp_path / "wide.png"))  # its own word counts
    data = opened([*given, *(row(i) for i in range(3, 203))], sizes=(TALL, WIDE))
    size_of = {i: size for size, members in data.buckets.items() for i in members}
    assert [size_of[i] for i in range(3)] == [WIDE, TALL, TALL]
    assert 70 < Counter(size_of[i] for i in range(3, 203))[TALL] < 130
    again = opened([*(row(i) for i in range(202, 2, -1))], sizes=(TALL, WIDE))
    for size, members in again.buckets.items():
        assert all(size_of[again.sieve.rows[i].prompt.id] == size for i in members)


def test_without_sizes_all_prompts_say_the_same_or_nothing() -> None:
    assert {prompt.size for prompt in opened(rows(4)).draw(0, "main", 0).prompts} == {None}
    same = [row(i, size=(48, 64)) for i in range(4)]
    assert {prompt.size for prompt in opened(same).draw(0, "main", 0).prompts} == {(48, 64)}
    message = r"prompts of several sizes: \[48, 64\], none\. Say `sizes: \[\[height, width\], \.\.\.\]`"
    with pytest.raises(DataError, match=message):
        opened([*same, row(4)])
    with pytest.raises(DataError, match="several sizes"):
        opened(same, kept=[row(5)])


def test_held_out_prompts_are_of_one_size_that_of_most() -> None:
    kept = [row(i, size=(16, 8) if i < 2 else (8, 16)) for i in range(5)]
    held_out = opened(rows(4), kept=kept, sizes=(TALL, WIDE)).held_out(4)
    assert [(prompt.id, prompt.size) for prompt in held_out] == [(2, WIDE), (3, WIDE), (4, WIDE), (2, WIDE)]


# ---- broken pictures -------------------------------------------------------------------------------------------------


def test_by_default_the_first_broken_picture_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2: the source picture .*2\.png does not exist"):
        opened(painted(tmp_path, 5, missing=[2]))
    given = painted(tmp_path, 5, broken=[2])
    with pytest.raises(DataError, match=r"row 2: cannot read the source picture"):
        opened(given, verify=True)
    data = opened(given, per_step=5)
    with pytest.raises(DataError, match=r"row 2: cannot read the source picture"):
        data.draw(0, "main", 0)


@pytest.mark.parametrize("verify", [True, False])
def test_the_next_of_the_epoch_takes_the_place_of_a_broken_one(tmp_path: Path, verify: bool) -> None:
    whole = opened(rows(12))
    data = opened(painted(tmp_path, 12, broken=[3], missing=[7]), max_broken=0.2, verify=verify)
    for step in range(9):
        expected = ids(whole, step)
        ahead = [i for k in range(step + 1, step + 7) for i in ids(whole, k) if i not in (3, 7, *expected)]
        spare = iter(dict.fromkeys(ahead))
        assert ids(data, step) == [next(spare) if i in (3, 7) else i for i in expected]
    assert set(data.sieve.broken) == {3, 7}


def test_what_a_step_draws_does_not_depend_on_what_was_found_before(tmp_path: Path) -> None:
    given = painted(tmp_path, 12, broken=[1, 5])
    one, other = opened(given, max_broken=0.5), opened(given, max_broken=0.5, verify=True)
    forward = [ids(one, step) for step in range(6)]
    assert [ids(other, step) for step in reversed(range(6))] == forward[::-1]
    assert [ids(opened(given, max_broken=0.5), step) for step in range(6)] == forward


def test_no_prompt_is_twice_in_a_step_unless_there_are_too_few(tmp_path: Path) -> None:
    data = opened(painted(tmp_path, 6, broken=[0, 1]), 4, max_broken=0.5)
    assert all(sorted(ids(data, 3 * step)) == [2, 3, 4, 5] for step in range(2))
    few = opened(painted(tmp_path, 6, broken=[0, 1]), 6, max_broken=0.5)
    assert set(ids(few, 0)) == {2, 3, 4, 5}
    assert len(ids(few, 0)) == 6


def test_a_size_of_which_all_are_broken_is_an_error(tmp_path: Path) -> None:
    data = opened(painted(tmp_path, 20, broken=[0, 1]), max_broken=0.5)
    with pytest.raises(DataError, match=r"a\.jsonl: all pictures of a size are broken"):
        replace(data, buckets={None: (0, 1)}).draw(0, "main", 0)


@pytest.mark.parametrize("verify", [True, False])
def test_the_run_stops_above_the_share_and_names_what_is_broken(
    tmp_path: Path, verify: bool, caplog: pytest.LogCaptureFixture
) -> None:
    given = painted(tmp_path, 10, broken=[2, 4])
    with caplog.at_level(logging.WARNING):
        data = opened(given, 10, max_broken=0.2, verify=verify)
        data.draw(0, "main", 0)
        data.draw(0, "main", 1)
    for i in (2, 4):
        assert caplog.text.count(f"row {i}: cannot read the source picture") == 1, "named once"
    with pytest.raises(
        DataError, match=r"too many broken pictures: 2 of \d+ prompts .*row.* raise max_broken, now 0.1"
    ):
        opened(given, 10, max_broken=0.1, verify=verify).draw(0, "main", 0)


def test_the_share_is_of_prompts_seen_and_a_few_first_ones_do_not_decide(tmp_path: Path) -> None:
    given = painted(tmp_path, 200, broken=range(3))  # found on the way: 3 of the first 100 are no more than 0.03
    choices = Choices(4, 1, max_broken=0.03)
    data = listed(given, (), choices, "a", look=False)
    for i in range(3):
        assert data.sieve.read(i) is None
    assert data.sieve.read(3) is not None
    (tmp_path / "9.png").unlink()
    with pytest.raises(DataError, match="too many broken pictures: 4 of 5 prompts with pictures"):
        data.sieve.read(9)


def test_a_message_names_twenty_at_most(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"25 of 40 prompts .*; and 5 more\.") as caught:
        opened(painted(tmp_path, 40, missing=range(25)), max_broken=0.5)
    assert str(caught.value).count("does not exist") == 20


def test_broken_held_out_pictures_are_left_out(tmp_path: Path) -> None:
    data = opened(rows(4), kept=painted(tmp_path, 5, broken=[1]), max_broken=0.2)
    assert [prompt.id for prompt in data.held_out(6)] == [0, 2, 3, 4, 0, 2]


def test_everything_leaves_out_what_is_broken_and_reads_pictures_as_it_goes(tmp_path: Path) -> None:
    data = opened(painted(tmp_path, 5, broken=[1]), max_broken=0.2)
    everything = data.everything()
    assert everything is not None
    assert [prompt.id for prompt in everything] == [0, 2, 3, 4]
    assert torch.equal(everything[1].source[0] * 255, torch.full((4, 4), 2.0))
    assert [prompt.id for prompt in everything[1:3]] == [2, 3]
    Image.new("RGB", (4, 4), (99, 0, 0)).save(tmp_path / "2.png")
    assert everything[1].source[0, 0, 0] * 255 == 99, "not kept in memory"


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"held_out_share": 1.0}, "held_out_share must be 0 or more and below 1, not 1.0"),
        ({"held_out_salt": "a"}, "give held_out_share too"),
        ({"max_broken": -0.1}, "max_broken must be 0 or more and below 1, not -0.1"),
        ({"sizes": ()}, "sizes must name one"),
        ({"sizes": ((8, 0),)}, r"sizes must be \[height, width\] in pixels, not \[8, 0\]"),
        ({"sizes": ((8, 8), (8, 8))}, "sizes names one twice"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Choices(4, 1, **options)  # type: ignore[arg-type]
