"""Lets a torchvision that was built for CUDA be imported beside a torch that was built without it.

Linux has torchvision on PyPI for CUDA only. Beside a CPU build of torch its compiled library does not load. Its Python
code takes that calmly, but for two operators: it registers fake kernels for them without asking whether they exist, so
that `import torchvision` fails, and with it every picture processor of transformers. Here the two are declared.

They get no kernel: whoever calls `torchvision.ops.nms` is told by torch that there is none for a CPU, and what needs no
compiled code, all of `torchvision.transforms`, works. torch calls `autoload` at the end of `import torch` in every
process (its entry-point group `torch.backends`), so vLLM's child processes have it too.
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off.
"""

from importlib.util import find_spec
from pathlib import Path

_declared = []  # torch forgets a library's operators when the library is collected


def autoload() -> None:
    import torch

    spec = find_spec("torchvision")
    if torch.version.cuda or torch.version.hip or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:  # the one for CUDA: the libraries that it needs are not there
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
