"""Which client this device is to have: told as for models, pulled, and handed to root's program. Pure.

    told --> Pull --bundle whole--> handed over --> root's program tries it, and this process ends
                                        |
                                        +--refused, or not stayed up--> said to the fleet, not tried again

This client can install nothing: it says what it was told, and root's program checks every signature itself.
So what stands here only saves traffic, and decides when: never while a round runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from edge_client import installed, pulling
from edge_client.durable import SaveStanding
from edge_client.events import BlobFound, Stamp
from edge_client.installed import Audience, Sight, audience, may_go_back
from edge_client.outputs import FindBlob, HandOver, Outputs, note, warning
from edge_client.profile import Profile
from edge_client.pulling import Pull
from edge_client.standing import open_assignment
from protocol.client_release import CLIENT, RELEASE_KIND, ClientRelease, version_number
from protocol.errors import MalformedMessage
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import BlobChunk, ModelAnnouncement, VersionFailure
from protocol.version_assignment import VersionAssignment

HAND_AGAIN_SECONDS = 60.0
MAX_HAND_AGAIN_SECONDS = 3600.0


@dataclass(frozen=True)
class ToldClient:
    """An assignment of the client, with the release that it names.

    Attributes:
        assignment: verified.
        document: that it was signed in.
        release: None when the assignment takes one away.
        signed: the document around the release, likewise.
    """

    assignment: VersionAssignment
    document: SignedDocument
    release: ClientRelease | None = None
    signed: SignedDocument | None = None

    @property
    def save(self) -> SaveStanding:
        """What makes it durable."""
        return SaveStanding(self.assignment, self.document, self.signed)


@dataclass(frozen=True)
class ClientUpdates:
    """What this device knows of its own client.

    Attributes:
        told: by audience.
        sight: what is installed; None where no program of root could change it.
        pull: the bundle that is on its way.
        blob: the bundle that is whole, and to be handed over; None also where nothing has to be sent.
        due: when to hand over, on the steady clock; None while there is nothing to hand over.
        patience: seconds until it is handed over again, when nothing became of it; doubles each time.
        failure: the update that failed last, until another one is taken.
    """

    told: Mapping[Audience, ToldClient] = field(default_factory=dict)
    sight: Sight | None = None
    pull: Pull | None = None
    blob: BlobRef | None = None
    due: float | None = None
    patience: float = HAND_AGAIN_SECONDS
    failure: VersionFailure | None = None

    @property
    def wanted(self) -> ToldClient | None:
        """What names the release that this device is to have."""
        own = self.told.get("own")
        return own if own is not None and own.release is not None else self.told.get("fleet")

    @property
    def asked(self) -> bytes:
        """The assignments, as root's program reads them."""
        texts = (
            self.told[each].document.model_dump_json() for each in installed.AUDIENCES if each in self.told
        )
        return f"[{','.join(texts)}]".encode()

    @property
    def serving(self) -> dict[str, int]:
        """What the status says beside the models: the client that stood its trial here."""
        if self.sight is None or not self.sight.good:
            return {}
        return {CLIENT: version_number(self.sight.good)}

    @property
    def failures(self) -> dict[str, VersionFailure]:
        """What the status says of the release that is not taken."""
        return {} if self.failure is None else {CLIENT: self.failure}

    @property
    def blobs(self) -> frozenset[str]:
        """Digests of the files that are needed."""
        under_way = () if self.pull is None else tuple(blob.sha256 for blob in self.pull.todo)
        return frozenset((*under_way, *(() if self.blob is None else (self.blob.sha256,))))


Step = tuple[ClientUpdates, Outputs]


def restore(told: Iterable[ToldClient]) -> ClientUpdates:
    """What an earlier process left; `seen` takes it up."""
    return ClientUpdates(told={audience(each.assignment): each for each in told})


def verified(profile: Profile, message: ModelAnnouncement) -> ToldClient | None:
    """Verifies an announcement of the client; None when it is one of a model.

    Raises:
        BadSignature: no model signer of this device signed both parts.
        MalformedMessage: no assignment, no release, for another device or fleet, or not of each other.
    """
    assignment = open_assignment(profile, message)
    if assignment.model != CLIENT:
        return None
    if assignment.version is None:
        return ToldClient(assignment, message.assignment)
    if message.manifest is None:
        raise MalformedMessage("the release of the assigned version is missing")
    release = ClientRelease.from_bytes(message.manifest.open(RELEASE_KIND, dict(profile.model_signers)))
    found = (release.number, message.manifest.digest.hex())
    if found != (assignment.version, assignment.manifest_sha256):
        raise MalformedMessage("the release is not that of the assigned version")
    return ToldClient(assignment, message.assignment, release, message.manifest)


def assigned(client: ClientUpdates, told: ToldClient, stamp: Stamp) -> Step:
    """Takes in which client this device is to have."""
    whose = audience(told.assignment)
    before = client.told.get(whose)
    if before is not None and told.assignment.sequence <= before.assignment.sequence:
        if told.document.digest == before.document.digest:
            return client, ()  # retained, so it comes again with every connection
        detail = {"sequence": told.assignment.sequence, "taken": before.assignment.sequence}
        return client, (warning("assignment-not-newer", model=CLIENT, **detail),)
    client, outputs = _pursue(replace(client, told={**client.told, whose: told}), stamp)
    return client, (told.save, *outputs)


