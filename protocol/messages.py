"""Every message that crosses the network: strict, versioned, size-limited schemas.

Who a message is from is said by its topic, which the broker authorises; what must not depend on the broker
(keys, plans, survivor sets, models) is signed inside.

A field that is a `protocol.columns.Column` is not in the header of a frame: it is the frame's body.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import FailFast, Field

from protocol.columns import SealedColumn, ShareColumn, SignatureColumn
from protocol.conditions import Conditions
from protocol.fields import (
    MAX_BLOB_BYTES,
    MAX_COHORT,
    PROTOCOL_VERSION,
    BlobRef,
    Bytes32,
    Bytes64,
    Certificate,
    Index,
    RoundId,
    Schema,
    Slug,
    UnixTime,
)
from protocol.identity import SignedDocument

CHUNK_BYTES = 65_536
MAX_MODELS = 32
"""Models that one device follows."""
WINDOW = 4
"""Chunks under way at once: 64 KiB x 4 keeps control messages quick and broker memory small."""

Detail = Annotated[str, Field(max_length=300)]
Code = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
_PRINTABLE = r"^[ -~]*$"
"""Nothing that steers a terminal, or that a database refuses."""
ChunkIndex = Annotated[int, Field(ge=0, lt=MAX_BLOB_BYTES // CHUNK_BYTES + 1)]
Version = Annotated[int, Field(ge=1, le=2**31)]
Members = Annotated[bytes, Field(max_length=MAX_COHORT // 8)]
"""A set of roster indices as a bit map: bit i % 8 of byte i // 8."""


class _Message(Schema):
    v: Literal[1] = PROTOCOL_VERSION


class VersionFailure(Schema):
    """A version that does not run on a device, or ran and failed later; the device answers with another."""

    version: Version
    code: Code
    detail: Annotated[str, Field(max_length=300, pattern=_PRINTABLE)] = ""


# --- either side -----------------------------------------------------------------------------------------


class BlobNeed(_Message):
    """The receiver of a transfer asks for these chunks; it never has more than a window under way."""

    type: Literal["blob-need"] = "blob-need"
    blob: BlobRef
    indices: Annotated[tuple[ChunkIndex, ...], Field(min_length=1, max_length=WINDOW)]


class BlobChunk(_Message):
    """One chunk; its bytes are the body of the frame."""

    type: Literal["blob-chunk"] = "blob-chunk"
    blob: BlobRef
    index: ChunkIndex
    crc32: Annotated[int, Field(ge=0, lt=2**32)]


# --- device to aggregator --------------------------------------------------------------------------------


class DeviceStatus(_Message):
    """Birth (online) and last will (offline). A late will of an old session is told by its session id."""

    type: Literal["device-status"] = "device-status"
    session: Bytes32
    online: bool
    client_version: Annotated[str, Field(max_length=40, pattern=_PRINTABLE)] = ""
    runtime: Annotated[str, Field(max_length=60, pattern=_PRINTABLE)] = ""
    target: Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9-]*$")] = ""
    """System that the client's bundle is for; empty where none was installed that could be updated."""
    models: Annotated[dict[Slug, Version], Field(max_length=MAX_MODELS + 1, default_factory=dict)]
    """Model name -> version that it answers predictions with; and the client that stood its trial here."""
    failures: Annotated[dict[Slug, VersionFailure], Field(max_length=MAX_MODELS + 1)] = Field(
        default_factory=dict
    )
    """Model name, or the client's -> the version that failed here last, until a newer one runs."""
    conditions: Conditions = Conditions()
    """Said again when they have changed, and not more often than every minute."""


class AdvertiseKeys(_Message):
    """Check-in for a round: two fresh X25519 public keys, signed by the device's identity."""

    type: Literal["advertise-keys"] = "advertise-keys"
    round_id: RoundId
    certificate: Certificate
    encryption_key: Bytes32
    mask_key: Bytes32
    signature: Bytes64


class Refusal(_Message):
    """The device's own policy refuses a plan, or cannot follow it; it says why, and nothing else."""

    type: Literal["refusal"] = "refusal"
    round_id: RoundId
    code: Code
    detail: Detail = ""


class ShareKeys(_Message):
    """Shamir shares for every neighbour, and a commitment to the self-mask seed."""

    type: Literal["share-keys"] = "share-keys"
    round_id: RoundId
    roster_hash: Bytes32
    seed_commitment: Bytes32
    shares: SealedColumn = SealedColumn()


class UploadOffer(_Message):
    """A masked input waits on the device's disk; repeated until its receipt comes."""

    type: Literal["upload-offer"] = "upload-offer"
    round_id: RoundId
    blob: BlobRef


class ConsistencySignature(_Message):
    """A survivor signs the survivor set that it was shown."""

    type: Literal["consistency-signature"] = "consistency-signature"
    round_id: RoundId
    survivors_hash: Bytes32
    signature: Bytes64


