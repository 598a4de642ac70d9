"""What the repository holds: one frozen dataclass a kind of record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from protocol.conditions import Conditions
from protocol.fields import BlobRef
from protocol.messages import VersionFailure

CampaignStatus = Literal["waiting", "running", "paused", "finished", "failed", "cancelled"]
RoundStatus = Literal["running", "completed", "aborted"]
Stage = Literal["candidate", "canary", "stable", "withdrawn"]
"""How far a version has come: made, with a part of the fleet, for all of it, or taken back for good."""
DeviceState = Literal["active", "revoked", "retired"]
"""Whether a device may be in the fleet: it may, it lost that right, or its time is over."""


@dataclass(frozen=True)
class Device:
    """An enrolled device, and what it last said of itself.

    Attributes:
        certificate: DER, as issued by the fleet CA.
        excluded: why this device is not selected; None when it may be.
        online: as of `last_seen`.
        models: model name -> version it answers predictions with.
        conditions: its circumstances, as it last said them.
        last_seen: seconds since 1970; None before the first birth.
        labels: what the operator calls it by, sorted: `site=north`, `barn`.
        failures: model -> the version that failed on it last, and why.
        token_id: of the enrolment token that let it in; None when an operator signed its request.
        target: system that its client's bundle is for; empty where none was installed that could be updated.
    """

    device_id: str
    certificate: bytes
    enrolled_at: float
    excluded: str | None = None
    online: bool = False
    client_version: str = ""
    runtime: str = ""
    models: Mapping[str, int] = field(default_factory=dict)
    last_seen: float | None = None
    labels: tuple[str, ...] = ()
    conditions: Conditions = field(default_factory=Conditions)
    failures: Mapping[str, VersionFailure] = field(default_factory=dict)
    state: DeviceState = "active"
    token_id: str | None = None
    target: str = ""


@dataclass(frozen=True)
class ClientCount:
    """Devices that run one version of the client on one system.

    Attributes:
        version: as they say it; empty before they have said anything.
        target: as in `Device`.
        devices: of the fleet, online or not.
    """

    version: str
    target: str
    devices: int
    online: int


@dataclass(frozen=True)
class IssuedCertificate:
    """A device certificate that the fleet's CA issued; kept when the device has another one since.

    Attributes:
        serial: number of the certificate, hexadecimal without leading zeros.
        expires_at: seconds since 1970, as all times.
        revoked_at: None while it is good.
        reason: why it was revoked.
    """

    serial: str
    device_id: str
    issued_at: float
    expires_at: float
    revoked_at: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Version:
    """One published version of a model.

    Attributes:
        document: JSON of the SignedDocument around the manifest.
        round_id: the round that made it; None when an operator published it.
    """

    model: str
    version: int
    manifest_sha256: str
    document: bytes
    created_at: float
    round_id: str | None = None
    stage: Stage = "candidate"


@dataclass(frozen=True)
class Pin:
    """A version that a device, or every device with a label, is to have whatever becomes of the fleet's.

    Attributes:
        target: device id or label.
        at: seconds since 1970; of two labels of a device, the newer pin counts.
    """

    model: str
    kind: Literal["device", "group"]
    target: str
    version: int
    at: float


@dataclass(frozen=True)
class Assigned:
    """What devices were last told to have: the fleet, or one device.

    Attributes:
        device_id: empty for the fleet.
        sequence: of the signed assignment; it only rises.
        version: None for a device that is to have what the fleet has.
        document: JSON of the SignedDocument around the assignment.
    """

    model: str
    device_id: str
    sequence: int
    version: int | None
    document: bytes


@dataclass(frozen=True)
class Rollout:
    """A version on its way to the fleet, or to a group.

    Attributes:
        settings: JSON of `aggregator.rollout.machine.RolloutSettings`.
        pool: the devices that it is for, by id.
        status: of its state.
        progress: JSON of `aggregator.rollout.machine.Progress`.
    """

    rollout_id: str
    model: str
    version: int
    settings: bytes
    pool: tuple[str, ...]
    created_at: float
    status: str
    progress: bytes


@dataclass(frozen=True)
class Campaign:
    """A request for rounds, one after the other.

    Attributes:
        model: which model they train or evaluate; None for a query.
        settings: JSON of `aggregator.rounds.planning.CampaignSettings`.
        rounds: how many rounds are to be run, completed or not.
        started: how many rounds have begun.
        note: why it failed, or what it waits for.
        due_at: no round begins before, seconds since 1970; None without a schedule.
    """

    campaign_id: str
    model: str | None
    rounds: int
    settings: bytes
    created_at: float
    status: CampaignStatus = "waiting"
    started: int = 0
    note: str = ""
    due_at: float | None = None


@dataclass(frozen=True)
class NoiseTree:
    """The noise of a campaign's present tree (`protocol.dp.tree`).

    Attributes:
        tree: its id, as in the plans.
        key: 32 secret bytes; every node's noise follows from it.
        released: the last leaf whose sum was released; 0 for none.
    """

    campaign_id: str
    tree: str
    key: bytes = field(repr=False)
    released: int = 0


@dataclass(frozen=True)
class OptimizerMemory:
    """What a campaign's server optimizer remembers between rounds (`aggregator.optimizers`).

    Attributes:
        rounds: updates applied so far.
        momentum, second_moment: little-endian float32, one element a parameter; None where it has none.
    """

    campaign_id: str
    rounds: int
    momentum: bytes | None = None
    second_moment: bytes | None = None


@dataclass(frozen=True)
class Round:
    """One round of a campaign.

    Attributes:
        number: 1, 2, ... within the campaign.
        model, base_version: what is trained or evaluated; None for a query, whose question is in the plan.
        plan: JSON of the SignedDocument around the plan.
        selection_seed: what the cohort was drawn with, for later checks.
        code: empty unless aborted: the short reason.
        version: the version that it published.
        report: JSON of `aggregator.rounds.report.RoundReport`.
    """

    round_id: str
    campaign_id: str
    number: int
    model: str | None
    base_version: int | None
    plan: bytes
    selection_seed: bytes
    invited: tuple[str, ...]
    started_at: float
    ended_at: float | None = None
    status: RoundStatus = "running"
    code: str = ""
    detail: str = ""
    version: int | None = None
    report: bytes = b"{}"


@dataclass(frozen=True)
class LogEntry:
    """One event that a running round has taken in; replaying them in order restores its state.

    Attributes:
        at: seconds since 1970.
        kind: `received` (a device's message), `stored` (its masked input is in the sum), `closed` (a phase).
        device_id: empty for `closed`.
        frame: the message of `received`, as `protocol.codec` frames it; the sub-cohort of `closed`.
    """

    at: float
    kind: Literal["received", "stored", "closed"]
    device_id: str = ""
    frame: bytes = b""

    @classmethod
    def closing(cls, at: float, subcohort: int) -> LogEntry:
        """The end of a phase of one sub-cohort."""
        return cls(at, "closed", frame=subcohort.to_bytes(2, "big"))

    @property
    def subcohort(self) -> int:
        """Whose phase was closed; an entry of `closing`."""
        return int.from_bytes(self.frame, "big")


@dataclass(frozen=True)
class Upload:
    """A masked input on its way: what is being received, and which chunks are stored."""

    round_id: str
    device_id: str
    blob: BlobRef
    stored: frozenset[int]


@dataclass(frozen=True)
class LedgerEntry:
    """What one round cost in privacy.

    Attributes:
        model: which was trained or evaluated; None for a query.
        event: JSON of the DP event; an accountant says what it costs.
    """

    round_id: str
    model: str | None
    at: float
    event: bytes


@dataclass(frozen=True)
class Evaluation:
    """How a version did in one round.

    Attributes:
        figures: JSON of `aggregator.rounds.evaluation.VersionEvaluation`.
    """

    round_id: str
    model: str
    version: int
    at: float
    figures: bytes


@dataclass(frozen=True)
class RoundEnding:
    """Everything that becomes true when a round ends, in one transaction.

    Attributes:
        version: the new version; None unless the round trained one and completed.
        ledger: the DP event; None when nothing was ever unmasked.
        transcript: the records of the round's transcript, hash-chained.
        evaluation: None unless the round evaluated a version and completed.
        contributors: devices whose contribution is in the version.
    """

    round_id: str
    status: Literal["completed", "aborted"]
    ended_at: float
    code: str
    detail: str
    report: bytes
    version: Version | None
    ledger: LedgerEntry | None
    transcript: tuple[bytes, ...]
    evaluation: Evaluation | None = None
    contributors: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeviceFilter:
    """Which devices to look at; what is None does not matter.

    Attributes:
        label: it carries this label.
        online: whether it is.
        client_version: of Covey on the device.
        answers_with: (model, version) that it answers predictions with.
        text: in its id, in a label or in its client's version.
        excluded: whether it is.
    """

    label: str | None = None
    online: bool | None = None
    client_version: str | None = None
    answers_with: tuple[str, int] | None = None
    text: str | None = None
    excluded: bool | None = None


@dataclass(frozen=True)
class FleetSize:
    """How many devices there are.

    Attributes:
        excluded: of those that are enrolled, online or not.
    """

    enrolled: int
    online: int
    excluded: int


@dataclass(frozen=True)
class AuditEntry:
    """Somebody did something, or tried to.

    Attributes:
        at: seconds since 1970.
        who: name of the principal.
        role: theirs at that moment.
        address: where the request came from.
        action: name of the operation, such as `exclude-device`.
        target: what it was done to.
        outcome: `done`, else the code of the refusal.
        number: 1, 2, ... in the order of writing; 0 before.
    """

    at: float
    who: str
    role: str
    address: str
    action: str
    target: str
    outcome: str = "done"
    number: int = 0
