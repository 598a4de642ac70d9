"""A connection to the aggregator's API: requests, pages and the stream of events, with typed errors."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from aggregator.web import schemas
from aggregator.web.schemas import PREFIX

TIMEOUT_SECONDS = 60.0
M = TypeVar("M", bound=BaseModel)


class ApiError(Exception):
    """The service refused; its words say what to do.

    Attributes:
        status: of HTTP.
        code: stable, such as `forbidden`; `unknown` when it was not the service that answered.
    """

    def __init__(self, status: int, code: str, detail: str) -> None:
        """Takes what the service said."""
        super().__init__(detail)
        self.status = status
        self.code = code


class Unreachable(Exception):
    """There is no service at that address, or it is not the one that its certificate should name."""


@dataclass(frozen=True)
class Event:
    """Something happened; see `aggregator.web.events`.

    Attributes:
        event_id: give it to `events` to go on after this one.
    """

    event_id: str
    kind: str
    data: Mapping[str, Any]


class Connection:
    """The transport of `aggregator.client.Client`; one thread at a time."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        ca: Path | str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepares the client; nothing is sent yet.

        Args:
            url: of the service, such as `https://aggregator.example:8443`.
            token: as `covey token create` printed it, or an OIDC token.
            ca: who may have signed the service's certificate: a file, or PEM; the system's list by default.
            transport: in place of the network.

        Raises:
            Unreachable: the address or the CA cannot be used, or would send the token unencrypted.
        """
        address = httpx.URL(url)
        near = address.host in ("127.0.0.1", "::1", "localhost")
        if address.scheme not in ("http", "https") or not address.host:
            raise Unreachable(f"{url} is no address of a service: write https://host:8443")
        if address.scheme == "http" and not near and transport is None:
            raise Unreachable(f"{url} would send your token unencrypted: write https://")
        self.url = url
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=TIMEOUT_SECONDS,
            verify=_trust(ca),
            transport=transport,
            trust_env=not near,
        )

    def __enter__(self) -> Self:
        """Begins a block at whose end the connection closes."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self._http.close()

    def events(self, after: str | None = None) -> Iterator[Event]:
        """Events as they happen; ends when the service closes the stream.

        Args:
            after: id of the last event that was seen: those that came since are sent first.
        """
        headers = {} if after is None else {"Last-Event-ID": after}
        try:
            with self._http.stream("GET", f"{PREFIX}/events", headers=headers) as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                yield from _parse(response.iter_lines())
        except httpx.HTTPError as error:
            raise Unreachable(f"the connection to {self.url} ended: {error}") from error

    def _get(self, path: str, model: type[M], /, **query: Any) -> M:
        known = {name: value for name, value in query.items() if value is not None}
        return self._send("GET", path, model, params=known)

    def _pages(self, path: str, page: type[schemas.Page[M]], /, **query: Any) -> Iterator[M]:
        cursor: str | None = None
        while True:
            found = self._get(path, page, cursor=cursor, **query)
            yield from found.items
            cursor = found.next
            if cursor is None:
                return

    def _send(self, method: str, path: str, model: type[M], **arguments: Any) -> M:
        answer = self._call(method, path, **arguments)
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            raise Unreachable(
                f"what answers at {self.url} is no aggregator, or of another version"
            ) from error

    def _call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, PREFIX + path, **arguments)
        except httpx.HTTPError as error:
            raise Unreachable(
                f"no aggregator answers at {self.url}: {error}; see that `covey aggregator run` runs there"
            ) from error
        if response.is_error:
            raise _error(response)
        return response


def _error(response: httpx.Response) -> ApiError:
    try:
        problem = schemas.Problem.model_validate_json(response.content)
    except ValidationError:
        return ApiError(response.status_code, "unknown", f"the answer was {response.status_code}")
    return ApiError(problem.status, problem.code, "; ".join(problem.errors) or problem.detail)


def _parse(lines: Iterator[str]) -> Iterator[Event]:
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            yield Event(fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"]))
            fields = {}


def _trust(ca: Path | str | None) -> ssl.SSLContext | bool:
    if ca is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if isinstance(ca, Path):
            context.load_verify_locations(cafile=ca)
        else:
            context.load_verify_locations(cadata=ca)
    except (OSError, ssl.SSLError) as error:
        raise Unreachable(f"the CA cannot be used ({error}): it is a PEM file, `ca.pem`") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
