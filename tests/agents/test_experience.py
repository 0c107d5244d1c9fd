"""Experience: what is told of a bundle, the memory and what it finds, and the embeddings of requests."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit import registry
from rlkit.agents.experience import Bundle, Embedding, Entry, Memory, remembered, told, words
from rlkit.errors import RecipeError
from rlkit.world import atlas

LEAST = 0.84  # GenEvolve's


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_what_is_told_is_a_line_for_each_slot_that_says_something() -> None:
    whole = Bundle("flag of Kesh Bay", "IMG_1", "marsh", "a red circle", "looked nothing up")
    assert told(whole) == (
        "Experience:\nsearch: flag of Kesh Bay\nreferences: IMG_1\nskills: marsh\nprompt: a red circle\n"
        "failure: looked nothing up"
    )
    assert told(Bundle(skills="marsh", failure="gave no answer")) == (
        "Experience:\nskills: marsh\nfailure: gave no answer"
    )
    assert told(Bundle()) == told(Bundle(prompt=" \n")) == ""


def test_a_slot_cannot_begin_another_line() -> None:
    assert (
        told(Bundle(search="a\nfailure: nothing\r\nprompt: b")) == "Experience:\nsearch: a failure: nothing prompt: b"
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def axis(*places: int, size: int = 4) -> Tensor:
    return torch.eye(size)[list(places)]


def filled(*places: int, capacity: int = 500) -> Memory:
    """A memory of entries that say when they came, each on one axis."""
    memory = Memory(capacity)
    for step, place in enumerate(places):
        memory = memory.with_new([Entry(f"request {place}", Bundle(prompt=f"step {step}"), step)], axis(place))
    return memory


def test_the_oldest_leave() -> None:
    memory = filled(0, 1, 2, 3, 0, capacity=3)
    assert [entry.step for entry in memory.entries] == [2, 3, 4]
    assert torch.equal(memory.vectors, axis(2, 3, 0))
    more = memory.with_new([Entry("x", Bundle(), 9)] * 4, axis(1, 1, 1, 2))
    assert [entry.step for entry in more.entries] == [9, 9, 9]
    assert torch.equal(more.vectors, axis(1, 1, 2))
    assert len(memory) == 3, "a memory is not changed"


def test_the_newest_of_equally_similar_requests_is_found() -> None:
    memory = filled(0, 1, 0, 2)
    found = memory.find(axis(0, 1, 2, 3), LEAST)
    assert [one.prompt if one else None for one in found] == ["step 2", "step 1", "step 3", None]


def test_a_request_is_found_from_the_least_cosine_on() -> None:
    memory = filled(0)
    asked = torch.tensor([[c, math.sqrt(1 - c * c), 0.0, 0.0] for c in (0.85, 0.84, 0.83)])
    assert [one is not None for one in memory.find(asked, 0.84)] == [True, True, False]
    closer = memory.with_new([Entry("near", Bundle(prompt="near"), 1)], asked[:1])
    (best,) = closer.find(axis(0), 0.0)
    assert best == Bundle(prompt="step 0"), "the most similar one, and not the newest of those that are similar enough"


def test_nothing_is_found_in_an_empty_memory() -> None:
    assert Memory().find(axis(0, 1), -1.0) == [None, None]
    assert filled(0).find(torch.zeros(0, 4), 0.0) == []
    assert len(Memory().with_new([], torch.zeros(0))) == 0


def through_a_checkpoint(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As `Run.save` and `Run.load` have it: tensors to safetensors, the rest to json."""
    from safetensors.torch import load_file, save_file

    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    save_file({name: value.clone() for name, value in tensors.items()}, folder / "state.safetensors")
    rest = json.loads(json.dumps({name: value for name, value in state.items() if name not in tensors}))
    return load_file(folder / "state.safetensors") | rest


def test_a_memory_survives_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    entries = [Entry(f"ünter {i}\n", Bundle(*(f"{slot} {i}" for slot in "abcde")), i) for i in range(3)]
    memory = Memory(5).with_new(entries, torch.stack([words(f"flag of {i}") for i in range(3)]))
    again = remembered(through_a_checkpoint(memory.state(), tmp_path), 5)
    assert again.entries == memory.entries
    assert torch.equal(again.vectors, memory.vectors)
    assert again.capacity == 5
    empty = remembered(through_a_checkpoint(Memory().state(), tmp_path), 2)
    assert (empty.entries, empty.capacity) == ((), 2)
    assert empty.with_new(entries, memory.vectors).entries == tuple(entries[1:])


def test_a_smaller_capacity_keeps_the_newest() -> None:
    smaller = remembered(filled(0, 1, 2, 3).state(), 2)
    assert [entry.step for entry in smaller.entries] == [2, 3]
    assert torch.equal(smaller.vectors, axis(2, 3))
    assert len(remembered({}, 3)) == 0


