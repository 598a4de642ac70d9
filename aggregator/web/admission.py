"""Who is let in: credentials, rate and role are checked before a byte of the body is read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from aggregator.access.audit import AuditedRepository
from aggregator.access.roles import Principal, Role
from aggregator.access.tokens import InvalidToken, check, check_record, token_id
from aggregator.operations import Operator
from aggregator.records import AuditEntry
from aggregator.web.context import Context, context_of
from aggregator.web.local import PREFIX as LOCAL_PREFIX
from aggregator.web.oidc import looks_like_jwt
from aggregator.web.problems import ApiProblem, documented
from aggregator.web.sessions import SESSION_COOKIE

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_bearer = HTTPBearer(auto_error=False, description="A token of `covey token create`, or of the OIDC issuer.")
_ALWAYS = (
    "unauthenticated",
    "forbidden",
    "not-found",
    "too-large",
    "invalid-request",
    "rate-limited",
    "unavailable",
)


@dataclass(frozen=True)
class Admitted:
    """Somebody who may do what they ask for.

    Attributes:
        operator: the operations, in their name.
    """

    principal: Principal
    operator: Operator

    def to(self, target: str) -> Operator:
        """The operations; the audit log says that what follows was done to this."""
        audited = self.operator.repository
        if isinstance(audited, AuditedRepository):
            audited.entry = replace(audited.entry, target=target[:200])
        return self.operator


def guarded(role: Role, *, tag: str) -> APIRouter:
    """A router whose routes ask for a role; each route's name is the action in the audit log."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            inner, action = super().get_route_handler(), self.name
            known = {field.alias for field in self.dependant.query_params}

            async def handle(request: Request) -> Response:
                request.state.admitted = await run_in_threadpool(_admit, request, role, action)
                given = [name for name, _ in request.query_params.multi_items()]
                if len(given) > len(known.intersection(given)):
                    # A filter with a typing error would show too much.
                    names = ", ".join(sorted(known)) or "none"
                    raise ApiProblem("invalid-request", f"query: takes, each once: {names}")
                return await inner(request)

            return handle

    return APIRouter(
        route_class=Route, tags=[tag], dependencies=[Security(_bearer)], responses=documented(*_ALWAYS)
    )


async def _admitted(request: Request) -> Admitted:
    admitted = request.state.admitted
    assert isinstance(admitted, Admitted)  # noqa: S101 (set by the route, above)
    return admitted


By = Annotated[Admitted, Depends(_admitted)]
"""Parameter of a handler on a guarded router."""


def _admit(request: Request, role: Role, action: str) -> Admitted:
    context = context_of(request)
    address = address_of(request)
    context.limiter.address(address)
    try:
        principal = authenticate(request, context)
    except InvalidToken:
        if "authorization" in request.headers or SESSION_COOKIE in request.cookies:
            # Who shows nothing guesses nothing: browsers come that way before they sign in.
            context.limiter.failure(address)
        raise
    context.limiter.principal(principal.name)
    if request.method in _SAFE and principal.role.allows(role):
        return Admitted(principal, context.operator)
    entry = AuditEntry(
        at=context.operator.clock.moment().unix,
        who=principal.name,
        role=principal.role,
        address=address,
        action=action,
        target=" ".join(str(value)[:80] for value in request.path_params.values()),
    )
    audited = AuditedRepository(context.operator.repository, entry, context.operator.clock)
    # Whatever refuses the request from here on leaves a trace; see `problems`.
    request.state.audited = audited
    if not principal.role.allows(role):
        raise ApiProblem("forbidden", f"{action} needs the role {role}, yours is {principal.role}")
    return Admitted(principal, replace(context.operator, repository=audited))


def authenticate(request: Request, context: Context) -> Principal:
    """Who sends this request.

    Raises:
        InvalidToken: nobody that is known.
        ApiProblem: a browser was made to send it by another site.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if not scheme:
        return _by_session(request, context)
    if scheme.lower() != "bearer":
        raise InvalidToken("only bearer tokens are taken: `Authorization: Bearer covey_...`")
    return by_token(token, context)


def by_token(token: str, context: Context) -> Principal:
    """Whose token this is.

    Raises:
        InvalidToken: nobody's.
    """
    if token.startswith(LOCAL_PREFIX):
        principal = None if context.local is None else context.local.open(token)
        if principal is None:
            raise InvalidToken("this token is of a service that has stopped: run the command again")
        return principal
    if context.oidc is not None and looks_like_jwt(token):
        return context.oidc.bearer(token, context.operator.clock.moment().unix)
    public = token_id(token)
    with context.operator.repository.read() as reader:
        record = reader.token(public)
    role = check(token, record, context.operator.clock.moment().unix)
    label = "" if record is None else record.label
    return Principal(f"token:{public} {label}".rstrip(), role, public)


def _by_session(request: Request, context: Context) -> Principal:
    cookie = request.cookies.get(SESSION_COOKIE)
    if cookie is None:
        raise InvalidToken("say who you are: `Authorization: Bearer covey_...` (see `covey token create`)")
    now = context.operator.clock.moment().unix
    principal = context.sessions.find(cookie, now)
    if principal.token is not None:
        # A session is worth no more than the token that opened it.
        with context.operator.repository.read() as reader:
            check_record(reader.token(principal.token), now)
    if request.method not in _SAFE and not same_origin(request):
        # A cookie goes along with whatever a page of another site sends; such a page cannot set this header.
        raise ApiProblem("cross-site", "a browser's request must come from the console's own pages")
    return principal


def same_origin(request: Request) -> bool:
    """Whether a browser sent this from a page of this very service (Fetch Metadata, else Origin)."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc == request.headers.get("host")


def address_of(request: Request) -> str:
    """Where a request comes from; `local` when it never left the process."""
    return "local" if request.client is None else request.client.host
