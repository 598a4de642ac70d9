"""A cohort of two sub-cohorts, with the real service, a real broker and real device processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator import main as covey
from aggregator.queries import QueryRequest
from aggregator.round_operations import RoundView
from deploy.broker import BrokerProcess
from edge_client.adapters.readings import save_fields
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.fields import DeclaredFields, field_source
from edge_client.policy import DevicePolicy
from protocol.dp.parameters import PrivacyMode
from protocol.identity import SignedDocument
from protocol.plan import MeanQuestion, Plan
from tests.aggregator_process import ServiceProcess
from tests.edge_broker import Device, running, wait_for

HIGH = 128.0
VALUES = {f"barn-{number}": float(2**number) for number in range(8)}
"""No two sets of devices have the same sum."""
ASKED = QueryRequest(
    field="load",
    low=0.0,
    high=HIGH,
    question=MeanQuestion(),
    cohort=len(VALUES),
    minimum=2,
    min_survivors=2,
    subcohort_limit=4,
    privacy=PrivacyMode.NONE,
    gather_seconds=120.0,
)


def device(directory: Path, aggregator: Path, name: str, broker: BrokerProcess) -> Device:
    """An enrolled device that declares its value and has nothing to train on."""
    state, data = directory / name, directory / f"{name}-data"
    enrol(state, covey.enrol(aggregator, initialise(state, name)))
    modes = frozenset({PrivacyMode.NONE, PrivacyMode.DISTRIBUTED})
    set_policy(state, DevicePolicy(minimum_cohort=2, minimum_survivors=2, privacy_modes=modes))
    source = field_source({"kind": "constant", "value": VALUES[name]})
    save_fields(state, DeclaredFields(fields={"load": source}))
    data.mkdir()
    return Device(state, data, broker)


def parts_of(view: RoundView) -> tuple[tuple[str, ...], ...]:
    document = SignedDocument.model_validate_json(view.record.plan)
    split = Plan.from_bytes(document.payload).cohort.split
    return split.parts(view.record.invited, document.digest)


def ask(state: Path) -> RoundView:
    """Asks every device, and waits for the round's end."""
    with covey.open_operator(state) as operator:
        campaign = operator.start_query(ASKED)

        def ended() -> bool:
            return any(view.record.status != "running" for view in operator.rounds(campaign.campaign_id))

        wait_for(ended, 120, "the round's end")
        (view,) = operator.rounds(campaign.campaign_id)
    return view


@pytest.mark.e2e
def test_the_sums_of_the_sub_cohorts_make_one_answer(mosquitto: BrokerProcess, tmp_path: Path) -> None:
    state = tmp_path / "aggregator"
    covey.init(state, fleet="orchard", broker=mosquitto.url)
    devices = [device(tmp_path, state, name, mosquitto) for name in VALUES]
    with ServiceProcess(state, mosquitto.url), running(*devices):
        wait_for(lambda: covey.is_running(state), what="the service")
        # The hash of the fresh plan decides who is where: one round in fourteen has a part with one device
        # or none, which fails on its own.
        for _ in range(4):
            view = ask(state)
            parts = parts_of(view)
            assert view.record.status == "completed", view.record.detail
            assert {name for part in parts for name in part} == VALUES.keys()
            summed = {name for part in parts if len(part) >= 2 for name in part}
            assert set(view.report.survivors) == summed
            assert [(each.invited, each.survivors) for each in view.report.subcohorts] == [
                (len(part), len(part) if len(part) >= 2 else 0) for part in parts
            ]
            assert view.report.answer is not None
            mean = sum(VALUES[name] for name in summed) / len(summed)
            assert view.report.answer.figures.estimate == pytest.approx(mean, abs=HIGH / 2**18)
            if len(summed) == len(VALUES):
                return
    raise AssertionError("four unlucky plans")
