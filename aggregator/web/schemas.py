"""What the API says and takes, as pydantic models: the client reads what the service writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from aggregator import records
from aggregator.access.roles import Role
from aggregator.access.tokens import TokenRecord
from aggregator.records import CampaignStatus, DeviceState, RoundStatus, Stage
from aggregator.round_operations import RoundView
from aggregator.rounds.planning import VersionToEvaluate, readable
from aggregator.rounds.report import RoundReport
from aggregator.rounds.selector import written
from protocol.conditions import Conditions
from protocol.fields import Slug
from protocol.messages import VersionFailure
from protocol.plan import QueryTask

PREFIX = "/api/v1"
MAX_PAGE = 10_000
MAX_LABELS = 32
MAX_TOKEN_DAYS = 366
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"

Label = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9._=-]{0,62}$",
        description="Lower-case letters, digits and . _ = -, at most 63: `barn`, `site=north`.",
    ),
]
Text = Annotated[str, Field(max_length=200, pattern=PRINTABLE)]
T = TypeVar("T")


class ApiModel(BaseModel):
    """Base of what travels: immutable; a newer service may say more than an older client knows."""

    model_config = ConfigDict(frozen=True)


class Request(BaseModel):
    """Base of what an operator sends: an unknown field is a mistake, and is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Page(ApiModel, Generic[T]):
    """A part of a list.

    Attributes:
        items: in order.
        next: give it as `cursor` for what follows; None at the end.
    """

    items: tuple[T, ...]
    next: str | None = None


