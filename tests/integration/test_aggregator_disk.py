"""A disk that is full or read-only, for real: the service says why, and loses nothing acknowledged."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aggregator.repository import StorageUnavailable
from tests.aggregator_bench import Bench
from tests.round_losses import Losses, count_losses
from tests.service.test_aggregator_crashes import campaign_request
from tests.toy_rounds import check_completed

DISK_BYTES = 8_000_000


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)):
        pytest.skip("mounting a disk needs root")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def bench(disk: Path) -> Iterator[Bench]:
    bench = Bench(disk, devices=4, parameters=50_000)
    yield bench
    bench.close()


def fill(disk: Path) -> Path:
    """Writes a file into all the room there is."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return ballast


def run_until_it_fails(bench: Bench) -> str:
    """Steps until storage fails; returns what the service says of it when it runs by itself."""
    with pytest.raises(StorageUnavailable):
        for _ in range(500):
            bench.step()
    assert bench.transport.sent == [], "nothing may be sent that is not durable"
    bench.transport.reset()
    stop = threading.Event()
    thread = threading.Thread(target=bench.service.run, args=(stop,))
    thread.start()
    end = time.monotonic() + 120
    while not bench.service.trouble:
        assert time.monotonic() < end, "the service says nothing"
        time.sleep(0.01)
    trouble = bench.service.trouble
    stop.set()
    thread.join()
    bench.transport.reset()
    return trouble


def check_recovered(bench: Bench, campaign_id: str) -> None:
    (view,) = bench.finish(bench.operator.campaign(campaign_id))
    check_completed(bench, view)
    assert len(view.report.survivors) == 4
    assert count_losses(bench.operator, bench.devices.values()) == Losses()
    assert bench.service.trouble == ""


@pytest.mark.parametrize("phase", ["AdvertiseKeys", "MaskedInput", "Unmasking"])
def test_a_full_disk_is_named_and_survived(bench: Bench, disk: Path, phase: str) -> None:
    campaign = bench.start(campaign_request())
    bench.run_until(lambda: bench.phase() == phase)
    ballast = fill(disk)
    assert "full" in run_until_it_fails(bench) or "I/O error" in bench.service.trouble
    ballast.unlink()
    check_recovered(bench, campaign.campaign_id)


@pytest.mark.parametrize("phase", ["ShareKeys", "MaskedInput", "Unmasking"])
def test_a_disk_that_became_read_only_is_named_and_survived(bench: Bench, disk: Path, phase: str) -> None:
    campaign = bench.start(campaign_request())
    bench.run_until(lambda: bench.phase() == phase)
    bench.repository._engine.dispose()  # the kernel refuses while a file is open for writing
    assert mount("-o", "remount,ro", str(disk))
    trouble = run_until_it_fails(bench)
    assert "readonly" in trouble or "unable to open" in trouble
    bench.repository._engine.dispose()
    assert mount("-o", "remount,rw", str(disk))
    check_recovered(bench, campaign.campaign_id)


def test_a_full_disk_under_the_registry_loses_no_version(bench: Bench, disk: Path, tmp_path: Path) -> None:
    """The database is elsewhere: the round is over, and its weights have no room."""
    registry = tmp_path / "small"
    registry.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=1000000", "tmpfs", str(registry)):
        pytest.skip("mounting a disk needs root")
    try:
        bench.close()
        (tmp_path / "roomy").mkdir()
        (tmp_path / "roomy" / "registry").symlink_to(registry)
        bench = Bench(tmp_path / "roomy", devices=4, parameters=50_000)
        campaign = bench.start(campaign_request())
        bench.run_until(lambda: bench.phase() == "Unmasking")
        ballast = fill(registry)
        for _ in range(100):
            bench.step()
        assert bench.rounds()[0].record.status == "running"
        assert "No space left" in bench.service.trouble
        ballast.unlink()
        check_recovered(bench, campaign.campaign_id)
        bench.close()
    finally:
        subprocess.run(["umount", "--lazy", str(registry)], check=True)
