"""What the API says of the client that devices run."""

from __future__ import annotations

from typing import Self

from aggregator import records
from aggregator.client_operations import ReleaseView
from aggregator.records import Stage
from aggregator.web.schemas import ApiModel


class ReleaseBundle(ApiModel):
    """The file that one system installs.

    Attributes:
        target: the system, as `bookworm-arm64`.
        size: bytes.
    """

    target: str
    sha256: str
    size: int


class Release(ApiModel):
    """A published release of the client.

    Attributes:
        version: as `0.2.0`.
        number: what rollouts of `covey-client` call it.
        stage: how far it has come: a part of the fleet has a canary, all of it a stable one.
    """

    version: str
    number: int
    stage: Stage
    bundles: tuple[ReleaseBundle, ...]
    created_at: float

    @classmethod
    def of(cls, view: ReleaseView) -> Self:
        """From the record."""
        return cls(
            version=view.release.version,
            number=view.record.version,
            stage=view.record.stage,
            bundles=tuple(
                ReleaseBundle(target=each.target, sha256=each.sha256, size=each.size)
                for each in view.release.bundles
            ),
            created_at=view.record.created_at,
        )


class ClientCount(ApiModel):
    """Devices that run one version of the client on one system.

    Attributes:
        version: as they say it; empty before they have said anything.
        target: system of the bundle; empty where none was installed that could be updated.
        devices: of the fleet, online or not.
    """

    version: str
    target: str
    devices: int
    online: int

    @classmethod
    def of(cls, count: records.ClientCount) -> Self:
        """From the record."""
        return cls(version=count.version, target=count.target, devices=count.devices, online=count.online)
