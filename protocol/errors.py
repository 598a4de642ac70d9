"""The typed errors of the protocol: what went wrong, never what was secret about it."""

from __future__ import annotations


class ProtocolError(Exception):
    """Anything that the other side, or the network, did wrong."""


class MalformedMessage(ProtocolError):
    """Bytes that are no valid message: wrong frame, schema, size, type or version."""


class BadSignature(ProtocolError):
    """A signature, certificate or signed document that does not verify."""


class TransferError(ProtocolError):
    """A chunk or a transfer that contradicts what was announced."""


class RoundViolation(ProtocolError):
    """A peer or the aggregator broke the rules of a round; the client answers with an abort.

    Attributes:
        code: a short stable word for logs, metrics and tests, such as `overlapping-sets`.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class IllegalEvent(ProtocolError):
    """An event that the current phase has no rule for: it raises, and nothing changes."""
