"""Reset: what goes, what stays and why, and that nothing goes unasked."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from edge_client.adapters.credentials import CA, CERTIFICATE, ENROLMENT, KEY, REQUEST
from edge_client.adapters.files import StorageError
from edge_client.adapters.resetting import reset_device
from edge_client.adapters.store import DeviceStore
from edge_client.commands.state_lock import LOCK, locked
from edge_client.durable import SaveLocal, SaveRound
from edge_client.main import main
from tests.edge_broker import Fleet
from tests.edge_fleet import NOW, PERMISSIVE
from tests.unit.test_edge_cli import install_watch
from tests.unit.test_edge_store import ROUND, committed_round

IDENTITY = (KEY, REQUEST, ENROLMENT, CERTIFICATE, CA)
RULES = ("policy.json", "fields.json", "edge.toml")


def rounds(state: Path) -> tuple[int, frozenset[str], int]:
    """Contributions in the ledger, ids of rounds, and versions."""
    with DeviceStore.open(state) as store:
        return len(store.ledger()), store.load().used, len(store.versions())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A device that has a bit of everything, and is in the middle of a round."""
    state = Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)
    install_watch(state)
    with DeviceStore.open(state) as store:
        record, contribution, _ = committed_round()
        store.apply([SaveRound(record, NOW), contribution])
        store.apply([SaveLocal("watch", "x" * 64, store.blobs.write_local(b"1234"))])
    (state / "personal").mkdir()
    (state / "personal" / "watch").write_text("personal")
    (state / "data" / "iio").mkdir(parents=True)
    (state / "data" / "iio" / "recordings.sqlite").write_text("recorded")
    (state / "fields.json").write_text("{}")
    (state / "edge.toml").write_text("")
    return state


def left(state: Path) -> set[str]:
    return {path.name for path in state.iterdir()} - {LOCK, "device.sqlite-wal", "device.sqlite-shm"}


def reset(state: Path, *options: str) -> int:
    return int(main(["reset", "--state", str(state), *options]))


def test_the_ledger_and_the_owner_s_rules_stay(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reset(state, "--yes") == 0
    assert "the privacy ledger stays" in capsys.readouterr().out
    assert left(state) == {"device.sqlite", *RULES}
    assert b"1234" not in (state / "device.sqlite").read_bytes()
    given, used, versions = rounds(state)
    # No round can be entered twice, and the round that was under way is over.
    assert (given, used, versions) == (1, {ROUND}, 0)
    with DeviceStore.open(state) as store:
        assert store.load().active is None and [r.outcome for r in store.rounds()] == ["reset"]
    assert main(["status", "--state", str(state)]) == 3
    # It can be enrolled again, in any fleet, and its limit knows what it gave.
    assert main(["init", "--state", str(state), "--device-id", "barn-2"]) == 0
    assert rounds(state)[0] == 1


def test_the_identity_stays_when_told(state: Path) -> None:
    before = {name: (state / name).read_bytes() for name in IDENTITY}
    assert reset(state, "--yes", "--keep-identity") == 0
    assert left(state) == {"device.sqlite", *RULES, *IDENTITY}
    assert {name: (state / name).read_bytes() for name in IDENTITY} == before
    assert main(["status", "--state", str(state)]) == 0 and rounds(state)[2] == 0


def test_the_ledger_goes_only_when_told(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reset(state, "--yes", "--forget-ledger") == 0
    assert "what this device gave stays given" in capsys.readouterr().out
    assert left(state) == set(RULES)


def test_nothing_goes_unasked_or_while_a_client_runs(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = left(state)
    argv = [sys.executable, "-m", "edge_client.main", "reset", "--state", str(state)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--yes" in done.stderr
    lock = locked(state)
    assert reset(state, "--yes") == 4 and reset(state, "--recordings") == 4
    lock.release()
    assert reset(tmp_path / "nowhere", "--yes") == 3
    for options in (["--model", "watch"], ["--personal", "--forget-ledger"]):
        assert reset(state, *options) == 2
    assert left(state) == before


@pytest.mark.parametrize(("said", "code"), [("reset", 0), ("yes", 1), ("", 1)])
def test_a_person_is_asked(state: Path, said: str, code: int) -> None:
    before = left(state)
    master, slave = pty.openpty()
    argv = [sys.executable, "-m", "edge_client.main", "reset", "--state", str(state)]
    with subprocess.Popen(argv, stdin=slave, stdout=subprocess.PIPE, text=True) as process:
        os.write(master, f"{said}\n".encode())
        out, _ = process.communicate(timeout=120)
    os.close(master)
    os.close(slave)
    assert process.returncode == code and "key and enrolment go" in out
    assert (left(state) == before) == bool(code)


def test_recordings_go_by_themselves(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left(state)
    assert reset(state, "--recordings") == 0
    assert "recordings of iio" in capsys.readouterr().out
    assert before - left(state) == {"data"}
    assert reset(state, "--recordings") == 0
    assert "no recordings" in capsys.readouterr().out


def test_a_reset_that_was_cut_off_is_done_by_doing_it_again(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails at every deletion in turn; what is half reset is enrolled nowhere."""
    import shutil

    real = shutil.rmtree
    for number in (1, 4, 8):
        calls = 0

        def failing(path: Path, last: int = number) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise OSError(5, "Input/output error")
            real(path)

        monkeypatch.setattr(shutil, "rmtree", failing)
        with contextlib.suppress(StorageError):
            reset_device(state, keep_identity=False, forget_ledger=False)
        assert not (state / ENROLMENT).exists() and rounds(state)[0] == 1
    monkeypatch.undo()
    reset_device(state, keep_identity=False, forget_ledger=False)
    assert left(state) == {"device.sqlite", *RULES}
