"""How a round's vectors are encoded, from its signed plan: one rule for the devices and the aggregator."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from protocol.dp.events import DPEvent, event_for
from protocol.dp.example import example_event, example_mechanism
from protocol.dp.mechanism import EncodingParameters, derive_encoding
from protocol.dp.tree import rotation_seed
from protocol.plan import Plan, TrainTask

METRICS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "examples": "examples trained on",
        "loss_before": "mean loss on them under the base version",
        "loss_after": "mean loss on them after local training",
        "accuracy": "share of them that the local weights get right",
    }
)
"""What a plan's metric slots may ask for; a device refuses a plan that asks for anything else."""


def contribution_event(plan: Plan, encoding: EncodingParameters) -> DPEvent:
    """What one contribution to a round costs, at worst: the device, or in mode example one of its examples.

    Raises:
        InvalidParameters: the plan makes no round with a model of this size.
    """
    example, task = plan.privacy.example, plan.task
    if example is None or not isinstance(task, TrainTask):
        return event_for(encoding, plan.cohort.minimum_survivors)
    mechanism = example_mechanism(plan.privacy, encoding.dimension)
    return example_event(mechanism, example.steps(task.training.local_epochs))


def round_encoding(plan: Plan, plan_hash: bytes, dimension: int) -> EncodingParameters:
    """Derives a round's encoding.

    Args:
        plan: the verified plan.
        plan_hash: SHA-256 of its signed bytes; it seeds the rotation, so that nobody chooses the seed alone
            and no two rounds share one; with a noise tree, the tree's id does, for all of its rounds.
        dimension: elements of one device's vector: parameters of the model to train, or
            `QueryTask.dimension`.

    Raises:
        InvalidParameters: the plan makes no round with vectors of this size.
    """
    return derive_encoding(
        plan.privacy,
        dimension=dimension,
        minimum_survivors=plan.cohort.minimum_survivors,
        maximum_clients=plan.cohort.split.largest,
        rotation_seed=plan_hash if plan.privacy.tree is None else rotation_seed(plan.privacy.tree),
    )
