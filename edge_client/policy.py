"""What this device agrees to, whatever a signed plan says: the device's own gate.

The policy belongs to the device's owner. A plan that breaks it is refused before the device shows any key,
with the figure of the plan and the rule of the device in the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edge_client.ledger import DAY, History
from protocol.dp.events import DPEvent, Mechanism
from protocol.dp.parameters import PrivacyMode
from protocol.fields import MAX_COHORT, Sha256
from protocol.plan import Plan, TrainTask
from protocol.secagg.parameters import GRINDING_BITS


class InvalidPolicy(ValueError):
    """A policy file that is no policy."""


class DevicePolicy(BaseModel):
    """The rules of one device. Every field has a default; a policy file names only what differs."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    minimum_cohort: Annotated[int, Field(ge=2, le=MAX_COHORT)] = 5
    """Smallest roster this device shares keys with."""
    minimum_survivors: Annotated[int, Field(ge=2, le=MAX_COHORT)] = 4
    """Fewest updates that this device's own may be summed with, itself counted."""
    minimum_corrupt_fraction: Annotated[float, Field(ge=0, lt=1 / 3)] = 0.05
    """Least share of the cohort that a plan must assume to collude with the aggregator. It matters only where
    the cohort outgrows the complete graph, whose threshold is fixed."""
    minimum_colluders: Annotated[int, Field(ge=0, le=MAX_COHORT)] = 0
    """Fewest survivors that a plan of mode `distributed` must assume to tell the aggregator their noise.
    With 0 its epsilon holds only while all others keep theirs."""
    allow_semi_honest: bool = False
    """Whether such a plan may assume that the aggregator follows the protocol."""
    minimum_grinding_bits: Annotated[int, Field(ge=0, le=128)] = GRINDING_BITS
    """Against how many tries (as a power of two) to choose such a plan's graph it must be safe."""
    privacy_modes: Annotated[frozenset[PrivacyMode], Field(min_length=1)] = frozenset(
        {PrivacyMode.CENTRAL, PrivacyMode.DISTRIBUTED, PrivacyMode.LOCAL}
    )
    """Modes it takes part in; `none` only if it is listed here."""
    allowed_signers: frozenset[Sha256] | None = None
    """Key ids of those whose plans it follows; every plan signer of its enrolment when absent."""
    maximum_local_epochs: Annotated[int, Field(ge=1)] = 20
    """Passes over its examples that a plan may ask for in one round."""
    maximum_rounds_per_day: Annotated[int, Field(ge=1)] = 500
    """Contributions in any 24 hours."""
    maximum_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 30.0
    """What all contributions of one period may cost together, at `delta`. The default stops noise that is
    noise in name only; an owner who relies on it sets less. None is no limit. Contributions without noise
    have no epsilon: `privacy_modes` decides about them."""
    maximum_example_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 8.0
    """What all contributions of one period may cost one example of this device, at `delta`, for another round
    in mode `example`. That mode hides examples and not the device: `privacy_modes` has to list it."""
    epsilon_period_days: Annotated[int, Field(ge=1, le=3650)] = 30
    """How far back the limits of epsilon count."""
    delta: Annotated[float, Field(gt=0, lt=0.1, allow_inf_nan=False)] = 1e-5
    """The delta of `maximum_epsilon`; the plan's own has no say in it."""
    maximum_clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest L2 norm that a plan may clip updates to. None is no limit."""
    maximum_plan_seconds: Annotated[int, Field(ge=1)] = 7 * DAY
    """Longest life of a plan: a device is bound to one round at a time."""
    clock_skew_seconds: Annotated[int, Field(ge=0, le=DAY)] = 300
    """How far in the future a plan may seem to be issued: a Pi without a clock chip drifts."""
    personal_epochs: Annotated[int, Field(ge=0, le=1000)] = 0
    """Epochs of fine-tuning every new version on this device's own data while no round runs; 0 for never. It
    is what `covey-edge personalise` does, and nothing of it is sent."""
    personal_learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Step of that fine-tuning."""

    @field_validator("privacy_modes", "allowed_signers", mode="before")
    @classmethod
    def _from_list(cls, value: object) -> object:
        # JSON has no sets, and a strict set takes no list.
        return frozenset(value) if isinstance(value, list) else value

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parses a policy file.

        Raises:
            InvalidPolicy: not JSON, an unknown field or a value out of range.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidPolicy(f"{where or 'policy'}: {first['msg']}") from error

    def to_bytes(self) -> bytes:
        """The policy as a file that its owner can edit."""
        return self.model_dump_json(indent=2).encode() + b"\n"


