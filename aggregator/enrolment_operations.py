"""What an operator does about who is in the fleet, and what a device does that comes with a ticket."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.clock import Clock
from aggregator.fleet.authority import (
    Authority,
    EnrolmentRefused,
    has_key,
    issued_certificate,
    requested_name,
)
from aggregator.fleet.enrolment import (
    ID_BYTES,
    SECRET_BYTES,
    Doorway,
    EnrolmentToken,
    TokenRefused,
    check_token,
    make_enrolment_token,
    status,
    token_id_of,
)
from aggregator.records import Device, IssuedCertificate
from aggregator.refusals import NoSuch, OperationRefused, there
from aggregator.repository import NotFound, Repository, Writer
from protocol.enrolment import EnrolmentBundle, EnrolmentRequest, EnrolmentTicket
from protocol.errors import BadSignature
from protocol.identity import key_id, open_request

NUMBER = "{n}"


@dataclass(frozen=True)
class NewTicket:
    """A ticket, which is shown once, and what is kept of its token."""

    ticket: EnrolmentTicket
    record: EnrolmentToken


class EnrolmentOperations:
    """The part of `aggregator.operations.Operator` about who is in the fleet."""

    repository: Repository
    authority: Authority
    clock: Clock
    doorway: Doorway

    # --- tickets

    def make_tickets(
        self,
        *,
        amount: int,
        name: str,
        first: int = 1,
        labels: Iterable[str] = (),
        seconds: float,
        replaces: bool = False,
        url: str | None = None,
        created_by: str,
    ) -> tuple[NewTicket, ...]:
        """Makes tickets, each of which lets one device in.

        Args:
            amount: how many.
            name: id of the device; `{n}` counts, past the names that are taken.
            first: where `{n}` starts.
            labels: that the devices get.
            seconds: how long the tickets are valid.
            replaces: the devices take the places of enrolled ones of these names: none is skipped.
            url: of the API, as devices reach it, in place of the usual one.
            created_by: name of the principal.

        Raises:
            OperationRefused: the names are taken, or no device could use the tickets.
        """
        if amount > 1 and NUMBER not in name:
            raise OperationRefused(f"{amount} devices need {NUMBER} in their name, as barn-{NUMBER}")
        now = self.clock.moment().unix
        made: list[NewTicket] = []
        with self.repository.write() as writer:
            waiting = {token.name for token in writer.enrolment_tokens() if status(token, now) == "open"}
            for chosen in _names(name, first):
                if chosen in waiting or (not replaces and writer.device(chosen) is not None):
                    if replaces or NUMBER not in name:
                        raise OperationRefused(_taken(chosen, ticket=chosen in waiting))
                    continue
                token, record = make_enrolment_token(
                    secrets.token_bytes(ID_BYTES + SECRET_BYTES),
                    name=chosen,
                    labels=tuple(labels),
                    replaces=replaces,
                    now=now,
                    seconds=seconds,
                    created_by=created_by,
                )
                made.append(NewTicket(self.doorway.ticket(chosen, token, url), record))
                writer.add_enrolment_token(record)
                if len(made) == amount:
                    break
        return tuple(made)

    def enrolment_tokens(self) -> tuple[EnrolmentToken, ...]:
        """Every enrolment token ever made, oldest first, without what opens it."""
        with self.repository.read() as reader:
            return reader.enrolment_tokens()

    def revoke_enrolment_token(self, token_id: str) -> EnrolmentToken:
        """Revokes a ticket; a device that came in by it stays.

        Raises:
            NoSuch: there is none.
        """
        try:
            with self.repository.write() as writer:
                writer.revoke_enrolment_token(token_id, self.clock.moment().unix)
                return there(writer.enrolment_token(token_id), f"no enrolment token {token_id}")
        except NotFound as error:
            raise NoSuch(f"{error}: see `covey device token list`") from error

    # --- devices come in

    def enrol_by_ticket(
        self, request: EnrolmentRequest, enrolling: Callable[[], Authority]
    ) -> EnrolmentBundle:
        """Lets a device in that shows a token, once; the same key gets the same certificate again.

        Its name and labels are those that were recorded with the token.

        Args:
            request: the device's.
            enrolling: loads the authority with the CA's key; not before it is clear that one is needed.

        Raises:
            TokenRefused: the token lets nobody in, or let another key in.
            CaOffline: a certificate is needed, and the CA's key is kept elsewhere: the token stays good.
            EnrolmentRefused: it says what to do.
        """
        try:
            _, public_key = open_request(request.request)
        except BadSignature as error:
            raise EnrolmentRefused(f"{error}: make one with `covey-edge enroll --ticket`") from error
        now = self.clock.moment().unix
        token_id, key = token_id_of(request.token), key_id(public_key)
        # One transaction, and one writer at a time: of two devices with one token, one comes too late.
        with self.repository.write() as writer:
            token = check_token(request.token, writer.enrolment_token(token_id), key, now)
            known = writer.device(token.name)
            if token.used_at is not None:
                return self._again(known, public_key)
            device = self._issue(
                writer, enrolling(), request.request, known, token.name, token.replaces, token_id
            )
            writer.use_enrolment_token(token_id, key, now)
            if token.labels:
                writer.set_labels(device.device_id, token.labels)
        return self.authority.bundle(device, self.doorway.broker)

    def enrol(self, request: bytes, *, name: str | None = None) -> EnrolmentBundle:
        """Enrols a device by its signing request; the same device may renew its certificate this way.

        Args:
            request: PKCS#10, DER.
            name: the id that it gets; by default the one that it asks for.

        Raises:
            EnrolmentRefused: it says what to do.
        """
        asked = name or requested_name(request)
        with self.repository.write() as writer:
            known = writer.device(asked)
            device = self._issue(writer, self.authority, request, known, name, False, None)
        return self.authority.bundle(device, self.doorway.broker)

    def certificates(self, device_id: str) -> tuple[IssuedCertificate, ...]:
        """The certificates that a device was given, oldest first.

        Raises:
            NoSuch: it is not enrolled.
        """
        with self.repository.read() as reader:
            there(reader.device(device_id), f"no device {device_id}: see `covey device list`")
            return reader.certificates(device_id)

    def _again(self, known: Device | None, public_key: Ed25519PublicKey) -> EnrolmentBundle:
        """What was answered before, to a device whose answer was lost."""
        if known is None or not has_key(known, public_key):
            raise TokenRefused("token-used", "another device took this one's place: ask for a new ticket")
        if known.state != "active":
            raise TokenRefused("token-revoked", f"{known.device_id} is {known.state}: ask for a new ticket")
        return self.authority.bundle(known, self.doorway.broker)

    def _issue(
        self,
        writer: Writer,
        authority: Authority,
        request: bytes,
        known: Device | None,
        name: str | None,
        replaces: bool,
        token_id: str | None,
    ) -> Device:
        now = self.clock.moment().unix
        issued = authority.enrol(
            request, known, name=name, now=now, serial=secrets.randbits(120) | 1, replaces=replaces
        )
        device = replace(issued, token_id=token_id)
        if known is None:
            writer.add_device(device)
        else:
            if not has_key(known, open_request(request)[1]):
                for old in writer.certificates(known.device_id, revoked=False):
                    writer.revoke_certificate(old.serial, now, "another device took its place")
            writer.replace_certificate(device.device_id, device.certificate)
            writer.note_enrolment(device.device_id, token_id, now)
        writer.add_certificate(issued_certificate(device))
        return device


def _names(pattern: str, first: int) -> Iterator[str]:
    return (pattern.replace(NUMBER, str(number)) for number in count(first))


def _taken(name: str, *, ticket: bool) -> str:
    if ticket:
        return f"there is an open ticket for {name}: `covey device token list` shows it, and `revoke` ends it"
    return f"{name} is enrolled: --replace makes a ticket by which another device takes its place"
