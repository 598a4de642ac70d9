"""The console in real headless Chromium, on the real service with a real broker and devices."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("selenium")

from typer.testing import CliRunner

from aggregator import main as covey
from aggregator.access.roles import Role
from aggregator.cli import app
from aggregator.operations import Operator
from aggregator.records import Campaign
from aggregator.refusals import OperationRefused
from aggregator.settings import CampaignRequest
from aggregator.web.context import Vitals
from aggregator.web.listen import ListenAddress
from aggregator.web.server import ApiServer
from deploy.broker import BrokerProcess
from protocol.plan import Deadlines
from tests.aggregator_devices import model_files
from tests.aggregator_process import ServiceProcess, SimulatedFleet
from tests.api_bench import Api, api
from tests.console_bench import CHROMIUM, DRIVER, PHONE, Browser, browser, seed_fleet, seed_rounds

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="Chromium or its driver is not installed"),
]
PAGES = (
    "/",
    "/fleet",
    "/rounds",
    "/models",
    "/rollouts",
    "/campaigns",
    "/queries",
    "/privacy",
    "/tokens",
    "/log",
)
FORMS = ("/tokens/new", "/models/publish", "/queries/new/quantile", "/fleet/barn-00003/revoke", "/pins/new")
CONTRAST = """
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
let worst = [99, ''];
const texts = 'h1, h2, h3, td, th, dt, dd, small, strong, p, label, summary, code, .badge, .places a, '
  + 'button, [role=button]';
for (const element of document.querySelectorAll(texts)) {
  if (!element.textContent.trim() || !element.offsetParent || element.closest('.ahead')) continue;
  let ground = element, colour = [];
  for (; ground; ground = ground.parentElement) {
    colour = channels(getComputedStyle(ground).backgroundColor);
    if (colour.length === 3) break;
  }
  const [a, b] = [channels(getComputedStyle(element).color), colour].map(luminance);
  const found = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (found < worst[0]) worst = [found, element.outerHTML.slice(0, 120)];
}
return worst;
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def chromium(opened: Browser) -> Browser:
    """The one browser, without the page and the complaints of the test before."""
    opened.driver.get("about:blank")
    hosts(opened), complaints(opened)
    return opened


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[tuple[Api, str]]:
    with (
        api(tmp_path, vitals=lambda: Vitals(broker=True, loop=True)) as found,
        ApiServer(found.app, ListenAddress.parse("127.0.0.1:0")) as server,
    ):
        seed_fleet(found.context.operator, 120)
        seed_rounds(found.context.operator)
        yield found, server.url


def complaints(chromium: Browser) -> list[str]:
    """What the browser had to say, such as that the policy forbade something.

    Leaving a page cuts its event stream, and htmx may still say so: as an event that has no text.
    """
    said = chromium.driver.get_log("browser")
    loud = [entry["message"] for entry in said if entry["level"] in ("SEVERE", "WARNING")]
    return [message for message in loud if not ("/htmx.min.js" in message and '"[object Event]"' in message)]


def hosts(chromium: Browser) -> set[str]:
    """Where pages have loaded something from."""
    found = set()
    for entry in chromium.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = urlsplit(message["params"]["request"]["url"])
            if address.scheme != "data":
                found.add(address.netloc)
    return found


def test_every_page_at_a_desk_on_a_phone_light_and_dark(bench: tuple[Api, str], chromium: Browser) -> None:
    found, url = bench
    chromium.size(1280, 900)
    chromium.driver.get(url)
    chromium.wait(lambda: "Sign in" in chromium.driver.title)
    hosts(chromium), complaints(chromium)
    chromium.sign_in(url, found.tokens[Role.ADMIN])
    round_id = found.context.operator.rounds()[4].record.round_id
    for scheme in ("light", "dark"):
        for width, height in ((1280, 900), PHONE):
            chromium.size(width, height)
            chromium.driver.get(url)
            chromium.follow(f"button[value={scheme}]")
            for path in (*PAGES, *FORMS, "/fleet/barn-00003", f"/rounds/{round_id}"):
                chromium.driver.get(url + path)
                assert chromium.overflow() == 0, (path, width)
                contrast, where = chromium.driver.execute_script(CONTRAST)
                assert contrast >= 4.5, (scheme, path, where)
            ground = chromium.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 150) == (scheme == "dark")
    assert complaints(chromium) == []
    assert hosts(chromium) == {urlsplit(url).netloc}
    # The page's own connection stays open: nothing of htmx was forbidden.
    chromium.driver.get(url)
    assert chromium.driver.execute_script("return typeof htmx.process") == "function"


