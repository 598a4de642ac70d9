"""The report: complete, self-contained, and the same figures in every form."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("rich")

from rich.console import Console

from deploy.demo import report
from deploy.demo.result import (
    ConfusionMatrix,
    DemoResult,
    Dropout,
    ModelVersion,
    PersonAccuracy,
    PhaseSpan,
)

EXERCISES = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
PHASES = {
    "AdvertiseKeys": 0.4,
    "ShareKeys": 0.3,
    "MaskedInput": 1.5,
    "ConsistencyCheck": 0.2,
    "Unmasking": 0.3,
}


def made_up_result(*, rounds: int = 15, **changes: Any) -> DemoResult:
    """A result with invented figures of a plausible shape."""
    timeline, clock = [], 9.0
    for number in range(1, rounds + 1):
        for index, (phase, seconds) in enumerate(PHASES.items()):
            end = clock + seconds * (1 + 0.3 * ((number * 7 + index * 3) % 5) / 5)
            timeline.append(PhaseSpan(round=number, phase=phase, start=clock, end=end))
            clock = end
    dropouts = (
        Dropout(round=4, device="watch-3", phase="MaskedInput", at=19.6, returned_round=5),
        Dropout(round=7, device="watch-6", phase="AdvertiseKeys", at=27.4, returned_round=9),
    )
    size = len(EXERCISES)
    counts = tuple(
        tuple(400 + 11 * row if row == column else (row * 5 + column * 3) % 7 * 9 for column in range(size))
        for row in range(size)
    )
    fields: dict[str, object] = {
        "dataset": "watch",
        "devices": 8,
        "folds": 1,
        "rounds": rounds,
        "seed": 7,
        "broker": "mosquitto",
        "runtime": "tflite-runtime 2.14.0",
        "local_accuracy": 0.612,
        "federated_accuracy": 0.831,
        "central_accuracy": 0.846,
        "device_predictions_right": 0.829,
        "accuracy_per_round": (*(0.831 - 0.69 * math.exp(-index / 3) for index in range(rounds)), 0.831),
        "people": (
            PersonAccuracy(person="person 4", fold=0, examples=468, local=0.58, federated=0.80, central=0.83),
            PersonAccuracy(
                person="person 9", fold=0, examples=1472, local=0.64, federated=0.86, central=0.86
            ),
        ),
        "confusion": ConfusionMatrix(labels=EXERCISES, counts=counts),
        "privacy": "distributed",
        "epsilon": 184.2,
        "delta": 1e-5,
        "privacy_unit": "device",
        "noise_multiplier": 0.35,
        "clip_norm": 1.0,
        "dropouts_survived": 2,
        "dropouts": dropouts,
        "timeline": tuple(timeline),
        "seconds_per_phase": PHASES,
        "upload_bytes_per_round": 23_456,
        "download_bytes_per_round": 61_200,
        "device_peak_rss_bytes": 58_300_000,
        "wall_seconds": 95.2,
        "round_seconds": 43.1,
        "model_versions": (
            ModelVersion(version=1, sha256="1f" * 32, note="before training"),
            ModelVersion(version=2, sha256="a3" * 32, note="after round 15"),
        ),
    }
    return DemoResult.model_validate(fields | changes)


class PageParser(HTMLParser):
    """Collects what a page would load, its ids and its text; objects to tags that do not match."""

    VOID = frozenset({"meta", "link", "br", "img", "use", "path", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Records references and ids."""
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Records references and ids of an empty element."""
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        """Checks that the element was the last one opened."""
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collects text."""
        self.text += data

    def closed(self) -> bool:
        """Whether every element was closed."""
        return not self._open


def parse(page: str) -> PageParser:
    """Parses a page and checks its tags."""
    parser = PageParser()
    parser.feed(page)
    parser.close()
    assert parser.closed()
    return parser


def test_page_loads_nothing_and_is_well_formed() -> None:
    page = report.render_page(made_up_result())
    parsed = parse(page)
    assert not parsed.loads
    assert "url(http" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "default-src 'none'" in page


