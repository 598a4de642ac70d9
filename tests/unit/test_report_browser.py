"""The report in a real browser: it fits a phone, and both colour schemes are readable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from deploy.demo.report import write_report
from tests.unit.test_report import made_up_result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

# The page forbids scripts, so a frame around it measures: the width it needs, which shape of the plots
# shows, and the contrast (WCAG 2.2, 1.4.3) of each text outside the plots with the nearest background.
MEASURE = """
<!doctype html><title>waiting</title>
<iframe src="index.html" style="border: 0; height: 900px; width: WIDTHpx"></iframe>
<script>
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
window.onload = () => {
  const page = document.querySelector('iframe').contentDocument, view = page.defaultView;
  const background = element => {
    for (; element; element = element.parentElement) {
      const colour = channels(view.getComputedStyle(element).backgroundColor);
      if (colour.length === 3) return colour;
    }
  };
  let contrast = Infinity;
  for (const element of page.querySelectorAll('p, h1, h2, dt, dd, td, th, b, span')) {
    if (!element.textContent.trim()) continue;
    const [a, b] = [channels(view.getComputedStyle(element).color), background(element)].map(luminance);
    contrast = Math.min(contrast, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  const overflowing = [...page.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length;
  document.body.textContent = 'RESULT' + JSON.stringify({
    needed: page.documentElement.scrollWidth, contrast, overflowing,
    wide: page.querySelectorAll('.wide')[0].clientHeight > 0,
    narrow: page.querySelectorAll('.narrow')[0].clientHeight > 0,
    page: background(page.body),
  }) + 'END';
};
</script>
"""


def measure(folder: Path, *, width: int, dark: bool) -> dict[str, Any]:
    """Loads a report in a frame of that width and returns what it looks like."""
    assert CHROMIUM is not None
    write_report(made_up_result(), folder)
    (folder / "measure.html").write_text(MEASURE.replace("WIDTH", str(width)))
    command = [
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        "--allow-file-access-from-files",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1000",
        "--dump-dom",
        (folder / "measure.html").as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"RESULT(.*)END", run.stdout)
    assert found, run.stdout[-2000:]
    measured: dict[str, Any] = json.loads(found[1])
    return measured


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_page_fits_and_is_readable(tmp_path: Path, width: int, dark: bool) -> None:
    measured = measure(tmp_path, width=width, dark=dark)
    assert measured["needed"] <= width
    assert measured["overflowing"] == 0
    assert measured["contrast"] >= 4.5
    assert measured["narrow"] == (width < 700)
    assert measured["wide"] == (width > 700)
    assert (sum(measured["page"]) < 200) == dark
