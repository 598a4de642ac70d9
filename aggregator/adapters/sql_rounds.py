"""The part of the SQL repository that holds campaigns, rounds, and what comes of them."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import Row, delete, func, select, update

from aggregator.adapters import sql_schema as s
from aggregator.adapters.sql_selection import SelectionReader
from aggregator.adapters.sql_statements import Reading, without_seq
from aggregator.adapters.sql_uploads import UploadWriter
from aggregator.adapters.sql_versions import VersionWriter
from aggregator.records import (
    Campaign,
    CampaignStatus,
    Evaluation,
    LedgerEntry,
    LogEntry,
    Round,
    RoundEnding,
    RoundStatus,
)


class RoundReader(Reading):
    """What can be read of it; see `aggregator.repository.Reader`."""

    def campaign(self, campaign_id: str) -> Campaign | None:
        """One campaign."""
        row = self._one(select(s.campaigns).where(s.campaigns.c.campaign_id == campaign_id))
        return None if row is None else Campaign(**without_seq(row))

    def campaigns(self, *statuses: CampaignStatus) -> tuple[Campaign, ...]:
        """Campaigns, oldest first."""
        query = select(s.campaigns).order_by(s.campaigns.c.seq)
        if statuses:
            query = query.where(s.campaigns.c.status.in_(statuses))
        return tuple(Campaign(**without_seq(row)) for row in self._all(query))

    def round(self, round_id: str) -> Round | None:
        """One round."""
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
        """Rounds, oldest first."""
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
        """The events of a running round."""
        columns = (s.log.c.at, s.log.c.kind, s.log.c.device_id, s.log.c.frame)
        query = select(*columns).where(s.log.c.round_id == round_id).order_by(s.log.c.seq)
        return tuple(LogEntry(**row._asdict()) for row in self._all(query))

    def ledger(self, model: str | None = None) -> tuple[LedgerEntry, ...]:
        """What rounds cost in privacy."""
        query = select(s.ledger).order_by(s.ledger.c.seq)
        if model is not None:
            query = query.where(s.ledger.c.model == model)
        return tuple(LedgerEntry(**without_seq(row)) for row in self._all(query))

    def transcript(self, round_id: str) -> tuple[bytes, ...]:
        """The transcript of a round."""
        query = select(s.transcripts.c.record).where(s.transcripts.c.round_id == round_id)
        return tuple(self._connection.scalars(query.order_by(s.transcripts.c.seq)))

    def transcript_head(self) -> bytes | None:
        """The newest record of all transcripts."""
        newest = select(func.max(s.transcripts.c.seq)).scalar_subquery()
        query = select(s.transcripts.c.record).where(s.transcripts.c.seq == newest)
        return self._connection.scalars(query).one_or_none()

    def evaluations(self, model: str, version: int | None = None) -> tuple[Evaluation, ...]:
        """How versions of a model did."""
        query = select(s.evaluations).where(s.evaluations.c.model == model).order_by(s.evaluations.c.seq)
        if version is not None:
            query = query.where(s.evaluations.c.version == version)
        return tuple(Evaluation(**without_seq(row)) for row in self._all(query))


class RoundWriter(VersionWriter, UploadWriter, SelectionReader, RoundReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    ended_round = False
    """Whether a round's secrets were erased in this transaction."""

    def add_campaign(self, campaign: Campaign) -> None:
        """Adds a campaign."""
        self._insert(s.campaigns, **vars(campaign))

    def update_campaign(self, campaign_id: str, status: CampaignStatus, note: str = "") -> None:
        """Changes status and note."""
        statement = update(s.campaigns).where(s.campaigns.c.campaign_id == campaign_id)
        self._change(statement.values(status=status, note=note), f"no campaign {campaign_id}")

    def set_due(self, campaign_id: str, at: float | None) -> None:
        """Says when the next round is due."""
        statement = update(s.campaigns).where(s.campaigns.c.campaign_id == campaign_id)
        self._change(statement.values(due_at=at), f"no campaign {campaign_id}")

    def begin_round(self, round_: Round) -> None:
        """Adds a running round."""
        statement = update(s.campaigns).where(s.campaigns.c.campaign_id == round_.campaign_id)
        statement = statement.values(status="running", started=s.campaigns.c.started + 1, note="")
        self._change(statement, f"no campaign {round_.campaign_id}")
        self._insert(s.rounds, **(vars(round_) | {"invited": json.dumps(round_.invited)}))

    def append_log(self, round_id: str, entry: LogEntry) -> None:
        """Appends an event."""
        self._require_running(round_id)
        self._insert(s.log, round_id=round_id, **vars(entry))

    def save_report(self, round_id: str, report: bytes) -> None:
        """Replaces a report."""
        statement = update(s.rounds).where(s.rounds.c.round_id == round_id)
        self._change(statement.values(report=report), f"no round {round_id}")

    def end_round(self, ending: RoundEnding) -> None:
        """Ends a running round, and erases what only it needed."""
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


def _round(row: Row[Any]) -> Round:
    return Round(**(without_seq(row) | {"invited": tuple(json.loads(row.invited))}))
