"""A device takes its client's update from the fleet and hands it to root's program; both are real here."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_client import client_updates
from edge_client.adapters import blobs, own_client
from edge_client.adapters.credentials import load_credentials
from edge_client.adapters.data import NpzDirectory
from edge_client.adapters.files import StorageError
from edge_client.adapters.mqtt import Inbound, LinkUp
from edge_client.adapters.own_client import OwnClient
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.versions import Versions
from edge_client.client_updates import ClientUpdates
from edge_client.daemon import Daemon
from edge_client.events import Stamp, Started, Ticked
from edge_client.inbox import Inbox
from edge_client.installed import Sight
from edge_client.outputs import HandOver
from edge_client.profile import Profile
from edge_client.updater import Trust, run
from edge_client.updating import UpdateRefused
from protocol.client_bundle import UnusableBundle
from protocol.client_release import (
    CLIENT,
    MAX_BUNDLE_BYTES,
    RELEASE_KIND,
    ClientBundle,
    ClientRelease,
    version_number,
    version_text,
)
from protocol.codec import decode_from_device, decode_to_device, encode
from protocol.fields import BlobRef
from protocol.identity import SignedDocument
from protocol.messages import BlobNeed, DeviceStatus, ModelAnnouncement
from protocol.transfer import chunks
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment
from tests.client_bundles import TARGET, FakeService, bundle
from tests.edge_broker import FLEET, Fleet
from tests.edge_fleet import PERMISSIVE

PADDING = os.urandom(65_536 * 6)
BUNDLES = {version: bundle(version, padding=PADDING) for version in ("0.1.0", "0.2.0", "0.3.0")}


def release(version: str, target: str = TARGET, content: bytes | None = None) -> ClientRelease:
    content = BUNDLES[version] if content is None else content
    described = ClientBundle(target=target, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    return ClientRelease(version=version, bundles=(described,))


@dataclass
class Card:
    """A device's card, with the fleet's side of its network: what it asks for, it gets at once."""

    folder: Path
    fleet: Fleet
    state: Path
    sequence: int = 0
    lost: bool = False
    chunks: int = 0
    files: dict[BlobRef, bytes] = field(default_factory=dict)
    statuses: list[DeviceStatus] = field(default_factory=list)
    waiting: list[bytes] = field(default_factory=list)
    clock: float = 0.0

    @classmethod
    def made(cls, folder: Path) -> Card:
        fleet = Fleet(folder)
        card = cls(folder / "opt", fleet, fleet.enrolled("barn-1", PERMISSIVE))
        card.files = {BlobRef.of(content): content for content in BUNDLES.values()}
        (folder / "first").write_bytes(BUNDLES["0.1.0"])
        store = Versions(card.folder)
        store.install("0.1.0", folder / "first")
        store.point("current", "0.1.0")
        store.point("good", "0.1.0")
        return card

    # --- the fleet

    def assigns(
        self,
        wanted: ClientRelease | None,
        *,
        own: bool = False,
        rollback: bool = False,
        key: Ed25519PrivateKey | None = None,
    ) -> None:
        """Says which client the fleet, or this device, is to have."""
        self.sequence += 1
        signer = key or self.fleet.operator
        document = None if wanted is None else SignedDocument.create(signer, RELEASE_KIND, wanted.to_bytes())
        assignment = VersionAssignment(
            fleet=FLEET,
            model=CLIENT,
            device="barn-1" if own else None,
            version=None if wanted is None else wanted.number,
            manifest_sha256=None if document is None else document.digest.hex(),
            sequence=self.sequence,
            rollback=rollback,
        )
        signed = SignedDocument.create(signer, ASSIGNMENT_KIND, assignment.to_bytes())
        self.waiting.append(encode(ModelAnnouncement(assignment=signed, manifest=document)))

    # --- what the daemon takes for its link and its worker

    def start(self) -> None:
        """Connects to nothing."""

    def submit(self, job: object) -> None:
        raise AssertionError(f"no work is to be done here: {job}")

    def send(self, channel: str, frame: bytes, *, retain: bool = False) -> bool:
        message = decode_from_device(frame)[0]
        if isinstance(message, DeviceStatus):
            self.statuses.append(message)
        elif isinstance(message, BlobNeed) and not self.lost:
            for chunk, body in chunks(message.blob, self.files[message.blob], message.indices):
                self.chunks += 1
                self.waiting.append(encode(chunk, body))
        return True

    # --- the device

    def client(self, messages: int | None = None) -> DeviceStatus:
        """One process of the client until nothing is left to do, or so many messages; its last status."""
        credentials = load_credentials(self.state)
        own = OwnClient((self.folder / "current").resolve(), self.state)
        with DeviceStore.open(self.state) as store:
            daemon = Daemon(
                Profile.enrolled(credentials.bundle, credentials.identity, policy=PERMISSIVE),
                store,
                self,  # type: ignore[arg-type]
                self,  # type: ignore[arg-type]
                NpzDirectory(self.state),
                FieldReader(self.state, self.state),
                Inbox(),
                client_version="1",
                runtime="none",
                own=own,
                steady=lambda: self.clock,
            )
            daemon._look_at_client()
            daemon._take(Started())
            daemon._take(LinkUp(bytes(32), "5"))
            taken = 0
            while self.waiting and taken != messages:
                daemon._take(Inbound("covey/v1/dev/barn-1/down/msg", self.waiting.pop(0), lambda: None))
                taken += 1
            if messages is None:
                daemon._take(Ticked())
        self.waiting.clear()
        return self.statuses[-1]

    @property
    def ready(self) -> bool:
        """Whether an update lies ready for root's program."""
        return (self.state / "updates" / "ready").exists()

    def root(self, sick: set[str] = frozenset()) -> str:  # type: ignore[assignment]
        """Root's program, once; returns the version that runs then."""
        bundle = load_credentials(self.state).bundle
        trust = Trust(bundle.model_keys(), bundle.fleet, bundle.device_id, TARGET)
        return run(self.folder, self.state / "updates", trust, FakeService(self.folder, sick=sick))

    def versions(self) -> set[str]:
        return {path.name for path in (self.folder / "versions").iterdir()}


