"""All that the device's core knows, how it follows from the disk, and the steps that every event shares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edge_client import active_round, client_updates, models, round_work
from edge_client.active_round import ActiveRound, Step
from edge_client.client_updates import ClientUpdates, ToldClient
from edge_client.durable import DropPending, PendingUpdate, RoundRecord, SaveContribution, SaveLocal
from edge_client.events import Fault, Stamp
from edge_client.ledger import DaySpent, History
from edge_client.library import Library, StoredStanding, StoredVersion
from edge_client.library import restore as restore_library
from edge_client.outputs import KeepBlobs, Outputs
from edge_client.preparation import Orders
from models.assignment import Answering, Training
from protocol.token_bucket import TokenBucket

UNUSABLE = "model-unusable"
"""Code of faults that are the version's, not the data's or the device's."""


@dataclass(frozen=True)
class SessionState:
    """All that the device's core knows.

    Attributes:
        library: its models.
        active: the round it is in.
        used: ids of every round it ever joined; none is joined twice.
        joined_at: when it joined those of the last day, seconds since 1970.
        history: what it contributed.
        unfit: why it cannot train right now.
        fields: that queries may ask for.
        personalised: digests of the versions that were fine-tuned here, or are being.
        orders: standing orders whose updates are not ready yet.
        client: which client it is to have.
    """

    library: Library = field(default_factory=Library)
    active: ActiveRound | None = None
    used: frozenset[str] = frozenset()
    joined_at: tuple[int, ...] = ()
    history: History = field(default_factory=History)
    unfit: Fault | None = None
    fields: frozenset[str] = frozenset()
    personalised: frozenset[str] = frozenset()
    orders: Orders = field(default_factory=dict)
    client: ClientUpdates = field(default_factory=ClientUpdates)

    @property
    def busy(self) -> bool:
        """Whether something is under way that time moves on."""
        fetching = any(shelf.candidate for shelf in self.library.shelves.values())
        return self.active is not None or fetching or self.client.pull is not None


@dataclass(frozen=True)
class Memory:
    """What an earlier process left on disk."""

    versions: tuple[StoredVersion, ...] = ()
    standings: tuple[StoredStanding, ...] = ()
    local: tuple[SaveLocal, ...] = ()
    pending: tuple[PendingUpdate, ...] = ()
    active: RoundRecord | None = None
    used: frozenset[str] = frozenset()
    joined_at: tuple[int, ...] = ()
    contributed_at: tuple[int, ...] = ()
    spent: tuple[DaySpent, ...] = ()
    personalised: frozenset[str] = frozenset()
    client: tuple[ToldClient, ...] = ()


Result = tuple[SessionState, Outputs]


def restore(memory: Memory, download: TokenBucket | None = None) -> SessionState:
    """The state that follows from what is on disk; the event `Started` takes it up.

    Args:
        download: bytes that may be downloaded, by the steady clock; no limit when None.
    """
    library = restore_library(memory.versions, memory.local, memory.standings, memory.pending)
    return SessionState(
        library=replace(library, download=download),
        active=active_round.restore(memory.active) if memory.active else None,
        used=memory.used,
        joined_at=memory.joined_at,
        history=History(memory.contributed_at, memory.spent),
        personalised=memory.personalised,
        client=client_updates.restore(memory.client),
    )


def collected_order(state: SessionState) -> str | None:
    """The order whose update the active round collects."""
    if state.active is None or not isinstance(state.active.assignment, Training):
        return None
    return state.active.assignment.task.order


def with_library(state: SessionState, library: Library, outputs: Outputs, stamp: Stamp) -> Result:
    """The state with another library; what it does not need any more is deleted, and a round may go on."""
    if library is state.library:
        return state, outputs
    changed = library.blobs() != state.library.blobs()
    state, working = advance(replace(state, library=library), stamp)
    return state, (*outputs, *((keep(state),) if changed else ()), *working)


def distrust(state: SessionState, sha256: str, fault: Fault, stamp: Stamp) -> Result:
    """A version that had passed its test failed in use: this device goes back to the one before."""
    for name, shelf in state.library.shelves.items():
        version = next((version for version in shelf.known if version.sha256 == sha256), None)
        if version is not None and sha256 not in shelf.bad:
            library, outputs = models.failed(state.library, name, version, fault)
            return with_library(state, library, outputs, stamp)
    return state, ()


def advance(state: SessionState, stamp: Stamp) -> Result:
    """Starts whatever work of the active round can start now."""
    if state.active is None:
        return state, ()
    return adopt(state, round_work.advance(state.active, state.library, stamp))


def adopt(state: SessionState, step: Step) -> Result:
    """Takes over what a round became; when it is over, its base version may be, too."""
    active, outputs = step
    history, library = state.history, state.library
    for output in outputs:
        if isinstance(output, SaveContribution):
            history = history.with_contribution(output.entry.at, output.entry.event)
        elif isinstance(output, SaveLocal):
            library = library.with_local(output)
        elif isinstance(output, DropPending):
            library = library.without_pending(output.model)
    ended = state.active is not None and active is None
    state = replace(state, active=active, history=history, library=library)
    return state, (*outputs, keep(state)) if ended else outputs


def keep(state: SessionState) -> KeepBlobs:
    """The files that are still needed: those of the library, and of the version that the round is about."""
    of_orders = (order.blobs for order in state.orders.values())
    needed = state.library.blobs().union(*of_orders, state.client.blobs)
    if state.active is not None and not isinstance(state.active.assignment, Answering):
        manifest = state.active.assignment.manifest
        needed |= {manifest.graph.sha256, manifest.weights.sha256}
    return KeepBlobs(needed)
