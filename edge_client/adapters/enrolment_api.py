"""The fleet's API as a device sees it that has a ticket and nothing else.

TLS by a digest: whoever answers says which certification authority to trust, over a connection that trusts
nobody; when that certificate has the ticket's digest, a second connection trusts it alone, and checks the
host's name as always. Only there is the token sent.

A device without a clock of its own may believe that it is 1970. So these connections do not look at the dates
of certificates: the digest, which is as old as the ticket, says whom to trust. The service's time comes with
its answer, and all certificates are held against that.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import ssl
from typing import Any

from edge_client.enrolling import (
    EnrolmentFailed,
    TicketRefused,
    Unreachable,
    WrongClock,
    WrongTrust,
    refusal,
)
from protocol.enrolment import (
    ENROLMENTS_PATH,
    MAX_ANSWER_BYTES,
    TRUST_PATH,
    EnrolmentAnswer,
    EnrolmentRequest,
    EnrolmentTicket,
)
from protocol.errors import MalformedMessage

TIMEOUT_SECONDS = 30.0
_MAX_TRUST_BYTES = 8_192
_NO_CHECK_TIME = 0x20_0000
"""X509_V_FLAG_NO_CHECK_TIME, <openssl/x509_vfy.h>."""


def enrol(ticket: EnrolmentTicket, request: bytes, *, timeout: float = TIMEOUT_SECONDS) -> EnrolmentAnswer:
    """Shows a ticket, once.

    Args:
        ticket: the operator's.
        request: PKCS#10, DER.
        timeout: seconds for each step.

    Returns:
        The service's answer. The certificate of its connection is good at the answer's time.

    Raises:
        EnrolmentFailed: it says what to do.
    """
    trust = _trust(ticket, timeout)
    body = EnrolmentRequest(token=ticket.token, request=request).model_dump_json().encode()
    host, port = ticket.address
    connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=_trusting(trust))
    try:
        connection.connect()
        shown: Any = connection.sock.getpeercert()
        connection.request("POST", ENROLMENTS_PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read(MAX_ANSWER_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise WrongTrust(
            f"the service at {ticket.url} shows a certificate that is not for this name, or not by the "
            f"ticket's authority ({error.verify_message}): make tickets with an address that it is for"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(ticket, error) from error
    finally:
        connection.close()
    if response.status != 201:
        raise _refusal(response, content)
    try:
        answer = EnrolmentAnswer.from_bytes(content)
    except MalformedMessage as error:
        raise Unreachable(f"what answers at {ticket.url} is of another version: {error}") from error
    first, last = (ssl.cert_time_to_seconds(shown[name]) for name in ("notBefore", "notAfter"))
    if not first <= answer.time <= last:
        raise WrongClock(f"the service's clock contradicts its certificate: have it set at {ticket.url}")
    return answer


def _trust(ticket: EnrolmentTicket, timeout: float) -> bytes:
    """DER of the certificate that has the ticket's digest."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host, port = ticket.address
    connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    try:
        connection.request("GET", TRUST_PATH)
        response = connection.getresponse()
        content = response.read(_MAX_TRUST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(ticket, error) from error
    finally:
        connection.close()
    if response.status != 200:
        refused = _refusal(response, content)
        if isinstance(refused, TicketRefused):
            # Whoever answers here has proved nothing: they cannot say that the ticket is over.
            raise WrongTrust(f"who answers at {ticket.url} does not say who it is; the ticket was not sent")
        raise refused
    if not hmac.compare_digest(hashlib.sha256(content).hexdigest(), ticket.trust_sha256):
        raise WrongTrust(
            f"who answers at {ticket.url} is not the fleet that made this ticket: another service, or "
            "somebody on the way; the ticket was not sent"
        )
    return content


def _trusting(authority: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    flags = ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | flags)
    try:
        context.load_verify_locations(cadata=authority)
    except ssl.SSLError as error:
        raise WrongTrust("the ticket's digest is not one of a certificate: ask for a new ticket") from error
    return context


def _refusal(response: http.client.HTTPResponse, content: bytes) -> EnrolmentFailed:
    try:
        problem = json.loads(content)
        code, detail = str(problem["code"])[:40], str(problem["detail"])[:400]
    except (ValueError, TypeError, KeyError):
        code = detail = ""
    again = response.getheader("Retry-After", "0")
    seconds = min(float(again), 3_600.0) if again.isdecimal() else 0.0
    return refusal(response.status, code, "".join(filter(str.isprintable, detail)), seconds)


def _unreachable(ticket: EnrolmentTicket, error: Exception) -> Unreachable:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)
    return Unreachable(
        f"nobody answers at {ticket.url} ({why}): is this device's network up, and the service running?"
    )
