"""A page that asks before a button acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from aggregator.web.admission import Admitted
from aggregator.web.console.rendering import page


@dataclass(frozen=True)
class Field:
    """What a form asks for.

    Attributes:
        kind: of input, as HTML names it.
        step: of a number; `any` for one with a fraction.
        choices: of a list; none for a text.
    """

    name: str
    label: str
    value: str = ""
    kind: str = "text"
    step: str = "1"
    required: bool = False
    choices: tuple[str, ...] = ()


REASON = Field("reason", "Reason, for those who look later", "by the operator", required=True)


def ask(request: Request, by: Admitted, title: str, consequence: str, **more: Any) -> Response:
    """A form that says what will happen.

    Args:
        request: of the page.
        by: who asks.
        title: the question.
        consequence: of a yes.
        more: `button`, `back`, and where they differ `fields`, `danger` and `action`.
    """
    values = {"fields": (), "danger": False, "action": request.url.path} | more
    return page(request, "confirm.html", by, title=title, consequence=consequence, **values)