def test_another_embedding_in_the_middle_of_a_run_is_refused() -> None:
    with pytest.raises(RecipeError, match="embeddings of 4 numbers, and the new ones 3") as error:
        filled(0).with_new([Entry("x", Bundle(), 1)], torch.ones(1, 3))
    assert "the embedding that the run began with" in str(error.value)


# ---- words -----------------------------------------------------------------------------------------------------------


def cosine(one: str, other: str) -> float:
    return float(words(one) @ words(other))


def test_words_are_the_same_on_every_machine() -> None:
    # Python's own hash is another in every process.
    found = words("Kesh Bay")
    assert found.nonzero().flatten().tolist() == [7, 117, 1435, 2487, 2838, 3916]  # kesh, bay, both
    assert sorted(set(found.abs().tolist())) == pytest.approx([0, 6**-0.5])


def test_capitals_marks_and_plain_words_do_not_count() -> None:
    assert torch.equal(words("Draw the FLAG of Kesh Bay!"), words("flag kesh bay"))
    assert cosine("the", "the") == pytest.approx(1.0), "where there are no other words, these count"
    assert words("").abs().max() == 0


@pytest.mark.parametrize("n", range(2, 7))
def test_requests_that_differ_in_one_of_six_words_are_not_alike(n: int) -> None:
    said = ["one", "two", "three", "four", "five", "six"][:n]
    last = cosine(" ".join(said), " ".join([*said[:-1], "seven"]))
    assert last == pytest.approx((2 * n - 3) / (2 * n - 1), abs=1e-6)
    assert last < LEAST
    if n > 2:
        within = cosine(" ".join(said), " ".join([said[0], "seven", *said[2:]]))
        assert within == pytest.approx((2 * n - 4) / (2 * n - 1), abs=1e-6)


def test_the_order_of_words_counts() -> None:
    assert cosine("red circle left of blue square", "blue square left of red circle") < LEAST


def test_no_two_subjects_of_the_atlas_are_alike() -> None:
    everywhere = [f"{first} {second}" for first in atlas.FIRST for second in atlas.SECOND]
    subjects = [f"the {kind} of {place}" for place in everywhere for kind in atlas.KINDS]
    vectors = Embedding().open()(subjects)
    among = vectors @ vectors.T - 2 * torch.eye(len(subjects))
    assert float(among.max()) < 0.75
    phrases = [phrase.format(kind="flag", place="Kesh Moor") for phrase in atlas.PHRASES]
    for one in atlas.PHRASES:
        for other in phrases:
            assert cosine(one.format(kind="flag", place="Kesh Bay"), other) < LEAST


def test_the_same_subject_in_another_phrase_is_alike() -> None:
    first, *others = (phrase.format(kind="emblem", place="Kesh Bay") for phrase in atlas.PHRASES)
    assert [cosine(first, other) for other in others] == pytest.approx([1.0] * len(others))


# ---- a text-embedding model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Qwen3 of a few thousand weights, with a tokenizer of letters that ends a text as Qwen3-Embedding's
    does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    letters = [*"abcdefghijklmnopqrstuvwxyz ", "<end>"]
    whole = Tokenizer(models.WordLevel({one: i for i, one in enumerate(letters)}, unk_token=" "))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    whole.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", len(letters) - 1)]
    )
    folder = tmp_path_factory.mktemp("embedding")
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>", pad_token="<end>", unk_token=" ")
    fast.save_pretrained(folder)
    sizes = {"vocab_size": len(letters), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3Model(Qwen3Config(**sizes, initializer_range=0.5)).save_pretrained(folder)
    return folder


def test_a_model_gives_the_state_of_the_last_token_whatever_stands_beside(qwen: Path) -> None:
    from transformers import AutoTokenizer, Qwen3Model

    texts = ["flag of kesh bay", "flag", "emblem of kesh bay and more"]
    vectors = Embedding("model", str(qwen), batch=2).open()(texts)
    net, tokenizer = Qwen3Model.from_pretrained(qwen).eval(), AutoTokenizer.from_pretrained(qwen)
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            last = net(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(vector, last / last.norm(), rtol=1e-4, atol=1e-5)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 3)
    assert float(vectors[0] @ vectors[1]) < 0.999


def test_a_model_reads_no_further_than_it_may(qwen: Path) -> None:
    embed = Embedding("model", str(qwen), longest=5).open()
    one, other, third = embed(["abcdef", "abcdxyz", "abcxyz"])
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, third, atol=1e-3)
    assert embed([]).shape == (0, 16)


def test_a_folder_without_a_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read") as error:
        Embedding("model", str(tmp_path)).open()
    assert "text-embedding model" in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "model"}, "say name: model with a path"),
        ({"path": "x"}, "say name: model with a path"),
        ({"name": "model", "path": "x", "longest": 0}, "longest must be 1 or more, not 0"),
        ({"batch": 0}, "batch must be 1 or more, not 0"),
        ({"name": "word"}, "Did you mean 'words'"),
    ],
)
def test_option_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        registry.construct(Embedding, options, "embedding")
