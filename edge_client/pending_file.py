"""The file of a pending update: a line of JSON with its metrics, then update and local parameters.

Both are little-endian float32. It holds what no noise hides yet, so it never leaves the device: what a buffer
gets is made of it by encoding, noise and masks.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_client.masked_input import Contribution

_MAX_HEAD = 4096


class InvalidUpdate(ValueError):
    """A file that holds no pending update."""


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", defer_build=True)

    elements: Annotated[int, Field(ge=1)]
    metrics: dict[str, float]


def dump_update(contribution: Contribution) -> bytes:
    """The file of an update that training gave, already clipped."""
    head = _Head(elements=contribution.vector.size, metrics=dict(contribution.metrics))
    own = b"" if contribution.local is None else contribution.local.astype("<f4").tobytes()
    return b"".join(
        (head.model_dump_json().encode(), b"\n", contribution.vector.astype("<f4").tobytes(), own)
    )


def load_update(data: bytes) -> Contribution:
    """Parses `dump_update`.

    Raises:
        InvalidUpdate: it is another file, or cut off.
    """
    end = data.find(b"\n", 0, _MAX_HEAD)
    try:
        head = _Head.model_validate_json(data[: max(end, 0)])
    except ValidationError as error:
        raise InvalidUpdate("the file begins with no head of an update") from error
    if (len(data) - end - 1) % 4 or len(data) - end - 1 < 4 * head.elements:
        raise InvalidUpdate(f"{len(data) - end - 1} bytes are no update of {head.elements} elements")
    values = np.frombuffer(data, "<f4", offset=end + 1).astype(np.float32)
    own = values[head.elements :]
    return Contribution(values[: head.elements], head.metrics, own if own.size else None)
