"""What a device says of its circumstances."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from protocol.codec import decode_from_device, encode
from protocol.conditions import Conditions, bucket
from protocol.errors import MalformedMessage
from protocol.messages import DeviceStatus

SAID = Conditions(
    power="mains",
    battery=80,
    temperature=51.5,
    load=0.25,
    metered=False,
    idle_hours=3.0,
    free_memory=212,
    examples=100,
)


def test_conditions_travel_in_the_status() -> None:
    status = DeviceStatus(session=bytes(32), online=True, models={}, conditions=SAID)
    message, _ = decode_from_device(encode(status))
    assert message == status


def test_a_status_without_them_says_nothing_about_them() -> None:
    old = DeviceStatus(session=bytes(32), online=True, models={})
    assert old.conditions == Conditions() and old.conditions.power is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"battery": 101},
        {"battery": "80"},
        {"temperature": 1e9},
        {"temperature": float("nan")},
        {"load": -1.0},
        {"power": "solar"},
        {"examples": 117},
        {"owner": "<script>"},
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Conditions(**wrong)
    frame = encode(DeviceStatus(session=bytes(32), online=True, models={}, conditions=SAID))
    with pytest.raises(MalformedMessage):
        decode_from_device(frame.replace(b'"battery":80', b'"battery":8000'))


@pytest.mark.parametrize(
    ("count", "edge"), [(0, 0), (1, 1), (9, 1), (10, 10), (99_999, 10_000), (10**9, 10**6)]
)
def test_only_the_order_of_magnitude_of_a_count_is_told(count: int, edge: int) -> None:
    assert bucket(count) == edge


def test_nobody_has_fewer_than_none() -> None:
    with pytest.raises(ValueError, match="no -1 examples"):
        bucket(-1)
