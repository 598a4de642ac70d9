"""The demo's console: shown by `--open` while the rounds run, and up until Ctrl-C with `--keep`."""

from __future__ import annotations

import os
import queue
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("selenium")

from tests.console_bench import CHROMIUM, DRIVER, browser

pytestmark = pytest.mark.e2e

COVEY = Path(sys.executable).parent / "covey"
OPTIONS = ("--dataset", "digits", "--devices", "4", "--rounds", "4", "--drop", "0")
WAIT = 240.0
BROWSER = """\
#!/bin/sh
# Stands for a desktop's browser: says what it is to open, and holds the demo until the test has opened it.
printf %s "$1" > "$OPENED.new" && mv "$OPENED.new" "$OPENED"
while [ ! -e "$OPENED.go" ]; do sleep 0.1; done
"""


@dataclass
class Demo:
    """A demo that runs, and what it has printed."""

    process: subprocess.Popen[str]
    printed: list[str] = field(default_factory=list)
    _lines: queue.Queue[str | None] = field(default_factory=queue.Queue)

    def read(self) -> None:
        """Reads its lines as they come, to the end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, pattern: str) -> str:
        """The first new line that fits."""
        deadline = time.monotonic() + WAIT
        while True:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, "\n".join(["it ended:", *self.printed])
            self.printed.append(line)
            if re.search(pattern, line):
                return line

    def ctrl_c(self) -> int:
        """Ends it as a person does; returns its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(WAIT)


@contextmanager
def demo(directory: Path, *options: str, **environment: str) -> Iterator[Demo]:
    """Starts a demo; it ends with the block."""
    process = subprocess.Popen(
        [COVEY, "demo", "--report", directory / "report", *OPTIONS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(directory), "PYTHONUNBUFFERED": "1"} | environment,
    )
    found = Demo(process)
    reader = threading.Thread(target=found.read, daemon=True)
    reader.start()
    try:
        yield found
    finally:
        process.kill()
        process.wait(WAIT)
        reader.join(WAIT)
        assert process.stdout is not None
        process.stdout.close()


def nothing_is_left(directory: Path) -> bool:
    """Whether no process names this directory, and only the report lies in it."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes()
        except OSError:
            continue
        if bytes(directory) in line and b"covey" in line:
            return False
    return [place.name for place in directory.iterdir()] == ["report"]


@pytest.mark.timeout(600)
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="Chromium or its driver is not installed")
def test_the_page_that_open_shows_is_live_while_the_rounds_run(tmp_path: Path) -> None:
    directory, opened = tmp_path / "demo", tmp_path / "opened"
    directory.mkdir()
    (tmp_path / "browser").write_text(BROWSER)
    (tmp_path / "browser").chmod(0o755)
    desktop = {"DISPLAY": ":99", "BROWSER": f"{tmp_path / 'browser'} %s", "OPENED": str(opened)}
    with browser(tmp_path / "profile") as chromium, demo(directory, "--open", **desktop) as running:
        link = running.wait_for(r"^console: http").removeprefix("console: ")
        chromium.wait(opened.exists, WAIT)
        given = opened.read_text()
        page = Path(unquote(urlsplit(given).path))
        assert "code" not in given, "everybody can read the arguments of a program"
        assert stat.S_IMODE(page.stat().st_mode) == 0o600 and page.is_relative_to(directory)

        chromium.driver.get(given)
        chromium.wait(lambda: "Overview" in chromium.driver.title, WAIT)
        version, online = "a[href='/models'] strong", "a[href='/fleet?which=online'] strong"
        chromium.wait(lambda: chromium.text(version) == "digits 1", WAIT)
        chromium.driver.execute_script("window.still = true")
        Path(f"{opened}.go").touch()

        seen: set[str] = set()

        def over() -> bool:
            seen.add(chromium.text(version))
            return "digits 5" in seen

        chromium.wait(over, WAIT)
        assert len(seen) > 2, f"versions came while one watched: {seen}"
        running.wait_for("stay up until Ctrl-C")
        assert (directory / "report" / "index.html").stat().st_size > 50_000
        chromium.wait(lambda: int(chromium.text(online)) >= 4, WAIT)
        assert chromium.driver.execute_script("return window.still"), "nobody reloaded it"
        assert chromium.driver.current_url == link.partition("/auth/")[0] + "/"
        assert running.process.poll() is None
        assert running.ctrl_c() == 0
    assert nothing_is_left(directory)


@pytest.mark.timeout(600)
def test_keep_holds_fleet_and_console_up_until_ctrl_c(tmp_path: Path) -> None:
    with demo(tmp_path, "--keep") as running:
        first = running.wait_for(r"^console: http").removeprefix("console: ")
        running.wait_for(r"^report: ")
        second = running.wait_for(r"^console: http").removeprefix("console: ")
        running.wait_for("stay up until Ctrl-C")
        assert first != second, "a link works once, within ten minutes"
        with httpx.Client(follow_redirects=True) as person:
            assert person.get(second).status_code == 200
            home = second.partition("/auth/")[0]
            shown = person.get(f"{home}/").text
            assert "<strong>digits 5</strong>" in shown
            assert re.search(r"Devices online</small><strong>[4-9]", shown), shown
            assert person.get(f"{home}/rounds").text.count(">completed<") == 4
            assert httpx.get(second).status_code == 401
        assert running.process.poll() is None
        assert running.ctrl_c() == 0
    assert nothing_is_left(tmp_path)
