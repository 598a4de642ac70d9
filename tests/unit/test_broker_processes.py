"""Supervision of child processes: death is noticed, memory measured, and nothing stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deploy.demo.processes import ProcessError, ProcessGroup, signals_raise

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
STUBBORN = [sys.executable, "-c", IGNORE_SIGTERM + SLEEP[2]]


def wait_for_log(path: Path, text: str) -> None:
    """Waits until `text` stands in the log."""
    deadline = time.monotonic() + 120
    while text not in path.read_text():
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.02)


def test_group_leaves_no_process_and_no_file() -> None:
    with ProcessGroup(grace_seconds=0.2) as group:
        directory = group.directory
        children = [group.start("sleeper", SLEEP), group.start("stubborn", STUBBORN)]
        for child in children:
            wait_for_log(child.log, "up")
    assert [child.exit_code for child in children] == [-signal.SIGTERM, -signal.SIGKILL]
    assert not directory.exists()


def test_group_cleans_up_after_an_exception() -> None:
    with pytest.raises(KeyboardInterrupt), ProcessGroup() as group:
        directory, child = group.directory, group.start("sleeper", SLEEP)
        raise KeyboardInterrupt
    assert not child.running
    assert not directory.exists()


def test_killed_child_starts_again_and_keeps_its_log() -> None:
    with ProcessGroup() as group:
        child = group.start("device", SLEEP)
        wait_for_log(child.log, "up")
        first = child.pid
        child.kill()
        assert child.exit_code == -signal.SIGKILL
        child.start()
        assert child.pid != first
        wait_for_log(child.log, "up\nup")


def test_unexpected_end_is_reported_with_the_log() -> None:
    with ProcessGroup() as group:
        child = group.start("device", [sys.executable, "-c", "raise SystemExit('no broker')"])
        child.wait(120)
        with pytest.raises(ProcessError, match="device ended with code 1\nno broker"):
            group.check()
        group.check(may_be_down=frozenset({"device"}))


def test_peak_memory_is_the_childs_own() -> None:
    allocate = "x = bytearray(64 * 2**20); print('up', flush=True); import time; time.sleep(60)"
    with ProcessGroup() as group:
        child = group.start("device", [sys.executable, "-c", allocate])
        wait_for_log(child.log, "up")
        child.sample()
        assert 64 * 2**20 < child.peak_rss_bytes < 120 * 2**20
        peak = child.peak_rss_bytes
        child.kill()
        child.start()
        child.sample()
        assert child.peak_rss_bytes == peak


def test_unknown_program_and_wrong_thread_are_refused() -> None:
    failures: list[BaseException] = []

    def start_elsewhere() -> None:
        try:
            group.start("elsewhere", SLEEP)
        except ProcessError as error:
            failures.append(error)

    with ProcessGroup() as group:
        with pytest.raises(ProcessError, match="no program"):
            group.start("missing", ["covey-no-such-program"])
        thread = threading.Thread(target=start_elsewhere)
        thread.start()
        thread.join()
    assert "main thread" in str(failures[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_parent_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from deploy.demo.processes import ProcessGroup, signals_raise\n"
        "with signals_raise(), ProcessGroup() as group:\n"
        f"    child = group.start('sleeper', {SLEEP!r})\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script]
    environment = {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(number)
    assert parent.returncode != 0
    assert not Path(f"/proc/{child}").exists()
    assert not list(tmp_path.iterdir())


def test_signals_raise_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_info, signals_raise():
        signal.raise_signal(signal.SIGTERM)
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
