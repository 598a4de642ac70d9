"""The canary audit: trains a small model through the real encoding, and tries to tell who took part.

Of many canary devices, each sends the largest update that clipping allows, in a direction of its own; a fair
coin says of each whether its update is in every round or is replaced by zeros, which is the neighbouring
relation. Whoever sees the released means, or in local mode every single vector, then guesses the coins. If
the guesses are better than the claimed epsilon permits, the claim is wrong. An audit that cannot fail shows
nothing, so every one is repeated with the noise switched off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from aggregator.privacy.budget import Budget
from aggregator.privacy.lower_bound import lower_bound
from aggregator.privacy.solving import solve_noise_multiplier
from protocol import ring
from protocol.dp.accounting import spend
from protocol.dp.clipping import clip
from protocol.dp.errors import InvalidParameters
from protocol.dp.events import event_for
from protocol.dp.mechanism import EncodingParameters, decode, encode
from protocol.dp.parameters import NoiseDistribution, PrivacyMode, PrivacyParameters
from protocol.dp.scaling import derive_encoding
from protocol.secagg.prg import derive_key

CLASSES, FEATURES = 10, 64
DIMENSION = CLASSES * (FEATURES + 1)
"""Parameters of the audited model, a softmax regression; one canary fits into each direction."""

PARTICIPANTS = 20
"""Ordinary devices, which train on labelled clusters."""

GUESSED = (0.25, 1.0)
"""Fractions of the canaries that are guessed at, the surest first; both are fixed before the run, and the
confidence is split between them: few sure guesses tell more against noise, all of them without it."""


@dataclass(frozen=True)
class AuditSettings:
    """What is audited.

    Attributes:
        epsilon: the claim; the noise is solved for it.
        delta: of claim and bound.
        rounds: of training, the same canaries in each.
        canaries: how many.
        confidence: of the lower bound.
        seed: of data, directions, coins and noise.
    """

    epsilon: float = 2.0
    delta: float = 1e-5
    rounds: int = 3
    canaries: int = 500
    confidence: float = 0.95
    seed: int = 1


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        mode: whose noise.
        claimed: epsilon by the accountant, from the events.
        found: the lower bound with the noise.
        found_without_noise: the lower bound of the same run with the noise switched off.
        right: right guesses about all canaries, with the noise.
        accuracy: of the trained model on its participants' data; that it learns anything at all.
    """

    mode: PrivacyMode
    noise: NoiseDistribution
    claimed: float
    found: float
    found_without_noise: float
    right: int
    canaries: int
    accuracy: float

    @property
    def passed(self) -> bool:
        """Whether the claim stands, and would have fallen without the noise."""
        return self.found <= self.claimed < self.found_without_noise


def audit(
    mode: PrivacyMode, settings: AuditSettings, noise: NoiseDistribution = NoiseDistribution.SKELLAM
) -> AuditResult:
    """Audits one mode.

    Guarantee: with a right claim, `found` is above it with probability at most 1 - confidence.

    Raises:
        InvalidParameters: no such audit: no noise, no canaries or more than directions, no rounds.
    """
    if mode is PrivacyMode.NONE:
        raise InvalidParameters("without noise there is no claim to audit")
    check_settings(settings)
    clients = settings.canaries + PARTICIPANTS
    figures = {"dimension": DIMENSION, "minimum_survivors": clients, "maximum_clients": clients}
    privacy = solve_noise_multiplier(
        PrivacyParameters(
            mode=mode, clip_norm=1.0, noise_multiplier=1.0, delta=settings.delta, bits=28, noise=noise
        ),
        Budget(settings.epsilon, settings.delta),
        rounds=settings.rounds,
        **figures,
    )
    encoding = derive_encoding(privacy, rotation_seed=bytes(32), **figures)
    silent = replace(
        encoding,
        privacy=privacy.model_copy(update={"mode": PrivacyMode.NONE, "noise_multiplier": 0.0}),
        local_variance=0.0,
        central_variance=0.0,
    )
    claimed = spend({event_for(encoding, clients): settings.rounds}, settings.delta).epsilon
    local = mode is PrivacyMode.LOCAL
    found, right, accuracy = _run(encoding, settings, local=local)
    without, _, _ = _run(silent, settings, local=local)
    return AuditResult(mode, noise, claimed, found, without, right, settings.canaries, accuracy)


