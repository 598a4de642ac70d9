"""What a device refuses: each rule with its code, the figure of the plan and the rule's name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from edge_client import report
from edge_client.adapters.store import DeviceStore
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.durable import SaveContribution
from edge_client.events import ConditionsChanged, Fault, VersionTested
from edge_client.ledger import DAY, DaySpent, History, LedgerEntry
from edge_client.policy import DevicePolicy, InvalidPolicy, Proposal, check, check_epsilon
from protocol.dp.events import DPEvent, event_for
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters, TreeNoise
from protocol.dp.scaling import derive_encoding
from protocol.identity import SignedDocument, key_id
from protocol.messages import AdvertiseKeys, Invitation, Refusal
from protocol.plan import PLAN_KIND, CohortParameters, MeanQuestion, QueryTask, TrainingParameters
from protocol.secagg.parameters import GraphAssumptions
from tests.edge_fleet import (
    FLEET,
    NOW,
    OPERATOR,
    PERMISSIVE,
    STRANGER,
    Aggregator,
    FakeDevice,
    announcement,
    invitation,
    manifest,
    plan,
)
from tests.unit.test_edge_enrolment import bundle_for

SIGNER = key_id(OPERATOR.public_key())
CENTRAL = PrivacyParameters(
    mode=PrivacyMode.CENTRAL, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5, bits=24
)
GOOD: dict[str, Any] = {
    "privacy": CENTRAL,
    "cohort": CohortParameters(size=10, minimum=6, minimum_survivors=5),
}


def refused(policy: DevicePolicy, history: History | None = None, **changes: Any) -> tuple[str, str]:
    proposal = Proposal(plan(**{**GOOD, **changes}), SIGNER)
    refusal = check(policy, FLEET, proposal, history or History(), NOW)
    return (refusal.code, refusal.detail) if refusal else ("", "")


def event(noise_multiplier: float = 1.0, mode: PrivacyMode = PrivacyMode.DISTRIBUTED) -> DPEvent:
    privacy = PrivacyParameters(
        mode=mode, clip_norm=1.0, noise_multiplier=noise_multiplier, delta=1e-5, bits=24
    )
    encoding = derive_encoding(
        privacy, dimension=100, minimum_survivors=5, maximum_clients=10, rotation_seed=bytes(32)
    )
    return event_for(encoding, 5)


def test_the_defaults_agree_to_an_ordinary_plan() -> None:
    assert refused(DevicePolicy()) == ("", "")


@pytest.mark.parametrize(
    ("policy", "changes", "code", "words"),
    [
        ({}, {"fleet": "orchard"}, "wrong-fleet", ["orchard", "barn"]),
        ({"allowed_signers": frozenset({"0" * 64})}, {}, "signer-not-allowed", [SIGNER[:16]]),
        ({}, {"expires_at": NOW}, "plan-expired", ["0 s ago"]),
        ({}, {"issued_at": NOW + 301, "expires_at": NOW + 400}, "plan-from-future", ["301", "300", "clock"]),
        ({}, {"expires_at": NOW + 30 * DAY}, "plan-too-long", ["maximum_plan_seconds"]),
        (
            {"minimum_cohort": 7},
            {},
            "cohort-too-small",
            ["cohort of 6", "minimum_cohort is 7"],
        ),
        (
            {},
            {"cohort": CohortParameters(size=10, minimum=6, minimum_survivors=3)},
            "too-few-survivors",
            ["sum of 3", "minimum_survivors is 4"],
        ),
        (
            {},
            {"privacy": CENTRAL.model_copy(update={"mode": PrivacyMode.NONE, "noise_multiplier": 0.0})},
            "privacy-mode",
            ["none", "central, distributed"],
        ),
        (
            {"minimum_colluders": 2},
            {"privacy": CENTRAL.model_copy(update={"mode": PrivacyMode.DISTRIBUTED, "colluders": 1})},
            "noise-too-trusting",
            ["if 1 survivors", "minimum_colluders is 2"],
        ),
        ({"maximum_clip_norm": 0.5}, {}, "clip-norm", ["1", "maximum_clip_norm is 0.5"]),
        (
            {},
            {"training": TrainingParameters(local_epochs=21, learning_rate=0.1)},
            "too-many-epochs",
            ["21", "maximum_local_epochs is 20"],
        ),
        (
            {},
            {
                "cohort": CohortParameters(
                    size=500, minimum=400, minimum_survivors=300, graph=GraphAssumptions(corrupt_fraction=0)
                )
            },
            "graph-too-trusting",
            ["minimum_corrupt_fraction is 0.05"],
        ),
        (
            {},
            {
                "cohort": CohortParameters(
                    size=500,
                    minimum=400,
                    minimum_survivors=300,
                    graph=GraphAssumptions(adversary="semi-honest"),
                )
            },
            "graph-too-trusting",
            ["allow_semi_honest"],
        ),
        (
            {},
            {
                "cohort": CohortParameters(
                    size=500, minimum=400, minimum_survivors=300, graph=GraphAssumptions(grinding_bits=39)
                )
            },
            "graph-too-trusting",
            ["2^39 tries", "minimum_grinding_bits is 40"],
        ),
    ],
)
def test_each_rule_refuses(
    policy: dict[str, Any], changes: dict[str, Any], code: str, words: list[str]
) -> None:
    found, detail = refused(DevicePolicy(**policy), **changes)
    assert found == code
    assert all(word in detail for word in words), detail


def test_clock_skew_is_tolerated() -> None:
    assert refused(DevicePolicy(), issued_at=NOW + 300, expires_at=NOW + 900) == ("", "")


def test_contributions_of_a_day_are_counted() -> None:
    policy = DevicePolicy(maximum_rounds_per_day=2)
    assert refused(policy, History((NOW - DAY - 1, NOW - DAY, NOW - 5))) == ("", "")
    code, detail = refused(policy, History((NOW - DAY + 1, NOW - 5)))
    assert code == "too-many-rounds" and "2 contributions" in detail
    assert History((NOW - 2 * DAY, NOW - 5)).with_contribution(NOW, event()).contributed_at == (NOW - 5, NOW)


def test_policies_are_strict() -> None:
    for data in (
        b"",
        b"[]",
        b'{"minimum_cohort": 1}',
        b'{"minimum_cohort": "5"}',
        b'{"minimum_cohorts": 5}',
        b'{"privacy_modes": []}',
        b'{"privacy_modes": ["loud"]}',
        b'{"maximum_clip_norm": NaN}',
        b'{"maximum_epsilon": 0}',
        b'{"maximum_epsilon": Infinity}',
        b'{"epsilon_period_days": 0}',
        b'{"delta": 0.5}',
        b'{"allowed_signers": ["abc"]}',
    ):
        with pytest.raises(InvalidPolicy):
            DevicePolicy.from_bytes(data)
    assert DevicePolicy.from_bytes(DevicePolicy().to_bytes()) == DevicePolicy()


# --- the device's own epsilon ----------------------------------------------------------------------------


def test_the_device_refuses_what_would_exceed_its_epsilon_with_figure_and_rule() -> None:
    policy = DevicePolicy(maximum_epsilon=10.0, epsilon_period_days=7)
    history, taken = History(), 0
    while (refusal := check_epsilon(policy, event(), history, NOW)) is None:
        history, taken = history.with_contribution(NOW, event()), taken + 1
    assert taken == 3  # sqrt(4) of the Gaussian's epsilon is beyond 10
    spent = history.spent(NOW, 7, 1e-5).epsilon
    projected = history.spent(NOW, 7, 1e-5, event()).epsilon
    assert spent <= 10 < projected
    assert refusal.code == "epsilon-exceeded"
    for word in (f"{projected:.4g}", f"{spent:.4g}", "maximum_epsilon is 10", "7 days", "1e-05"):
        assert word in refusal.detail


def test_the_figure_is_that_of_the_aggregators_accountant() -> None:
    privacy = pytest.importorskip("aggregator.privacy")
    history = History().with_contribution(NOW, event()).with_contribution(NOW, event(2.0))
    expected = privacy.account([event(), event(2.0)], 1e-5)
    assert history.spent(NOW, 1, 1e-5).epsilon == pytest.approx(expected.epsilon, rel=1e-12)


def test_noise_in_name_only_is_refused_by_default() -> None:
    """Mode `none` needs the owner's word; a plan with hardly any noise is the same under another name."""
    refusal = check_epsilon(DevicePolicy(), event(0.05), History(), NOW)
    assert refusal is not None and "maximum_epsilon is 30" in refusal.detail
    assert check_epsilon(DevicePolicy(maximum_epsilon=None), event(0.05), History(), NOW) is None


