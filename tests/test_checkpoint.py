"""Checkpoints: whole or not there, whatever the disk or the machine does in between."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from zipfile import is_zipfile

import pytest
import torch
from torch import Tensor

from rlkit import checkpoint
from rlkit.errors import CheckpointError


class Killed(BaseException):
    """The process ends here: no `except Exception` sees it."""


def write(run: Path, at: int, keep: int = 5) -> Path:
    tensors = {"policy/current/w": torch.full((3, 2), float(at)), "rng": torch.arange(at, dtype=torch.uint8)}
    return checkpoint.save(run, at, tensors, {"done": at, "state": {"note": "é"}}, keep)


def there(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / checkpoint.FOLDER).iterdir())


def newest_at(run: Path) -> int | None:
    found = checkpoint.newest(run)
    return found.at if found else None


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def failing(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise error

    return fail


# ---- round trip ------------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors: dict[str, Tensor] = {
        "plain": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "half": torch.randn(5).bfloat16(),
        "ids": torch.tensor([2**62, -1]),
        "transposed": shared.T,
        "part": shared[1],  # memory of another tensor
        "scalar": torch.tensor(3.0, requires_grad=True),
        "empty": torch.zeros(0, 4),
    }
    folder = checkpoint.save(tmp_path, 7, tensors, {"done": 7, "nested": {"a": [1, None, "é"]}}, keep=1)
    assert folder == tmp_path / "checkpoints" / "000007"
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.at, found.folder) == (7, folder)
    assert found.numbers == {"done": 7, "nested": {"a": [1, None, "é"]}}
    assert found.tensors.keys() == tensors.keys()
    for name, value in found.tensors.items():
        assert (value.dtype, value.shape) == (tensors[name].dtype, tensors[name].shape)
        assert bits(value) == bits(tensors[name])


def test_files_are_safetensors_and_json_only(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "numbers.json", "tensors.safetensors"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["at"] == 1
    assert set(manifest["sha256"]) == {"numbers.json", "tensors.safetensors"}
    assert not any(is_zipfile(file) for file in folder.iterdir()), "torch.save would make a zip of pickles"


def test_the_newest_n_are_kept(tmp_path: Path) -> None:
    for at in (1, 2, 9, 10, 1_000_000):
        write(tmp_path, at, keep=2)
    assert there(tmp_path) == ["000010", "1000000"]
    assert newest_at(tmp_path) == 1_000_000


def test_a_checkpoint_of_the_same_step_replaces_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 3)
    checkpoint.save(tmp_path, 3, {"w": torch.zeros(1)}, {"done": "again"}, keep=2)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.numbers == {"done": "again"}
    assert there(tmp_path) == ["000003"]


def test_where_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None


# ---- the process is killed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["os.rename", "os.fsync", "json.dumps"])
def test_a_crash_before_the_rename_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write(tmp_path, 1, keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(moment, failing(Killed()))
        with pytest.raises(Killed):
            write(tmp_path, 2, keep=1)
    assert "000002" not in there(tmp_path)
    assert [name for name in there(tmp_path) if name.startswith(".")], "what a killed process leaves"
    assert newest_at(tmp_path) == 1
    write(tmp_path, 3, keep=1)
    assert there(tmp_path) == ["000003"], "and the next checkpoint clears away"


def test_the_rename_comes_after_everything_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename, opened = os.fsync, os.rename, os.open

    def note_open(path: str | Path, flags: int) -> int:
        handle = opened(path, flags)
        names[handle] = Path(path).name
        return handle

    names: dict[int, str] = {}
    monkeypatch.setattr("rlkit.checkpoint.os.open", note_open)
    monkeypatch.setattr("rlkit.checkpoint.os.fsync", lambda handle: (done.append(names[handle]), fsync(handle)))
    monkeypatch.setattr("rlkit.checkpoint.os.rename", lambda a, b: (done.append("renamed"), rename(a, b)))
    write(tmp_path, 1)
    draft = f".000001-{os.getpid()}"
    assert set(done[: done.index("renamed")]) == {"manifest.json", "numbers.json", "tensors.safetensors", draft}
    assert done[done.index("renamed") + 1 :] == ["checkpoints"]


# ---- the disk --------------------------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def change_a_byte(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def change_a_number(folder: Path) -> None:
    (folder / "numbers.json").write_text((folder / "numbers.json").read_text().replace("2", "3"))


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def garble(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "tensors.safetensors has changed"),
        (change_a_byte, "tensors.safetensors has changed"),
        (change_a_number, "numbers.json has changed"),
        (lose("manifest.json"), "FileNotFoundError"),
        (lose("numbers.json"), "FileNotFoundError"),
        (lose("tensors.safetensors"), "FileNotFoundError"),
        (garble(""), "JSONDecodeError"),
        (garble("\0\0\0"), "JSONDecodeError"),
        (garble("[1]"), "TypeError"),
        (garble('{"at": 2, "sha256": {}}'), "KeyError"),
        (garble('{"at": 2}'), "KeyError"),
        (garble('{"sha256": null}'), "TypeError"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], told: str
) -> None:
    write(tmp_path, 1)
    damage(write(tmp_path, 2))
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.at == 1
    assert found.tensors["policy/current/w"].unique().tolist() == [1.0]
    assert "000002 is damaged" in caplog.text
    assert told in caplog.text
    damage(tmp_path / "checkpoints" / "000001") if damage is not change_a_number else cut(found.folder)
    assert checkpoint.newest(tmp_path) is None


def no_space_in_save_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    monkeypatch.setattr("safetensors.torch.save_file", failing(SafetensorError(text)))


def no_space_in(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return lambda monkeypatch: monkeypatch.setattr(name, failing(error))


FULL_DISKS = [no_space_in_save_file, no_space_in("safetensors.torch.save_file"), no_space_in("os.fsync")]


@pytest.mark.parametrize("fill", [*FULL_DISKS, no_space_in("pathlib.Path.mkdir")])
def test_a_full_disk_says_what_is_whole_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    write(tmp_path, 20, keep=1)
    before = {file: file.read_bytes() for file in (tmp_path / "checkpoints" / "000020").iterdir()}
    with monkeypatch.context() as full:
        fill(full)
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path, 40, keep=1)
    assert caught.value.where == str(tmp_path / "checkpoints")
    assert caught.value.what == "could not write checkpoint 000040: No space left on device"
    assert caught.value.hint == f"Checkpoint 000020 is whole. Make room, then: rlkit train --resume {tmp_path}"
    assert there(tmp_path) == ["000020"], "no draft takes up room"
    assert {file: file.read_bytes() for file in before} == before
    assert newest_at(tmp_path) == 20
    write(tmp_path, 40, keep=1)
    assert newest_at(tmp_path) == 40


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_space_in_save_file(monkeypatch)
    with pytest.raises(CheckpointError, match="There is no earlier checkpoint"):
        write(tmp_path, 20)
    assert there(tmp_path) == []


def test_other_faults_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, {}, {"unknown": object()}, keep=1)
    assert there(tmp_path) == []
