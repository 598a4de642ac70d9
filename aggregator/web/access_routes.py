"""`/tokens`, `/audit` and `/whoami`: who may do what, and who did."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

from fastapi import Path, Query, Request, Response

from aggregator.access.roles import Role
from aggregator.web import schemas
from aggregator.web.admission import By, guarded
from aggregator.web.context import context_of
from aggregator.web.sessions import LINK_SECONDS

looking = guarded(Role.VIEWER, tag="access")
managing = guarded(Role.ADMIN, tag="access")

TokenId = Annotated[str, Path(pattern=r"^[0-9a-f]{12}$", description="The middle part of a token.")]


@looking.get("/whoami", name="show-me")
def show_me(by: By) -> schemas.Whoami:
    """Who the service takes you for."""
    return schemas.Whoami(
        name=by.principal.name,
        role=by.principal.role,
        fleet=by.operator.authority.fleet,
        covey=version("covey"),
    )


@looking.post("/sign-in-links", name="make-sign-in-link", status_code=201)
def make_sign_in_link(by: By, request: Request, response: Response) -> schemas.SignInLink:
    """Makes a link that signs a browser in as you: once, within ten minutes."""
    context = context_of(request)
    now = context.operator.clock.moment().unix
    code = context.sessions.make_link(by.principal, now)
    response.headers["Cache-Control"] = "no-store"
    return schemas.SignInLink(path=f"/auth/link?code={code}", expires_at=now + LINK_SECONDS)


@managing.get("/tokens", name="list-tokens")
def list_tokens(by: By) -> schemas.Page[schemas.Token]:
    """Every token ever made, oldest first, without its secret."""
    return schemas.Page(items=tuple(schemas.Token.of(token) for token in by.operator.tokens()))


@managing.post("/tokens", name="create-token", status_code=201)
def create_token(by: By, body: schemas.TokenRequest, response: Response) -> schemas.NewToken:
    """Makes a token. Its secret is in this answer and nowhere else."""
    secret, record = by.to(f"{body.role} {body.label}".rstrip()).create_token(
        role=body.role, label=body.label, seconds=body.seconds, created_by=by.principal.name
    )
    response.headers["Cache-Control"] = "no-store"
    return schemas.NewToken(**dict(schemas.Token.of(record)), secret=secret)


@managing.delete("/tokens/{token}", name="revoke-token", status_code=204)
def revoke_token(by: By, token: TokenId) -> Response:
    """Revokes a token, from the next request on."""
    by.operator.revoke_token(token)
    return Response(status_code=204)


@managing.get("/audit", name="show-audit-log")
def show_audit_log(
    by: By,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63, description="From a page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> schemas.Page[schemas.AuditEntry]:
    """What was done, and what was refused; newest first."""
    found = by.operator.audit_log(before=cursor, limit=limit + 1)
    items = tuple(schemas.AuditEntry.of(entry) for entry in found[:limit])
    return schemas.Page(items=items, next=str(items[-1].number) if len(found) > limit else None)
