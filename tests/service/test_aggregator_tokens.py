"""Tokens: what opens, what does not, and what it says."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from aggregator.access.roles import Role
from aggregator.access.tokens import InvalidToken, check, make_token, token_id

RANDOM = bytes(range(38))
TOKEN, RECORD = make_token(
    RANDOM, role=Role.OPERATOR, label="laptop", now=100.0, seconds=50.0, created_by="ada"
)


def test_a_token_opens_by_its_secret_alone() -> None:
    assert check(TOKEN, RECORD, 149.0) is Role.OPERATOR
    assert token_id(TOKEN) == RECORD.token_id == RANDOM[:6].hex()
    assert RECORD.secret_sha256 == hashlib.sha256(RANDOM[6:]).digest()
    assert RANDOM[6:].hex() not in repr(RECORD)


@pytest.mark.parametrize(
    ("token", "record", "now", "why"),
    [
        (TOKEN[:-1] + "0", RECORD, 101.0, "not one of this aggregator's"),
        (TOKEN, None, 101.0, "not one of this aggregator's"),
        (TOKEN, RECORD, 150.0, "has expired"),
        (TOKEN, replace(RECORD, revoked_at=101.0), 101.0, "was revoked"),
        # Who has no secret does not learn that the token was revoked.
        (TOKEN[:-1] + "0", replace(RECORD, revoked_at=101.0), 101.0, "not one of this aggregator's"),
        ("covey_123", RECORD, 101.0, "looks like"),
        (TOKEN + "\n", RECORD, 101.0, "looks like"),
    ],
)
def test_a_token_that_opens_nothing_says_why(token: str, record: object, now: float, why: str) -> None:
    with pytest.raises(InvalidToken, match=why):
        check(token, record, now)  # type: ignore[arg-type]


def test_roles_are_ordered() -> None:
    assert Role.ADMIN.allows(Role.VIEWER) and Role.OPERATOR.allows(Role.OPERATOR)
    assert not Role.VIEWER.allows(Role.OPERATOR) and not Role.OPERATOR.allows(Role.ADMIN)
