"""Who this device is and whom it trusts: what enrolment and its owner decided, fixed while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_client.policy import DevicePolicy
from protocol.enrolment import EnrolmentBundle
from protocol.secagg.certificates import CertificateCache


@dataclass(frozen=True)
class Profile:
    """An enrolled device.

    Attributes:
        device_id: its name in the fleet, which is in its certificate.
        certificate: its certificate, DER.
        ca: the fleet CA's certificate, DER.
        identity: its private key, which never leaves it.
        plan_signers: public keys that may sign plans, by key id.
        model_signers: public keys that may sign model manifests, by key id.
        policy: what it agrees to.
        models: names of the models that it follows; every one when None.
        certificates: of other devices, as verified in earlier rounds.
    """

    device_id: str
    fleet: str
    certificate: bytes
    ca: bytes
    identity: Ed25519PrivateKey = field(repr=False)
    plan_signers: Mapping[str, Ed25519PublicKey]
    model_signers: Mapping[str, Ed25519PublicKey]
    policy: DevicePolicy
    models: frozenset[str] | None = None
    certificates: CertificateCache = field(default_factory=CertificateCache, repr=False, compare=False)

    @classmethod
    def enrolled(
        cls,
        bundle: EnrolmentBundle,
        identity: Ed25519PrivateKey,
        *,
        policy: DevicePolicy | None = None,
        models: frozenset[str] | None = None,
    ) -> Profile:
        """The profile that an enrolment bundle, verified before, gives to the owner of `identity`."""
        return cls(
            device_id=bundle.device_id,
            fleet=bundle.fleet,
            certificate=bundle.certificate,
            ca=bundle.ca,
            identity=identity,
            plan_signers=bundle.plan_keys(),
            model_signers=bundle.model_keys(),
            policy=policy or DevicePolicy(),
            models=models,
        )

    def follows(self, model: str) -> bool:
        """Whether this device takes part in this model at all."""
        return self.models is None or model in self.models
