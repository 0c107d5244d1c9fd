"""The ways of weights: buckets that both ends cut alike, a line between two ends, files that are whole or absent."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlkit.workers import transfer
from rlkit.workers.transfer import Piece
from rlkit.workers.vllm_plugin import pack_again

WEIGHTS = {
    "scalar": torch.tensor(3.0),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "half": torch.linspace(-1, 1, 7).to(torch.bfloat16),
    "none": torch.zeros(0, 4),
    "count": torch.tensor([1, -(2**40)]),
    "flags": torch.tensor([True, False, True]),
}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def test_buckets_hold_what_fits_at_aligned_places() -> None:
    stream = [
        Piece(name, torch.uint8, (size,)) for name, size in (("a", 5), ("b", 20), ("c", 28), ("d", 100), ("e", 1))
    ]
    found = [
        ([one.name for one in bucket.pieces], bucket.offsets, bucket.bytes) for bucket in transfer.buckets(stream, 64)
    ]
    assert found == [(["a", "b"], (0, 16), 36), (["c"], (0,), 28), (["d"], (0,), 100), (["e"], (0,), 1)]
    assert list(transfer.buckets([])) == []


@pytest.mark.parametrize("most", [1, 40, transfer.BUCKET])
def test_what_is_packed_is_unpacked(most: int) -> None:
    found = {}
    for bucket in transfer.buckets(transfer.pieces(WEIGHTS), most):
        row = transfer.pack(bucket, WEIGHTS, torch.empty(500, dtype=torch.uint8))
        assert row.numel() == bucket.bytes
        found |= dict(transfer.unpack(bucket, row))
    equal(found, WEIGHTS)


def test_the_description_is_json_and_says_all() -> None:
    told = json.loads(json.dumps(transfer.described(transfer.pieces(WEIGHTS))))
    assert transfer.read_description(**told) == transfer.pieces(WEIGHTS)


@pytest.mark.parametrize(
    ("dtypes", "message"), [(["float33"], "no dtype 'float33'"), (["nn"], "no dtype 'nn'"), ([], "1 names, 0 dtypes")]
)
def test_a_description_that_is_none(dtypes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transfer.read_description(["a"], dtypes, [[1]])


@pytest.mark.parametrize("most", [40, transfer.BUCKET])
def test_a_line_carries_the_stream_again_and_again(most: int) -> None:
    store = transfer.listen("127.0.0.1", 2, 30)
    with ThreadPoolExecutor(1) as thread:
        far = thread.submit(transfer.dial, "127.0.0.1", store.port, 1, 2, 30)
        near = transfer.Line(store, 0, 2, 30)
        for factor in (1, 2):
            weights = {name: one * factor for name, one in WEIGHTS.items()}
            found = thread.submit(lambda sent: dict(far.result().receive(transfer.pieces(sent), most)), weights)
            near.send(weights, most)
            equal(found.result(30), weights)


def test_nobody_waits_for_ever_for_an_end_that_never_comes() -> None:
    store = transfer.listen("127.0.0.1", 2, 0.2)
    with pytest.raises(RuntimeError):
        transfer.Line(store, 0, 2, 0.2)


def test_a_file_of_weights_tied_ones_included(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    weights = {**WEIGHTS, "tied": whole, "too": whole, "part": whole[2:4]}
    file = transfer.write_weights(tmp_path / "new", weights, 3)
    assert [one.name for one in file.parent.iterdir()] == ["weights-3.safetensors"]
    found = dict(transfer.read_weights(file))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], one) for name, one in weights.items())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        transfer.write_weights(tmp_path, WEIGHTS, 1)
    assert list(tmp_path.glob("weights-*")) == []


def test_an_adapter_is_a_folder_as_peft_writes_it_and_replaces_one_left_there(tmp_path: Path) -> None:
    transfer.write_adapter(tmp_path, {"old": torch.ones(1)}, 2, {"r": 4})
    place = transfer.write_adapter(tmp_path, {"new": torch.ones(2)}, 2, {"r": 8})
    assert json.loads((place / "adapter_config.json").read_text()) == {"r": 8}
    assert list(dict(transfer.read_weights(place / "adapter_model.safetensors"))) == ["new"]
    assert list(tmp_path.iterdir()) == [place]


def test_what_is_old_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [transfer.write_weights(tmp_path, WEIGHTS, 2), transfer.write_adapter(tmp_path, WEIGHTS, 2, {})]
    transfer.write_weights(tmp_path, WEIGHTS, 1)
    transfer.write_adapter(tmp_path, WEIGHTS, 1, {})
    (tmp_path / "mine").mkdir()
    transfer.forget(tmp_path, kept)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "mine"])


def test_layers_that_keep_a_packed_copy_pack_it_again() -> None:
    class Method:
        def __init__(self) -> None:
            self.packed: list[nn.Module] = []

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            self.packed.append(layer)

    model, method = nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), Method()
    for layer in model:
        layer.quant_method = method
    for layer in model[1:]:
        layer.cpu_linear = object()
    model[2].weight = nn.Parameter(torch.empty(0))  # freed by vLLM, which has the packed copy alone
    pack_again(model)
    assert method.packed == [model[1]]
