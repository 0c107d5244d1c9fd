"""Asking a judge: requests and seeds, second attempts, endpoints that misbehave, and rounds of questions."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rlkit.endpoints import Endpoints, Failure, Reply
from rlkit.errors import RewardError
from rlkit.judging.answers import Checklist, Numbers, Prose, Tokens
from rlkit.judging.judge import Chat, Question, Sampling, Scheme, Scorer, Stage, check_options, open_chat
from rlkit.types import Prompt, Samples, Unscored

ONE = Numbers(0, 10, {"score": 1})


def completion(content, finish="stop", **more):
    return {"choices": [{"index": 0, "finish_reason": finish, "message": {"content": content}, **more}]}


def scored(*numbers):
    return completion(json.dumps({"reasoning": "r", "score": list(numbers)}))


class FakePool:
    """Endpoints whose answers are a function of the request's JSON; anything but a Failure is sent as JSON."""

    def __init__(self, answer):
        self.answer, self.asked, self.rounds, self.closed = answer, [], [], False

    def map(self, requests):
        self.rounds.append(len(requests))
        self.asked += [one.json for one in requests]
        found = [self.answer(one.json) for one in requests]
        return [one if isinstance(one, Failure) else Reply(200, json.dumps(one).encode()) for one in found]

    def close(self):
        self.closed = True


def question(text, form=ONE, turn=0):
    return Question([{"role": "user", "content": [{"type": "text", "text": text}]}], form, turn)


def text_in(body):
    return " ".join(part.get("text", "") for part in body["messages"][-1]["content"]).strip()


def samples_of(media, prompts):
    rows = torch.arange(len(prompts))
    return Samples(media, torch.zeros(len(prompts), 0), tuple(prompts), rows, rows, rows, version=0, total=len(prompts))


# ------------------------------------------------------------------------------------------------- one request


def test_a_request_carries_model_sampling_and_schema():
    pool = FakePool(lambda body: scored(7))
    chat = Chat(pool, "m", Sampling(0.7, 0.9, 20, 512), body={"chat_template_kwargs": {"enable_thinking": False}})
    assert chat.ask([question("q")]) == [{"score": (7.0,)}]
    (body,) = pool.asked
    assert (body["model"], body["temperature"], body["top_p"], body["top_k"]) == ("m", 0.7, 0.9, 20)
    assert body["max_tokens"] == 512
    assert body["response_format"]["type"] == "json_schema"
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert 0 <= body["seed"] < 2**31


def test_unguided_and_without_top_k():
    pool = FakePool(lambda body: scored(7))
    Chat(pool, "m", Sampling(top_k=None), guided=False).ask([question("q")])
    assert not {"top_k", "response_format"} & set(pool.asked[0])


def test_first_tokens_are_asked_for_once_and_cold():
    pool = FakePool(lambda body: completion("x", "length", logprobs=None))
    (answer,) = Chat(pool, "m", attempts=3, body={"max_tokens": 9}).ask([question("q", Tokens(("yes", "no")))])
    assert isinstance(answer, Unscored)
    assert pool.rounds == [1], "at temperature 0 another try gives the same"
    assert (pool.asked[0]["temperature"], pool.asked[0]["max_tokens"]) == (0, 1)
    assert "top_k" not in pool.asked[0]


# --------------------------------------------------------------------------------------- seeds and second tries


def test_an_answer_that_cannot_be_read_is_asked_for_again_with_another_seed():
    seen = []

    def answer(body):
        seen.append(body["seed"])
        return scored(11) if len(seen) < 3 else scored(6)

    assert Chat(FakePool(answer), "m", attempts=3).ask([question("q")]) == [{"score": (6.0,)}]
    assert len(set(seen)) == 3


def test_after_the_last_attempt_there_is_no_score():
    pool = FakePool(lambda body: scored(11))
    (answer,) = Chat(pool, "m", attempts=2).ask([question("q")])
    assert answer == Unscored("score: 11 is outside 0..10 (the last of 2 answers)")
    assert pool.rounds == [1, 1]


def test_only_what_failed_is_asked_again():
    pool = FakePool(lambda body: scored(11) if text_in(body) == "b" and len(pool.rounds) == 1 else scored(3))
    assert Chat(pool, "m").ask([question("a"), question("b"), question("c")]) == [{"score": (3.0,)}] * 3
    assert pool.rounds == [3, 1]


def test_an_endpoint_s_failure_is_not_asked_again():
    pool = FakePool(lambda body: Failure("connection refused"))
    assert Chat(pool, "m", attempts=3).ask([question("q")]) == [Unscored("connection refused")]
    assert pool.rounds == [1]


def test_equal_questions_are_asked_once():
    pool = FakePool(lambda body: scored(len(pool.asked)))
    answers = Chat(pool, "m").ask([question("a"), question("b"), question("a")])
    assert pool.rounds == [2]
    assert answers[0] == answers[2]


