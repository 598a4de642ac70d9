"""The check-in desk: what becomes of an invitation, before this device shows any key.

`consider` only judges. Whatever a plan asks for that this device, its policy or its models cannot give is
refused here, with the reason, because a device that leaves later costs the whole cohort a dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from pydantic import TypeAdapter, ValidationError

from edge_client import policy
from edge_client.active_round import ActiveRound
from edge_client.events import Fault
from edge_client.ledger import History
from edge_client.library import Library, Version
from edge_client.policy import Proposal
from edge_client.profile import Profile
from models.assignment import Answering, Assignment, Evaluating, Training
from models.manifest import ModelManifest
from protocol.dp.errors import PrivacyError
from protocol.errors import BadSignature, MalformedMessage
from protocol.fields import RoundId
from protocol.identity import SignedDocument, verify_certificate
from protocol.plan import ORDER_KIND, PLAN_KIND, EvaluateTask, Plan, QueryTask, TrainTask
from protocol.round_encoding import METRICS, contribution_event, round_encoding

MAX_DETAIL = 300
CHECK_INS_PER_CONTRIBUTION = 4
"""Check-ins a day for each contribution that the policy allows. Their ids are remembered for good, so rounds
that never come to a contribution would fill a device's memory and wear its card."""


@dataclass(frozen=True)
class Accepted:
    """Join this round; whatever round was active is over."""

    plan: Plan
    assignment: Assignment


@dataclass(frozen=True)
class Repeated:
    """It is the active round's own invitation again."""


@dataclass(frozen=True)
class Contradicted:
    """A second plan under the active round's id: somebody shows different plans to different devices."""


@dataclass(frozen=True)
class Waiting:
    """The version is not known yet; the aggregator asks again."""

    round_id: str
    model: str
    version: int


@dataclass(frozen=True)
class Refused:
    """Not this round.

    Attributes:
        round_id: None when the plan is too broken to name one.
        busy: another round is active, about which the aggregator may need an answer.
    """

    round_id: str | None
    code: str
    detail: str
    busy: bool = False


Verdict = Accepted | Repeated | Contradicted | Waiting | Refused

_OBJECT: TypeAdapter[Mapping[str, object]] = TypeAdapter(Mapping[str, object])
_ROUND_ID: TypeAdapter[str] = TypeAdapter(RoundId)


@dataclass(frozen=True)
class Desk:
    """What the device knows when it judges an invitation.

    Attributes:
        check_ins: how many rounds it joined in the last 24 hours.
        unfit: why it cannot train or evaluate right now.
        fields: that its owner lets queries ask for.
        offered: the version whose manifest came with the invitation, verified.
    """

    profile: Profile
    library: Library
    active: ActiveRound | None
    used: frozenset[str]
    check_ins: int
    history: History
    unfit: Fault | None
    fields: frozenset[str] = frozenset()
    offered: Version | None = None


def consider(desk: Desk, document: SignedDocument, now: int) -> Verdict:
    """Judges one invitation.

    Args:
        desk: what the device knows.
        document: the signed plan, not verified yet.
        now: current time, seconds since 1970.
    """
    plan = _opened(desk, document, PLAN_KIND)
    if isinstance(plan, Refused):
        return plan
    active = desk.active
    if active is not None and active.round_id == plan.round_id:
        return Repeated() if active.document.payload == document.payload else Contradicted()
    return (
        _refuse_history(desk, plan)
        or _refuse_policy(desk, plan, document.key_id, now)
        or _refuse_device(desk, plan, now)
        or _judge_task(desk, plan, document, now)
    )


def consider_order(desk: Desk, document: SignedDocument, now: int) -> Verdict:
    """Judges a standing order as the round that its update will be asked for: else it is trained in vain.

    Args:
        desk: what the device knows; rounds and conditions of the moment do not matter to an order.
        document: the signed order, not verified yet.
        now: current time, seconds since 1970.
    """
    plan = _opened(desk, document, ORDER_KIND)
    if isinstance(plan, Refused):
        return plan
    if not isinstance(plan.task, TrainTask) or plan.task.order != plan.round_id:
        return Refused(plan.round_id, "bad-plan", "the order is not one for training under its own id")
    return (
        _refuse_policy(desk, plan, document.key_id, now)
        or _refuse_device(desk, plan, now)
        or _judge_version(desk, plan, plan.task, document, now)
    )


