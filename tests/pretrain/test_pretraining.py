"""What the pretrainings share: the learning rate and the average."""

import pytest
import torch

from rlkit.pretrain.schedule import follow, rate


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [rate(seen, total=1000, batch=10, warmup=10, decay=0.5) for seen in (0, 40, 90, 500, 750, 1000)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])


def test_the_average_follows_by_what_its_decay_leaves() -> None:
    average, current = [torch.zeros(2)], [torch.ones(2)]
    follow(average, current, updates=2.0, longest=0.999)  # decay 3 / 12
    assert average[0].tolist() == pytest.approx([0.75, 0.75])
    follow(average, current, updates=1e9, longest=0.5)
    assert average[0].tolist() == pytest.approx([0.875, 0.875])