@pytest.fixture
def card(tmp_path: Path) -> Card:
    return Card.made(tmp_path)


def test_a_release_is_pulled_handed_over_and_reported_when_it_has_stood_its_trial(card: Card) -> None:
    card.assigns(release("0.2.0"))
    status = card.client()
    assert status.target == TARGET and status.models == {CLIENT: version_number("0.1.0")}
    assert card.ready and card.chunks == 7
    # As long as root's program has not answered, nothing more is done, whatever starts anew.
    assert card.client().failures == {} and card.chunks == 7
    assert card.root() == "0.2.0" and not card.ready
    status = card.client()
    assert status.models == {CLIENT: version_number("0.2.0")} and not status.failures
    assert not card.ready and card.chunks == 7
    assert not list((card.state / "blobs").iterdir()), "the bundle is not kept twice"
    assert not (card.state / "updates" / "bundle.tar.xz").exists()


def test_one_that_does_not_stay_up_is_reported_and_not_fetched_again(card: Card) -> None:
    card.assigns(release("0.2.0"))
    card.client()
    assert card.root(sick={"0.2.0"}) == "0.1.0"
    for _ in range(2):
        status = card.client()
        assert status.models == {CLIENT: version_number("0.1.0")}
        failure = status.failures[CLIENT]
        assert failure.version == version_number("0.2.0") and failure.code == "client-refused"
        assert "did not stay up" in failure.detail
        assert not card.ready and card.chunks == 7
    # A rollout that is taken back leaves the reason, for its operator to see.
    card.assigns(release("0.1.0"), rollback=True)
    assert card.client().failures[CLIENT] == failure and not card.ready
    card.assigns(release("0.3.0"))
    card.client()
    assert card.root() == "0.3.0"
    assert card.client().failures == {}


def test_taking_a_rollout_back_brings_the_one_before_without_sending_it(card: Card) -> None:
    """As the aggregator does it: the device's own assignment is taken away, the fleet's counts again."""
    card.assigns(release("0.1.0"))
    assert card.client().models == {CLIENT: 1000} and card.chunks == 0
    card.assigns(release("0.2.0"), own=True)
    card.client()
    assert card.root() == "0.2.0" and card.chunks == 7
    card.assigns(None, own=True, rollback=True)
    card.client()
    assert card.ready and card.chunks == 7
    assert card.root() == "0.1.0"
    assert card.client().models == {CLIENT: version_number("0.1.0")}
    card.assigns(release("0.3.0"), own=True)
    card.client()
    assert card.root() == "0.3.0"


