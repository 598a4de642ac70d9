"""What an operator sees of rounds: their figures, how their cohorts were drawn, and what runs now."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.records import Round, RoundStatus
from aggregator.refusals import there
from aggregator.repository import Repository
from aggregator.rounds.report import RoundReport
from aggregator.rounds.selection import Selection
from protocol.codec import decode_from_device


@dataclass(frozen=True)
class RoundView:
    """A round, and its figures so far."""

    record: Round
    report: RoundReport


@dataclass(frozen=True)
class LiveRound:
    """The inside of a round that is running.

    Attributes:
        number: within its campaign, from 1.
        phase: name of its phase.
        said: device -> types of the messages that the aggregator has of it.
        stored: devices whose masked input is in the sum.
    """

    round_id: str
    number: int
    phase: str
    said: dict[str, frozenset[str]]
    stored: frozenset[str]


class RoundOperations:
    """The part of `aggregator.operations.Operator` about rounds."""

    repository: Repository

    def rounds(
        self,
        campaign_id: str | None = None,
        *,
        status: RoundStatus | None = None,
        last: int | None = None,
        before: str | None = None,
    ) -> tuple[RoundView, ...]:
        """Rounds with their figures, oldest first; with `before`, those that began before that round."""
        with self.repository.read() as reader:
            records = reader.rounds(campaign_id=campaign_id, status=status, last=last, before=before)
        return tuple(RoundView(record, RoundReport.from_bytes(record.report)) for record in records)

    def round(self, round_id: str) -> RoundView:
        """One round.

        Raises:
            NoSuch: there was none.
        """
        with self.repository.read() as reader:
            record = there(reader.round(round_id), f"no round {round_id}: see `covey round status`")
        return RoundView(record, RoundReport.from_bytes(record.report))

    def selection(self, round_id: str) -> Selection:
        """How the cohort of a round was drawn; `chosen` draws it again.

        Raises:
            NoSuch: there was no such round, or it was drawn before this was recorded.
        """
        with self.repository.read() as reader:
            record = reader.selection(round_id)
        return Selection.from_bytes(there(record, f"no record of how round {round_id} was drawn"))

    def live_rounds(self) -> tuple[LiveRound, ...]:
        """What the running rounds have heard so far; for those who stage accidents, and for curious ones."""
        with self.repository.read() as reader:
            records = reader.rounds(status="running")
            logs = [reader.log(record.round_id) for record in records]
        live = []
        for record, log in zip(records, logs, strict=True):
            said: dict[str, frozenset[str]] = {}
            for entry in log:
                if entry.kind == "received":
                    message, _ = decode_from_device(entry.frame)
                    said[entry.device_id] = said.get(entry.device_id, frozenset()) | {message.type}
            phases = RoundReport.from_bytes(record.report).phases
            live.append(
                LiveRound(
                    round_id=record.round_id,
                    number=record.number,
                    phase=phases[-1].phase if phases else "AdvertiseKeys",
                    said=said,
                    stored=frozenset(entry.device_id for entry in log if entry.kind == "stored"),
                )
            )
        return tuple(live)