class UnmaskingShares(_Message):
    """One share of each neighbour: of its seed if it is in the survivor set, of its key if it is not.

    The set that `survivors_hash` names decides which: there is no way to give both.
    """

    type: Literal["unmasking-shares"] = "unmasking-shares"
    round_id: RoundId
    survivors_hash: Bytes32
    shares: ShareColumn = ShareColumn()


class UpdateReady(_Message):
    """An update trained by a standing order waits on the device's disk for a buffer."""

    type: Literal["update-ready"] = "update-ready"
    order: RoundId
    version: Version
    """That it was trained from."""


class RenewalRequest(_Message):
    """A device asks for a new certificate, by the one that it has; see `protocol.renewal`."""

    type: Literal["renewal-request"] = "renewal-request"
    request: Annotated[bytes, Field(min_length=64, max_length=2048)]
    """PKCS#10, DER, with the key of the new certificate: the same, or a new one."""
    certificate: Certificate
    """The present one."""
    signature: Bytes64
    """Over fleet and request, by the present certificate's key."""


class ClientAbort(_Message):
    """The client saw the rules of the round broken: it erased its secrets and leaves the round."""

    type: Literal["client-abort"] = "client-abort"
    round_id: RoundId
    code: Code
    detail: Detail = ""


# --- aggregator to device --------------------------------------------------------------------------------


class Invitation(_Message):
    """The signed plan of a round."""

    type: Literal["invitation"] = "invitation"
    plan: SignedDocument
    manifest: SignedDocument | None = None
    """Of the version that the plan is about: a device may have to fetch it, but not to serve it."""


class TrainingOrder(_Message):
    """A standing order: train now, keep the update, and say when it is ready.

    The plan is signed as `ORDER_KIND`; every buffer that collects the update has a plan of its own.
    """

    type: Literal["training-order"] = "training-order"
    plan: SignedDocument
    manifest: SignedDocument | None = None
    """Of the version to train from."""


class RosterEntry(Schema):
    """One client's check-in as its neighbours see it, with its place under the roster root."""

    index: Index
    certificate: Certificate
    encryption_key: Bytes32
    mask_key: Bytes32
    signature: Bytes64
    path: Annotated[tuple[Bytes32, ...], Field(max_length=14)] = ()


class Roster(_Message):
    """Who takes part: the whole cohort on a complete graph, else the receiver's neighbours and itself."""

    type: Literal["roster"] = "roster"
    round_id: RoundId
    size: Annotated[int, Field(ge=2, le=MAX_COHORT)]
    root: Bytes32
    entries: Annotated[tuple[RosterEntry, ...], FailFast(), Field(max_length=512)]


class ShareDelivery(_Message):
    """The sealed shares that the receiver's neighbours made for it."""

    type: Literal["share-delivery"] = "share-delivery"
    round_id: RoundId
    roster_hash: Bytes32
    shares: SealedColumn = SealedColumn()


class UploadReceipt(_Message):
    """The masked input is durably stored (accepted), or will never be used (refused, with the reason)."""

    type: Literal["upload-receipt"] = "upload-receipt"
    round_id: RoundId
    blob: BlobRef
    accepted: bool
    code: Code = "stored"


class SurvivorSet(_Message):
    """The survivors, for each of them to sign."""

    type: Literal["survivor-set"] = "survivor-set"
    round_id: RoundId
    survivors: Members


class UnmaskRequest(_Message):
    """Asks for shares, with the quorum of signatures on the survivor set."""

    type: Literal["unmask-request"] = "unmask-request"
    round_id: RoundId
    survivors_hash: Bytes32
    signatures: SignatureColumn = SignatureColumn()


class RoundEnd(_Message):
    """The round is over: erase its secrets."""

    type: Literal["round-end"] = "round-end"
    round_id: RoundId
    completed: bool
    reason: Detail = ""


class RenewalAnswer(_Message):
    """A new certificate, the present one where that is young, or why there is none."""

    type: Literal["renewal-answer"] = "renewal-answer"
    code: Code
    detail: Detail = ""
    certificate: Certificate | None = None
    again: Annotated[int, Field(ge=0, le=30 * 86_400)] = 0
    """Seconds after which to ask again, where there is none."""
    time: UnixTime
    """The service's clock."""


class ModelAnnouncement(_Message):
    """Retained: which version of a model is to be had, as the signed assignment, and its signed manifest."""

    type: Literal["model-announcement"] = "model-announcement"
    assignment: SignedDocument
    manifest: SignedDocument | None = None
    """None when the assignment names no version."""


FromDevice = (
    DeviceStatus
    | AdvertiseKeys
    | Refusal
    | ShareKeys
    | UploadOffer
    | ConsistencySignature
    | UnmaskingShares
    | UpdateReady
    | ClientAbort
    | RenewalRequest
    | BlobNeed
    | BlobChunk
)
ToDevice = (
    Invitation
    | TrainingOrder
    | Roster
    | ShareDelivery
    | UploadReceipt
    | SurvivorSet
    | UnmaskRequest
    | RoundEnd
    | RenewalAnswer
    | ModelAnnouncement
    | BlobNeed
    | BlobChunk
)
