"""Adaptive clipping: the clip norm follows a quantile of the update norms, by a vote in one more coordinate.

Andrew, Thakkar, McMahan, Ramaswamy 2021, arXiv 1905.03871, Algorithm 1. Every client votes whether its update
is within the clip norm; the mean of the votes is released with the round's noise, and the clip norm takes a
geometric step towards the quantile. The vote rides in the vector like a metric slot: it counts in the
sensitivity, so that it needs no accounting of its own. With share s of the clip norm, the noise of the update
is z sqrt(1 + s^2) C and that of the mean vote in {0, 1} is z sqrt(1 + s^2) / (2 s n), which is their Theorem
1 read from z: z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2).
"""

from __future__ import annotations

import math

from protocol.dp.parameters import CLIP_VOTE, AdaptiveClipping

__all__ = ["CLIP_VOTE", "MAX_CLIP_NORM", "MIN_CLIP_NORM", "next_clip_norm", "vote"]

MIN_CLIP_NORM, MAX_CLIP_NORM = 1e-6, 1e6
"""Where the clip norm stops, whatever is voted."""


def vote(norm: float, clip_norm: float) -> float:
    """A client's vote: 1 if its update is within the clip norm, else -1."""
    return 1.0 if norm <= clip_norm else -1.0


def next_clip_norm(clip_norm: float, mean_vote: float, adaptive: AdaptiveClipping) -> float:
    """Returns C exp(-eta (b - gamma)), with b the noisy fraction of clients whose update was within C.

    The noise may carry b out of [0, 1]; it is put back, so that one round moves C by at most e^eta. Six
    digits are kept: a plan stays readable, and noise hides the rest.

    Args:
        clip_norm: C of the round that voted.
        mean_vote: released mean of the votes in {-1, 1}.
        adaptive: gamma and eta.
    """
    fraction = min(1.0, max(0.0, (1 + mean_vote) / 2))
    moved = clip_norm * math.exp(-adaptive.learning_rate * (fraction - adaptive.quantile))
    return float(f"{min(MAX_CLIP_NORM, max(MIN_CLIP_NORM, moved)):.6g}")
