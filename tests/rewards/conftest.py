"""What tests of rewards share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit.types import Prompt, Samples


@pytest.fixture(scope="session")
def samples_of() -> Callable[..., Samples]:
    """samples_of(media [N, 3, H, W], texts or prompts, group=None): finished samples, all of one group unless said."""

    def make(
        media: Tensor,
        prompts: Sequence[str | Prompt],
        group: Sequence[int] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Samples:
        n = len(prompts)
        rows = torch.arange(n)
        own = metadata or [{}] * n
        made = tuple(
            one if isinstance(one, Prompt) else Prompt(i, one, metadata=own[i]) for i, one in enumerate(prompts)
        )
        groups = torch.zeros(n, dtype=torch.int64) if group is None else torch.tensor(group)
        return Samples(media, torch.zeros(n, 1, 1, 1), made, groups, rows, rows, version=0, total=n)

    return make