def test_only_the_period_counts_and_a_clock_that_was_ahead_hides_nothing() -> None:
    policy = DevicePolicy(maximum_epsilon=6.0, epsilon_period_days=2)

    def refused_after(at: int) -> bool:
        return check_epsilon(policy, event(), History().with_contribution(at, event()), NOW) is not None

    assert [refused_after(NOW - days * DAY) for days in (2, 1, 0, -1, -400)] == [False, *[True] * 4]


def test_contributions_without_noise_are_counted_apart() -> None:
    """The owner allowed them: no limit is meant for them, and no epsilon hides them."""
    silent = event(0.0, PrivacyMode.NONE)
    history = History().with_contribution(NOW, silent).with_contribution(NOW, event())
    assert check_epsilon(DevicePolicy(), silent, history, NOW) is None
    assert check_epsilon(DevicePolicy(), event(), history, NOW) is None
    assert history.without_noise() == 1
    assert history.days == (DaySpent(NOW // DAY, silent, 1), DaySpent(NOW // DAY, event(), 1))


def test_a_device_is_in_one_round_of_a_noise_tree_whatever_the_aggregator_says() -> None:
    """What a tree costs counts a device once; a second contribution is refused, until the tree restarts."""

    def tree_plan(name: str, leaf: int) -> dict[str, Any]:
        tree = TreeNoise(restart_every=8, tree=name * 32, leaf=leaf)
        return {"privacy": CENTRAL.model_copy(update={"tree": tree})}

    encoding = derive_encoding(
        tree_plan("ab", 1)["privacy"],
        dimension=100,
        minimum_survivors=5,
        maximum_clients=10,
        rotation_seed=bytes(32),
    )
    contributed = History().with_contribution(NOW - 40 * DAY, event_for(encoding, 5))
    assert refused(DevicePolicy(), **tree_plan("ab", 1)) == ("", "")
    code, detail = refused(DevicePolicy(), contributed, **tree_plan("ab", 7))
    assert code == "noise-tree" and "abababab" in detail and "every 8 rounds" in detail
    assert refused(DevicePolicy(), contributed, **tree_plan("cd", 1)) == ("", "")


NOISY = CENTRAL.model_copy(update={"mode": PrivacyMode.DISTRIBUTED})


def test_the_gate_stands_at_the_desk_and_after_a_reboot() -> None:
    devices = [FakeDevice(f"device-{i}") for i in range(4)]
    for device in devices:
        device.install()
        device.take()
    aggregator = Aggregator(devices, plan(privacy=NOISY))
    aggregator.run()
    aggregator.end()
    device = devices[0]
    strict = PERMISSIVE.model_copy(update={"maximum_epsilon": 6.0})
    device.profile = type(device.profile)(**{**vars(device.profile), "policy": strict})
    for boot in (False, True):
        if boot:
            device.reboot()
            device.take()
        # A plan that calls its delta 0.9 makes nothing cheaper.
        loud = plan("b" * 32, privacy=NOISY.model_copy(update={"delta": 0.9}))
        refusal = answer(device, invitation(loud))
        assert isinstance(refusal, Refusal) and refusal.code == "epsilon-exceeded"
        assert "maximum_epsilon is 6" in refusal.detail


def test_the_ledger_and_the_gate_survive_reenrolment(tmp_path: Path) -> None:
    now = int(time.time())
    enrol(tmp_path, bundle_for(initialise(tmp_path, "barn-1"), "barn-1", now=now))
    entries = [contribution("a" * 32, now), contribution("b" * 32, now, event(2.0))]
    with DeviceStore.open(tmp_path) as store:
        store.apply([SaveContribution(entry) for entry in entries])
    # The client is installed anew and enrolled with another certificate of another fleet's operator.
    enrol(tmp_path, bundle_for(initialise(tmp_path, "barn-1"), "barn-1", now=now + 60))
    with DeviceStore.open(tmp_path) as store:
        memory = store.load()
    assert set(memory.spent) == set(History.of(entries).days) and len(memory.spent) == 2
    history = History(memory.contributed_at, memory.spent)
    assert check_epsilon(DevicePolicy(maximum_epsilon=6.0), event(), history, now) is not None


def contribution(round_id: str, at: int, cost: DPEvent | None = None) -> LedgerEntry:
    return LedgerEntry(
        round_id=round_id,
        at=at,
        fleet=FLEET,
        task=plan().task,
        plan_sha256="0" * 64,
        signer="0" * 64,
        delta=1e-5,
        event=cost or event(),
    )


def test_the_owner_sees_the_epsilon_spent(tmp_path: Path) -> None:
    now = int(time.time())
    enrol(tmp_path, bundle_for(initialise(tmp_path, "barn-1"), "barn-1", now=now))
    assert report.privacy(tmp_path, now)["epsilon"] == 0
    set_policy(tmp_path, DevicePolicy(maximum_epsilon=8.0, epsilon_period_days=10))
    with DeviceStore.open(tmp_path) as store:
        for round_id, at, cost in (
            ("a" * 32, now - 20 * DAY, event()),
            ("b" * 32, now, event()),
            ("c" * 32, now, event(0.0, PrivacyMode.NONE)),
        ):
            store.apply([SaveContribution(contribution(round_id, at, cost))])
    shown = report.privacy(tmp_path, now)
    assert shown["epsilon"] == pytest.approx(4.7285, rel=1e-2) and shown["maximum_epsilon"] == 8.0
    assert shown["epsilon_ever"] > shown["epsilon"] and shown["without_noise"] == 1
    text = report.privacy_text(shown)
    assert f"epsilon {shown['epsilon']:.4g} in the last 10 days (limit 8)" in text
    assert "1 of them without noise" in text


def test_a_long_ledger_is_soon_reckoned() -> None:
    """Ten years of daily rounds: days with one and the same event, whose curve is worked out once."""
    days = tuple(DaySpent(NOW // DAY - back, event(), 3) for back in range(3650))
    history = History((), days)
    began = time.process_time()
    assert history.spent(NOW, 3650, 1e-5).rounds == 10_950
    assert time.process_time() - began < 5


# --- at the check-in desk --------------------------------------------------------------------------------


def answer(device: FakeDevice, message: Invitation) -> AdvertiseKeys | Refusal | None:
    device.receive(message)
    sent = device.take()
    assert len(sent) <= 1
    return sent[0] if sent else None  # type: ignore[return-value]


def ready(policy: DevicePolicy = PERMISSIVE) -> FakeDevice:
    device = FakeDevice(policy=policy)
    device.install()
    device.take()
    return device


def code_of(found: object) -> str:
    assert isinstance(found, Refusal), found
    return found.code


def test_a_policy_refusal_shows_no_key_and_keeps_the_round_id_free() -> None:
    device = ready(DevicePolicy())
    refusal = answer(device, invitation(plan()))
    assert isinstance(refusal, Refusal) and refusal.code == "cohort-too-small" and "5" in refusal.detail
    assert device.state.active is None and not device.state.used


@pytest.mark.parametrize("signer", [STRANGER])
def test_a_plan_of_an_unknown_signer_is_refused_by_its_claimed_id(signer: Any) -> None:
    device = ready()
    assert code_of(answer(device, invitation(plan(), signer))) == "bad-signature"
    tampered = invitation(plan()).plan.model_copy(update={"payload": plan("c" * 32).to_bytes()})
    assert code_of(answer(device, Invitation(plan=tampered))) == "bad-signature"
    # A manifest's signature is good for no plan.
    other = announcement(manifest()).manifest
    assert answer(device, Invitation(plan=other)) is None


@pytest.mark.parametrize("payload", [b"", b"{}", b"\xff\xfe", b'{"round_id": 5}', b"[" * 60_000])
def test_signed_garbage_is_no_plan(payload: bytes) -> None:
    device = ready()
    assert answer(device, Invitation(plan=SignedDocument.create(OPERATOR, PLAN_KIND, payload))) is None
    assert "plan-refused" in device.note_events()


def test_hostile_plans_are_refused_with_a_code() -> None:
    none = plan().privacy
    cases: list[tuple[dict[str, Any], str]] = [
        ({"base_version": 2}, "bad-plan"),
        (
            {
                "privacy": none.model_copy(update={"bits": 8}),
                "cohort": CohortParameters(
                    size=200, minimum=3, minimum_survivors=2, graph=GraphAssumptions(grinding_bits=40)
                ),
            },
            "bad-plan",
        ),
        ({"privacy": none.model_copy(update={"colluders": 2})}, "bad-plan"),
        (
            {"privacy": none.model_copy(update={"metric_slots": (MetricSlot(name="heartbeat", bound=1.0),)})},
            "unknown-metric",
        ),
    ]
    for changes, code in cases:
        assert code_of(answer(ready(), invitation(plan(**changes)))) == code


def test_a_device_that_is_unfit_says_why() -> None:
    device = ready()
    device.give(ConditionsChanged(Fault("no-data", "the data directory holds no NPZ file")))
    assert code_of(answer(device, invitation(plan()))) == "no-data"
    device.give(ConditionsChanged(None))
    assert isinstance(answer(device, invitation(plan())), AdvertiseKeys)


def test_a_model_that_is_not_followed_or_does_not_run_is_refused() -> None:
    device = FakeDevice()
    device.profile = type(device.profile)(**{**vars(device.profile), "models": frozenset({"digits"})})
    device.receive(announcement(manifest()))
    assert device.take() == []
    assert code_of(answer(device, invitation(plan()))) == "model-not-followed"

    device = ready()
    device.install(manifest(3))
    device.take()
    assert code_of(answer(device, invitation(plan(base=manifest(2))))) == "stale-version"

    device = FakeDevice()
    device.receive(announcement(manifest()))
    device.disk.blobs = {manifest().graph.sha256: b"", manifest().weights.sha256: b""}
    device.reboot()
    device.give(VersionTested(manifest().sha256(), Fault("model-unusable", "no such operator")))
    device.take()
    assert code_of(answer(device, invitation(plan()))) == "model-unusable"


def test_an_expired_certificate_is_no_ticket() -> None:
    device = ready()
    device.unix = NOW + 400 * DAY
    late = plan(issued_at=device.unix - 10, expires_at=device.unix + 100)
    assert code_of(answer(device, invitation(late))) == "certificate-invalid"


def test_a_query_over_a_field_that_nobody_declared_is_refused() -> None:
    task = QueryTask(field="battery-temperature", low=0.0, high=80.0, question=MeanQuestion())
    privacy = plan().privacy.model_copy(update={"clip_norm": 1.0, "metric_slots": (), "rotation": False})
    device = FakeDevice()
    assert code_of(answer(device, invitation(plan(task=task, privacy=privacy)))) == "unknown-field"
