"""An immutable mapping that grows one entry at a time in constant time: what a phase has received so far.

A server state is a frozen value, and every message makes a new one. With plain dictionaries each copies all
entries before it, which is quadratic in the cohort: 10,000 messages copy 50 million entries a phase.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Generic, TypeVar, cast

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class GrowingMap(Mapping[K, V], Generic[K, V]):
    """A mapping that never changes; `with_item` returns one that has an entry more.

    Versions that grow from each other share one dictionary, in which each entry knows its position; a version
    sees the entries below its own size. Only the newest version can append in place; growing an older one
    copies, so that every version keeps its content for good.

    Assumes: versions of one family grow in one thread.
    """

    __slots__ = ("_entries", "_size")

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        self._entries: dict[K, tuple[int, V]] = {}
        for key, value in dict(items).items():
            self._entries[key] = (len(self._entries), value)
        self._size = len(self._entries)

    def with_item(self, key: K, value: V) -> GrowingMap[K, V]:
        """Returns this mapping with one entry more; O(1) on the newest version.

        Raises:
            KeyError: the key is here already; an answer that was taken is never replaced.
        """
        if key in self:
            raise KeyError(key)
        grown: GrowingMap[K, V] = GrowingMap()
        grown._entries = self._entries
        if len(self._entries) != self._size:
            grown._entries = dict(islice(self._entries.items(), self._size))
        grown._entries[key] = (self._size, value)
        grown._size = self._size + 1
        return grown

    def __getitem__(self, key: K) -> V:
        position, value = self._entries[key]
        if position >= self._size:
            raise KeyError(key)
        return value

    def __contains__(self, key: object) -> bool:
        entry = self._entries.get(cast(K, key))
        return entry is not None and entry[0] < self._size

    def __iter__(self) -> Iterator[K]:
        # A copy, since a newer version may append while this one is walked.
        return iter(list(islice(self._entries, self._size)))

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"GrowingMap({dict(self)!r})"
