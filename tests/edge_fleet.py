"""Devices' cores and a real secure aggregation server in one process, for tests.

A `FakeDevice` carries out what the core wants with dictionaries in place of disk and broker. Its durable part
goes through the same serial forms as the real store, so that `reboot` is a kill at that point.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from edge_client.durable import (
    DURABLE,
    CloseRound,
    DropPending,
    ForgetVersion,
    PendingUpdate,
    RoundRecord,
    SaveContribution,
    SaveLocal,
    SavePending,
    SaveRound,
    SaveStanding,
    SaveVersion,
    StoreChunk,
)
from edge_client.events import (
    BlobFound,
    Connected,
    Evaluated,
    Event,
    Fault,
    FieldRead,
    FieldsDeclared,
    InputWritten,
    MessageReceived,
    Personalised,
    Stamp,
    Started,
    Ticked,
    TrainingFinished,
    UpdatePrepared,
    UpdateRead,
    VersionTested,
)
from edge_client.ledger import History
from edge_client.library import StoredStanding, StoredVersion, Version
from edge_client.masked_input import contribution_of, packed_slices, weighted
from edge_client.outputs import (
    Announce,
    Evaluate,
    FindBlob,
    KeepBlobs,
    MaskInput,
    Note,
    Personalise,
    PrepareUpdate,
    ReadField,
    ReadUpdate,
    Send,
    SendChunks,
    TestVersion,
    Train,
)
from edge_client.pending_file import dump_update, load_update
from edge_client.policy import DevicePolicy
from edge_client.profile import Profile
from edge_client.session import handle
from edge_client.session_state import Memory, SessionState, restore
from edge_client.training import Evaluation, LocalUpdate
from models.manifest import InputSpec, ModelManifest, ParameterSpec, SignatureSpec, describe
from protocol import ring
from protocol.codec import chunk_count
from protocol.dp.mechanism import decode
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters
from protocol.enrolment import EnrolmentBundle
from protocol.fields import BlobRef
from protocol.identity import SignedDocument, create_ca, issue_certificate
from protocol.messages import (
    BlobChunk,
    BlobNeed,
    FromDevice,
    Invitation,
    ModelAnnouncement,
    RoundEnd,
    ToDevice,
    TrainingOrder,
    UploadOffer,
    UploadReceipt,
    VersionFailure,
)
from protocol.plan import (
    MODEL_KIND,
    ORDER_KIND,
    PLAN_KIND,
    CohortParameters,
    Plan,
    TrainingParameters,
    TrainTask,
)
from protocol.round_encoding import round_encoding
from protocol.secagg import server
from protocol.secagg.client_state import dump_state, load_state
from protocol.secagg.masking import apply_masks
from protocol.secagg.server_state import Recovered, ServerContext, ServerState
from protocol.transfer import chunks
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment

NOW = 1_800_000_000
FLEET = "barn"
SIZE = 10


def entropy(*names: object) -> bytes:
    """32 bytes that a test can name: the same in every run."""
    return hashlib.sha256(repr(names).encode()).digest()


def key(*names: object) -> Ed25519PrivateKey:
    """A key that a test can name."""
    return Ed25519PrivateKey.from_private_bytes(entropy(*names))


CA_KEY, OPERATOR, STRANGER = key("ca"), key("operator"), key("stranger")
CA = create_ca(CA_KEY, FLEET, now=NOW, days=3650, serial=1)
GRAPH = b"graph" * 30_000
"""Three chunks long."""


def bundle(device_id: str, *, fleet: str = FLEET, now: int = NOW) -> EnrolmentBundle:
    """The enrolment bundle of a device whose key is `key("identity", device_id)`."""
    certificate = issue_certificate(
        CA_KEY, CA, device_id, key("identity", device_id).public_key(), now=now, days=365, serial=2
    )
    signer = OPERATOR.public_key().public_bytes_raw()
    return EnrolmentBundle(
        fleet=fleet,
        device_id=device_id,
        certificate=certificate,
        ca=CA,
        plan_signers=(signer,),
        model_signers=(signer,),
    )


def weights(version: int = 1) -> bytes:
    """The weights file of a version of the test model."""
    return np.full(SIZE, version / 10, "<f4").tobytes()


def manifest(
    version: int = 1, *, graph: bytes = GRAPH, name: str = "watch", local: tuple[int, ...] = ()
) -> ModelManifest:
    """A manifest of the test model; `local` are the sizes of its local parameters."""
    names = ("train", "infer", "get_weights", "set_weights", *(("start_local",) if local else ()))
    return ModelManifest(
        name=name,
        version=version,
        graph=describe(graph),
        weights=describe(weights(version)),
        signatures=tuple(SignatureSpec(name=n, inputs=("x",), outputs=("y",)) for n in names),
        input=InputSpec(shape=(3,), mean=(0.0,) * 3, std=(1.0,) * 3),
        labels=("left", "right"),
        loss="sparse_categorical_crossentropy",
        train_batch_size=4,
        parameter_count=SIZE,
        parameters=(ParameterSpec(name="w", shape=(SIZE,), offset=0),),
        local_parameters=tuple(
            ParameterSpec(name=f"own-{i}", shape=(size,), offset=sum(local[:i]))
            for i, size in enumerate(local)
        ),
    )


def announcement(
    model: ModelManifest, signer: Ed25519PrivateKey = OPERATOR, **changes: Any
) -> ModelAnnouncement:
    """The signed announcement of a version; `changes` are of its assignment, whose sequence is the number."""
    values: dict[str, Any] = {
        "fleet": FLEET,
        "model": model.name,
        "version": model.version,
        "manifest_sha256": model.sha256(),
        "sequence": model.version,
    }
    return announced(
        VersionAssignment(**{**values, **changes}),
        SignedDocument.create(signer, MODEL_KIND, model.to_bytes()),
        signer,
    )


def announced(
    assignment: VersionAssignment, document: SignedDocument | None, signer: Ed25519PrivateKey = OPERATOR
) -> ModelAnnouncement:
    """An announcement of these parts."""
    return ModelAnnouncement(
        assignment=SignedDocument.create(signer, ASSIGNMENT_KIND, assignment.to_bytes()), manifest=document
    )


def plan(round_id: str = "a" * 32, base: ModelManifest | None = None, **changes: Any) -> Plan:
    """A plan that a permissive device agrees to; `changes` replace its fields, or those of its task."""
    base = base or manifest()
    task = {
        "model": base.name,
        "base_version": base.version,
        "manifest_sha256": base.sha256(),
        "training": TrainingParameters(local_epochs=1, learning_rate=0.1),
    }
    task |= {name: changes.pop(name) for name in task if name in changes}
    values: dict[str, Any] = {
        "fleet": FLEET,
        "round_id": round_id,
        "task": TrainTask(**task),
        "privacy": PrivacyParameters(
            mode=PrivacyMode.NONE,
            clip_norm=10.0,
            noise_multiplier=0.0,
            delta=1e-5,
            bits=24,
            metric_slots=(MetricSlot(name="examples", bound=100.0),),
        ),
        "cohort": CohortParameters(size=8, minimum=3, minimum_survivors=2),
        "issued_at": NOW - 10,
        "expires_at": NOW + 3600,
    }
    return Plan(**{**values, **changes})


def invitation(signed: Plan, signer: Ed25519PrivateKey = OPERATOR) -> Invitation:
    """The signed invitation to a round."""
    return Invitation(plan=SignedDocument.create(signer, PLAN_KIND, signed.to_bytes()))


ORDER = "0" * 31 + "1"


def order(
    base: ModelManifest | None = None,
    order_id: str = ORDER,
    maximum: int = 2,
    signer: Ed25519PrivateKey = OPERATOR,
    **changes: Any,
) -> TrainingOrder:
    """A standing order to train from a version, which comes with it."""
    base = base or manifest()
    signed = buffer_plan(order_id, base, order_id, maximum, **changes)
    return TrainingOrder(
        plan=SignedDocument.create(signer, ORDER_KIND, signed.to_bytes()),
        manifest=SignedDocument.create(OPERATOR, MODEL_KIND, base.to_bytes()),
    )


def buffer_plan(
    round_id: str, base: ModelManifest, order_id: str = ORDER, maximum: int = 2, **changes: Any
) -> Plan:
    """A buffer that collects the updates of an order."""
    training = TrainingParameters(local_epochs=1, learning_rate=0.1, maximum_staleness=maximum)
    training = changes.pop("training", training)
    asked = plan(round_id, base, training=training, **changes)
    return asked.model_copy(update={"task": asked.task.model_copy(update={"order": order_id})})


PERMISSIVE = DevicePolicy(
    minimum_cohort=2, minimum_survivors=2, privacy_modes=frozenset(PrivacyMode), maximum_rounds_per_day=100
)


@dataclass
class Disk:
    """What survives a reboot, in its serial forms."""

    rounds: dict[str, tuple[RoundRecord, tuple[str, bytes]]] = field(default_factory=dict)
    joined_at: dict[str, int] = field(default_factory=dict)
    closed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, SaveVersion] = field(default_factory=dict)
    standings: dict[tuple[str, bool], SaveStanding] = field(default_factory=dict)
    ledger: list[SaveContribution] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    partial: dict[str, dict[int, bytes]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    local: dict[str, SaveLocal] = field(default_factory=dict)
    pending: dict[str, PendingUpdate] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def apply(self, output: object) -> None:
        """Carries out a durable output."""
        if isinstance(output, SaveRound):
            record = output.record
            self.rounds[record.client.context.round_id] = (record, dump_state(record.client))
            self.joined_at.setdefault(record.client.context.round_id, output.at)
        elif isinstance(output, CloseRound):
            self.closed[output.round_id] = output.outcome
            self.uploads.pop(output.round_id, None)
        elif isinstance(output, SaveContribution):
            self.ledger.append(output)
        elif isinstance(output, SaveLocal):
            self.local[output.model] = output
        elif isinstance(output, SavePending):
            self.pending[output.update.manifest.name] = output.update
        elif isinstance(output, DropPending):
            self.pending.pop(output.model, None)
        elif isinstance(output, SaveVersion):
            # In the order in which they were served, or failed.
            self.versions.pop(output.document.digest.hex(), None)
            self.versions[output.document.digest.hex()] = output
        elif isinstance(output, SaveStanding):
            assignment = output.assignment
            self.standings[assignment.model, assignment.device is not None] = output
        elif isinstance(output, ForgetVersion):
            self.versions.pop(output.sha256, None)
        elif isinstance(output, StoreChunk):
            self.partial.setdefault(output.blob.sha256, {})[output.index] = bytes(output.body)

    def find(self, blob: BlobRef) -> BlobFound:
        """Looks for a blob as the real store does."""
        if blob.sha256 in self.blobs:
            return BlobFound(blob, True)
        parts = self.partial.get(blob.sha256, {})
        if len(parts) < chunk_count(blob.size):
            return BlobFound(blob, False, tuple(sorted(parts)))
        data = b"".join(parts[i] for i in sorted(parts))
        del self.partial[blob.sha256]
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            return BlobFound(blob, False)
        self.blobs[blob.sha256] = data
        return BlobFound(blob, True)

    def memory(self) -> Memory:
        """What the next process finds."""
        active = [
            replace(record, client=load_state(*state))
            for round_id, (record, state) in self.rounds.items()
            if round_id not in self.closed
        ]
        assert len(active) <= 1
        return Memory(
            versions=tuple(
                StoredVersion(v.document, v.manifest, v.status, v.reason, place)
                for place, v in enumerate(self.versions.values(), 1)
            ),
            standings=tuple(
                StoredStanding(
                    VersionAssignment.from_bytes(s.document.payload),
                    None
                    if s.manifest is None
                    else Version(s.manifest, ModelManifest.from_bytes(s.manifest.payload)),
                )
                for s in self.standings.values()
            ),
            local=tuple(self.local.values()),
            pending=tuple(self.pending.values()),
            active=active[0] if active else None,
            used=frozenset(self.rounds),
            joined_at=tuple(self.joined_at.values()),
            contributed_at=tuple(item.entry.at for item in self.ledger),
            spent=History.of(item.entry for item in self.ledger).days,
        )


Job = Train | PrepareUpdate | ReadUpdate | Evaluate | ReadField | MaskInput | TestVersion | Personalise
Fate = Callable[[object], Event | None]
"""What a job becomes: an event, or None for "still busy"."""


class FakeDevice:
    """One device's core with a dictionary for a disk and a list for a network."""

    def __init__(self, device_id: str = "device-0", policy: DevicePolicy = PERMISSIVE) -> None:
        self.profile = Profile.enrolled(bundle(device_id), key("identity", device_id), policy=policy)
        self.device_id = device_id
        self.disk = Disk()
        self.outbox: list[FromDevice] = []
        self.chunks: list[tuple[BlobChunk, bytes]] = []
        self.statuses: list[dict[str, int]] = []
        self.failures: dict[str, VersionFailure] = {}
        self.notes: list[Note] = []
        self.jobs: list[Job] = []
        self.state: SessionState = restore(Memory())
        self.unix, self.steady, self._events = NOW, 0.0, 0
        self.local: NDArray[np.float32] | None = None
        self.delta = np.linspace(-1, 1, SIZE, dtype=np.float32) * (1 + int(device_id.rpartition("-")[2]))
        self.values: dict[str, float] = {}
        self.evaluation = Evaluation(0.5, 0.75, np.zeros((2, 2), np.int64), 40)
        self.give(Started())

    # --- the shell ---------------------------------------------------------------------------------------

    def give(self, event: Event) -> None:
        """Applies an event, and what follows from it at once."""
        self._events += 1
        stamp = Stamp(self.unix, self.steady, entropy(self.device_id, self._events))
        self.state, outputs = handle(self.profile, self.state, event, stamp)
        for output in outputs:
            if isinstance(output, DURABLE):
                self.disk.apply(output)
        for output in outputs:
            if isinstance(output, Send):
                self.outbox.append(output.message)
            elif isinstance(output, SendChunks):
                data = self.disk.uploads[output.round_id]
                for chunk, body in chunks(output.need.blob, data, output.need.indices):
                    self.chunks.append((chunk, bytes(body)))
            elif isinstance(output, Announce):
                self.statuses.append(dict(output.models))
                self.failures = dict(output.failures)
            elif isinstance(output, FindBlob):
                self.give(self.disk.find(output.blob))
            elif isinstance(output, KeepBlobs):
                self.disk.blobs = {d: b for d, b in self.disk.blobs.items() if d in output.digests}
            elif isinstance(output, Job):
                self.jobs.append(output)
            elif isinstance(output, Note):
                self.notes.append(output)

    def receive(self, message: ToDevice, body: bytes = b"") -> None:
        """A message comes from the aggregator."""
        self.give(MessageReceived(message, body))

    def take(self) -> list[FromDevice]:
        """What was sent since the last call."""
        sent, self.outbox = self.outbox, []
        return sent

    def tick(self, seconds: float = 0.0) -> None:
        """Time passes."""
        self.steady += seconds
        self.unix += int(seconds)
        self.give(Ticked())

    def reboot(self) -> None:
        """Kills the process here, and starts another one."""
        self.state = restore(self.disk.memory())
        self.outbox, self.jobs = [], []
        for round_id in list(self.disk.uploads):
            if self.state.active is None or self.state.active.round_id != round_id:
                del self.disk.uploads[round_id]
        self.give(Started())
        self.give(Connected())

    def work(self, count: int | None = None) -> None:
        """Does the worker's jobs, and those that follow."""
        while self.jobs and count != 0:
            job = self.jobs.pop(0)
            if isinstance(job, TestVersion):
                self.give(VersionTested(job.sha256, None))
            elif isinstance(job, ReadField):
                self.give(FieldRead(job.round_id, self.values[job.field]))
            elif isinstance(job, Train):
                self.give(TrainingFinished(job.round_id, self.update()))
            elif isinstance(job, PrepareUpdate):
                data = dump_update(weighted(contribution_of(self.update()), job.clip_norm, 1.0))
                blob = describe(data)
                self.disk.files[blob.sha256] = data
                self.give(UpdatePrepared(job.manifest.name, job.order, blob))
            elif isinstance(job, ReadUpdate):
                self.give(UpdateRead(job.round_id, load_update(self.disk.files[job.blob.sha256])))
            elif isinstance(job, Evaluate):
                self.give(Evaluated(job.round_id, self.evaluation))
            elif isinstance(job, Personalise):
                self.give(
                    Personalised(
                        job.manifest.name, Fault("data-unusable", "too few examples"), job.manifest.sha256()
                    )
                )
            else:
                parts = packed_slices(job.contribution, job.encoding, job.masks, job.noise_key)
                data = b"".join(parts)
                self.disk.uploads[job.round_id] = data
                own = job.contribution.local
                local = describe(own.tobytes()) if own is not None else None
                self.give(InputWritten(job.round_id, describe(data), local))
            count = None if count is None else count - 1

    def update(self) -> LocalUpdate:
        """What the fake training gives."""
        return LocalUpdate(self.delta, 7, 1.0, 0.5, 0.9, self.local)

    def declare(self, **values: float) -> None:
        """The owner declares fields; an underscore stands for a hyphen."""
        self.values |= {name.replace("_", "-"): value for name, value in values.items()}
        self.give(FieldsDeclared(frozenset(self.values)))

    # --- shortcuts ---------------------------------------------------------------------------------------

    def install(self, model: ModelManifest | None = None, graph: bytes = GRAPH) -> None:
        """Announces a version and serves its download until it is good."""
        model = model or manifest()
        self.receive(announcement(model))
        serve(self, {model.graph.sha256: graph, model.weights.sha256: weights(model.version)})
        self.work()

    def note_events(self) -> list[str]:
        """Names of the notes so far."""
        return [item.event for item in self.notes]

    def phase(self) -> str | None:
        """The phase of the active round."""
        return type(self.state.active.client).__name__ if self.state.active else None


