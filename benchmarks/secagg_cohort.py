"""A cohort for `benchmarks/secagg.py`: one measured client, and the others around it.

All devices have a real identity, certificate, check-in, secrets, Shamir shares and signatures, so that every
byte that the server checks or recovers is real. Up to `REAL_UP_TO` devices all run the real client. In larger
cohorts only the measured client does; the others are stand-ins that

- do not verify the roster and do not open what is sealed for them (they know the shares in the clear),
- seal for the measured client only, and 82 zero bytes for others,
- upload one and the same vector, except for one of them, whose vector also carries all masks that must
  remain in the sum, made from the devices' own secrets. So the sum comes out right only if the server
  recovers every one of these masks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.secagg_server import CODEC, NOW
from protocol.codec import decode_to_device, encode
from protocol.columns import SealedColumn, ShareColumn
from protocol.fields import BlobRef
from protocol.identity import sign
from protocol.messages import (
    ConsistencySignature,
    Roster,
    ShareDelivery,
    ShareKeys,
    SurvivorSet,
    UnmaskingShares,
)
from protocol.secagg import client
from protocol.secagg import parameters as parameters_module
from protocol.secagg import roster as rosters
from protocol.secagg.certificates import CertificateCache
from protocol.secagg.client_state import Aborted, Advertised, Masking
from protocol.secagg.graph import all_neighbours
from protocol.secagg.key_agreement import load_private
from protocol.secagg.masking import (
    Mask,
    masked_slices,
    pairwise_mask,
    seed_commitment,
    self_mask,
)
from protocol.secagg.packing import SlicePacker
from protocol.secagg.parameters import GraphAssumptions, GraphParameters, parameters
from protocol.secagg.prg import Keystream
from protocol.secagg.roster_check import verify_roster
from protocol.secagg.sealed_shares import channel, seal, unseal
from protocol.secagg.shamir import split
from tests.secagg_round import ROUND_ID, certificate, client_context, entropy, identity

REAL_UP_TO = 128
MEASURED = 0
"""The roster index of the measured client; it survives."""

T = TypeVar("T")


def device_name(index: int) -> str:
    """Names sort as their roster indices do, when everyone checks in."""
    return f"device-{index:05d}"


@dataclass
class Stopwatch:
    """CPU seconds by part; a call is repeated, and the fastest counts."""

    repeats: int
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, seconds: float) -> None:
        """Adds to a part."""
        self.parts[part] = self.parts.get(part, 0.0) + seconds

    def best(self, function: Callable[[], T]) -> tuple[float, T]:
        """Runs a pure function several times; returns the least CPU seconds and its result."""
        best = float("inf")
        for _ in range(self.repeats):
            start = time.thread_time()
            result = function()
            best = min(best, time.thread_time() - start)
        return best, result

    def measure(self, part: str, function: Callable[[], T]) -> T:
        """Runs a pure function several times and adds the least time to `part`."""
        seconds, result = self.best(function)
        self.add(part, seconds)
        return result

    @property
    def cpu_s(self) -> float:
        """All parts but the codec, which neither the floor nor the peer has."""
        return sum(seconds for part, seconds in self.parts.items() if part != CODEC)


def begin(index: int, size: int, assumptions: GraphAssumptions) -> Advertised:
    """The real check-in of a device."""
    name = device_name(index)
    context = client_context(name, maximum_cohort=size, graph=assumptions)
    return client.begin(context, certificate(name), identity(name), entropy("begin", name))


class RealClient:
    """A device that runs the real client; measured, if it has a stopwatch."""

    def __init__(self, index: int, size: int, assumptions: GraphAssumptions, watch: Stopwatch | None) -> None:
        self.index, self.name, self.watch = index, device_name(index), watch
        self.uploaded = 0
        self.warm_saving_s = 0.0
        self._certificates = CertificateCache()
        if watch is None:
            self.state: Any = begin(index, size, assumptions)
            return
        parameters_module._smallest_regular.cache_clear()
        once = Stopwatch(1)
        once.measure("graph parameters", lambda: parameters(size, assumptions))
        watch.add("graph parameters", once.cpu_s)
        name, key = device_name(index), identity(device_name(index))
        own, context = certificate(name), client_context(name, maximum_cohort=size, graph=assumptions)
        self.state = watch.measure(
            "check-in keys", lambda: client.begin(context, own, key, entropy("begin", name))
        )

    def frame(self) -> bytes:
        """The last answer, as it is sent."""
        return self._counted(self.state.answer)

    def _counted(self, message: Any) -> bytes:
        encoded = self.watch.measure(CODEC, lambda: encode(message)) if self.watch else encode(message)
        self.uploaded += len(encoded)
        return encoded

    def _handle(self, part: str, make: Callable[[], client.Event]) -> None:
        state = self.state
        if self.watch is None:
            self.state, _ = client.handle(state, make())
        else:
            self.state, _ = self.watch.measure(part, lambda: client.handle(state, make()))
        if isinstance(self.state, Aborted):
            raise RuntimeError(f"{self.name} aborted: {self.state.answer}")

    def receive(self, frame: bytes) -> None:
        """Handles a request of the server."""
        watch = self.watch
        message: Any = (
            watch.measure(CODEC, lambda: decode_to_device(frame)) if watch else decode_to_device(frame)
        )[0]
        if isinstance(message, Roster):
            self._receive_roster(message)
        elif isinstance(message, ShareDelivery):
            self._handle("take delivery", lambda: client.SharesReceived(message))
        elif isinstance(message, SurvivorSet):
            key = identity(self.name)
            self._handle("sign survivors", lambda: client.SurvivorsReceived(message, key))
        else:
            self._handle("verify quorum, open shares", lambda: client.UnmaskRequested(message))

    def _receive_roster(self, message: Roster) -> None:
        drawn, state = entropy("roster", self.name), self.state
        if self.watch is None:
            self._handle("", lambda: client.RosterReceived(message, drawn, NOW, self._certificates))
            return
        cold, _ = self.watch.best(
            lambda: verify_roster(state.context, state.answer, message, NOW, CertificateCache())
        )
        known = CertificateCache()
        verify_roster(state.context, state.answer, message, NOW, known)
        warm, _ = self.watch.best(lambda: verify_roster(state.context, state.answer, message, NOW, known))
        self.warm_saving_s = cold - warm
        both = "share keys"
        self._handle(both, lambda: client.RosterReceived(message, drawn, NOW, CertificateCache()))
        self.watch.add("verify roster", cold)
        # Two clocks that are read apart: on a busy machine the difference can fall below nothing.
        self.watch.add("make and seal shares", max(0.0, self.watch.parts.pop(both) - cold))

    def masked_input(self, vector: NDArray[np.uint32], bits: int) -> list[tuple[int, bytes]]:
        """The packed slices of the masked vector."""
        state = self.state
        assert isinstance(state, Masking)
        watch = self.watch or Stopwatch(1)
        masks = watch.measure("agree on masks", state.masks)
        packer = SlicePacker(bits)
        best: tuple[float, float, list[tuple[int, bytes]]] = (float("inf"), 0.0, [])
        for _ in range(watch.repeats):
            slices, packing, start = [], 0.0, time.thread_time()
            for begins, part in masked_slices(vector, masks):
                before = time.thread_time()
                slices.append((begins, packer.pack(part)))
                packing += time.thread_time() - before
            best = min(best, (time.thread_time() - start, packing, slices), key=lambda run: run[0])
        watch.add("mask", best[0] - best[1])
        watch.add("pack bits", best[1])
        stored = BlobRef(sha256="0" * 64, size=sum(len(packed) for _, packed in best[2]))
        self.uploaded += stored.size
        self._handle("mask", lambda: client.InputMasked(stored))
        return best[2]


class StandIns:
    """All devices of a large cohort but the measured one."""

    def __init__(self, states: list[Advertised], measured: RealClient) -> None:
        self._states = states
        membership = measured.state.membership
        self.graph: GraphParameters = membership.graph
        self.roster_hash: bytes = membership.roster_hash
        self.near = all_neighbours(self.graph, self.roster_hash)
        self._sealed = measured.state.answer.shares.by_peer()
        self._seeds = [entropy("seed", i) for i in range(self.graph.size)]
        self._seeds[MEASURED] = measured.state.secrets.seed
        self._shares: list[dict[int, tuple[bytes, bytes]]] = [{} for _ in states]

    def share(self, index: int) -> bytes:
        """The frame with this device's shares."""
        state, near = self._states[index], self.near[index]
        holders = sorted({*near, index}) if self.graph.complete else near
        made = [
            split(secret, self.graph.threshold, [h + 1 for h in holders], Keystream(entropy(name, index)))
            for name, secret in (("key", state.keys.mask_private), ("seed", self._seeds[index]))
        ]
        self._shares[index] = dict(zip(holders, zip(*made, strict=True), strict=True))
        receiver = self._states[MEASURED].answer.encryption_key
        name, sealed = self.roster_hash, dict.fromkeys(near, bytes(SealedColumn.width))
        if MEASURED in sealed:
            key = channel(state.keys.encryption_private, receiver, name, index, MEASURED).sealing
            sealed[MEASURED] = seal(key, name, index, MEASURED, self._shares[index][MEASURED])
        commitment = seed_commitment(self._seeds[index], name, index)
        message = ShareKeys(
            round_id=ROUND_ID,
            roster_hash=name,
            seed_commitment=commitment,
            shares=SealedColumn.of(sealed),
        )
        return encode(message)

    def remaining_masks(self, survivors: range) -> Iterator[Mask]:
        """What the stand-ins' masks add up to, once those between two of them have cancelled."""
        for index in survivors:
            if index == MEASURED:
                continue
            yield self_mask(self._seeds[index], self.roster_hash, index)
            others = [peer for peer in self.near[index] if peer == MEASURED or peer not in survivors]
            private = load_private(self._states[index].keys.mask_private) if others else b""
            for peer in others:
                public = self._states[peer].answer.mask_key
                yield pairwise_mask(private, public, self.roster_hash, index, peer)

    def sign(self, index: int, survivors_hash: bytes) -> bytes:
        """The frame with this survivor's signature."""
        signature = sign(identity(device_name(index)), rosters.SURVIVORS_KIND, survivors_hash)
        return encode(
            ConsistencySignature(round_id=ROUND_ID, survivors_hash=survivors_hash, signature=signature)
        )

    def unmask(self, index: int, survivors: range, survivors_hash: bytes) -> bytes:
        """The frame with the shares that this survivor gives away."""
        owners = (*self.near[index], *((index,) if self.graph.complete else ()))
        shares = ShareColumn.of({peer: self._shares_of(peer, index)[peer in survivors] for peer in owners})
        return encode(UnmaskingShares(round_id=ROUND_ID, survivors_hash=survivors_hash, shares=shares))

    def _shares_of(self, owner: int, holder: int) -> tuple[bytes, bytes]:
        if owner != MEASURED:
            return self._shares[owner][holder]
        private = self._states[holder].keys.encryption_private
        public = self._states[owner].answer.encryption_key
        key = channel(private, public, self.roster_hash, holder, owner).opening
        return unseal(key, self.roster_hash, owner, holder, self._sealed[holder])