@dataclass(frozen=True)
class PolicyRefusal:
    """Why a plan is refused: a stable word, and a sentence with the figure and the rule."""

    code: str
    detail: str


@dataclass(frozen=True)
class Proposal:
    """A plan with what its signature says.

    Attributes:
        plan: as signed.
        signer: key id of the plan's signer, whose signature has been verified.
    """

    plan: Plan
    signer: str


def check(
    policy: DevicePolicy, fleet: str, proposal: Proposal, history: History, now: int
) -> PolicyRefusal | None:
    """Holds a plan against the device's rules.

    Args:
        policy: the device's.
        fleet: the fleet it is enrolled in.
        proposal: the plan and who signed it.
        history: what the device contributed so far.
        now: current time, seconds since 1970.

    Returns:
        The first broken rule, or None.
    """
    plan = proposal.plan
    return (
        _check_origin(policy, fleet, proposal)
        or _check_time(policy, plan, now)
        or _check_cohort(policy, plan)
        or _check_privacy(policy, plan)
        or _check_tree(plan, history)
        or _check_effort(policy, plan, history, now)
    )


def check_epsilon(policy: DevicePolicy, planned: DPEvent, history: History, now: int) -> PolicyRefusal | None:
    """Refuses a round that would take this device beyond its own epsilon, whatever the aggregator reckons.

    A round in mode example is held against `maximum_example_epsilon`, every other against `maximum_epsilon`.

    Guarantee: if every contribution passes here first, those of any `epsilon_period_days` days that hide the
        device cost it at most `maximum_epsilon` at the policy's delta; and no round in mode example takes one
        of its examples beyond `maximum_example_epsilon`.
    Assumes: at least the plan's minimum of survivors add the noise that the plan asks of them, and at most
        its number of colluders reveal theirs; in central mode, that the aggregator adds it.

    Args:
        policy: the device's.
        planned: what the round costs at the fewest survivors that it accepts.
        history: what the device contributed so far.
        now: current time, seconds since 1970.
    """
    if planned.mechanism is Mechanism.NONE:
        return None
    if planned.unit == "example":
        spent, limit, rule = (
            history.spent_on_an_example,
            policy.maximum_example_epsilon,
            "maximum_example_epsilon",
        )
    else:
        spent, limit, rule = history.spent, policy.maximum_epsilon, "maximum_epsilon"
    period, delta, unit = policy.epsilon_period_days, policy.delta, planned.unit
    if limit is None or (projected := spent(now, period, delta, planned)).epsilon <= limit:
        return None
    return PolicyRefusal(
        "epsilon-exceeded",
        f"with this round epsilon of one {unit} would be {projected.epsilon:.4g} at delta {delta:g} over "
        f"{period} days, of which {spent(now, period, delta).epsilon:.4g} is spent; {rule} is {limit:g}",
    )


def _check_origin(policy: DevicePolicy, fleet: str, proposal: Proposal) -> PolicyRefusal | None:
    if proposal.plan.fleet != fleet:
        return PolicyRefusal(
            "wrong-fleet", f"the plan is for the fleet {proposal.plan.fleet}, this device is in {fleet}"
        )
    if policy.allowed_signers is not None and proposal.signer not in policy.allowed_signers:
        return PolicyRefusal(
            "signer-not-allowed",
            f"the plan is signed by {proposal.signer[:16]}, which allowed_signers does not list",
        )
    return None


def _check_time(policy: DevicePolicy, plan: Plan, now: int) -> PolicyRefusal | None:
    if plan.expires_at <= now:
        return PolicyRefusal(
            "plan-expired", f"the plan expired {now - plan.expires_at} s ago by this device's clock"
        )
    if plan.issued_at > now + policy.clock_skew_seconds:
        return PolicyRefusal(
            "plan-from-future",
            f"the plan is issued {plan.issued_at - now} s in the future by this device's clock, "
            f"clock_skew_seconds is {policy.clock_skew_seconds}: check the clock",
        )
    if plan.expires_at - plan.issued_at > policy.maximum_plan_seconds:
        return PolicyRefusal(
            "plan-too-long",
            f"the plan lives {plan.expires_at - plan.issued_at} s, "
            f"maximum_plan_seconds is {policy.maximum_plan_seconds}",
        )
    return None