def test_nothing_older_comes_back_by_a_number_alone(card: Card) -> None:
    card.assigns(release("0.3.0"))
    card.client()
    card.root()
    card.assigns(release("0.2.0"))
    card.client()
    assert not card.ready and card.chunks == 7
    # Nor when the client hands it over all the same.
    updates = card.state / "updates"
    signed = SignedDocument.create(card.fleet.operator, RELEASE_KIND, release("0.2.0").to_bytes())
    (updates / "release.json").write_text(signed.model_dump_json())
    (updates / "bundle.tar.xz").write_bytes(BUNDLES["0.2.0"])
    (updates / "ready").touch()
    with pytest.raises(UpdateRefused, match="not newer"):
        card.root()


def test_only_the_operators_word_counts(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "covey.edge")
    card.assigns(release("0.2.0"), key=Ed25519PrivateKey.generate())
    card.client()
    assert "announcement-refused" in caplog.text
    assert not card.ready and card.chunks == 0
    card.assigns(release("0.2.0", target="trixie-arm64"))
    card.client()
    assert "no-bundle-for-this-system" in caplog.text
    assert not card.ready and card.chunks == 0


def test_a_download_goes_on_where_a_process_ended(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "MAP_EVERY", 2)
    card.assigns(release("0.2.0"))
    card.client(messages=5)  # the announcement and four chunks
    assert not card.ready
    card.chunks = 0
    card.client()
    # Three of seven are left, asked for at once and again when the broker has the device.
    assert card.ready and card.chunks == 6
    assert card.root() == "0.2.0"


def test_truncated_and_altered_bundles_are_not_handed_over(card: Card) -> None:
    blob = release("0.2.0").bundles[0].blob
    for damaged in (BUNDLES["0.2.0"][:-1] + b"?", bytes(len(BUNDLES["0.2.0"]))):
        card.files[blob] = damaged
        card.assigns(release("0.2.0"))
        card.client()
        assert not card.ready, "the digest over the whole finds it"
    card.files[blob] = BUNDLES["0.2.0"]
    card.assigns(release("0.2.0"))
    card.client()
    assert card.ready
    # What is changed after that, root's program finds.
    (card.state / "updates" / "bundle.tar.xz").write_bytes(BUNDLES["0.2.0"][:-1])
    with pytest.raises(UnusableBundle, match="not the one that the operator signed"):
        card.root()
    assert "not the one that the operator signed" in card.client().failures[CLIENT].detail


def test_no_release_names_a_bundle_larger_than_any() -> None:
    with pytest.raises(ValueError, match="less than or equal"):
        ClientBundle(target=TARGET, sha256="0" * 64, size=MAX_BUNDLE_BYTES + 1)
    described = ClientBundle(target=TARGET, sha256="0" * 64, size=1)
    with pytest.raises(ValueError, match="same system"):
        ClientRelease(version="0.2.0", bundles=(described, described))


def test_a_full_card_is_tried_again_later(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError(28, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(own_client, "write_durably", full)
        card.assigns(release("0.2.0"))
        card.client()
    assert not card.ready and card.chunks == 7
    card.client()
    assert card.ready and card.chunks == 7, "the bundle itself was here already"


def test_what_comes_to_nothing_is_handed_over_ever_more_seldom(card: Card) -> None:
    card.assigns(release("0.2.0"))
    message = decode_to_device(card.waiting.pop())[0]
    assert isinstance(message, ModelAnnouncement)
    credentials = load_credentials(card.state)
    told = client_updates.verified(Profile.enrolled(credentials.bundle, credentials.identity), message)
    assert told is not None and told.release is not None
    client = ClientUpdates(
        {"fleet": told}, Sight("0.1.0", TARGET), blob=told.release.bundles[0].blob, due=0.0
    )
    at = []
    for second in range(0, 20_000, 10):
        stamp = Stamp(second, float(second), bytes(32))
        client, outputs = client_updates.ticked(client, 4, stamp, limited=False, idle=second != 60)
        at += [second for output in outputs if isinstance(output, HandOver)]
    # Not at 60, while a round runs.
    assert at[:6] == [0, 70, 190, 430, 910, 1870] and at[-1] - at[-2] == 3600


def test_a_client_that_was_not_installed_as_a_bundle_does_not_update_itself(tmp_path: Path) -> None:
    assert OwnClient.here(tmp_path) is None


@pytest.mark.parametrize("version", ["0.0.1", "0.1.0", "1.2.3", "999.999.999"])
def test_versions_and_their_numbers_belong_together(version: str) -> None:
    assert version_text(version_number(version)) == version
    assert version_number("0.9.999") < version_number("0.10.0") < version_number("1.0.0")
    with pytest.raises(ValueError, match="above"):
        version_number("0.1000.0")
