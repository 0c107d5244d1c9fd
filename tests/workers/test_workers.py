"""What workers are asked, what their answers must be, and what a pool makes of those that fail."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_fake import QUICK, Fake, complete, fakes, pools, requests, status

from rlkit.pictures import data_uri
from rlkit.types import Span
from rlkit.workers.pool import FAILURES, Patience, Pool
from rlkit.workers.vllm_server import Server, ServerWorker
from rlkit.workers.worker import Answer, Failure, Fault, Request, WorkerError


@pytest.fixture
def fake() -> Iterator[Callable[[], Fake]]:
    with fakes() as make:
        yield make


@pytest.fixture
def pool_of() -> Iterator[Callable[..., Pool]]:
    with pools() as make:
        yield make


# ---- requests and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": ()}, "one or more token ids"),
        ({"ids": (3, -1)}, "0 or above"),
        ({"most": 0}, "most and n"),
        ({"n": 0}, "most and n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"images": (torch.zeros(3, 2, 2),)}, "picture_token"),
        ({"images": (torch.zeros(3, 2, 2),), "picture_token": 8}, "1 images, and places for 0"),
    ],
)
def test_a_request_that_is_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**{"ids": (1, 2), "most": 4} | options)


def test_pictures_are_folded_to_one_token_each() -> None:
    picture = torch.zeros(3, 2, 2)
    request = Request((5, 8, 8, 8, 6, 6, 8, 7), 4, images=(picture, picture), picture_token=8)
    assert request.folded() == [5, 8, 6, 6, 8, 7]
    assert Request((5, 8, 8), 4).folded() == [5, 8, 8], "without pictures it is a token like others"


def test_what_a_server_is_asked(fake, pool_of) -> None:
    server, picture = fake(), torch.rand(3, 4, 4)
    request = Request((5, 8, 8, 6), 7, 2, 0.5, 11, (9, 10), (picture,), 8, True)
    told = pool_of(server, patience=replace(QUICK, tries=1)).map([request])
    (body,) = server.asked()
    assert body["token_ids"] == [5, 8, 6]
    assert body["content_parts"] == [{"type": "image_url", "url": data_uri(picture)}]
    assert body["return_token_ids"] is True
    assert body["model"] == "policy"
    assert body["sampling_params"] == {
        "n": 2,
        "max_tokens": 7,
        "temperature": 0.5,
        "seed": 11,
        "stop_token_ids": [9, 10],
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {"8": -100.0},
    }
    assert "cannot be read" in told[0].reason, "prompt log-probs were asked for and did not come"


def test_an_answer_as_it_came(fake, pool_of) -> None:
    server = fake()
    (answers,) = pool_of(server, version=3).map([Request((1, 2), 4, 2, seed=5)])
    one = Answer((2, 5), (-0.5, -1.0), (Span(3, 0, 2),), True, server.url)
    assert answers == (one, one)
    server.change = {"finish_reason": "length"}
    ((answer,),) = pool_of(server, version=3).map([Request((1, 2), 4, seed=5)])
    assert answer == replace(one, finished=False)


def test_log_probs_of_the_prompt(fake, pool_of) -> None:
    server = fake()
    rows = [None, {"7": {"logprob": -2.0}, "3": {"logprob": -0.1}}]
    server.script = [lambda body: (200, server.sampled(body) | {"prompt_logprobs": rows})]
    ((answer,),) = pool_of(server).map([Request((4, 7), 1, seed=5, prompt_log_probs=True)])
    assert answer.prompt_log_probs == (0.0, -2.0)


def test_weights_that_change_during_an_answer_leave_their_spans(fake, pool_of) -> None:
    server = fake()
    spans = [{"version": "0", "start": 0, "end": 1}, {"version": "1", "start": 1, "end": 2}]
    server.change = {"weight_versions": spans}
    ((answer,),) = pool_of(server).map(requests(1))
    assert answer.spans == (Span(0, 0, 1), Span(1, 1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish_reason": "abort"}, "ended the answer with 'abort'"),
        ({"logprobs": {"content": [{"logprob": -0.5}]}}, "2 tokens and 1 log-probs"),
        ({"logprobs": {"content": [{"logprob": -9999.0}, {"logprob": -1.0}]}}, "not finite"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 2}]}, "which weights"),
        ({"weight_versions": [{"version": "updating-4", "start": 0, "end": 2}]}, "which weights"),
        ({"weight_versions": [{"version": "0", "start": 0, "end": 1}]}, "which weights"),
        ({"weight_versions": None}, "which weights"),
        ({"token_ids": None}, "cannot be read"),
        ({"logprobs": []}, "cannot be read"),
    ],
)
def test_an_answer_that_is_not_trained_on(change: dict[str, Any], message: str, fake, pool_of) -> None:
    server = fake()
    server.change = change
    (failure,) = pool_of(server, patience=replace(QUICK, tries=2)).map(requests(1))
    assert isinstance(failure, Failure)
    assert message in failure.reason
    assert (failure.attempts, failure.worker) == (2, server.url), "another try might have done"


def test_fewer_answers_than_asked_for(fake, pool_of) -> None:
    server = fake()
    server.script = [lambda body: (200, {"choices": server.sampled(body)["choices"][:1]})] * 4
    (failure,) = pool_of(server, patience=replace(QUICK, tries=1)).map([Request((1,), 4, 2, seed=5)])
    assert "1 answers and not 2" in failure.reason


def test_pictures_that_the_server_reads_otherwise(fake, pool_of) -> None:
    server = fake()
    server.script = [lambda body: (200, server.sampled(body) | {"prompt_token_ids": [5, 8, 8, 8, 6]})]
    request = Request((5, 8, 8, 6), 4, seed=5, images=(torch.rand(3, 4, 4),), picture_token=8)
    (failure,) = pool_of(server).map([request])
    assert "over 3 tokens, the learner over 2" in failure.reason
    assert failure.attempts == 1


# ---- the other route -------------------------------------------------------------------------------------------------


def test_completions(fake, pool_of) -> None:
    server = fake()
    pool = pool_of(server, version=2, route="completions")
    ((answer,),) = pool.map(requests(1))
    assert answer == Answer((1, 100), (-0.5, -1.0), (Span(2, 0, 2),), True, server.url)
    (body,) = server.asked()
    assert (body["prompt"], body["return_token_ids"], body["top_p"]) == ([1], True, 1.0)
    (failure,) = pool.map([Request((8, 1), 4, images=(torch.rand(3, 4, 4),), picture_token=8)])
    assert "takes no pictures" in failure.reason


def test_completions_across_an_update_are_thrown_away(fake, pool_of) -> None:
    server = fake()
    pool = pool_of(server, version=2, route="completions")
    server.script = [lambda body: setattr(server, "label", "3")]
    ((answer,),) = pool.map(requests(1))
    assert answer.spans == (Span(3, 0, 2),)
    assert pool.retries == 1


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_requests_are_spread_and_each_is_answered_once(fake, pool_of) -> None:
    one, other = fake(), fake()
    complete(pool_of(one, other, at_once=4).map(requests(24)), 24)
    assert len(one.asked()) + len(other.asked()) == 24
    assert len(one.asked()) >= 4 <= len(other.asked())


def test_nobody_was_given_weights(fake, pool_of) -> None:
    (failure,) = pool_of(fake(), version=None).map(requests(1))
    assert failure == Failure("no worker is left: none was given weights; push first", 0, "")


def test_nobody_is_there(fake, pool_of) -> None:
    server = fake()
    pool = pool_of(server)
    server.close()
    (failure,) = pool.map(requests(1))
    assert "ConnectError" in failure.reason
    assert pool.states == {server.url: "away"}


STEPS = {"500": status(500), "503": status(503), "404": status(404), "broken off": lambda body: (0, "")}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_another_worker_takes_over(step, fake, pool_of) -> None:
    bad, good = fake(), fake()
    bad.script = [step] * 99
    pool = pool_of(bad, good, at_once=2)
    complete(pool.map(requests(8)), 8)
    assert (pool.states[bad.url] == "away") == (len(bad.asked()) >= FAILURES), "so many times in a row"
    assert pool.retries == len(bad.asked()) >= 2
    assert len(good.asked()) == 8


def test_one_that_was_away_is_asked_again(fake, pool_of) -> None:
    server = fake()
    pool = pool_of(server)
    server.script = [status(500)] * 3
    (failure,) = pool.map(requests(1))
    assert failure.reason.startswith("no worker is left")
    assert "trouble" in failure.reason
    complete(pool.map(requests(2)), 2)


def test_one_that_is_slow(fake, pool_of) -> None:
    slow, good = fake(), fake()
    slow.script = [lambda body: slow.end.wait(30) and None] * 9
    pool = pool_of(slow, good, patience=replace(QUICK, request=0.1), at_once=1)
    complete(pool.map(requests(4)), 4)
    assert pool.retries >= 1


def test_the_deadline_ends_everything(fake, pool_of) -> None:
    slow = fake()
    slow.script = [lambda body: slow.end.wait(30) and None] * 9
    found = pool_of(slow, patience=replace(QUICK, deadline=0.1), at_once=1).map(requests(2))
    assert [one.reason for one in found] == ["no answer within the deadline of 0.1 s"] * 2
    assert [one.attempts for one in found] == [1, 0]


def test_tries_come_to_an_end(fake, pool_of) -> None:
    server = fake()
    server.script = [status(500), status(500)]
    (failure,) = pool_of(server, patience=replace(QUICK, tries=2)).map(requests(1))
    assert failure == Failure(f"{server.url}: answered 500: trouble", 2, server.url)


def test_a_prompt_that_is_too_long_costs_itself_only(fake, pool_of) -> None:
    server = fake()
    found = pool_of(server).map([Request(tuple(range(61)), 4), Request(tuple(range(60)), 4, seed=1)])
    assert "61 tokens and an answer of up to 4 are more than the 64" in found[0].reason
    assert found[0].attempts == 1
    assert found[1][0].ids == (60, 1)
    assert len(server.asked()) == 1


def test_what_the_server_refuses_is_not_tried_again(fake, pool_of) -> None:
    one, other = fake(), fake()
    for server in (one, other):
        server.script = [status(400, "This model's maximum context length is 64 tokens.")]
    pool = pool_of(one, other)
    (failure,) = pool.map(requests(1))
    assert "answered 400: This model's maximum context length is 64 tokens." in failure.reason
    assert (failure.attempts, pool.retries) == (1, 0)


def test_an_error_of_our_own_costs_one_try(fake, pool_of, monkeypatch) -> None:
    one, other = fake(), fake()
    pool = pool_of(one, other)
    monkeypatch.setattr(pool.workers[one.url], "answer", lambda requests, seconds: 1 / 0)
    complete(pool.map(requests(4)), 4)


def test_another_network_than_meant(fake) -> None:
    server = fake()
    with pytest.raises(WorkerError, match=r"serves 'policy', not 'polizy'. Did you mean 'policy'\?"):
        Server(server.url, "polizy").open().label()


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("/weight_info", 404, "VLLM_SERVER_DEV_MODE=1"),
        ("/weight_info", 200, "is this vLLM's server"),
        ("/v1/models", 200, "is this vLLM's server"),
    ],
)
def test_a_server_that_lacks_a_route_is_told_how_to_be_started(path, code, message, fake) -> None:
    server = fake()
    server.failing[path] = (code, "<html>")
    with pytest.raises(WorkerError, match=message):
        Server(server.url).open().label()


def test_an_answer_of_another_shape(fake) -> None:
    server = fake()
    server.failing = {"/weight_info": (200, []), "/inference/v1/generate": (200, [])}
    worker = Server(server.url).open()
    with pytest.raises(WorkerError, match="no 'weight_version': is this vLLM's server"):
        worker.label()
    (fault,) = worker.answer(requests(1), 10)
    assert "cannot be read" in fault.reason
    assert fault.again


def test_scale_out_that_is_off_says_what_to_do(fake, pool_of) -> None:
    server = fake()
    pool = pool_of(server)
    server.failing["/inference/v1/generate"] = (403, "off")
    (failure,) = pool.map(requests(1))
    assert "--enable-scale-out" in failure.reason


def test_the_token_is_sent_and_stays_secret(fake, monkeypatch) -> None:
    server = fake()
    server.script = [status(400, "you sent s3cret")]
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    worker = Server(server.url, key_env="MY_TOKEN").open()
    (fault,) = worker.answer(requests(1), 10)
    assert server.headers[-1]["authorization"] == "Bearer s3cret"
    assert fault == Fault(f"{server.url}: answered 400: you sent ***", again=False)


@pytest.mark.parametrize("held", ["", "two words"])
def test_a_token_that_is_not_there(held: str, monkeypatch) -> None:
    monkeypatch.setenv("MY_TOKEN", held)
    with pytest.raises(WorkerError, match=r"MY_TOKEN holds no token\. Run: export MY_TOKEN"):
        Server("http://127.0.0.1:1", key_env="MY_TOKEN").open()


@pytest.mark.parametrize("options", [{"url": "127.0.0.1"}, {"url": "http://a", "route": "chat"}])
def test_a_server_that_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"address|route"):
        Server(**options)


@pytest.mark.parametrize("options", [{"tries": 0}, {"least": 0}, {"pause": -1}, {"request": 0}, {"deadline": 0}])
def test_a_patience_that_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Patience(**options)


def test_a_pool_has_workers_with_names_of_their_own(fake) -> None:
    worker: ServerWorker = Server(fake().url).open()
    for workers in ([], [worker, worker]):
        with pytest.raises(ValueError, match="names of their own"):
            Pool(workers)
