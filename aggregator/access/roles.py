"""Roles, and who somebody is once a request is authenticated."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What somebody may do; each role may do what the ones before it may.

    Attributes:
        VIEWER: look.
        OPERATOR: enrol and exclude devices, publish versions, run rounds.
        ADMIN: make and revoke tokens, read the audit log.
    """

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def allows(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        order = tuple(Role)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Principal:
    """Somebody who has been authenticated.

    Attributes:
        name: for the audit log: `token:3f2a91c07d5e laptop`, `oidc:ada@example.org`, `local:root`.
        role: the most that they may do.
        token: public id of the token that they came with; None for people, and for who can read the state.
    """

    name: str
    role: Role
    token: str | None = None