def seeds(texts, turns=1):
    pool = FakePool(lambda body: scored(1))
    Chat(pool, "m").ask([question(text, turn=turn) for text in texts for turn in range(turns)])
    return {(text_in(body), body["seed"]) for body in pool.asked}


def test_seeds_come_from_the_content_and_not_from_the_order():
    assert seeds(["a", "b", "c"]) == seeds(["c", "b", "a"]) == seeds(["b"]) | seeds(["a"]) | seeds(["c"])
    assert len({seed for _, seed in seeds(["a", "b"], turns=4)}) == 8


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [1]}, {"choices": scored(1)["choices"] * 2}, [], 1])
def test_a_reply_that_is_no_completion(reply):
    (answer,) = Chat(FakePool(lambda body: reply), "m", attempts=1).ask([question("q")])
    assert "no chat completion" in answer.reason


def test_no_questions():
    pool = FakePool(lambda body: scored(1))
    assert Chat(pool, "m").ask([]) == []
    assert pool.rounds == []


# ------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("endpoints", "attempts", "body", "why"),
    [
        (Endpoints(("http://127.0.0.1:8000/v1",)), 3, {}, "without /v1"),
        (Endpoints(("http://127.0.0.1:8000/v1/",)), 3, {}, "without /v1"),
        (Endpoints(("http://127.0.0.1:8000",)), 0, {}, "attempts"),
        (Endpoints(("http://127.0.0.1:8000",)), 3, {"seed": 1, "messages": []}, "body must not set messages, seed"),
    ],
)
def test_wrong_options(endpoints, attempts, body, why):
    with pytest.raises(ValueError, match=why):
        check_options(endpoints, attempts, body)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"max_tokens": 0}]
)
def test_wrong_sampling(options):
    with pytest.raises(ValueError, match="must be"):
        Sampling(**options)