def _opened(desk: Desk, document: SignedDocument, kind: str) -> Plan | Refused:
    try:
        return Plan.from_bytes(document.open(kind, dict(desk.profile.plan_signers)))
    except BadSignature as error:
        return Refused(_claimed_round(document.payload), "bad-signature", str(error))
    except MalformedMessage as error:
        return Refused(_claimed_round(document.payload), "bad-plan", str(error))


def _claimed_round(payload: bytes) -> str | None:
    """The round id in a plan that is not trusted: good for a refusal, and for nothing else."""
    try:
        return _ROUND_ID.validate_python(_OBJECT.validate_json(payload).get("round_id"))
    except ValidationError:
        return None


def _refuse_history(desk: Desk, plan: Plan) -> Refused | None:
    if plan.round_id in desk.used:
        return Refused(plan.round_id, "round-reused", "this device was in a round of this id before")
    limit = CHECK_INS_PER_CONTRIBUTION * desk.profile.policy.maximum_rounds_per_day
    if desk.check_ins >= limit:
        detail = f"{desk.check_ins} check-ins in the last 24 hours, {limit} are the limit"
        return Refused(plan.round_id, "too-many-rounds", detail)
    return None


def _refuse_policy(desk: Desk, plan: Plan, signer: str, now: int) -> Refused | None:
    profile = desk.profile
    refusal = policy.check(profile.policy, profile.fleet, Proposal(plan, signer), desk.history, now)
    return Refused(plan.round_id, refusal.code, refusal.detail) if refusal else None


def _refuse_device(desk: Desk, plan: Plan, now: int) -> Refused | None:
    profile, task = desk.profile, plan.task
    if not isinstance(task, QueryTask) and not profile.follows(task.model):
        return Refused(plan.round_id, "model-not-followed", f"this device does not follow {task.model}")
    try:
        verify_certificate(profile.certificate, profile.ca, now=now)
    except BadSignature as error:
        return Refused(plan.round_id, "certificate-invalid", str(error))
    if desk.unfit is not None and not isinstance(task, QueryTask):
        return Refused(plan.round_id, desk.unfit.code, desk.unfit.detail)
    active = desk.active
    if active is not None and not _supersedes(plan, active.plan):
        return Refused(plan.round_id, "busy", f"this device is in round {active.round_id}", busy=True)
    return None


def _supersedes(plan: Plan, active: Plan) -> bool:
    """Whether `plan` shows that the active round is over: the same model went on to a later version.

    Its end may have been lost on the way. Leaving is safe at any time, and what the device still owed there
    nobody waits for.
    """
    task, before = plan.task, active.task
    return (
        isinstance(task, TrainTask)
        and isinstance(before, TrainTask)
        and task.model == before.model
        and task.base_version > before.base_version
        and plan.issued_at >= active.issued_at
    )


def _judge_task(desk: Desk, plan: Plan, document: SignedDocument, now: int) -> Verdict:
    task = plan.task
    if isinstance(task, TrainTask):
        judge = _judge_version if task.order is None else _judge_pending
        return judge(desk, plan, task, document, now)
    if isinstance(task, EvaluateTask):
        return _judge_version(desk, plan, task, document, now)
    if isinstance(task, QueryTask):
        if task.field not in desk.fields:
            return Refused(plan.round_id, "unknown-field", f"this device declares no field {task.field}")
        return _judge_cost(desk, plan, Answering(task), document, now)
    assert_never(task)


