"""Simulated devices for tests of the aggregator: the real client state machine, a vector of one's choice."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from aggregator.operations import Operator
from models.manifest import ModelManifest
from protocol import ring, topics
from protocol.codec import decode_to_device, encode
from protocol.dp.mechanism import EncodingParameters
from protocol.dp.mechanism import encode as encode_vector
from protocol.enrolment import EnrolmentBundle
from protocol.errors import IllegalEvent
from protocol.evaluation import evaluation_vector
from protocol.fields import BlobRef
from protocol.identity import create_request
from protocol.messages import (
    BlobNeed,
    DeviceStatus,
    FromDevice,
    Invitation,
    Refusal,
    Roster,
    RoundEnd,
    ShareDelivery,
    SurvivorSet,
    TrainingOrder,
    UnmaskRequest,
    UpdateReady,
    UploadOffer,
    UploadReceipt,
)
from protocol.plan import ORDER_KIND, PLAN_KIND, EvaluateTask, Plan, QueryTask, TrainTask
from protocol.queries import answer_vector
from protocol.round_encoding import round_encoding
from protocol.secagg import client
from protocol.secagg.client_state import ClientState, Ended, Masking, RoundContext
from protocol.secagg.masking import apply_masks
from protocol.transfer import chunks, describe

GRAPH = b"a graph that nobody runs" * 100
Outgoing = tuple[str, bytes]
"""Topic and frame."""


def model_files(parameters: int = 1000, *, name: str = "toy", seed: int = 0) -> tuple[bytes, bytes, bytes]:
    """Manifest, graph and weights of a model that nobody can run, but everybody can transfer."""
    weights = np.random.default_rng(seed).normal(size=parameters).astype("<f4").tobytes()
    signatures = tuple(
        {"name": name, "inputs": ("x",), "outputs": ("y",)}
        for name in ("train", "infer", "get_weights", "set_weights")
    )
    manifest = ModelManifest.model_validate(
        {
            "name": name,
            "version": 1,
            "graph": describe(GRAPH),
            "weights": describe(weights),
            "signatures": signatures,
            "input": {"shape": (2,), "mean": (0.0, 0.0), "std": (1.0, 1.0)},
            "labels": ("no", "yes"),
            "loss": "sparse_categorical_crossentropy",
            "train_batch_size": 8,
            "parameter_count": parameters,
            "parameters": ({"name": "w", "shape": (parameters,), "offset": 0},),
        }
    )
    return manifest.to_bytes(), GRAPH, weights


def toy_input(device_id: str, encoding: EncodingParameters) -> NDArray[np.uint32]:
    """The integers that a simulated device contributes: small, so that no sum overflows."""
    seed = int.from_bytes(hashlib.sha256(device_id.encode()).digest()[:8], "big")
    limit = encoding.radius // 64
    integers = np.random.default_rng(seed).integers(-limit, limit + 1, encoding.length)
    return ring.reduce(integers, encoding.bits)


@dataclass
class SimulatedDevice:
    """One device: `receive` a frame, get the frames that it answers with.

    Attributes:
        parameters: of the model, for the encoding.
        mute: message types that it does not send; a set of them makes a dropout.
        vector: what it contributes to training.
        values: of the fields that it answers queries over.
        figures: what it finds when it evaluates a version.
        offers: blobs that it has offered.
        ends: the ends of rounds that it was told, by round.
        refused: upload receipts that refused.
        stored: rounds that acknowledged its upload.
        asked: rounds that asked it to unmask.
        waiting: its update for a buffer, by the order that it was trained by; on disk, as it were.
    """

    bundle: EnrolmentBundle
    identity: Ed25519PrivateKey
    parameters: int
    online: bool = True
    mute: set[str] = field(default_factory=set)
    vector: Callable[[str, EncodingParameters], NDArray[np.uint32]] = toy_input
    values: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    session: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    plan: Plan | None = None
    plan_hash: bytes = b""
    state: ClientState | None = None
    blob: bytes = b""
    accepted: bool = False
    ends: dict[str, RoundEnd] = field(default_factory=dict)
    refused: list[UploadReceipt] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    received: list[str] = field(default_factory=list)
    waiting: dict[str, UpdateReady] = field(default_factory=dict)

    @classmethod
    def enrol(cls, operator: Operator, device_id: str, parameters: int) -> SimulatedDevice:
        """Makes a device and enrols it."""
        identity = Ed25519PrivateKey.generate()
        return cls(operator.enrol(create_request(identity, device_id)), identity, parameters)

    @property
    def device_id(self) -> str:
        return self.bundle.device_id

    def birth(self) -> Outgoing:
        """A new session."""
        self.session = secrets.token_bytes(32)
        self.online = True
        status = DeviceStatus(session=self.session, online=True, client_version="test", models={})
        return topics.up(self.device_id, "status"), encode(status)

    def will(self) -> Outgoing:
        """The end of the session."""
        self.online = False
        status = DeviceStatus(session=self.session, online=False, models={})
        return topics.up(self.device_id, "status"), encode(status)

    def crash(self) -> None:
        """Loses everything, as a device does that kept nothing on disk."""
        self.plan, self.state, self.blob, self.accepted = None, None, b"", False

    def repeat(self) -> list[Outgoing]:
        """What it sends again when nothing comes."""
        if not self.blob or self.accepted or self.plan is None:
            return []
        return self._say(UploadOffer(round_id=self.plan.round_id, blob=describe(self.blob)))

    def receive(self, frame: bytes) -> list[Outgoing]:
        """Takes in one frame; returns what it answers."""
        message, _ = decode_to_device(frame)
        self.received.append(message.type)
        if isinstance(message, RoundEnd):
            self.ends[message.round_id] = message
            self.waiting.pop(message.round_id, None)
            if self.plan is not None and self.plan.round_id == message.round_id:
                self.crash()
            return []
        if isinstance(message, Invitation):
            return self._join(message)
        if isinstance(message, TrainingOrder):
            return self._train(message)
        if isinstance(message, BlobNeed):
            return self._upload(message.blob, message.indices)
        if isinstance(message, UploadReceipt):
            self.accepted = self.accepted or message.accepted
            if message.accepted:
                self.stored.add(message.round_id)
            else:
                self.refused.append(message)
            return []
        if not isinstance(message, Roster | ShareDelivery | SurvivorSet | UnmaskRequest):
            return []
        if isinstance(message, UnmaskRequest):
            self.asked.add(message.round_id)
        if self.plan is None or self.state is None or message.round_id != self.plan.round_id:
            return []
        return self._step(message)

    def _train(self, message: TrainingOrder) -> list[Outgoing]:
        """Trains in no time, unless an update waits already; says which one does."""
        order = Plan.from_bytes(message.plan.open(ORDER_KIND, self.bundle.plan_keys()))
        assert isinstance(order.task, TrainTask)
        ready = UpdateReady(order=order.round_id, version=order.task.base_version)
        return self._say(self.waiting.setdefault(order.round_id, ready))

    def _join(self, message: Invitation) -> list[Outgoing]:
        keys = self.bundle.plan_keys()
        plan = Plan.from_bytes(message.plan.open(PLAN_KIND, keys))
        if isinstance(plan.task, QueryTask) and plan.task.field not in self.values:
            refusal = Refusal(round_id=plan.round_id, code="unknown-field", detail=plan.task.field)
            return self._say(refusal)
        if self.plan is None or self.plan.round_id != plan.round_id:
            self.plan, self.plan_hash, self.blob, self.accepted = plan, message.plan.digest, b"", False
            context = RoundContext(
                fleet=plan.fleet,
                round_id=plan.round_id,
                plan_hash=message.plan.digest,
                ca=self.bundle.ca,
                device_id=self.device_id,
                minimum_cohort=plan.cohort.minimum,
                maximum_cohort=plan.cohort.split.largest,
                minimum_survivors=plan.cohort.minimum_survivors,
                graph=plan.cohort.graph,
                split=plan.cohort.split,
            )
            self.state = client.begin(
                context, self.bundle.certificate, self.identity, secrets.token_bytes(32)
            )
        answer = getattr(self.state, "answer", None)
        return [] if answer is None else self._say(answer)

    def _step(self, message: Roster | ShareDelivery | SurvivorSet | UnmaskRequest) -> list[Outgoing]:
        assert self.state is not None
        assert self.plan is not None
        event: client.Event
        if isinstance(message, Roster):
            event = client.RosterReceived(message, secrets.token_bytes(32), self.plan.issued_at)
        elif isinstance(message, ShareDelivery):
            event = client.SharesReceived(message)
        elif isinstance(message, SurvivorSet):
            event = client.SurvivorsReceived(message, self.identity)
        else:
            event = client.UnmaskRequested(message)
        try:
            self.state, answer = client.handle(self.state, event)
        except IllegalEvent:
            return []
        if isinstance(self.state, Masking):
            return self._mask(self.state)
        return [] if answer is None else self._say(answer)

    def encoding(self) -> EncodingParameters:
        assert self.plan is not None
        task = self.plan.task
        dimension = task.dimension if isinstance(task, QueryTask | EvaluateTask) else self.parameters
        return round_encoding(self.plan, self.plan_hash, dimension)

    def _mask(self, state: Masking) -> list[Outgoing]:
        encoding = self.encoding()
        assert self.plan is not None
        vector = self.vector(self.device_id, encoding).copy()
        if isinstance(self.plan.task, TrainTask) and self.plan.task.order is not None:
            # As soon as it is masked for one buffer, it is in no other.
            del self.waiting[self.plan.task.order]
        if isinstance(self.plan.task, QueryTask):
            answer = answer_vector(self.plan.task, self.values[self.plan.task.field])
            vector = encode_vector(answer, {}, encoding, secrets.token_bytes(32))
        if isinstance(self.plan.task, EvaluateTask):
            said = evaluation_vector(self.plan.task, self.figures)
            vector = encode_vector(said, {}, encoding, secrets.token_bytes(32))
        apply_masks(vector, state.masks())
        self.blob = ring.pack(vector & np.uint32(ring.modulus_mask(encoding.bits)), encoding.bits)
        self.state, _ = client.handle(state, client.InputMasked(describe(self.blob)))
        return self.repeat()

    def _upload(self, blob: BlobRef, indices: tuple[int, ...]) -> list[Outgoing]:
        if "blob-chunk" in self.mute or not self.blob or describe(self.blob) != blob:
            return []
        topic = topics.up(self.device_id, "chunk")
        return [(topic, encode(chunk, body)) for chunk, body in chunks(blob, self.blob, indices)]

    def _say(self, message: FromDevice) -> list[Outgoing]:
        if message.type in self.mute or isinstance(self.state, Ended):
            return []
        return [(topics.up(self.device_id, "msg"), encode(message))]
