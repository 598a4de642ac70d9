"""`/auth/...`: people sign in with a browser, by a token, a link that works once, or OpenID Connect.

The session's cookie is `SameSite=Strict`: no page of another site makes a browser bring it along. A browser
that another site has sent here would not bring it to the next page either; `_enter` answers it with a page of
this site, which goes on by itself.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Cookie, Form, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from aggregator.access.roles import Principal
from aggregator.access.tokens import InvalidToken
from aggregator.web.admission import address_of, by_token, same_origin
from aggregator.web.context import Context, context_of
from aggregator.web.oidc import LOGIN_COOKIE, LOGIN_SECONDS, Oidc, looks_like_jwt
from aggregator.web.problems import ApiProblem
from aggregator.web.sessions import SESSION_COOKIE, SESSION_SECONDS

router = APIRouter(prefix="/auth", include_in_schema=False)
_ENTER = '<!doctype html><meta http-equiv="refresh" content="0;url=/"><a href="/">Continue</a>'


@router.get("/login", name="login")
def login(request: Request) -> Response:
    """Sends the browser to the issuer."""
    context, oidc = _oidc(request)
    address, state = oidc.login(_redirect(request), context.operator.clock.moment().unix)
    response = RedirectResponse(address, 303)
    # Lax: the redirect from the issuer must bring this cookie.
    _set(request, response, LOGIN_COOKIE, state, LOGIN_SECONDS, "lax")
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
    principal = oidc.callback(_redirect(request), code, state, covey_login, now)
    response = _enter(request, context.sessions.open(principal, now))
    response.delete_cookie(LOGIN_COOKIE)
    return response


@router.post("/token", name="sign-in-by-token")
def by_a_token(request: Request, token: Annotated[str, Form(max_length=4096)]) -> Response:
    """Opens a session for who shows a token."""
    context = _limited(request)
    if not same_origin(request):
        raise ApiProblem("cross-site", "sign in on the console's own page")
    session = context.sessions.open(_holder(request, context, token.strip()), _now(context))
    response = RedirectResponse("/", 303)
    _set(request, response, SESSION_COOKIE, session, SESSION_SECONDS, "strict")
    return response


@router.get("/link", name="sign-in-by-link")
def by_a_link(request: Request, code: Annotated[str, Query(max_length=200)] = "") -> Response:
    """Opens a session for who has a link of `covey console`."""
    context = _limited(request)
    try:
        session = context.sessions.redeem(code, _now(context))
    except InvalidToken:
        context.limiter.failure(address_of(request))
        raise
    return _enter(request, session)


@router.post("/logout", name="logout")
def logout(request: Request, covey_session: Annotated[str, Cookie()] = "") -> Response:
    """Ends the session."""
    context = _limited(request)
    if not same_origin(request):
        raise ApiProblem("cross-site", "sign out on the console's own page")
    context.sessions.close(covey_session)
    response = RedirectResponse("/sign-in", 303)
    response.delete_cookie(SESSION_COOKIE)
    return response


def _limited(request: Request) -> Context:
    context = context_of(request)
    context.limiter.address(address_of(request))
    return context


def _oidc(request: Request) -> tuple[Context, Oidc]:
    context = _limited(request)
    if context.oidc is None:
        raise ApiProblem("not-found", "people sign in with a token here: `oidc` is not in aggregator.json")
    return context, context.oidc


def _holder(request: Request, context: Context, token: str) -> Principal:
    try:
        if looks_like_jwt(token):
            # A session would outlive it.
            raise InvalidToken("this is a token of the issuer: sign in at the issuer")
        return by_token(token, context)
    except InvalidToken:
        context.limiter.failure(address_of(request))
        raise


def _now(context: Context) -> float:
    return context.operator.clock.moment().unix


def _redirect(request: Request) -> str:
    return str(request.url_for("callback"))


def _enter(request: Request, session: str) -> Response:
    response = HTMLResponse(_ENTER, headers={"Cache-Control": "no-store"})
    _set(request, response, SESSION_COOKIE, session, SESSION_SECONDS, "strict")
    return response


def _set(
    request: Request,
    response: Response,
    name: str,
    value: str,
    seconds: int,
    site: Literal["lax", "strict"],
) -> None:
    secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=seconds, httponly=True, samesite=site, secure=secure)
