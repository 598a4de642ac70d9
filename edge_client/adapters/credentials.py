"""The device's identity and its place in a fleet, as files of the state directory.

identity.pem      the private key; it never leaves the device
device.csr        the request that the operator signs (PKCS#10, DER)
enrolment.json    the bundle that the operator gave back; the next two are cut from it for TLS
certificate.pem   this device's certificate
ca.pem            the fleet CA's
policy.json       the owner's rules, if they differ from the defaults
edge.toml         what else the owner sets, such as where examples come from
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import TypeAdapter, ValidationError

from edge_client.adapters.files import private_directory, storage_errors, write_durably
from edge_client.adapters.tls import TlsFiles
from edge_client.configuration import EdgeConfiguration, InvalidConfiguration
from edge_client.policy import DevicePolicy
from protocol.enrolment import EnrolmentBundle
from protocol.errors import BadSignature
from protocol.fields import Slug
from protocol.identity import create_request, key_id, open_request

KEY, REQUEST, ENROLMENT = "identity.pem", "device.csr", "enrolment.json"
CERTIFICATE, CA, POLICY = "certificate.pem", "ca.pem", "policy.json"
CONFIGURATION = "edge.toml"
_SLUG: TypeAdapter[str] = TypeAdapter(Slug)


class CredentialError(Exception):
    """The device is not set up, or cannot be set up like this; the message says what to do."""


@dataclass(frozen=True)
class Credentials:
    """An enrolled device's key and bundle."""

    identity: Ed25519PrivateKey = field(repr=False)
    bundle: EnrolmentBundle


def create_identity(directory: Path, device_id: str) -> bytes:
    """Makes the device's key, once, and its signing request; calling it again gives the same key.

    Returns:
        The request, DER.

    Raises:
        CredentialError: the name is not possible, or the device is enrolled under another one.
        StorageError: the directory cannot be written.
    """
    try:
        _SLUG.validate_python(device_id)
    except ValidationError as error:
        raise CredentialError(
            f"{device_id!r} is no device id: use 1 to 63 lower-case letters, digits and hyphens"
        ) from error
    private_directory(directory)
    if (directory / ENROLMENT).exists():
        enrolled = _bundle(directory).device_id
        if enrolled != device_id:
            raise CredentialError(
                f"{directory} belongs to the enrolled device {enrolled}: choose another state directory"
            )
    if (directory / KEY).exists():
        key = load_private_key(directory / KEY)
    else:
        key = Ed25519PrivateKey.generate()
        write_durably(directory / KEY, [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())])
    request = create_request(key, device_id)
    write_durably(directory / REQUEST, [request])
    return request


def save_enrolment(directory: Path, bundle: EnrolmentBundle, *, now: int) -> None:
    """Takes a bundle over, after checking that it is consistent and for this device's key.

    The ledger and the used round ids stay: enrolling anew forgets nothing.

    Raises:
        CredentialError: it is not for this device, or does not verify.
        StorageError: the directory cannot be written.
    """
    key = load_private_key(directory / KEY)
    try:
        certificate = bundle.verify(now=now)
        bundle.plan_keys(), bundle.model_keys()
        wanted, _ = open_request((directory / REQUEST).read_bytes())
    except (BadSignature, ValueError, OSError) as error:
        raise CredentialError(f"the bundle cannot be used: {error}") from error
    if key_id(certificate.public_key) != key_id(key.public_key()):
        raise CredentialError(
            f"the bundle is for another key: have {directory / REQUEST} signed and enrol with that bundle"
        )
    if wanted != bundle.device_id:
        raise CredentialError(
            f"the bundle is for {bundle.device_id}, this device was initialised as {wanted}: "
            f"run `covey-edge init --state {directory} --device-id {bundle.device_id}` first"
        )
    for name, der in ((CA, bundle.ca), (CERTIFICATE, bundle.certificate)):
        write_durably(directory / name, [ssl.DER_cert_to_PEM_cert(der).encode()])
    # Last: with it the device counts as enrolled.
    write_durably(directory / ENROLMENT, [bundle.to_bytes()])


def load_credentials(directory: Path) -> Credentials:
    """Reads what `create_identity` and `save_enrolment` wrote.

    Raises:
        CredentialError: the device is not initialised or not enrolled.
    """
    return Credentials(load_private_key(directory / KEY), _bundle(directory))


def tls_files(directory: Path) -> TlsFiles:
    """The files that open this device's TLS session."""
    return TlsFiles(directory / CA, directory / CERTIFICATE, directory / KEY)


def load_policy(path: Path) -> DevicePolicy:
    """Reads the owner's policy; the default one when there is no such file.

    Raises:
        InvalidPolicy: the file is no policy.
        StorageError: it cannot be read.
    """
    if not path.exists():
        return DevicePolicy()
    with storage_errors(f"reading {path}"):
        return DevicePolicy.from_bytes(path.read_bytes())


def load_configuration(path: Path) -> EdgeConfiguration:
    """Reads the owner's `edge.toml`; everything has its default when there is no such file.

    Raises:
        InvalidConfiguration: the file holds something that it must not.
        StorageError: it cannot be read.
    """
    if not path.exists():
        return EdgeConfiguration()
    with storage_errors(f"reading {path}"):
        data = path.read_bytes()
    try:
        return EdgeConfiguration.from_bytes(data)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"{path}: {error}") from error


def save_policy(path: Path, policy: DevicePolicy) -> None:
    """Writes the owner's policy.

    Raises:
        StorageError: it cannot be written.
    """
    write_durably(path, [policy.to_bytes()])


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Reads a key that this device made.

    Raises:
        CredentialError: it is missing, or cannot be used.
    """
    directory = path.parent
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise CredentialError(
            f"{directory} holds no device: ask the fleet's operator for a ticket, then run "
            f"`covey-edge enroll --state {directory} --ticket FILE`"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CredentialError(f"{path} cannot be read: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CredentialError(f"{path} holds no Ed25519 key")
    return key


def _bundle(directory: Path) -> EnrolmentBundle:
    path = directory / ENROLMENT
    try:
        return EnrolmentBundle.from_bytes(path.read_bytes())
    except FileNotFoundError as error:
        raise CredentialError(
            f"{directory} is not enrolled: ask the fleet's operator for a ticket, then run "
            f"`covey-edge enroll --state {directory} --ticket FILE`"
        ) from error
    except OSError as error:
        raise CredentialError(f"{path} cannot be read: {error}") from error
