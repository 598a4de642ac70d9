"""The console of a demo's aggregator: where it is, and how a browser gets there."""

from __future__ import annotations

import html
import os
import sys
import webbrowser
from pathlib import Path

from aggregator import main as covey
from aggregator.private_file import replace_private


def console_link(state: Path) -> str:
    """A link that signs one browser in to the console of the service on a state directory."""
    with covey.connect(state) as client:
        return client.url + client.sign_in_link().path


def show_in_browser(link: str, directory: Path) -> bool:
    """Opens a link in this desktop's browser; returns whether there is one.

    The browser is given a file that only its user can read: everybody can read the arguments of a program.

    Args:
        link: where to go.
        directory: for the file.
    """
    if not (sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    page = directory / "console.html"
    address = html.escape(link, quote=True)
    replace_private(page, f'<!doctype html><meta http-equiv="refresh" content="0;url={address}">'.encode())
    return webbrowser.open(page.as_uri())
