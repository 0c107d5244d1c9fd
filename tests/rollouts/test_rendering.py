"""Pictures of programs: what the members of a group share, where a picture is black, and where there is none."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import conforms, tiny_llm

from rlkit import registry
from rlkit.data.prompts import PromptBatch
from rlkit.dist import Processes
from rlkit.episodes import Program
from rlkit.errors import RecipeError
from rlkit.language import LanguagePolicy
from rlkit.pictures import data_uri, png
from rlkit.rollouts._rendering import Generating, renderer, told
from rlkit.rollouts._token_samples import Written
from rlkit.rollouts.agent import Agent
from rlkit.rollouts.local import Local
from rlkit.scoring import Scoring, WeightedReward
from rlkit.types import Context, Plan, Prompt, Samples

CPU = torch.device("cpu")
OMNI = {"name": "tiny_omni"}  # it reads references of 32 x 32
SHOWN = conforms.picture("one", 32, 32)
ASKED = PromptBatch((Prompt(0, "draw the flag"), Prompt(1, "an emblem")), 3)
WORDS = ("a red circle", "a red circle", "two blue crosses")
PROGRAMS = {i: Prompt(i, WORDS[i % 3]) for i in range(6) if i != 4}  # the fifth sample has none


def context(step: int = 0) -> Context:
    return Context(0, "main", step, 0, {}, Processes().gather)


@pytest.fixture(scope="module")
def backbone(small_backbone: Path) -> dict[str, Any]:
    return {"name": "tiny", "path": str(small_backbone)}


def started(backbone: dict[str, Any], processes: Processes | None = None, **options: Any) -> Generating:
    made = renderer({"backbone": backbone, "steps": 3, **options}, "rollout.renderer")
    generating = made.start("fp32", processes or Processes())
    assert isinstance(generating, Generating)
    return generating


# ---- in this process -------------------------------------------------------------------------------------------------


def test_members_of_a_group_are_drawn_from_the_same_noise(backbone: dict[str, Any]) -> None:
    media = started(backbone).draw(PROGRAMS, ASKED, context())
    assert media.shape == (6, 3, 32, 32)
    assert torch.equal(media[0], media[1]), "the same program"
    assert not torch.equal(media[0], media[2])
    assert not torch.equal(media[0], media[3]), "the same program in another group"
    assert not media[4].any(), "nothing was asked for"
    assert media[5].any()
    assert not torch.equal(media, started(backbone).draw(PROGRAMS, ASKED, context(1)))


def test_pictures_are_those_of_the_rollout_local(backbone: dict[str, Any]) -> None:
    generating = started(backbone)
    media = generating.draw(PROGRAMS, ASKED, context())
    each = {i: PROGRAMS.get(i, PROGRAMS[0]) for i in range(6)}
    oracle = Local(steps=3).start(generating.policy, Processes())
    plain = oracle.collect(replace(ASKED, each=each), Plan(shared_noise=True), context()).media
    there = torch.tensor([0, 1, 2, 3, 5])
    torch.testing.assert_close(media[there], plain[there], rtol=0, atol=1 / 255)


def test_the_processes_do_not_show_in_the_pictures(backbone: dict[str, Any]) -> None:
    whole = started(backbone).draw(PROGRAMS, ASKED, context())
    shares = [started(backbone, Processes(rank, 4)).draw(PROGRAMS, ASKED, context()) for rank in range(4)]
    assert [len(one) for one in shares] == [2, 1, 2, 1]
    torch.testing.assert_close(torch.cat(shares), whole, rtol=0, atol=1 / 255)
    nothing = started(backbone, Processes(6, 7)).draw({}, ASKED, context())
    assert nothing.shape == (0, 3, 32, 32)


def test_no_program_in_a_group_is_no_trouble(backbone: dict[str, Any]) -> None:
    media = started(backbone).draw({}, ASKED, context())
    assert media.shape == (6, 3, 32, 32)
    assert not media.any()


def test_references_go_to_generators_that_read_them() -> None:
    generating = started(OMNI)
    plain = Prompt(0, WORDS[0])
    shown = replace(plain, references=(SHOWN,))
    assert "in_context" in generating.policy.model.tasks
    media = generating.draw({0: plain, 1: shown}, ASKED, context())
    assert not torch.equal(media[0], media[1])
    generating.policy.model = replace(generating.policy.model, tasks=("t2i",))
    media = generating.draw({0: plain, 1: shown}, ASKED, context())
    assert torch.equal(media[0], media[1])


def test_a_program_that_the_generator_refuses_is_black_and_costs_no_other() -> None:
    large = replace(PROGRAMS[1], references=(conforms.picture("large", 60, 60),))
    media = started(OMNI).draw(PROGRAMS | {1: large}, ASKED, context())
    assert not media[1].any()
    usual = started(OMNI).draw(PROGRAMS, ASKED, context())
    torch.testing.assert_close(media[[0, 2, 3, 5]], usual[[0, 2, 3, 5]], rtol=0, atol=1 / 255)


def test_nothing_trains_it(backbone: dict[str, Any]) -> None:
    generating = started(backbone)
    assert not generating.policy.trainable
    assert not any(one.requires_grad for one in generating.policy.net.parameters())
    assert not generating.draw(PROGRAMS, ASKED, context()).requires_grad
    generating.draw({0: Prompt(0, "another")}, ASKED, context(1))
    assert len(generating.policy.conditions._known) == 2, "programs of the step before are let go of"


def test_a_program_says_nothing_of_its_request_but_the_size() -> None:
    asked = Prompt(3, "draw the flag", metadata={"caption": "x"}, source=SHOWN, system="Be.", size=(64, 32))
    program = Program("a red circle", ("IMG_2", "IMG_1", "IMG_2"))
    prompt = told(asked, program, {"IMG_1": SHOWN, "IMG_2": 1 - SHOWN})
    assert (prompt.id, prompt.text, prompt.size, prompt.system, prompt.source) == (
        3,
        "a red circle",
        (64, 32),
        "",
        None,
    )
    assert [torch.equal(*pair) for pair in zip(prompt.references, (1 - SHOWN, SHOWN), strict=True)] == [True, True]
    assert not prompt.metadata


class Answers:
    """A writer of one answer for each sample; "" is none that can be read."""

    def __init__(self, policy: LanguagePolicy, texts: tuple[str, ...]) -> None:
        self.policy, self.texts = policy, texts

    def write(self, prompts: Any, places: Any, plan: Plan, context: Context) -> list[Written]:
        assert self.policy.model.spell is not None
        spelled = []
        for i, _ in places:
            said = json.dumps({"gen_prompt": self.texts[i], "reference_images": []})
            spelled.append(self.policy.model.spell(f"<answer>{said}</answer>"))
        return [Written(ids, [0.0] * len(ids), True) for ids in spelled]


def test_an_agent_with_a_renderer_shows_what_it_asked_for(
    backbone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_llm.save(tmp_path_factory.mktemp("agent"), "qwen3")
    policy = LanguagePolicy(tiny_llm.loaded(folder, 2048), None, CPU, "fp32", 0)
    agent = Agent(instructions="", turns=1, renderer={"backbone": backbone, "steps": 3})
    assert agent.makes == ("text", "image", "episode")
    assert Agent().makes == ("text", "episode")
    rollout = agent.start(policy, Processes())
    rollout.writer = Answers(policy, (*WORDS, WORDS[0], "", WORDS[2]))
    samples = rollout.collect(ASKED, Plan(), context())
    assert samples.texts == (*WORDS, WORDS[0], "", WORDS[2])
    assert torch.equal(samples.media, started(backbone).draw(PROGRAMS, ASKED, context()))
    rollout.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "draws with a backbone or at a url"),
        ({"backbone": {"name": "tiny"}, "url": "http://a"}, "draws with a backbone or at a url"),
        ({"backbone": {"name": "tiny"}, "steps": 0}, "steps must be 1 or more"),
        ({"backbone": {"name": "tiny"}, "guidance": -1.0}, "guidance must be a number, 0 or more"),
        ({"backbone": {"name": "tiny"}, "stesp": 3}, "Did you mean 'steps'"),
        ({"backbone": {"name": "qwen"}}, "'qwen' draws no pictures"),
        ({"url": "http://a"}, "needs 'size'"),
        ({"url": "http://a/v1", "size": [8, 8]}, "without /v1"),
        ({"url": "a", "size": [8, 8]}, "is no address"),
        ({"url": "http://a", "size": [0, 8]}, r"size is \[height, width\]"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        renderer(options, "rollout.renderer")


# ---- at an endpoint --------------------------------------------------------------------------------------------------


class Stub:
    """A server on this machine that answers each program by its text: (status, body)."""

    def __init__(self, said: dict[str, tuple[int, bytes]]) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []  # path, authorisation, body
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stub.asked.append((self.path, self.headers.get("authorization", ""), body))
                status, answer = said[body["prompt"]]
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def picture(height: int, width: int, value: float) -> tuple[int, bytes]:
    drawn = base64.b64encode(png(torch.full((3, height, width), value))).decode()
    return 200, json.dumps({"data": [{"b64_json": drawn}]}).encode()


SAID = {
    "red": picture(8, 16, 1.0),
    "grey": picture(8, 16, 0.6),
    "turned": picture(16, 8, 1.0),
    "refused": (400, b"no"),
    "empty": (200, b'{"data": []}'),
    "no json": (200, b"<html>"),
    "no picture": (200, b'{"data": [{"b64_json": "bm90aGluZw=="}]}'),
}


@pytest.fixture
def stub() -> Iterator[Stub]:
    made = Stub(SAID)
    yield made
    made.server.shutdown()
    made.server.server_close()


def drawn(stub: Stub, programs: dict[int, Prompt], processes: Processes | None = None, **options: Any) -> torch.Tensor:
    asking = renderer({"url": stub.url, "size": [8, 16], "tries": 1, **options}, "rollout.renderer").start(
        "fp32", processes or Processes()
    )
    media = asking.draw(programs, ASKED, context())
    asking.close()
    return media


def test_an_endpoint_is_asked_as_openais_is(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    programs = {0: Prompt(0, "red"), 2: Prompt(0, "grey", references=(SHOWN,)), 3: Prompt(1, "red")}
    media = drawn(stub, programs, key_env="A_KEY", model="painter")
    assert media.shape == (6, 3, 8, 16)
    means = media.mean((1, 2, 3)).tolist()
    assert means == pytest.approx([1.0, 0.0, 0.6, 1.0, 0.0, 0.0])
    assert [path for path, _, _ in stub.asked] == ["/v1/images/generations"] * 3, "what has no program is not asked"
    assert {token for _, token, _ in stub.asked} == {"Bearer secret"}
    bodies = sorted((body for _, _, body in stub.asked), key=lambda body: (body["prompt"], body["seed"]))
    grey, *red = bodies
    assert grey["image"] == [data_uri(SHOWN)]
    assert all("image" not in one for one in red)
    assert len({one["seed"] for one in red}) == 2, "a seed for each group"
    assert grey["seed"] in {one["seed"] for one in red}, "and one for all members of it"
    for one in bodies:
        assert (one["size"], one["n"], one["model"], one["response_format"]) == ("16x8", 1, "painter", "b64_json")


def test_a_share_is_asked_for_its_own(stub: Stub) -> None:
    programs = {i: Prompt(i, "grey" if i < 3 else "red") for i in range(6)}
    shares = [drawn(stub, programs, Processes(rank, 2)) for rank in range(2)]
    assert [one.mean().item() for one in shares] == pytest.approx([0.6, 1.0])
    assert len(stub.asked) == 6


@pytest.mark.parametrize("trouble", ["turned", "refused", "empty", "no json", "no picture"])
def test_what_is_not_drawn_is_not_scored_and_never_0(stub: Stub, trouble: str) -> None:
    """A black picture would be scored as the policy's doing."""
    media = drawn(stub, {0: Prompt(0, "grey"), 1: Prompt(0, trouble)})
    assert media[1].isnan().all()
    assert media[0].mean() == pytest.approx(0.6)
    assert not media[2].any(), "no program: black"
    reward = WeightedReward("brightness", registry.build("rewards", "brightness", {}), 1.0)
    index = torch.arange(6)
    samples = Samples(media, torch.zeros(6, 0), ASKED.prompts * 3, index // 3, index, index, version=0, total=6)
    scores = Scoring([reward], max_unscored=0.2)(samples, Processes().gather)
    assert scores.scored.tolist() == [True, False, True, True, True, True]
