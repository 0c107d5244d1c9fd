"""The protocol `rlkit-reward/1`: an exact round trip, and a WireError for everything else, however it was made."""

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import torch

from rlkit import pictures, wire
from rlkit.types import Prompt, Samples
from rlkit.wire import Result, WireError, decode_reply, decode_request, encode_reply, encode_request

HEAD = len(b"rlkit-reward/1\n") + 32


def picture(seed, height=6, width=5):
    values = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.float() / 255


def samples_of(prompts, media=None):
    n = len(prompts)
    media = torch.stack([picture(i) for i in range(n)]) if media is None else media
    rows = torch.arange(n)
    return Samples(media, torch.zeros(n, 0), tuple(prompts), rows // 2 + 40, rows, rows + 7, version=3, total=n)


def rich():
    source, reference = picture(100, 3, 9), picture(101, 8, 2)
    metadata = {"tag": "count", "include": [{"class": "dog", "count": 2, "at": [0.5, -1e-9, None, True]}], "ä": "日本"}
    one = Prompt(5, "a red circle – ☃", "count", metadata, ("STOP", "ß"), source, (reference, source))
    return samples_of([one, one, Prompt(6, ""), Prompt(7, "b", source=reference)])


def same(one: Samples, other: Samples) -> bool:
    def pixels(samples):
        return [[*([p.source] if p.source is not None else []), *p.references] for p in samples.prompts]

    mine, theirs = pixels(one), pixels(other)
    return (
        torch.equal(one.media, other.media)
        and one.prompts == other.prompts
        and all(torch.equal(getattr(one, c), getattr(other, c)) for c in ("group", "index", "sample_id"))
        and (one.version, one.total) == (other.version, other.total)
        and all((a.source is None) == (b.source is None) for a, b in zip(one.prompts, other.prompts, strict=True))
        and all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(mine, theirs, strict=True))
    )


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_the_round_trip_is_exact(codec):
    question = decode_request(encode_request(rich(), "ocr", "abc", codec))
    assert same(question.samples, rich())
    assert (question.reward, question.config) == ("ocr", "abc")
    assert question.samples.media.dtype == torch.float32
    assert decode_request(encode_request(rich())).reward is None


def test_the_id_is_the_contents():
    first, again, other = (encode_request(rich(), reward) for reward in ("a", "a", "b"))
    assert decode_request(first).id == wire.name_of(again) != wire.name_of(other)


def test_what_is_shared_travels_once():
    source = picture(9, 64, 64)
    prompts = [Prompt(1, "edit it", metadata={"a": 1}, source=source.clone()) for _ in range(8)]
    question = encode_request(samples_of(prompts))
    header, _ = taken_apart(question)
    assert len(header["prompts"]) == 1
    assert len(header["parts"]) == 8 + 1
    decoded = decode_request(question).samples
    assert all(one is decoded.prompts[0] for one in decoded.prompts)
    blank = encode_request(samples_of([Prompt(i, str(i)) for i in range(8)], torch.zeros(8, 3, 4, 4)))
    assert len(taken_apart(blank)[0]["parts"]) == 1
    assert decode_request(blank).samples.media.shape == (8, 3, 4, 4)


def test_equal_bytes_of_another_shape_are_another_picture():
    one = Prompt(1, "", source=torch.zeros(3, 2, 8), references=(torch.zeros(3, 8, 2), torch.zeros(3, 4, 4)))
    found = decode_request(encode_request(samples_of([one]))).samples.prompts[0]
    assert [tuple(p.shape) for p in (found.source, *found.references)] == [(3, 2, 8), (3, 8, 2), (3, 4, 4)]


def test_pixels_are_rounded_on_the_way():
    media = torch.full((1, 3, 2, 2), 0.5)
    assert decode_request(encode_request(samples_of([Prompt(0, "")], media))).samples.media.unique() * 255 == 128


# ---- damage ----------------------------------------------------------------------------------------------------------


def small():
    one = Prompt(0, "a", metadata={"k": [1]}, target_text=("T",))
    return encode_request(samples_of([one], torch.zeros(1, 3, 2, 2)))


REPLY = encode_reply("q", [Result(7, 0.5, {"c": None}), Result(8, None, status="failed", reason="why")])
READERS = {"question": (decode_request, small()), "answer": (lambda data: decode_reply(data, "q", [7, 8]), REPLY)}


