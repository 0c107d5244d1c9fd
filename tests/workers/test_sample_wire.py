"""Messages between processes: what is sent is what arrives, to the bit; what is damaged says so."""

import socket
import threading
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from rlkit.types import Path, Plan, Prompt, Samples, Tokens
from rlkit.workers.sample_wire import (
    WireError,
    joined,
    pack,
    pack_samples,
    plain_plan,
    read_header,
    read_plan,
    read_samples,
    receive,
    send,
    unpack,
)

PROMPTS = (Prompt(7, "one"), Prompt(8, "two", metadata={"kept": 1}))


def made(first: int = 0, count: int = 4) -> Samples:
    """Samples first ... first + count of a step of 2 groups of 2; each completes its state, which pairs share."""
    index = torch.arange(first, first + count)
    group = index // 2

    def column(*shape: int) -> Tensor:  # numbers that say which sample they are of
        return index.float().view(-1, *(1,) * len(shape)).expand(count, *shape) / 3

    path = Path(
        states=column(3, 2),
        means=column(2, 2),
        log_prob=torch.full((count, 2), torch.nan),
        sigmas=torch.tensor([1.0, 0.5, 0.0]),
        noise_levels=torch.tensor([0.7, 0.7]),
        steps=torch.arange(2),
        sigma_max=0.1 + 0.2,
    )
    samples = Samples(
        media=column(3, 2, 2),
        latents=column(2),
        prompts=tuple(PROMPTS[i] for i in group.tolist()),
        group=group,
        index=index,
        sample_id=index + 40,
        version=3,
        total=4,
        path=path,
        sigmas=torch.tensor([1.0, 0.5, 0.0]),
    )
    previews = replace(samples.select(torch.arange(0, count, 2)), media=column(3, 2, 2)[::2] + 1)
    places = torch.arange(count) // 2
    return replace(samples, previews=previews, preview_of=torch.stack([places, torch.full_like(places, -1)], 1))


def there(samples: Samples) -> Samples:
    header, tensors = unpack(pack_samples(samples))
    return read_samples(header, tensors, PROMPTS)


def same(one: object, other: object) -> bool:
    """Two values, or dataclasses of them, to the bit; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(((one == other) | (one != one)).all())
    if isinstance(one, Samples | Path):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


def test_samples_arrive_as_they_were() -> None:
    arrived = there(made())
    assert same(arrived, made())
    assert arrived.prompts[3] is PROMPTS[1], "the asker's own prompt, with all that it knows"
    assert arrived.path is not None
    assert arrived.path.sigma_max == 0.1 + 0.2
    assert not same(arrived, replace(made(), version=4)), "the comparison can fail"


def test_samples_without_path_or_previews_have_none() -> None:
    plain = replace(made(), path=None, previews=None, preview_of=None, sigmas=None)
    assert same(there(plain), plain)


def test_no_samples_keep_their_shapes() -> None:
    none = made(2, 0)
    arrived = there(none)
    assert len(arrived) == 0
    assert same(arrived, none)


def test_parts_are_joined_to_the_whole() -> None:
    whole = joined([made(0, 2), made(2, 2)])
    assert same(whole, made())
    assert whole.preview_of is not None
    assert whole.preview_of.tolist() == [[0, -1], [0, -1], [1, -1], [1, -1]], "-1 stays: it is no place"
    assert same(joined([made()]), made())


def test_tensors_of_every_kind_travel() -> None:
    row = torch.arange(6, dtype=torch.float32)
    sent = {
        "half": row.bfloat16(),
        "turned": row.view(2, 3).T,  # not contiguous
        "tied": row,
        "tied too": row[:3],  # the same memory
        "bool": row > 2,
        "number": torch.tensor(3),
        "gradient": row.clone().requires_grad_(),
    }
    header, got = unpack(pack({"a": [1, None, "é"], "b": 0.1}, sent))
    assert header == {"a": [1, None, "é"], "b": 0.1}
    assert got.keys() == sent.keys()
    assert all(same(got[name], value.detach()) for name, value in sent.items())


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan("cps", (0.5, 0.25), (1, 2), True, True, 4, "dpm", 2, 1, "ema"), Plan(noise_level=0.7, window=(0, 3))],
)
def test_a_plan_arrives_as_it_was(plan: Plan) -> None:
    header, _ = unpack(pack({"plan": plain_plan(plan)}, {}))
    assert read_plan(header["plan"]) == plan


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_a_plan_of_another_version_is_refused() -> None:
    with pytest.raises(WireError, match="a plan with 'temper': both ends must be of the same rlkit"):
        read_plan(plain_plan(Plan()) | {"temper": 1})


def test_samples_that_would_lose_something_are_refused() -> None:
    ids = torch.zeros(4, 1, dtype=torch.int64)
    ones = torch.ones(4, dtype=torch.int64)
    tokens = Tokens(ids, ones, ones, ids > 0, ids.float(), ones > 0, 1.0)
    for written in (replace(made(), tokens=tokens), replace(made(), texts=("a",) * 4)):
        with pytest.raises(WireError, match="a policy that writes"):
            pack_samples(written)


def test_samples_of_another_step_are_refused() -> None:
    header, tensors = unpack(pack_samples(made()))
    with pytest.raises(WireError, match="groups 0 to 1; the step has 1 prompts"):
        read_samples(header, tensors, PROMPTS[:1])
    del tensors["media"]
    with pytest.raises(WireError, match="samples without media"):
        read_samples(header, tensors, PROMPTS)


def test_damaged_messages_are_refused() -> None:
    from safetensors.torch import save

    whole = pack({"a": 1}, {"x": torch.ones(3)})
    assert read_header(whole) == {"a": 1}
    for broken in (b"", whole[:-1], whole[:20], b"\xff" * 64, save({"x": torch.ones(3)})):
        with pytest.raises(WireError, match=f"{len(broken)} bytes that are no message"):
            unpack(broken)
    with pytest.raises(WireError, match="a mapping, not list"):
        read_header(save({}, {"header": "[1]"}))


# ---- the line --------------------------------------------------------------------------------------------------------


def test_messages_keep_their_ends() -> None:
    one, other = socket.socketpair()
    messages = [b"", b"abc", bytes(3 << 20)]  # the last is larger than what a socket holds
    with one, other:
        sender = threading.Thread(target=lambda: [send(one, message) for message in messages])
        sender.start()
        assert [receive(other, 60) for _ in messages] == messages
        sender.join()


def test_a_line_that_closes_in_the_middle_is_an_error() -> None:
    one, other = socket.socketpair()
    with other:
        one.sendall((8).to_bytes(8, "little") + b"half")
        one.close()
        with pytest.raises(ConnectionError, match="closed after 4 of 8 bytes"):
            receive(other)
        with pytest.raises(OSError, match="Broken pipe"):
            send(other, b"anybody?")


def test_nobody_waits_longer_than_they_said() -> None:
    one, other = socket.socketpair()
    with one, other:
        with pytest.raises(TimeoutError, match="0 of 8 bytes came in time"):
            receive(other, 0)
        with pytest.raises(TimeoutError):
            send(one, bytes(64 << 20), 0.01)  # nobody reads
