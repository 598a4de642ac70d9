"""Real databases for tests: SQLite files, and a PostgreSQL server of the test run's own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sqlalchemy import create_engine, make_url

from aggregator.adapters.sql import SqlRepository
from aggregator.adapters.sql_engine import url_of_file
from aggregator.adapters.sql_migration import migrate


def sqlite_repository(path: Path) -> SqlRepository:
    """The repository in a file, which is made when it is not there."""
    if not path.exists():
        path.write_bytes(_newest_schema())
    return SqlRepository(url_of_file(path))


@cache
def _newest_schema() -> bytes:
    """A file with the tables and nothing in them: to migrate anew for each of a thousand takes long."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "newest.db"
        migrate(url_of_file(path))
        assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing of it is elsewhere"
        return path.read_bytes()


def repository_at(url: str) -> SqlRepository:
    """The repository in a database, whose tables are made when they are not there."""
    migrate(url)
    return SqlRepository(url)


def find_postgresql() -> Path | None:
    """The directory of the server's programs, where Debian puts them or on the path."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    found = versions[-1] if versions else shutil.which("initdb")
    return Path(found).parent if found else None


@dataclass
class PostgresProcess:
    """A PostgreSQL server on a socket in a directory of its own; nobody else can reach it."""

    programs: Path
    directory: Path

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _run(self, program: str, *arguments: str) -> str:
        """Runs a program as the server's user; returns what it complained of, empty when it succeeded."""
        # The server refuses to run as root; the package made a user for it.
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        command = [*(user if os.geteuid() == 0 else ()), str(self.programs / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.directory)
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def make(self) -> None:
        """Makes the cluster."""
        if os.geteuid() == 0:
            shutil.chown(self.directory, "postgres", "postgres")
        settings = ["-U", "covey", "-A", "trust", "-E", "UTF8", "--no-instructions", "--no-sync"]
        # Sorts as people do, not by bytes: what relies on the order of bytes must say so.
        settings += ["--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US"]
        complaint = self._run("initdb", "-D", str(self._data), *settings)
        assert not complaint, complaint

    def start(self) -> None:
        """Starts the server; it is ready when this returns. After `kill`, its processes may need a moment."""
        # Processes are killed in tests, machines are not: nothing needs to be on the platter.
        options = f"-c listen_addresses= -c unix_socket_directories={self.directory} -c fsync=off"
        files = ["-D", str(self._data), "-l", str(self.directory / "log")]
        for _ in range(40):
            complaint = self._run("pg_ctl", *files, "-o", options, "-w", "start")
            if not complaint:
                return
            time.sleep(0.25)
        raise AssertionError(complaint + (self.directory / "log").read_text())

    def stop(self) -> None:
        """Stops the server, if it runs."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")

    def kill(self) -> None:
        """SIGKILL to the server and the processes of its connections; they are gone when this returns."""
        main = int((self._data / "postmaster.pid").read_text().split()[0])
        ends = [main, *map(int, Path(f"/proc/{main}/task/{main}/children").read_text().split())]
        for process in ends:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while any(_runs(process) for process in ends):
            time.sleep(0.01)

    def new_database(self) -> str:
        """Makes an empty database; returns its URL."""
        name = f"covey_{secrets.token_hex(6)}"
        engine = create_engine(make_url(self._url("postgres")), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name} STRATEGY wal_log")
        engine.dispose()
        return self._url(name)

    def _url(self, name: str) -> str:
        return f"postgresql+psycopg://covey@/{name}?host={self.directory}"


def _runs(process: int) -> bool:
    """Whether a process is there and no zombie, which is what it stays until its parent looks."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def postgresql(programs: Path) -> Iterator[PostgresProcess]:
    """A running server, and no trace of it afterwards."""
    # Not in pytest's directory: only its owner may enter that, and the path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="covey-pg-") as directory:
        server = PostgresProcess(programs, Path(directory))
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
