"""People sign in: a real OpenID provider in a process of its own, a browser's steps by hand."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

pytest.importorskip("fastapi")
# Looked for, not imported: it warns of what its own dependencies do.
if find_spec("oidc_provider_mock") is None:
    pytest.skip("the OpenID provider is not installed", allow_module_level=True)

from joserfc import jwt
from joserfc.jwk import RSAKey

from aggregator.access.roles import Role
from aggregator.web.listen import ListenAddress
from aggregator.web.oidc import LOGIN_COOKIE, Oidc
from aggregator.web.oidc_settings import OidcSettings
from aggregator.web.server import ApiServer
from aggregator.web.sessions import SESSION_COOKIE
from deploy.broker import free_port
from tests.api_bench import Api, api, csr

V1 = "/api/v1"
SECRET = "of the client"


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("oidc") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "oidc_provider_mock", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                found = httpx.get(f"{url}/.well-known/openid-configuration", timeout=120).json()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        for name, groups in {"ada": ["staff", "ml", "admins"], "bob": ["ml"], "eve": ["staff"]}.items():
            claims = {"email": f"{name}@example.org", "groups": groups}
            httpx.put(f"{url}/users/{name}", json=claims, timeout=120).raise_for_status()
        yield found["issuer"]
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture
def bench(issuer: str, tmp_path: Path) -> Iterator[Api]:
    secret = tmp_path / "oidc-secret"
    secret.write_text(SECRET + "\n")
    settings = OidcSettings(
        issuer=issuer,
        client_id="covey",
        client_secret_file=secret,
        roles={"admins": Role.ADMIN, "ml": Role.OPERATOR},
    )
    with api(tmp_path, oidc=Oidc(settings)) as found:
        # The provider lives today.
        found.clock.now += time.time() - found.clock.moment().unix
        yield found


@pytest.fixture
def browser(bench: Api) -> Iterator[httpx.Client]:
    with (
        ApiServer(bench.app, ListenAddress.parse("127.0.0.1:0")) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client


def begin(browser: httpx.Client, who: str) -> str:
    """Signs in at the issuer; returns where it sends the browser back to."""
    start = browser.get("/auth/login")
    assert start.status_code == 303
    address = start.headers["location"]
    query = parse_qs(urlsplit(address).query)
    assert query["code_challenge_method"] == ["S256"] and len(query["code_challenge"][0]) == 43
    assert {"state", "nonce"} <= query.keys()
    agreed = httpx.post(address, data={"sub": who}, timeout=120)
    assert agreed.status_code == 302, agreed.text
    return agreed.headers["location"]


def sign_in(browser: httpx.Client, who: str) -> httpx.Response:
    return browser.get(begin(browser, who))


def test_a_person_signs_in_acts_and_signs_out(bench: Api, browser: httpx.Client) -> None:
    done = sign_in(browser, "bob")
    # A page of its own, which goes on: after a redirect from the issuer, a strict cookie would stay behind.
    assert done.status_code == 200 and 'content="0;url=/"' in done.text
    cookie = next(h for h in done.headers.get_list("set-cookie") if h.startswith(SESSION_COOKIE))
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    me = browser.get(f"{V1}/whoami").json()
    assert (me["name"], me["role"]) == ("oidc:bob@example.org", "operator")
    assert browser.get(f"{V1}/audit").status_code == 403

    with bench.client() as client:
        client.enrol(csr("barn-1"))
    where = f"{V1}/devices/barn-1/exclusion"
    own = str(browser.base_url).rstrip("/")
    # A page of another site makes the browser send its cookie along: it changes nothing.
    for headers in (
        {},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Origin": own},
        {"Sec-Fetch-Site": "same-site", "Origin": own},
    ):
        response = browser.put(where, json={"reason": "forged"}, headers=headers)
        assert (response.status_code, response.json()["code"]) == (403, "cross-site"), headers
    assert bench.context.operator.device("barn-1").excluded is None
    for headers in ({"Origin": own}, {"Sec-Fetch-Site": "same-origin"}):
        assert browser.put(where, json={"reason": "broken"}, headers=headers).status_code == 204
    assert bench.context.operator.audit_log(limit=1)[0].who == "oidc:bob@example.org"

    secret = browser.cookies[SESSION_COOKIE]
    assert browser.post("/auth/logout").status_code == 403
    assert browser.post("/auth/logout", headers={"Origin": own}).status_code == 303
    again = httpx.get(f"{own}{V1}/whoami", cookies={SESSION_COOKIE: secret}, timeout=120)
    assert again.status_code == 401 and "sign in again" in again.json()["detail"]


def test_the_highest_role_counts_and_without_one_nobody_gets_in(browser: httpx.Client) -> None:
    sign_in(browser, "ada")
    assert browser.get(f"{V1}/whoami").json()["role"] == "admin"
    browser.cookies.clear()
    refused = sign_in(browser, "eve")
    assert refused.status_code == 401
    assert "has no role here" in refused.json()["detail"]
    assert SESSION_COOKIE not in browser.cookies


def test_a_session_ends_by_itself(bench: Api, browser: httpx.Client) -> None:
    sign_in(browser, "bob")
    bench.clock.now += 8 * 3600
    assert browser.get(f"{V1}/whoami").status_code == 401


def test_a_sign_in_that_somebody_else_began_is_refused(browser: httpx.Client) -> None:
    back = begin(browser, "bob")
    # An attacker's own code, brought to the victim's browser: it has no cookie of that sign-in.
    browser.cookies.delete(LOGIN_COOKIE)
    stolen = browser.get(back)
    assert stolen.status_code == 401 and "begin again" in stolen.json()["detail"]
    assert SESSION_COOKIE not in browser.cookies
    back = begin(browser, "bob")
    assert browser.get(back).status_code == 200
    assert browser.get(back).status_code == 401  # once
    forged = browser.get("/auth/callback", params={"code": "x", "state": "y"})
    assert forged.status_code == 401


def test_the_code_goes_back_with_the_verifier_of_its_challenge(
    browser: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 7636, section 4.6. The provider here takes codes without one, so both sides are looked at."""
    bodies: list[str] = []
    post = httpx.post

    def recorded(url: str, **more: Any) -> httpx.Response:
        bodies.append(more["content"])
        return post(url, **more)

    start = browser.get("/auth/login")
    address = start.headers["location"]
    back = post(address, data={"sub": "bob"}, timeout=120).headers["location"]
    monkeypatch.setattr("aggregator.web.oidc.httpx.post", recorded)
    assert browser.get(back).status_code == 200
    (verifier,) = parse_qs(bodies[0])["code_verifier"]
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    assert parse_qs(urlsplit(address).query)["code_challenge"] == [digest]
    assert len(verifier) >= 43


