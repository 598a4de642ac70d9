"""Tokens: which there are, a new one whose secret shows once, and one that opens nothing any more."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from aggregator.access.roles import Role
from aggregator.web import schemas
from aggregator.web.access_routes import TokenId
from aggregator.web.admission import By, guarded
from aggregator.web.console.asking import Field, Turn, ask, ask_turn
from aggregator.web.console.rendering import page
from aggregator.web.problems import ApiProblem

managing = guarded(Role.ADMIN, tag="console")

DAY = 86_400
_REVOKE = Turn(
    "Revoke",
    "From the next request on it opens nothing, and browsers that signed in by it are signed out. "
    "Nothing brings it back: make another.",
    danger=True,
)


@managing.get("/tokens", name="show-tokens", response_class=HTMLResponse)
def tokens(by: By, request: Request) -> Response:
    """Every token ever made, newest first."""
    return page(request, "tokens.html", by, tokens=by.operator.tokens()[::-1])


@managing.get("/tokens/new", name="ask-create-token", response_class=HTMLResponse)
def ask_create(by: By, request: Request) -> Response:
    """Asks what a new token is for."""
    return ask(
        request,
        by,
        "Make a token",
        "A viewer looks. An operator also enrols devices, publishes versions and runs rounds. An admin also "
        "makes tokens and reads the audit log. Whoever has the token may do this until it expires.",
        action="/tokens",
        fields=(
            Field("role", "Role", Role.VIEWER, choices=tuple(Role)),
            Field("days", "Days until it expires", "30", kind="number", most=str(schemas.MAX_TOKEN_DAYS)),
            Field("label", "What to call it", note="Who or what is going to use it."),
        ),
        button="Make",
        back="/tokens",
    )


@managing.post("/tokens", name="create-token", response_class=HTMLResponse)
def create(
    by: By,
    request: Request,
    role: Annotated[Role, Form()],
    days: Annotated[int, Form(ge=1, le=schemas.MAX_TOKEN_DAYS)],
    label: Annotated[str, Form(max_length=63, pattern=schemas.PRINTABLE)] = "",
) -> Response:
    """Makes a token. Its secret is on this page and nowhere else."""
    label = label.strip()
    secret, token = by.to(f"{role} {label}".rstrip()).create_token(
        role=role, label=label, seconds=days * DAY, created_by=by.principal.name
    )
    return page(request, "token.html", by, token=token, secret=secret)


@managing.get("/tokens/{token}/revoke", name="ask-revoke-token", response_class=HTMLResponse)
def ask_revoke(by: By, request: Request, token: TokenId) -> Response:
    """Asks before a token is revoked."""
    found = next((each for each in by.operator.tokens() if each.token_id == token), None)
    if found is None:
        raise ApiProblem("not-found", f"there is no token {token}: see `covey token list`")
    mine = "You are signed in by it: this ends your session." if token == by.principal.token else ""
    return ask_turn(request, by, _REVOKE, f"{token} {found.label}".rstrip(), "/tokens", mine)


@managing.post("/tokens/{token}/revoke", name="revoke-token")
def revoke(by: By, token: TokenId) -> Response:
    """Revokes a token, from the next request on."""
    by.operator.revoke_token(token)
    return RedirectResponse("/tokens", 303)
