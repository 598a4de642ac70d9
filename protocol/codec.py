"""Bytes <-> messages.

A frame is the length of its header (4 bytes, little-endian), the header (the message as JSON) and the body:
the bytes of a chunk, or the column of a message that has one (`protocol.columns`). Everything is bounded
before it is parsed.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from protocol.columns import Column
from protocol.errors import MalformedMessage
from protocol.messages import (
    CHUNK_BYTES,
    BlobChunk,
    FromDevice,
    ShareDelivery,
    ShareKeys,
    ToDevice,
    UnmaskingShares,
    UnmaskRequest,
)

MAX_HEADER_BYTES = 512 * 1024
MAX_FRAME_BYTES = 4 + MAX_HEADER_BYTES + CHUNK_BYTES
MAX_COMPLAINT = 200
"""Characters of an error about somebody else's message."""

_COLUMNS: dict[type, str] = {
    ShareKeys: "shares",
    ShareDelivery: "shares",
    UnmaskRequest: "signatures",
    UnmaskingShares: "shares",
}
"""The field that is the body."""


@cache
def _schema(union: Any) -> TypeAdapter[Any]:
    """The parser of one direction, made when it is first needed: a device never parses what devices say."""
    return TypeAdapter(Annotated[union, Field(discriminator="type")])


def encode(message: FromDevice | ToDevice, body: bytes | memoryview = b"") -> bytes:
    """Makes the frame of a message; only a chunk has a body that is not its own."""
    field = _COLUMNS.get(type(message))
    if field is None:
        header = message.model_dump_json().encode()
    else:
        header = message.model_dump_json(exclude={field}).encode()
        column: Column = getattr(message, field)
        body = column.to_body()
    if len(header) > MAX_HEADER_BYTES or len(body) > CHUNK_BYTES:
        raise MalformedMessage(f"a {message.type} of {len(header)} + {len(body)} bytes is too large to send")
    return b"".join((len(header).to_bytes(4, "little"), header, body))


def decode_from_device(frame: bytes) -> tuple[FromDevice, memoryview]:
    """Parses a frame that a device sent; returns the message and a view of what else is in its body.

    Raises:
        MalformedMessage: anything but exactly one well-formed message.
    """
    return _decode(_schema(FromDevice), frame)


def decode_to_device(frame: bytes) -> tuple[ToDevice, memoryview]:
    """Parses a frame that the aggregator sent; returns the message and a view of what else is in its body.

    Raises:
        MalformedMessage: anything but exactly one well-formed message.
    """
    return _decode(_schema(ToDevice), frame)


def _decode(schema: TypeAdapter[Any], frame: bytes) -> tuple[Any, memoryview]:
    if len(frame) > MAX_FRAME_BYTES:
        raise MalformedMessage(f"a frame of {len(frame)} bytes is over {MAX_FRAME_BYTES}")
    if len(frame) < 4:
        raise MalformedMessage("the frame ends within its length")
    size = int.from_bytes(frame[:4], "little")
    if size > MAX_HEADER_BYTES or 4 + size > len(frame):
        raise MalformedMessage(f"a header of {size} bytes does not fit a frame of {len(frame)}")
    try:
        message = schema.validate_json(frame[4 : 4 + size])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedMessage(_plain(f"{where or 'message'}: {first['msg']}")) from error
    body = memoryview(frame)[4 + size :]
    field = _COLUMNS.get(type(message))
    if field is not None:
        if field in message.model_fields_set:
            raise MalformedMessage(f"{field} belongs in the body of a {message.type}, not in its header")
        column: type[Column] = type(getattr(message, field))
        return message.model_copy(update={field: column.from_body(body)}), body[len(body) :]
    if isinstance(message, BlobChunk):
        _check_chunk(message, body)
    elif len(body):
        raise MalformedMessage(f"{len(body)} bytes after a {message.type}, which has no body")
    return message, body


def _plain(text: str) -> str:
    """What may go into a log: a schema's complaint quotes names and tags as the sender wrote them."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_COMPLAINT])


def chunk_count(size: int) -> int:
    """Chunks of a blob of `size` bytes."""
    return -(-size // CHUNK_BYTES)


def chunk_length(size: int, index: int) -> int:
    """Bytes of the chunk at `index` of a blob of `size` bytes."""
    return min(CHUNK_BYTES, size - index * CHUNK_BYTES)


def _check_chunk(chunk: BlobChunk, body: memoryview) -> None:
    if chunk.index >= chunk_count(chunk.blob.size):
        raise MalformedMessage(f"chunk {chunk.index} is beyond the end of its blob")
    expected = chunk_length(chunk.blob.size, chunk.index)
    if len(body) != expected:
        raise MalformedMessage(f"chunk {chunk.index} has {len(body)} bytes in place of {expected}")
    if zlib.crc32(body) != chunk.crc32:
        raise MalformedMessage(f"chunk {chunk.index} fails its checksum")
