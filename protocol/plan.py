"""The plan: what one round asks of its cohort, signed by the operator's key.

A device does nothing for a round but what its plan says, and every signature of the round covers the plan's
hash: an aggregator that shows two devices different plans gets no unmasking.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from protocol.dp.parameters import PrivacyParameters
from protocol.errors import MalformedMessage
from protocol.fields import MAX_COHORT, PROTOCOL_VERSION, RoundId, Schema, Sha256, Slug, UnixTime
from protocol.secagg.parameters import GraphAssumptions

PLAN_KIND = "plan"
MODEL_KIND = "model-manifest"

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class TrainingParameters(Schema):
    """Local training of one round."""

    local_epochs: Annotated[int, Field(ge=1, le=1000)]
    learning_rate: Annotated[float, Field(gt=0, le=100)]
    proximal_mu: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of the FedProx term (Li et al. 2020, arXiv 1812.06127); 0 is FedAvg."""


class CohortParameters(Schema):
    """How many devices take part."""

    size: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    """Devices invited, at most. The ring is wide enough for this many."""
    minimum: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    """The roster has at least this many, or the round aborts before anything is shared."""
    minimum_survivors: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    """At least this many masked inputs are in the sum. The noise is sized for it."""

    graph: GraphAssumptions = GraphAssumptions()
    """What is assumed of the cohort; degree and threshold of the graph follow from it."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum_survivors <= self.minimum <= self.size:
            raise ValueError("a cohort needs minimum_survivors <= minimum <= size")
        return self


class Deadlines(Schema):
    """Seconds that each phase lasts at most, and how long an offline device is waited for."""

    advertise_keys: Seconds = 30.0
    share_keys: Seconds = 30.0
    masked_input: Seconds = 600.0
    consistency_check: Seconds = 30.0
    unmasking: Seconds = 60.0
    offline_grace: Annotated[float, Field(ge=0, le=86_400)] = 10.0
    """A phase ends early once every missing device has been offline for this long."""


class Plan(Schema):
    """One round: model, training, privacy, cohort and deadlines."""

    v: Literal[1] = PROTOCOL_VERSION
    fleet: Slug
    round_id: RoundId
    model: Slug
    base_version: Annotated[int, Field(ge=1, le=2**31)]
    manifest_sha256: Sha256
    """Digest of the signed manifest of the base version: same graph, same starting weights for all."""
    training: TrainingParameters
    privacy: PrivacyParameters
    cohort: CohortParameters
    deadlines: Deadlines = Deadlines()
    issued_at: UnixTime
    expires_at: UnixTime

    def to_bytes(self) -> bytes:
        """The JSON bytes that are signed and hashed."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Plan:
        """Parses the payload of a signed plan.

        Raises:
            MalformedMessage: it is not a plan of this protocol version.
        """
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise MalformedMessage(f"not a plan: {error.errors()[0]['msg']}") from error
