"""`/enrolment-tokens`: tickets for devices. `/enrolments`: where a device comes in that has one."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from aggregator.access.audit import AuditedRepository
from aggregator.access.roles import Role
from aggregator.fleet.authority import CaOffline, EnrolmentRefused, NameTaken
from aggregator.fleet.enrolment import TokenRefused, token_id_of
from aggregator.records import AuditEntry
from aggregator.refusals import NoSuch
from aggregator.web import schemas
from aggregator.web.admission import By, address_of, guarded
from aggregator.web.context import context_of
from aggregator.web.enrolment_schemas import EnrolmentToken, EnrolmentTokenRequest, NewEnrolmentToken
from aggregator.web.problems import ApiProblem, documented
from protocol.enrolment import ENROLMENTS_PATH, TRUST_PATH, EnrolmentAnswer, EnrolmentRequest
from protocol.errors import MalformedMessage

acting = guarded(Role.OPERATOR, tag="fleet")
TokenId = Annotated[str, Path(pattern=r"^[0-9a-f]{12}$", description="The first part of a token.")]


class _Limited(APIRoute):
    """A route for those who are nobody yet: their address is counted before a byte of the body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            limiter, address = context_of(request).limiter, address_of(request)
            limiter.address(address)
            limiter.enrolment(address)
            return await inner(request)

        return handle


anybody = APIRouter(
    route_class=_Limited, tags=["enrolment"], responses=documented("not-found", "rate-limited", "unavailable")
)


# --- tickets


@acting.post(
    "/enrolment-tokens", name="make-enrolment-tokens", status_code=201, responses=documented("refused")
)
def make_enrolment_tokens(
    by: By, body: EnrolmentTokenRequest, response: Response
) -> schemas.Page[NewEnrolmentToken]:
    """Makes tickets, each of which lets one device in. They are in this answer and nowhere else."""
    made = by.to(f"{body.amount} of {body.name}").make_tickets(
        amount=body.amount,
        name=body.name,
        first=body.first,
        labels=body.labels,
        seconds=body.seconds,
        replaces=body.replaces,
        url=body.url,
        created_by=by.principal.name,
    )
    response.headers["Cache-Control"] = "no-store"
    now = by.operator.clock.moment().unix
    return schemas.Page(items=tuple(NewEnrolmentToken.made(new, now) for new in made))


@acting.get("/enrolment-tokens", name="list-enrolment-tokens")
def list_enrolment_tokens(by: By) -> schemas.Page[EnrolmentToken]:
    """Every enrolment token ever made, oldest first, without what opens it."""
    now = by.operator.clock.moment().unix
    return schemas.Page(items=tuple(EnrolmentToken.of(t, now) for t in by.operator.enrolment_tokens()))


@acting.delete("/enrolment-tokens/{token}", name="revoke-enrolment-token")
def revoke_enrolment_token(by: By, token: TokenId) -> EnrolmentToken:
    """Revokes a ticket; a device that came in by it stays."""
    return EnrolmentToken.of(by.operator.revoke_enrolment_token(token), by.operator.clock.moment().unix)


# --- devices come in


@anybody.get(
    TRUST_PATH.removeprefix(schemas.PREFIX),
    name="show-trust",
    response_class=Response,
    responses={200: {"content": {"application/pkix-cert": {}}, "description": "X.509, DER"}},
)
def show_trust(request: Request) -> Response:
    """The certificate by which this service's own is checked. A ticket holds its digest: compare."""
    trust = context_of(request).operator.doorway.trust
    if trust is None:
        raise NoSuch("this service takes no tickets: see `api_ca` of its settings")
    return Response(trust, media_type="application/pkix-cert")


@anybody.post(
    ENROLMENTS_PATH.removeprefix(schemas.PREFIX),
    name="enrol-by-ticket",
    status_code=201,
    response_model=EnrolmentAnswer,
    response_model_exclude_none=True,
    responses=documented(
        "token-unknown", "token-used", "token-expired", "too-large", "enrolment-refused", "enrolment-closed"
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": EnrolmentRequest.model_json_schema()}},
        }
    },
)
async def enrol_by_ticket(request: Request, response: Response) -> EnrolmentAnswer:
    """Lets a device in that shows a ticket's token, once; the same key gets the same answer again."""
    try:
        wanted = EnrolmentRequest.from_bytes(await request.body())
    except MalformedMessage as error:
        raise ApiProblem("invalid-request", str(error)) from error
    response.headers["Cache-Control"] = "no-store"
    return await run_in_threadpool(_enrol, request, wanted)


def _enrol(request: Request, wanted: EnrolmentRequest) -> EnrolmentAnswer:
    context = context_of(request)
    token_id, address = token_id_of(wanted.token), address_of(request)
    with context.operator.repository.read() as reader:
        record = reader.enrolment_token(token_id)
    now = context.operator.clock.moment().unix
    entry = AuditEntry(
        at=now,
        who=f"ticket:{token_id}",
        role="device",
        address=address,
        action="enrol-by-ticket",
        target="" if record is None else record.name,
    )
    audited = AuditedRepository(context.operator.repository, entry, context.operator.clock)
    operator = replace(context.operator, repository=audited)
    try:
        # The CA's key is read for this one certificate: what faces the network keeps none.
        bundle = operator.enrol_by_ticket(wanted, context.enrolling)
    except CaOffline:
        raise
    except (TokenRefused, EnrolmentRefused) as error:
        context.limiter.failure(address)
        if isinstance(error, NameTaken) or (
            isinstance(error, TokenRefused) and error.code != "token-unknown"
        ):
            # They had a ticket. Whoever is nobody leaves no trace: they could fill the disk with them.
            request.state.audited = audited
        raise
    return EnrolmentAnswer(bundle=bundle, time=int(now))