def test_page_shows_the_figures() -> None:
    text = parse(report.render_page(made_up_result())).text
    for figure in (
        "83.1%",
        "61.2%",
        "84.6%",
        "184",
        "23.5\u00a0kB",
        "56\u00a0MiB",
        "43.1\u00a0s",
    ):
        assert figure in text
    assert "+21.9" in text
    assert "\u22121.5" in text
    assert "watch-3" in text


def test_plots_take_their_colours_from_the_style_sheet() -> None:
    page = report.render_page(made_up_result())
    assert "#0100" not in page
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) - {"tone"}
    light, dark = page.split("prefers-color-scheme: dark", 1)
    for role in used:
        assert f"--{role}:" in light
        assert f"--{role}:" in dark


def test_page_is_the_same_for_the_same_result() -> None:
    assert report.render_page(made_up_result()) == report.render_page(made_up_result())


def test_texts_are_escaped() -> None:
    nasty = "<img src=x onerror=alert(1)>"
    confusion = ConfusionMatrix(labels=(nasty, "b"), counts=((1, 0), (0, 1)))
    person = PersonAccuracy(person=nasty, fold=0, examples=1, local=0, federated=1, central=1)
    parsed = parse(report.render_page(made_up_result(broker=nasty, confusion=confusion, people=(person,))))
    assert not parsed.loads
    assert nasty in parsed.text


def test_json_and_page_are_written_together(tmp_path: Path) -> None:
    result = made_up_result()
    page = report.write_report(result, tmp_path / "demo-report")
    assert page.name == "index.html"
    stored = json.loads((tmp_path / "demo-report" / "result.json").read_text())
    promised = {
        "local_accuracy", "federated_accuracy", "central_accuracy", "rounds", "dropouts_survived", "epsilon",
        "delta", "upload_bytes_per_round", "device_peak_rss_bytes", "wall_seconds",
    }  # fmt: skip
    assert promised <= stored.keys()
    assert DemoResult.model_validate(stored) == result


def test_no_noise_means_infinite_epsilon(tmp_path: Path) -> None:
    result = made_up_result(privacy="none", epsilon=math.inf, noise_multiplier=0.0)
    assert result.epsilon is None
    page = report.write_report(result, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["epsilon"] is None
    text = parse(page.read_text()).text
    assert "\u221e" in text
    assert "no formal privacy promise" in text


@pytest.mark.parametrize(
    "result",
    [
        made_up_result(rounds=1, timeline=(), dropouts=(), dropouts_survived=0),
        made_up_result(rounds=60),
        made_up_result(
            dataset="digits",
            folds=3,
            confusion=ConfusionMatrix(labels=tuple("0123456789"), counts=((0,) * 10,) * 10),
        ),
    ],
    ids=["one round", "many rounds", "digits"],
)
def test_unusual_results_have_a_page_too(result: DemoResult) -> None:
    parse(report.render_page(result))


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy_per_round": (0.5,)},
        {"federated_accuracy": 1.2},
        {"privacy": "none"},
        {"epsilon": -1.0},
        {"confusion": {"labels": ["a", "b"], "counts": [[1]]}},
        {"timeline": [{"round": 1, "phase": "ShareKeys", "start": 2.0, "end": 1.0}]},
        {"unknown": 1},
    ],
)
def test_inconsistent_results_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        made_up_result(**changes)


def test_terminal_table_has_the_main_figures() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(report.summary_table(made_up_result()))
    console.file.close()
    text = console.export_text()
    for figure in (
        "61.2",
        "83.1",
        "84.6",
        "184 at delta 1e-5",
        "23.5\u00a0kB",
        "56\u00a0MiB",
        "1\u00a0min 35\u00a0s",
    ):
        assert figure in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.format_bytes(0), "0\u00a0B"),
        (report.format_bytes(999), "999\u00a0B"),
        (report.format_bytes(999_600), "1\u00a0MB"),
        (report.format_seconds(0.0432), "43\u00a0ms"),
        (report.format_seconds(59.96), "1\u00a0min 0\u00a0s"),
        (report.format_epsilon(0.5), "0.5"),
        (report.format_epsilon(12345.6), "12346"),
        (report.format_epsilon(None), "\u221e"),
    ],
)
def test_formats(text: str, expected: str) -> None:
    assert text == expected