class Problem(ApiModel):
    """An error, RFC 9457; `code` is stable and `detail` says what to do.

    Attributes:
        errors: which parts of a request are not valid.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: tuple[str, ...] = ()


class Device(ApiModel):
    """An enrolled device, and what it last said of itself.

    Attributes:
        excluded: why it is not selected; None when it may be.
        models: model -> version that it answers predictions with.
        conditions: its circumstances, as it last said them; what is None is unknown.
        last_seen: seconds since 1970; None before the first time.
        failures: model -> the version that failed on it last, and why.
        state: whether it may be in the fleet.
        token: id of the enrolment token that let it in; None when an operator signed its request.
        target: system that its client's bundle is for; empty where none was installed that could be updated.
    """

    device: str
    online: bool
    excluded: str | None
    client_version: str
    runtime: str
    models: Mapping[str, int]
    last_seen: float | None
    enrolled_at: float
    labels: tuple[str, ...] = ()
    conditions: Conditions = Conditions()
    failures: Mapping[str, VersionFailure] = Field(default_factory=dict)
    state: DeviceState = "active"
    token: str | None = None
    target: str = ""

    @classmethod
    def of(cls, d: records.Device) -> Self:
        """From the record."""
        return cls(
            device=d.device_id,
            online=d.online,
            excluded=d.excluded,
            client_version=d.client_version,
            runtime=d.runtime,
            models=d.models,
            last_seen=d.last_seen,
            enrolled_at=d.enrolled_at,
            labels=d.labels,
            conditions=d.conditions,
            failures=d.failures,
            state=d.state,
            token=d.token_id,
            target=d.target,
        )


class EnrolRequest(Request):
    """Asks for a device's certificate.

    Attributes:
        csr: PKCS#10, DER, as base64.
        name: the id that it gets; by default the one that it asks for.
    """

    csr: Annotated[str, Field(max_length=8192, pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
    name: Slug | None = None


class Exclusion(Request):
    """Why a device takes no part."""

    reason: Annotated[Text, Field(min_length=1)] = "by the operator"


class Labels(Request):
    """All labels that a device is to have."""

    labels: Annotated[tuple[Label, ...], Field(max_length=MAX_LABELS)]


class Version(ApiModel):
    """A published version.

    Attributes:
        round: that made it; None when an operator published it.
        stage: how far it has come: a part of the fleet has a canary, all of it a stable one.
    """

    model: str
    version: int
    manifest_sha256: str
    created_at: float
    round: str | None
    stage: Stage = "candidate"

    @classmethod
    def of(cls, v: records.Version) -> Self:
        """From the record."""
        return cls(
            model=v.model,
            version=v.version,
            manifest_sha256=v.manifest_sha256,
            created_at=v.created_at,
            round=v.round_id,
            stage=v.stage,
        )


class Campaign(ApiModel):
    """Rounds that were asked for, one after the other.

    Attributes:
        model: which is trained or evaluated; None for a query.
        query: what is asked by a query.
        evaluates: number of the version that is evaluated.
        schedule: cron expression and time zone; empty when rounds follow on one another.
        due_at: no round begins before, seconds since 1970.
        where: which devices it takes; empty for all.
        buffered: devices train when they can, and each round collects updates that wait.
        note: why it failed, or what it waits for.
    """

    campaign: str
    model: str | None
    query: QueryTask | None = None
    evaluates: int | None = None
    schedule: str = ""
    due_at: float | None = None
    where: str = ""
    buffered: bool = False
    status: CampaignStatus
    rounds: int
    started: int
    note: str
    created_at: float

    @classmethod
    def of(cls, c: records.Campaign) -> Self:
        """From the record."""
        settings = readable(c)
        asks = None if settings is None else settings.asks
        return cls(
            campaign=c.campaign_id,
            model=c.model,
            query=asks if isinstance(asks, QueryTask) else None,
            evaluates=asks.version if isinstance(asks, VersionToEvaluate) else None,
            schedule="" if settings is None or settings.schedule is None else str(settings.schedule),
            due_at=c.due_at,
            where="" if settings is None else written(settings.where),
            buffered=settings is not None and settings.buffered,
            status=c.status,
            rounds=c.rounds,
            started=c.started,
            note=c.note,
            created_at=c.created_at,
        )


class Round(ApiModel):
    """A round and its figures so far.

    Attributes:
        model, base_version: what is trained or evaluated; None for a query. What a query or an
            evaluation gave is in the report.
        code: the short reason of an abort; else empty.
    """

    round: str
    campaign: str
    number: int
    model: str | None
    base_version: int | None
    version: int | None
    status: RoundStatus
    code: str
    detail: str
    invited: tuple[str, ...]
    started_at: float
    ended_at: float | None
    report: RoundReport

    @classmethod
    def of(cls, view: RoundView) -> Self:
        """From the record and its report."""
        r = view.record
        return cls(
            round=r.round_id,
            campaign=r.campaign_id,
            number=r.number,
            model=r.model,
            base_version=r.base_version,
            version=r.version,
            status=r.status,
            code=r.code,
            detail=r.detail,
            invited=r.invited,
            started_at=r.started_at,
            ended_at=r.ended_at,
            report=view.report,
        )


class Spent(ApiModel):
    """A privacy loss; `epsilon` is None where nothing is promised."""

    epsilon: float | None
    delta: float
    releases: int
    unit: str
    sampler_distance: float
    sampler_included: bool


class Ledger(ApiModel):
    """What was spent, re-computed from the transcript and held against the stored ledger.

    Attributes:
        population: by a device that was in every round of every model.
        models: the same for each model.
        queries: the same for all queries.
        rounds: that were checked.
        differences: what does not agree; empty when `matches`.
    """

    population: Spent
    models: Mapping[str, Spent]
    queries: Spent
    rounds: int
    matches: bool
    differences: tuple[str, ...]


class TokenRequest(Request):
    """Asks for a token."""

    role: Role
    label: Annotated[Text, Field(max_length=63)] = ""
    seconds: Annotated[float, Field(gt=0, le=MAX_TOKEN_DAYS * 86_400)] = 30 * 86_400


class Token(ApiModel):
    """A token without its secret."""

    token: str
    role: Role
    label: str
    created_at: float
    expires_at: float
    created_by: str
    revoked_at: float | None

    @classmethod
    def of(cls, t: TokenRecord) -> Self:
        """From the record."""
        return cls(
            token=t.token_id,
            role=t.role,
            label=t.label,
            created_at=t.created_at,
            expires_at=t.expires_at,
            created_by=t.created_by,
            revoked_at=t.revoked_at,
        )


class NewToken(Token):
    """A token just made; `secret` is what its user presents, and is shown this once."""

    secret: Annotated[str, Field(repr=False)]


class AuditEntry(ApiModel):
    """Somebody did something, or tried to; `outcome` is `done` or the code of the refusal."""

    number: int
    at: float
    who: str
    role: str
    address: str
    action: str
    target: str
    outcome: str

    @classmethod
    def of(cls, entry: records.AuditEntry) -> Self:
        """From the record."""
        return cls(**vars(entry))


class Whoami(ApiModel):
    """Who the service takes you for."""

    name: str
    role: Role
    fleet: str
    covey: str


class SignInLink(ApiModel):
    """Signs a browser in, once.

    Attributes:
        path: to open at the service's address; whoever opens it first is signed in.
    """

    path: Annotated[str, Field(repr=False)]
    expires_at: float


class Health(ApiModel):
    """Whether the service runs, and whether it can do its work."""

    status: Literal["alive", "ready", "not-ready"]
    storage: bool
    broker: bool
    loop: bool
    trouble: str = ""
