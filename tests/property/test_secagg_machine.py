"""Client and server together under drop, duplicate, reorder, delay and reboot: a rule-based state machine.

Hypothesis delivers messages in any order, any number of times, or never, closes phases when it likes, and
reboots clients between any two events. Whatever it does: no honest client aborts, nobody gives both shares of
one peer, and if the round recovers, the sum is exact.
"""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.errors import IllegalEvent
from protocol.messages import ClientAbort, UnmaskingShares
from protocol.secagg import client, server
from protocol.secagg.client_state import Aborted, InputSent, Masking, dump_state, load_state
from protocol.secagg.server_state import Advertising, Collecting, Failed, Recovered
from protocol.transfer import describe
from tests.secagg_round import Cohort, dealt

SIZE = 4
DEVICES = [f"device-{i:03d}" for i in range(SIZE)]


class Round(RuleBasedStateMachine):
    """`sent` holds every message ever sent to a device, so an old one can come late or again."""

    def __init__(self) -> None:
        super().__init__()
        self.cohort = Cohort(SIZE, length=20, reboot=False)
        self.to_client: list[tuple[str, client.Event]] = []
        self.to_server: list[tuple[str, server.ClientMessage]] = []
        self.shares: dict[str, UnmaskingShares] = {}
        self.stored: dict[str, np.ndarray] = {}

    @initialize()
    def check_in(self) -> None:
        for device in DEVICES:
            self.to_server.append((device, self.cohort.clients[device].answer))  # type: ignore[arg-type, union-attr]

    def running(self) -> bool:
        return not isinstance(self.cohort.server, Recovered | Failed)

    @precondition(lambda self: self.running() and not isinstance(self.cohort.server, Advertising))
    @rule(device=st.sampled_from(DEVICES))
    def request(self, device: str) -> None:
        if device in server.awaited(self.cohort.server):
            self.to_client.append((device, self.cohort.event_for(device)))

    @precondition(lambda self: self.running())
    @rule(devices=st.sets(st.sampled_from(DEVICES), min_size=3))
    def promptly(self, devices: set[str]) -> None:
        """The common case: these devices get their request and answer it, so that rounds do finish."""
        for device in sorted(devices & server.awaited(self.cohort.server)):
            if isinstance(self.cohort.server, Advertising):
                self.server_gets(device, self.to_server[DEVICES.index(device)][1])
                continue
            self.request(device)
            before = len(self.to_server)
            self.client_gets(*self.to_client[-1])
            for sender, message in self.to_server[before:]:
                self.server_gets(sender, message)
            self.upload(device)
            self.upload(device)

    @precondition(lambda self: self.to_client)
    @rule(data=st.data())
    def deliver_to_client(self, data: st.DataObject) -> None:
        self.client_gets(*data.draw(st.sampled_from(self.to_client)))

    def client_gets(self, device: str, given: client.Event) -> None:
        before = self.cohort.clients[device]
        try:
            answer = self.cohort.give(device, given)
        except IllegalEvent:
            assert self.cohort.clients[device] is before
            return
        assert not isinstance(answer, ClientAbort), answer
        if isinstance(answer, UnmaskingShares):
            assert self.shares.setdefault(device, answer) == answer
        if answer is not None:
            self.to_server.append((device, answer))

    @precondition(lambda self: self.to_server)
    @rule(data=st.data())
    def deliver_to_server(self, data: st.DataObject) -> None:
        self.server_gets(*data.draw(st.sampled_from(self.to_server)))

    def server_gets(self, device: str, message: server.ClientMessage) -> None:
        before = self.cohort.server
        try:
            self.cohort.receive(device, message)
        except IllegalEvent:
            assert self.cohort.server is before

    @rule(device=st.sampled_from(DEVICES))
    def reboot(self, device: str) -> None:
        self.cohort.clients[device] = load_state(*dump_state(self.cohort.clients[device]))

    @rule(device=st.sampled_from(DEVICES))
    def upload(self, device: str) -> None:
        state = self.cohort.clients[device]
        if isinstance(state, Masking):
            self.stored[device] = self.cohort.masked(device)
            self.cohort.give(device, client.InputMasked(describe(self.stored[device].tobytes())))
        elif isinstance(state, InputSent) and isinstance(self.cohort.server, Collecting):
            before = self.cohort.server
            self.cohort.server = server.handle(before, server.InputStored(device))
            if before.survivors != self.cohort.server.survivors:  # exactly once, as the ledger does it
                self.cohort.total += self.stored[device]

    @precondition(lambda self: self.running())
    @rule(patient=st.integers(0, 9))
    def close(self, patient: int) -> None:
        """The deadline strikes at any time, more often once everyone has answered."""
        if patient == 0 or not server.awaited(self.cohort.server):
            self.cohort.close()

    @invariant()
    def nobody_aborts(self) -> None:
        assert not any(isinstance(state, Aborted) for state in self.cohort.clients.values())

    @invariant()
    def never_both_shares_of_one_peer(self) -> None:
        kinds: dict[str, set[int]] = {}
        for device, answer in self.shares.items():
            roster = self.cohort.server.cohort  # type: ignore[union-attr]
            for peer, share in answer.shares.by_peer().items():
                owner = roster.members[peer].device_id
                both = dealt(owner, roster.index[device], roster.graph.size)
                kinds.setdefault(owner, set()).add(both.index(share))
        assert all(len(kind) == 1 for kind in kinds.values()), kinds

    @invariant()
    def a_recovered_sum_is_exact(self) -> None:
        end = self.cohort.server
        event(f"phase {type(end).__name__}")
        if isinstance(end, Recovered):
            survivors = self.cohort.names(end.survivors)
            np.testing.assert_array_equal(self.cohort.unmasked(end), self.cohort.sum_of(survivors))


TestRound = Round.TestCase
TestRound.settings = settings(
    max_examples=120, stateful_step_count=80, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
