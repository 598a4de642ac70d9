"""The canary audit: its statistics, its verdict on every mode, and that it can fail.

The audits' seeds are fixed. With a right claim, a seed chosen afresh would fail with probability below 5 %.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("dp_accounting")
pytest.importorskip("scipy")

from typer.testing import CliRunner

from aggregator.cli_privacy import privacy_app
from aggregator.privacy import audit as auditing
from aggregator.privacy import example_audit
from aggregator.privacy.audit import AuditSettings, audit
from aggregator.privacy.example_audit import audit_examples
from aggregator.privacy.example_forecast import ExampleForecast, ExampleIntention, forecast_examples
from aggregator.privacy.lower_bound import lower_bound, p_value
from protocol.dp.errors import InvalidParameters
from protocol.dp.parameters import NoiseDistribution, PrivacyMode
from protocol.dp.scaling import EncodingParameters, derive_encoding

MODES = [PrivacyMode.DISTRIBUTED, PrivacyMode.CENTRAL, PrivacyMode.LOCAL]


def test_perfect_guesses_give_the_closed_form() -> None:
    """All of r guesses right, delta 0: epsilon is excluded if (e^eps / (1 + e^eps))^r < 1 - confidence."""
    for guesses in (10, 100, 1000):
        accuracy = 0.05 ** (1 / guesses)
        expected = math.log(accuracy / (1 - accuracy))
        assert lower_bound(guesses, guesses, guesses, 0.0, 0.95) == pytest.approx(expected, abs=1e-6)
    assert lower_bound(1000, 1000, 500, 0.0, 0.95) == 0


def test_delta_weakens_a_bound_and_abstaining_helps_only_if_guesses_are_surer() -> None:
    assert lower_bound(1000, 1000, 900, 1e-5, 0.95) < lower_bound(1000, 1000, 900, 0.0, 0.95)
    assert lower_bound(1000, 100, 100, 1e-5, 0.95) > lower_bound(1000, 1000, 900, 1e-5, 0.95)
    assert p_value(1000, 1000, 1000, 1.0, 0.3) == 1.0


def test_the_bound_covers_randomised_response() -> None:
    """The mechanism that the bound is tight for: it is above epsilon in at most 5 % of runs.

    400 runs; a false alarm, 36 or more, has probability below 10^-3.
    """
    epsilon, rng = 1.0, np.random.default_rng(7)
    right = rng.binomial(200, 1 / (1 + math.exp(-epsilon)), size=400)
    bounds = {count: lower_bound(200, 200, count, 0.0, 0.95) for count in set(right.tolist())}
    assert sum(bounds[count] > epsilon for count in right.tolist()) < 36


@pytest.mark.parametrize("noise", list(NoiseDistribution))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_stands_and_falls_without_its_noise(mode: PrivacyMode, noise: NoiseDistribution) -> None:
    result = audit(mode, AuditSettings(), noise)
    assert 1.99 < result.claimed <= 2.0
    assert result.found <= result.claimed
    assert result.found_without_noise > 2 * result.claimed
    assert result.passed
    if mode is not PrivacyMode.LOCAL:
        assert result.accuracy > 0.4  # of ten classes: it was a model that was audited


@pytest.mark.parametrize("noise", list(NoiseDistribution))
def test_mode_example_stands_and_falls_without_its_noise(noise: NoiseDistribution) -> None:
    result = audit_examples(AuditSettings(), noise)
    assert 1.99 < result.claimed <= 2.0
    assert result.found <= result.claimed
    assert result.found_without_noise > 2 * result.claimed
    assert result.passed and result.accuracy > 0.3


def test_the_audit_of_mode_example_catches_noise_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(intention: ExampleIntention) -> ExampleForecast:
        right = forecast_examples(intention)
        return replace(right, mechanism=replace(right.mechanism, variance=right.mechanism.variance / 64))

    monkeypatch.setattr(example_audit, "forecast_examples", defective)
    caught = audit_examples(AuditSettings())
    assert caught.found > caught.claimed and not caught.passed


def test_the_audit_is_strong_enough_to_see_privacy_loss() -> None:
    """At epsilon 8 the bound rises well above 0; a broken attack would not notice."""
    result = audit(PrivacyMode.CENTRAL, AuditSettings(epsilon=8.0))
    assert 1.0 < result.found < result.claimed


def test_the_audit_catches_noise_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect as they happen: noise of the right shape, an eighth of the size that was accounted for."""

    def defective(*arguments: object, **figures: object) -> EncodingParameters:
        params = derive_encoding(*arguments, **figures)  # type: ignore[arg-type]
        object.__setattr__(params, "local_variance", params.local_variance / 64)
        return params

    honest = audit(PrivacyMode.DISTRIBUTED, AuditSettings())
    monkeypatch.setattr(auditing, "derive_encoding", defective)
    monkeypatch.setattr(auditing, "event_for", lambda *_: None)
    monkeypatch.setattr(auditing, "spend", lambda *_: honest_claim(honest.claimed))
    caught = audit(PrivacyMode.DISTRIBUTED, AuditSettings())
    assert caught.found > caught.claimed and not caught.passed


class honest_claim:  # noqa: N801 - stands in for an accountant's answer
    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon


@pytest.mark.parametrize(
    "changes", [{"canaries": 0}, {"canaries": 10**6}, {"confidence": 1.0}, {"epsilon": 0.0}, {"rounds": 0}]
)
def test_impossible_audits_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(InvalidParameters):
        audit(PrivacyMode.CENTRAL, AuditSettings(**changes))  # type: ignore[arg-type]
    with pytest.raises(InvalidParameters):
        audit_examples(AuditSettings(**changes))  # type: ignore[arg-type]
    with pytest.raises(InvalidParameters):
        audit(PrivacyMode.NONE, AuditSettings())


def test_the_command_prints_and_judges() -> None:
    done = CliRunner().invoke(privacy_app, ["audit", "--mode", "distributed", "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert [result["noise"] for result in results] == ["skellam", "discrete_gaussian"]
    assert all(result["passed"] and result["found"] <= result["claimed"] for result in results)
    # Too few canaries cannot tell even without noise: that is no pass.
    weak = CliRunner().invoke(privacy_app, ["audit", "--mode", "distributed", "--canaries", "5"])
    assert weak.exit_code == 1 and "FAILED" in weak.output
