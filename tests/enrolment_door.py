"""The API of a real aggregator over TLS, and `covey-edge enroll`."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator.access.roles import Role
from aggregator.fleet import server_certificate
from aggregator.fleet.authority import Authority
from aggregator.web.enrolment_schemas import EnrolmentTokenRequest
from aggregator.web.listen import ListenAddress
from aggregator.web.server import ApiServer, CertificateFiles
from edge_client.main import main
from tests.aggregator_bench import START
from tests.api_bench import Api, api


@dataclass
class Door:
    """Where devices come in.

    Attributes:
        url: as a ticket says it.
    """

    bench: Api
    url: str

    def ticket(self, folder: Path, name: str = "barn-1", **more: Any) -> Path:
        """A file with a new ticket."""
        with self.bench.client() as client:
            request = EnrolmentTokenRequest(**({"name": name, "seconds": 3600.0, "url": self.url} | more))
            (made,) = client.make_tickets(request)
        file = folder / f"{made.token}.ticket"
        file.write_text(made.ticket + "\n")
        return file

    def tokens(self) -> dict[str, str]:
        """Name of a device -> what became of its ticket."""
        with self.bench.client() as client:
            return {each.name: each.status for each in client.enrolment_tokens()}


def server_files(
    folder: Path, authority: Authority, *, now: float, days: int = 397, name: str = "localhost"
) -> CertificateFiles:
    """A server's certificate by a fleet's CA."""
    key = generate_private_key(SECP256R1())
    folder.mkdir(exist_ok=True)
    files = CertificateFiles(folder / "server.pem", folder / "server-key.pem")
    files.certificate.write_bytes(
        server_certificate.issue(authority, key.public_key(), [name], now=now, serial=7, days=days)
    )
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


@contextmanager
def door(
    path: Path,
    *,
    days: int = 397,
    shown: Authority | None = None,
    name: str = "localhost",
    since_now: float = 0.0,
    **changes: Any,
) -> Iterator[Door]:
    """Opens a fleet's API over TLS.

    Args:
        path: the aggregator's directory.
        days: how long the server's certificate is valid.
        shown: whose CA issued it, in place of the fleet's.
        name: that it holds.
        since_now: what the service's clock is ahead of this machine's, seconds.
        changes: of the API's context.
    """
    with api(path, **changes) as bench:
        bench.clock.now = time.time() - START + since_now
        # Those of the bench end within an hour of its own time.
        bench.tokens = {role: bench.token(role, 300 * 86_400) for role in Role}
        now = bench.clock.moment().unix
        files = server_files(path / "api", shown or bench.context.enrolling(), now=now, days=days, name=name)
        with ApiServer(bench.app, ListenAddress.parse("https://127.0.0.1:0"), files) as server:
            yield Door(bench, f"https://localhost:{server.port}")


def lead_to(bench: Api, **changes: Any) -> None:
    """Changes how devices come in."""
    operator = bench.context.operator
    moved = replace(operator, doorway=replace(operator.doorway, **changes))
    object.__setattr__(bench.context, "operator", moved)


def come_in(state: Path, ticket: Path) -> tuple[int, str]:
    """`covey-edge enroll` in this process; returns exit code, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = int(main(["enroll", "--state", str(state), "--ticket", str(ticket)]))
    return code, said.getvalue()


def enroll(state: Path, ticket: Path, *options: str) -> subprocess.Popen[str]:
    """Starts `covey-edge enroll`."""
    command = [sys.executable, "-m", "edge_client.main", "enroll", "--state", str(state)]
    return subprocess.Popen(
        [*command, "--ticket", str(ticket), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a process, when it has ended."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err
