"""Where a round stands in its campaign's noise tree, and who has had a turn in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from aggregator.records import Round
from aggregator.rounds.planning import CampaignSettings
from protocol.dp.parameters import TreeNoise
from protocol.identity import SignedDocument
from protocol.plan import Plan


def placed(settings: CampaignSettings, campaign_id: str, number: int) -> CampaignSettings:
    """Returns the settings of round `number` (from 1), with its tree and leaf where the campaign has a tree.

    A round that is aborted has had its leaf: the next one that is released follows on the last that was.
    """
    tree = settings.privacy.tree
    if tree is None:
        return settings
    restarts, place = divmod(number - 1, tree.restart_every)
    name = hashlib.sha256(f"covey/v1/noise-tree/{campaign_id}/{restarts}".encode()).hexdigest()
    here = TreeNoise(restart_every=tree.restart_every, tree=name, leaf=place + 1)
    return settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"tree": here})})


def devices_needed(settings: CampaignSettings) -> int:
    """How many devices a campaign needs for all rounds of a tree; 0 where it has none."""
    tree, cohort = settings.privacy.tree, settings.cohort
    return 0 if tree is None else (tree.restart_every - 1) * cohort.size + cohort.minimum


def had_turn(tree: TreeNoise | None, rounds: Iterable[Round]) -> frozenset[str]:
    """Who was invited to a round of this tree, and must wait for its restart.

    Whoever was invited may have handed out a masked input, whatever became of the round.

    Args:
        tree: of the next round.
        rounds: of the campaign, among them all of this tree.
    """
    if tree is None:
        return frozenset()
    return frozenset(
        device_id
        for record in rounds
        if (found := _tree_of(record)) is not None and found.tree == tree.tree
        for device_id in record.invited
    )


def _tree_of(record: Round) -> TreeNoise | None:
    return Plan.from_bytes(SignedDocument.model_validate_json(record.plan).payload).privacy.tree