@pytest.mark.parametrize("which", READERS)
def test_whatever_is_cut_off_is_an_error(which):
    read, whole = READERS[which]
    read(whole)
    for length in range(len(whole)):
        with pytest.raises(WireError):
            read(whole[:length])
    with pytest.raises(WireError):
        read(whole + b"\0")


@pytest.mark.parametrize("which", READERS)
def test_every_flipped_bit_is_an_error(which):
    read, whole = READERS[which]
    damaged = bytearray(whole)
    for place in range(len(whole)):
        for bit in (1, 128):
            damaged[place] ^= bit
            with pytest.raises(WireError):
                read(bytes(damaged))
            damaged[place] ^= bit


@pytest.mark.parametrize("data", [b"", b"rlkit-reward/1\n", b"rlkit-reward/2\n" + bytes(40), b"{}", bytes(100)])
def test_other_bytes_are_no_message(data):
    with pytest.raises(WireError, match="no message of rlkit-reward/1"):
        decode_request(data)


# ---- malice: messages whose digest is right --------------------------------------------------------------------------


def framed(header: bytes, parts: bytes = b"", length: int | None = None) -> bytes:
    rest = (len(header) if length is None else length).to_bytes(4, "big") + header + parts
    return b"rlkit-reward/1\n" + hashlib.sha256(rest).digest() + rest


def taken_apart(message: bytes):
    length = int.from_bytes(message[HEAD : HEAD + 4], "big")
    return json.loads(message[HEAD + 4 : HEAD + 4 + length]), message[HEAD + 4 + length :]


def changed(change, message=None) -> bytes:
    header, parts = taken_apart(message or encode_request(rich(), "ocr", codec="raw"))
    answer = change(header)
    return framed(json.dumps(header if answer is None else answer).encode(), parts)


ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**6,
    2**63,
    -(2**70),
    10**400,
    0.5,
    1e308,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    [1],
    {},
    {"a": 1},
]


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*path, key))


def planted(value, path, odd):
    if not path:
        return odd
    changed = copy.copy(value)
    changed[path[0]] = planted(value[path[0]], path[1:], odd)
    return changed


@pytest.mark.parametrize("which", ["question", "answer"])
def test_any_odd_value_anywhere_is_a_wire_error_or_harmless(which):
    message = small() if which == "question" else REPLY
    read = READERS[which][0]
    header, parts = taken_apart(message)
    refused = 0
    for path in places(header):
        for odd in ODD:
            try:
                read(framed(json.dumps(planted(header, path, odd)).encode(), parts))
            except WireError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("which", ["question", "answer"])
def test_a_key_too_many_or_too_few_is_an_error(which):
    message, read = (small(), decode_request) if which == "question" else (REPLY, READERS["answer"][0])
    header, parts = taken_apart(message)
    free = ("metadata", "components")  # whose keys are the sender's
    for path in places(header):
        there = header
        for key in path:
            there = there[key]
        if not isinstance(there, dict) or any(key in free for key in path):
            continue
        for other in [{**there, "more": 1}] + [{k: v for k, v in there.items() if k != gone} for gone in there]:
            with pytest.raises(WireError):
                read(framed(json.dumps(planted(header, path, other)).encode(), parts))


@pytest.mark.parametrize(
    "header", [b"", b"null", b"[]", b"NaN", b"{", b"\xff", b'{"a":' * 100_000, b"[" * 3_000_000, b'{"a":1e999}']
)
def test_a_header_that_is_no_json_mapping(header):
    with pytest.raises(WireError):
        decode_request(framed(header))


