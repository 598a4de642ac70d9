"""The tutorial's commands, as they stand there, in the order in which they stand there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from deploy.broker import find_mosquitto, free_port

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial" / "five-devices.md"
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
START = "sh agg/broker/start"
AS_NOBODY = (
    "(chown -R nobody agg/broker && cd agg/broker"
    " && setpriv --reuid=nobody --regid=nogroup --clear-groups sh start)"
)
"""The tutorial asks for an account that is not root, which CI has not: mosquitto gives root's rights up."""


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_from_nothing_to_five_devices(tmp_path: Path) -> None:
    install, *steps = _BLOCK.findall(PAGE.read_text())
    assert "make setup" in install
    script = "set -eu\n" + "\n".join(steps)
    ports = {"8883": str(free_port()), "8443": str(free_port())}
    script = re.sub("|".join(ports), lambda found: ports[found[0]], script)
    if os.geteuid() == 0:
        assert START in script
        script = script.replace(START, AS_NOBODY)
        for folder in (tmp_path, *tmp_path.parents[:-2]):
            folder.chmod(0o755)
    output = tmp_path / "said"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with output.open("wb") as said:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "REPOSITORY": str(ROOT)},
            stdout=said,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        code = process.wait(500)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    told = output.read_text()
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert code == 0, told + logs
    assert "watch-5 is enrolled in the fleet orchard" in told
    versions = re.findall(r"^ watch +(\d) ", told[told.rindex("model  version") :], re.MULTILINE)
    assert sorted(versions) == ["1", "2", "3", "4"], told
    assert "Traceback" not in logs
