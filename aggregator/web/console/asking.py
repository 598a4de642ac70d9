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
        kind: of input, as HTML names it; of `file`, several may be chosen.
        step, least, most: of a number; `any` step for one with a fraction, no bound where it is empty.
        choices: of a list; none for a text.
        note: what else is to be known of it.
        group: fields of one group are folded away under its name; those of none show.
    """

    name: str
    label: str
    value: str = ""
    kind: str = "text"
    step: str = "1"
    least: str = "1"
    most: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()
    note: str = ""
    group: str = ""


REASON = Field("reason", "Reason, for those who look later", "by the operator", required=True)


@dataclass(frozen=True)
class Turn:
    """A button about something that is there.

    Attributes:
        verb: what it does.
        consequence: of a yes.
        button: what the button of the form says; the verb by default.
        ending: what the question ends with after the name.
    """

    verb: str
    consequence: str
    fields: tuple[Field, ...] = ()
    button: str = ""
    danger: bool = False
    ending: str = ""


def ask(request: Request, by: Admitted, title: str, consequence: str, **more: Any) -> Response:
    """A form that says what will happen.

    Args:
        request: of the page.
        by: who asks.
        title: the question.
        consequence: of a yes.
        more: `button`, `back`, and where they differ `fields`, `danger`, `action`, and `trouble`: why what
            was answered before cannot be done.
    """
    values = {"fields": (), "danger": False, "action": request.url.path, "trouble": ""} | more
    return page(request, "confirm.html", by, title=title, consequence=consequence, **values)


def ask_turn(request: Request, by: Admitted, turn: Turn, what: str, back: str, more: str = "") -> Response:
    """Asks whether something that is there is to take a turn; the answer goes to the page's own address.

    Args:
        request: of the page.
        by: who asks.
        turn: what would be done.
        what: to what.
        back: where a no leads.
        more: what else is to be known of this one.
    """
    return ask(
        request,
        by,
        f"{turn.verb} {what} {turn.ending}".rstrip() + "?",
        f"{turn.consequence} {more}".rstrip(),
        fields=turn.fields,
        button=turn.button or turn.verb,
        danger=turn.danger,
        back=back,
    )
