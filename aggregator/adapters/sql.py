"""The repository on an SQL database: SQLite in one file, or PostgreSQL by its URL.

One connection is one transaction. The promises are those of `aggregator.repository`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    Connection,
    CursorResult,
    Executable,
    Row,
    Select,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from aggregator.adapters import sql_schema as s
from aggregator.adapters.sql_access import AccessReader, AccessWriter
from aggregator.adapters.sql_claim import Claim
from aggregator.adapters.sql_devices import DeviceReader, DeviceWriter
from aggregator.adapters.sql_engine import MODE, Mode, contended, erase_log, open_engine, reason
from aggregator.adapters.sql_enrolment import EnrolmentReader, EnrolmentWriter
from aggregator.adapters.sql_migration import check_schema
from aggregator.adapters.sql_noise import NoiseReader, NoiseWriter
from aggregator.adapters.sql_optimizer import OptimizerReader, OptimizerWriter
from aggregator.adapters.sql_rollout import RolloutReader, RolloutWriter
from aggregator.adapters.sql_selection import SelectionReader, SelectionWriter
from aggregator.records import (
    Campaign,
    CampaignStatus,
    Evaluation,
    LedgerEntry,
    LogEntry,
    Round,
    RoundEnding,
    RoundStatus,
    Stage,
    Upload,
    Version,
)
from aggregator.repository import (
    Conflict,
    Contended,
    NotFound,
    OutcomeUnknown,
    Reader,
    StorageUnavailable,
    Unstorable,
    Writer,
)
from protocol.fields import BlobRef


class SqlRepository:
    """A repository at a database URL, such as `postgresql://covey@db.local/covey`."""

    def __init__(self, url: str) -> None:
        """Opens a database that has its tables: see `aggregator.adapters.sql_migration`.

        Raises:
            OutdatedSchema, UnknownSchema: its tables are not those of this Covey.
            StorageUnavailable: it cannot be opened.
        """
        self._engine = open_engine(url)
        self._claim: Claim | None = None
        try:
            with self._transaction(Mode.READ) as connection:
                check_schema(connection)
        except BaseException:
            self._engine.dispose()
            raise

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """Opens a consistent view."""
        with self._transaction(Mode.READ) as connection:
            yield _Reader(connection)

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Opens the one write transaction."""
        with self._transaction(Mode.WRITE) as connection:
            if self._claim is not None:
                self._claim.check(connection)
            writer = _Writer(connection)
            yield writer
        if writer.ended_round:
            erase_log(self._engine)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Makes this the one repository that a service may write through, until the block is left.

        Operators still write beside it, each operation in one transaction.

        Raises:
            Superseded: another service, perhaps on another machine, has claimed the database.
        """
        # The file of SQLite lies in the state directory, which the service has locked.
        if self._engine.dialect.name == "sqlite":
            yield
            return
        claim = Claim(self._engine)
        try:
            with self._transaction(Mode.WRITE) as connection:
                claim.take(connection)
            self._claim = claim
            yield
        finally:
            self._claim = None
            claim.release()

    def close(self) -> None:
        """Releases connections and files."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, mode: Mode) -> Iterator[Connection]:
        committing = False
        try:
            with (
                self._engine.connect().execution_options(**{MODE: mode}) as connection,
                connection.begin(),
            ):
                yield connection
                committing = mode is not Mode.READ
        except IntegrityError as error:
            raise Conflict(reason(error)) from error
        except DataError as error:
            raise Unstorable(reason(error)) from error
        except SQLAlchemyError as error:
            if contended(error):
                raise Contended(f"{reason(error)}: try again") from error
            if committing and isinstance(error, DBAPIError) and error.connection_invalidated:
                raise OutcomeUnknown(f"{reason(error)}; look whether it was done") from error
            raise StorageUnavailable(reason(error)) from error


