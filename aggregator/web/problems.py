"""Errors as RFC 9457 problems: what the core refuses, with a stable code and what to do next."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from aggregator.access.tokens import InvalidToken
from aggregator.fleet.authority import CaOffline, EnrolmentRefused
from aggregator.fleet.enrolment import TokenRefused
from aggregator.operations import NoSuch, OperationRefused
from aggregator.registry.artefacts import MissingArtefact
from aggregator.registry.publishing import PublishRefused, UnknownSigner
from aggregator.repository import Conflict, NotFound, RepositoryError, StorageUnavailable
from aggregator.web.schemas import Problem
from protocol.dp.errors import PrivacyError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

TITLES = {
    "unauthenticated": (401, "who are you?"),
    "forbidden": (403, "your role may not do this"),
    "cross-site": (403, "this request came from another site"),
    "unknown-signer": (403, "signed by a key that this fleet does not know"),
    "token-unknown": (403, "no ticket of this fleet"),
    "not-found": (404, "no such thing"),
    "method-not-allowed": (405, "this cannot be done to it"),
    "refused": (409, "not now, or not like this"),
    "conflict": (409, "it is there already"),
    "token-used": (409, "the ticket let another device in"),
    "token-expired": (410, "the ticket has expired"),
    "token-revoked": (410, "the ticket was revoked"),
    "too-large": (413, "the request is too large"),
    "invalid-request": (422, "the request is not valid"),
    "enrolment-refused": (422, "the device is not enrolled"),
    "publish-refused": (422, "the model is not published"),
    "rate-limited": (429, "too many requests"),
    "internal": (500, "the service stumbled"),
    "unavailable": (503, "the service cannot do this now"),
    "enrolment-closed": (503, "nobody is enrolled now"),
}
"""Code -> (status, title). A code never changes its meaning."""

_OF_CORE: Sequence[tuple[type[Exception], str]] = (
    (InvalidToken, "unauthenticated"),
    (NoSuch, "not-found"),
    (OperationRefused, "refused"),
    (PrivacyError, "refused"),
    (CaOffline, "enrolment-closed"),
    (EnrolmentRefused, "enrolment-refused"),
    (UnknownSigner, "unknown-signer"),
    (PublishRefused, "publish-refused"),
    (NotFound, "not-found"),
    (Conflict, "conflict"),
    (StorageUnavailable, "unavailable"),
    (RepositoryError, "unavailable"),
    (MissingArtefact, "unavailable"),
)
"""The first that fits."""


class ApiProblem(Exception):
    """Something that only the API refuses."""

    def __init__(self, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        """Takes a code of `TITLES` and what to do next."""
        super().__init__(detail)
        self.code = code
        self.headers = dict(headers or {})


def respond(
    code: str, detail: str, *, headers: Mapping[str, str] | None = None, errors: Sequence[str] = ()
) -> JSONResponse:
    """The response for a code."""
    status, title = TITLES[code]
    problem = Problem(
        type=f"urn:covey:problem:{code}",
        title=title,
        status=status,
        detail=detail,
        code=code,
        errors=tuple(errors),
    )
    extra = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "5"} if status == 503 else {}
    return JSONResponse(
        problem.model_dump(mode="json"), status, headers={**extra, **(headers or {})}, media_type=MEDIA_TYPE
    )


def record_refusal(request: Request, code: str) -> None:
    """Writes into the audit log that what this request asked for was refused."""
    audited = getattr(request.state, "audited", None)
    if audited is not None:
        # The refusal stands whether or not it can be recorded.
        with contextlib.suppress(RepositoryError):
            audited.refused(code)


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The problems of these codes for the OpenAPI document."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        status, title = TITLES[code]
        content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        found[status] = {"description": title, "content": content}
    return found


def install(app: FastAPI) -> None:
    """Makes every error of the application a problem."""
    for kind, code in _OF_CORE:
        app.add_exception_handler(kind, _handler(code))
    app.exception_handler(ApiProblem)(_api_problem)
    app.exception_handler(TokenRefused)(_token_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)
    app.exception_handler(Exception)(_defect)


def _handler(code: str) -> Any:
    def handle(request: Request, error: Exception) -> Response:
        return _refuse(request, code, str(error))

    return handle


def _refuse(
    request: Request,
    code: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
    errors: Sequence[str] = (),
) -> Response:
    record_refusal(request, code)
    return respond(code, detail, headers=headers, errors=errors)


def _api_problem(request: Request, error: ApiProblem) -> Response:
    return _refuse(request, error.code, str(error), error.headers)


def _token_refused(request: Request, error: TokenRefused) -> Response:
    return _refuse(request, error.code, str(error))


def _invalid(request: Request, error: RequestValidationError) -> Response:
    # Where and why, never what: a value may be a secret, or somebody's markup.
    errors = [f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()[:20]]
    return _refuse(
        request, "invalid-request", errors[0] if errors else "see the documentation", errors=errors
    )


def _http(request: Request, error: HTTPException) -> Response:
    codes = {
        404: "not-found",
        405: "method-not-allowed",
        401: "unauthenticated",
        403: "forbidden",
        413: "too-large",
    }
    details = {404: "there is no such address: see /api/v1/openapi.json"}
    code = codes.get(error.status_code, "invalid-request" if error.status_code < 500 else "internal")
    return _refuse(request, code, details.get(error.status_code, str(error.detail)), error.headers)


def _defect(request: Request, error: Exception) -> Response:
    logger.error("a request to %s failed", request.url.path, exc_info=error)
    return _refuse(request, "internal", "this is a defect: the service's log has the details")
