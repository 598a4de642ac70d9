"""The API of a running service: its certificate, its context, its place on the network, and how to find it.

STATE/api/server.pem, server-key.pem    the certificate that the fleet's CA issued for it
STATE/api/local.json                    while it runs: where it is, and a token for who can read this file
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator.fleet import server_certificate
from aggregator.fleet.authority import Authority
from aggregator.operations import Operator
from aggregator.private_file import replace_private
from aggregator.telemetry.metrics import ServiceMetrics
from aggregator.web.api import create_app
from aggregator.web.context import Context, LocalKey, Vitals
from aggregator.web.events import EventFeed
from aggregator.web.limit_settings import DEFAULT_LIMITS, Limits
from aggregator.web.listen import ListenAddress
from aggregator.web.local import LocalEndpoint, new_local_token
from aggregator.web.oidc import Oidc
from aggregator.web.oidc_settings import OidcSettings
from aggregator.web.server import ApiServer, CertificateFiles

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def serving(
    directory: Path,
    operator: Operator,
    enrolling: Callable[[], Authority],
    feed: EventFeed,
    listen: ListenAddress,
    *,
    vitals: Callable[[], Vitals],
    names: Sequence[str] = (),
    files: CertificateFiles | None = None,
    oidc: OidcSettings | None = None,
    metrics: ServiceMetrics | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[ApiServer]:
    """Serves the API while the block lasts.

    Args:
        directory: `STATE/api`.
        operator: the operations.
        enrolling: loads the authority with the CA's key.
        feed: what the service's repository tells.
        listen: where.
        vitals: of the service.
        names: by which clients may call it, besides this machine's own.
        files: a certificate from elsewhere; by default the fleet's CA issues one.
        oidc: how people sign in; None for tokens only.
        metrics: what the service counts.
        limits: how much anybody may ask for.

    Raises:
        CannotListen, EnrolmentRefused, UnusableKeys: it says what to do.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    if listen.tls and files is None:
        files = _certificate(directory, operator, enrolling, _names(listen, names))
    token, user = new_local_token()
    context = Context(
        operator,
        enrolling,
        feed,
        local=LocalKey.of(token, user),
        oidc=None if oidc is None else Oidc(oidc),
        vitals=vitals,
        metrics=metrics,
        limits=limits,
    )
    with (
        ApiServer(create_app(context), listen, files) as server,
        LocalEndpoint(url=server.url, token=token).shown(directory),
    ):
        logger.info("the API is at %s", server.url)
        yield server


def _certificate(
    directory: Path, operator: Operator, enrolling: Callable[[], Authority], names: Sequence[str]
) -> CertificateFiles:
    files = CertificateFiles(directory / "server.pem", directory / "server-key.pem")
    now = operator.clock.moment().unix
    with contextlib.suppress(OSError):
        known = files.certificate.read_bytes()
        ca = operator.authority.ca
        if files.key.exists() and server_certificate.serves(known, ca, names, now=now):
            return files
    key = generate_private_key(SECP256R1())
    serial = secrets.randbits(120) | 1
    issued = server_certificate.issue(enrolling(), key.public_key(), names, now=now, serial=serial)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    replace_private(files.key, pem)
    replace_private(files.certificate, issued)
    logger.info("the fleet's CA issued a certificate for %s", ", ".join(names))
    return files


def _names(listen: ListenAddress, names: Sequence[str]) -> tuple[str, ...]:
    own = {"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn(), *names}
    if listen.host not in ("0.0.0.0", "::"):  # noqa: S104 (compared, not listened at)
        own.add(listen.host)
    return tuple(sorted(name for name in own if name))
