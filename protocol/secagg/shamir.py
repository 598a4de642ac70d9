"""Shamir secret sharing of 256-bit secrets (Shamir 1979) over a prime field, in Python integers.

The field is GF(2^256 + 297), the smallest prime above 2^256, so that every 32-byte secret is an element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations, islice, zip_longest
from math import prod
from operator import mul

import numpy as np

from protocol.errors import ProtocolError
from protocol.secagg.prg import Keystream

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
MAX_HOLDER = 2**20
_DRAW_BYTES = 48  # 384 bits reduced modulo a 257-bit prime: statistical distance below 2^-126 an element
_MAX_SUBSETS = 2_000


class UnrecoverableSecret(ProtocolError):
    """No subset of the shares gives the secret that was committed to."""


def split(secret: bytes, threshold: int, holders: Sequence[int], stream: Keystream) -> list[bytes]:
    """Splits a secret so that any `threshold` of the shares recover it and fewer say nothing about it.

    Args:
        secret: 32 bytes.
        threshold: shares that recover it, 1 to len(holders).
        holders: distinct x coordinates, each from 1 to MAX_HOLDER.
        stream: randomness of the coefficients; used up to (threshold - 1) x 48 bytes from its start.

    Returns:
        One 33-byte big-endian field element for each holder, in their order.

    Guarantee: any threshold - 1 shares are statistically independent of the secret.
    Assumes: `stream` is used for nothing else.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
    distinct = len(set(holders)) == len(holders)
    if (
        not 1 <= threshold <= len(holders)
        or not distinct
        or not 1 <= min(holders) <= max(holders) <= MAX_HOLDER
    ):
        raise ValueError(f"cannot share among {len(holders)} holders with threshold {threshold}")
    draws = stream.read(0, (threshold - 1) * _DRAW_BYTES)
    coefficients = [
        int.from_bytes(draws[i : i + _DRAW_BYTES], "big") % PRIME for i in range(0, len(draws), _DRAW_BYTES)
    ]
    coefficients.append(int.from_bytes(secret, "big"))
    # Horner with small x: a step adds few bits, so one reduction serves many steps.
    steps = max(1, PRIME.bit_length() // max(holders).bit_length())
    runs = [coefficients[i : i + steps] for i in range(0, threshold, steps)]
    shares = []
    for x in holders:
        y = 0
        for run in runs:
            for coefficient in run:
                y = y * x + coefficient
            y %= PRIME
        shares.append(y.to_bytes(SHARE_BYTES, "big"))
    return shares


@lru_cache(maxsize=64)
def _weights(holders: tuple[int, ...]) -> tuple[int, ...]:
    """1 / product of (x_i - x_j) over j != i, for each holder x_i: the heart of every Lagrange basis.

    Cached, since on a complete graph all secrets have the same holders.
    """
    points = np.array(holders, np.int64)
    differences = points[:, None] - points[None, :]
    np.fill_diagonal(differences, 1)
    # Three at a time fit 63 bits, which leaves a third of the products to Python.
    groups = np.ones((len(holders), -(-len(holders) // 3) * 3), np.int64)
    groups[:, : len(holders)] = differences
    products = np.multiply.reduce(groups.reshape(len(holders), -1, 3), axis=2)
    denominators = [prod(row) % PRIME for row in products.tolist()]
    # One inversion for all (Montgomery): an inverse costs as much as a hundred products.
    below = list(accumulate(denominators, lambda a, b: a * b % PRIME, initial=1))
    inverse = pow(below[-1], -1, PRIME)
    weights = []
    for denominator, product in zip(reversed(denominators), reversed(below[:-1]), strict=True):
        weights.append(inverse * product % PRIME)
        inverse = inverse * denominator % PRIME
    return tuple(reversed(weights))


def _weighted(shares: Mapping[int, int]) -> tuple[tuple[int, ...], list[int]]:
    holders = tuple(sorted(shares))
    return holders, [w * shares[x] % PRIME for w, x in zip(_weights(holders), holders, strict=True)]


def _value(holders: tuple[int, ...], weighted: list[int], at: int) -> int:
    """The polynomial through all points, evaluated at `at`, which is no holder."""
    whole = prod(at - x for x in holders)
    return sum(z * (whole // (at - x)) for z, x in zip(weighted, holders, strict=True)) % PRIME


def _syndromes(holders: tuple[int, ...], weighted: list[int], threshold: int) -> list[int]:
    """All zero if, and only if, the points lie on one polynomial of degree below `threshold`.

    The vectors w_i x_i^j, j < m - t, span the dual of the Reed-Solomon code that shares form (MacWilliams and
    Sloane 1977, chapter 10.8), so this is the whole check of m shares, at m - t products with a small number
    for each.
    """
    syndromes = []
    terms = weighted
    for power in range(len(holders) - threshold):
        syndromes.append(sum(terms) % PRIME)
        terms = list(map(mul, terms, holders))
        if power % 16 == 15:
            terms = [term % PRIME for term in terms]
    return syndromes


@dataclass(frozen=True)
class _Basis:
    """What all secrets with the same holders have in common.

    Attributes:
        secret: the Lagrange basis at 0.
        check: a random vector of the dual code that `_syndromes` names: every code word is orthogonal to it,
            and any other word with probability 1 / PRIME.
    """

    secret: tuple[int, ...]
    check: tuple[int, ...]


@lru_cache(maxsize=4)
def _basis(holders: tuple[int, ...], threshold: int, salt: bytes) -> _Basis:
    weights = _weights(holders)
    draws = Keystream(salt).read(0, (len(holders) - threshold) * _DRAW_BYTES)
    coefficients = [
        int.from_bytes(draws[i : i + _DRAW_BYTES], "big") % PRIME for i in range(0, len(draws), _DRAW_BYTES)
    ]
    check = []
    for weight, x in zip(weights, holders, strict=True):
        value = 0
        for coefficient in coefficients:
            value = (value * x + coefficient) % PRIME
        check.append(weight * value % PRIME)
    whole = prod(-x for x in holders)
    secret = tuple(weight * (whole // -x) % PRIME for weight, x in zip(weights, holders, strict=True))
    return _Basis(secret, tuple(check))


def _wrong_holders(holders: tuple[int, ...], syndromes: list[int]) -> frozenset[int]:
    """The holders whose shares are off the polynomial, if those are at most half of the spare shares.

    Berlekamp-Massey (Massey 1969): the shortest recurrence of the syndromes is the polynomial whose roots are
    the wrong x. Empty if there is none: more shares are wrong than can be told.
    """
    locator, previous = [1], [1]
    length, shift, discrepancy_before = 0, 1, 1
    for step in range(len(syndromes)):
        discrepancy = sum(c * syndromes[step - i] for i, c in enumerate(locator[: length + 1])) % PRIME
        if discrepancy == 0:
            shift += 1
            continue
        factor = discrepancy * pow(discrepancy_before, -1, PRIME) % PRIME
        update = [0] * shift + [factor * c % PRIME for c in previous]
        corrected = [(a - b) % PRIME for a, b in zip_longest(locator, update, fillvalue=0)]
        if step >= 2 * length:
            length, previous, discrepancy_before, shift = step + 1 - length, locator, discrepancy, 1
        else:
            shift += 1
        locator = corrected
    if 2 * length > len(syndromes):
        return frozenset()
    roots = set()
    for x in holders:
        value = 0
        for coefficient in locator[: length + 1]:  # of x^length first: the locator read backwards
            value = (value * x + coefficient) % PRIME
        if value == 0:
            roots.add(x)
    return frozenset(roots) if len(roots) == length else frozenset()


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Recovers a secret from exactly threshold shares, given as x coordinate -> share.

    Raises:
        UnrecoverableSecret: a share is no field element, or the result is no 256-bit secret.
    """
    return _secret(*_weighted(_elements(shares)))


def _secret(holders: tuple[int, ...], weighted: list[int]) -> bytes:
    value = _value(holders, weighted, 0)
    if value >= 2 ** (8 * SECRET_BYTES):
        raise UnrecoverableSecret("the shares do not belong to one secret")
    return value.to_bytes(SECRET_BYTES, "big")


def recover(
    shares: Mapping[int, bytes],
    threshold: int,
    is_secret: Callable[[bytes], bool],
    *,
    salt: bytes | None = None,
) -> tuple[bytes, frozenset[int]]:
    """Recovers a secret although some of the shares may be wrong, and names those.

    All shares are checked at once. Wrong ones are located as errors of a Reed-Solomon code if they are at
    most half of the shares beyond the threshold; if they are more, subsets are tried, up to a limit.

    Args:
        shares: x coordinate -> share, at least `threshold` of them.
        threshold: shares that recover the secret.
        is_secret: whether a candidate is the secret that its owner committed to.
        salt: 32 bytes that whoever made the shares could not know, where many secrets have the same holders:
            their shares are then checked by one random combination of the checks, at a tenth of the cost.

    Returns:
        The secret, and the x coordinates whose shares do not lie on its polynomial.

    Raises:
        UnrecoverableSecret: too few shares, or too many wrong ones.
    """
    valid = _valid(shares)
    invalid = shares.keys() - valid.keys()
    failure = UnrecoverableSecret(f"{len(shares)} shares at threshold {threshold} do not give the secret")
    if len(valid) < threshold:
        raise failure
    if salt is not None:
        points = tuple(sorted(valid))
        values = [valid[x] for x in points]
        basis = _basis(points, threshold, salt)
        if sum(map(mul, basis.check, values)) % PRIME == 0:
            return _only(sum(map(mul, basis.secret, values)) % PRIME, is_secret, failure), frozenset(invalid)
    holders, weighted = _weighted(valid)
    syndromes = _syndromes(holders, weighted, threshold)
    if not any(syndromes):
        return _only(_value(holders, weighted, 0), is_secret, failure), frozenset(invalid)
    wrong = _wrong_holders(holders, syndromes)
    for chosen in _candidates(valid, wrong, threshold):
        points, terms = _weighted(chosen)
        value = _value(points, terms, 0)
        if value >= 2 ** (8 * SECRET_BYTES) or not is_secret(value.to_bytes(SECRET_BYTES, "big")):
            continue
        off = {x for x, y in valid.items() if x not in chosen and _value(points, terms, x) != y}
        return value.to_bytes(SECRET_BYTES, "big"), frozenset(off | invalid)
    raise failure


def _only(value: int, is_secret: Callable[[bytes], bool], failure: UnrecoverableSecret) -> bytes:
    """The secret where every subset of the shares gives this value: there is nothing else to try."""
    if value >= 2 ** (8 * SECRET_BYTES) or not is_secret(value.to_bytes(SECRET_BYTES, "big")):
        raise failure
    return value.to_bytes(SECRET_BYTES, "big")


def is_decodable(shares: Mapping[int, bytes], threshold: int) -> bool:
    """Whether the shares lie on one polynomial but for those that can be located; no subsets are tried."""
    valid = _valid(shares)
    if len(valid) < threshold:
        return False
    holders, weighted = _weighted(valid)
    syndromes = _syndromes(holders, weighted, threshold)
    return not any(syndromes) or bool(_wrong_holders(holders, syndromes))


def _candidates(valid: Mapping[int, int], wrong: frozenset[int], threshold: int) -> Iterator[dict[int, int]]:
    """Sets of exactly `threshold` shares: first one without those located as wrong, then any."""
    if wrong:
        yield {x: valid[x] for x in sorted(valid.keys() - wrong)[:threshold]}
    for subset in islice(combinations(sorted(valid), threshold), _MAX_SUBSETS):
        yield {x: valid[x] for x in subset}


def _valid(shares: Mapping[int, bytes]) -> dict[int, int]:
    """Those shares that are elements of the field."""
    values = {x: int.from_bytes(share, "big") for x, share in shares.items() if len(share) == SHARE_BYTES}
    return {x: y for x, y in values.items() if y < PRIME}


def _elements(shares: Mapping[int, bytes]) -> dict[int, int]:
    values = _valid(shares)
    if len(values) < len(shares):
        raise UnrecoverableSecret("a share is not an element of the field")
    return values
