"""How fast the console shows a fleet of 10,000 devices, and what it costs an idle aggregator.

Pages load in real headless Chromium, by the browser's own clock (Navigation Timing, to the end of the load
event), from a seeded SQLite database. Memory is that of `covey aggregator run` in a process of its own:
resident (RSS) and its proportional share (PSS), before and after the console was used.

    python -m benchmarks.console --devices 10000 --json console.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aggregator import main as covey
from aggregator.access.roles import Role
from deploy.broker import BrokerProcess
from tests.console_bench import PHONE, browser, seed_fleet, seed_rounds

PAGES = {
    "overview": "/",
    "fleet, first page": "/fleet",
    "fleet, page in the middle": "/fleet?after=barn-05000",
    "fleet, search by label": "/fleet?q=site%3Dlake&which=online",
    "models": "/models",
    "rounds": "/rounds",
}
TIMING = """
const [entry] = performance.getEntriesByType('navigation');
return [entry.responseStart, entry.loadEventEnd];
"""


def measure(devices: int, runs: int) -> dict[str, Any]:
    """Loads every page `runs` times; returns milliseconds by page, and kilobytes of memory."""
    with tempfile.TemporaryDirectory() as name, BrokerProcess() as broker:
        state = Path(name) / "state"
        covey.init(state, fleet="bench", broker=broker.url)
        with _service(state) as process, covey.connect(state) as client:
            time.sleep(3.0)
            idle = _memory(process.pid)
            with covey.open_operator(state) as operator:
                seed_fleet(operator, devices)
                seed_rounds(operator, 50, running=False)
                token, _ = operator.create_token(role=Role.VIEWER, label="", seconds=3600, created_by="bench")
            pages: dict[str, dict[str, float]] = {}
            with browser(Path(name) / "profile") as chromium:
                chromium.sign_in(client.url, token)
                for screen, size in (("desk", (1280, 900)), ("phone", PHONE)):
                    chromium.size(*size)
                    for page, path in PAGES.items():
                        times = []
                        for _ in range(runs):
                            chromium.driver.get(client.url + path)
                            chromium.wait(lambda: chromium.driver.execute_script(TIMING)[1] > 0)
                            times.append(chromium.driver.execute_script(TIMING))
                        pages[f"{page}, {screen}"] = {
                            "first_byte_ms": statistics.median(first for first, _ in times),
                            "loaded_ms": statistics.median(loaded for _, loaded in times),
                            "worst_ms": max(loaded for _, loaded in times),
                        }
            used = _memory(process.pid)
    return {"devices": devices, "runs": runs, "pages": pages, "idle_kb": idle, "used_kb": used}


@contextmanager
def _service(state: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = "from aggregator.cli import main; main()"
    command = [sys.executable, "-c", program, "aggregator", "run"]
    process = subprocess.Popen([*command, "--state", str(state), "--listen", "127.0.0.1:0"])
    try:
        while not (state / "api" / "local.json").exists():
            if process.poll() is not None:
                raise SystemExit(f"the service ended with {process.returncode}")
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(20)


def _memory(pid: int) -> dict[str, int]:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = dict(line.split(":", 1) for line in rollup.splitlines() if line.startswith(("Rss:", "Pss:")))
    return {name.lower(): int(value.split()[0]) for name, value in found.items()}


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    found = measure(arguments.devices, arguments.runs)
    print(f"{arguments.devices:,} devices, {arguments.runs} loads each, milliseconds")
    print(f"{'page':38}{'first byte':>12}{'loaded':>10}{'worst':>10}")
    for page, times in found["pages"].items():
        print(
            f"{page:38}"
            + "".join(f"{times[key]:>{w}.0f}" for key, w in zip(times, (12, 10, 10), strict=True))
        )
    for when in ("idle", "used"):
        memory = found[f"{when}_kb"]
        print(
            f"aggregator, console {when:5} PSS {memory['pss'] / 1024:.0f} MB, "
            f"RSS {memory['rss'] / 1024:.0f} MB"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
