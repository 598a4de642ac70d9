"""What the fuzzer runs: one function of bytes for each way into Covey, and what to begin with.

Nothing but the typed errors may leave them, whatever the bytes. `tests.fuzz_wire` says more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from models.manifest import InvalidManifest, ModelManifest
from protocol import transcript
from protocol.codec import decode_from_device, decode_to_device, encode
from protocol.dp.parameters import PrivacyMode, PrivacyParameters
from protocol.enrolment import EnrolmentAnswer, EnrolmentRequest, EnrolmentTicket
from protocol.errors import BadSignature, IllegalEvent, MalformedMessage, ProtocolError
from protocol.identity import create_request, open_request, verify_certificate
from protocol.messages import Roster, ShareDelivery, SurvivorSet, UnmaskRequest
from protocol.plan import CohortParameters, Plan, TrainingParameters, TrainTask
from protocol.secagg import client, server
from protocol.secagg.client_state import ClientState
from protocol.secagg.key_agreement import agree, check_public_key
from protocol.secagg.server_state import ServerState
from tests.aggregator_devices import model_files
from tests.secagg_round import CA, FLEET, NOW, ROUND_ID, Cohort, certificate, entropy, identity

VICTIM = "device-001"
PLANTED = "a planted defect"
FRAMED = frozenset({"frames", "server", "client"})
"""Targets whose bytes are a frame: a length, JSON, a body. Those of `documents` are JSON alone."""


class Round:
    """A real round of four devices, one of which drops out, with everything that was said in it."""

    def __init__(self) -> None:
        self.servers: list[ServerState] = []
        self.clients: list[ClientState] = []
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        cohort = Cohort(4, reboot=False)
        give, receive = cohort.give, cohort.receive

        def told(device: str, event: client.Event) -> client.Answer:
            if device == VICTIM:
                self.clients.append(cohort.clients[device])
                if not isinstance(event, client.InputMasked | client.RoundEnded):
                    self.down.append(encode(event.message))
            return give(device, event)

        def heard(device: str, message: server.ClientMessage) -> None:
            self.servers.append(cohort.server)
            self.up.append(encode(message))
            receive(device, message)

        cohort.give, cohort.receive = told, heard  # type: ignore[method-assign]
        cohort.run({"upload": {"device-003"}})
        self.servers.append(cohort.server)
        self.clients.append(cohort.clients[VICTIM])


ROUND = Round()


def frames(data: bytes) -> None:
    """Parses in both directions; what parses is stable."""
    for decode in (decode_from_device, decode_to_device):
        try:
            message, body = decode(data)
        except MalformedMessage:
            continue
        again, same = decode(encode(message, body))
        assert again == message, "a message changes on its way"
        assert same == body, "a body changes on its way"


def documents(data: bytes) -> None:
    """Parses what signatures are about."""
    with contextlib.suppress(MalformedMessage):
        assert Plan.from_bytes(Plan.from_bytes(data).to_bytes()).round_id, "a plan changes on its way"
    with contextlib.suppress(InvalidManifest):
        ModelManifest.from_bytes(data)
    with contextlib.suppress(transcript.BrokenTranscript):
        transcript.verify([data], transcript.GENESIS)


def keys(data: bytes) -> None:
    """Parses certificates, requests and public keys."""
    with contextlib.suppress(BadSignature):
        verify_certificate(data, CA, now=NOW)
    with contextlib.suppress(BadSignature):
        open_request(data)
    public = (data + bytes(32))[:32]
    with contextlib.suppress(BadSignature):
        check_public_key(public)
        agree(entropy("fuzz"), public, purpose="fuzz", context=b"")


def enrolments(data: bytes) -> None:
    """Parses tickets, and what a device and the API say to each other about one."""
    with contextlib.suppress(MalformedMessage):
        ticket = EnrolmentTicket.from_text(data.decode(errors="replace"))
        assert EnrolmentTicket.from_text(ticket.to_text()) == ticket, "a ticket changes on its way"
        assert all(ticket.address), "a ticket leads nowhere"
    with contextlib.suppress(MalformedMessage):
        EnrolmentRequest.from_bytes(data)
    with contextlib.suppress(MalformedMessage, BadSignature):
        EnrolmentAnswer.from_bytes(data).bundle.verify(now=NOW)


def the_server(data: bytes) -> None:
    """Hands a device's message to the server in each of its phases; what it asks next must be sayable."""
    try:
        message, _ = decode_from_device(data)
    except MalformedMessage:
        return
    if not isinstance(message, server.ClientMessage):
        return
    for state in ROUND.servers:
        try:
            after = server.handle(state, server.Received(VICTIM, message, NOW))
            server.handle(after, server.ClosePhase())
        except ProtocolError:
            continue


def the_client(data: bytes) -> None:
    """Hands a message to the client in each of its phases: it answers, aborts, or says that it is too
    early."""
    try:
        message, _ = decode_to_device(data)
    except MalformedMessage:
        return
    event: client.Event
    if isinstance(message, Roster):
        event = client.RosterReceived(message, entropy("fuzz"), NOW)
    elif isinstance(message, ShareDelivery):
        event = client.SharesReceived(message)
    elif isinstance(message, SurvivorSet):
        event = client.SurvivorsReceived(message, identity(VICTIM))
    elif isinstance(message, UnmaskRequest):
        event = client.UnmaskRequested(message)
    else:
        return
    for state in ROUND.clients:
        with contextlib.suppress(IllegalEvent):
            _, answer = client.handle(state, event)
            if answer is not None:
                encode(answer)


def planted(data: bytes) -> None:
    """A parser with a defect, for the test of the fuzzer."""
    if data[:3] == b"\x00ab":
        raise ValueError(PLANTED)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frames": frames,
    "documents": documents,
    "keys": keys,
    "enrolments": enrolments,
    "server": the_server,
    "client": the_client,
    "planted": planted,
}


def _documents() -> Iterator[bytes]:
    task = TrainTask(
        model="toy",
        base_version=1,
        manifest_sha256="0" * 64,
        training=TrainingParameters(local_epochs=1, learning_rate=0.1),
    )
    yield Plan(
        fleet=FLEET,
        round_id=ROUND_ID,
        task=task,
        privacy=PrivacyParameters(
            mode=PrivacyMode.NONE, clip_norm=1.0, noise_multiplier=0.0, bits=16, delta=1e-5
        ),
        cohort=CohortParameters(size=8, minimum=3, minimum_survivors=2),
        issued_at=NOW,
        expires_at=NOW + 60,
    ).to_bytes()
    yield model_files()[0]
    contents = (transcript.RosterRecord(roster_hash=bytes(32), size=3), transcript.AbortRecord(code="policy"))
    for content in contents:
        yield (
            transcript.Record(round_id=ROUND_ID, previous=transcript.GENESIS, content=content)
            .model_dump_json()
            .encode()
        )


def seeds(target: str) -> Iterator[bytes]:
    """What real devices and a real server say, to begin with."""
    if target == "documents":
        yield from _documents()
    if target == "enrolments":
        token, request = f"{'0' * 12}_{'1' * 64}", create_request(identity(VICTIM), VICTIM)
        yield EnrolmentRequest(token=token, request=request).model_dump_json().encode()
        ticket = EnrolmentTicket(url="https://[::1]:8443", name=VICTIM, token=token, trust_sha256="2" * 64)
        yield ticket.to_text().encode()
    if target in ("frames", "server"):
        yield from ROUND.up
    if target in ("frames", "client"):
        yield from ROUND.down
    if target == "keys":
        yield certificate(VICTIM)
        yield create_request(identity(VICTIM), VICTIM)
