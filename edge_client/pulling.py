"""Files on their way from the fleet: asked for chunk by chunk, one file after the other. Pure.

What is pulled (the files of a model's version, the bundle of a client) is the matter of who begins a pull. A
pull asks again for what does not come, ever more seldom, keeps to a limit, and goes on after a restart with
the chunks that the disk has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from edge_client.durable import StoreChunk
from edge_client.events import BlobFound, Stamp
from edge_client.outputs import FindBlob, Outputs, Send, warning
from protocol.fields import BlobRef
from protocol.messages import BlobChunk, BlobNeed
from protocol.transfer import Reception

ASK_AGAIN_SECONDS = 3.0
MAX_ASK_AGAIN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Files of which some are not here yet.

    Attributes:
        todo: blobs not known to be on disk; the first is the one under way.
        reception: of the first of `todo`; None until the disk was looked at.
        ask_at: when to ask again for what did not come, on the steady clock.
        patience: seconds until then; doubles each time.
    """

    todo: tuple[BlobRef, ...]
    reception: Reception | None = None
    ask_at: float = 0.0
    patience: float = ASK_AGAIN_SECONDS


P = TypeVar("P", bound=Pull)


def found(pull: P, event: BlobFound, most: int, stamp: Stamp) -> tuple[P | None, Outputs]:
    """The disk was looked at for the file under way: ask for what lacks, or go on to the next file.

    Args:
        pull: whose first file the event is about.
        event: what is there.
        most: chunks to ask for at most.
        stamp: now.

    Returns:
        The pull; None when every file is whole.
    """
    if event.complete:
        todo = pull.todo[1:]
        if not todo:
            return None, ()
        ask_at = stamp.steady + ASK_AGAIN_SECONDS
        return replace(pull, todo=todo, reception=None, ask_at=ask_at, patience=ASK_AGAIN_SECONDS), (
            FindBlob(todo[0]),
        )
    # Chunks carry no signature: a wrong digest is the carrier's fault and says nothing about the file.
    broken = pull.reception is not None
    reception = Reception.begin(event.blob, event.chunks)
    if broken:
        patience = min(2 * pull.patience, MAX_ASK_AGAIN_SECONDS)
        waiting = replace(pull, reception=reception, ask_at=stamp.steady + patience, patience=patience)
        return waiting, (warning("download-corrupt", blob=event.blob.sha256[:16], retry_s=patience),)
    return _ask(pull, reception, most, stamp)


def arrived(
    pull: P, chunk: BlobChunk, body: bytes | memoryview, most: int, stamp: Stamp
) -> tuple[P, Outputs] | None:
    """A chunk came: store it and ask for the next; None when the pull does not lack it."""
    if pull.reception is None or pull.reception.blob != chunk.blob:
        return None
    if chunk.index not in pull.reception.missing:
        return None
    reception = pull.reception.store(chunk.index)
    stored = StoreChunk(chunk.blob, chunk.index, body)
    if reception.complete:
        return replace(pull, reception=reception), (stored, FindBlob(chunk.blob))
    pull, outputs = _ask(pull, reception, most, stamp)
    return pull, (stored, *outputs)


def ticked(pull: P, most: int, stamp: Stamp, *, limited: bool, hurry: bool) -> tuple[P, Outputs]:
    """Asks again for what did not come.

    Args:
        pull: under way.
        most: chunks to ask for at most.
        stamp: now.
        limited: whether a limit may have held something back; without one, the window is always full.
        hurry: after a reconnect, when requests may have been lost.
    """
    if hurry or stamp.steady >= pull.ask_at:
        if pull.reception is None or pull.reception.complete:
            return replace(pull, ask_at=stamp.steady + MAX_ASK_AGAIN_SECONDS), (FindBlob(pull.todo[0]),)
        return _ask(pull, pull.reception, most, stamp, again=True)
    if limited and pull.reception is not None:
        reception, need = pull.reception.ask(most=most)
        if need is not None:
            ask_at = stamp.steady + ASK_AGAIN_SECONDS
            return replace(pull, reception=reception, ask_at=ask_at), (Send(need),)
    return pull, ()


def asked_for(outputs: Outputs) -> int:
    """How many chunks these outputs ask for."""
    return sum(
        len(output.message.indices)
        for output in outputs
        if isinstance(output, Send) and isinstance(output.message, BlobNeed)
    )


def _ask(pull: P, reception: Reception, most: int, stamp: Stamp, *, again: bool = False) -> tuple[P, Outputs]:
    reception, need = reception.ask(again=again, most=most)
    patience = min(2 * pull.patience, MAX_ASK_AGAIN_SECONDS) if again else ASK_AGAIN_SECONDS
    pull = replace(pull, reception=reception, ask_at=stamp.steady + patience, patience=patience)
    return pull, (Send(need),) if need else ()
