"""How tickets, and a device with its certificates, are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.table import Table

from aggregator import cli_output as output
from aggregator.web.enrolment_schemas import EnrolmentToken, IssuedCertificate, NewEnrolmentToken
from aggregator.web.schemas import Device
from protocol.client_release import numbered


def tokens(items: Sequence[EnrolmentToken], *, json: bool) -> None:
    """Prints tickets, without what opens them."""
    if json:
        output.dump(items)
        return
    if not items:
        output.line("no tickets yet: make some with `covey device token --count 5`")
        return
    table = Table("token", "device", "status", "labels", "made", "by", "expires", "used", box=None)
    for column in table.columns[:3]:
        column.no_wrap, column.overflow = True, "fold"
    for t in items:
        used = "" if t.used_at is None else output.moment(t.used_at)
        row = (t.token, t.name, t.status, " ".join(t.labels), output.moment(t.created_at), t.created_by)
        table.add_row(*(escape(text) for text in row), output.moment(t.expires_at), used)
    output.print_table(table)


def device(found: Device, certificates: Sequence[IssuedCertificate], *, json: bool) -> None:
    """Prints a device and its certificates."""
    if json:
        content = found.model_dump(mode="json")
        content["certificates"] = [each.model_dump(mode="json") for each in certificates]
        output.dump_value(content)
        return
    how = "by its operator's signature" if found.token is None else f"with ticket {found.token}"
    output.line(f"{found.device}: {found.state}, {'online' if found.online else 'offline'}")
    output.line(f"  enrolled {output.moment(found.enrolled_at)} {how}")
    output.line(f"  labels {' '.join(found.labels) or '(none)'}")
    if found.excluded is not None:
        output.line(f"  excluded: {found.excluded}")
    system = f" for {found.target}" if found.target else ""
    client = f"{found.client_version or 'unknown'}{system}"
    output.line(f"  last seen {output.moment(found.last_seen)}, client {client}")
    for name, failed in sorted(found.failures.items()):
        reason = f"{failed.code}: {failed.detail}".removesuffix(": ")
        output.line(f"  {name} {numbered(failed.version, name)} failed here: {reason}")
    for each in certificates:
        end = f"valid until {output.moment(each.expires_at)}"
        if each.revoked_at is not None:
            end = f"revoked {output.moment(each.revoked_at)}: {each.reason}"
        output.line(f"  certificate {each.serial}, issued {output.moment(each.issued_at)}, {end}")


def qr_codes(made: Iterable[NewEnrolmentToken]) -> None:
    """Prints the tickets as QR codes, for a screen."""
    import segno

    for each in made:
        sys.stdout.write(f"\n{each.name}\n")
        segno.make_qr(each.ticket).terminal(compact=True)
    sys.stdout.flush()