def test_a_device_is_pinned_on_a_phone(bench: tuple[Api, str], chromium: Browser) -> None:
    found, url = bench
    operator = found.context.operator
    version = operator.versions()[0]
    chromium.size(*PHONE)
    chromium.sign_in(url, found.tokens[Role.OPERATOR])
    for answer in ("Cancel", "Pin"):
        chromium.driver.get(f"{url}/rollouts")
        chromium.click("a[href='/pins/new']")
        chromium.wait(lambda: chromium.count("dialog[open]"))
        chromium.one("dialog input[name=version]").send_keys(str(version.version))
        chromium.one("dialog input[name=target]").send_keys("barn-00003")
        chromium.follow("dialog a" if answer == "Cancel" else "dialog button")
        assert chromium.count("dialog") == 0
        assert len(operator.pins()) == (answer == "Pin")
    for scheme in ("light", "dark"):
        chromium.follow(f"button[value={scheme}]")
        chromium.driver.get(f"{url}/rollouts")
        assert "barn-00003" in chromium.text("#page") and chromium.overflow() == 0
        assert chromium.driver.execute_script(CONTRAST)[0] >= 4.5
    chromium.click("a[href^='/pins/remove']")
    chromium.wait(lambda: chromium.count("dialog[open]"))
    assert f"Remove the pin of {version.model} for barn-00003?" in chromium.text("dialog")
    assert len(operator.pins()) == 1
    chromium.follow("dialog button")
    assert chromium.count("dialog") == 0
    assert operator.pins() == () and complaints(chromium) == []


def test_a_button_asks_and_acts_only_when_answered(bench: tuple[Api, str], chromium: Browser) -> None:
    found, url = bench
    operator = found.context.operator
    chromium.size(1280, 900)
    chromium.sign_in(url, found.tokens[Role.OPERATOR])
    for answer in ("Cancel", "Exclude"):
        chromium.driver.get(f"{url}/fleet/barn-00004")
        chromium.click("a.danger")
        chromium.wait(lambda: chromium.count("dialog[open]"))
        assert "Exclude barn-00004 from rounds?" in chromium.text("dialog")
        assert operator.device("barn-00004").excluded is None
        chromium.follow("dialog a" if answer == "Cancel" else "dialog button")
        assert chromium.count("dialog") == 0
        assert operator.device("barn-00004").excluded == (None if answer == "Cancel" else "by the operator")
    assert "excluded" in chromium.text("#page")
    chromium.follow("form[action='/auth/logout'] button")
    chromium.wait(lambda: "Sign in" in chromium.driver.title)

    chromium.sign_in(url, found.tokens[Role.VIEWER])
    for path in ("/fleet/barn-00004", "/models", "/campaigns"):
        chromium.driver.get(url + path)
        assert chromium.count(".actions, .row-actions a") == 0
    chromium.driver.get(f"{url}/fleet/barn-00004/include")
    assert "needs the role operator" in chromium.text()
    post = """const form = document.createElement('form'); form.method = 'post';
      form.action = '/fleet/barn-00004/include'; document.body.append(form); form.submit();"""
    chromium.driver.execute_script(post)
    chromium.wait(lambda: "403" in chromium.text())
    assert operator.device("barn-00004").excluded == "by the operator"


def test_a_token_a_model_and_a_question_from_the_console(
    bench: tuple[Api, str], chromium: Browser, tmp_path: Path
) -> None:
    found, url = bench
    operator = found.context.operator
    chromium.size(*PHONE)
    chromium.sign_in(url, found.tokens[Role.ADMIN])

    chromium.driver.get(f"{url}/tokens")
    chromium.click("a[href='/tokens/new']")
    chromium.wait(lambda: chromium.count("dialog[open]"))
    chromium.one("dialog input[name=label]").send_keys("wall")
    chromium.follow("dialog button")
    secret = chromium.text(".secret code")
    token = secret.split("_")[1]
    assert found.call("GET", "/api/v1/whoami", secret).json()["role"] == "viewer"
    assert chromium.overflow() == 0 and chromium.driver.execute_script(CONTRAST)[0] >= 4.5
    chromium.follow("a[role=button][href='/tokens']")
    assert secret not in chromium.driver.page_source and "wall" in chromium.text("#page")
    for answer in ("Cancel", "Revoke"):
        chromium.click(f"a[href='/tokens/{token}/revoke']")
        chromium.wait(lambda: chromium.count("dialog[open]"))
        assert f"Revoke {token} wall?" in chromium.text("dialog")
        chromium.follow("dialog a" if answer == "Cancel" else "dialog button")
        still = found.call("GET", "/api/v1/whoami", secret).status_code
        assert still == (200 if answer == "Cancel" else 401)

    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in zip(("manifest.json", "model.tflite", "weights.bin"), model_files(50), strict=True):
        (folder / name).write_bytes(data)
    for chosen in (("manifest.json", "model.tflite"), ("manifest.json", "model.tflite", "weights.bin")):
        chromium.driver.get(f"{url}/models")
        chromium.click("a[href='/models/publish']")
        chromium.wait(lambda: chromium.count("dialog input[type=file]"))
        paths = "\n".join(str(folder / name) for name in chosen)
        chromium.one("dialog input[type=file]").send_keys(paths)
        chromium.follow("dialog button")
        if len(chosen) == 2:
            assert "weights.bin missing" in chromium.text() and operator.versions("toy") == ()
    assert "toy" in chromium.text("#page") and len(operator.versions("toy")) == 1

    chromium.driver.get(f"{url}/queries")
    chromium.click("a[href='/queries/new/quantile']")
    chromium.wait(lambda: chromium.count("dialog[open]"))
    for name, value in (("field", "battery"), ("low", "80"), ("high", "20")):
        chromium.one(f"dialog input[name={name}]").send_keys(value)
    chromium.follow("dialog button")
    assert "low" in chromium.text("dialog .notice") and not queries(operator)
    low = chromium.one("dialog input[name=low]")
    assert low.get_attribute("value") == "80", "what was filled in is still there"
    low.clear()
    low.send_keys("0")
    chromium.follow("dialog button")
    assert "quantile of battery" in chromium.text("#page") and len(queries(operator)) == 1
    chromium.click("a[href$='/cancel']")
    chromium.wait(lambda: chromium.count("dialog[open]"))
    chromium.follow("dialog button")
    assert [each.status for each in queries(operator)] == ["cancelled"]
    said = [each for each in complaints(chromium) if "422" not in each and "409" not in each]
    assert said == []


