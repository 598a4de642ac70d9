"""Buffered campaigns: who is to train now, and whose update waits for a buffer.

FedBuff (Nguyen et al. 2022, arXiv 2106.06639, Algorithm 1) with a secure sum for every buffer. Each idle
device gets a standing order to train from the newest version, and says when its update waits on its disk. As
soon as as many wait as a buffer takes, a round collects them (`TrainTask.order`): nothing is trained in it,
so that no device waits for a slower one, and the aggregator still sees nothing but the sum.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from aggregator.fleet.authority import Authority
from aggregator.gathering import gather
from aggregator.records import Campaign, Version
from aggregator.registry.publishing import document_of, manifest_of
from aggregator.repository import Reader
from aggregator.rounds.planning import CampaignSettings, assign, make_plan
from aggregator.rounds.report import BufferReport
from aggregator.work import Work
from protocol.identity import SignedDocument
from protocol.messages import Refusal, RoundEnd, TrainingOrder, UpdateReady

logger = logging.getLogger(__name__)

ASK_SECONDS = 1.0
DEVICES_A_SECOND = 2000
"""Between two looks at who is to be asked, as a look reads every device's record: a second, and with many
devices so long that no more of them are read in one."""
BATCH = 1024
"""Devices that are asked after one look."""
FIRST_REPEAT_SECONDS = 15.0
REPEAT_LIMIT = 600.0
REFUSED_SECONDS = 600.0
ORDER_SECONDS = 6 * 86_400
"""Life of an order, and of the updates that are trained by it; less than devices let plans live."""
RENEW_SECONDS = 86_400
OPEN = ("waiting", "running", "paused")


@dataclass(frozen=True)
class _Asked:
    """When a device is asked again (monotonic clock), and how long after that once more."""

    at: float
    interval: float


@dataclass
class _Buffer:
    """What is known of one campaign's devices.

    Attributes:
        updates: device id -> version that its waiting update was trained from.
        refused: device id -> why it does not train, in its own words.
        too_old: devices whose updates were dropped since the last buffer was collected.
        order: the order as it was signed last, of which version, and when.
    """

    updates: dict[str, int] = field(default_factory=dict)
    asked: dict[str, _Asked] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    too_old: set[str] = field(default_factory=set)
    order: tuple[SignedDocument, str, float] | None = None
    look_at: float = float("-inf")


class Buffers:
    """Belongs to the main loop. Nothing of it is durable: devices say what they have when they are asked."""

    def __init__(self, authority: Authority) -> None:
        """Starts out knowing of no update."""
        self._authority = authority
        self._buffers: dict[str, _Buffer] = {}

    def clear(self) -> None:
        """Forgets everything, as after a restart: every device is asked again."""
        self._buffers.clear()

    def end_others(self, work: Work, reader: Reader) -> None:
        """Forgets the campaigns that are over, and tells devices to erase what they have for them."""
        for campaign_id in list(self._buffers):
            campaign = reader.campaign(campaign_id)
            if campaign is None or campaign.status not in OPEN:
                buffer = self._buffers.pop(campaign_id)
                for device_id in sorted(buffer.updates.keys() | buffer.asked.keys()):
                    work.send(device_id, _over(campaign_id))

    # --- what devices say

    def device_changed(self, device_id: str) -> None:
        """Takes in that a device came or went: what it has, it says again."""
        for buffer in self._buffers.values():
            for known in (buffer.updates, buffer.asked, buffer.refused):
                known.pop(device_id, None)

    def update_ready(self, work: Work, device_id: str, message: UpdateReady) -> None:
        """Takes in that an update waits; one that nobody will collect may be erased."""
        campaign = work.writer.campaign(message.order)
        if campaign is None or campaign.status not in OPEN:
            work.send(device_id, _over(message.order))
            return
        buffer = self._of(message.order)
        buffer.updates[device_id] = message.version
        buffer.refused.pop(device_id, None)

    def refused(self, work: Work, device_id: str, message: Refusal) -> bool:
        """Takes in why a device does not train; returns False if it refused no order but a round."""
        if message.round_id not in self._buffers and work.writer.campaign(message.round_id) is None:
            return False
        buffer = self._of(message.round_id)
        why = f"{message.code}: {message.detail}" if message.detail else message.code
        buffer.refused[device_id] = "".join(c if c.isprintable() else " " for c in why)
        buffer.asked[device_id] = _Asked(work.at.clock + REFUSED_SECONDS, REFUSED_SECONDS)
        logger.info("order %s: refused: %s", message.round_id[:8], buffer.refused[device_id])
        return True

    # --- what the campaigns want

    def waiting(self, campaign_id: str, newest: int, maximum: int) -> frozenset[str]:
        """The devices whose updates can be collected now.

        Args:
            newest: version that the buffer will be added to.
            maximum: staleness; whoever has an older update is asked to drop it and to train anew.
        """
        buffer = self._of(campaign_id)
        old = {d: version for d, version in buffer.updates.items() if not 0 <= newest - version <= maximum}
        for device_id, version in sorted(old.items()):
            logger.info(
                "order %s: the update of %s is from version %d, too old for version %d: it trains anew",
                campaign_id[:8],
                device_id,
                version,
                newest,
            )
            del buffer.updates[device_id]
            buffer.asked.pop(device_id, None)
            buffer.too_old.add(device_id)
        return frozenset(buffer.updates)

    def report(self, campaign_id: str, devices: Collection[str], newest: int) -> BufferReport:
        """How old the updates of these devices are, for the round that is about to collect them.

        Args:
            newest: version that the buffer will be added to.
        """
        buffer = self._of(campaign_id)
        return BufferReport(
            staleness={each: newest - buffer.updates[each] for each in devices if each in buffer.updates},
            too_old=tuple(sorted(buffer.too_old)),
        )

    def collected(self, campaign_id: str, devices: Collection[str]) -> None:
        """Takes in that a buffer asks these devices for their updates: afterwards they are ordered anew."""
        buffer = self._of(campaign_id)
        versions = Counter(buffer.updates[each] for each in devices if each in buffer.updates)
        buffer.too_old.clear()
        for device_id in devices:
            buffer.updates.pop(device_id, None)
            buffer.asked.pop(device_id, None)
        trained_from = ", ".join(f"{count} of version {v}" for v, count in sorted(versions.items()))
        logger.info("order %s: a buffer collects updates: %s", campaign_id[:8], trained_from)

    def why_refused(self, campaign_id: str) -> str:
        """How many devices do not train, and what most of them say."""
        refused = self._of(campaign_id).refused
        if not refused:
            return ""
        code, count = Counter(why.partition(":")[0] for why in refused.values()).most_common(1)[0]
        said = next(why for _, why in sorted(refused.items()) if why.partition(":")[0] == code)
        return f"{len(refused)} refused, {count} of them: {said}"

    def ask(
        self,
        work: Work,
        campaign: Campaign,
        settings: CampaignSettings,
        version: Version,
        idle: AbstractSet[str],
    ) -> None:
        """Sends the order to whoever is to train now.

        Args:
            version: to train from.
            idle: devices that are online and in no round.
        """
        buffer, clock = self._of(campaign.campaign_id), work.at.clock
        if clock < buffer.look_at:
            return
        buffer.look_at = clock + max(ASK_SECONDS, len(idle) / DEVICES_A_SECOND)
        due = sorted(
            device_id
            for device_id in idle - buffer.updates.keys()
            if device_id not in buffer.asked or buffer.asked[device_id].at <= clock
        )[:BATCH]
        if not due:
            return
        fitting = gather(work.writer, campaign, settings, frozenset(due)).pool
        message = TrainingOrder(
            plan=self._order(work, campaign, settings, version), manifest=document_of(version)
        )
        for device_id in due:
            last = buffer.asked.get(device_id)
            interval = FIRST_REPEAT_SECONDS if last is None else min(2 * last.interval, REPEAT_LIMIT)
            if device_id in fitting:
                work.send(device_id, message)
            else:
                interval = FIRST_REPEAT_SECONDS
            buffer.asked[device_id] = _Asked(clock + interval, interval)

    def _order(
        self, work: Work, campaign: Campaign, settings: CampaignSettings, version: Version
    ) -> SignedDocument:
        buffer, now = self._of(campaign.campaign_id), work.at.unix
        if buffer.order is not None:
            document, digest, issued = buffer.order
            if digest == version.manifest_sha256 and now - issued < RENEW_SECONDS:
                return document
        task = assign(settings, manifest_of(version), order=campaign.campaign_id).task
        plan = make_plan(settings, self._authority.fleet, campaign.campaign_id, task, work.at)
        plan = plan.model_copy(update={"expires_at": plan.issued_at + ORDER_SECONDS})
        document = self._authority.sign_order(plan)
        buffer.order = (document, version.manifest_sha256, now)
        return document

    def _of(self, campaign_id: str) -> _Buffer:
        return self._buffers.setdefault(campaign_id, _Buffer())


def _over(order: str) -> RoundEnd:
    return RoundEnd(round_id=order, completed=False, reason="campaign-over")
