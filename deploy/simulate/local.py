"""The engine that is Covey itself: every simulated device trains, encodes and adds up as a real one does.

Pairwise masks cancel in the sum and self-masks are taken off, so that the sum without them is the same bits:
they are left out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from deploy.simulate.options import SimulationError
from deploy.simulate.task import RoundOutcome, Task, order_seed
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.masked_input import contribution_of
from edge_client.training import TrainingConfig, TrainingDiverged
from protocol import ring
from protocol.dp.adaptive import CLIP_VOTE, next_clip_norm
from protocol.dp.events import event_for
from protocol.dp.mechanism import EncodingParameters, decode, derive_encoding, encode
from protocol.dp.parameters import PrivacyMode, PrivacyParameters
from protocol.secagg.prg import derive_key


def run_local(task: Task) -> Generator[RoundOutcome, None, None]:
    """Yields every round.

    Raises:
        SimulationError: too few devices had an update, as when training diverges.
        PrivacyError: the plan makes no round with this model.
    """
    trainer = TfliteTrainer(task.manifest, task.model.graph)
    state = task.optimizer.init(task.model.weights)
    kept: dict[int, NDArray[np.float32]] = {}
    privacy = task.settings.privacy
    secret = hashlib.sha256(b"covey/v1/simulation" + str(task.seed).encode()).digest()
    for number in range(1, task.rounds + 1):
        began = time.perf_counter()
        key = derive_key(secret, purpose="simulation/round", context=number.to_bytes(4, "big"))
        encoding = _encoding(task, privacy, key)
        total, survivors = _sum(task, trainer, state.parameters, kept, number, encoding, key)
        central = privacy.mode is PrivacyMode.CENTRAL
        mean, metrics = decode(total, survivors, encoding, noise_key=key if central else None)
        state = task.optimizer.apply(state, mean)
        yield RoundOutcome(
            weights=state.parameters,
            event=event_for(encoding, survivors),
            refused=len(task.cohort(number)) - survivors,
            seconds=time.perf_counter() - began,
        )
        if privacy.adaptive is not None:
            clip_norm = next_clip_norm(privacy.clip_norm, metrics[CLIP_VOTE], privacy.adaptive)
            privacy = privacy.model_copy(update={"clip_norm": clip_norm})


def _encoding(task: Task, privacy: PrivacyParameters, key: bytes) -> EncodingParameters:
    return derive_encoding(
        privacy,
        dimension=task.manifest.parameter_count,
        minimum_survivors=task.settings.cohort.minimum_survivors,
        maximum_clients=task.settings.cohort.size,
        rotation_seed=hashlib.sha256(b"rotation" + key).digest(),
    )


def _sum(
    task: Task,
    trainer: TfliteTrainer,
    weights: NDArray[np.float32],
    kept: dict[int, NDArray[np.float32]],
    number: int,
    encoding: EncodingParameters,
    key: bytes,
) -> tuple[ring.RingVector, int]:
    """Trains the cohort; returns the sum of the encoded updates, and how many are in it.

    `kept` are the parameters that stay on a device, by the device's index; brought up to date.
    """
    training = task.training
    config = TrainingConfig(training.local_epochs, training.learning_rate, training.proximal_mu)
    total, survivors = np.zeros(encoding.length, np.uint32), 0
    for index in task.cohort(number):
        generator = np.random.default_rng(order_seed(task.seed, number, index))
        try:
            update = trainer.train(weights, task.devices[index], config, generator, kept.get(index))
        except TrainingDiverged:
            continue
        given = contribution_of(update)
        if update.local is not None:
            kept[index] = update.local
        wanted = {slot.name: given.metrics[slot.name] for slot in encoding.privacy.metric_slots}
        noise = derive_key(key, purpose="simulation/device", context=index.to_bytes(4, "big"))
        ring.add(total, encode(given.vector, wanted, encoding, noise), encoding.bits, out=total)
        survivors += 1
    if survivors < encoding.minimum_survivors:
        raise SimulationError(
            f"round {number}: only {survivors} of {len(task.cohort(number))} updates are finite, and "
            f"{encoding.minimum_survivors} are needed: lower the learning rate"
        )
    return total, survivors
