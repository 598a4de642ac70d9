"""The aggregator is killed around every commit of a rollout: each step is taken once, nobody is misled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

from aggregator.assigning import Promotion
from aggregator.repository import Repository, Writer
from aggregator.rollout_operations import RolloutRequest
from tests.aggregator_bench import Bench
from tests.aggregator_devices import model_files
from tests.told_devices import ToldDevices

Moment = Literal["before the commit", "after the commit"]


class Killed(BaseException):
    """SIGKILL: nothing catches it."""


class Mortal:
    """A repository whose process dies around its n-th commit."""

    def __init__(self, repository: Repository, at: int, moment: Moment) -> None:
        self._repository, self._at, self._moment = repository, at, moment
        self.commits = 0

    @contextmanager
    def write(self) -> Iterator[Writer]:
        with self._repository.write() as writer:
            yield writer
            self.commits += 1
            if self.commits == self._at and self._moment == "before the commit":
                raise Killed
        if self.commits == self._at:
            raise Killed

    def __getattr__(self, name: str) -> object:
        return getattr(self._repository, name)


class Devices(ToldDevices):
    """Devices at a bench."""

    def __init__(self, bench: Bench, bad: bool) -> None:
        super().__init__(bench.devices, bad=2 if bad else None)
        self._bench = bench

    def hear_all(self) -> None:
        """Takes in all that is retained, and says what changed by it."""
        for topic, payload in self._bench.transport.retained.items():
            self._bench.deliver(*self.hear(topic, payload))

    def say(self, name: str) -> None:
        self._bench.deliver(self.status(name))


def run(path: Path, at: int, moment: Moment, *, bad: bool) -> int:
    """A whole rollout, with one kill; returns how many commits it took."""
    bench = Bench(path, devices=4)
    bench.promotion = Promotion.MANUAL
    try:
        with bench.repository.write() as writer:
            writer.set_stage("toy", 1, "stable")
        bench.operator.publish(*model_files(seed=1))
        bench.boot()
        for _ in range(8):
            bench.clock.now += 1
            bench.service.step(0)
        mortal = Mortal(bench.repository, at, moment)
        bench.repository = mortal  # type: ignore[assignment]
        bench.boot()
        devices = Devices(bench, bad)
        for name in devices.had:
            devices.say(name)
        rollout = bench.operator.start_rollout(RolloutRequest("toy", 2, (25, 50, 100))).record.rollout_id
        wanted = "rolled-back" if bad else "completed"
        settled = 0
        for _ in range(200):
            bench.clock.now += 1
            try:
                bench.service.step(0)
            except Killed:
                bench.boot()
                for name in devices.had:
                    devices.say(name)
                continue
            devices.hear_all()
            settled = settled + 1 if bench.operator.rollout(rollout).record.status == wanted else 0
            if settled == 15:
                break
        view = bench.operator.rollout(rollout)
        assert view.record.status == wanted
        waves = [(step.wave, step.what) for step in view.progress.steps]
        assert len(set(waves)) == len(waves), f"a step was taken twice: {waves}"
        last = {name: had[-1] for name, had in devices.had.items()}
        assert set(last.values()) == ({1} if bad else {2})
        if bad:
            assert sum(2 in had for had in devices.had.values()) == 1, "it went beyond the first wave"
            assert bench.operator.version("toy", 2).stage == "withdrawn"
        else:
            assert all(had == [1, 2] for had in devices.had.values()), "a device was sent back and forth"
            assert bench.operator.version("toy", 2).stage == "stable"
        return mortal.commits
    finally:
        bench.close()


@pytest.mark.parametrize("bad", [False, True], ids=["completes", "rolls back"])
def test_a_kill_around_any_commit_of_a_rollout_loses_nothing(tmp_path: Path, bad: bool) -> None:
    (tmp_path / "whole").mkdir()
    commits = run(tmp_path / "whole", 0, "after the commit", bad=bad)
    assert commits >= 5
    for at in range(1, commits + 1):
        for moment in ("before the commit", "after the commit"):
            path = tmp_path / f"{at}-{moment[:5]}"
            path.mkdir()
            run(path, at, moment, bad=bad)  # type: ignore[arg-type]
