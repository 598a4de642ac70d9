"""The API in process: who gets in, what each resource says, and how everything else is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

pytest.importorskip("fastapi")

from aggregator.access.roles import Role
from aggregator.client import ApiError
from aggregator.evaluations import EvaluationRequest
from aggregator.queries import QueryRequest
from aggregator.rounds.planning import CampaignSettings
from aggregator.settings import CampaignRequest
from aggregator.web.context import Vitals
from aggregator.web.limit_settings import Limits
from aggregator.web.schemas import MAX_PAGE, TokenRequest
from protocol.dp.parameters import PrivacyMode
from protocol.identity import SignedDocument, key_id
from protocol.plan import MODEL_KIND, Deadlines, MeanQuestion, QuantileQuestion
from tests.aggregator_devices import model_files
from tests.api_bench import Api, api, csr

V1 = "/api/v1"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path) as found:
        yield found


def problem(response, status: int, code: str) -> str:  # type: ignore[no-untyped-def]
    """Asserts that this is that problem; returns its detail."""
    assert response.headers["content-type"] == "application/problem+json"
    content = response.json()
    assert (response.status_code, content["status"], content["code"]) == (status, status, code), content
    assert content["type"] == f"urn:covey:problem:{code}"
    assert content["title"] and content["detail"]
    return str(content["detail"])


# --- who gets in


def test_nobody_is_let_in_without_a_valid_token(bench: Api) -> None:
    mine = bench.tokens[Role.VIEWER]
    nearly = mine[:-1] + ("0" if mine[-1] != "0" else "1")
    short = bench.token(Role.ADMIN, seconds=10)
    assert bench.call("GET", f"{V1}/whoami", short).status_code == 200
    bench.clock.now += 10
    revoked = bench.token(Role.ADMIN)
    bench.context.operator.revoke_token(revoked.split("_")[1])
    for token, why in [
        (None, "say who you are"),
        (nearly, "not one of this aggregator's"),
        ("covey_" + "0" * 12 + "_" + "0" * 64, "not one of this aggregator's"),
        (short, "has expired"),
        (revoked, "was revoked"),
        ("x" * 4000, "not a token of Covey"),
        ("covey_local_" + "0" * 64, "has stopped"),
    ]:
        response = bench.call("GET", f"{V1}/devices", token)
        assert why in problem(response, 401, "unauthenticated")
        assert response.headers["www-authenticate"] == "Bearer"
    basic = {"Authorization": "Basic YTpi"}
    assert "bearer" in problem(
        bench.call("GET", f"{V1}/devices", None, headers=basic), 401, "unauthenticated"
    )


def test_each_role_may_do_what_it_may_and_no_more(bench: Api) -> None:
    for role in Role:
        assert bench.call("GET", f"{V1}/devices", role).status_code == 200
        assert bench.call("GET", f"{V1}/whoami", role).json()["role"] == role
    for who, method, path, needed in [
        (Role.VIEWER, "POST", "/campaigns", Role.OPERATOR),
        (Role.VIEWER, "POST", "/queries", Role.OPERATOR),
        (Role.VIEWER, "POST", "/versions", Role.OPERATOR),
        (Role.VIEWER, "PUT", "/devices/barn-1/exclusion", Role.OPERATOR),
        (Role.OPERATOR, "GET", "/tokens", Role.ADMIN),
        (Role.OPERATOR, "POST", "/tokens", Role.ADMIN),
        (Role.OPERATOR, "GET", "/audit", Role.ADMIN),
    ]:
        # Refused before the body is looked at: this one is not even JSON.
        detail = problem(bench.call(method, V1 + path, who, content=b"{{{"), 403, "forbidden")
        assert f"needs the role {needed}" in detail and f"yours is {who}" in detail
    assert bench.context.operator.tokens() == bench.context.operator.tokens()[:3]


def test_guessing_tokens_is_slowed_down_and_others_are_not(tmp_path: Path) -> None:
    with api(tmp_path, limits=Limits(failures="3/minute", per_principal="5/minute")) as bench:
        for _ in range(3):
            problem(bench.call("GET", f"{V1}/devices", "guess"), 401, "unauthenticated")
        blocked = bench.call("GET", f"{V1}/devices", Role.VIEWER)
        problem(blocked, 429, "rate-limited")
        assert 1 <= int(blocked.headers["retry-after"]) <= 60
        # Another address has done nothing wrong.
        with bench.client(Role.VIEWER) as client:
            for _ in range(5):
                client.whoami()
            with pytest.raises(ApiError) as refused:
                client.whoami()
        assert refused.value.code == "rate-limited"


# --- devices


def test_the_fleet_through_its_life(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        for name in ("barn-2", "barn-1", "shed-1"):
            assert client.enrol(csr(name)).device_id == name
        assert client.enrol(csr("whatever"), name="barn-3").device_id == "barn-3"
        assert [d.device for d in client.devices()] == ["barn-1", "barn-2", "barn-3", "shed-1"]
        assert client.label("barn-1", ("site=north", "barn", "barn")).labels == ("barn", "site=north")
        assert [d.device for d in client.devices(label="site=north")] == ["barn-1"]
        assert list(client.devices(online=True)) == []
        client.exclude("barn-2", "sensor is broken")
        assert client.device("barn-2").excluded == "sensor is broken"
        client.exclude("barn-2", None)
        assert client.device("barn-2").excluded is None
        for missing in (
            lambda: client.device("nobody"),
            lambda: client.exclude("nobody", "x"),
            lambda: client.label("nobody", ()),
        ):
            with pytest.raises(ApiError, match="covey device list") as refused:
                missing()
            assert (refused.value.status, refused.value.code) == (404, "not-found")
        with pytest.raises(ApiError, match="another key") as taken:
            client.enrol(csr("barn-1"))
        assert taken.value.code == "enrolment-refused"


def test_pages_follow_each_other_and_do_not_change_without_reason(bench: Api) -> None:
    with bench.client() as client:
        names = [client.enrol(csr(f"device-{number}")).device_id for number in range(5)]
    seen, cursor = [], ""
    while cursor is not None:
        page = bench.call("GET", f"{V1}/devices", params={"limit": 2, "cursor": cursor}).json()
        seen += [item["device"] for item in page["items"]]
        cursor = page["next"]
    assert seen == names
    first = bench.call("GET", f"{V1}/devices")
    again = bench.call("GET", f"{V1}/devices", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    with bench.client() as client:
        client.exclude("device-0", "x")
    changed = bench.call("GET", f"{V1}/devices", headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200 and changed.headers["etag"] != first.headers["etag"]
    assert bench.call("GET", f"{V1}/devices", params={"limit": MAX_PAGE + 1}).status_code == 422


@pytest.mark.parametrize(
    "label",
    [
        "<script>alert(1)</script>",
        "barn'; DROP TABLE devices; --",
        '" onload="x',
        "%",
        "Barn",
        "",
        "x" * 64,
        "new\nline",
        "nul\x00",
    ],
)
def test_sql_and_html_in_a_label_are_refused_and_change_nothing(bench: Api, label: str) -> None:
    with bench.client() as client:
        client.enrol(csr("barn-1"))
        client.label("barn-1", ("barn",))
    response = bench.call("PUT", f"{V1}/devices/barn-1/labels", json={"labels": [label]})
    detail = problem(response, 422, "invalid-request")
    assert "body.labels.0" in detail
    assert not label or label not in response.text  # nothing comes back that a page could run
    assert bench.call("GET", f"{V1}/devices", params={"label": label}).status_code == 422
    with bench.client() as client:
        assert client.device("barn-1").labels == ("barn",)


def test_markup_in_a_reason_stays_text(bench: Api) -> None:
    reason = '<b>it\'s</b> 100% "broken"; -- ü'
    with bench.client() as client:
        client.enrol(csr("barn-1"))
        client.exclude("barn-1", reason)
        assert client.device("barn-1").excluded == reason
    response = bench.call("GET", f"{V1}/devices/barn-1")
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name", ["..", "../x", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a%2fb", "A", "x" * 64, "a%00"]
)
def test_a_name_that_is_a_path_is_refused(bench: Api, name: str) -> None:
    for path in (
        f"/models/{name}/versions/1/manifest",
        f"/models/{name}/versions/1/weights",
        f"/devices/{name}",
    ):
        response = bench.call("GET", V1 + path)
        assert response.status_code in (404, 422), path
        assert response.headers["content-type"] == "application/problem+json"


# --- models


def test_a_model_is_published_and_comes_back_byte_for_byte(bench: Api) -> None:
    manifest, graph, weights = model_files(50)
    with bench.client(Role.OPERATOR) as client:
        version = client.publish(manifest, graph, weights)
        assert (version.model, version.version, version.round) == ("toy", 1, None)
        assert client.versions() == (version,)
        assert client.versions("other") == ()
        assert (client.graph("toy", 1), client.weights("toy", 1)) == (graph, weights)
        operator = bench.context.operator.authority.operator_key.public_key()
        payload = client.manifest("toy", 1).open(MODEL_KIND, {key_id(operator): operator})
        assert json.loads(payload)["name"] == "toy"
        with pytest.raises(ApiError, match="export the model again") as refused:
            client.publish(manifest, graph + b"x", weights)
        assert refused.value.code == "publish-refused"
        with pytest.raises(ApiError) as missing:
            client.manifest("toy", 9)
        assert missing.value.code == "not-found"


def test_a_query_is_asked_and_listed_like_rounds(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        asked = client.start_query(QueryRequest("battery", 0.0, 80.0, QuantileQuestion(q=0.9, bins=32)))
        assert asked.model is None and asked.query is not None
        assert (asked.query.field, asked.query.question) == ("battery", QuantileQuestion(q=0.9, bins=32))
        assert client.campaigns() == (asked,)
        assert client.ledger(1e-5).queries.releases == 0
        for wrong, why in (({"low": 80.0, "high": 0.0}, "not below"), ({"minimum": 20}, "minimum")):
            values = {"field": "battery", "low": 0.0, "high": 80.0, "question": MeanQuestion(), **wrong}
            with pytest.raises(ApiError, match=why) as refused:
                client.start_query(QueryRequest(**values))  # type: ignore[arg-type]
            assert refused.value.code == "refused"
        assert client.campaigns() == (asked,)
        assert client.cancel_campaign(asked.campaign).status == "cancelled"
        with pytest.raises(ApiError, match="is cancelled"):
            client.cancel_campaign(asked.campaign)
    with bench.client(Role.VIEWER) as client, pytest.raises(ApiError) as forbidden:
        client.cancel_campaign(asked.campaign)
    assert forbidden.value.status == 403
    body = {"field": "battery", "low": 0, "high": 80, "question": {"kind": "mode"}}
    problem(bench.call("POST", f"{V1}/queries", json=body), 422, "invalid-request")


ROUND: dict[str, Any] = {
    "where": "label=barn",
    "cohort": 30,
    "subcohort_limit": 15,
    "minimum": 12,
    "colluders": 2,
    "deadlines": Deadlines(masked_input=44.0, offline_grace=3.0),
}


@pytest.mark.parametrize("kind", ["query", "evaluation", "training"])
def test_what_a_round_asks_travels_whole(bench: Api, kind: str) -> None:
    with bench.client(Role.OPERATOR) as client:
        client.publish(*model_files(50))
        if kind == "query":
            asked = client.start_query(QueryRequest("battery", 0.0, 80.0, MeanQuestion(), **ROUND))
        elif kind == "evaluation":
            asked = client.start_evaluation(EvaluationRequest("toy", **ROUND))
        else:
            mode = PrivacyMode.DISTRIBUTED
            asked = client.start_rounds(CampaignRequest("toy", privacy=mode, **ROUND))
    assert asked.where == "label=barn"
    (campaign,) = bench.context.operator.campaigns()
    settings = CampaignSettings.from_bytes(campaign.settings)
    assert settings.deadlines == ROUND["deadlines"] and settings.privacy.colluders == 2
    assert (settings.cohort.size, settings.cohort.subcohort_limit, settings.cohort.minimum) == (30, 15, 12)


def test_an_evaluation_is_asked_for_and_read(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        with pytest.raises(ApiError, match="no published toy") as refused:
            client.start_evaluation(EvaluationRequest("toy"))
        assert refused.value.code == "refused"
        client.publish(*model_files(50))
        asked = client.start_evaluation(EvaluationRequest("toy", version=1))
        assert (asked.model, asked.evaluates, asked.query, asked.rounds) == ("toy", 1, None, 1)
        assert client.evaluations("toy") == client.evaluations("toy", 1) == ()
        for wrong in (EvaluationRequest("toy", version=2), EvaluationRequest("toy", minimum=20)):
            with pytest.raises(ApiError):
                client.start_evaluation(wrong)
        assert client.campaigns() == (asked,)
    with bench.client(Role.VIEWER) as client, pytest.raises(ApiError) as forbidden:
        client.start_evaluation(EvaluationRequest("toy"))
    assert forbidden.value.status == 403


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", "", "TOY", "toy\n"])
def test_path_traversal_in_a_models_name_is_refused(bench: Api, tmp_path: Path, name: str) -> None:
    manifest, graph, weights = model_files(50)
    evil = json.loads(manifest) | {"name": name}
    before = sorted(path for path in tmp_path.rglob("*") if path.suffix != "" and "db" not in path.name)
    with bench.client() as client, pytest.raises(ApiError, match=r"manifest.json is not valid") as refused:
        client.publish(json.dumps(evil).encode(), graph, weights)
    assert (refused.value.status, refused.value.code) == (422, "publish-refused")
    after = sorted(path for path in tmp_path.rglob("*") if path.suffix != "" and "db" not in path.name)
    assert after == before


def test_where_publishers_sign_an_unknown_key_is_refused(tmp_path: Path) -> None:
    known, unknown = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    publishers = {key_id(known.public_key()): known.public_key()}
    manifest, graph, weights = model_files(50)

    def signed(key: Ed25519PrivateKey, payload: bytes = manifest, kind: str = MODEL_KIND) -> bytes:
        return SignedDocument.create(key, kind, payload).model_dump_json().encode()

    with api(tmp_path, publishers=publishers) as bench, bench.client(Role.OPERATOR) as client:
        for signature, code, why in [
            (None, "unknown-signer", "only what a publisher signed"),
            (signed(unknown), "unknown-signer", "unknown key"),
            (signed(known, kind="plan"), "unknown-signer", "a signed plan"),
            (signed(known, manifest + b" "), "publish-refused", "of something else"),
            (b"{}", "publish-refused", "no signed document"),
        ]:
            with pytest.raises(ApiError, match=why) as refused:
                client.publish(manifest, graph, weights, signature)
            assert refused.value.code == code
        assert client.publish(manifest, graph, weights, signed(known)).version == 1


# --- rounds


def test_a_campaign_is_asked_for_and_seen(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        with pytest.raises(ApiError, match="covey model publish") as refused:
            client.start_rounds(CampaignRequest("toy"))
        assert (refused.value.status, refused.value.code) == (409, "refused")
        client.publish(*model_files(50))
        first = client.start_rounds(CampaignRequest("toy", rounds=2, cohort=3))
        second = client.start_rounds(CampaignRequest("toy", rounds=1, cohort=3))
        assert (first.status, first.rounds, first.started) == ("waiting", 2, 0)
        assert client.campaign(first.campaign) == first
        assert client.campaigns() == (first, second)
        assert client.rounds() == ()
    page = bench.call("GET", f"{V1}/campaigns", params={"limit": 1}).json()
    assert [item["campaign"] for item in page["items"]] == [second.campaign]
    rest = bench.call("GET", f"{V1}/campaigns", params={"cursor": page["next"]}).json()
    assert ([item["campaign"] for item in rest["items"]], rest["next"]) == ([first.campaign], None)
    problem(bench.call("POST", f"{V1}/campaigns", json={"model": "toy", "cohrt": 5}), 422, "invalid-request")
    problem(bench.call("GET", f"{V1}/campaigns/{'0' * 32}"), 404, "not-found")
    problem(bench.call("GET", f"{V1}/rounds/{'0' * 32}"), 404, "not-found")


def test_the_ledger_of_a_fleet_that_has_spent_nothing(bench: Api) -> None:
    with bench.client(Role.VIEWER) as client:
        ledger = client.ledger(1e-6)
    assert (ledger.matches, ledger.rounds, ledger.population.epsilon) == (True, 0, 0.0)
    assert ledger.population.delta == 1e-6


# --- access


def test_a_tokens_life_over_the_api(bench: Api) -> None:
    with bench.client() as admin:
        made = admin.create_token(TokenRequest(role=Role.VIEWER, label="laptop", seconds=60))
        assert made.secret not in repr(made)
        with bench.client(made.secret) as viewer:
            me = viewer.whoami()
            assert (me.name, me.role) == (f"token:{made.token} laptop", Role.VIEWER)
        listed = bench.call("GET", f"{V1}/tokens")
        assert made.token in listed.text and made.secret.split("_")[2] not in listed.text
        admin.revoke_token(made.token)
        assert [t.revoked_at for t in admin.tokens() if t.token == made.token] == [bench.clock.moment().unix]
        with bench.client(made.secret) as viewer, pytest.raises(ApiError, match="was revoked"):
            viewer.whoami()
        with pytest.raises(ApiError, match="covey token list"):
            admin.revoke_token("0" * 12)
    for bad in ({"role": "root"}, {"role": "viewer", "seconds": 1e9}, {"role": "viewer", "seconds": -1}):
        problem(bench.call("POST", f"{V1}/tokens", json=bad), 422, "invalid-request")


def test_every_action_leaves_a_trace_and_looking_leaves_none(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        client.enrol(csr("barn-1"))
        client.exclude("barn-1", "x")
        with pytest.raises(ApiError):
            client.exclude("nobody", "x")
        list(client.devices())
    bench.call("DELETE", f"{V1}/devices/barn-1/exclusion", Role.VIEWER)
    bench.call("PUT", f"{V1}/devices/barn-1/labels", Role.OPERATOR, json={"labels": ["<b>"]})
    bench.call("PUT", f"{V1}/devices/barn-1/labels", "covey_nonsense", json={"labels": []})
    with bench.client() as admin:
        page = admin.audit_log(limit=4)
        rest = admin.audit_log(cursor=page.next)
    found = [*page.items, *rest.items]
    operator, viewer = (bench.tokens[role].split("_")[1] for role in (Role.OPERATOR, Role.VIEWER))
    assert [(e.who, e.address, e.action, e.target, e.outcome) for e in found] == [
        (f"token:{operator} test", "192.0.2.1", "label-device", "barn-1", "invalid-request"),
        (f"token:{viewer} test", "192.0.2.1", "include-device", "barn-1", "forbidden"),
        (f"token:{operator} test", "local", "exclude-device", "nobody", "not-found"),
        (f"token:{operator} test", "local", "exclude-device", "barn-1", "done"),
        (f"token:{operator} test", "local", "enrol-device", "barn-1", "done"),
    ]
    assert [e.number for e in found] == sorted((e.number for e in found), reverse=True)


# --- everything else


def test_a_request_that_is_too_large_is_refused_by_its_own_word(bench: Api) -> None:
    declared = {"Content-Length": str(2 * 2**30), "Content-Type": "multipart/form-data; boundary=x"}
    response = bench.call("POST", f"{V1}/versions", Role.OPERATOR, content=b"", headers=declared)
    assert "268,435,456 bytes" in problem(response, 413, "too-large")
    body = b'{"csr": "' + b"A" * 2**20 + b'"}'
    problem(bench.call("POST", f"{V1}/devices", content=body), 413, "too-large")


def test_a_request_that_goes_on_and_on_is_cut_off(tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        yield b'--x\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
        while True:
            taken += 1
            yield bytes(2**16)

    with api(tmp_path, limits=Limits(upload_bytes=2**20)) as bench:
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        response = bench.call("POST", f"{V1}/versions", Role.OPERATOR, content=endless(), headers=kind)
    problem(response, 413, "too-large")
    assert taken <= 18


def test_what_is_not_there_and_what_cannot_be_done(bench: Api) -> None:
    problem(bench.call("GET", f"{V1}/nothing"), 404, "not-found")
    problem(bench.call("PATCH", f"{V1}/devices"), 405, "method-not-allowed")
    problem(bench.call("POST", f"{V1}/tokens", content=b"{"), 422, "invalid-request")
    typo = problem(bench.call("GET", f"{V1}/devices", params={"onlin": True}), 422, "invalid-request")
    assert "online" in typo
    problem(bench.call("GET", "/auth/login", None), 404, "not-found")
    huge = base64.b64encode(b"garbage").decode()
    problem(bench.call("POST", f"{V1}/devices", json={"csr": huge}), 422, "enrolment-refused")


def test_a_broken_database_is_a_503_and_health_says_so(bench: Api, tmp_path: Path) -> None:
    assert bench.call("GET", f"{V1}/health", None).json()["status"] == "alive"
    assert bench.call("GET", f"{V1}/ready", None).status_code == 503  # no service runs here
    bench.context.operator.repository.close()
    for path in tmp_path.glob("aggregator.db*"):
        path.unlink()
    (tmp_path / "aggregator.db").mkdir()
    response = bench.call("GET", f"{V1}/devices")
    problem(response, 503, "unavailable")
    assert response.headers["retry-after"] == "5"
    assert bench.call("GET", f"{V1}/health", None).json()["storage"] is False


def test_readiness_says_why_the_service_cannot_work(tmp_path: Path) -> None:
    trouble = ["database: database or disk is full"]
    with api(tmp_path, vitals=lambda: Vitals(broker=True, loop=True, trouble=trouble[0])) as bench:
        full = bench.call("GET", f"{V1}/ready", None)
        assert (full.status_code, full.json()["trouble"]) == (503, trouble[0])
        assert bench.call("GET", f"{V1}/health", None).status_code == 200  # a restart would not help
        trouble[0] = ""
        assert bench.call("GET", f"{V1}/ready", None).status_code == 200


def test_a_defect_is_a_500_without_its_inside(bench: Api, caplog: pytest.LogCaptureFixture) -> None:
    @bench.app.get("/boom")
    def boom() -> None:
        raise RuntimeError("a secret")

    response = bench.call("GET", "/boom")
    problem(response, 500, "internal")
    assert "a secret" not in response.text
    assert "a secret" in caplog.text