def _run(encoding: EncodingParameters, settings: AuditSettings, *, local: bool) -> tuple[float, int, float]:
    """Trains once; returns the lower bound, the right guesses and the model's accuracy."""
    rng = np.random.default_rng(settings.seed)
    directions = directions_of(settings, rng)
    present = rng.random(settings.canaries) < 0.5
    people = [examples_of(rng) for _ in range(PARTICIPANTS)]
    weights = np.zeros(DIMENSION, np.float32)
    scores = np.zeros(settings.canaries)
    zeros = np.zeros(DIMENSION, np.float32)
    for number in range(settings.rounds):
        learned = [clip(gradient_step(weights, *examples), encoding.privacy.clip_norm) for examples in people]
        canaries = (directions[index] if present[index] else zeros for index in range(settings.canaries))
        updates = [*canaries, *learned]
        key = derive_key(settings.seed.to_bytes(32, "big"), purpose="audit", context=bytes([number]))
        vectors = _encoded(updates, encoding, key)
        mean = _released(vectors, encoding, key)
        weights += mean
        if local:
            alone = (_released([vector], encoding, key, survivors=len(vectors)) for vector in vectors)
            own = [d @ one for d, one in zip(directions, alone, strict=False)]
            scores += np.array(own) * len(updates)
            continue
        # In the worst case that privacy is about, whoever guesses knows what everybody else has sent.
        scores += directions @ (mean * len(updates) - np.sum(learned, axis=0))
    # A canary that took part scores 1 in each round, another 0.
    bound, right = bound_of(scores - settings.rounds / 2, present, settings)
    accuracy = float(np.mean([accuracy_of(weights, *examples) for examples in people]))
    return bound, right, accuracy


def check_settings(settings: AuditSettings) -> None:
    """Refuses settings that make no audit.

    Raises:
        InvalidParameters: no canaries or more than directions, or no confidence.
    """
    if not 1 <= settings.canaries <= DIMENSION:
        raise InvalidParameters(f"an audit has 1 to {DIMENSION} canaries, got {settings.canaries}")
    if not 0 < settings.confidence < 1:
        raise InvalidParameters(f"a confidence lies in (0, 1), got {settings.confidence}")


def directions_of(settings: AuditSettings, rng: np.random.Generator) -> NDArray[np.float32]:
    """A direction for each canary, at right angles to all others: float32, (canaries, DIMENSION)."""
    found: NDArray[np.float32] = np.linalg.qr(rng.normal(size=(DIMENSION, settings.canaries)))[0].T.astype(
        np.float32
    )
    return found


def bound_of(
    surplus: NDArray[np.float64], present: NDArray[np.bool_], settings: AuditSettings
) -> tuple[float, int]:
    """The lower bound on epsilon, and how many guesses were right.

    Args:
        surplus: of each canary's score over what divides present from absent ones.
        present: what the coins said.
    """
    bound = 0.0
    order = np.argsort(-np.abs(surplus), kind="stable")
    correct = (surplus > 0) == present
    for fraction in GUESSED:
        guessed = order[: max(1, round(fraction * settings.canaries))]
        confidence = 1 - (1 - settings.confidence) / len(GUESSED)
        right = int(correct[guessed].sum())
        bound = max(bound, lower_bound(settings.canaries, len(guessed), right, settings.delta, confidence))
    return bound, int(correct.sum())


def _encoded(
    updates: list[NDArray[np.float32]], encoding: EncodingParameters, key: bytes
) -> list[ring.RingVector]:
    """What the devices send, but for the masks, which cancel in the sum."""
    fresh = (
        derive_key(key, purpose="audit/client", context=i.to_bytes(4, "big")) for i in range(len(updates))
    )
    return [encode(update, {}, encoding, one) for update, one in zip(updates, fresh, strict=True)]


def _released(
    vectors: list[ring.RingVector], encoding: EncodingParameters, key: bytes, survivors: int | None = None
) -> NDArray[np.float32]:
    """What the aggregator makes of their sum."""
    total = np.zeros(encoding.length, np.uint32)
    for vector in vectors:
        ring.add(total, vector, encoding.bits, out=total)
    central = encoding.privacy.mode is PrivacyMode.CENTRAL
    noise_key = derive_key(key, purpose="audit/release") if central else None
    return decode(total, survivors or len(vectors), encoding, noise_key=noise_key)[0]


def examples_of(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A device's examples: clusters around fixed centres, the same ones on every device."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    labels = rng.integers(0, CLASSES, 40)
    x = centres[labels] + rng.normal(size=(len(labels), FEATURES))
    return np.hstack([x, np.ones((len(labels), 1))]).astype(np.float32), labels


def gradient_step(
    weights: NDArray[np.float32], x: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.float32]:
    """One step of gradient descent, as an update."""
    logits = x @ weights.reshape(CLASSES, -1).T
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    odds[np.arange(len(labels)), labels] -= 1
    step: NDArray[np.float32] = (-(odds.T @ x) / len(labels)).ravel().astype(np.float32)
    return step


def accuracy_of(weights: NDArray[np.float32], x: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return float(np.mean((x @ weights.reshape(CLASSES, -1).T).argmax(axis=1) == labels))
