"""The console's pages as a browser asks for them, in process."""

from __future__ import annotations

from http.cookies import SimpleCookie

import httpx

from aggregator.access.roles import Role
from aggregator.web.sessions import SESSION_COOKIE
from tests.api_bench import Api

HTML = {"Accept": "text/html"}
SAME = {"Sec-Fetch-Site": "same-origin"}


def cookie_of(response: httpx.Response) -> SimpleCookie:
    """The cookies that an answer sets."""
    found = SimpleCookie()
    for header in response.headers.get_list("set-cookie"):
        found.load(header)
    return found


def sign_in(bench: Api, role: Role | str) -> dict[str, str]:
    """Signs in as a browser does; returns the headers that it sends from then on."""
    token = bench.tokens[role] if isinstance(role, Role) else role
    response = bench.call("POST", "/auth/token", None, data={"token": token}, headers=HTML | SAME)
    assert (response.status_code, response.headers["location"]) == (303, "/")
    return HTML | SAME | {"Cookie": f"{SESSION_COOKIE}={cookie_of(response)[SESSION_COOKIE].value}"}


def page(bench: Api, path: str, browser: dict[str, str], status: int = 200) -> str:
    """The text of a page; it has this status."""
    response = bench.call("GET", path, None, headers=browser)
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("text/html")
    return response.text