class _Reader(
    AccessReader, DeviceReader, EnrolmentReader, NoiseReader, OptimizerReader, RolloutReader, SelectionReader
):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _one(self, query: Select[Any]) -> Row[Any] | None:
        return self._connection.execute(query).one_or_none()

    def _all(self, query: Select[Any]) -> list[Row[Any]]:
        return list(self._connection.execute(query))

    def version(self, model: str, version: int) -> Version | None:
        row = self._one(
            select(s.versions).where(s.versions.c.model == model, s.versions.c.version == version)
        )
        return None if row is None else Version(**row._asdict())

    def newest_version(self, model: str, *stages: Stage) -> Version | None:
        query = select(s.versions).where(s.versions.c.model == model)
        if stages:
            query = query.where(s.versions.c.stage.in_(stages))
        row = self._one(query.order_by(s.versions.c.version.desc()).limit(1))
        return None if row is None else Version(**row._asdict())

    def newest_versions(self) -> tuple[Version, ...]:
        newest = select(s.versions.c.model, func.max(s.versions.c.version).label("version"))
        latest = newest.group_by(s.versions.c.model).subquery()
        query = select(s.versions).join(
            latest, (latest.c.model == s.versions.c.model) & (latest.c.version == s.versions.c.version)
        )
        return tuple(Version(**row._asdict()) for row in self._all(query.order_by(s.versions.c.model)))

    def versions(self, model: str | None = None) -> tuple[Version, ...]:
        query = select(s.versions).order_by(s.versions.c.model, s.versions.c.version)
        if model is not None:
            query = query.where(s.versions.c.model == model)
        return tuple(Version(**row._asdict()) for row in self._all(query))

    def campaign(self, campaign_id: str) -> Campaign | None:
        row = self._one(select(s.campaigns).where(s.campaigns.c.campaign_id == campaign_id))
        return None if row is None else Campaign(**_without_seq(row))

    def campaigns(self, *statuses: CampaignStatus) -> tuple[Campaign, ...]:
        query = select(s.campaigns).order_by(s.campaigns.c.seq)
        if statuses:
            query = query.where(s.campaigns.c.status.in_(statuses))
        return tuple(Campaign(**_without_seq(row)) for row in self._all(query))

    def round(self, round_id: str) -> Round | None:
        row = self._one(select(s.rounds).where(s.rounds.c.round_id == round_id))
        return None if row is None else _round(row)

    def rounds(
        self,
        *,
        campaign_id: str | None = None,
        status: RoundStatus | None = None,
        last: int | None = None,
        before: str | None = None,
    ) -> tuple[Round, ...]:
        query = select(s.rounds).order_by(s.rounds.c.seq.desc())
        if campaign_id is not None:
            query = query.where(s.rounds.c.campaign_id == campaign_id)
        if status is not None:
            query = query.where(s.rounds.c.status == status)
        if before is not None:
            seq = select(s.rounds.c.seq).where(s.rounds.c.round_id == before).scalar_subquery()
            query = query.where(s.rounds.c.seq < seq)
        if last is not None:
            query = query.limit(last)
        return tuple(_round(row) for row in reversed(self._all(query)))

    def log(self, round_id: str) -> tuple[LogEntry, ...]:
        columns = (s.log.c.at, s.log.c.kind, s.log.c.device_id, s.log.c.frame)
        query = select(*columns).where(s.log.c.round_id == round_id).order_by(s.log.c.seq)
        return tuple(LogEntry(**row._asdict()) for row in self._all(query))

    def inputs(self, round_id: str) -> dict[str, str]:
        query = select(s.inputs.c.device_id, s.inputs.c.sha256).where(s.inputs.c.round_id == round_id)
        return {row.device_id: row.sha256 for row in self._all(query)}

    def uploads(self, round_id: str) -> tuple[Upload, ...]:
        stored: dict[str, set[int]] = {}
        of_round = s.chunks.c.round_id == round_id
        for row in self._all(
            select(s.chunks.c.device_id, s.chunks.c.index.label("position")).where(of_round)
        ):
            stored.setdefault(row.device_id, set()).add(row.position)
        query = select(s.uploads).where(s.uploads.c.round_id == round_id).order_by(s.uploads.c.device_id)
        return tuple(
            Upload(
                row.round_id,
                row.device_id,
                BlobRef(sha256=row.sha256, size=row.size),
                frozenset(stored.get(row.device_id, ())),
            )
            for row in self._all(query)
        )

    def chunks(self, round_id: str, device_id: str) -> Iterator[bytes]:
        of_upload = (s.chunks.c.round_id == round_id, s.chunks.c.device_id == device_id)
        indices = select(s.chunks.c.index).where(*of_upload).order_by(s.chunks.c.index)
        for index in self._connection.scalars(indices).all():
            query = select(s.chunks.c.data).where(*of_upload, s.chunks.c.index == index)
            yield self._connection.scalars(query).one()

    def sum_slice(self, round_id: str, start: int) -> bytes | None:
        query = select(s.sums.c.data).where(s.sums.c.round_id == round_id, s.sums.c.start == start)
        return self._connection.scalars(query).one_or_none()

    def ledger(self, model: str | None = None) -> tuple[LedgerEntry, ...]:
        query = select(s.ledger).order_by(s.ledger.c.seq)
        if model is not None:
            query = query.where(s.ledger.c.model == model)
        return tuple(LedgerEntry(**_without_seq(row)) for row in self._all(query))

    def evaluations(self, model: str, version: int | None = None) -> tuple[Evaluation, ...]:
        query = select(s.evaluations).where(s.evaluations.c.model == model).order_by(s.evaluations.c.seq)
        if version is not None:
            query = query.where(s.evaluations.c.version == version)
        return tuple(Evaluation(**_without_seq(row)) for row in self._all(query))

    def transcript(self, round_id: str) -> tuple[bytes, ...]:
        query = select(s.transcripts.c.record).where(s.transcripts.c.round_id == round_id)
        return tuple(self._connection.scalars(query.order_by(s.transcripts.c.seq)))

    def transcript_head(self) -> bytes | None:
        newest = select(func.max(s.transcripts.c.seq)).scalar_subquery()
        query = select(s.transcripts.c.record).where(s.transcripts.c.seq == newest)
        return self._connection.scalars(query).one_or_none()


