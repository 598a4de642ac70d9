"""The fleet's keys on disk: owner-only, written once, never printed."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from aggregator.fleet.authority import Authority
from aggregator.private_file import write_private

_CA_KEY = "ca-key.pem"
_OPERATOR_KEY = "operator-key.pem"
_CA = "ca.der"


class UnusableKeys(Exception):
    """Key files that are missing, damaged or readable by others; the message says what to do."""


def save(authority: Authority, directory: Path) -> None:
    """Writes new key files, readable by their owner only.

    Raises:
        FileExistsError: there are keys already; nothing was changed.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    if authority.ca_key is not None:
        write_private(directory / _CA_KEY, _pem(authority.ca_key))
    write_private(directory / _OPERATOR_KEY, _pem(authority.operator_key))
    write_private(directory / _CA, authority.ca)


def load(directory: Path, ca_key: Path | None = None) -> Authority:
    """Reads the key files. The CA's key may be missing: it is needed to enrol devices, and for nothing else.

    Args:
        directory: `STATE/keys`.
        ca_key: the CA's key, when it is somewhere else.

    Raises:
        UnusableKeys: they are missing, damaged, or others may read them.
    """
    operator_key = _read(directory / _OPERATOR_KEY)
    if operator_key is None:
        raise UnusableKeys(f"there is no {directory / _OPERATOR_KEY}: run `covey aggregator init`")
    try:
        ca = (directory / _CA).read_bytes()
    except OSError as error:
        raise UnusableKeys(f"{directory / _CA} cannot be read: restore it from a backup") from error
    return Authority(ca, ca_key=_read(ca_key or directory / _CA_KEY), operator_key=operator_key)


def private_key(path: Path) -> Ed25519PrivateKey:
    """Reads an Ed25519 key from a PEM file of the user's own.

    Raises:
        UnusableKeys: it is missing, damaged, or others may read it.
    """
    key = _read(path)
    if key is None:
        raise UnusableKeys(f"there is no {path}")
    return key


def _read(path: Path) -> Ed25519PrivateKey | None:
    """A private key, or None when there is no such file."""
    try:
        if path.stat().st_mode & 0o077:
            raise UnusableKeys(f"{path} can be read by others: run `chmod 600 {path}`")
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UnusableKeys(f"{path} is no usable key: restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UnusableKeys(f"{path} is no Ed25519 key: restore it from a backup")
    return key


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
