"""A whole cohort in one process, for tests: real clients, a real server, hooks to make things go wrong."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from protocol.identity import create_ca, issue_certificate
from protocol.messages import (
    ClientAbort,
    Roster,
    ShareDelivery,
    SurvivorSet,
    UnmaskRequest,
)
from protocol.secagg import client, server
from protocol.secagg.client_state import ClientState, Masking, RoundContext, dump_state, load_state
from protocol.secagg.masking import apply_masks
from protocol.secagg.parameters import GraphAssumptions
from protocol.secagg.prg import Keystream, derive_key
from protocol.secagg.server_state import Failed, Recovered, ServerContext, ServerState
from protocol.secagg.shamir import split
from protocol.secagg.subcohorts import WHOLE, Split
from protocol.transfer import describe

NOW = 1_800_000_000
FLEET = "orchard"
PLAN_HASH = hashlib.sha256(b"plan").digest()
ROUND_ID = "0123456789abcdef0123456789abcdef"


def entropy(*names: object) -> bytes:
    """32 bytes that a test can name: the same in every run."""
    return hashlib.sha256(repr(names).encode()).digest()


CA_KEY = Ed25519PrivateKey.from_private_bytes(entropy("ca"))
CA = create_ca(CA_KEY, FLEET, now=NOW, days=3650, serial=1)


def identity(device_id: str) -> Ed25519PrivateKey:
    """The identity key of a named test device."""
    return Ed25519PrivateKey.from_private_bytes(entropy("identity", device_id))


def certificate(device_id: str) -> bytes:
    """Its certificate, from the test fleet's CA."""
    serial = int.from_bytes(entropy("serial", device_id)[:8], "big")
    return issue_certificate(
        CA_KEY, CA, device_id, identity(device_id).public_key(), now=NOW, days=365, serial=serial
    )


