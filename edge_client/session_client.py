"""The device's own client in its session, within the limits that hold for all downloads."""

from __future__ import annotations

from dataclasses import replace

from edge_client import client_updates
from edge_client.client_updates import ToldClient
from edge_client.events import BlobFound, ClientSeen, Stamp
from edge_client.outputs import Announce
from edge_client.session_state import Result, SessionState, keep
from protocol.messages import BlobChunk


def client_told(state: SessionState, told: ToldClient, stamp: Stamp) -> Result:
    """The fleet says which client this device is to have."""
    return _with_client(state, client_updates.assigned(state.client, told, stamp), stamp)


def client_seen(state: SessionState, event: ClientSeen, stamp: Stamp) -> Result:
    """The installed clients were looked at."""
    return _with_client(state, client_updates.seen(state.client, event.sight, stamp), stamp)


def client_found(state: SessionState, event: BlobFound, stamp: Stamp) -> Result:
    """The disk was looked at for a file, perhaps a bundle."""
    most = state.library.affords(stamp.steady)
    return _with_client(state, client_updates.found(state.client, event, most, stamp), stamp)


def client_arrived(state: SessionState, chunk: BlobChunk, body: bytes | memoryview, stamp: Stamp) -> Result:
    """A chunk came that no model lacks."""
    most = state.library.affords(stamp.steady)
    return _with_client(state, client_updates.arrived(state.client, chunk, body, most, stamp), stamp)


def client_ticked(state: SessionState, stamp: Stamp, *, hurry: bool = False) -> Result:
    """Time has passed; `hurry` after a reconnect."""
    library = state.library
    step = client_updates.ticked(
        state.client,
        library.affords(stamp.steady),
        stamp,
        limited=library.download is not None,
        idle=state.active is None,
        hurry=hurry,
    )
    return _with_client(state, step, stamp)


def _with_client(state: SessionState, step: client_updates.Step, stamp: Stamp) -> Result:
    """The state with what became of the client; what is not needed for it any more is deleted."""
    client, outputs = step
    before = state.client
    if client is before:
        return state, outputs
    state = replace(state, client=client, library=state.library.charged(outputs, stamp.steady))
    if (client.serving, client.failures) != (before.serving, before.failures):
        outputs += (Announce(state.library.serving(), state.library.failures()),)
    return state, (*outputs, keep(state)) if client.blobs != before.blobs else outputs
