"""Bayesian search in numpy: a Gaussian process over the settings tried so far, and the expected improvement of others.

The kernel is Matern's with nu = 3/2, as in W&B's own search. Different from it: the process knows that a trial is noisy
(the noise is chosen with the length scale, by the marginal likelihood on a small grid), so that several seeds of one
setting are several measurements of one number; and what is improved on is the best mean, not the luckiest trial.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)  # of a unit cube
NOISES = (1e-4, 1e-2, 0.1, 0.5)  # variances, where the values have variance 1


def propose(points: Array, values: Array, pending: Array, candidates: Array) -> int:
    """The candidate to try next; more is better.

    points [N, D] and values [N]: finished trials; pending [P, D]: those under way, which count as if they brought what
    is expected of them; candidates [M, D]. With fewer than two finished trials it is the first candidate.
    """
    if len(points) < 2 or points.shape[1] == 0:
        return 0
    spread = float(values.std())
    scaled = (values - values.mean()) / (spread if spread > 0 else 1.0)
    length, noise = likeliest(points, scaled)
    if len(pending):
        expected, _ = posterior(points, scaled, pending, length, noise)
        points, scaled = np.concatenate([points, pending]), np.concatenate([scaled, expected])
    best = float(posterior(points, scaled, points, length, noise)[0].max())
    mean, deviation = posterior(points, scaled, candidates, length, noise)
    return int(np.argmax(improvement(mean, deviation, best)))


def likeliest(points: Array, values: Array) -> tuple[float, float]:
    """The length scale and the noise under which these values are likeliest."""
    choices = [(length, noise) for length in LENGTHS for noise in NOISES]
    return max(choices, key=lambda one: log_likelihood(points, values, *one))


def log_likelihood(points: Array, values: Array, length: float, noise: float) -> float:
    """Of a Gaussian process of mean 0 and variance 1, up to a constant."""
    lower = np.linalg.cholesky(kernel(points, points, length) + noise * np.eye(len(points)))
    weights = np.linalg.solve(lower, values)
    return float(-0.5 * weights @ weights - np.log(np.diag(lower)).sum())


def posterior(points: Array, values: Array, at: Array, length: float, noise: float) -> tuple[Array, Array]:
    """Mean and standard deviation [M] of the function itself, without a trial's noise."""
    across = kernel(at, points, length)  # [M, N]
    lower = np.linalg.cholesky(kernel(points, points, length) + noise * np.eye(len(points)))
    mean = across @ np.linalg.solve(lower.T, np.linalg.solve(lower, values))
    known = np.linalg.solve(lower, across.T)  # [N, M]
    return mean, np.sqrt(np.maximum(1 - (known**2).sum(0), 1e-12))


def kernel(a: Array, b: Array, length: float) -> Array:
    """Matern's with nu = 3/2: (1 + sqrt(3) r / l) exp(-sqrt(3) r / l)."""
    distance = np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(-1))
    scaled = math.sqrt(3) * distance / length
    return np.asarray((1 + scaled) * np.exp(-scaled))


def improvement(mean: Array, deviation: Array, best: float) -> Array:
    """E[max(f - best, 0)] of a normal f."""
    z = (mean - best) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-one / math.sqrt(2)) for one in z])
    return np.asarray(deviation * (z * below + density))
