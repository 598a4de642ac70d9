"""Documentation that is made from the code says what the code says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.diagrams import PAGE, with_diagram


def test_the_state_diagram_is_the_one_of_the_table() -> None:
    page = PAGE.read_text()
    assert "SetSigned --> Unmasked: UnmaskRequested" in page
    assert with_diagram(page) == page


ROOT = PAGE.parents[2]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        root / "mkdocs.yml",
        "--site-dir",
        site,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_site_has_the_reference_that_is_made_from_the_code(tmp_path: Path) -> None:
    pytest.importorskip("material")
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    found = {page.parent.name: page.read_text() for page in tmp_path.glob("reference/*/index.html")}
    assert "covey privacy plan" in found["covey"] and "--noise-multiplier" in found["covey"]
    assert "covey-edge predict" in found["covey-edge"]
    assert "covey/v1/bcast/model/{name}" in found["topics"]
    assert "ShareDelivery" in found["messages"] and "SurvivorsRecord" in found["messages"]
    assert "POST /api/v1/campaigns" in found["http"]


PLACES = {
    "`oidc`": {"issuer", "client_secret_file", "roles"},
    "`downloads`": {"device_rate", "fleet_rate"},
    "`limits`": {"upload_bytes", "enrolments"},
    "`keep`": {"versions", "selection_days"},
    "`[[data]]`": {"source", "model", "name"},
    "`[conditions]`": {"quiet_hours", "patience_seconds", "tell"},
    "`[predict]`": {"socket", "group", "mqtt"},
    "`[predict.mqtt]`": {"topic", "broker", "password_file"},
    "The device's owner: `policy.json`": {"minimum_survivors", "privacy_modes"},
}
OF_SOURCES = {
    "npz": {"path", "max_megabytes"},
    "csv": {"path", "delimiter", "channels"},
    "sqlite": {"table", "time", "targets"},
    "mqtt": {"broker", "discovery", "keep_days", "label"},
    "iio": {"device", "period_seconds", "stride"},
}


def test_the_configuration_page_has_every_table_and_says_what_each_key_means() -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("typer")
    from docs.generated import pages
    from edge_client.adapters.sources import BUILTIN

    assert set(OF_SOURCES) == set(BUILTIN)
    of_sources = {f'`[[data]]` with `source = "{name}"`': keys for name, keys in OF_SOURCES.items()}
    found: dict[str, dict[str, list[str]]] = {}
    for section in re.split(r"^##+ ", pages()["configuration"], flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
        found[title] = {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}
    for title, keys in (PLACES | of_sources).items():
        assert keys <= set(found[title]), title
    assert found["`[conditions]`"]["minimum_battery"] == [
        "integer, at least 0, at most 100", "`20`", "charge in percent, while on battery.",
    ]  # fmt: skip
    assert found["`oidc`"]["roles"][:2] == ["names, each with `viewer`, `operator`, `admin`", "required"]
    told = {(title, key): cells[-1] for title, rows in found.items() for key, cells in rows.items()}
    assert len(told) > 100 and [where for where, meaning in told.items() if not meaning] == []


def test_a_broken_link_breaks_the_build(tmp_path: Path) -> None:
    pytest.importorskip("material")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\nSee [what is not there](how-to/forget.md).\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "how-to/forget.md" in done.stderr
