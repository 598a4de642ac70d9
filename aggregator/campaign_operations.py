"""What an operator asks of the fleet: rounds, queries and evaluations, each of them a campaign."""

from __future__ import annotations

import secrets

from aggregator.clock import Clock
from aggregator.evaluations import EvaluationRequest
from aggregator.queries import QueryRequest
from aggregator.records import Campaign, CampaignStatus
from aggregator.refusals import OperationRefused, there
from aggregator.registry.publishing import manifest_of
from aggregator.registry.releases import check_model
from aggregator.repository import Repository, Writer
from aggregator.rounds.evaluation import VersionEvaluation
from aggregator.rounds.noise_tree import devices_needed
from aggregator.rounds.planning import CampaignSettings, check_settings
from aggregator.settings import CampaignRequest, InvalidSettings
from models.manifest import ModelManifest
from protocol.dp.errors import PrivacyError


class CampaignOperations:
    """The part of `aggregator.operations.Operator` about campaigns."""

    repository: Repository
    clock: Clock

    def start_rounds(self, request: CampaignRequest) -> Campaign:
        """Asks for rounds; the service runs them one after the other.

        Raises:
            OperationRefused: the model has no version, or no round could follow the settings.
        """
        try:
            rounds, settings = request.resolve()
        except InvalidSettings as error:
            raise OperationRefused(str(error)) from error
        check_model(request.model)
        with self.repository.write() as writer:
            version = writer.newest_version(request.model)
            if version is None:
                raise OperationRefused(
                    f"there is no published {request.model}: publish it with `covey model publish DIR`"
                )
            return self._add_campaign(writer, settings, rounds, manifest_of(version))

    def start_query(self, request: QueryRequest) -> Campaign:
        """Asks a query: a campaign of one round, whose report will have the answer.

        Raises:
            OperationRefused: no round could ask it.
        """
        try:
            settings = request.resolve()
        except (InvalidSettings, PrivacyError) as error:
            raise OperationRefused(str(error)) from error
        with self.repository.write() as writer:
            return self._add_campaign(writer, settings, 1, None)

    def start_evaluation(self, request: EvaluationRequest) -> Campaign:
        """Asks devices how a version does on their examples: a campaign of one round.

        Raises:
            OperationRefused: no such version, or no round could follow the settings.
        """
        check_model(request.model)
        with self.repository.write() as writer:
            version = (
                writer.newest_version(request.model)
                if request.version is None
                else writer.version(request.model, request.version)
            )
            if version is None:
                what = request.model if request.version is None else f"{request.model} v{request.version}"
                raise OperationRefused(f"there is no published {what}: see `covey model list`")
            try:
                settings = request.resolve(version.version)
            except InvalidSettings as error:
                raise OperationRefused(str(error)) from error
            return self._add_campaign(writer, settings, 1, manifest_of(version))

    def evaluations(self, model: str, version: int | None = None) -> tuple[VersionEvaluation, ...]:
        """How a model's versions did on the devices, oldest first; with `version`, only that one."""
        with self.repository.read() as reader:
            found = reader.evaluations(model, version)
        return tuple(VersionEvaluation.from_bytes(each.figures) for each in found)

    def evaluation(self, model: str, version: int) -> VersionEvaluation | None:
        """The latest evaluation of a version; None when there is none."""
        found = self.evaluations(model, version)
        return found[-1] if found else None

    def campaign(self, campaign_id: str) -> Campaign:
        """One campaign as it is now.

        Raises:
            NoSuch: no such campaign.
        """
        with self.repository.read() as reader:
            campaign = reader.campaign(campaign_id)
        return there(campaign, f"no campaign {campaign_id}: see `covey campaign list`")

    def campaigns(self, *, active: bool = False) -> tuple[Campaign, ...]:
        """Campaigns, oldest first; with `active`, only those that have rounds to run."""
        with self.repository.read() as reader:
            return reader.campaigns("waiting", "running", "paused") if active else reader.campaigns()

    def pause_campaign(self, campaign_id: str) -> Campaign:
        """Lets a campaign begin no more rounds until it is resumed; a round that runs goes to its end.

        Raises:
            OperationRefused: no such campaign, or it has ended or is paused.
        """
        return self._move(campaign_id, ("waiting", "running"), "paused")

    def resume_campaign(self, campaign_id: str) -> Campaign:
        """Lets a paused campaign go on; with a schedule, from its next firing.

        Raises:
            OperationRefused: no such campaign, or it is not paused.
        """
        return self._move(campaign_id, ("paused",), "running")

    def cancel_campaign(self, campaign_id: str) -> Campaign:
        """Ends a campaign: a round of it that runs is aborted, unless its devices were asked to unmask.

        Raises:
            OperationRefused: no such campaign, or it has ended.
        """
        return self._move(campaign_id, ("waiting", "running", "paused"), "cancelled")

    def _move(
        self, campaign_id: str, allowed: tuple[CampaignStatus, ...], status: CampaignStatus
    ) -> Campaign:
        with self.repository.write() as writer:
            campaign = there(
                writer.campaign(campaign_id), f"no campaign {campaign_id}: see `covey campaign list`"
            )
            if campaign.status not in allowed:
                raise OperationRefused(
                    f"campaign {campaign_id[:8]} is {campaign.status}: only one that is "
                    f"{' or '.join(allowed)} can become {status}"
                )
            if status == "running":
                if not campaign.started:
                    status = "waiting"
                # A firing that the pause swallowed is not made up for: it would start at an hour that nobody
                # asked for.
                settings = CampaignSettings.from_bytes(campaign.settings)
                writer.set_due(campaign_id, _due(settings, self.clock.moment().unix))
            if status == "cancelled":
                writer.fell_noise_tree(campaign_id)
                writer.forget_optimizer_memory(campaign_id)
            writer.update_campaign(campaign_id, status)
            return there(writer.campaign(campaign_id), f"no campaign {campaign_id}")

    def _add_campaign(
        self, writer: Writer, settings: CampaignSettings, rounds: int, base: ModelManifest | None
    ) -> Campaign:
        try:
            check_settings(settings, base)
        except ValueError as error:
            raise OperationRefused(str(error)) from error
        enrolled = sum(device.excluded is None and device.state == "active" for device in writer.devices())
        if (needed := devices_needed(settings)) > enrolled:
            raise OperationRefused(
                f"no device is in two rounds of a noise tree: until it restarts, {needed} devices are needed "
                f"and {enrolled} enrolled: use a smaller --restart-every or --cohort"
            )
        campaign = Campaign(
            campaign_id=secrets.token_hex(16),
            model=None if base is None else base.name,
            rounds=rounds,
            settings=settings.to_bytes(),
            created_at=self.clock.moment().unix,
            due_at=_due(settings, self.clock.moment().unix),
        )
        writer.add_campaign(campaign)
        return campaign


def _due(settings: CampaignSettings, now: float) -> float | None:
    return None if settings.schedule is None else settings.schedule.after(now)
