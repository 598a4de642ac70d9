"""The console with something to show, and a real browser to look at it with."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from selenium import webdriver
from selenium.common.exceptions import (
    ElementNotInteractableException,
    JavascriptException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from aggregator.operations import Operator
from aggregator.records import Campaign, Device, Round, RoundEnding, Version
from aggregator.rounds.report import PHASES, BufferReport, PhaseReport, RoundReport
from aggregator.settings import CampaignRequest, Mode
from protocol.dp.parameters import PrivacyMode
from protocol.identity import SignedDocument
from protocol.messages import DeviceStatus
from protocol.plan import MODEL_KIND

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PHONE = (390, 844)
DESK = (1280, 900)
_CHANGING = (
    ElementNotInteractableException,
    JavascriptException,
    NoSuchElementException,
    StaleElementReferenceException,
)
_NOTHING = SignedDocument.create(Ed25519PrivateKey.generate(), MODEL_KIND, b"nothing to load")
DOCUMENT = _NOTHING.model_dump_json().encode()
SITES = ("north", "south", "orchard", "lake")


def seed_fleet(operator: Operator, devices: int) -> None:
    """Enrols devices as they would be after months: some offline, a few excluded, labelled by site."""
    now = operator.clock.moment().unix
    with operator.repository.write() as writer:
        for index in range(devices):
            name = f"barn-{index:05d}"
            excluded = "its shares did not fit" if index % 997 == 13 else None
            labels = tuple(sorted((f"site={SITES[index % 4]}", "camera" if index % 3 else "scale")))
            writer.add_device(
                Device(name, b"certificate", now - 86_400 * 30, excluded=excluded, labels=labels)
            )
            status = DeviceStatus(
                session=bytes(32),
                online=index % 7 != 3,
                client_version="1.4.2" if index % 11 else "1.4.1",
                runtime="tflite 2.14.0",
                models={"watch": 12 if index % 5 else 11},
            )
            writer.note_status(name, status, now - (30.0 if status.online else 7200.0 + index))


def seed_rounds(operator: Operator, rounds: int = 12, *, running: bool = True) -> None:
    """A campaign with that many rounds behind it, one of them aborted, and one in its third phase."""
    now = operator.clock.moment().unix
    names = tuple(f"barn-{index:05d}" for index in range(20))
    count, settings = CampaignRequest(
        "watch", rounds=20, cohort=20, privacy=PrivacyMode.DISTRIBUTED, epsilon_limit=8.0
    ).resolve()
    campaign = Campaign(secrets.token_hex(16), "watch", count, settings.to_bytes(), now - 40_000)
    with operator.repository.write() as writer:
        writer.add_campaign(campaign)
        writer.add_version(Version("watch", 1, "ab" * 32, DOCUMENT, now - 90_000))
        version = 1
        for number in range(1, rounds + 2):
            began = now - 1800.0 * (rounds + 1 - number) - 24
            live, aborted = number > rounds, number == 5
            if live and not running:
                break
            round_id = secrets.token_hex(16)
            seed = bytes(32)
            writer.begin_round(
                Round(round_id, campaign.campaign_id, number, "watch", version, b"{}", seed, names, began)
            )
            report = _report(names, number, began, 3 if live or aborted else 5, live=live)
            writer.save_report(round_id, report.to_bytes())
            if live:
                break
            if not aborted:
                version += 1
            writer.end_round(
                RoundEnding(
                    round_id=round_id,
                    status="aborted" if aborted else "completed",
                    ended_at=began + 42.0,
                    code="too-few-survivors" if aborted else "",
                    detail="11 of 14 devices that the sum needs" if aborted else "",
                    report=report.to_bytes(),
                    version=None
                    if aborted
                    else Version("watch", version, f"{number:02x}" * 32, DOCUMENT, began + 42.0, round_id),
                    ledger=None,
                    transcript=(),
                )
            )


def seed_buffers(operator: Operator, rounds: int = 5) -> None:
    """A buffered campaign of `field` with that many buffers behind it, whose updates were of mixed age."""
    now = operator.clock.moment().unix
    names = tuple(f"barn-{index:05d}" for index in range(6))
    count, settings = CampaignRequest("field", rounds=200, cohort=6, mode=Mode.BUFFERED).resolve()
    campaign = Campaign(secrets.token_hex(16), "field", count, settings.to_bytes(), now - 4000)
    with operator.repository.write() as writer:
        writer.add_campaign(campaign)
        writer.add_version(Version("field", 1, "ab" * 32, DOCUMENT, now - 90_000))
        for number in range(1, rounds + 1):
            began, round_id = now - 60.0 * (rounds + 1 - number), secrets.token_hex(16)
            # All but the last device make it; the one before the last is slower with every buffer.
            staleness = {name: min(index, 1) for index, name in enumerate(names)} | {names[4]: number + 1}
            buffer = BufferReport(staleness=staleness, too_old=names[5:] if number == 3 else ())
            made = _report(names, 1, began, 5, live=False)
            report = made.model_copy(update={"buffer": buffer, "survivors": names[:5]}).to_bytes()
            begun = Round(
                round_id, campaign.campaign_id, number, "field", number, b"{}", bytes(32), names, began
            )
            writer.begin_round(begun)
            version = Version("field", number + 1, f"{number:02x}" * 32, DOCUMENT, began + 9.0, round_id)
            writer.end_round(
                RoundEnding(
                    round_id=round_id,
                    status="completed",
                    ended_at=began + 9.0,
                    code="",
                    detail="",
                    report=report,
                    version=version,
                    ledger=None,
                    transcript=(),
                )
            )


def _report(names: tuple[str, ...], number: int, began: float, reached: int, *, live: bool) -> RoundReport:
    size = len(names)
    lost = (names[number % size], names[(number + 7) % size])
    phases = []
    for index, phase in enumerate(PHASES[:reached]):
        open_ = live and index == reached - 1
        expected = size if index < 2 else size - 1
        phases.append(
            PhaseReport(
                phase=phase,
                started=began + 8.0 * index,
                ended=None if open_ else began + 8.0 * (index + 1),
                expected=expected,
                answered=11 if open_ else expected - (1 if index in (1, 2) else 0),
                dropped=() if open_ else (lost[:1] if index == 1 else lost[1:] if index == 2 else ()),
            )
        )
    done = reached == 5
    return RoundReport(
        phases=tuple(phases),
        survivors=tuple(name for name in names if name not in lost) if done else (),
        metrics={"accuracy": 0.88 - 0.5 * math.exp(-number / 4), "loss_after": 0.3 + math.exp(-number / 3)}
        if done
        else {},
        epsilon=0.45 * math.sqrt(number) * 1.4 if done else None,
        delta=1e-5 if done else None,
    )


class Browser:
    """Headless Chromium, in a profile of its own."""

    def __init__(self, profile: Path, *, dark: bool = False) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for argument in (
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ):
            options.add_argument(argument)
        # All that the page logs, and every address that it asks for.
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.set_capability("acceptInsecureCerts", True)
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.size(*DESK)

    def size(self, width: int, height: int) -> None:
        """Sets the size of the page, as a device of that size has it."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def sign_in(self, url: str, token: str) -> None:
        """Signs in by a token, as a person does."""
        self.driver.get(f"{url}/sign-in")
        self.one("input[name=token]").send_keys(token)
        self.follow("form[action='/auth/token'] button")
        self.wait(lambda: "Overview" in self.driver.title)

    def click(self, selector: str) -> None:
        """Clicks on the first element that fits, as soon as there is one; pages replace theirs."""

        def clicked() -> bool:
            self.one(selector).click()
            return True

        self.wait(clicked)

    def follow(self, selector: str) -> None:
        """Clicks on what leads to another page, and waits until that is there."""
        self.driver.execute_script("window.left = true")
        self.click(selector)
        arrived = "return window.left === undefined && document.readyState === 'complete'"
        self.wait(lambda: self.driver.execute_script(arrived))

    def one(self, selector: str) -> WebElement:
        """The first element that fits."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def count(self, selector: str) -> int:
        """How many elements fit."""
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str = "main") -> str:
        """What is to be read there."""
        return str(
            self.driver.execute_script("return document.querySelector(arguments[0]).innerText", selector)
        )

    def wait(self, done: Callable[[], object], seconds: float = 60.0) -> None:
        """Waits until a condition holds; while a page changes, elements and scripts come to nothing."""
        waiting = WebDriverWait(self.driver, seconds, poll_frequency=0.05, ignored_exceptions=_CHANGING)
        waiting.until(lambda _: done())

    def overflow(self) -> int:
        """Pixels by which the page is wider than the screen."""
        script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.driver.execute_script(script))

    def shot(self, path: Path) -> None:
        """Takes a picture of what shows."""
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(profile: Path, *, dark: bool = False) -> Iterator[Browser]:
    """Opens a browser while the block lasts."""
    found = Browser(profile, dark=dark)
    try:
        yield found
    finally:
        found.driver.quit()
