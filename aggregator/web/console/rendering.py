"""Pages from templates: everything that is put into one is escaped, whoever said it."""

from __future__ import annotations

import datetime
import math
from functools import cache
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from aggregator.access.roles import Role
from aggregator.web.admission import Admitted
from aggregator.web.console.assets import address_of_asset
from aggregator.web.console.charts import line_chart
from aggregator.web.context import context_of
from protocol.client_release import numbered

THEMES = ("light", "dark")
THEME_COOKIE = "covey_theme"


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("aggregator.web.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "numbered": numbered,
        "moment": moment,
        "ago": ago,
        "span": span,
        "percent": percent,
        "figure": figure,
        "words": words,
        "short": lambda text: text[:8],
    }
    environment.tests["naming"] = lambda devices, device: device in devices
    environment.globals |= {"line_chart": line_chart, "asset": address_of_asset}
    return environment


def page(request: Request, template: str, by: Admitted | None, **values: Any) -> HTMLResponse:
    """Renders a page for somebody; None where nobody has signed in."""
    return HTMLResponse(content(request, template, by, **values))


def content(request: Request, template: str, by: Admitted | None, **values: Any) -> str:
    """The HTML of a page."""
    context = context_of(request)
    theme = request.cookies.get(THEME_COOKIE)
    return (
        _templates()
        .get_template(template)
        .render(
            me=None if by is None else by.principal,
            may_act=by is not None and by.principal.role.allows(Role.OPERATOR),
            may_manage=by is not None and by.principal.role.allows(Role.ADMIN),
            fleet=context.operator.authority.fleet,
            now=context.operator.clock.moment().unix,
            theme=theme if theme in THEMES else None,
            path=request.url.path,
            here=request.url.path + (f"?{request.url.query}" if request.url.query else ""),
            **values,
        )
    )


def moment(at: float | None) -> str:
    """A moment, as `2026-11-24 15:30:12` in UTC."""
    if at is None:
        return "never"
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def ago(at: float | None, now: float) -> str:
    """How long ago something was."""
    if at is None:
        return "never"
    seconds = now - at
    return "now" if seconds < 5 else f"{span(seconds)} ago"


def span(seconds: float) -> str:
    """A length of time in its largest unit."""
    for size, unit in ((86_400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{max(0.0, seconds):.1f} s"


def percent(share: float) -> str:
    """A share of one."""
    return f"{share:.1%}"


def figure(value: float | None) -> str:
    """A number with four digits that count."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def words(name: str) -> str:
    """`MaskedInput` as `Masked input`."""
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()
    return spaced[:1].upper() + spaced[1:].replace("_", " ")
