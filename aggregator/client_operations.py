"""What an operator does about the client that the devices run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.clock import Clock
from aggregator.fleet.authority import Authority
from aggregator.records import ClientCount, Version
from aggregator.registry.artefacts import ArtefactStore
from aggregator.registry.publishing import release_of
from aggregator.registry.releases import publish_release, release_from
from aggregator.repository import Repository
from protocol.client_release import CLIENT, ClientRelease


@dataclass(frozen=True)
class ReleaseView:
    """A release of the client.

    Attributes:
        record: with its stage; its number is the version.
    """

    record: Version
    release: ClientRelease

    @classmethod
    def of(cls, record: Version) -> ReleaseView:
        """Reads it."""
        return cls(record, release_of(record))


class ClientOperations:
    """The part of `aggregator.operations.Operator` about the client itself."""

    repository: Repository
    store: ArtefactStore
    authority: Authority
    clock: Clock
    publishers: Mapping[str, Ed25519PublicKey]

    def publish_client(self, bundles: Sequence[bytes], signature: bytes | None = None) -> ReleaseView:
        """Publishes a release; no device has it before a rollout.

        Args:
            bundles: the files of one version, one for each system.
            signature: JSON of the SignedDocument around the release; needed where publishers are named.

        Raises:
            PublishRefused: it says what to do.
        """
        # Before the transaction: to read through bundles takes seconds.
        release = release_from(bundles)
        with self.repository.write() as writer:
            record = publish_release(
                writer,
                self.store,
                self.authority,
                release,
                bundles=bundles,
                now=self.clock.moment().unix,
                signature=signature,
                publishers=self.publishers,
            )
        return ReleaseView(record, release)

    def releases(self) -> tuple[ReleaseView, ...]:
        """Releases of the client, oldest version first."""
        with self.repository.read() as reader:
            return tuple(ReleaseView.of(version) for version in reader.versions(CLIENT))

    def client_counts(self) -> tuple[ClientCount, ...]:
        """How many devices of the fleet run each version of the client, by version and system."""
        with self.repository.read() as reader:
            return reader.client_counts()
