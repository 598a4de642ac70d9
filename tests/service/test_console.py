"""The console in process: who gets in, what pages say, that nothing on them can act by itself."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jinja2")

from aggregator.access.roles import Role
from aggregator.records import Device
from aggregator.web.console.assets import FILES
from aggregator.web.console.charts import Series, line_chart
from aggregator.web.console.live import ticks
from aggregator.web.context import Vitals
from aggregator.web.events import EventFeed
from aggregator.web.in_process import InProcess
from aggregator.web.sessions import SESSION_COOKIE
from protocol.messages import DeviceStatus, VersionFailure
from tests.api_bench import Api, api, csr
from tests.console_pages import HTML, SAME, cookie_of, page, sign_in

pytest.importorskip("selenium")
from tests.console_bench import seed_fleet, seed_rounds

PAGES = ("/", "/fleet", "/rounds", "/models", "/rollouts", "/campaigns", "/queries", "/privacy", "/log")
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'--></style>"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path) as found:
        yield found


# --- signing in


def test_a_session_is_worth_what_its_token_is(bench: Api) -> None:
    for path in PAGES:
        response = bench.call("GET", path, None, headers=HTML)
        assert (response.status_code, response.headers["location"]) == (303, "/sign-in")
        live = bench.call("GET", path, None, headers={"HX-Request": "true"})
        assert (live.status_code, live.headers["hx-redirect"]) == (401, "/sign-in")
    assert "covey console" in page(bench, "/sign-in", HTML)

    token = bench.token(Role.OPERATOR, seconds=3600)
    browser = sign_in(bench, token)
    assert "Overview" in page(bench, "/", browser) and "operator" in page(bench, "/", browser)
    # The same cookie opens the API, and is refused like any other when it comes from another site.
    assert bench.call("GET", "/api/v1/whoami", None, headers=browser).json()["role"] == "operator"
    forged = browser | {"Sec-Fetch-Site": "cross-site"}
    assert bench.call("POST", "/fleet/barn-1/include", None, headers=forged).status_code == 403
    bench.context.operator.revoke_token(token.split("_")[1])
    over = bench.call("GET", "/", None, headers=browser)
    assert over.status_code == 303 and cookie_of(over)[SESSION_COOKIE].value == ""

    short = sign_in(bench, bench.token(Role.ADMIN, seconds=60))
    bench.clock.now += 60
    assert bench.call("GET", "/", None, headers=short).status_code == 303
    browser = sign_in(bench, Role.ADMIN)
    out = bench.call("POST", "/auth/logout", None, headers=browser)
    assert out.headers["location"] == "/sign-in"
    assert bench.call("GET", "/", None, headers=browser).status_code == 303


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(bench: Api) -> None:
    for url, secure in (("http://localhost", False), ("https://localhost", True)):
        with httpx.Client(base_url=url, transport=InProcess(bench.app)) as client:
            done = client.post("/auth/token", data={"token": bench.tokens[Role.VIEWER]}, headers=SAME)
        morsel = cookie_of(done)[SESSION_COOKIE]
        assert morsel["httponly"] and morsel["samesite"] == "strict"
        assert bool(morsel["secure"]) == secure
        assert int(morsel["max-age"]) == 8 * 3600


def test_wrong_tokens_open_nothing_and_guessing_is_slow(bench: Api) -> None:
    for token, why in (("guess", "not a token of Covey"), ("a.b.c", "sign in at the issuer")):
        refused = bench.call("POST", "/auth/token", None, data={"token": token}, headers=HTML | SAME)
        assert refused.status_code == 401 and why in refused.text
        assert SESSION_COOKIE not in cookie_of(refused)
    data = {"token": bench.tokens[Role.ADMIN]}
    other = bench.call("POST", "/auth/token", None, data=data, headers={"Sec-Fetch-Site": "cross-site"})
    assert (other.status_code, other.json()["code"]) == (403, "cross-site")
    for _ in range(18):
        bench.call("POST", "/auth/token", None, data={"token": "guess"}, headers=SAME)
    assert bench.call("POST", "/auth/token", None, data=data, headers=SAME).status_code == 429


def test_a_link_opens_one_session_once(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        link = client.sign_in_link()
    used = bench.call("GET", link.path, None, headers=HTML)
    assert used.status_code == 200 and 'content="0;url=/"' in used.text
    browser = HTML | {"Cookie": f"{SESSION_COOKIE}={cookie_of(used)[SESSION_COOKIE].value}"}
    assert "operator" in page(bench, "/", browser)
    assert bench.call("GET", link.path, None, headers=HTML).status_code == 401
    with bench.client(Role.OPERATOR) as client:
        late = client.sign_in_link()
    bench.clock.now = late.expires_at - bench.clock.moment().unix + bench.clock.now
    assert bench.call("GET", late.path, None, headers=HTML).status_code == 401


# --- pages


def test_empty_pages_say_what_to_do_next(bench: Api) -> None:
    browser = sign_in(bench, Role.VIEWER)
    for path, command in (
        ("/", "covey-edge enroll --state edge --ticket barn-1.ticket"),
        ("/", "covey model publish models/zoo/watch"),
        ("/fleet", "covey device token --count 5"),
        ("/rounds", "covey round start"),
        ("/models", "covey model publish"),
        ("/rollouts", "covey model publish"),
        ("/campaigns", "covey model publish"),
        ("/queries", "covey query mean"),
        ("/privacy", "covey privacy plan"),
    ):
        assert command in page(bench, path, browser), path


def test_pages_load_nothing_from_elsewhere_and_hold_no_script_or_style(bench: Api) -> None:
    seed_fleet(bench.context.operator, 30)
    seed_rounds(bench.context.operator)
    browser = sign_in(bench, Role.ADMIN)
    round_id = bench.context.operator.rounds(last=1)[0].record.round_id
    for path in (*PAGES, "/fleet/barn-00001", f"/rounds/{round_id}", "/campaigns/new", "/nothing-here"):
        response = bench.call("GET", path, None, headers=browser)
        policy = response.headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        text = response.text
        for address in re.findall(r'(?:src|href|action|hx-get|sse-connect)="([^"]*)"', text):
            assert re.match(r"/(?!/)", address), (path, address)
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", text), path
    for name in FILES:
        assert bench.call("GET", f"/assets/{name}", None).status_code == 200
    for bad in ("../pages.py", "..%2fpages.py", "README.md"):
        assert bench.call("GET", f"/assets/{bad}", None).status_code == 404


def test_the_libraries_are_the_releases_that_they_say(bench: Api) -> None:
    vendor = FILES["htmx.min.js"].parent
    listed = dict(reversed(line.split()) for line in (vendor / "SHA256SUMS").read_text().splitlines())
    assert listed == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in vendor.iterdir()
        if path.suffix in (".js", ".css")
    }


def test_all_that_devices_say_is_text(bench: Api) -> None:
    operator = bench.context.operator
    with operator.repository.write() as writer:
        writer.add_device(Device("barn-1", b"x", 0.0, excluded=ATTACK, labels=(ATTACK,)))
        said = DeviceStatus(
            session=bytes(32), online=True, client_version="<b>1</b>", runtime="<i>r</i>", models={}
        )
        writer.note_status("barn-1", said, 1.0)
    browser = sign_in(bench, Role.ADMIN)
    for path in ("/fleet", "/fleet/barn-1", "/log", "/fleet/barn-1/include", "/fleet/barn-1/label"):
        text = page(bench, path, browser)
        assert (
            "<script>" not in text and "<img src=x" not in text and "<b>1" not in text and "<i>r" not in text
        )
    assert "&lt;script&gt;alert(1)" in page(bench, "/fleet/barn-1", browser)
    search = bench.call("GET", "/fleet", None, headers=browser, params={"q": ATTACK})
    assert search.status_code == 200 and "<script>alert" not in search.text
    for bad in ("<script>alert(1)</script>", "barn-1'; DROP TABLE devices; --"):
        refused = bench.call("GET", f"/fleet/{bad.replace('/', '%2f')}", None, headers=browser)
        assert refused.status_code in (404, 422) and "<script>alert" not in refused.text
    sql = bench.call("GET", "/fleet", None, headers=browser, params={"q": "' OR 1=1 --"})
    assert "No device fits" in sql.text


def test_a_device_that_serves_nothing_says_why(bench: Api) -> None:
    with bench.context.operator.repository.write() as writer:
        for name, models in (("barn-1", {"watch": 1}), ("barn-2", {"digits": 3})):
            writer.add_device(Device(name, b"x", 0.0))
            failed = {"watch": VersionFailure(version=2, code="crashed", detail="<b>SIGSEGV</b>")}
            said = DeviceStatus(session=bytes(32), online=True, models=models, failures=failed)
            writer.note_status(name, said, 1.0)
    browser = sign_in(bench, Role.VIEWER)
    assert page(bench, "/fleet", browser).count("no watch: 2 failed") == 1, "the other one fell back"
    for name in ("barn-1", "barn-2"):
        text = page(bench, f"/fleet/{name}", browser)
        assert "watch 2 <small>crashed: &lt;b&gt;SIGSEGV" in text
        assert ("no watch: 2 failed" in text) == (name == "barn-2")


def test_every_device_is_on_one_page_and_search_finds_it(bench: Api) -> None:
    seed_fleet(bench.context.operator, 250)
    browser = sign_in(bench, Role.VIEWER)
    seen: list[str] = []
    where = "/fleet"
    while where:
        text = page(bench, where, browser)
        seen += re.findall(r'href="/fleet/(barn-\d{5})"', text)
        found = re.search(r'rel="next"\s+href="([^"]*)"', text)
        where = found[1].replace("&amp;", "&") if found else ""
    assert seen == [f"barn-{index:05d}" for index in range(250)]
    text = page(bench, "/fleet?q=SITE=lake&which=online", browser)
    shown = re.findall(r'href="/fleet/barn-(\d{5})"', text)
    assert shown and all(int(index) % 4 == 3 and int(index) % 7 != 3 for index in shown)
    assert f"{len(shown)} of 250 devices" in text
    assert "barn-00013" in page(bench, "/fleet?which=excluded", browser)
    assert "No device fits" in page(bench, "/fleet?q=%25", browser), "no wildcard of the database's"


def test_a_round_shows_its_phases_and_who_left(bench: Api) -> None:
    seed_fleet(bench.context.operator, 20)
    seed_rounds(bench.context.operator)
    browser = sign_in(bench, Role.VIEWER)
    views = bench.context.operator.rounds()
    live, aborted = views[-1], views[4]
    text = page(bench, f"/rounds/{live.record.round_id}", browser)
    assert re.search(r'<li class="now">.*?Masked input.*?11 of 19', text, re.S)
    assert text.count('<li class="past">') == 2 and text.count('<li class="ahead">') == 2
    text = page(bench, f"/rounds/{aborted.record.round_id}", browser)
    assert "too-few-survivors" in text and "dropped out" in text
    (dropped,) = aborted.report.phases[1].dropped
    assert f'href="/fleet/{dropped}"' in text
    text = page(bench, "/privacy", browser)
    assert "Budget left" in text and "of the latest campaign" in text
    assert page(bench, "/", browser).count('<svg class="chart"') == 2


def test_trouble_shows_at_once(tmp_path: Path) -> None:
    with api(tmp_path, vitals=lambda: Vitals(broker=False, loop=True, trouble="the disk is full")) as bench:
        text = page(bench, "/", sign_in(bench, Role.VIEWER))
    assert "the disk is full" in text and "The broker is not connected" in text


# --- buttons


def test_buttons_ask_and_leave_the_same_trace_as_the_api(bench: Api) -> None:
    with bench.client() as client:
        client.enrol(csr("barn-1"))
    browser = sign_in(bench, Role.OPERATOR)
    asks = page(bench, "/fleet/barn-1/exclude", browser)
    assert "<dialog open" in asks and "for no round that starts from now on" in asks
    assert bench.context.operator.device("barn-1").excluded is None
    done = bench.call("POST", "/fleet/barn-1/exclude", None, data={"reason": "broken"}, headers=browser)
    assert (done.status_code, done.headers["location"]) == (303, "/fleet/barn-1")
    assert bench.context.operator.device("barn-1").excluded == "broken"
    entry = bench.context.operator.audit_log(limit=1)[0]
    assert (entry.action, entry.target, entry.outcome, entry.role) == (
        "exclude-device",
        "barn-1",
        "done",
        "operator",
    )
    assert entry.who.startswith("token:")

    bench.call("POST", "/fleet/barn-1/include", None, headers=browser)
    assert bench.context.operator.device("barn-1").excluded is None
    bench.call("POST", "/fleet/barn-1/label", None, data={"labels": " site=north  barn "}, headers=browser)
    assert bench.context.operator.device("barn-1").labels == ("barn", "site=north")
    bad = bench.call("POST", "/fleet/barn-1/label", None, data={"labels": "<b>"}, headers=browser)
    assert bad.status_code == 422 and "lower-case letters" in bad.text
    assert bench.context.operator.audit_log(limit=1)[0].outcome == "invalid-request"

    seed_rounds(bench.context.operator, 1, running=False)
    form = {"model": "nothing", "rounds": "3", "cohort": "5", "privacy": "none", "epsilon_limit": ""}
    refused = bench.call("POST", "/campaigns", None, data=form, headers=browser)
    assert refused.status_code == 409 and "covey model publish" in refused.text


def test_every_turn_of_a_device_asks_in_its_own_words(bench: Api) -> None:
    seed_fleet(bench.context.operator, 3)
    bench.context.operator.exclude("barn-00001", "its <b>shares</b> did not fit")
    browser = sign_in(bench, Role.OPERATOR)
    for turn, question, consequence, reason in (
        ("exclude", "Exclude barn-00001 from rounds?", "until somebody includes it again", True),
        ("include", "Include barn-00001 again?", "its &lt;b&gt;shares&lt;/b&gt; did not fit", False),
        ("revoke", "Revoke barn-00001?", "stolen or that lies", True),
        ("retire", "Retire barn-00001?", "broken, sold or put away", False),
    ):
        where = f"/fleet/barn-00001/{turn}"
        asks = page(bench, where, browser)
        assert question in asks and consequence in asks, turn
        assert f'action="{where}"' in asks and ('name="reason"' in asks) == reason, turn
        assert ('<button class="danger">' in asks) == (turn != "include"), turn
        page(bench, f"/fleet/barn-99999/{turn}", browser, 404)
    page(bench, "/fleet/barn-00001/explode", browser, 422)
    assert bench.context.operator.audit_log() == (), "asking changes nothing"


def test_a_version_is_pinned_and_let_go_by_buttons(bench: Api) -> None:
    operator = bench.context.operator
    seed_fleet(operator, 3)
    seed_rounds(operator, 1, running=False)
    browser, viewer = sign_in(bench, Role.OPERATOR), sign_in(bench, Role.VIEWER)
    assert 'href="/pins/new"' in page(bench, "/rollouts", browser)
    assert 'href="/pins' not in page(bench, "/rollouts", viewer)
    assert "whatever rollouts bring" in page(bench, "/pins/new", browser)
    given = {"model": "watch", "version": "1", "kind": "group", "target": "site=north"}
    assert bench.call("POST", "/pins", None, data=given, headers=viewer).status_code == 403
    for wrong, status in (({"version": "99"}, 404), ({"kind": "all"}, 422), ({"target": ""}, 422)):
        assert bench.call("POST", "/pins", None, data=given | wrong, headers=browser).status_code == status
    assert operator.pins() == ()
    assert bench.call("POST", "/pins", None, data=given, headers=browser).status_code == 303
    assert [(pin.kind, pin.target, pin.version) for pin in operator.pins()] == [("group", "site=north", 1)]
    assert operator.audit_log(limit=1)[0].action == "pin-version"
    (where,) = re.findall(r'href="(/pins/remove[^"]*)"', page(bench, "/rollouts", browser))
    where = where.replace("&amp;", "&")
    assert "target=site%3Dnorth" in where
    assert "Remove the pin of watch for site=north?" in page(bench, where, browser)
    assert operator.pins(), "asking changes nothing"
    del given["version"]
    assert bench.call("POST", "/pins/remove", None, data=given, headers=browser).status_code == 303
    assert operator.pins() == () and operator.audit_log(limit=1)[0].action == "unpin-version"
    again = bench.call("POST", "/pins/remove", None, data=given, headers=browser)
    assert again.status_code == 404 and "covey model pins" in again.text


def test_a_version_is_rolled_out_and_taken_back_by_buttons(bench: Api) -> None:
    operator = bench.context.operator
    seed_fleet(operator, 20)
    seed_rounds(operator, 2, running=False)
    newest = operator.versions()[-1].version
    browser = sign_in(bench, Role.OPERATOR)
    where = f"/models/watch/{newest}/roll-out"
    assert f'href="{where}"' in page(bench, "/models", browser)
    assert "A failed gate halts it" in page(bench, where, browser)
    for percent in ("5;x", "100,5"):
        data = {"percent": percent, "gate": "", "group": ""}
        assert bench.call("POST", where, None, data=data, headers=browser).status_code in (409, 422)
    data = {"percent": "25,100", "gate": "errors<0.01 accuracy>=0.8", "group": "site=north"}
    assert bench.call("POST", where, None, data=data, headers=browser).status_code == 303
    (view,) = operator.rollouts()
    assert (view.record.status, view.settings.percents, view.settings.group) == (
        "running",
        (25, 100),
        "site=north",
    )
    shown = page(bench, "/rollouts", browser)
    assert "errors&lt;0.01" in shown and "site=north" in shown
    rollout = f"/rollouts/{view.record.rollout_id}"
    for turn, action, status in (
        ("pause", "pause-rollout", "paused"),
        ("resume", "resume-rollout", "running"),
        ("rollback", "roll-back-rollout", "rolled-back"),
    ):
        assert f'href="{rollout}/{turn}"' in page(bench, "/rollouts", browser)
        assert "<dialog open" in page(bench, f"{rollout}/{turn}", browser)
        reason = {} if turn == "resume" else {"reason": "it is hot"}
        done = bench.call("POST", f"{rollout}/{turn}", None, data=reason, headers=browser)
        assert (done.status_code, operator.rollouts()[0].record.status) == (303, status)
        assert operator.audit_log(limit=1)[0].action == action
    assert 'href="/rollouts/' not in page(bench, "/rollouts", browser)
    again = bench.call("POST", f"{rollout}/halt", None, data={"reason": "x"}, headers=browser)
    assert again.status_code == 409 and "covey rollout status" in again.text
    assert bench.call("POST", f"/models/watch/{newest}/withdraw", None, headers=browser).status_code == 303
    assert operator.versions()[-1].stage == "withdrawn"


def test_a_campaign_is_paused_resumed_and_cancelled_by_buttons(bench: Api) -> None:
    seed_rounds(bench.context.operator, 1)
    (campaign,) = bench.context.operator.campaigns()
    browser = sign_in(bench, Role.OPERATOR)
    for turn, status in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
        where = f"/campaigns/{campaign.campaign_id}/{turn}"
        assert f'href="{where}"' in page(bench, "/campaigns", browser)
        before = bench.context.operator.campaign(campaign.campaign_id).status
        assert "<dialog open" in page(bench, where, browser)
        assert bench.context.operator.campaign(campaign.campaign_id).status == before
        assert bench.call("POST", where, None, headers=browser).status_code == 303
        assert bench.context.operator.campaign(campaign.campaign_id).status == status
        entry = bench.context.operator.audit_log(limit=1)[0]
        assert (entry.action, entry.target) == (f"{turn}-campaign", campaign.campaign_id)
    assert "/cancel" not in page(bench, "/campaigns", browser)


def test_a_viewer_sees_no_buttons_and_is_refused_anyway(bench: Api) -> None:
    seed_fleet(bench.context.operator, 3)
    browser = sign_in(bench, Role.VIEWER)
    for path in ("/fleet/barn-00000", "/campaigns", "/models", "/rollouts"):
        assert 'class="actions"' not in page(bench, path, browser)
    assert "What people did" not in page(bench, "/log", browser)
    assert "needs the role operator" in page(bench, "/fleet/barn-00000/exclude", browser, 403)
    refused = bench.call("POST", "/fleet/barn-00000/exclude", None, data={"reason": "x"}, headers=browser)
    assert refused.status_code == 403
    assert bench.context.operator.device("barn-00000").excluded is None
    entry = bench.context.operator.audit_log(limit=1)[0]
    assert (entry.action, entry.outcome, entry.role) == ("exclude-device", "forbidden", "viewer")
    assert "forbidden" in page(bench, "/log", sign_in(bench, Role.ADMIN))


def test_colours_are_chosen_and_lead_nowhere_else(bench: Api) -> None:
    chosen = bench.call("POST", "/theme", None, data={"theme": "dark", "back": "/fleet?q=a"}, headers=SAME)
    assert (chosen.status_code, chosen.headers["location"]) == (303, "/fleet?q=a")
    cookie = {"Cookie": f"covey_theme={cookie_of(chosen)['covey_theme'].value}"}
    assert 'data-theme="dark"' in page(bench, "/sign-in", HTML | cookie)
    for back in ("//evil.example", "https://evil.example", "/\\evil.example", "/\t/evil.example", "x"):
        bad = bench.call("POST", "/theme", None, data={"theme": "dark", "back": back}, headers=SAME)
        assert bad.status_code == 422, back


# --- live


def test_however_much_happens_pages_hear_of_it_once_a_kind() -> None:
    async def scenario() -> None:
        feed = EventFeed()
        welcome = True
        stream = ticks(feed, lambda: welcome, pause=0.01, check=0.05)

        async def heard(number: int) -> list[str]:
            frames: list[str] = []
            async for frame in stream:
                if frame.startswith("event: "):
                    frames.append(frame.split("\n")[0].removeprefix("event: "))
                if len(frames) == number:
                    break
            return frames

        assert (await anext(stream)).startswith("retry:")
        for number in range(3000):
            feed.publish("device", {"device": f"barn-{number}"})
        feed.publish("round", {"round": "x"})
        assert await heard(2) == ["device", "round"]
        feed.publish("version", {"version": 2})
        assert await heard(1) == ["version"]
        for _ in range(10_000):
            feed.publish("device", {})
        assert await heard(4) == ["device", "version", "campaign", "round"]
        welcome = False
        assert await heard(1) == [], "it ends by itself"

        again = ticks(feed, lambda: True, pause=0.01)
        await anext(again)
        feed.close()
        assert [frame async for frame in again] == []

    asyncio.run(scenario())


# --- charts


def test_charts_have_round_steps_around_their_values() -> None:
    svg = str(line_chart([Series("<a>", ((1.0, 0.41), (2.0, 0.83)))], title="<t>", x="version", share=True))
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == ["40 %", "60 %", "80 %", "100 %"]
    assert "<t>" not in svg and "<a>" not in svg and "&lt;a&gt;, version 2: 83 %" in svg
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    assert heights[0] > heights[1], "more is higher"
    assert line_chart([Series("none", ())], title="", x="") == ""
    for value in (0.0, 5.0, -3.0, 1e9):
        assert "polyline" in line_chart([Series("one", ((1.0, value),))], title="", x="round")
