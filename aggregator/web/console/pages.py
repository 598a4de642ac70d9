"""The pages: each asks the operations for what it shows."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse, StreamingResponse

from aggregator.access.roles import Role
from aggregator.access.tokens import InvalidToken
from aggregator.records import DeviceFilter
from aggregator.repository import RepositoryError
from aggregator.rounds.planning import asked_by, readable
from aggregator.rounds.report import PHASES
from aggregator.web import schemas
from aggregator.web.admission import By, authenticate, guarded, same_origin
from aggregator.web.console import figures
from aggregator.web.console.live import ticks
from aggregator.web.console.rendering import THEME_COOKIE, THEMES, page
from aggregator.web.context import context_of
from aggregator.web.fleet_routes import DeviceId
from aggregator.web.problems import ApiProblem
from aggregator.web.rollout_schemas import Rollout
from aggregator.web.round_routes import RoundId

looking = guarded(Role.VIEWER, tag="console")
anybody = APIRouter(include_in_schema=False)

PAGE = 100
ROUNDS = 200
Search = Annotated[str, Query(max_length=80, pattern=schemas.PRINTABLE)]


@looking.get("/", name="show-overview", response_class=HTMLResponse)
def overview(by: By, request: Request) -> Response:
    """What an operator wants to know first."""
    operator, context = by.operator, context_of(request)
    rounds = operator.rounds(last=ROUNDS)
    return page(
        request,
        "overview.html",
        by,
        fleet_size=operator.count_devices(DeviceFilter()),
        online=operator.count_devices(DeviceFilter(online=True)),
        excluded=operator.count_devices(DeviceFilter(excluded=True)),
        live=[view for view in rounds if view.record.status == "running"],
        latest=[view for view in reversed(rounds) if view.record.status != "running"][:5],
        newest=figures.newest(operator.versions()),
        charts=figures.progress(rounds),
        privacy=figures.budget(rounds, operator.campaigns()),
        waiting=operator.campaigns(active=True),
        vitals=None if context.vitals is None else context.vitals(),
        phases=PHASES,
    )


@looking.get("/fleet", name="show-fleet", response_class=HTMLResponse)
def fleet(
    by: By,
    request: Request,
    q: Search = "",
    which: Annotated[Literal["all", "online", "offline", "excluded"], Query()] = "all",
    after: Annotated[str, Query(pattern=r"^([a-z0-9][a-z0-9-]{0,62})?$")] = "",
) -> Response:
    """Devices, a page at a time."""
    chosen = DeviceFilter(
        text=q.strip().lower() or None,
        online={"online": True, "offline": False}.get(which),
        excluded=True if which == "excluded" else None,
    )
    found = by.operator.devices_page(chosen, after=after, limit=PAGE + 1)
    return page(
        request,
        "fleet.html",
        by,
        devices=found[:PAGE],
        next=found[PAGE - 1].device_id if len(found) > PAGE else None,
        matching=by.operator.count_devices(chosen),
        total=by.operator.count_devices(DeviceFilter()),
        clients=by.operator.client_counts(),
        q=q,
        which=which,
        after=after,
    )


@looking.get("/fleet/{device}", name="show-device", response_class=HTMLResponse)
def device(by: By, request: Request, device: DeviceId) -> Response:
    """One device, and what it did in the latest rounds."""
    found = by.operator.device(device)
    rounds = [v for v in reversed(by.operator.rounds(last=ROUNDS)) if device in v.record.invited][:20]
    return page(request, "device.html", by, device=found, rounds=rounds)


@looking.get("/rounds", name="show-rounds", response_class=HTMLResponse)
def rounds(
    by: By,
    request: Request,
    before: Annotated[str | None, Query(pattern=r"^[0-9a-f]{32}$")] = None,
) -> Response:
    """Rounds, newest first, with the running ones and the curves above."""
    found = by.operator.rounds(last=ROUNDS + 1, before=before)
    shown = found[-ROUNDS:]
    return page(
        request,
        "rounds.html",
        by,
        live=[view for view in shown if view.record.status == "running"],
        rounds=[view for view in reversed(shown) if view.record.status != "running"],
        charts=figures.progress(shown),
        older=shown[0].record.round_id if len(found) > ROUNDS else None,
        phases=PHASES,
    )


@looking.get("/rounds/{round_id}", name="show-round", response_class=HTMLResponse)
def round_(by: By, request: Request, round_id: RoundId) -> Response:
    """One round: phases, dropouts, figures."""
    return page(request, "round.html", by, view=by.operator.round(round_id), phases=PHASES)


@looking.get("/models", name="show-models", response_class=HTMLResponse)
def models(by: By, request: Request) -> Response:
    """Versions of every model, and how many devices answer with each."""
    versions = by.operator.versions()
    running = {
        (v.model, v.version): by.operator.count_devices(DeviceFilter(answers_with=(v.model, v.version)))
        for each in figures.newest(versions)
        for v in each.latest
    }
    return page(
        request,
        "models.html",
        by,
        models=figures.newest(versions),
        running=running,
        charts=figures.progress(by.operator.rounds(last=ROUNDS)),
    )


@looking.get("/rollouts", name="show-rollouts", response_class=HTMLResponse)
def rollouts(by: By, request: Request) -> Response:
    """Rollouts, newest first, and what is pinned."""
    found = [Rollout.of(view) for view in reversed(by.operator.rollouts())]
    return page(
        request,
        "rollouts.html",
        by,
        rollouts=found[:PAGE],
        pins=by.operator.pins(),
        models=figures.newest(by.operator.versions()),
    )


@looking.get("/campaigns", name="show-campaigns", response_class=HTMLResponse)
def campaigns(by: By, request: Request) -> Response:
    """Campaigns of training, newest first."""
    found = [c for c in reversed(by.operator.campaigns()) if c.model is not None][:ROUNDS]
    settings = {c.campaign_id: readable(c) for c in found}
    return page(
        request,
        "campaigns.html",
        by,
        campaigns=found,
        buffered={each: known for each, known in settings.items() if known is not None and known.buffered},
        models=figures.newest(by.operator.versions()),
    )


@looking.get("/queries", name="show-queries", response_class=HTMLResponse)
def queries(by: By, request: Request) -> Response:
    """Queries and their answers, newest first."""
    asked = [c for c in reversed(by.operator.campaigns()) if c.model is None][:ROUNDS]
    answers = {
        view.record.campaign_id: view
        for view in by.operator.rounds(last=5 * ROUNDS)
        if view.record.model is None
    }
    rows = [(campaign, asked_by(campaign), answers.get(campaign.campaign_id)) for campaign in asked]
    return page(request, "queries.html", by, rows=rows)


@looking.get("/privacy", name="show-privacy", response_class=HTMLResponse)
def privacy(by: By, request: Request) -> Response:
    """What has been spent, and what is left."""
    shown = by.operator.rounds(last=5 * ROUNDS)
    return page(
        request,
        "privacy.html",
        by,
        privacy=figures.budget(shown, by.operator.campaigns()),
        rounds=[view for view in reversed(shown) if view.report.epsilon is not None][:50],
        any_round=bool(shown),
    )


@looking.get("/log", name="show-log", response_class=HTMLResponse)
def log(
    by: By,
    request: Request,
    before: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
) -> Response:
    """Events since the service began, and for admins the audit log."""
    entries = None
    if by.principal.role.allows(Role.ADMIN):
        entries = by.operator.audit_log(before=before, limit=PAGE + 1)
    return page(
        request,
        "log.html",
        by,
        events=() if before else context_of(request).feed.latest(PAGE),
        audit=None if entries is None else entries[:PAGE],
        older=entries[PAGE - 1].number if entries and len(entries) > PAGE else None,
    )


@looking.get("/live", name="listen", response_class=StreamingResponse)
async def live(by: By, request: Request) -> Response:
    """Kinds of events, as they happen."""
    context = context_of(request)

    def valid() -> bool:
        try:
            return authenticate(request, context).role.allows(Role.VIEWER)
        except (InvalidToken, ApiProblem, RepositoryError):
            return False

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(ticks(context.feed, valid), media_type="text/event-stream", headers=headers)


@anybody.get("/sign-in", name="show-sign-in", response_class=HTMLResponse)
def sign_in(request: Request) -> Response:
    """Where people say who they are."""
    return page(request, "sign_in.html", None, oidc=context_of(request).oidc is not None)


@anybody.post("/theme", name="choose-theme")
def choose_theme(
    request: Request,
    theme: Annotated[Literal["auto", "light", "dark"], Form()],
    back: Annotated[
        str, Form(max_length=400, pattern=r"^/([\x21-\x2e\x30-\x5b\x5d-\x7e][\x21-\x5b\x5d-\x7e]*)?$")
    ] = "/",
) -> Response:
    """Light, dark, or what the device prefers."""
    if not same_origin(request):
        raise ApiProblem("cross-site", "choose it on the console's own page")
    response = RedirectResponse(back, 303)
    if theme in THEMES:
        secure = request.url.scheme == "https"
        response.set_cookie(
            THEME_COOKIE, theme, max_age=31_536_000, httponly=True, samesite="strict", secure=secure
        )
    else:
        response.delete_cookie(THEME_COOKIE)
    return response
