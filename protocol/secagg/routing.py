"""Sealed shares from those who sealed them to those who open them: rows are exchanged, and no objects made.

Every client sends one row of k sealed shares, to its neighbours in ascending order; every client gets the k
that its neighbours sealed for it. A cohort of 10,000 exchanges half a million, in one block of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from protocol.columns import INDEX, SealedColumn

_SEALED = np.dtype(f"V{SealedColumn.width}")


def incoming_edges(near: NDArray[np.uint16]) -> NDArray[np.int64]:
    """For each client, where its neighbours' rows have what they sealed for it.

    Args:
        near: the neighbours of each client, ascending; uint16, shape (n, k).

    Returns:
        Places in the n * k shares of all rows, by sender, ascending; int64, shape (n, k).
    """
    # By receiver; a stable sort keeps what is for one receiver in the order of the senders.
    return np.argsort(near, axis=None, kind="stable").reshape(near.shape)


class SealedMail:
    """The sealed shares of a whole cohort, on their way."""

    def __init__(
        self, near: NDArray[np.uint16], edges: NDArray[np.int64], sealed: Mapping[int, bytes]
    ) -> None:
        """Takes the rows of all who sent one.

        Args:
            near: the neighbours of each client, ascending; uint16, shape (n, k).
            edges: `incoming_edges(near)`.
            sealed: sender -> the values of its `SealedColumn`, for all of its neighbours.
        """
        size, degree = near.shape
        missing = bytes(degree * SealedColumn.width)
        rows = b"".join([sealed.get(sender, missing) for sender in range(size)])
        self._near, self._edges = near, edges
        self._rows = np.frombuffer(rows, _SEALED)
        self._sent = np.zeros(size, np.bool_)
        self._sent[list(sealed)] = True

    def __eq__(self, other: object) -> bool:
        """Whether the same shares go the same ways, as of a state and of its replay."""
        if not isinstance(other, SealedMail):
            return NotImplemented
        return (
            np.array_equal(self._near, other._near)
            and np.array_equal(self._sent, other._sent)
            and self._rows.tobytes() == other._rows.tobytes()
        )

    def to(self, receiver: int) -> SealedColumn:
        """What was sealed for one client, by sender; nothing for one that sent nothing itself."""
        if not self._sent[receiver]:
            return SealedColumn()
        senders, edges = self._near[receiver], self._edges[receiver]
        here = self._sent[senders]
        if not here.all():
            senders, edges = senders[here], edges[here]
        return SealedColumn(peers=senders.astype(INDEX).tobytes(), values=self._rows[edges].tobytes())