def client_context(device_id: str, **changes: object) -> RoundContext:
    """What a device takes into the round."""
    values: dict[str, object] = {
        "fleet": FLEET,
        "round_id": ROUND_ID,
        "plan_hash": PLAN_HASH,
        "ca": CA,
        "device_id": device_id,
        "minimum_cohort": 2,
        "maximum_cohort": 64,
        "minimum_survivors": 2,
        "graph": GraphAssumptions(),
    }
    return RoundContext(**{**values, **changes})  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def dealt(owner: str, holder: int, size: int) -> tuple[bytes, bytes]:
    """(seed share, key share) that a device of `Cohort` deals the client at `holder` of a complete graph."""
    drawn, points = entropy("roster", owner), range(1, size + 1)
    seed = derive_key(drawn, purpose="self-mask-seed")
    key = derive_key(entropy("begin", owner), purpose="mask-private")
    return tuple(  # type: ignore[return-value]
        split(secret, 2 * size // 3 + 1, points, Keystream(derive_key(drawn, purpose=purpose)))[holder]
        for secret, purpose in ((seed, "shamir-seed"), (key, "shamir-key"))
    )


@dataclass
class Cohort:
    """Clients and server of one round; each phase is a method, and tests step in between.

    Attributes:
        size: clients invited.
        length: elements of the vector.
        alive: devices that still answer.
        reboot: every client state goes through its stored form after each event.
    """

    size: int
    length: int = 50
    minimum_survivors: int = 2
    reboot: bool = True
    graph: GraphAssumptions = field(default_factory=GraphAssumptions)
    split: Split = WHOLE
    clients: dict[str, ClientState] = field(default_factory=dict)
    inputs: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    aborts: dict[str, ClientAbort] = field(default_factory=dict)

    def __post_init__(self) -> None:
        devices = [f"device-{i:03d}" for i in range(self.size)]
        self.alive = set(devices)
        self.server: ServerState = server.begin(
            ServerContext(
                FLEET,
                ROUND_ID,
                PLAN_HASH,
                CA,
                frozenset(devices),
                2,
                self.minimum_survivors,
                self.graph,
                self.split,
            )
        )
        self.total = np.zeros(self.length, dtype=np.uint32)
        rng = np.random.default_rng(self.size)
        for device in devices:
            self.inputs[device] = rng.integers(0, 2**32, self.length, dtype=np.uint32)
            context = client_context(
                device,
                minimum_survivors=self.minimum_survivors,
                maximum_cohort=self.size,
                graph=self.graph,
                split=self.split,
            )
            self.clients[device] = client.begin(
                context, certificate(device), identity(device), entropy("begin", device)
            )

    def drop(self, *devices: str) -> None:
        """These devices answer nothing from now on."""
        self.alive -= set(devices)

    def give(self, device: str, event: client.Event) -> client.Answer:
        """Hands an event to a client, through a reboot if asked; returns its answer."""
        state = self.clients[device]
        if self.reboot:
            state = load_state(*dump_state(state))
        self.clients[device], answer = client.handle(state, event)
        if isinstance(answer, ClientAbort):
            self.aborts[device] = answer
        return answer

    def receive(self, device: str, message: server.ClientMessage) -> None:
        """Hands a client's message to the server."""
        self.server = server.handle(self.server, server.Received(device, message, NOW))

    def close(self) -> None:
        """Ends the server's phase."""
        self.server = server.handle(self.server, server.ClosePhase())

    def advertise(self) -> None:
        for device in sorted(self.alive):
            self.receive(device, self.clients[device].answer)  # type: ignore[arg-type, union-attr]
        self.close()

    def event_for(self, device: str) -> client.Event:
        """The event that the server's current request is to this device."""
        request = server.request(self.server, device)
        if isinstance(request, Roster):
            return client.RosterReceived(request, entropy("roster", device), NOW)
        if isinstance(request, ShareDelivery):
            return client.SharesReceived(request)
        if isinstance(request, SurvivorSet):
            return client.SurvivorsReceived(request, identity(device))
        assert isinstance(request, UnmaskRequest)
        return client.UnmaskRequested(request)

    def exchange(self) -> None:
        """One request to each device that is alive and awaited, and its answer; then the phase ends."""
        for device in sorted(self.alive & server.awaited(self.server)):
            answer = self.give(device, self.event_for(device))
            if answer is not None:
                self.receive(device, answer)  # type: ignore[arg-type]
        self.close()

    def deliver(self) -> None:
        """Delivers the shares; every masked input is still to come."""
        for device in sorted(self.alive & server.awaited(self.server)):
            answer = self.give(device, self.event_for(device))
            if isinstance(answer, ClientAbort):
                self.receive(device, answer)

    def masked(self, device: str) -> NDArray[np.uint32]:
        """The masked input of a client that knows its masks."""
        state = self.clients[device]
        assert isinstance(state, Masking)
        vector = self.inputs[device].copy()
        apply_masks(vector, state.masks())
        return vector

    def upload(self, *, drop: frozenset[str] = frozenset()) -> None:
        """Everyone alive but `drop` uploads; then the phase ends."""
        for device in sorted(self.alive & server.awaited(self.server) - drop):
            if not isinstance(self.clients[device], Masking):
                continue
            vector = self.masked(device)
            self.give(device, client.InputMasked(describe(vector.tobytes())))
            self.total += vector
            self.server = server.handle(self.server, server.InputStored(device))
        self.drop(*drop)
        self.close()

    def run(self, drops: dict[str, set[str]] | None = None) -> Recovered | Failed:
        """Runs the round; `drops` maps a phase to the devices that answer nothing from it on."""
        drops = drops or {}
        steps = {
            "advertise": self.advertise,
            "share": self.exchange,
            "deliver": self.deliver,
            "upload": self.upload,
            "check": self.exchange,
            "unmask": self.exchange,
        }
        for phase, step in steps.items():
            self.drop(*drops.get(phase, set()))
            step()
            if isinstance(self.server, Failed):
                break
        assert isinstance(self.server, Recovered | Failed)
        return self.server

    def sum_of(self, devices: set[str]) -> NDArray[np.uint32]:
        """The plain sum of these devices' inputs, modulo 2^32."""
        return np.add.reduce([self.inputs[device] for device in sorted(devices)], dtype=np.uint32)

    def unmasked(self, end: Recovered) -> NDArray[np.uint32]:
        """The sum after its masks are removed."""
        vector = self.total.copy()
        apply_masks(vector, end.masks)
        return vector

    def names(self, indices: frozenset[int]) -> set[str]:
        """Device ids of roster indices."""
        assert isinstance(self.server, Recovered)
        return {self.server.cohort.members[index].device_id for index in indices}
