"""The reference names a test for each check: every one of them exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_the_reference_names_exists() -> None:
    pages = (ROOT / "docs" / "reference" / "secure-aggregation.md", ROOT / "SECURITY.md")
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text())}
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)\(", source)}
    assert len(named) > 50
    assert named <= defined, sorted(named - defined)