def _judge_version(
    desk: Desk, plan: Plan, task: TrainTask | EvaluateTask, document: SignedDocument, now: int
) -> Verdict:
    number = task.base_version if isinstance(task, TrainTask) else task.version
    round_id, shelf = plan.round_id, desk.library.shelf(task.model)
    if task.manifest_sha256 in shelf.bad:
        reason = shelf.bad[task.manifest_sha256]
        return Refused(
            round_id, "model-unusable", f"version {number} does not run here: {reason}"[:MAX_DETAIL]
        )
    version = desk.library.find(task.model, task.manifest_sha256)
    if version is None and isinstance(task, TrainTask) and task.order is None:
        older = _older(desk, task)
        if older is not None:
            return _judge_manifest(desk, plan, Training(task, older), document, now)
    if version is None and desk.offered is not None and desk.offered.sha256 == task.manifest_sha256:
        version = desk.offered
    if version is None:
        if shelf.newest > number:
            return Refused(
                round_id,
                "stale-version",
                f"the plan asks for version {number}, this device is at {shelf.newest}",
            )
        return Waiting(round_id, task.model, number)
    manifest = version.manifest
    if (manifest.name, manifest.version) != (task.model, number):
        return Refused(
            round_id,
            "bad-plan",
            f"the plan's manifest is of {manifest.name} version {manifest.version}, not {number}",
        )
    assignment = Training(task, manifest) if isinstance(task, TrainTask) else Evaluating(task, manifest)
    return _judge_manifest(desk, plan, assignment, document, now)


def _judge_pending(desk: Desk, plan: Plan, task: TrainTask, document: SignedDocument, now: int) -> Verdict:
    """A buffer: whether the update that waits here is one that it may have."""
    round_id, pending = plan.round_id, desk.library.pending.get(task.model)
    if pending is None or pending.order != task.order:
        return Refused(round_id, "no-update-ready", "no update of this order waits here")
    ordered = pending.plan.task
    if not isinstance(ordered, TrainTask) or (ordered.training, pending.plan.privacy) != (
        task.training,
        plan.privacy,
    ):
        # In mode example the noise was added by the order: the buffer must not say that it was another.
        return Refused(round_id, "bad-plan", "the buffer's training or privacy is not that of its order")
    staleness = task.base_version - pending.manifest.version
    if not 0 <= staleness <= task.training.maximum_staleness:
        detail = f"the update is {staleness} versions old, {task.training.maximum_staleness} are allowed"
        return Refused(round_id, "update-too-old", detail)
    return _judge_manifest(desk, plan, Training(task, pending.manifest), document, now)


def _older(desk: Desk, task: TrainTask) -> ModelManifest | None:
    """The newest version here that is not too old to train from in place of the plan's base version."""
    shelf = desk.library.shelf(task.model)
    if shelf.newest > task.base_version or not task.training.maximum_staleness:
        return None
    versions = [version.manifest for version in shelf.good if version.manifest.version < task.base_version]
    newest = max(versions, key=lambda each: each.version, default=None)
    if newest is None or task.base_version - newest.version > task.training.maximum_staleness:
        return None
    return newest


def _judge_manifest(
    desk: Desk, plan: Plan, assignment: Training | Evaluating, document: SignedDocument, now: int
) -> Verdict:
    round_id, model, manifest = plan.round_id, assignment.task.model, assignment.manifest
    if plan.privacy.example is not None and not manifest.example_gradients:
        detail = f"{model} gives no gradients of single examples, which mode example trains with"
        return Refused(round_id, "no-example-gradients", detail)
    unknown = [slot.name for slot in plan.privacy.metric_slots if slot.name not in METRICS]
    if unknown:
        return Refused(round_id, "unknown-metric", f"this device has no metric {unknown[0]}")
    return _judge_cost(desk, plan, assignment, document, now)


def _judge_cost(
    desk: Desk, plan: Plan, assignment: Assignment, document: SignedDocument, now: int
) -> Verdict:
    """The last gate: whether this device can afford the round."""
    round_id = plan.round_id
    try:
        encoding = round_encoding(plan, document.digest, assignment.dimension)
        planned = contribution_event(plan, encoding)
    except PrivacyError as error:
        return Refused(round_id, "bad-plan", str(error)[:MAX_DETAIL])
    refusal = policy.check_epsilon(desk.profile.policy, planned, desk.history, now)
    return Refused(round_id, refusal.code, refusal.detail) if refusal else Accepted(plan, assignment)
