"""One aggregator's API in this process, for tests: real repository and keys, time by hand, no network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI

from aggregator.access.roles import Role
from aggregator.adapters import keyfiles
from aggregator.adapters.objects import DirectoryStore
from aggregator.client import Client
from aggregator.fleet.authority import Authority
from aggregator.fleet.enrolment import Doorway
from aggregator.operations import Operator
from aggregator.web.api import create_app
from aggregator.web.context import Context
from aggregator.web.events import EventFeed
from aggregator.web.in_process import URL, InProcess
from aggregator.web.observed import ObservedRepository
from protocol.identity import create_request
from tests.aggregator_bench import ManualClock
from tests.databases import sqlite_repository

GENEROUS = "1000000/minute"


@dataclass
class Api:
    """The application, what it stands on, and a token for each role."""

    app: FastAPI
    context: Context
    clock: ManualClock
    tokens: dict[Role, str]

    def token(self, role: Role, seconds: float = 3600.0) -> str:
        """A new token."""
        token, _ = self.context.operator.create_token(
            role=role, label="test", seconds=seconds, created_by="test"
        )
        return token

    def client(self, who: Role | str = Role.ADMIN) -> Client:
        """The typed client, as somebody."""
        token = self.tokens[who] if isinstance(who, Role) else who
        return Client(URL, token, transport=InProcess(self.app))

    def call(
        self, method: str, path: str, who: Role | str | None = Role.ADMIN, **more: Any
    ) -> httpx.Response:
        """A request as somebody, or as nobody."""
        token = self.tokens[who] if isinstance(who, Role) else who
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        headers |= more.pop("headers", {})
        with httpx.Client(base_url=URL, transport=InProcess(self.app, client=("192.0.2.1", 1))) as client:
            return client.request(method, path, headers=headers, **more)


@contextmanager
def api(path: Path, **changes: Any) -> Iterator[Api]:
    """Makes an aggregator in a directory and opens its API; `changes` are fields of its context."""
    clock = ManualClock()
    authority = Authority.create("orchard", now=int(time.time()), serial=1)
    keyfiles.save(authority, path / "keys")
    feed = EventFeed()
    repository = ObservedRepository(sqlite_repository(path / "aggregator.db"), feed)
    publishers = changes.pop("publishers", {})
    operator = Operator(
        repository,
        DirectoryStore(path / "registry"),
        replace(authority, ca_key=None),
        clock,
        publishers,
        Doorway("https://hub.example:8443", authority.ca, "mqtts://hub.example:8883"),
    )
    context = Context(operator, lambda: keyfiles.load(path / "keys"), feed, **changes)
    found = Api(create_app(context), context, clock, {})
    found.tokens = {role: found.token(role) for role in Role}
    try:
        yield found
    finally:
        repository.close()


def csr(name: str) -> bytes:
    """A device's signing request."""
    return create_request(Ed25519PrivateKey.generate(), name)
