"""The repository on an SQL database: SQLite in one file, or PostgreSQL by its URL.

One connection is one transaction. The promises are those of `aggregator.repository`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from aggregator.adapters.sql_access import AccessReader, AccessWriter
from aggregator.adapters.sql_claim import Claim
from aggregator.adapters.sql_devices import DeviceReader, DeviceWriter
from aggregator.adapters.sql_engine import MODE, Mode, contended, erase_log, open_engine, reason
from aggregator.adapters.sql_enrolment import EnrolmentReader, EnrolmentWriter
from aggregator.adapters.sql_migration import check_schema
from aggregator.adapters.sql_noise import NoiseReader, NoiseWriter
from aggregator.adapters.sql_optimizer import OptimizerReader, OptimizerWriter
from aggregator.adapters.sql_rollout import RolloutReader, RolloutWriter
from aggregator.adapters.sql_rounds import RoundReader, RoundWriter
from aggregator.adapters.sql_selection import SelectionReader, SelectionWriter
from aggregator.adapters.sql_uploads import UploadReader
from aggregator.adapters.sql_versions import VersionReader
from aggregator.repository import (
    Conflict,
    Contended,
    OutcomeUnknown,
    Reader,
    StorageUnavailable,
    Unstorable,
    Writer,
)


class SqlRepository:
    """A repository at a database URL, such as `postgresql://covey@db.local/covey`."""

    def __init__(self, url: str) -> None:
        """Opens a database that has its tables: see `aggregator.adapters.sql_migration`.

        Raises:
            OutdatedSchema, UnknownSchema: its tables are not those of this Covey.
            StorageUnavailable: it cannot be opened.
        """
        self._engine = open_engine(url)
        self._claim: Claim | None = None
        try:
            with self._transaction(Mode.READ) as connection:
                check_schema(connection)
        except BaseException:
            self._engine.dispose()
            raise

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """Opens a consistent view."""
        with self._transaction(Mode.READ) as connection:
            yield _Reader(connection)

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Opens the one write transaction."""
        with self._transaction(Mode.WRITE) as connection:
            if self._claim is not None:
                self._claim.check(connection)
            writer = _Writer(connection)
            yield writer
        if writer.ended_round:
            erase_log(self._engine)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Makes this the one repository that a service may write through, until the block is left.

        Operators still write beside it, each operation in one transaction.

        Raises:
            Superseded: another service, perhaps on another machine, has claimed the database.
        """
        # The file of SQLite lies in the state directory, which the service has locked.
        if self._engine.dialect.name == "sqlite":
            yield
            return
        claim = Claim(self._engine)
        try:
            with self._transaction(Mode.WRITE) as connection:
                claim.take(connection)
            self._claim = claim
            yield
        finally:
            self._claim = None
            claim.release()

    def close(self) -> None:
        """Releases connections and files."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self, mode: Mode) -> Iterator[Connection]:
        committing = False
        try:
            with (
                self._engine.connect().execution_options(**{MODE: mode}) as connection,
                connection.begin(),
            ):
                yield connection
                committing = mode is not Mode.READ
        except IntegrityError as error:
            raise Conflict(reason(error)) from error
        except DataError as error:
            raise Unstorable(reason(error)) from error
        except SQLAlchemyError as error:
            if contended(error):
                raise Contended(f"{reason(error)}: try again") from error
            if committing and isinstance(error, DBAPIError) and error.connection_invalidated:
                raise OutcomeUnknown(f"{reason(error)}; look whether it was done") from error
            raise StorageUnavailable(reason(error)) from error


class _Reader(
    AccessReader,
    DeviceReader,
    EnrolmentReader,
    NoiseReader,
    OptimizerReader,
    RolloutReader,
    VersionReader,
    UploadReader,
    SelectionReader,
    RoundReader,
):
    """All that can be read."""


class _Writer(
    _Reader,
    AccessWriter,
    DeviceWriter,
    EnrolmentWriter,
    NoiseWriter,
    OptimizerWriter,
    RolloutWriter,
    SelectionWriter,
    RoundWriter,
):
    """All that can be changed."""
