"""Asking the fleet a question: forms with every option of `covey query`, filled with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import TypeAdapter, ValidationError

from aggregator.access.roles import Role
from aggregator.operations import OperationRefused
from aggregator.queries import DEFAULT_BINS, DEFAULT_QUANTILE_BINS, QueryRequest
from aggregator.rounds.planning import GATHER_SECONDS
from aggregator.settings import DEFAULT_COHORT, DEFAULT_DELTA, invalid
from aggregator.web.admission import Admitted, By, guarded
from aggregator.web.console.asking import Field, ask
from aggregator.web.problems import TITLES, ApiProblem, record_refusal
from protocol.dp.parameters import PrivacyMode
from protocol.plan import MAX_BINS, SUBCOHORT_LIMIT, Deadlines

asking = guarded(Role.OPERATOR, tag="console")
acting = guarded(Role.OPERATOR, tag="console")

Kind = Annotated[Literal["mean", "sum", "histogram", "quantile"], Path(description="Of question.")]
_REQUEST: TypeAdapter[QueryRequest] = TypeAdapter(QueryRequest)
_LIMITS = Deadlines()
_MODES = tuple(mode.value for mode in PrivacyMode if mode is not PrivacyMode.EXAMPLE)
_COHORT, _NOISE, _DEADLINES = "Cohort", "Noise and budget", "Deadlines"


def _number(
    name: str, label: str, value: float | None = None, *, least: str = "", most: str = "", **more: Any
) -> Field:
    shown = "" if value is None else f"{value:g}"
    return Field(name, label, shown, kind="number", step="any", least=least, most=most, **more)


def _count(name: str, label: str, value: int | None = None, *, least: int = 2, **more: Any) -> Field:
    return Field(name, label, "" if value is None else str(value), kind="number", least=str(least), **more)


_TITLES: Mapping[str, str] = {
    "mean": "Ask for the mean of a field",
    "sum": "Ask for the sum of a field",
    "histogram": "Ask how the values of a field lie",
    "quantile": "Ask for a quantile of a field",
}
_OWN: Mapping[str, tuple[Field, ...]] = {
    "mean": (),
    "sum": (),
    "histogram": (_count("question.bins", "Intervals of equal width", DEFAULT_BINS, most=str(MAX_BINS)),),
    "quantile": (
        _number("question.q", "Share of the values below the answer", 0.5, least="0", most="1"),
        _count(
            "question.bins",
            "Intervals that are told apart",
            DEFAULT_QUANTILE_BINS,
            most=str(MAX_BINS),
            note="Finer is noisier.",
        ),
    ),
}
"""What a kind of question asks for beside the others."""
_FIRST = (
    Field("field", "Field", required=True, note="Its name, as devices declare it with covey-edge fields."),
    _number(
        "low", "Lowest value", required=True, note="Values below it count as it: chosen without the data."
    ),
    _number("high", "Highest value", required=True, note="Values above it count as it."),
)
_REST = (
    _count("cohort", "Devices in a full cohort", DEFAULT_COHORT),
    Field("where", "Only devices that fit", note="Such as power=mains,battery>=50; empty: all."),
    Field("privacy", "Who adds noise", PrivacyMode.DISTRIBUTED, choices=_MODES),
    _number(
        "epsilon",
        "Epsilon that it may cost at most",
        least="0",
        note="The noise is chosen for it; empty: by the noise multiplier.",
    ),
    _count("minimum", "Check-ins that a roster needs (empty: above 2/3)", group=_COHORT),
    _count("min_survivors", "Masked inputs that a sum needs (empty: as many)", group=_COHORT),
    _count("subcohort_limit", "Split a cohort that is larger", SUBCOHORT_LIMIT, group=_COHORT),
    _number("gather_seconds", "Seconds to wait for a full cohort", GATHER_SECONDS, least="0", group=_COHORT),
    _count("seed", "Seed that draws the cohort (empty: random)", least=0, group=_COHORT),
    _number(
        "noise_multiplier", "Noise over sensitivity (empty: 1 where there is noise)", least="0", group=_NOISE
    ),
    _count(
        "colluders",
        "Survivors that may reveal their noise, in distributed mode",
        0,
        least=0,
        group=_NOISE,
    ),
    _number("delta", "Delta at which epsilon is stated", DEFAULT_DELTA, least="0", most="1", group=_NOISE),
    _number(
        "epsilon_limit",
        "Ask nobody if it takes the fleet beyond this epsilon (empty: no limit)",
        least="0",
        group=_NOISE,
    ),
    *(
        _number(f"deadlines.{name}", label, getattr(_LIMITS, name), least="0", group=_DEADLINES)
        for name, label in (
            ("advertise_keys", "Check-in, seconds"),
            ("share_keys", "Exchange of shares"),
            ("masked_input", "Work on the device, and upload"),
            ("consistency_check", "Consistency check"),
            ("unmasking", "Unmasking"),
            ("offline_grace", "A device that is offline is waited for"),
        )
    ),
)


@asking.get("/queries/new/{kind}", name="ask-start-query", response_class=HTMLResponse)
def ask_query(by: By, request: Request, kind: Kind) -> Response:
    """Asks what to ask the fleet."""
    return _form(request, by, kind, {})


async def _answers(request: Request, kind: Kind) -> dict[str, str]:
    form = await request.form(max_files=0, max_fields=64)
    answers = {name: value.strip() for name, value in form.items() if isinstance(value, str)}
    if unknown := answers.keys() - {each.name for each in fields(kind)}:
        raise ApiProblem(
            "invalid-request", f"this form has no field {min(unknown)[:40]}: use the console's own"
        )
    return answers


@acting.post("/queries/new/{kind}", name="start-query", response_class=HTMLResponse)
def start(
    by: By, request: Request, kind: Kind, answers: Annotated[dict[str, str], Depends(_answers)]
) -> Response:
    """Asks devices for a figure over a field; shows the form again, and why, if it cannot be asked."""
    try:
        by.to(answers.get("field", "")).start_query(_request(kind, answers))
    except ValidationError as error:
        return _again(request, by, kind, answers, "invalid-request", str(invalid(error)))
    except OperationRefused as error:
        return _again(request, by, kind, answers, "refused", str(error))
    return RedirectResponse("/queries", 303)


def fields(kind: str) -> tuple[Field, ...]:
    """What the form of a kind of question asks for."""
    return (*_FIRST, *_OWN[kind], *_REST)


def _request(kind: str, answers: Mapping[str, str]) -> QueryRequest:
    given: dict[str, Any] = {"question": {"kind": kind}}
    for name, value in answers.items():
        if value:
            place, _, inner = name.rpartition(".")
            (given.setdefault(place, {}) if place else given)[inner] = value
    return _REQUEST.validate_strings(given)


def _again(
    request: Request, by: Admitted, kind: str, answers: Mapping[str, str], code: str, trouble: str
) -> Response:
    record_refusal(request, code)
    response = _form(request, by, kind, answers, trouble)
    response.status_code = TITLES[code][0]
    return response


def _form(
    request: Request, by: Admitted, kind: str, answers: Mapping[str, str], trouble: str = ""
) -> Response:
    return ask(
        request,
        by,
        _TITLES[kind],
        "Devices that declare the field answer in one round; the service learns the figure over all of them, "
        "and of none by itself. With noise it spends privacy, which nothing gives back.",
        fields=tuple(replace(each, value=answers.get(each.name, each.value)) for each in fields(kind)),
        button="Ask",
        back="/queries",
        trouble=trouble,
    )
