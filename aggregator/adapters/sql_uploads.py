"""The part of the SQL repository that holds masked inputs on their way into the sum of a round."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import delete, select, update

from aggregator.adapters import sql_schema as s
from aggregator.adapters.sql_statements import Reading, Writing
from aggregator.records import Upload
from aggregator.repository import NotFound
from protocol.fields import BlobRef


class UploadReader(Reading):
    """What can be read of it; see `aggregator.repository.Reader`."""

    def inputs(self, round_id: str) -> dict[str, str]:
        """The masked inputs that are in the sum."""
        query = select(s.inputs.c.device_id, s.inputs.c.sha256).where(s.inputs.c.round_id == round_id)
        return {row.device_id: row.sha256 for row in self._all(query)}

    def uploads(self, round_id: str) -> tuple[Upload, ...]:
        """Uploads under way."""
        stored: dict[str, set[int]] = {}
        of_round = s.chunks.c.round_id == round_id
        for row in self._all(
            select(s.chunks.c.device_id, s.chunks.c.index.label("position")).where(of_round)
        ):
            stored.setdefault(row.device_id, set()).add(row.position)
        query = select(s.uploads).where(s.uploads.c.round_id == round_id).order_by(s.uploads.c.device_id)
        return tuple(
            Upload(
                row.round_id,
                row.device_id,
                BlobRef(sha256=row.sha256, size=row.size),
                frozenset(stored.get(row.device_id, ())),
            )
            for row in self._all(query)
        )

    def chunks(self, round_id: str, device_id: str) -> Iterator[bytes]:
        """The stored chunks of an upload."""
        of_upload = (s.chunks.c.round_id == round_id, s.chunks.c.device_id == device_id)
        indices = select(s.chunks.c.index).where(*of_upload).order_by(s.chunks.c.index)
        for index in self._connection.scalars(indices).all():
            query = select(s.chunks.c.data).where(*of_upload, s.chunks.c.index == index)
            yield self._connection.scalars(query).one()

    def sum_slice(self, round_id: str, start: int) -> bytes | None:
        """A slice of the partial sum."""
        query = select(s.sums.c.data).where(s.sums.c.round_id == round_id, s.sums.c.start == start)
        return self._connection.scalars(query).one_or_none()


class UploadWriter(Writing, UploadReader):
    """What can be changed; see `aggregator.repository.Writer`."""

    def open_upload(self, round_id: str, device_id: str, blob: BlobRef) -> None:
        """Notes an upload, in place of the one before."""
        self._require_running(round_id)
        self.drop_upload(round_id, device_id)
        self._insert(s.uploads, round_id=round_id, device_id=device_id, sha256=blob.sha256, size=blob.size)

    def store_chunk(self, round_id: str, device_id: str, index: int, data: bytes) -> None:
        """Stores a chunk, once."""
        of_upload = (s.uploads.c.round_id == round_id, s.uploads.c.device_id == device_id)
        if self._one(select(s.uploads.c.size).where(*of_upload)) is None:
            raise NotFound(f"{device_id} has no upload open in round {round_id}")
        of_chunk = (
            s.chunks.c.round_id == round_id,
            s.chunks.c.device_id == device_id,
            s.chunks.c.index == index,
        )
        if self._one(select(s.chunks.c.index).where(*of_chunk)) is None:
            self._insert(s.chunks, round_id=round_id, device_id=device_id, index=index, data=data)

    def drop_upload(self, round_id: str, device_id: str) -> None:
        """Forgets an upload and its chunks."""
        for table in (s.chunks, s.uploads):
            statement = delete(table).where(table.c.round_id == round_id, table.c.device_id == device_id)
            self._connection.execute(statement)

    def drop_uploads(self, round_id: str) -> None:
        """Forgets every upload of a round."""
        for table in (s.chunks, s.uploads):
            self._connection.execute(delete(table).where(table.c.round_id == round_id))

    def put_sum_slice(self, round_id: str, start: int, data: bytes) -> None:
        """Replaces a slice of the partial sum."""
        of_slice = (s.sums.c.round_id == round_id, s.sums.c.start == start)
        changed = self._connection.execute(update(s.sums).where(*of_slice).values(data=data))
        if changed.rowcount == 0:
            self._insert(s.sums, round_id=round_id, start=start, data=data)

    def note_input(self, round_id: str, device_id: str, sha256: str) -> None:
        """Notes that an input is in the sum."""
        self._insert(s.inputs, round_id=round_id, device_id=device_id, sha256=sha256)
