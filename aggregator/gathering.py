"""Who a campaign's next round could invite, and who of them should let others go first."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from aggregator.records import Campaign
from aggregator.repository import Reader
from aggregator.rounds.noise_tree import had_turn
from aggregator.rounds.planning import CampaignSettings, VersionToEvaluate
from aggregator.rounds.report import RoundReport
from aggregator.rounds.selection import Selection, places
from aggregator.rounds.selector import fits, written
from aggregator.rounds.subcohort_state import FULL


@dataclass(frozen=True)
class Gathering:
    """The devices that a round can choose from.

    Attributes:
        pool: their ids, sorted.
        who: what they are, in words for who waits for them.
    """

    pool: tuple[str, ...]
    who: str


def gather(
    reader: Reader, campaign: Campaign, settings: CampaignSettings, online: AbstractSet[str]
) -> Gathering:
    """Finds the devices that a campaign's next round can choose from.

    Args:
        settings: of the next round.
        online: devices that are there and in no other round.
    """
    who = "online"
    out: frozenset[str] = frozenset()
    tree = settings.privacy.tree
    if tree is not None and tree.leaf > 1:
        out = had_turn(tree, reader.rounds(campaign_id=campaign.campaign_id, last=tree.leaf - 1))
        who += f" that have had no turn in the last {tree.leaf - 1} rounds"
    if settings.where:
        who += f" that fit {written(settings.where)}"
    asks = settings.asks
    if isinstance(asks, VersionToEvaluate) and asks.held_out and campaign.model is not None:
        out |= reader.contributors(campaign.model)
        who += f" that have never trained {campaign.model}"
    pool = tuple(
        device.device_id
        for device in reader.devices()
        if device.device_id in online
        and device.device_id not in out
        and device.state == "active"
        and device.excluded is None
        and fits(settings.where, device)
    )
    return Gathering(pool, who)


def selection(
    reader: Reader, campaign: Campaign, settings: CampaignSettings, pool: tuple[str, ...], number: int
) -> Selection:
    """Draws the cohort of a round.

    Args:
        settings: of the round.
        pool: from `gather`.
        number: of the round within its campaign, from 1.
    """
    asks = settings.asks
    if isinstance(asks, VersionToEvaluate) and campaign.model is not None:
        # Whoever trained on its examples would praise the version that learned them.
        recent = reader.contributors(campaign.model)
    else:
        recent = _turns(reader, campaign, settings.rest_rounds)
    return Selection(
        seed=settings.round_seed(number),
        places=places(settings.cohort.size, settings.over_select),
        pool=pool,
        yielding=tuple(device_id for device_id in pool if device_id in recent),
    )


def _turns(reader: Reader, campaign: Campaign, rounds: int) -> frozenset[str]:
    """Who had a turn in the last rounds: whoever was invited and not sent away for want of room."""
    if rounds == 0:
        return frozenset()
    return frozenset(
        device_id
        for record in reader.rounds(campaign_id=campaign.campaign_id, last=rounds)
        for device_id in record.invited
        if RoundReport.from_bytes(record.report).declined.get(device_id) != FULL
    )
