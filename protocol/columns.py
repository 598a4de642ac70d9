"""What a message has for each of many clients: two arrays in the body of its frame, and no objects.

A column is the number of its clients (two bytes, little-endian), their roster indices (the same, ascending)
and one value of a fixed width for each of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from protocol.errors import MalformedMessage
from protocol.fields import Schema

MAX_ROWS = 512
"""Clients in a column: the largest complete graph."""
INDEX = np.dtype("<u2")
"""A roster index in a column."""


class Column(Schema):
    """One value for each of some clients, by their roster indices, which ascend: none is there twice."""

    width: ClassVar[int]
    """Bytes of one value."""

    peers: Annotated[bytes, Field(max_length=2 * MAX_ROWS)] = b""
    values: bytes = b""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.peers) % 2 or len(self.values) * 2 != len(self.peers) * self.width:
            raise ValueError(f"{len(self.values)} bytes are not {self.width} for each of its clients")
        indices = np.frombuffer(self.peers, INDEX)
        if (indices[1:] <= indices[:-1]).any():
            raise ValueError("its clients do not ascend")
        return self

    @classmethod
    def of(cls, values: Mapping[int, bytes]) -> Self:
        """Makes a column of roster index -> value.

        Raises:
            ValidationError: too many, or a value of another width.
        """
        indices = sorted(values)
        return cls(
            peers=np.array(indices, INDEX).tobytes(), values=b"".join([values[index] for index in indices])
        )

    @classmethod
    def from_body(cls, body: bytes | memoryview) -> Self:
        """Parses what `to_body` made.

        Raises:
            MalformedMessage: another length than that of its rows, too many rows, or clients that do not
                ascend.
        """
        rows = int.from_bytes(body[:2], "little")
        start, values = 2, 2 + 2 * rows
        if rows > MAX_ROWS or len(body) != values + cls.width * rows:
            raise MalformedMessage(f"a body of {len(body)} bytes is no column of {cls.width}-byte values")
        try:
            return cls(peers=bytes(body[start:values]), values=bytes(body[values:]))
        except ValidationError as error:
            raise MalformedMessage("the clients of a column do not ascend") from error

    def to_body(self) -> bytes:
        """The column as the body of a frame."""
        return b"".join(((len(self.peers) // 2).to_bytes(2, "little"), self.peers, self.values))

    def indices(self) -> list[int]:
        """The clients' roster indices, ascending."""
        indices: list[int] = np.frombuffer(self.peers, INDEX).tolist()
        return indices

    def by_peer(self) -> dict[int, bytes]:
        """Roster index -> value, ascending."""
        width, values = self.width, self.values
        starts = range(0, len(values), width)
        return {
            peer: values[start : start + width] for peer, start in zip(self.indices(), starts, strict=True)
        }


class SealedColumn(Column):
    """Sealed Shamir shares, to or from each of the clients: two 33-byte field elements and a 16-byte tag."""

    width: ClassVar[int] = 82


class ShareColumn(Column):
    """One Shamir share of a secret of each of the clients: a big-endian field element."""

    width: ClassVar[int] = 33


class SignatureColumn(Column):
    """A consistency signature of each of the clients."""

    width: ClassVar[int] = 64
