"""A state directory opened: its database, its keys, and the operations on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from aggregator.adapters import keyfiles
from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.sql_engine import url_of_file
from aggregator.clock import SystemClock
from aggregator.fleet.authority import Authority
from aggregator.fleet.enrolment import Doorway
from aggregator.operations import Operator
from aggregator.repository import Repository
from aggregator.state import NotInitialised, Settings, StateDirectory, open_store, private_files
from protocol.identity import key_id


@contextlib.contextmanager
def open_operator(state: Path) -> Iterator[Operator]:
    """Opens the operations on a state directory; the service may be running or not.

    Example:
        with open_operator(state) as operator:
            campaign = operator.start_rounds(CampaignRequest("watch", rounds=3))
            views = operator.rounds(campaign.campaign_id)

    Raises:
        NotInitialised, UnusableKeys, RepositoryError: it says what to do.
    """
    place = StateDirectory(state)
    with open_repository(place) as repository:
        yield operator_of(place, repository)


@contextlib.contextmanager
def open_repository(place: StateDirectory) -> Iterator[SqlRepository]:
    """Opens the database of a state directory that was made before.

    Raises:
        NotInitialised, RepositoryError: it says what to do.
    """
    place.settings()
    url = place.database_url()
    if url == url_of_file(place.database) and not place.database.exists():
        # Opening would make an empty one.
        raise NotInitialised(f"{place.database} is gone: restore it, or run `covey aggregator migrate`")
    with private_files():
        repository = SqlRepository(url)
    with contextlib.closing(repository):
        yield repository


def operator_of(place: StateDirectory, repository: Repository) -> Operator:
    """The operations on a state directory whose repository is open."""
    settings = place.settings()
    authority = authority_of(place)
    return Operator(
        repository,
        open_store(place, settings),
        authority,
        SystemClock(),
        _publishers(settings),
        Doorway(settings.api_url, _trust(place, settings, authority), settings.broker),
    )


def authority_of(place: StateDirectory) -> Authority:
    """The fleet's keys, read anew: the CA's may have come, or gone."""
    return keyfiles.load(place.keys, place.file(place.settings().ca_key))


def _trust(place: StateDirectory, settings: Settings, authority: Authority) -> bytes | None:
    """DER of the certificate by which the API's own is checked."""
    if settings.api_certificate is None:
        return authority.ca
    issuer = place.file(settings.api_ca)
    if issuer is None:
        return None
    try:
        return x509.load_pem_x509_certificate(issuer.read_bytes()).public_bytes(Encoding.DER)
    except (OSError, ValueError) as error:
        raise NotInitialised(f"api_ca, {issuer}, is no certificate in a PEM file: {error}") from error


def _publishers(settings: Settings) -> dict[str, Ed25519PublicKey]:
    keys = (Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)) for text in settings.publishers)
    return {key_id(key): key for key in keys}
