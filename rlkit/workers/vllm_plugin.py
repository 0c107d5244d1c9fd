"""What runs inside vLLM: two ways for weights to come in, `rlkit_file` and `rlkit_gloo`, beside vLLM's own.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its processes. The two
engines are driven by vLLM's own verbs (start, update, finish), as its NCCL engine is, and work on a CPU too.

`finish` repairs what vLLM leaves on a CPU: the output layer keeps a packed copy of its weight for the matrix product,
and a tied one is not packed again when the stream names the shared weight once, as the embedding. The network would
embed with the new weights and speak with the old ones, without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from rlkit.workers import transfer

FILE, GLOO = "rlkit_file", "rlkit_gloo"


@cache  # vLLM calls it once a process; by hand it may come on top, and vLLM takes no name twice
def register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    base = _base()
    WeightTransferEngineFactory.register_engine(FILE, _file_engine(base))
    WeightTransferEngineFactory.register_engine(GLOO, _gloo_engine(base))


def pack_again(model: nn.Module) -> None:
    """Let every layer that keeps a packed copy of its weight pack it anew. Packing twice does no harm."""
    for layer in model.modules():
        method, weight = getattr(layer, "quant_method", None), getattr(layer, "weight", None)
        packed = getattr(layer, "cpu_linear", None)  # vLLM's name for the product with the packed copy
        if packed is not None and method is not None and weight is not None and weight.numel():
            method.process_weights_after_loading(layer)


def _base() -> type:
    """The frame of both engines. Its parent is vLLM's, which is not imported before vLLM asks for us."""
    import torch
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class Engine(WeightTransferEngine):
        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                pack_again(self.model)

    return Engine


@dataclass
class FileStart:
    """Nothing is needed to begin with."""


@dataclass
class FileUpdate:
    path: str  # a safetensors file that this machine can read


def _file_engine(base: Any) -> type:
    class FileEngine(base):
        init_info_cls, update_info_cls = FileStart, FileUpdate

        def init_transfer_engine(self, init_info: FileStart) -> None:
            return None

        def receive_weights(self, update_info: FileUpdate) -> None:
            path = Path(update_info.path)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; do learner and worker share this folder?")
            self.model.load_weights(transfer.read_weights(path))

        def shutdown(self) -> None:
            return None

    return FileEngine


@dataclass
class GlooStart:
    host: str
    port: int
    world_size: int  # the learner and all processes of this worker
    seconds: float  # the longest wait


@dataclass
class GlooUpdate:
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]


def _gloo_engine(base: Any) -> type:
    class GlooEngine(base):
        init_info_cls, update_info_cls = GlooStart, GlooUpdate
        line: transfer.Line | None = None

        def init_transfer_engine(self, init_info: GlooStart) -> None:
            here = self.parallel_config
            rank = 1 + here.data_parallel_index * here.world_size + here.rank  # the learner is 0
            self.line = transfer.dial(init_info.host, init_info.port, rank, init_info.world_size, init_info.seconds)

        def receive_weights(self, update_info: GlooUpdate) -> None:
            if self.line is None:
                raise RuntimeError("init_weight_transfer_engine comes before the first update")
            stream = transfer.read_description(update_info.names, update_info.dtypes, update_info.shapes)
            self.model.load_weights(self.line.receive(stream))

        def shutdown(self) -> None:
            self.line = None

    return GlooEngine


__all__ = ["FILE", "GLOO", "pack_again", "register"]
