"""Mode example on the device: its own gate, its ledger, and how a plan becomes a training."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_client import report
from edge_client.adapters.store import DeviceStore
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.durable import SaveContribution
from edge_client.events import Event
from edge_client.ledger import DAY, History
from edge_client.outputs import Train
from edge_client.policy import DevicePolicy, check_epsilon
from models.manifest import ModelManifest, SignatureSpec
from protocol.dp.accounting import spend
from protocol.dp.events import DPEvent, for_one_example
from protocol.dp.example import example_event, example_mechanism
from protocol.dp.parameters import ExamplePrivacy, PrivacyMode, PrivacyParameters
from protocol.messages import Refusal
from protocol.plan import TrainingParameters
from tests.edge_fleet import NOW, PERMISSIVE, SIZE, Aggregator, FakeDevice, invitation, manifest, plan
from tests.unit.test_edge_enrolment import bundle_for
from tests.unit.test_edge_policy import answer, contribution, event, ready, refused

PRIVACY = PrivacyParameters(
    mode=PrivacyMode.EXAMPLE,
    clip_norm=10.0,
    noise_multiplier=0.0,
    delta=1e-5,
    bits=24,
    example=ExamplePrivacy(clip_norm=1.0, noise_multiplier=1.0, sampling_probability=0.1),
)
TRAINING = TrainingParameters(local_epochs=2, learning_rate=0.1)


def capable() -> ModelManifest:
    """The test model with the entry points that mode example needs."""
    base = manifest()
    more = (
        SignatureSpec(name="gradient", inputs=("x", "y"), outputs=("gradient",)),
        SignatureSpec(name="apply", inputs=("gradient", "lr", "mu"), outputs=("count",)),
    )
    return base.model_copy(update={"signatures": (*base.signatures, *more)})


def cost(steps: int = 20) -> DPEvent:
    return example_event(example_mechanism(PRIVACY, SIZE), steps)


class Watched(FakeDevice):
    """A device that remembers what it was to train."""

    trainings: tuple[Train, ...] = ()

    def give(self, event: Event) -> None:
        super().give(event)
        new = [job for job in self.jobs if isinstance(job, Train) and job not in self.trainings]
        self.trainings = (*self.trainings, *new)


def device_with_the_model(policy: DevicePolicy = PERMISSIVE, name: str = "device-0") -> Watched:
    device = Watched(name, policy=policy)
    device.install(capable())
    device.take()
    return device


def test_the_mode_is_off_by_default() -> None:
    code, detail = refused(DevicePolicy(), privacy=PRIVACY)
    assert code == "privacy-mode" and "example" in detail


def test_the_gate_has_a_limit_of_its_own() -> None:
    one, two = (spend({cost(): count}, 1e-5).epsilon for count in (1, 2))
    limit = (one + two) / 2
    policy = DevicePolicy(maximum_example_epsilon=limit, maximum_epsilon=1e-3)
    assert check_epsilon(policy, cost(), History(), NOW) is None
    refusal = check_epsilon(policy, cost(), History().with_contribution(NOW, cost()), NOW)
    assert refusal is not None and refusal.code == "epsilon-exceeded"
    for figure in (f"{two:.4g}", f"{one:.4g}", "of one example", f"maximum_example_epsilon is {limit:g}"):
        assert figure in refusal.detail
    # Half a year later the period is over.
    late = History().with_contribution(NOW - 180 * DAY, cost())
    assert check_epsilon(policy, cost(), late, NOW) is None


def test_a_device_without_a_limit_refuses_nothing() -> None:
    policy = DevicePolicy(maximum_example_epsilon=None)
    assert check_epsilon(policy, cost(100_000), History(), NOW) is None


def test_the_two_units_are_reckoned_apart() -> None:
    history = History().with_contribution(NOW, cost()).with_contribution(NOW, event())
    alone = spend({event(): 1}, 1e-5)
    device = history.spent(NOW, 30, 1e-5)
    assert (device.unit, device.epsilon, device.rounds) == ("device", alone.epsilon, 1)
    example = history.spent_on_an_example(NOW, 30, 1e-5)
    assert example.unit == "example" and example.rounds == 2
    # What hides the device hides its examples too, but as a replacement: at twice the sensitivity.
    assert for_one_example(event()).sensitivity_squared == 4 * event().sensitivity_squared
    assert example.epsilon > spend({for_one_example(event()): 1}, 1e-5).epsilon > alone.epsilon
    assert History().spent_on_an_example(NOW, 30, 1e-5).unit == "example"


def test_a_plan_becomes_a_training_with_secrets_of_its_own() -> None:
    devices = [device_with_the_model(name=f"device-{i}") for i in range(4)]
    base = capable()
    aggregator = Aggregator(devices, plan(base=base, privacy=PRIVACY, training=TRAINING))
    aggregator.run()
    aggregator.end()
    hidden = [training.config.hidden for device in devices for training in device.trainings]
    assert len(hidden) == 4
    for each in hidden:
        assert each is not None and each.steps == 20
        assert each.mechanism == example_mechanism(PRIVACY, SIZE)
        assert each.secret.hex() not in repr(each) and repr(each.secret) not in repr(each)
    assert len({each.secret for each in hidden if each}) == 4
    for device in devices:
        (saved,) = device.disk.ledger
        assert saved.entry.event == cost()


def test_a_model_without_such_gradients_is_refused_before_any_key_is_shown() -> None:
    refusal = answer(ready(), invitation(plan(privacy=PRIVACY)))
    assert isinstance(refusal, Refusal) and refusal.code == "no-example-gradients"
    assert "mode example" in refusal.detail


def test_the_gate_stands_at_the_desk() -> None:
    policy = PERMISSIVE.model_copy(update={"maximum_example_epsilon": 0.5})
    device = device_with_the_model(policy)
    refusal = answer(device, invitation(plan(base=capable(), privacy=PRIVACY, training=TRAINING)))
    assert isinstance(refusal, Refusal) and refusal.code == "epsilon-exceeded"
    assert "maximum_example_epsilon is 0.5" in refusal.detail


def test_the_owner_sees_both_units(tmp_path: Path) -> None:
    now = int(time.time())
    enrol(tmp_path, bundle_for(initialise(tmp_path, "barn-1"), "barn-1", now=now))
    set_policy(tmp_path, DevicePolicy(maximum_example_epsilon=5.0))
    with DeviceStore.open(tmp_path) as store:
        store.apply([SaveContribution(contribution("a" * 32, now, cost()))])
    shown = report.privacy(tmp_path, now)
    one = spend({cost(): 1}, 1e-5).epsilon
    assert shown["epsilon"] == 0 and shown["one_example"]["epsilon"] == pytest.approx(one)
    text = report.privacy_text(shown)
    assert "1 of them hide single examples and not the device" in text
    assert f"one example of the device: epsilon {one:.4g} in the last 30 days (limit 5)" in text
    assert "its own" in text
    # Nothing is said of the device.
    assert "\nepsilon" not in text
