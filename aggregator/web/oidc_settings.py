"""How people sign in, as the settings say it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from aggregator.access.roles import Role


class OidcSettings(BaseModel):
    """How people sign in; `oidc` in `aggregator.json`.

    Attributes:
        issuer: URL of the provider, as its tokens say it.
        client_id: what the provider calls this service.
        client_secret_file: holds the client's secret; None for a public client.
        audiences: of tokens that are taken as bearers, besides `client_id`.
        role_claim: the claim that says what somebody is: a string, or a list of them.
        roles: value of that claim -> role; the highest counts, and nobody gets in without one.
        name_claim: what the audit log calls them.
        scopes: that are asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str
    client_id: str
    client_secret_file: Path | None = None
    audiences: tuple[str, ...] = ()
    role_claim: str = "groups"
    roles: Mapping[str, Role] = Field(min_length=1)
    name_claim: str = "email"
    scopes: str = "openid email profile"
