"""Shamir secret sharing of 256-bit secrets (Shamir 1979) over a prime field, in Python integers.

The field is GF(2^256 + 297), the smallest prime above 2^256, so that every 32-byte secret is an element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations, islice

from protocol.errors import ProtocolError
from protocol.secagg.prg import Keystream

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
_DRAW_BYTES = 48  # 384 bits reduced modulo a 257-bit prime: statistical distance below 2^-126 an element
_MAX_SUBSETS = 2_000


class UnrecoverableSecret(ProtocolError):
    """No subset of the shares gives the secret that was committed to."""


def split(secret: bytes, threshold: int, holders: Sequence[int], stream: Keystream) -> list[bytes]:
    """Splits a secret so that any `threshold` of the shares recover it and fewer say nothing about it.

    Args:
        secret: 32 bytes.
        threshold: shares that recover it, 1 to len(holders).
        holders: distinct x coordinates, each at least 1.
        stream: randomness of the coefficients; used up to (threshold - 1) x 48 bytes from its start.

    Returns:
        One 33-byte big-endian field element for each holder, in their order.

    Guarantee: any threshold - 1 shares are statistically independent of the secret.
    Assumes: `stream` is used for nothing else.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= len(holders) or len(set(holders)) != len(holders) or min(holders) < 1:
        raise ValueError(f"cannot share among {len(holders)} holders with threshold {threshold}")
    draws = stream.read(0, (threshold - 1) * _DRAW_BYTES)
    coefficients = [
        int.from_bytes(draws[i : i + _DRAW_BYTES], "big") % PRIME for i in range(0, len(draws), _DRAW_BYTES)
    ]
    coefficients.append(int.from_bytes(secret, "big"))
    shares = []
    for x in holders:
        y = 0
        for coefficient in coefficients:  # Horner; x is small, so one reduction a step stays cheap
            y = (y * x + coefficient) % PRIME
        shares.append(y.to_bytes(SHARE_BYTES, "big"))
    return shares


@lru_cache(maxsize=512)
def _lagrange(holders: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Lagrange basis of `holders` evaluated at `at`; cached, since peers with the same holders share it."""
    basis = []
    for i, x in enumerate(holders):
        numerator = denominator = 1
        for j, other in enumerate(holders):
            if j != i:
                numerator = numerator * (at - other) % PRIME
                denominator = denominator * (x - other) % PRIME
        basis.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(basis)


def _interpolate(shares: Mapping[int, int], at: int) -> int:
    holders = tuple(sorted(shares))
    basis = _lagrange(holders, at)
    return sum(b * shares[x] for b, x in zip(basis, holders, strict=True)) % PRIME


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Recovers a secret from exactly threshold shares, given as x coordinate -> share.

    Raises:
        UnrecoverableSecret: a share is no field element, or the result is no 256-bit secret.
    """
    value = _interpolate(_elements(shares), 0)
    if value >= 2 ** (8 * SECRET_BYTES):
        raise UnrecoverableSecret("the shares do not belong to one secret")
    return value.to_bytes(SECRET_BYTES, "big")


def recover(
    shares: Mapping[int, bytes], threshold: int, is_secret: Callable[[bytes], bool]
) -> tuple[bytes, frozenset[int]]:
    """Recovers a secret although some of the shares may be wrong, and names those.

    The first `threshold` shares nearly always do; only after a mismatch are other subsets tried.

    Args:
        shares: x coordinate -> share, at least `threshold` of them.
        threshold: shares that recover the secret.
        is_secret: whether a candidate is the secret that its owner committed to.

    Returns:
        The secret, and the x coordinates whose shares do not lie on its polynomial.

    Raises:
        UnrecoverableSecret: too few shares, or too many wrong ones.
    """
    valid = {x: share for x, share in shares.items() if _is_element(share)}
    for subset in islice(combinations(sorted(valid), threshold), _MAX_SUBSETS):
        chosen = {x: valid[x] for x in subset}
        try:
            secret = combine(chosen)
        except UnrecoverableSecret:
            continue
        if is_secret(secret):
            points = _elements(chosen)
            others = {x: share for x, share in valid.items() if x not in chosen}
            wrong = {x for x, y in _elements(others).items() if _interpolate(points, x) != y}
            return secret, frozenset(wrong | (shares.keys() - valid.keys()))
    raise UnrecoverableSecret(f"{len(shares)} shares at threshold {threshold} do not give the secret")


def _is_element(share: bytes) -> bool:
    return len(share) == SHARE_BYTES and int.from_bytes(share, "big") < PRIME


def _elements(shares: Mapping[int, bytes]) -> dict[int, int]:
    if not all(_is_element(share) for share in shares.values()):
        raise UnrecoverableSecret("a share is not an element of the field")
    return {x: int.from_bytes(share, "big") for x, share in shares.items()}
