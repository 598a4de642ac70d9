"""A running round in memory: its record, its state machine, and the uploads on their way to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from structlog.contextvars import bound_contextvars

from aggregator.clock import Moment
from aggregator.records import Round
from aggregator.registry.publishing import document_of, manifest_of
from aggregator.repository import Reader
from aggregator.rounds import machine
from aggregator.rounds.events import DeviceHeard, Event, Log, MaskedInputStored, MessageReceived, Send
from aggregator.rounds.machine import RoundState
from aggregator.rounds.partial_sum import UnusableInput, add_input, input_size
from aggregator.rounds.report import BufferReport, RoundReport
from aggregator.rounds.selection import Selection
from aggregator.rounds.subcohort_state import Trust
from aggregator.work import Work
from models.assignment import Assignment, assignment_of, version_of
from protocol.dp.mechanism import EncodingParameters
from protocol.errors import IllegalEvent
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import BlobChunk, ClientAbort, Invitation, UploadOffer, UploadReceipt
from protocol.plan import Plan, TrainTask
from protocol.round_encoding import round_encoding
from protocol.secagg.server_state import Advertising, Collecting, Sharing
from protocol.transfer import Reception

logger = logging.getLogger(__name__)


class LostBase(Exception):
    """The version that a round starts from is not in the repository: the round cannot go on."""


@dataclass
class RunningRound:
    """One round that is running.

    The state is replaced as a whole by `apply`; when the transaction around it fails, the whole object is
    thrown away and loaded again.

    Attributes:
        assignment: what the plan asks, with the manifest of the version that it is about.
        inputs: device id -> SHA-256 of the masked input that is in the partial sum.
        receptions: uploads under way, by device.
        base: the signed manifest of that version, for devices that have to fetch it; None if they need none.
        buffer: what a buffered campaign's round collects; None for others.
        changed: whether the report has to be saved.
    """

    record: Round
    assignment: Assignment
    encoding: EncodingParameters
    state: RoundState
    inputs: dict[str, str] = field(default_factory=dict)
    receptions: dict[str, Reception] = field(default_factory=dict)
    base: SignedDocument | None = None
    buffer: BufferReport | None = None
    changed: bool = True

    @classmethod
    def begin(
        cls, work: Work, record: Round, selection: Selection, assignment: Assignment, trust: Trust
    ) -> RunningRound:
        """Begins a new round: its record becomes durable, and the invitations go out."""
        document, plan = _parse(record)
        encoding = round_encoding(plan, document.digest, assignment.dimension)
        state, outputs = machine.begin(plan, document, trust, record.invited, work.at)
        work.writer.begin_round(record)
        work.writer.note_selection(record.round_id, selection.to_bytes())
        running = cls(
            record, assignment, encoding, state, base=_document(work.writer, plan), buffer=_buffer(record)
        )
        running._execute(work, outputs)
        return running

    @classmethod
    def load(cls, reader: Reader, record: Round, trust: Trust, at: Moment) -> RunningRound:
        """Restores a round from the repository, after a restart.

        Raises:
            LostBase: the version that it starts from is gone.
        """
        document, plan = _parse(record)
        base, about = None, version_of(plan.task)
        if about is not None:
            version = reader.version(*about)
            if version is None:
                raise LostBase(f"{about[0]} version {about[1]} is not in the repository")
            base = manifest_of(version)
        assignment = assignment_of(plan.task, base)
        encoding = round_encoding(plan, document.digest, assignment.dimension)
        log = reader.log(record.round_id)
        state = machine.resume(plan, document, trust, record.invited, log, record.started_at, at)
        uploads = reader.uploads(record.round_id)
        return cls(
            record,
            assignment,
            encoding,
            state,
            reader.inputs(record.round_id),
            {upload.device_id: Reception.begin(upload.blob, upload.stored) for upload in uploads},
            _document(reader, plan),
            _buffer(record),
        )

    @property
    def round_id(self) -> str:
        """The round's id."""
        return self.record.round_id

    def apply(self, work: Work, event: Event) -> None:
        """Hands an event to the state machine and does what it wants.

        Raises:
            IllegalEvent, BadSignature, MalformedMessage: nothing changed.
        """
        with bound_contextvars(round=self.round_id):
            before = self.state
            self.state, outputs = machine.handle(self.state, event, work.at)
            self._execute(work, outputs)
            for was, part in zip(before.subcohorts, self.state.subcohorts, strict=True):
                if isinstance(was.secagg, Collecting) and not isinstance(part.secagg, Collecting):
                    # Whoever is not in the survivor set now never will be: its chunks are of no use.
                    for device_id in part.invited & self.receptions.keys():
                        work.writer.drop_upload(self.round_id, device_id)
                        del self.receptions[device_id]
                for phase in part.closed[len(was.closed) :]:
                    logger.info(
                        "round %s, sub-cohort %d of %d: %s over, %d of %d answered",
                        self.round_id[:8],
                        part.number + 1,
                        len(self.state.subcohorts),
                        phase.phase,
                        phase.answered,
                        phase.expected,
                    )

    def _execute(self, work: Work, outputs: tuple[Log | Send, ...]) -> None:
        for output in outputs:
            if isinstance(output, Log):
                work.writer.append_log(self.round_id, output.entry)
                self.changed = True
            elif isinstance(output.message, Invitation):
                # Not everybody was assigned the version that a round is about.
                invitation = output.message.model_copy(update={"manifest": self.base})
                work.send(output.device_id, invitation)
            else:
                work.send(output.device_id, output.message)

    # --- uploads

    def offer(self, work: Work, device_id: str, message: UploadOffer) -> None:
        """Answers an upload offer: a receipt, or a request for the chunks that are missing.

        Raises:
            IllegalEvent: it is too early for an upload.
        """
        blob, stored = message.blob, self.inputs.get(device_id)
        if stored is not None:
            accepted = stored == blob.sha256
            self._receipt(
                work, device_id, blob, "stored" if accepted else "another-stored", accepted=accepted
            )
            return
        secagg = self.state.of(device_id).secagg
        if isinstance(secagg, Advertising | Sharing):
            raise IllegalEvent("an upload before the shares were delivered")
        if not isinstance(secagg, Collecting):
            self._receipt(work, device_id, blob, "too-late")
            return
        if not machine.expects(self.state, device_id):
            self._receipt(work, device_id, blob, "not-in-round")
            return
        if blob.size != input_size(self.encoding):
            self._expel(work, device_id, blob, "wrong-size")
            return
        reception = self.receptions.get(device_id)
        if reception is None or reception.blob != blob:
            work.writer.open_upload(self.round_id, device_id, blob)
            reception = Reception.begin(blob)
        self._ask(work, device_id, reception, again=True)

    def receives(self, device_id: str, blob: BlobRef) -> bool:
        """Whether this blob is on its way from this device to this round."""
        reception = self.receptions.get(device_id)
        return reception is not None and reception.blob == blob

    def chunk(self, work: Work, device_id: str, message: BlobChunk, body: memoryview) -> None:
        """Stores a chunk of an upload that `receives` knows; the last one makes the input part of the sum."""
        reception = self.receptions[device_id]
        if message.index in reception.missing:
            work.writer.store_chunk(self.round_id, device_id, message.index, bytes(body))
        reception = reception.store(message.index)
        if not reception.complete:
            self._ask(work, device_id, reception, again=False)
            return
        del self.receptions[device_id]
        try:
            add_input(
                work.writer,
                self.round_id,
                device_id,
                reception.blob,
                self.encoding,
                self.state.of(device_id).number,
            )
        except UnusableInput as error:
            self._expel(work, device_id, reception.blob, error.code)
            return
        self.inputs[device_id] = reception.blob.sha256
        self._receipt(work, device_id, reception.blob, "stored", accepted=True)
        self.apply(work, MaskedInputStored(device_id))

    def _ask(self, work: Work, device_id: str, reception: Reception, *, again: bool) -> None:
        self.receptions[device_id], need = reception.ask(again=again)
        if need is not None:
            work.send(device_id, need)
        self.apply(work, DeviceHeard(device_id))

    def _receipt(
        self, work: Work, device_id: str, blob: BlobRef, code: str, *, accepted: bool = False
    ) -> None:
        work.send(device_id, UploadReceipt(round_id=self.round_id, blob=blob, accepted=accepted, code=code))

    def _expel(self, work: Work, device_id: str, blob: BlobRef, code: str) -> None:
        """Refuses an input that can never be used, and stops waiting for this device."""
        logger.warning("round %s: the masked input of %s is refused: %s", self.round_id[:8], device_id, code)
        self.receptions.pop(device_id, None)
        work.writer.drop_upload(self.round_id, device_id)
        self._receipt(work, device_id, blob, code)
        # Logged as the device's own leaving, so that the round's state still follows from its log alone.
        self.apply(work, MessageReceived(device_id, ClientAbort(round_id=self.round_id, code=code)))


def _buffer(record: Round) -> BufferReport | None:
    return RoundReport.from_bytes(record.report).buffer


def _parse(record: Round) -> tuple[SignedDocument, Plan]:
    document = SignedDocument.model_validate_json(record.plan)
    return document, Plan.from_bytes(document.payload)


def _document(reader: Reader, plan: Plan) -> SignedDocument | None:
    """The signed manifest of the version that devices need for a plan; None for a query or a buffer."""
    collects = isinstance(plan.task, TrainTask) and plan.task.order is not None
    about = None if collects else version_of(plan.task)
    version = None if about is None else reader.version(*about)
    return None if version is None else document_of(version)
