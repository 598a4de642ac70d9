"""What a device refuses: each rule with its code, the figure of the plan and the rule's name."""

from __future__ import annotations

from typing import Any

import pytest

from edge_client.events import ConditionsChanged, Fault, VersionTested
from edge_client.policy import DAY, DevicePolicy, History, InvalidPolicy, Proposal, check
from protocol.dp.parameters import MetricSlot, PrivacyMode, PrivacyParameters
from protocol.identity import SignedDocument, key_id
from protocol.messages import AdvertiseKeys, Invitation, Refusal
from protocol.plan import PLAN_KIND, CohortParameters, TrainingParameters
from protocol.secagg.parameters import GraphAssumptions
from tests.edge_fleet import (
    FLEET,
    NOW,
    OPERATOR,
    PERMISSIVE,
    STRANGER,
    FakeDevice,
    announcement,
    invitation,
    manifest,
    plan,
)

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
    assert History((NOW - 2 * DAY, NOW - 5)).with_contribution(NOW).contributed_at == (NOW - 5, NOW)


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
        b'{"allowed_signers": ["abc"]}',
    ):
        with pytest.raises(InvalidPolicy):
            DevicePolicy.from_bytes(data)
    assert DevicePolicy.from_bytes(DevicePolicy().to_bytes()) == DevicePolicy()


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
                "cohort": CohortParameters(size=200, minimum=3, minimum_survivors=2),
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
