"""Which schema a database has, and how it gets the newest one."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from aggregator.adapters.sql_engine import MODE, Mode, open_engine, reason
from aggregator.adapters.sql_schema import REVISION
from aggregator.repository import OutdatedSchema, StorageUnavailable, UnknownSchema

_VERSION_TABLE = "alembic_version"
_UNNUMBERED = "0000"
"""Stands for a database that is older than the migrations: the tables of 0001, and in `meta` a version 1."""


def check_schema(connection: Connection) -> None:
    """Refuses a database that this Covey cannot use as it is; changes nothing.

    Raises:
        OutdatedSchema: it is empty, or an older Covey made it.
        UnknownSchema: a newer Covey made it, or something else.
    """
    found = _revision(connection)
    if found is None:
        raise OutdatedSchema(
            "the database is empty: run `covey aggregator init` or `covey aggregator migrate`"
        )
    if found < REVISION:
        raise OutdatedSchema(
            f"the database has schema {found}, this Covey needs {REVISION}: "
            "stop the service, keep a copy of the database, and run `covey aggregator migrate`"
        )


def migrate(url: str) -> tuple[str | None, str]:
    """Brings a database to the newest schema in one transaction; returns (schema before, schema now).

    An empty database has the schema None. One with the newest schema is left alone.

    Raises:
        UnknownSchema: a newer Covey made it, or something else; nothing was changed.
        StorageUnavailable: it cannot be opened or changed; nothing was changed.
    """
    engine = open_engine(url, references=False)
    try:
        with engine.connect().execution_options(**{MODE: Mode.MIGRATE}) as connection, connection.begin():
            found = _revision(connection)
            if found != REVISION:
                _upgrade(connection, adopt=found == _UNNUMBERED)
            return found, REVISION
    except DBAPIError as error:
        raise StorageUnavailable(reason(error)) from error
    finally:
        engine.dispose()


def _upgrade(connection: Connection, *, adopt: bool) -> None:
    # Imported here: a command that only checks has no use for it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    if adopt:
        command.stamp(config, "0001")
        connection.execute(text("DELETE FROM meta WHERE key = 'schema_version'"))
    command.upgrade(config, "head")
    if connection.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").all():
        raise StorageUnavailable("the migration would break references between tables: nothing was changed")


def _revision(connection: Connection) -> str | None:
    """The schema of a database that is ours; None when it is empty."""
    names = inspect(connection).get_table_names()
    if not names:
        return None
    found = "none"
    if _VERSION_TABLE in names:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() or found
    elif "meta" in names:
        query = text("SELECT value FROM meta WHERE key = 'schema_version'")
        if connection.execute(query).scalar() == "1":
            return _UNNUMBERED
    if not (len(found) == len(REVISION) and found.isdecimal()):
        raise UnknownSchema(
            f"the database has the schema {found}, which is not Covey's: use another, or an empty database"
        )
    if found > REVISION:
        raise UnknownSchema(
            f"the database has schema {found}, this Covey knows {REVISION} at most: "
            "install the Covey version that made it, or restore the copy from before its migration"
        )
    return found