def set_at(*path):
    *way, last = path[:-1]

    def change(header):
        there = header
        for key in way:
            there = there[key]
        there[last] = path[-1]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("parts", 0, "height", 4097), "1 to 4096 pixels"),
        (set_at("parts", 0, "bytes", 1 << 40), "does not fit its sides"),
        (set_at("parts", 0, "codec", "jpeg"), "png or raw"),
        (set_at("samples", 0, "picture", -1), "among the parts"),
        (set_at("samples", 0, "picture", 99), "among the parts"),
        (set_at("samples", 0, "prompt", 99), "among the prompts"),
        (set_at("samples", 0, "id", 8), "same id"),
        (set_at("samples", 0, "group", 2**63), "64 bits"),
        (set_at("prompts", 0, "source", 99), "among the parts"),
        (set_at("prompts", 0, "source", "http://a/b.png"), "wrong type"),
        (set_at("prompts", 0, "references", ["/etc/passwd"]), "among the parts"),
        (set_at("prompts", 0, "text", "é" * 8193), "at most 16384 bytes"),
        (set_at("prompts", 0, "target_text", ["a"] * 8193), "target_text"),
        (set_at("prompts", 0, "metadata", {"a": "b" * 65_530}), "at most 65536 bytes"),
        (set_at("prompts", 0, "metadata", {"a": 1e308 * 10}), "no JSON"),
        (set_at("samples", []), "1 to 256 samples"),
        (set_at("parts", []), "1 to 256 samples"),
    ],
)
def test_what_breaks_a_rule_says_which(change, message):
    with pytest.raises(WireError, match=message):
        decode_request(changed(change))


def nested(depth):
    value = {"deepest": 1}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize("field", ["text", "target_text", "metadata"])
def test_the_limits_of_texts_are_exact(field):
    fits = {"text": "é" * 8192, "target_text": ("a" * 16_383,), "metadata": {"a": "b" * 65_527}}[field]
    over = {"text": "é" * 8193, "target_text": ("a" * 16_384,), "metadata": {"a": "b" * 65_528}}[field]
    prompt = Prompt(0, "")
    decode_request(encode_request(samples_of([replace(prompt, **{field: fits})])))
    with pytest.raises(WireError, match="at most"):
        encode_request(samples_of([replace(prompt, **{field: over})]))


def test_metadata_goes_eight_deep():
    question = encode_request(samples_of([Prompt(0, "", metadata=nested(8))]))
    assert decode_request(question).samples.prompts[0].metadata == nested(8)
    with pytest.raises(WireError, match="deeper than 8"):
        encode_request(samples_of([Prompt(0, "", metadata=nested(9))]))
    with pytest.raises(WireError, match="deeper than 8"):
        decode_request(changed(set_at("prompts", 0, "metadata", nested(9))))


def test_a_header_that_is_too_large_is_not_read(monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was read"))
    for message in (framed(b" " * ((4 << 20) + 1)), framed(b"{}", length=3), framed(b"{}", length=2**32 - 1)):
        with pytest.raises(WireError, match="longer than"):
            decode_request(message)


def test_pictures_are_counted_before_any_is_decoded(monkeypatch):
    def decode(*_, **__):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(pictures, "read", decode)
    bomb = {"codec": "png", "bytes": 1, "height": 4096, "width": 4096}
    header, _ = taken_apart(small())
    for rows, parts in ((1, 8), (8, 1), (4, 5)):
        samples = [{**header["samples"][0], "id": i} for i in range(rows)]
        message = {**header, "samples": samples, "parts": [bomb] * parts}
        with pytest.raises(WireError, match="pixels in all"):
            decode_request(framed(json.dumps(message).encode(), bytes(parts)))
    many = {**header, "parts": [{**bomb, "height": 1, "width": 1}] * 257}
    with pytest.raises(WireError, match="1 to 256"):
        decode_request(framed(json.dumps(many).encode(), bytes(257)))


def test_a_picture_is_what_the_header_says():
    message = encode_request(samples_of([Prompt(0, "")]))
    for change in (set_at("parts", 0, "height", 7), set_at("parts", 0, "width", 4)):
        with pytest.raises(WireError):
            decode_request(changed(change, message))
    header, parts = taken_apart(message)
    for blob in (parts[:-20], b"\0" * len(parts)):
        header["parts"][0]["bytes"] = len(blob)
        with pytest.raises(WireError, match=r"PNG or JPEG|cut off"):
            decode_request(framed(json.dumps(header).encode(), blob))


def test_samples_of_several_sizes_are_refused():
    message = encode_request(samples_of([Prompt(0, "", source=picture(3, 9, 9)), Prompt(1, "")]), codec="raw")
    other = next(i for i, part in enumerate(taken_apart(message)[0]["parts"]) if part["height"] == 9)
    with pytest.raises(WireError, match="one size"):
        decode_request(changed(set_at("samples", 0, "picture", other), message))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (lambda: samples_of([], torch.zeros(0, 3, 2, 2)), "0 samples"),
        (lambda: samples_of([Prompt(0, "")] * 257, torch.zeros(257, 3, 1, 1)), "257 samples"),
        (lambda: samples_of([Prompt(0, "")], torch.full((1, 3, 2, 2), torch.nan)), "NaN or infinite"),
        (lambda: samples_of([Prompt(0, "")], torch.zeros(1, 2, 3, 2, 2)), r"shape \[3, H, W\]"),
        (lambda: samples_of([Prompt(0, "")], torch.zeros(1, 3, 2, 4097)), "1 to 4096"),
        (lambda: samples_of([Prompt(0, "", source=torch.zeros(1, 2, 2))]), "a picture is floats"),
        (lambda: samples_of([Prompt(0, "", metadata={"a": torch.zeros(1)})]), "Tensor, which JSON does not"),
        (lambda: samples_of([Prompt(0, "", metadata={1: 2})]), "dict, which JSON does not"),
        (lambda: samples_of([Prompt(0, "", metadata={"a": float("nan")})]), "no finite number"),
        (lambda: samples_of([Prompt(0, "", metadata={"a": 10**5000})]), "64 bits"),
        (lambda: samples_of([Prompt(0, "\ud800")]), "half a character"),
        (lambda: samples_of([Prompt(2**63, "")]), "64 bits"),
    ],
)
def test_samples_that_cannot_travel(samples, message):
    with pytest.raises(WireError, match=message):
        encode_request(samples())