def serve(device: FakeDevice, blobs: dict[str, bytes], *, lose: Iterable[int] = ()) -> int:
    """Answers a device's requests for chunks from `blobs`; returns how many chunks went out."""
    sent, losses = 0, set(lose)
    while needs := [message for message in device.outbox if isinstance(message, BlobNeed)]:
        device.outbox = [message for message in device.outbox if not isinstance(message, BlobNeed)]
        for need in needs:
            if need.blob.sha256 not in blobs:
                continue
            for chunk, body in chunks(need.blob, blobs[need.blob.sha256], need.indices):
                if sent not in losses:
                    device.receive(chunk, bytes(body))
                sent += 1
    return sent


@dataclass
class Aggregator:
    """A real secure aggregation server that talks to fake devices; each phase is a method."""

    devices: list[FakeDevice]
    plan: Plan
    lost: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.by_id = {device.device_id: device for device in self.devices}
        self.document = invitation(self.plan).plan
        task = self.plan.task
        self.dimension = SIZE if isinstance(task, TrainTask) else task.dimension
        self.state: ServerState = server.begin(
            ServerContext(
                fleet=FLEET,
                round_id=self.plan.round_id,
                plan_hash=self.document.digest,
                ca=CA,
                invited=frozenset(self.by_id),
                minimum_cohort=self.plan.cohort.minimum,
                minimum_survivors=self.plan.cohort.minimum_survivors,
                graph=self.plan.cohort.graph,
            )
        )
        self.encoding = round_encoding(self.plan, self.document.digest, self.dimension)
        self.total = np.zeros(self.encoding.length, np.uint32)
        self.received: dict[str, bytes] = {}

    def alive(self) -> list[FakeDevice]:
        """Devices that still answer."""
        return [device for device in self.devices if device.device_id not in self.lost]

    def collect(self) -> None:
        """Takes what the devices sent: answers go to the server, offers are pulled."""
        for device in self.alive():
            for message in device.take():
                if isinstance(message, UploadOffer):
                    self.pull(device, message)
                elif not isinstance(message, BlobNeed):
                    self.hear(device, message)

    def hear(self, device: FakeDevice, message: Any) -> None:
        """Hands an answer to the server; one for another phase is dropped, as the real service does."""
        with contextlib.suppress(server.IllegalEvent):
            self.state = server.handle(self.state, server.Received(device.device_id, message, NOW))

    def pull(self, device: FakeDevice, offer: UploadOffer) -> None:
        """Downloads a masked input and adds it, once."""
        count = chunk_count(offer.blob.size)
        device.receive(BlobNeed(blob=offer.blob, indices=tuple(range(count))))
        data = b"".join(body for _, body in device.chunks[-count:])
        assert describe(data) == offer.blob
        known = self.received.setdefault(device.device_id, data)
        assert known == data, "a second, different masked input"
        if device.device_id not in getattr(self, "stored", set()):
            self.stored = {*getattr(self, "stored", set()), device.device_id}
            vector = ring.unpack(data, self.encoding.length, self.encoding.bits)
            self.total = ring.add(self.total, vector, self.encoding.bits)
            self.state = server.handle(self.state, server.InputStored(device.device_id))
        device.receive(UploadReceipt(round_id=self.plan.round_id, blob=offer.blob, accepted=True))

    def ask(self) -> None:
        """Sends the current phase's request to every device that is awaited."""
        for device_id in sorted(server.awaited(self.state)):
            if device_id in self.lost:
                continue
            request = server.request(self.state, device_id)
            message: Any = Invitation(plan=self.document) if request is None else request
            self.by_id[device_id].receive(message)

    def close(self) -> None:
        """Ends the phase."""
        self.state = server.handle(self.state, server.ClosePhase())

    def step(self, between: Callable[[FakeDevice], None] | None = None) -> None:
        """One phase: ask, let the devices work, collect, close."""
        self.ask()
        for device in self.alive():
            if between is not None:
                between(device)
            device.work()
        self.collect()
        self.close()

    def run(self, between: Callable[[FakeDevice], None] | None = None) -> Recovered:
        """A whole round; `between` disturbs each device after each request."""
        for _ in range(5):
            self.step(between)
        assert isinstance(self.state, Recovered), self.state
        return self.state

    def mean(self) -> tuple[NDArray[np.float32], dict[str, float]]:
        """The mean update and metrics of the survivors."""
        assert isinstance(self.state, Recovered)
        total = self.total.copy()
        apply_masks(total, self.state.masks)
        total &= np.uint32(ring.modulus_mask(self.encoding.bits))
        return decode(total, len(self.state.survivors), self.encoding)

    def end(self, *, completed: bool = True) -> None:
        """Tells everyone that the round is over."""
        for device in self.alive():
            device.receive(RoundEnd(round_id=self.plan.round_id, completed=completed))