# ----------------------------------------------------------------------------------------------- a real endpoint


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> address. behave(path, body) gives (status, text), or waits for `serve.over`."""
    monkeypatch.setattr("rlkit.endpoints.FIRST_PAUSE", 0.0)
    servers = []

    def start(behave):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, text = behave(self.path, json.loads(body) if body else None)
                self.send_response(status)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET = answer

            def log_message(self, *what):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    start.over = threading.Event()
    yield start
    start.over.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(address, *questions, form=ONE, **options):
    chat = open_chat(Endpoints((address,), **options), "m", Sampling(), 2, True, {})
    try:
        return chat.ask([question(text, form) for text in questions])
    finally:
        chat.close()


def test_a_real_endpoint_answers(serve):
    bodies = []

    def behave(path, body):
        bodies.append((path, body))
        return 200, json.dumps(scored(int(text_in(body))))

    assert ask(serve(behave), "3", "4") == [{"score": (3.0,)}, {"score": (4.0,)}]
    assert {path for path, _ in bodies} == {"/v1/chat/completions"}
    assert all(body["model"] == "m" for _, body in bodies)


def test_log_probabilities_over_the_wire(serve):
    top = [{"token": " Yes", "logprob": -0.1, "bytes": [89]}, {"token": "No", "logprob": -9999.0, "bytes": None}]
    reply = completion("Yes", "length", logprobs={"content": [{"token": "Yes", "logprob": 0, "top_logprobs": top}]})
    (found,) = ask(serve(lambda path, body: (200, json.dumps(reply))), "q", form=Tokens(("yes", "no")))
    assert found == pytest.approx({"yes": 0.904837, "no": 0.0})


def test_overload_and_errors_are_tried_again(serve):
    states = iter([(429, "slow down"), (503, ""), (200, json.dumps(scored(5)))])
    assert ask(serve(lambda path, body: next(states)), "q") == [{"score": (5.0,)}]


@pytest.mark.parametrize(
    ("status", "text", "why"),
    [
        (429, "slow down", "429"),
        (500, "Traceback", "500"),
        (400, "the picture is too large", "400: the picture is too large"),
        (302, "", "302"),
        (200, "<html>", "no chat completion"),
        (200, "", "no chat completion"),
        (200, '{"choices": [{"finish_reason": "stop", "message": {"content": NaN}}]}', "no chat completion"),
        (200, "[" * 100_000, "no chat completion"),
        (200, json.dumps(completion('{"reasoning": "1024 by 10', "length")), "cut off"),
        (200, json.dumps(completion("I'm sorry, but I can't help with that.")), "not one JSON object"),
        (200, json.dumps(completion(None, refusal=None)), "no text"),
    ],
)
def test_an_endpoint_that_misbehaves_gives_no_score(serve, status, text, why):
    (answer,) = ask(serve(lambda path, body: (status, text)), "q", tries=2)
    assert isinstance(answer, Unscored)
    assert why in answer.reason


def test_an_endpoint_that_hangs_costs_its_question_only(serve):
    def behave(path, body):
        if text_in(body) == "hang":
            serve.over.wait()
        return 200, json.dumps(scored(5))

    hung, fine = ask(serve(behave), "hang", "q", tries=1, request_timeout=0.3)
    assert "did not answer within 0.3 s" in hung.reason
    assert fine == {"score": (5.0,)}


def test_the_only_model_is_found(serve):
    models = [{"id": "judge-8b"}]
    address = serve(lambda path, body: (200, json.dumps({"data": models})) if path == "/v1/models" else (404, ""))
    chat = open_chat(Endpoints((address,)), None, Sampling(), 1, True, {})
    assert chat.model == "judge-8b"
    chat.close()
    models.append({"id": "other"})
    with pytest.raises(RewardError, match="serves 2 models: judge-8b, other"):
        open_chat(Endpoints((address,)), None, Sampling(), 1, True, {})


@pytest.mark.parametrize("reply", ['{"models": []}', "[]", '{"data": [1]}'])
def test_a_list_of_models_that_is_none(serve, reply):
    with pytest.raises(RewardError, match="no list of models"):
        open_chat(Endpoints((serve(lambda path, body: (200, reply)),)), None, Sampling(), 1, True, {})


def test_a_pool_is_closed_if_opening_fails(monkeypatch):
    pool = FakePool(lambda body: None)
    pool.get = lambda path: {"data": []}
    monkeypatch.setattr(Endpoints, "open", lambda self: pool)
    with pytest.raises(RewardError, match="0 models: none"):
        open_chat(Endpoints(("http://127.0.0.1:1",)), None, Sampling(), 1, True, {})
    assert pool.closed


# ------------------------------------------------------------------------------------------------------- schemes

DIFFERENCE = Scheme(
    ((Stage("words", "words.txt", Prose()),), (Stage("number", "number.txt", ONE),)),
    lambda answers: (answers["number"]["score"][0] / 10, answers["number"]["score"][0]),
    ("raw",),
)
RED = torch.zeros(3, 4, 4) + torch.tensor([1.0, 0, 0])[:, None, None]


@pytest.fixture
def scorer(tmp_path):
    def make(answer, scheme=DIFFERENCE, num_pass=1, own=None, files=None):
        texts = {
            "words.txt": "R\n---\nSAY $instruction $picture",
            "number.txt": "R\n---\nSCORE $instruction $words $picture",
        }
        for name, text in {**texts, **(files or {})}.items():
            (tmp_path / name).write_text(text)
        pool = FakePool(answer)
        return Scorer(Chat(pool, "m", attempts=1), scheme, scheme.templates(tmp_path, own or {}), num_pass), pool

    return make


def test_what_the_judge_said_goes_into_the_next_question(scorer):
    asked = []

    def answer(body):
        asked.append(text_in(body))
        return completion('it says "score": 10') if asked[-1].startswith("SAY") else scored(4)

    judge, pool = scorer(answer)
    values, components = judge(samples_of(RED[None], [Prompt(0, "paint")]))
    assert (values, components) == ([0.4], {"raw": [4.0]})
    assert asked == ['SAY "paint"', 'SCORE "paint" "it says \\"score\\": 10"']
    judge.close()
    assert pool.closed


def test_a_sample_that_failed_is_not_asked_on_and_costs_nobody_else(scorer):
    def answer(body):
        if text_in(body).startswith("SAY"):
            return completion("d", "length" if '"b"' in text_in(body) else "stop")
        return scored(4)

    judge, pool = scorer(answer)
    media = torch.stack([RED, RED, RED * torch.nan, RED])
    values, components = judge(samples_of(media, [Prompt(0, "a"), Prompt(1, "b"), Prompt(2, "c"), Prompt(3, " ")]))
    assert [isinstance(one, Unscored) for one in values] == [False, True, True, True]
    assert "words: the answer was cut off" in values[1].reason
    assert components == {"raw": [4.0, None, None, None]}
    assert pool.rounds == [2, 1]


def test_passes_are_averaged_and_each_has_its_seed(scorer):
    given = {}

    def answer(body):
        if text_in(body).startswith("SAY"):
            return completion("d")
        return scored(given.setdefault(body["seed"], 2 * len(given)))

    judge, _ = scorer(answer, num_pass=4)
    values, components = judge(samples_of(RED[None], [Prompt(0, "a")]))
    assert sorted(given.values()) == [0, 2, 4, 6]
    assert values == pytest.approx([0.3])
    assert components == {"raw": [3.0]}


@pytest.mark.parametrize(("broken", "value"), [(1, 0.4), (2, None), (3, None)])
def test_more_than_half_of_the_passes_must_give_a_number(scorer, broken, value):
    seen = []

    def answer(body):
        if text_in(body).startswith("SAY"):
            return completion("d")
        seen.append(body)
        return scored(11 if len(seen) <= broken else 4)

    ((found,), _) = scorer(answer, num_pass=4)[0](samples_of(RED[None], [Prompt(0, "a")]))
    if value is None:
        assert found == Unscored("number: score: 11 is outside 0..10")
    else:
        assert found == pytest.approx(value)


def judged(scorer, prompts, media):
    """Values that depend on the seed, and so on everything that the seed comes from."""

    def answer(body):
        return completion("d") if text_in(body).startswith("SAY") else scored(body["seed"] % 11)

    return scorer(answer, num_pass=2)[0](samples_of(media, prompts))[0]


def test_values_depend_on_neither_order_nor_company(scorer):
    media = torch.stack([RED, 1 - RED, RED / 2])
    prompts = [Prompt(0, "a"), Prompt(1, "b"), Prompt(2, "a")]
    values = judged(scorer, prompts, media)
    assert len(set(values)) > 1
    assert judged(scorer, prompts[::-1], media.flip(0)) == values[::-1]
    assert [judged(scorer, [prompt], one[None])[0] for prompt, one in zip(prompts, media, strict=True)] == values


def test_no_samples(scorer):
    judge, pool = scorer(lambda body: scored(1))
    assert judge(samples_of(torch.zeros(0, 3, 4, 4), [])) == ([], {"raw": []})
    assert pool.asked == []


# --------------------------------------------------------------------------------- what is asked of a prompt once

LISTED = Scheme(
    (
        (Stage("words", "list.txt", Checklist(), once=True),),
        (Stage("number", "number.txt", lambda answers: Numbers(0, 10, {"score": len(answers["words"])})),),
    ),
    lambda answers: (sum(answers["number"]["score"]) / 100,),
    (),
)
LIST = {"list.txt": "R\n---\nLIST $instruction"}


def listing(body):
    if text_in(body).startswith("LIST"):
        return completion('{"items": ["a cup", "a spoon"]}' if "cup" in text_in(body) else '{"items": ["a dog"]}')
    return scored(5, 5) if "2. " in text_in(body) else scored(7)


def test_a_checklist_is_made_once_for_each_prompt(scorer):
    judge, pool = scorer(listing, LISTED, num_pass=2, files=LIST)
    media = torch.stack([RED, 1 - RED, RED])
    samples = samples_of(media, [Prompt(0, "cup"), Prompt(1, "cup"), Prompt(2, "dog")])
    for _ in range(2):
        assert judge(samples)[0] == pytest.approx([0.1, 0.1, 0.07])
    lists = [text_in(body) for body in pool.asked if text_in(body).startswith("LIST")]
    assert lists == ['LIST "cup"', 'LIST "dog"']
    assert 'SCORE "cup" 1. "a cup"\n2. "a spoon"' in {text_in(body) for body in pool.asked}


def test_a_checklist_that_failed_is_asked_for_again_in_the_next_call(scorer):
    broken = [True]
    judge, _ = scorer(lambda body: Failure("gone") if broken[0] else listing(body), LISTED, files=LIST)
    samples = samples_of(RED[None], [Prompt(0, "dog")])
    assert judge(samples)[0] == [Unscored("words: gone")]
    broken[0] = False
    assert judge(samples)[0] == pytest.approx([0.07])


@pytest.mark.parametrize(
    ("own", "files", "why"),
    [
        ({"numbr": "x.txt"}, {}, "prompts has 'numbr'. Did you mean 'number'.* Prompts here: words, number"),
        ({"words": "/nowhere/x.txt"}, {}, "/nowhere/x.txt cannot be read"),
        ({}, {"words.txt": "R\n---\n$words"}, r"names \$words"),
        ({}, {"number.txt": "R\n---\n$number"}, r"names \$number"),
        ({}, {"words.txt": "R\n---\nx", "number.txt": "R\n---\nx"}, r"none of the prompts shows \$picture"),
    ],
)
def test_wrong_prompts(scorer, own, files, why):
    with pytest.raises(ValueError, match=why):
        scorer(None, own=own, files=files)


def test_what_is_remembered_for_a_prompt_must_not_show_a_picture(scorer):
    with pytest.raises(ValueError, match=r"names \$picture"):
        scorer(None, LISTED, files={"list.txt": "R\n---\n$instruction $picture"})


def test_a_user_s_own_prompt_file(scorer, tmp_path):
    (tmp_path / "mine.txt").write_text("---\nSCORE mine $picture")
    judge, pool = scorer(
        lambda body: completion("d") if "SAY" in text_in(body) else scored(9),
        own={"number": str(tmp_path / "mine.txt")},
    )
    assert judge(samples_of(RED[None], [Prompt(0, "a")]))[0] == [0.9]
    assert text_in(pool.asked[1]) == "SCORE mine"
