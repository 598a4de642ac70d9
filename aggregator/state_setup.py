"""Makes a state directory, and the files that its broker is started with."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import ssl
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from aggregator.access.roles import Role
from aggregator.adapters import broker_files, keyfiles, sql_migration
from aggregator.adapters.objects_s3 import check_address
from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.sql_engine import url_of_file, without_password
from aggregator.clock import SystemClock
from aggregator.fleet.authority import Authority
from aggregator.opened_state import authority_of, open_repository
from aggregator.operations import OperationRefused, Operator
from aggregator.private_file import replace_private
from aggregator.state import (
    DATABASE_VARIABLE,
    DEFAULT_BROKER,
    Settings,
    StateDirectory,
    open_store,
    private_files,
)
from protocol.broker_address import BrokerAddress
from protocol.enrolment import ApiUrl
from protocol.fields import Slug

FIRST_TOKEN_SECONDS = 90 * 86_400
_SLUG: TypeAdapter[str] = TypeAdapter(Slug)
_API_URL: TypeAdapter[str] = TypeAdapter(ApiUrl)


def init(
    state: Path,
    *,
    fleet: str = "covey",
    broker: str = DEFAULT_BROKER,
    insecure: bool = False,
    objects: str | None = None,
    objects_endpoint: str | None = None,
    broker_names: Sequence[str] = (),
    api_url: str | None = None,
) -> None:
    """Makes a state directory: keys, CA, database and registry, readable by their owner only.

    For a broker at an `mqtts://` address, also the files that it is started with; see `write_broker`.
    With COVEY_DATABASE_URL, the database is that one; the settings remember its URL without the password.

    Args:
        state: the directory; made when it is not there.
        fleet: name of the fleet.
        broker: address of the broker.
        insecure: allow an unencrypted broker on another machine.
        objects: where artefacts go, such as `s3://bucket/prefix`; by default into the state directory.
        objects_endpoint: URL of that server, unless it is Amazon's.
        broker_names: more host names and addresses that the broker's certificate is to hold.
        api_url: of the API as devices reach it, such as `https://hub.example:8443`; the service then listens
            at that port of every address.

    Raises:
        FileExistsError: it holds an aggregator already; nothing was changed.
        InvalidAddress, ValueError: a name or address that cannot be used.
    """
    try:
        _SLUG.validate_python(fleet)
    except ValidationError as error:
        raise ValueError("a fleet's name has lower-case letters, digits and hyphens, at most 63") from error
    address = BrokerAddress.parse(broker, insecure=insecure)
    reach = _reach(api_url)
    if objects is not None:
        check_address(objects)
    place = StateDirectory(state)
    if place.settings_file.exists() or place.keys.exists():
        raise FileExistsError(f"{state} holds an aggregator already")
    database = os.environ.get(DATABASE_VARIABLE)
    remembered = without_password(database) if database else None
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.chmod(0o700)
    moment = SystemClock().moment()
    authority = Authority.create(fleet, now=int(moment.unix), serial=secrets.randbits(120) | 1)
    keyfiles.save(authority, place.keys)
    settings = Settings(
        fleet=fleet,
        broker=broker,
        database=remembered,
        objects=objects,
        objects_endpoint=objects_endpoint,
        **reach,
    )
    if address.tls:
        settings = settings.model_copy(update=_broker_identity(place))
        broker_files.write(place.broker, place.keys, authority, address, broker_names, now=moment.unix)
    with private_files():
        url = database or url_of_file(place.database)
        sql_migration.migrate(url)
        with contextlib.closing(SqlRepository(url)) as repository:
            operator = Operator(repository, open_store(place, settings), authority, SystemClock())
            token, _ = operator.create_token(
                role=Role.ADMIN,
                label="first",
                seconds=FIRST_TOKEN_SECONDS,
                created_by="covey aggregator init",
            )
        (state / "admin-token").write_text(token + "\n")
        (state / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(authority.ca))
        # Last: a directory with settings is a complete one.
        _save(place, settings)


def _reach(api_url: str | None) -> dict[str, str]:
    if api_url is None:
        return {}
    try:
        _API_URL.validate_python(api_url)
        port = urlsplit(api_url).port or 443
    except ValueError as error:
        raise ValueError(f"{api_url} is no address for devices: write https://HOST:8443") from error
    return {"api_url": api_url, "listen": f"0.0.0.0:{port}"}


def _broker_identity(place: StateDirectory) -> dict[str, Path]:
    keys = place.keys.relative_to(place.path)
    return {
        "tls_ca": Path("ca.pem"),
        "tls_certificate": keys / broker_files.IDENTITY_CERTIFICATE,
        "tls_key": keys / broker_files.IDENTITY_KEY,
    }


def write_broker(state: Path, names: Sequence[str] = ()) -> Path:
    """Writes what the broker is started with anew, with fresh certificates; returns the directory.

    For a certificate that is about to end, another name, or a state directory of an earlier Covey. The broker
    takes them at its next start, and so does the aggregator.

    Args:
        state: the state directory.
        names: host names and addresses that the broker's certificate is to hold, besides that of its address
            and this machine's own.

    Raises:
        OperationRefused: the address of the broker is not an `mqtts://` one.
        NotInitialised, UnusableKeys, EnrolmentRefused: it says what to do.
    """
    place = StateDirectory(state)
    settings = place.settings()
    address = BrokerAddress.parse(settings.broker, insecure=True)
    if not address.tls:
        raise OperationRefused(
            f"the broker is at {address}, without TLS: write an mqtts:// address in {place.settings_file}"
        )
    with private_files():
        now = SystemClock().moment().unix
        with open_repository(place) as repository, repository.read() as reader:
            devices, revoked = reader.active_devices(), reader.certificates(revoked=True)
        broker_files.write(
            place.broker,
            place.keys,
            authority_of(place),
            address,
            names,
            devices=devices,
            revoked=revoked,
            now=now,
        )
        if settings.tls_certificate is None:
            _save(place, settings.model_copy(update=_broker_identity(place)))
    return place.broker


def _save(place: StateDirectory, settings: Settings) -> None:
    content = settings.model_dump(mode="json", exclude_none=True)
    replace_private(place.settings_file, (json.dumps(content, indent=2) + "\n").encode())
