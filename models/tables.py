"""Read the tables of a flatbuffer with bounds: nothing outside of the file is followed, nor too much in it.

Importable on the device: the standard library only.
"""

from __future__ import annotations

import struct

from models.graph import InvalidGraph

MAX_ITEMS = 200_000
"""Tables or entries of one vector, other than bytes: a bound for the work that a check takes."""


class File:
    """The bytes, and a bound on how much of them is looked at."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.budget = MAX_ITEMS

    def root(self) -> Table:
        return Table(self, self.unpack("I", 0))

    def unpack(self, form: str, at: int) -> int:
        if at < 0 or at + struct.calcsize("<" + form) > len(self.data):
            raise InvalidGraph(f"something lies at byte {at}, beyond the end")
        return int(struct.unpack_from("<" + form, self.data, at)[0])

    def spend(self, count: int) -> None:
        self.budget -= count
        if self.budget < 0:
            raise InvalidGraph(f"it has more than {MAX_ITEMS} parts")


class Table:
    """One table of a flatbuffer, at a byte of the file."""

    def __init__(self, file: File, at: int) -> None:
        file.spend(1)
        self.file, self._at = file, at
        self._fields = at - file.unpack("i", at)
        self._length = file.unpack("H", self._fields)
        size = file.unpack("H", self._fields + 2)
        if self._length < 4 or self._length % 2 or self._fields + self._length > len(file.data):
            raise InvalidGraph(f"the table at byte {at} has no fields")
        if size < 4 or at + size > len(file.data):
            raise InvalidGraph(f"the table at byte {at} reaches beyond the end")
        self._size = size

    def has(self, field: int) -> bool:
        return self._where(field) is not None

    def _where(self, field: int) -> int | None:
        place = 4 + 2 * field
        offset = self.file.unpack("H", self._fields + place) if place + 2 <= self._length else 0
        if offset >= self._size:
            raise InvalidGraph(f"field {field} of the table at byte {self._at} is outside of it")
        return self._at + offset if offset else None

    def number(self, field: int, form: str, default: int) -> int:
        at = self._where(field)
        return default if at is None else self.file.unpack(form, at)

    def vector(self, field: int, width: int) -> tuple[int, int]:
        """Where the entries of a vector start, and how many there are."""
        at = self._where(field)
        if at is None:
            return 0, 0
        start = at + self.file.unpack("I", at)
        count = self.file.unpack("I", start)
        if start + 4 + count * width > len(self.file.data):
            raise InvalidGraph(f"the vector at byte {start} reaches beyond the end")
        return start + 4, count

    def numbers(self, field: int, form: str) -> tuple[int, ...]:
        width = struct.calcsize("<" + form)
        start, count = self.vector(field, width)
        self.file.spend(count)
        return struct.unpack_from(f"<{count}{form}", self.file.data, start) if count else ()

    def tables(self, field: int, what: str) -> list[Table]:
        start, count = self.vector(field, 4)
        if count > self.file.budget:
            raise InvalidGraph(f"it has {count} {what}")
        places = range(start, start + 4 * count, 4)
        return [Table(self.file, place + self.file.unpack("I", place)) for place in places]

    def union(self, kind: int, field: int) -> tuple[int, Table | None]:
        """The kind of a union, and its table, as far as it is one."""
        at, chosen = self._where(field), self.number(kind, "B", 0)
        if not chosen or at is None:
            return chosen, None
        return chosen, Table(self.file, at + self.file.unpack("I", at))

    def text(self, field: int) -> str:
        start, count = self.vector(field, 1)
        if count > 1024:
            raise InvalidGraph("a name is longer than 1024 bytes")
        return self.file.data[start : start + count].decode("utf-8", "replace")
