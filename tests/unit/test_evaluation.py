"""What a device says of a version."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client import report
from edge_client.adapters.store import DeviceStore
from edge_client.device_setup import enrol, initialise
from edge_client.durable import SaveContribution
from edge_client.ledger import LedgerEntry
from edge_client.outputs import Evaluate
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters
from protocol.errors import MalformedMessage
from protocol.evaluation import NonFiniteFigure, evaluation_vector, mean_figures
from protocol.messages import Refusal
from protocol.plan import EvaluateTask, Plan
from protocol.round_encoding import contribution_event, round_encoding
from tests import edge_fleet
from tests.edge_fleet import Aggregator, FakeDevice
from tests.unit.test_edge_enrolment import bundle_for

SLOTS = (MetricSlot(name="loss", bound=4.0, share=0.6), MetricSlot(name="accuracy", bound=1.0, share=0.8))
TASK = EvaluateTask(model="watch", version=1, manifest_sha256="a" * 64, slots=SLOTS)
PRIVACY = PrivacyParameters(
    mode=PrivacyMode.NONE, clip_norm=1.0, noise_multiplier=0.0, delta=1e-5, bits=32, rotation=False
)


def plan(version: int = 1, **changes: object) -> Plan:
    base = edge_fleet.manifest(version)
    task = EvaluateTask(model=base.name, version=base.version, manifest_sha256=base.sha256(), slots=SLOTS)
    return edge_fleet.plan(**{"task": task, "privacy": PRIVACY, **changes})


def test_figures_are_clipped_and_centred() -> None:
    np.testing.assert_allclose(evaluation_vector(TASK, {"loss": 2.0, "accuracy": 1.0}), [0, 0.8])
    np.testing.assert_allclose(evaluation_vector(TASK, {"loss": 99.0, "accuracy": -1.0}), [0.6, -0.8])


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_no_figures_have_a_norm_above_1(loss: float, accuracy: float) -> None:
    vector = evaluation_vector(TASK, {"loss": loss, "accuracy": accuracy})
    assert np.linalg.norm(vector.astype(np.float64)) <= 1 + 1e-7


@given(st.floats(0, 4), st.floats(0, 1))
def test_the_mean_of_one_is_itself(loss: float, accuracy: float) -> None:
    figures = {"loss": loss, "accuracy": accuracy}
    assert mean_figures(TASK, evaluation_vector(TASK, figures)) == pytest.approx(figures, abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_figure(value: float) -> None:
    with pytest.raises(NonFiniteFigure, match="loss"):
        evaluation_vector(TASK, {"loss": value, "accuracy": 0.5})


@pytest.mark.parametrize(
    "slots",
    [
        (),
        (SLOTS[0], SLOTS[0]),
        (MetricSlot(name="confusion", bound=1.0),),
        (SLOTS[0], MetricSlot(name="accuracy", bound=1.0, share=0.81)),
    ],
)
def test_slots_that_no_evaluation_has(slots: tuple[MetricSlot, ...]) -> None:
    with pytest.raises(ValueError, match=r"slots|evaluation"):
        EvaluateTask(model="watch", version=1, manifest_sha256="a" * 64, slots=slots)


@pytest.mark.parametrize(
    "change", [{"clip_norm": 2.0}, {"rotation": True}, {"metric_slots": SLOTS}, {"noise_multiplier": 1.0}]
)
def test_an_evaluation_has_nothing_but_its_figures(change: dict[str, object]) -> None:
    privacy = PRIVACY.model_copy(update=change)
    with pytest.raises(MalformedMessage, match=r"evaluation|mode none"):
        Plan.from_bytes(plan().model_copy(update={"privacy": privacy}).to_bytes())


def test_a_round_gives_the_mean_of_the_figures_and_trains_nothing() -> None:
    devices = [FakeDevice(f"device-{index}") for index in range(4)]
    for device in devices:
        device.install()
    jobs: list[object] = []
    aggregator = Aggregator(devices, plan())
    aggregator.run(lambda device: jobs.extend(device.jobs))
    vector, metrics = aggregator.mean()
    assert mean_figures(TASK, vector) == pytest.approx({"loss": 0.5, "accuracy": 0.75}, abs=1e-4)
    assert metrics == {}
    assert len([job for job in jobs if isinstance(job, Evaluate)]) == 4
    assert all(device.disk.local == {} for device in devices)
    # It is in the device's own ledger, as what it was.
    assert {entry.entry.task.kind for device in devices for entry in device.disk.ledger} == {"evaluate"}


def test_a_kill_during_an_evaluation_starts_it_again() -> None:
    devices = [FakeDevice(f"device-{index}") for index in range(4)]
    for device in devices:
        device.install()

    def kill(device: FakeDevice) -> None:
        if any(isinstance(job, Evaluate) for job in device.jobs):
            device.reboot()

    aggregator = Aggregator(devices, plan())
    aggregator.run(kill)
    assert mean_figures(TASK, aggregator.mean()[0])["accuracy"] == pytest.approx(0.75, abs=1e-4)


def test_a_version_that_is_not_here_is_waited_for_or_refused() -> None:
    device = FakeDevice()
    device.install()
    device.receive(edge_fleet.invitation(plan(version=2)))
    assert device.take() == []  # it may come: the aggregator asks again
    device.install(edge_fleet.manifest(3))
    device.take()
    device.receive(edge_fleet.invitation(plan(version=2)))
    (refusal,) = device.take()
    assert isinstance(refusal, Refusal) and refusal.code == "stale-version"


def test_figures_that_are_not_finite_end_the_round_for_the_device() -> None:
    devices = [FakeDevice(f"device-{index}") for index in range(4)]
    for device in devices:
        device.install()
    devices[0].evaluation = edge_fleet.Evaluation(math.nan, 0.5, np.zeros((2, 2), np.int64), 40)
    aggregator = Aggregator(devices, plan())
    aggregator.run()
    assert len(aggregator.received) == 3
    (left,) = [note for note in devices[0].notes if note.event == "round-aborted"]
    assert left.fields["code"] == "evaluation-not-finite"


def test_the_owner_sees_what_a_device_told_of_a_version(tmp_path: Path) -> None:
    now, asked = int(time.time()), plan()
    enrol(tmp_path, bundle_for(initialise(tmp_path, "barn-1"), "barn-1", now=now))
    entry = LedgerEntry(
        round_id=asked.round_id,
        at=now,
        fleet=asked.fleet,
        task=asked.task,
        plan_sha256="a" * 64,
        signer="b" * 64,
        delta=1e-5,
        event=contribution_event(asked, round_encoding(asked, bytes(32), len(SLOTS))),
    )
    with DeviceStore.open(tmp_path) as store:
        store.apply([SaveContribution(entry)])
    assert "evaluation of watch v1" in report.privacy_text(report.privacy(tmp_path, now))
