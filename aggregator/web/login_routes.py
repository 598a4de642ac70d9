"""`/auth/...`: people sign in with a browser."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Cookie, Query, Request
from fastapi.responses import RedirectResponse, Response

from aggregator.web.admission import address_of, same_origin
from aggregator.web.context import Context, context_of
from aggregator.web.oidc import LOGIN_COOKIE, LOGIN_SECONDS, SESSION_COOKIE, SESSION_SECONDS, Oidc
from aggregator.web.problems import ApiProblem

router = APIRouter(prefix="/auth", include_in_schema=False)


@router.get("/login", name="login")
def login(request: Request) -> Response:
    """Sends the browser to the issuer."""
    context, oidc = _oidc(request)
    address, state = oidc.login(_redirect(request), context.operator.clock.moment().unix)
    response = RedirectResponse(address, 303)
    _set(request, response, LOGIN_COOKIE, state, LOGIN_SECONDS)
    return response


@router.get("/callback", name="callback")
def callback(
    request: Request,
    code: Annotated[str, Query(max_length=2048)] = "",
    state: Annotated[str, Query(max_length=200)] = "",
    covey_login: Annotated[str, Cookie()] = "",
) -> Response:
    """Takes what the issuer says, and opens a session."""
    context, oidc = _oidc(request)
    now = context.operator.clock.moment().unix
    session = oidc.callback(_redirect(request), code, state, covey_login, now)
    response = RedirectResponse("/", 303)
    _set(request, response, SESSION_COOKIE, session, SESSION_SECONDS)
    response.delete_cookie(LOGIN_COOKIE)
    return response


@router.post("/logout", name="logout")
def logout(request: Request, covey_session: Annotated[str, Cookie()] = "") -> Response:
    """Ends the session."""
    _, oidc = _oidc(request)
    if not same_origin(request):
        raise ApiProblem("cross-site", "sign out from the console's own page")
    oidc.logout(covey_session)
    response = Response(status_code=204)
    response.delete_cookie(SESSION_COOKIE)
    return response


def _oidc(request: Request) -> tuple[Context, Oidc]:
    context = context_of(request)
    context.limiter.address(address_of(request))
    if context.oidc is None:
        raise ApiProblem("not-found", "this aggregator has no sign-in: set `oidc` in aggregator.json")
    return context, context.oidc


def _redirect(request: Request) -> str:
    return str(request.url_for("callback"))


def _set(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
    # Lax: the redirect from the issuer must bring the cookie; requests that change things check their origin.
    response.set_cookie(
        name, value, max_age=seconds, httponly=True, samesite="lax", secure=request.url.scheme == "https"
    )