def _check_cohort(policy: DevicePolicy, plan: Plan) -> PolicyRefusal | None:
    if plan.cohort.minimum < policy.minimum_cohort:
        return PolicyRefusal(
            "cohort-too-small",
            f"the plan runs with a cohort of {plan.cohort.minimum}, "
            f"minimum_cohort is {policy.minimum_cohort}",
        )
    if plan.cohort.minimum_survivors < policy.minimum_survivors:
        return PolicyRefusal(
            "too-few-survivors",
            f"the plan releases a sum of {plan.cohort.minimum_survivors} updates, "
            f"minimum_survivors is {policy.minimum_survivors}",
        )
    return _check_graph(policy, plan)


def _check_graph(policy: DevicePolicy, plan: Plan) -> PolicyRefusal | None:
    graph = plan.cohort.graph
    if plan.cohort.size <= graph.complete_up_to:
        return None
    if graph.corrupt_fraction < policy.minimum_corrupt_fraction:
        return PolicyRefusal(
            "graph-too-trusting",
            f"the plan assumes that {graph.corrupt_fraction:g} of the cohort collude, "
            f"minimum_corrupt_fraction is {policy.minimum_corrupt_fraction:g}",
        )
    if graph.adversary == "semi-honest" and not policy.allow_semi_honest:
        return PolicyRefusal(
            "graph-too-trusting", "the plan assumes a semi-honest aggregator, allow_semi_honest is false"
        )
    if graph.adversary == "malicious" and graph.grinding_bits < policy.minimum_grinding_bits:
        return PolicyRefusal(
            "graph-too-trusting",
            f"the plan's graph stands 2^{graph.grinding_bits} tries to choose it, "
            f"minimum_grinding_bits is {policy.minimum_grinding_bits}",
        )
    return None


def _check_privacy(policy: DevicePolicy, plan: Plan) -> PolicyRefusal | None:
    privacy = plan.privacy
    if privacy.mode not in policy.privacy_modes:
        allowed = ", ".join(sorted(policy.privacy_modes))
        return PolicyRefusal(
            "privacy-mode", f"the plan's privacy mode is {privacy.mode}, privacy_modes allows {allowed}"
        )
    if privacy.mode is PrivacyMode.DISTRIBUTED and privacy.colluders < policy.minimum_colluders:
        return PolicyRefusal(
            "noise-too-trusting",
            f"the plan's noise suffices if {privacy.colluders} survivors reveal theirs, "
            f"minimum_colluders is {policy.minimum_colluders}",
        )
    # A query's vector has no unit that an owner could set a bound in.
    limit = policy.maximum_clip_norm if isinstance(plan.task, TrainTask) else None
    if limit is not None and privacy.clip_norm > limit:
        return PolicyRefusal(
            "clip-norm",
            f"the plan's clip norm is {privacy.clip_norm:g}, maximum_clip_norm is {limit:g}",
        )
    return None


def _check_tree(plan: Plan, history: History) -> PolicyRefusal | None:
    """A noise tree counts a device once: a second contribution before its restart would cost more."""
    tree = plan.privacy.tree
    if tree is None or not history.contributed_to(tree.tree):
        return None
    return PolicyRefusal(
        "noise-tree",
        f"this device has contributed to the noise tree {tree.tree[:8]}, which restarts every "
        f"{tree.restart_every} rounds and counts a device once",
    )


def _check_effort(policy: DevicePolicy, plan: Plan, history: History, now: int) -> PolicyRefusal | None:
    if isinstance(plan.task, TrainTask) and plan.task.training.local_epochs > policy.maximum_local_epochs:
        return PolicyRefusal(
            "too-many-epochs",
            f"the plan trains {plan.task.training.local_epochs} epochs, "
            f"maximum_local_epochs is {policy.maximum_local_epochs}",
        )
    today = history.within_day(now)
    if today >= policy.maximum_rounds_per_day:
        return PolicyRefusal(
            "too-many-rounds",
            f"{today} contributions in the last 24 hours, "
            f"maximum_rounds_per_day is {policy.maximum_rounds_per_day}",
        )
    return None
