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


def shared(holders: int, threshold: int, *, first: int = 1) -> dict[int, bytes]:
    points = range(first, first + holders)
    return dict(zip(points, split(SECRET, threshold, points, STREAM), strict=True))


def garbage(x: int) -> bytes:
    return b"\x00" + hashlib.sha256(b"garbage" + x.to_bytes(4, "big")).digest()


SALTS = pytest.mark.parametrize("salt", [None, bytes(range(32))], ids=["one by one", "many secrets"])


@SALTS
@pytest.mark.parametrize("liars", [{1}, {43}, {1, 2, 3, 4, 5, 6, 7, 8}, {9, 17, 30}])
def test_liars_among_many_holders_are_located_whoever_they_are(liars: set[int], salt: bytes | None) -> None:
    """Trying subsets in order would need 10^11 of them to get rid of the first of 43 holders."""
    shares = {x: garbage(x) if x in liars else share for x, share in shared(43, 27).items()}
    assert recover(shares, 27, lambda candidate: candidate == SECRET, salt=salt) == (SECRET, liars)


@SALTS
def test_one_liar_is_found_by_the_one_spare_share(salt: bytes | None) -> None:
    for liar in range(1, 29):
        shares = {**shared(28, 27), liar: garbage(liar)}
        secret, wrong = recover(shares, 27, lambda candidate: candidate == SECRET, salt=salt)
        assert (secret, wrong) == (SECRET, {liar})


@SALTS
def test_more_liars_than_can_be_located_are_found_by_trying_subsets(salt: bytes | None) -> None:
    shares = {x: garbage(x) if x in {2, 5, 6} else share for x, share in shared(8, 5).items()}
    assert recover(shares, 5, lambda candidate: candidate == SECRET, salt=salt) == (SECRET, {2, 5, 6})


@SALTS
def test_consistent_shares_of_another_secret_are_refused_at_once(salt: bytes | None) -> None:
    tried = []
    with pytest.raises(UnrecoverableSecret):
        recover(shared(43, 27), 27, lambda candidate: bool(tried.append(candidate)), salt=salt)
    assert tried == [SECRET]


@pytest.mark.parametrize(("holders", "threshold"), [(1, 1), (2, 2), (9, 1), (20, 20), (64, 43), (100, 67)])
@pytest.mark.parametrize("first", [1, 16_000, 2**20 - 99])
@SALTS
def test_every_shape_of_sharing_recovers(
    holders: int, threshold: int, first: int, salt: bytes | None
) -> None:
    shares = shared(holders, threshold, first=first)
    assert recover(shares, threshold, lambda candidate: candidate == SECRET, salt=salt) == (
        SECRET,
        frozenset(),
    )
    assert combine(dict(list(shares.items())[-threshold:])) == SECRET


def test_shares_are_values_of_one_polynomial() -> None:
    """Against the definition, with a reduction in every step."""
    draws = STREAM.read(0, 66 * 48)
    coefficients = [int.from_bytes(draws[i : i + 48], "big") % PRIME for i in range(0, len(draws), 48)]
    coefficients.append(int.from_bytes(SECRET, "big"))
    for x, share in shared(30, 67 - 40, first=9_990).items():
        value = 0
        for coefficient in [*coefficients[:26], coefficients[-1]]:
            value = (value * x + coefficient) % PRIME
        assert int.from_bytes(share, "big") == value