def queries(operator: Operator) -> list[Campaign]:
    """What the fleet was asked."""
    return [campaign for campaign in operator.campaigns() if campaign.model is None]


def test_search_finds_while_the_page_refreshes_itself(bench: tuple[Api, str], chromium: Browser) -> None:
    found, url = bench
    chromium.sign_in(url, found.tokens[Role.VIEWER])
    chromium.driver.get(f"{url}/fleet")
    box = chromium.one("input[type=search]")
    box.send_keys("barn-0001")
    found.context.operator.label("barn-00000", ["fresh"])
    chromium.wait(lambda: "fresh" in chromium.text("#page"))
    assert box.get_attribute("value") == "barn-0001", "what somebody types stays"
    box.submit()
    chromium.wait(lambda: "10 of 120 devices" in chromium.text("#page"))


def test_a_round_moves_while_one_watches(
    tmp_path: Path, mosquitto: BrokerProcess, chromium: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVEY_STATE", raising=False)
    state = tmp_path / "state"
    covey.init(state, fleet="orchard")
    request = CampaignRequest(
        "toy",
        rounds=2,
        cohort=4,
        minimum=3,
        min_survivors=3,
        gather_seconds=20.0,
        deadlines=Deadlines(masked_input=60, offline_grace=1.0),
    )
    with (
        SimulatedFleet(state, mosquitto.host, mosquitto.port, devices=4, parameters=2000) as fleet,
        ServiceProcess(state, mosquitto.url) as service,
    ):
        fleet.pause = 0.4
        link = tmp_path / "link"
        deadline = time.monotonic() + 120
        while not link.exists():
            printed = CliRunner().invoke(app, ["console", "--state", str(state)])
            if printed.exit_code == 0:
                link.write_text(printed.stdout.split()[0])
            else:
                assert isinstance(printed.exception, OperationRefused), printed.exception
            assert time.monotonic() < deadline, printed.output
            time.sleep(0.2)
        chromium.size(1280, 900)
        chromium.driver.get(link.read_text())
        chromium.wait(lambda: "Overview" in chromium.driver.title)
        for name in fleet.devices:
            fleet.come_back(name)
        tile = "a[href='/fleet?which=online'] strong"
        chromium.wait(lambda: chromium.text(tile) == "4")
        with covey.connect(state) as client:
            client.start_rounds(request)
        seen: set[str] = set()

        def over() -> bool:
            script = "return document.querySelector('.phases .now .phase-name span')?.innerText ?? ''"
            seen.add(chromium.driver.execute_script(script))
            return "completed" in chromium.text("#page") and "2 to 3" in chromium.text("#page")

        chromium.wait(over, 90)
        # Without a reload; at most two pictures a second, so that short phases may pass unseen.
        assert (
            len(seen & {"Advertise keys", "Share keys", "Masked input", "Consistency check", "Unmasking"})
            >= 2
        )
        assert "toy 3" in chromium.text("a[href='/models'] strong")
        fleet.hang_up("device-3")
        chromium.wait(lambda: chromium.text(tile) == "3")
        service.end(signal.SIGTERM)
        assert link.read_text().rpartition("=")[2] not in service.log
