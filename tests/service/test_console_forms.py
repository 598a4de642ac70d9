"""The console's longer forms, in process: tokens, models, and questions to the fleet."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("fastapi")
pytest.importorskip("jinja2")

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from aggregator.access.roles import Role
from aggregator.cli import app
from aggregator.queries import QueryRequest
from aggregator.rounds.planning import asked_by
from aggregator.settings import CampaignRequest
from aggregator.web.console.querying import fields
from aggregator.web.limit_settings import Limits
from protocol.dp.parameters import PrivacyMode
from protocol.identity import SignedDocument, key_id
from protocol.plan import MODEL_KIND, HistogramQuestion, MeanQuestion, QueryTask
from tests.aggregator_devices import model_files
from tests.api_bench import Api, api
from tests.console_pages import page, sign_in

KINDS = ("mean", "sum", "histogram", "quantile")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path) as found:
        yield found


# --- tokens


def test_a_token_is_made_shown_once_and_revoked(bench: Api) -> None:
    browser = sign_in(bench, Role.ADMIN)
    assert 'href="/tokens/new"' in page(bench, "/tokens", browser)
    asks = page(bench, "/tokens/new", browser)
    assert "<dialog open" in asks and "makes tokens and reads the audit log" in asks
    before = len(bench.context.operator.tokens())
    form = {"role": "viewer", "days": "7", "label": "<b>wall</b>"}
    for wrong in ({"role": "god"}, {"days": "0"}, {"days": "367"}, {"label": "x" * 64}, {"label": "a\nb"}):
        assert bench.call("POST", "/tokens", None, data=form | wrong, headers=browser).status_code == 422
    assert len(bench.context.operator.tokens()) == before

    made = bench.call("POST", "/tokens", None, data=form, headers=browser)
    assert made.status_code == 200 and made.headers["cache-control"] == "no-store"
    (secret,) = re.findall(r"covey_[0-9a-f]{12}_[0-9a-f]{64}", made.text)
    assert "hx-get" not in made.text, "it stays until somebody leaves it"
    assert bench.call("GET", "/api/v1/whoami", secret).json()["role"] == "viewer"
    token = bench.context.operator.tokens()[-1]
    assert token.label == "<b>wall</b>" and token.expires_at - token.created_at == 7 * 86_400
    entry = bench.context.operator.audit_log(limit=1)[0]
    assert (entry.action, entry.target, entry.outcome) == ("create-token", "viewer <b>wall</b>", "done")
    shown = page(bench, "/tokens", browser)
    assert secret[-64:] not in shown and "&lt;b&gt;wall&lt;/b&gt;" in shown and "for 7 d" in shown

    where = f"/tokens/{token.token_id}/revoke"
    assert f'href="{where}"' in shown
    assert "Nothing brings it back" in page(bench, where, browser)
    assert bench.call("GET", "/api/v1/whoami", secret).status_code == 200, "asking revokes nothing"
    assert bench.call("POST", where, None, headers=browser).headers["location"] == "/tokens"
    assert bench.call("GET", "/api/v1/whoami", secret).status_code == 401
    assert bench.context.operator.audit_log(limit=1)[0].action == "revoke-token"
    shown = page(bench, "/tokens", browser)
    assert f'href="{where}"' not in shown and ">revoked<" in shown
    page(bench, "/tokens/00000000000f/revoke", browser, 404)


def test_whoever_revokes_their_own_token_is_told_and_signed_out(bench: Api) -> None:
    mine = bench.token(Role.ADMIN)
    browser, public = sign_in(bench, mine), mine.split("_")[1]
    assert "this ends your session" in page(bench, f"/tokens/{public}/revoke", browser)
    other = bench.tokens[Role.VIEWER].split("_")[1]
    assert "this ends your session" not in page(bench, f"/tokens/{other}/revoke", browser)
    assert bench.call("POST", f"/tokens/{public}/revoke", None, headers=browser).status_code == 303
    assert bench.call("GET", "/tokens", None, headers=browser).headers["location"] == "/sign-in"


def test_tokens_are_for_admins(bench: Api) -> None:
    before = bench.context.operator.tokens()
    for role in (Role.VIEWER, Role.OPERATOR):
        browser = sign_in(bench, role)
        assert 'href="/tokens"' not in page(bench, "/", browser)
        for path in ("/tokens", "/tokens/new", f"/tokens/{before[0].token_id}/revoke"):
            assert "needs the role admin" in page(bench, path, browser, 403)
        form = {"role": "admin", "days": "1"}
        assert bench.call("POST", "/tokens", None, data=form, headers=browser).status_code == 403
        where = f"/tokens/{before[0].token_id}/revoke"
        assert bench.call("POST", where, None, headers=browser).status_code == 403
    browser = sign_in(bench, Role.ADMIN)
    assert 'href="/tokens"' in page(bench, "/", browser)
    elsewhere = browser | {"Sec-Fetch-Site": "cross-site"}
    form = {"role": "admin", "days": "1"}
    assert bench.call("POST", "/tokens", None, data=form, headers=elsewhere).status_code == 403
    assert bench.context.operator.tokens() == before


def test_an_expired_token_says_so(bench: Api) -> None:
    bench.context.operator.create_token(role=Role.VIEWER, label="old", seconds=60, created_by="test")
    bench.clock.now += 61
    text = page(bench, "/tokens", sign_in(bench, bench.token(Role.ADMIN)))
    assert text.count(">expired<") == 1 and ">old<" in text


# --- publishing


def chosen(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Files as a browser sends those that somebody chose."""
    return [("files", (name, data, "application/octet-stream")) for name, data in files]


