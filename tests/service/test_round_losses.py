"""The counter of losses counts: what a repository is robbed of shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.aggregator_bench import Bench
from tests.round_losses import Losses, count_losses
from tests.toy_rounds import request

FOUR_UPLOADS = 4


@pytest.mark.parametrize(
    ("robbery", "losses"),
    [
        ("DELETE FROM privacy_ledger", Losses(ledger_entries=1)),
        ("DELETE FROM versions WHERE version = 2", Losses(uploads=FOUR_UPLOADS, versions=1)),
        ("UPDATE versions SET version = 3 WHERE version = 2", Losses(uploads=FOUR_UPLOADS, versions=1)),
        ("UPDATE rounds SET report = replace(report, 'device-3', 'device-9')", Losses(uploads=FOUR_UPLOADS)),
    ],
)
def test_every_kind_of_loss_is_counted(tmp_path: Path, robbery: str, losses: Losses) -> None:
    bench = Bench(tmp_path, devices=4)
    bench.finish(bench.start(request(cohort=4)))
    devices = list(bench.devices.values())
    assert all(device.stored and device.asked for device in devices)
    assert count_losses(bench.operator, devices) == Losses()
    with bench.repository.write() as writer:
        writer._connection.exec_driver_sql(robbery)  # type: ignore[attr-defined]
    assert count_losses(bench.operator, devices) == losses
    bench.close()


def test_an_acknowledgement_of_a_round_that_nobody_knows_is_a_loss(tmp_path: Path) -> None:
    bench = Bench(tmp_path, devices=4)
    devices = list(bench.devices.values())
    devices[0].stored.add("f" * 32)
    devices[1].asked.add("f" * 32)
    assert count_losses(bench.operator, devices) == Losses(uploads=1, ledger_entries=1)
    bench.close()