def test_the_issuers_tokens_are_bearers_and_nobody_elses(bench: Api, issuer: str) -> None:
    oidc = bench.context.oidc
    assert oidc is not None
    caught: list[str] = []
    decode = oidc._claims
    oidc._claims = lambda token, now: (caught.append(token), decode(token, now))[1]  # type: ignore[method-assign]
    with (
        ApiServer(bench.app, ListenAddress.parse("127.0.0.1:0")) as server,
        httpx.Client(base_url=server.url, timeout=120) as browser,
    ):
        sign_in(browser, "bob")
    token = caught[0]
    assert bench.call("GET", f"{V1}/whoami", token).json()["name"] == "oidc:bob@example.org"
    # A bearer is no cookie: nothing sends it along by itself.
    assert bench.call("DELETE", f"{V1}/devices/nobody/exclusion", token).status_code == 404

    key = RSAKey.generate_key(2048, {"kid": "mine"})
    claims = decode(token, time.time())

    def forged(changes: dict[str, object], algorithm: str = "RS256") -> str:
        return jwt.encode({"alg": algorithm, "kid": "mine"}, claims | changes, key)

    head, body, signature = token.split(".")
    none = "eyJhbGciOiJub25lIn0." + body + "."
    for bad in (forged({}), f"{head}.{body}.{signature[:-8]}AAAAAAAA", none, "a.b.c"):
        response = bench.call("GET", f"{V1}/whoami", bad)
        assert response.status_code == 401
        assert "not signed by the issuer" in response.json()["detail"]
    # The issuer's own signature, but for another service, or too late.
    for changed, why in (
        (oidc.settings.model_copy(update={"client_id": "other"}), "for another service"),
        (oidc.settings.model_copy(update={"issuer": "https://other"}), "of another issuer"),
    ):
        other = Oidc(changed)
        other._metadata, other._keys, other._fetched = oidc._metadata, oidc._keys, oidc._fetched
        with pytest.raises(Exception, match=why):
            other.bearer(token, time.time())
    bench.clock.now += 10 * 86_400
    assert "has expired" in bench.call("GET", f"{V1}/whoami", token).json()["detail"]


def test_an_issuer_that_does_not_answer_is_not_the_callers_fault(tmp_path: Path) -> None:
    nowhere = OidcSettings(issuer="http://127.0.0.1:1", client_id="covey", roles={"x": Role.VIEWER})
    with api(tmp_path, oidc=Oidc(nowhere)) as bench:
        assert bench.call("GET", f"{V1}/whoami", "a.b.c").status_code == 503
        assert bench.call("GET", "/auth/login", None).status_code == 503
        assert bench.call("GET", f"{V1}/whoami").status_code == 200
