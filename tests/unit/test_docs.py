"""Documentation that is made from the code says what the code says."""

from __future__ import annotations

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
    assert "minimum_survivors" in found["configuration"] and "itself counted" in found["configuration"]
    assert "covey/v1/bcast/model/{name}" in found["topics"]
    assert "ShareDelivery" in found["messages"] and "SurvivorsRecord" in found["messages"]
    assert "POST /api/v1/campaigns" in found["http"]


def test_a_broken_link_breaks_the_build(tmp_path: Path) -> None:
    pytest.importorskip("material")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\nSee [what is not there](how-to/forget.md).\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "how-to/forget.md" in done.stderr
