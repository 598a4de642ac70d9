"""The clip norm of a campaign's next round, where the plan lets it adapt."""

from __future__ import annotations

from aggregator.records import Round
from aggregator.rounds.planning import CampaignSettings
from aggregator.rounds.report import RoundReport
from protocol.dp.adaptive import CLIP_VOTE, next_clip_norm
from protocol.identity import SignedDocument
from protocol.plan import Plan


def adapted(settings: CampaignSettings, previous: Round | None) -> CampaignSettings:
    """Returns the settings of the next round: those of the campaign, with the clip norm where it has come to.

    Every signed plan holds the clip norm of its round, so that nothing else has to be remembered. A round
    that was aborted told nothing, and its clip norm stays.

    Args:
        settings: of the campaign.
        previous: its last round; None before the first.
    """
    if settings.privacy.adaptive is None or previous is None:
        return settings
    plan = Plan.from_bytes(SignedDocument.model_validate_json(previous.plan).payload)
    vote = RoundReport.from_bytes(previous.report).metrics.get(CLIP_VOTE)
    clip_norm = plan.privacy.clip_norm
    if previous.status == "completed" and vote is not None:
        clip_norm = next_clip_norm(clip_norm, vote, settings.privacy.adaptive)
    return settings.model_copy(
        update={"privacy": settings.privacy.model_copy(update={"clip_norm": clip_norm})}
    )
