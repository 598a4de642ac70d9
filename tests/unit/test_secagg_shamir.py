"""Shamir sharing: the field is prime, shares recover, and wrong shares are named."""

from __future__ import annotations

import hashlib

import pytest

from protocol.secagg.prg import Keystream
from protocol.secagg.shamir import PRIME, UnrecoverableSecret, combine, recover, split

SECRET = hashlib.sha256(b"secret").digest()
STREAM = Keystream(hashlib.sha256(b"coefficients").digest())


def test_the_field_is_a_prime_above_every_secret() -> None:
    assert PRIME > 2**256
    for base in range(2, 42):  # Fermat to forty bases; Miller-Rabin below settles Carmichael numbers
        assert pow(base, PRIME - 1, PRIME) == 1
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        powers = [pow(base, odd * 2**i, PRIME) for i in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers


def test_any_threshold_shares_recover_the_secret() -> None:
    shares = dict(zip(range(1, 8), split(SECRET, 4, range(1, 8), STREAM), strict=True))
    assert combine({x: shares[x] for x in (1, 2, 3, 4)}) == SECRET
    assert combine({x: shares[x] for x in (7, 2, 5, 4)}) == SECRET


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    """Perfect secrecy, shown: t - 1 shares extend to a polynomial for any other secret as well."""
    shares = dict(zip(range(1, 6), split(SECRET, 3, range(1, 6), STREAM), strict=True))
    known = {x: int.from_bytes(shares[x], "big") for x in (1, 2)}
    for other in (0, 1, 2**256 - 1):
        # The line through x = 1, 2 and the claimed secret at 0 always exists and is a valid sharing.
        points = {0: other, **known}
        value = 0
        for x, y in points.items():
            weight = 1
            for z in points:
                if z != x:
                    weight = weight * (3 - z) * pow(x - z, -1, PRIME) % PRIME
            value = (value + weight * y) % PRIME
        forged = {1: shares[1], 2: shares[2], 3: value.to_bytes(33, "big")}
        assert int.from_bytes(combine(forged), "big") == other


def test_recover_names_the_holders_of_wrong_shares() -> None:
    shares = dict(zip(range(1, 8), split(SECRET, 4, range(1, 8), STREAM), strict=True))
    shares[2] = bytes(33)
    shares[6] = b"\xff" * 33  # not an element of the field
    shares[7] = shares[7][:-1]  # truncated
    secret, wrong = recover(shares, 4, lambda candidate: candidate == SECRET)
    assert (secret, wrong) == (SECRET, {2, 6, 7})


def test_recover_refuses_when_too_many_shares_are_wrong() -> None:
    shares = dict(zip(range(1, 6), split(SECRET, 4, range(1, 6), STREAM), strict=True))
    shares[1] = shares[2] = bytes(33)
    with pytest.raises(UnrecoverableSecret, match="threshold 4"):
        recover(shares, 4, lambda candidate: candidate == SECRET)
    with pytest.raises(UnrecoverableSecret):
        recover({1: shares[3]}, 4, lambda _: True)


@pytest.mark.parametrize(
    ("secret", "threshold", "holders"),
    [
        (b"short", 2, [1, 2]),
        (SECRET, 0, [1, 2]),
        (SECRET, 3, [1, 2]),
        (SECRET, 2, [1, 1]),
        (SECRET, 1, [0, 1]),
    ],
)
def test_split_refuses_what_would_leak_or_not_recover(
    secret: bytes, threshold: int, holders: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"secret|cannot share"):
        split(secret, threshold, holders, STREAM)