def seen(client: ClientUpdates, sight: Sight | None, stamp: Stamp) -> Step:
    """The installed clients were looked at: what became of an update, or what is to be done."""
    return _pursue(replace(client, sight=sight), stamp)


def _pursue(client: ClientUpdates, stamp: Stamp) -> Step:
    sight, told = client.sight, client.wanted
    idle = replace(client, pull=None, blob=None, due=None, failure=_failure(sight))
    if sight is None or told is None or told.release is None or told.release.version == sight.version:
        return replace(idle, patience=HAND_AGAIN_SECONDS), ()
    release, outcome = told.release, sight.outcome
    if outcome is not None and outcome.reason and outcome.asked == hashlib.sha256(client.asked).hexdigest():
        refused = _refused(release.number, outcome.reason)
        said = (warning("client-not-taken", version=release.version, reason=refused.detail),)
        idle = replace(idle, failure=refused, patience=HAND_AGAIN_SECONDS)
        return idle, said if refused != client.failure else ()
    if outcome is not None and outcome.version == release.version:
        idle = replace(idle, failure=None)  # asked for anew, so tried anew
    bundle = release.bundle_for(sight.target)
    if bundle is None:
        return idle, (note("no-bundle-for-this-system", version=release.version, system=sight.target),)
    back = may_go_back({whose: each.assignment for whose, each in client.told.items()})
    if not back and release.number < version_number(sight.version):
        # A lower number alone, such as a mistake, brings nothing back.
        return idle, (warning("older-without-roll-back", model=CLIENT, version=release.version),)
    if sight.waits:
        return idle, ()
    if release.version in (sight.good, sight.previous):
        return (client if client.due is not None else replace(idle, due=stamp.steady)), ()
    if bundle.blob == client.blob or (client.pull is not None and client.pull.todo == (bundle.blob,)):
        return client, ()
    pull = Pull(todo=(bundle.blob,), ask_at=stamp.steady + pulling.ASK_AGAIN_SECONDS)
    announced = note("client-announced", version=release.version, running=sight.version)
    return replace(idle, pull=pull), (announced, FindBlob(bundle.blob))


def _failure(sight: Sight | None) -> VersionFailure | None:
    """The update that failed last, until another one is taken."""
    if sight is None or sight.outcome is None or not sight.outcome.reason:
        return None
    try:
        return _refused(version_number(sight.outcome.version), sight.outcome.reason)
    except ValueError:
        return None  # root's program could not tell which it was


def _refused(number: int, reason: str) -> VersionFailure:
    detail = "".join(c if " " <= c <= "~" else "?" for c in reason)[: installed.MAX_REASON]
    return VersionFailure(version=number, code="client-refused", detail=detail)


# --- the bundle ------------------------------------------------------------------------------------------


def found(client: ClientUpdates, event: BlobFound, most: int, stamp: Stamp) -> Step:
    """The disk was looked at for the bundle."""
    if client.pull is None or client.pull.todo[0] != event.blob:
        return client, ()
    pull, outputs = pulling.found(client.pull, event, most, stamp)
    if pull is not None:
        return replace(client, pull=pull), outputs
    # At once, unless nothing became of it before.
    later = 0.0 if client.patience == HAND_AGAIN_SECONDS else client.patience
    return replace(client, pull=None, blob=event.blob, due=stamp.steady + later), outputs


def arrived(
    client: ClientUpdates, chunk: BlobChunk, body: bytes | memoryview, most: int, stamp: Stamp
) -> Step:
    """A chunk came, perhaps of the bundle."""
    step = None if client.pull is None else pulling.arrived(client.pull, chunk, body, most, stamp)
    return (client, ()) if step is None else (replace(client, pull=step[0]), step[1])


def ticked(
    client: ClientUpdates, most: int, stamp: Stamp, *, limited: bool, idle: bool, hurry: bool = False
) -> Step:
    """Asks again for what did not come, and hands over what is whole.

    Args:
        client: what is known.
        most: chunks to ask for at most.
        stamp: now.
        limited: whether a limit may have held something back.
        idle: whether no round runs, which the end of this process would break.
        hurry: after a reconnect.
    """
    if client.pull is not None:
        pull, outputs = pulling.ticked(client.pull, most, stamp, limited=limited, hurry=hurry)
        return replace(client, pull=pull), outputs
    told = client.wanted
    if client.due is None or stamp.steady < client.due or not idle or told is None or told.signed is None:
        return client, ()
    later = replace(
        client,
        due=stamp.steady + client.patience,
        patience=min(2 * client.patience, MAX_HAND_AGAIN_SECONDS),
    )
    handed = HandOver(told.signed.model_dump_json().encode(), client.asked, client.blob)
    return later, (handed, note("client-handed-over", version=told.assignment.version))