def test_a_body_that_is_too_large_is_not_sent(monkeypatch):
    whole = len(small())
    monkeypatch.setattr(wire, "LARGEST_BODY", whole)
    assert len(small()) == whole
    monkeypatch.setattr(wire, "LARGEST_BODY", whole - 1)
    with pytest.raises(WireError, match="at most"):
        small()


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_answers_come_back():
    results = [Result(7, 0.1, {"a": 1.5, "b": None}), Result(3, None, {}, "timeout", "too late"), Result(9, -4.0)]
    assert decode_reply(encode_reply("q", results), "q", [7, 3, 9]) == results
    assert decode_reply(encode_reply("q", []), "q", []) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_is_written_that_is_none(value):
    for result in (Result(1, value), Result(1, 1.0, {"part": value})):
        with pytest.raises(WireError, match="no finite number"):
            encode_reply("q", [result])


def test_long_reasons_are_cut():
    reply = encode_reply("q", [Result(1, None, status="failed", reason="x" * 5000)])
    assert len(decode_reply(reply, "q", [1])[0].reason) == 1000


@pytest.mark.parametrize(
    ("question", "ids", "message"),
    [("p", [7, 8], "another question"), ("q", [7], "2 answers for 1"), ("q", [8, 7], "order"), ("q", [7, 9], "order")],
)
def test_answers_must_be_those_of_the_question(question, ids, message):
    with pytest.raises(WireError, match=message):
        decode_reply(REPLY, question, ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("results", 0, "value", None), "either a value, or a reason"),
        (set_at("results", 1, "value", 0.0), "either a value, or a reason"),
        (set_at("results", 1, "reason", ""), "either a value, or a reason"),
        (set_at("results", 0, "status", "failed"), "either a value, or a reason"),
        (set_at("results", 0, "status", "fine"), "unknown status"),
        (set_at("results", 0, "value", True), "wrong type"),
        (set_at("results", 0, "value", 10**400), "no finite number"),
        (set_at("results", 0, "components", {str(i): 1.0 for i in range(65)}), "64 components"),
        (set_at("results", 0, "components", {"a": "1"}), "no finite number"),
        (set_at("results", 1, "reason", "x" * 1001), "too long a reason"),
    ],
)
def test_an_answer_that_is_none(change, message):
    with pytest.raises(WireError, match=message):
        decode_reply(changed(change, REPLY), "q", [7, 8])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_none_is_not_read(number):
    text = taken_apart(REPLY)[0] | {"results": [{**taken_apart(REPLY)[0]["results"][0], "value": "HERE"}]}
    with pytest.raises(WireError):
        decode_reply(framed(json.dumps(text).replace('"HERE"', number).encode()), "q", [7])
