"""`/campaigns`, `/evaluations`, `/queries`, `/rounds` and `/privacy`: what is asked, and what it costs."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from aggregator.access.roles import Role
from aggregator.evaluations import EvaluationRequest
from aggregator.operations import OperationRefused
from aggregator.queries import QueryRequest
from aggregator.records import RoundStatus
from aggregator.rounds.selection import Selection
from aggregator.settings import CampaignRequest
from aggregator.web import schemas
from aggregator.web.admission import By, guarded
from aggregator.web.problems import documented
from protocol.dp.accounting import Spent
from protocol.transcript import BrokenTranscript

looking = guarded(Role.VIEWER, tag="rounds")
acting = guarded(Role.OPERATOR, tag="rounds")

HEX_ID = r"^[0-9a-f]{32}$"
CampaignId = Annotated[str, Path(pattern=HEX_ID, description="Id of a campaign.")]
RoundId = Annotated[str, Path(pattern=HEX_ID, description="Id of a round.")]
RoundCursor = Annotated[str | None, Query(pattern=HEX_ID, description="From a page before.")]
Limit = Annotated[int, Query(ge=1, le=1000)]


@looking.get("/campaigns", name="list-campaigns")
def list_campaigns(
    by: By,
    active: Annotated[bool, Query(description="Only those that have rounds to run.")] = False,
    cursor: RoundCursor = None,
    limit: Limit = 100,
) -> schemas.Page[schemas.Campaign]:
    """Campaigns, newest first."""
    found = list(reversed(by.operator.campaigns(active=active)))
    ids = [campaign.campaign_id for campaign in found]
    begin = 0 if cursor is None else ids.index(cursor) + 1 if cursor in ids else len(ids)
    items = tuple(schemas.Campaign.of(campaign) for campaign in found[begin : begin + limit])
    return schemas.Page(items=items, next=items[-1].campaign if len(found) > begin + limit else None)


@acting.post("/campaigns", name="start-campaign", status_code=201, responses=documented("refused"))
def start_campaign(by: By, body: CampaignRequest) -> schemas.Campaign:
    """Asks for rounds of training; the service runs them one after the other."""
    return schemas.Campaign.of(by.to(body.model).start_rounds(body))


@acting.post("/queries", name="start-query", status_code=201, responses=documented("refused"))
def start_query(by: By, body: QueryRequest) -> schemas.Campaign:
    """Asks devices for a figure over a field that they declare; the round's report has the answer."""
    return schemas.Campaign.of(by.to(body.field).start_query(body))


@acting.post("/evaluations", name="start-evaluation", status_code=201, responses=documented("refused"))
def start_evaluation(by: By, body: EvaluationRequest) -> schemas.Campaign:
    """Asks devices how a version does on their own examples; nothing is trained."""
    target = body.model if body.version is None else f"{body.model}:{body.version}"
    return schemas.Campaign.of(by.to(target).start_evaluation(body))


@looking.get("/campaigns/{campaign}", name="show-campaign")
def show_campaign(by: By, campaign: CampaignId) -> schemas.Campaign:
    """One campaign."""
    return schemas.Campaign.of(by.operator.campaign(campaign))


@acting.post("/campaigns/{campaign}/pause", name="pause-campaign", responses=documented("refused"))
def pause_campaign(by: By, campaign: CampaignId) -> schemas.Campaign:
    """Begins no more rounds until it is resumed; a round that runs goes to its end."""
    return schemas.Campaign.of(by.operator.pause_campaign(campaign))


@acting.post("/campaigns/{campaign}/resume", name="resume-campaign", responses=documented("refused"))
def resume_campaign(by: By, campaign: CampaignId) -> schemas.Campaign:
    """Goes on with a paused campaign; with a schedule, from its next firing."""
    return schemas.Campaign.of(by.operator.resume_campaign(campaign))


@acting.post("/campaigns/{campaign}/cancel", name="cancel-campaign", responses=documented("refused"))
def cancel_campaign(by: By, campaign: CampaignId) -> schemas.Campaign:
    """Ends a campaign for good; a round of it that runs is aborted."""
    return schemas.Campaign.of(by.operator.cancel_campaign(campaign))


@looking.get("/rounds", name="list-rounds")
def list_rounds(
    by: By,
    campaign: Annotated[str | None, Query(pattern=HEX_ID, description="Only of this campaign.")] = None,
    status: Annotated[RoundStatus | None, Query(description="Only those.")] = None,
    cursor: RoundCursor = None,
    limit: Limit = 100,
) -> schemas.Page[schemas.Round]:
    """Rounds and their figures, newest first."""
    views = by.operator.rounds(campaign, status=status, last=limit + 1, before=cursor)[::-1]
    items = tuple(schemas.Round.of(view) for view in views[:limit])
    return schemas.Page(items=items, next=items[-1].round if len(views) > limit else None)


@looking.get("/rounds/{round_id}", name="show-round")
def show_round(by: By, round_id: RoundId) -> schemas.Round:
    """One round and its figures."""
    return schemas.Round.of(by.operator.round(round_id))


@looking.get("/rounds/{round_id}/selection", name="show-selection")
def show_selection(by: By, round_id: RoundId) -> Selection:
    """How the cohort of a round was drawn: seed, pool and who yielded; the draw can be repeated."""
    return by.operator.selection(round_id)


@looking.get("/privacy/ledger", name="show-ledger", responses=documented("refused"))
def show_ledger(
    by: By,
    delta: Annotated[float, Query(gt=0, lt=1, description="The delta at which epsilon is stated.")] = 1e-5,
) -> schemas.Ledger:
    """What has been spent, re-computed from the transcript and held against the stored ledger."""
    # The accountant takes a second to import, and memory: only who asks pays for it.
    from aggregator.privacy.ledger import audit_ledger

    with by.operator.repository.read() as reader:
        try:
            audit = audit_ledger(reader, delta)
        except BrokenTranscript as error:
            raise OperationRefused(f"the transcript cannot be trusted: {error}") from error
    return schemas.Ledger(
        population=_spent(audit.population),
        models={name: _spent(spent) for name, spent in audit.models.items()},
        queries=_spent(audit.queries),
        rounds=audit.rounds,
        matches=not audit.differences,
        differences=audit.differences,
    )


def _spent(spent: Spent) -> schemas.Spent:
    return schemas.Spent(
        epsilon=spent.epsilon if spent.epsilon < float("inf") else None,
        delta=spent.delta,
        releases=spent.rounds,
        unit=spent.unit,
        sampler_distance=spent.sampler_distance,
        sampler_included=spent.sampler_included,
    )
