"""Devices fail at the moment that was planned for them, and come back when that phase is over."""

from __future__ import annotations

from deploy.demo.accidents import Accidents, Action, Sight
from deploy.demo.options import Kill, KillMoment

DEVICES = ("a", "b", "c", "d")
ADVERTISED = frozenset({"advertise-keys"})
SHARED = frozenset({"advertise-keys", "share-keys"})


def everyone(said: frozenset[str], **others: frozenset[str]) -> dict[str, frozenset[str]]:
    return {device: others.get(device, said) for device in DEVICES}


def test_after_shares_means_after_its_own_and_before_its_input() -> None:
    accidents = Accidents([Kill(2, 1, KillMoment.AFTER_SHARES)], DEVICES)
    assert accidents.step(Sight(1, "MaskedInput", everyone(SHARED))) == []
    assert accidents.step(Sight(2, "AdvertiseKeys", everyone(ADVERTISED))) == []
    assert accidents.step(Sight(2, "ShareKeys", everyone(ADVERTISED, b=SHARED))) == [Action("freeze", "b")]
    assert accidents.step(Sight(2, "ShareKeys", everyone(SHARED))) == []
    assert accidents.step(Sight(2, "MaskedInput", everyone(SHARED))) == [Action("kill", "b")]
    assert accidents.down == {"b"}
    assert accidents.step(Sight(2, "MaskedInput", everyone(SHARED))) == []
    assert accidents.step(Sight(2, "ConsistencyCheck", everyone(SHARED))) == [Action("restart", "b")]
    assert accidents.step(Sight(3, "ShareKeys", everyone(SHARED))) == []
    assert accidents.killed == ((2, "b", KillMoment.AFTER_SHARES),)


def test_before_shares_means_on_the_roster_without_shares() -> None:
    accidents = Accidents([Kill(1, 0, KillMoment.BEFORE_SHARES)], DEVICES)
    assert accidents.step(Sight(1, "AdvertiseKeys", {})) == []
    assert accidents.step(Sight(1, "AdvertiseKeys", everyone(ADVERTISED))) == [Action("freeze", "a")]
    assert accidents.step(Sight(1, "ShareKeys", everyone(ADVERTISED))) == [Action("kill", "a")]
    assert accidents.step(Sight(1, "", everyone(ADVERTISED))) == [Action("restart", "a")]


def test_a_device_that_was_too_fast_is_replaced_by_one_that_was_not() -> None:
    accidents = Accidents([Kill(1, 0, KillMoment.BEFORE_SHARES)], DEVICES)
    seen = everyone(ADVERTISED, a=SHARED, b=SHARED)
    assert accidents.step(Sight(1, "ShareKeys", seen)) == [Action("kill", "c")]


def test_a_frozen_device_never_stays_frozen() -> None:
    accidents = Accidents([Kill(1, 0, KillMoment.AFTER_SHARES)], DEVICES)
    accidents.step(Sight(1, "ShareKeys", everyone(ADVERTISED, a=SHARED)))
    assert accidents.step(Sight(2, "AdvertiseKeys", {})) == [Action("kill", "a")]
    assert accidents.step(Sight(2, "AdvertiseKeys", {})) == [Action("restart", "a")]


def test_an_aborted_round_brings_the_killed_back() -> None:
    accidents = Accidents([Kill(1, 0, KillMoment.AFTER_SHARES)], DEVICES)
    accidents.step(Sight(1, "MaskedInput", everyone(SHARED)))
    assert accidents.down == {"a"}
    assert accidents.step(Sight(1, "", everyone(SHARED))) == [Action("restart", "a")]
    assert not accidents.down