def test_a_model_is_published_from_its_folder(bench: Api) -> None:
    manifest, graph, weights = model_files(50)
    browser = sign_in(bench, Role.OPERATOR)
    assert 'href="/models/publish"' in page(bench, "/models", browser)
    assert 'href="/models/publish"' not in page(bench, "/models", sign_in(bench, Role.VIEWER))
    asks = page(bench, "/models/publish", browser)
    assert 'enctype="multipart/form-data"' in asks and 'type="file" multiple required' in asks
    whole = [("watch/manifest.json", manifest), ("C:\\m\\model.tflite", graph), ("weights.bin", weights)]
    everything = chosen(*whole, ("__init__.py", b"# beside them"))
    done = bench.call("POST", "/models", None, files=everything, headers=browser)
    assert (done.status_code, done.headers["location"]) == (303, "/models"), done.text
    (version,) = bench.context.operator.versions("toy")
    assert bench.context.operator.model("toy", 1).weights == weights
    entry = bench.context.operator.audit_log(limit=1)[0]
    assert (entry.action, entry.outcome) == ("publish-version", "done")
    assert entry.target.startswith("manifest "), entry
    assert version.version == 1 and version.round_id is None
    viewer = sign_in(bench, Role.VIEWER)
    assert bench.call("POST", "/models", None, files=everything, headers=viewer).status_code == 403
    assert len(bench.context.operator.versions("toy")) == 1


def test_a_refused_upload_says_what_it_lacks(bench: Api) -> None:
    manifest, graph, weights = model_files(50)
    browser = sign_in(bench, Role.OPERATOR)
    whole = {"manifest.json": manifest, "model.tflite": graph, "weights.bin": weights}
    for files, why in (
        ([("manifest.json", manifest)], "model.tflite and weights.bin missing"),
        ([*list(whole.items())[:2], ("weights (1).bin", weights)], "weights (1).bin: not a file of a model"),
        ([*whole.items(), ("b/model.tflite", graph)], "two files model.tflite"),
        (list((whole | {"weights.bin": weights[:-1]}).items()), "the weights file is not the one"),
        (list((whole | {"model.tflite": b""}).items()), "the graph file is not the one"),
        (list((whole | {"manifest.json": b"{}"}).items()), "manifest.json is not valid"),
        ([*whole.items(), ("signature.json", b"{}")], "sign it again"),
    ):
        refused = bench.call("POST", "/models", None, files=chosen(*files), headers=browser)
        assert refused.status_code == 422 and html.escape(why) in refused.text, (why, refused.text)
        assert bench.context.operator.audit_log(limit=1)[0].outcome in ("publish-refused", "invalid-request")
    assert bench.context.operator.versions("toy") == ()


def test_an_upload_is_as_large_as_the_api_takes_and_no_larger(tmp_path: Path) -> None:
    manifest, graph, weights = model_files(50)
    room = len(manifest) + len(graph) + len(weights) + 2000
    with api(tmp_path, limits=Limits(body_bytes=1024, upload_bytes=room)) as bench:
        browser = sign_in(bench, Role.OPERATOR)
        whole = [("manifest.json", manifest), ("model.tflite", graph), ("weights.bin", weights)]
        large = chosen(*whole, ("notes.txt", bytes(room)))
        refused = bench.call("POST", "/models", None, files=large, headers=browser)
        assert refused.status_code == 413 and "at most" in refused.text
        assert bench.context.operator.versions("toy") == ()
        assert bench.call("POST", "/models", None, files=chosen(*whole), headers=browser).status_code == 303