class _Writer(
    _Reader,
    AccessWriter,
    DeviceWriter,
    EnrolmentWriter,
    NoiseWriter,
    OptimizerWriter,
    RolloutWriter,
    SelectionWriter,
):
    ended_round = False
    """Whether a round's secrets were erased in this transaction."""

    def _insert(self, table: Table, **values: object) -> None:
        try:
            self._connection.execute(insert(table).values(**values))
        except IntegrityError as error:
            raise Conflict(f"{table.name}: {reason(error)}") from error

    def _change(self, statement: Executable, missing: str) -> None:
        result = self._connection.execute(statement)
        if isinstance(result, CursorResult) and result.rowcount == 0:
            raise NotFound(missing)

    def _require_running(self, round_id: str) -> None:
        query = select(s.rounds.c.status).where(s.rounds.c.round_id == round_id)
        if self._connection.scalars(query).one_or_none() != "running":
            raise NotFound(f"no round {round_id} is running")

    def add_version(self, version: Version) -> None:
        self._insert(s.versions, **vars(version))

    def add_campaign(self, campaign: Campaign) -> None:
        self._insert(s.campaigns, **vars(campaign))

    def update_campaign(self, campaign_id: str, status: CampaignStatus, note: str = "") -> None:
        statement = update(s.campaigns).where(s.campaigns.c.campaign_id == campaign_id)
        self._change(statement.values(status=status, note=note), f"no campaign {campaign_id}")

    def set_due(self, campaign_id: str, at: float | None) -> None:
        statement = update(s.campaigns).where(s.campaigns.c.campaign_id == campaign_id)
        self._change(statement.values(due_at=at), f"no campaign {campaign_id}")

    def begin_round(self, round_: Round) -> None:
        statement = update(s.campaigns).where(s.campaigns.c.campaign_id == round_.campaign_id)
        statement = statement.values(status="running", started=s.campaigns.c.started + 1, note="")
        self._change(statement, f"no campaign {round_.campaign_id}")
        self._insert(s.rounds, **(vars(round_) | {"invited": json.dumps(round_.invited)}))

    def append_log(self, round_id: str, entry: LogEntry) -> None:
        self._require_running(round_id)
        self._insert(s.log, round_id=round_id, **vars(entry))

    def save_report(self, round_id: str, report: bytes) -> None:
        statement = update(s.rounds).where(s.rounds.c.round_id == round_id)
        self._change(statement.values(report=report), f"no round {round_id}")

    def end_round(self, ending: RoundEnding) -> None:
        round_id = ending.round_id
        self._require_running(round_id)
        if ending.version is not None:
            self.add_version(ending.version)
            known = self.contributors(ending.version.model)
            for device_id in ending.contributors:
                if device_id not in known:
                    self._insert(s.contributors, model=ending.version.model, device_id=device_id)
        if ending.ledger is not None:
            self._insert(s.ledger, **vars(ending.ledger))
        if ending.evaluation is not None:
            self._insert(s.evaluations, **vars(ending.evaluation))
        for record in ending.transcript:
            self._insert(s.transcripts, round_id=round_id, record=record)
        self._connection.execute(
            update(s.rounds)
            .where(s.rounds.c.round_id == round_id)
            .values(
                status=ending.status,
                ended_at=ending.ended_at,
                code=ending.code,
                detail=ending.detail,
                report=ending.report,
                version=None if ending.version is None else ending.version.version,
            )
        )
        self.ended_round = True
        self.drop_uploads(round_id)
        for table in (s.log, s.sums, s.inputs):
            self._connection.execute(delete(table).where(table.c.round_id == round_id))

    def open_upload(self, round_id: str, device_id: str, blob: BlobRef) -> None:
        self._require_running(round_id)
        self.drop_upload(round_id, device_id)
        self._insert(s.uploads, round_id=round_id, device_id=device_id, sha256=blob.sha256, size=blob.size)

    def store_chunk(self, round_id: str, device_id: str, index: int, data: bytes) -> None:
        of_upload = (s.uploads.c.round_id == round_id, s.uploads.c.device_id == device_id)
        if self._one(select(s.uploads.c.size).where(*of_upload)) is None:
            raise NotFound(f"{device_id} has no upload open in round {round_id}")
        of_chunk = (
            s.chunks.c.round_id == round_id,
            s.chunks.c.device_id == device_id,
            s.chunks.c.index == index,
        )
        if self._one(select(s.chunks.c.index).where(*of_chunk)) is None:
            self._insert(s.chunks, round_id=round_id, device_id=device_id, index=index, data=data)

    def drop_upload(self, round_id: str, device_id: str) -> None:
        for table in (s.chunks, s.uploads):
            statement = delete(table).where(table.c.round_id == round_id, table.c.device_id == device_id)
            self._connection.execute(statement)

    def drop_uploads(self, round_id: str) -> None:
        for table in (s.chunks, s.uploads):
            self._connection.execute(delete(table).where(table.c.round_id == round_id))

    def put_sum_slice(self, round_id: str, start: int, data: bytes) -> None:
        of_slice = (s.sums.c.round_id == round_id, s.sums.c.start == start)
        changed = self._connection.execute(update(s.sums).where(*of_slice).values(data=data))
        if changed.rowcount == 0:
            self._insert(s.sums, round_id=round_id, start=start, data=data)

    def note_input(self, round_id: str, device_id: str, sha256: str) -> None:
        self._insert(s.inputs, round_id=round_id, device_id=device_id, sha256=sha256)


def _without_seq(row: Row[Any]) -> dict[str, Any]:
    return {name: value for name, value in row._asdict().items() if name != "seq"}


def _round(row: Row[Any]) -> Round:
    return Round(**(_without_seq(row) | {"invited": tuple(json.loads(row.invited))}))
