"""How vLLM is started and stopped; no vLLM is needed for that."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlkit.workers import serving
from rlkit.workers.serving import Engine, Served, flags, serve
from rlkit.workers.worker import WorkerError


def test_what_vllm_is_started_with() -> None:
    given = Engine(longest=9000, lora_rank=9, pictures=2, cpu=True).arguments()
    assert given["logprobs_mode"] == "processed_logprobs"
    assert given["generation_config"] == "vllm"
    assert given["enable_chunked_prefill"] is False, "a seeded request read in two pieces ends a CPU engine"
    assert given["max_num_batched_tokens"] == 9000
    assert (given["max_lora_rank"], given["max_loras"]) == (16, 2)
    assert "enable_chunked_prefill" not in Engine().arguments()
    words = flags({"enable_chunked_prefill": False, "enable_lora": True, "max_loras": 2, "limit": {"image": 1}})
    assert words == ["--no-enable-chunked-prefill", "--enable-lora", "--max-loras", "2", "--limit", '{"image": 1}']


@pytest.mark.parametrize(
    "options",
    [{"sequences": 0}, {"pictures": -1}, {"longest": 1}, {"lora_rank": 0}, {"lora_rank": 513}, {"gpu_share": 1.1}],
)
def test_an_engine_that_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(**options)


def test_a_folder_without_a_network(tmp_path) -> None:
    with pytest.raises(WorkerError, match=r"there is no config\.json"):
        serve(tmp_path, 0, Engine(), tmp_path / "log")


def test_without_its_entry_point_vllm_would_not_find_us(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(serving, "entry_points", lambda group: [])
    with pytest.raises(WorkerError, match=r"rlkit\.workers\.vllm_plugin:register is no entry point here\. Install"):
        serve(tmp_path, 0, Engine(), tmp_path / "log")


def started(code: str, log: Path) -> Served:
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=out, start_new_session=True)
    return Served("http://127.0.0.1:1", process, log)


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(tmp_path) -> None:
    with pytest.raises(WorkerError, match=r"vLLM ended with 3; its log ends with:\nno such network"):
        started("print('no such network', flush=True); raise SystemExit(3)", tmp_path / "log").wait(60)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_shared_memory_of_a_server_that_will_not_go_is_removed(tmp_path) -> None:
    place = Path("/dev/shm") / f"rlkit-test-{os.getpid()}"
    code = f"""if True:
        import mmap, signal, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        file = open({str(place)!r}, "w+b")
        file.truncate(4096)
        held = mmap.mmap(file.fileno(), 4096)
        print("held", flush=True)
        signal.pause()
    """
    served = started(code, tmp_path / "log")
    while not served.log.read_text():
        assert served.alive()
    assert place.exists()
    served.stop(0.1)
    assert not served.alive()
    assert not place.exists()