def test_a_fleet_of_signed_models_takes_a_signature_made_elsewhere(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    folder = tmp_path / "model"
    folder.mkdir()
    manifest, graph, weights = model_files(50)
    whole = [("manifest.json", manifest), ("model.tflite", graph), ("weights.bin", weights)]
    for name, data in whole:
        (folder / name).write_bytes(data)
    pem = tmp_path / "publisher.pem"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pem.chmod(0o600)
    signed = CliRunner().invoke(app, ["model", "sign", str(folder), "--sign-key", str(pem)])
    assert signed.exit_code == 0, signed.output
    signature = (folder / "signature.json").read_bytes()
    foreign = SignedDocument.create(other, MODEL_KIND, manifest).model_dump_json().encode()
    with api(tmp_path, publishers={key_id(key.public_key()): key.public_key()}) as bench:
        browser = sign_in(bench, Role.OPERATOR)
        assert "covey model sign" in page(bench, "/models/publish", browser)
        for more, why in (
            ([], "takes only what a publisher signed"),
            ([("signature.json", foreign)], "unknown key"),
        ):
            files = chosen(*whole, *more)
            refused = bench.call("POST", "/models", None, files=files, headers=browser)
            assert refused.status_code == 403 and why in refused.text
        files = chosen(*whole, ("signature.json", signature))
        assert bench.call("POST", "/models", None, files=files, headers=browser).status_code == 303
        assert len(bench.context.operator.versions("toy")) == 1


# --- questions


def filled(text: str) -> dict[str, str]:
    """What a browser sends of a form that nobody has touched."""
    given = dict(re.findall(r'<input name="([^"]*)"[^>]* value="([^"]*)"', text))
    for name, options in re.findall(r'<select name="([^"]*)"[^>]*>(.*?)</select>', text):
        (chosen,) = re.findall(r'value="([^"]*)" selected', options)
        given[name] = chosen
    return {name: html.unescape(value) for name, value in given.items()}


def test_an_untouched_form_asks_what_the_command_asks(bench: Api) -> None:
    browser = sign_in(bench, Role.OPERATOR)
    for kind in KINDS:
        check_untouched(bench, browser, kind)


def check_untouched(bench: Api, browser: dict[str, str], kind: str) -> None:
    assert f'href="/queries/new/{kind}"' in page(bench, "/queries", browser)
    answers = filled(page(bench, f"/queries/new/{kind}", browser))
    answers |= {"field": "battery", "low": "-5", "high": "80"}
    asked = bench.call("POST", f"/queries/new/{kind}", None, data=answers, headers=browser)
    assert (asked.status_code, asked.headers["location"]) == (303, "/queries"), asked.text
    campaign = bench.context.operator.campaigns()[-1]
    entry = bench.context.operator.audit_log(limit=1)[0]
    assert (entry.action, entry.target, entry.outcome) == ("start-query", "battery", "done")
    with bench.client(Role.OPERATOR) as client:
        task = asked_by(campaign)
        assert isinstance(task, QueryTask) and task.question.kind == kind
        again = client.start_query(QueryRequest("battery", -5.0, 80.0, task.question))
    mine, theirs = (
        re.sub(rb'"selection_seed":"[^"]*"', b"", bench.context.operator.campaign(each).settings)
        for each in (campaign.campaign_id, again.campaign)
    )
    assert mine == theirs


def test_every_option_of_the_command_is_in_the_form(bench: Api) -> None:
    browser = sign_in(bench, Role.OPERATOR)
    program: Any = typer.main.get_command(app)
    for kind in KINDS:
        command = program.commands["query"].commands[kind]
        asked = {each.name for each in command.params} - {"state", "json", "form", "field"}
        assert {"low", "privacy", "unmask_seconds"} <= asked
        shown = filled(page(bench, f"/queries/new/{kind}", browser))
        assert shown.keys() == {each.name for each in fields(kind)}
        assert len(shown) == len(asked) + 1, (kind, sorted(map(str, asked)), sorted(shown))


def test_what_the_form_says_is_what_is_asked(bench: Api) -> None:
    browser = sign_in(bench, Role.OPERATOR)
    answers = {
        "field": "battery",
        "low": "0",
        "high": "10",
        "question.bins": "7",
        "where": "label=barn",
        "cohort": "12",
        "minimum": "9",
        "min_survivors": "8",
        "privacy": "central",
        "epsilon": "",
        "noise_multiplier": "2.5",
        "delta": "1e-6",
        "epsilon_limit": "9",
        "deadlines.unmasking": "77",
        "seed": "3",
    }
    done = bench.call("POST", "/queries/new/histogram", None, data=answers, headers=browser)
    assert done.status_code == 303, done.text
    (campaign,) = bench.context.operator.campaigns()
    request = QueryRequest(
        "battery",
        0.0,
        10.0,
        HistogramQuestion(bins=7),
        where="label=barn",
        cohort=12,
        minimum=9,
        min_survivors=8,
        privacy=PrivacyMode.CENTRAL,
        noise_multiplier=2.5,
        delta=1e-6,
        epsilon_limit=9.0,
        seed=3,
    )
    expected = request.resolve()
    deadlines = expected.deadlines.model_copy(update={"unmasking": 77.0})
    assert campaign.settings == expected.model_copy(update={"deadlines": deadlines}).to_bytes()


def test_a_question_that_cannot_be_asked_comes_back_as_it_was_filled_in(bench: Api) -> None:
    browser = sign_in(bench, Role.OPERATOR)
    untouched = filled(page(bench, "/queries/new/quantile", browser))
    for change, why, status, outcome in (
        ({"low": "9", "high": "1"}, "low", 409, "refused"),
        ({"low": "nan"}, "low", 409, "refused"),
        ({"low": "warm"}, "low: ", 422, "invalid-request"),
        ({"low": ""}, "low: ", 422, "invalid-request"),
        ({"field": "<b>"}, "field", 409, "refused"),
        ({"where": "colour=red"}, "where: ", 409, "refused"),
        ({"epsilon": "1", "noise_multiplier": "2"}, "each follows from the other", 409, "refused"),
        ({"privacy": "none", "epsilon": "1"}, "without noise there is no epsilon", 409, "refused"),
        ({"cohort": "3", "minimum": "5"}, "", 409, "refused"),
    ):
        answers = untouched | {"field": "battery", "low": "0", "high": "10", "question.q": "0.25"} | change
        refused = bench.call("POST", "/queries/new/quantile", None, data=answers, headers=browser)
        assert refused.status_code == status, refused.text
        (trouble,) = re.findall(r'role="alert">([^<]+)</p>', refused.text)
        assert why in html.unescape(trouble), trouble
        assert filled(refused.text) == answers
        assert bench.context.operator.audit_log(limit=1)[0].outcome == outcome
    assert bench.context.operator.campaigns() == ()


def test_made_up_fields_and_kinds_are_refused(bench: Api) -> None:
    browser = sign_in(bench, Role.OPERATOR)
    answers = {"field": "battery", "low": "0", "high": "10"}
    for name in ("field.x", "question", "question.kind", "deadlines.x", "deadlines.x.y", "question.bins"):
        refused = bench.call("POST", "/queries/new/mean", None, data=answers | {name: "1"}, headers=browser)
        assert refused.status_code == 422 and "no field" in refused.text, name
    page(bench, "/queries/new/median", browser, 422)
    assert bench.context.operator.campaigns() == ()


def test_a_query_is_called_off_from_its_page(bench: Api) -> None:
    asked = bench.context.operator.start_query(QueryRequest("battery", 0.0, 10.0, MeanQuestion()))
    with bench.client() as client:
        client.publish(*model_files(50))
    trained = bench.context.operator.start_rounds(CampaignRequest("toy", rounds=1, cohort=3))
    browser, viewer = sign_in(bench, Role.OPERATOR), sign_in(bench, Role.VIEWER)
    where = f"/campaigns/{asked.campaign_id}/cancel"
    assert f'href="{where}"' in page(bench, "/queries", browser)
    shown = page(bench, "/queries", viewer)
    assert "/cancel" not in shown and "/queries/new" not in shown
    asks = page(bench, where, browser)
    assert f"Cancel query {asked.campaign_id[:8]}?" in asks and "its privacy is spent" in asks
    assert 'href="/queries"' in asks.partition("<dialog")[2]
    assert bench.call("POST", where, None, headers=browser).headers["location"] == "/queries"
    assert bench.context.operator.campaign(asked.campaign_id).status == "cancelled"
    assert f'href="{where}"' not in page(bench, "/queries", browser)
    assert trained.campaign_id not in page(bench, "/queries", browser)
