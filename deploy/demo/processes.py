"""Child processes: started in their own group, watched, and never outliving the demo."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from deploy.demo import tether

_SAMPLE_SECONDS = 0.25
_LOG_TAIL_BYTES = 4096


class ProcessError(RuntimeError):
    """A child process did not start, or ended when it should have kept running."""


class ChildProcess:
    """One child process in its own process group, with its output in a log file.

    The group keeps a terminal's Ctrl-C away from the child, so that the parent decides the order in which
    things stop. The kernel kills the child when the parent dies, even by SIGKILL (see `tether`).
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        """Describes a child; `start` starts it.

        Args:
            name: what messages call it.
            argv: program and arguments. Everybody on the machine can read them: no secret belongs here.
            log: file that standard output and standard error are appended to.
            environment: variables set on top of the parent's.
            directory: working directory; the parent's when None.

        Raises:
            ProcessError: the program does not exist.
        """
        program = shutil.which(str(argv[0]))
        if program is None:
            raise ProcessError(f"{name}: there is no program {argv[0]}")
        self.name = name
        self.log = log
        self._argv = [str(Path(program).absolute()), *(str(argument) for argument in argv[1:])]
        self._environment = dict(environment or {})
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._peak_rss_bytes = 0

    def start(self) -> None:
        """Starts the program; call it again after the program ended to run it anew.

        Raises:
            ProcessError: it is running already, or this is not the main thread (see `tether`).
        """
        if self.running:
            raise ProcessError(f"{self.name} is running already")
        if threading.current_thread() is not threading.main_thread():
            raise ProcessError(f"{self.name} must be started from the main thread: it dies with its thread")
        command = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *self._argv]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self._environment,
                cwd=self._directory,
                process_group=0,
            )

    @property
    def running(self) -> bool:
        """Whether the program runs at this moment."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the last start."""
        if self._process is None:
            raise ProcessError(f"{self.name} was never started")
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the last run, negative for a signal; None while it runs or before any start."""
        return None if self._process is None else self._process.poll()

    @property
    def peak_rss_bytes(self) -> int:
        """Highest resident set size seen so far over all runs, as of the last `sample`."""
        return self._peak_rss_bytes

    def sample(self) -> None:
        """Reads the peak resident set size from the kernel.

        `ru_maxrss` would be cheaper, but a child starts out with its parent's value there.
        """
        if not self.running:
            return
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self._peak_rss_bytes = max(self._peak_rss_bytes, int(line.split()[1]) * 1024)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the whole group; does nothing when the program has ended."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Ends the program at once by SIGKILL, as a power cut would."""
        self.sample()
        self.send(signal.SIGKILL)
        self.wait()

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Asks the program to end, and kills it when it has not ended after `grace_seconds`."""
        self.sample()
        self.send(signal.SIGTERM)
        if not self.wait(grace_seconds):
            self.kill()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the program to end; returns whether it has."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def log_tail(self) -> str:
        """The end of the log, for a message that says why the program ended."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - _LOG_TAIL_BYTES))
                return log.read().decode(errors="replace").strip()
        except FileNotFoundError:
            return ""


class ProcessGroup:
    """All children of one demo and their files; leaving the context leaves neither behind."""

    def __init__(self, *, grace_seconds: float = 5.0) -> None:
        """Makes an empty group; `grace_seconds` is how long a child may take to stop."""
        self._grace_seconds = grace_seconds
        self._children: dict[str, ChildProcess] = {}
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._ended = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Makes the temporary directory and begins to sample memory."""
        self._files = tempfile.TemporaryDirectory(prefix="covey-demo-")
        self._ended.clear()
        self._sampler = threading.Thread(target=self._sample_until_ended, name="rss-sampler", daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops every child, the last started first, and removes the files."""
        with uninterrupted():
            self._ended.set()
            if self._sampler is not None:
                self._sampler.join()
            self.stop_all()
            if self._files is not None:
                self._files.cleanup()
                self._files = None

    @property
    def directory(self) -> Path:
        """Temporary directory of this group, readable by its owner only."""
        if self._files is None:
            raise ProcessError("the group is not open")
        return Path(self._files.name)

    def start(
        self, name: str, argv: Sequence[str | Path], environment: Mapping[str, str] | None = None
    ) -> ChildProcess:
        """Starts a child that logs to `NAME.log` in the directory; `name` must be new in this group."""
        if name in self._children:
            raise ProcessError(f"there is a process {name} already")
        child = ChildProcess(name, argv, log=self.directory / f"{name}.log", environment=environment)
        self._children[name] = child
        child.start()
        return child

    def __getitem__(self, name: str) -> ChildProcess:
        """The child of that name, running or not."""
        return self._children[name]

    def __iter__(self) -> Iterator[ChildProcess]:
        """All children in the order of their first start."""
        return iter(tuple(self._children.values()))

    def check(self, *, may_be_down: frozenset[str] = frozenset()) -> None:
        """Raises ProcessError, with the end of its log, for a child that ended by itself.

        Args:
            may_be_down: children that were killed on purpose.
        """
        for child in self:
            if child.name not in may_be_down and not child.running:
                raise ProcessError(f"{child.name} ended with code {child.exit_code}\n{child.log_tail()}")

    def stop_all(self) -> None:
        """Stops every child, the last started first; the first SIGTERM reaches all before any wait."""
        children = tuple(reversed(self._children.values()))
        for child in children:
            child.sample()
            child.send(signal.SIGTERM)
        for child in children:
            if not child.wait(self._grace_seconds):
                child.kill()

    def _sample_until_ended(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            for child in self:
                child.sample()


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into `SystemExit`, so that context managers clean up as on Ctrl-C."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    with _handlers(leave, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignores Ctrl-C, SIGTERM and SIGHUP: an impatient second Ctrl-C must not leave half a fleet.

    What is inside has to end by itself.
    """
    with _handlers(lambda number, frame: None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextlib.contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only.
        return
    previous = [(number, signal.signal(number, handler)) for number in numbers]
    try:
        yield
    finally:
        for number, old in previous:
            signal.signal(number, old)
