"""A lower bound on epsilon from right and wrong guesses about canaries, out of one run.

Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run", arXiv 2305.08846.
"""

from __future__ import annotations

import math

from scipy.stats import binom

_STEPS = 40


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bounds the probability that an (epsilon, delta)-DP mechanism lets so many guesses be right.

    beta + 2 m delta max_i (P(v > W >= v - i) / i), with W binomial of the guesses and e^epsilon /
    (1 + e^epsilon), and beta = P(W >= v) (Theorem 5.2 and appendix D of the paper).

    Args:
        canaries: m, each in or out by an independent fair coin.
        guesses: how many of them were guessed at; the others abstain.
        right: v, how many guesses were right.
    """
    accuracy = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, accuracy))
    below, alpha = 0.0, 0.0
    for index, mass in enumerate(binom.pmf(range(right - 1, -1, -1), guesses, accuracy), start=1):
        below += float(mass)
        alpha = max(alpha, below / index)
    return min(1.0, beta + 2 * canaries * delta * alpha)


def lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Returns the epsilon below which the guesses would be too good, with the stated confidence.

    Guarantee: if the mechanism is (epsilon, delta)-DP and `guesses` was fixed before the run, the result is
        above epsilon with probability at most 1 - confidence.
    """
    low, high = 0.0, 64.0
    if p_value(canaries, guesses, right, low, delta) >= 1 - confidence:
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        rejected = p_value(canaries, guesses, right, middle, delta) < 1 - confidence
        low, high = (middle, high) if rejected else (low, middle)
    return low
