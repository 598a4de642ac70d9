"""What pages show in curves and bars, from rounds and versions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aggregator.records import Campaign, Version
from aggregator.round_operations import RoundView
from aggregator.rounds.planning import CampaignSettings
from aggregator.web.console.charts import Series
from protocol.errors import ProtocolError

LATEST = 8
_CURVES = (("accuracy", "accuracy", True), ("loss", "loss_after", False))
"""Name, metric of a training round, whether it is a share of one."""


@dataclass(frozen=True)
class ModelVersions:
    """A model's versions.

    Attributes:
        latest: newest first, at most `LATEST`.
        count: of all.
    """

    model: str
    latest: tuple[Version, ...]
    count: int


@dataclass(frozen=True)
class Curve:
    """A metric of a model over its versions.

    Attributes:
        share: it is a share of one.
        newest: of the newest version that was evaluated, else trained.
    """

    model: str
    metric: str
    share: bool
    series: tuple[Series, ...]
    newest: float


@dataclass(frozen=True)
class PrivacyBudget:
    """What the fleet has spent over the rounds, and what is left.

    Attributes:
        spent: epsilon after the last round that was accounted.
        delta: at which.
        limit: of the campaign that asked for one last; None when none did.
        series: epsilon that is left after each round; what was spent where nothing limits it.
    """

    spent: float
    delta: float
    limit: float | None
    series: tuple[Series, ...]

    @property
    def left(self) -> float | None:
        """Epsilon that may still be spent."""
        return None if self.limit is None else max(0.0, self.limit - self.spent)


def newest(versions: Sequence[Version]) -> tuple[ModelVersions, ...]:
    """Versions by model."""
    found: dict[str, list[Version]] = {}
    for version in versions:
        found.setdefault(version.model, []).append(version)
    return tuple(
        ModelVersions(model, tuple(reversed(each[-LATEST:])), len(each)) for model, each in found.items()
    )


def progress(rounds: Sequence[RoundView]) -> tuple[Curve, ...]:
    """Accuracy and loss of every model over its versions: in training, and where they were evaluated.

    In training, devices measure their own weights on their own examples, before these are averaged.
    """
    curves = []
    for model in dict.fromkeys(view.record.model for view in rounds if view.record.model is not None):
        mine = [v for v in rounds if v.record.model == model and v.record.status == "completed"]
        curves += _staleness(model, mine)
        for name, metric, share in _CURVES:
            trained = {
                float(v.record.version): v.report.metrics[metric]
                for v in mine
                if v.record.version is not None and metric in v.report.metrics
            }
            evaluated = {
                float(v.report.evaluation.version): v.report.evaluation.metrics[name].mean
                for v in mine
                if v.report.evaluation is not None and name in v.report.evaluation.metrics
            }
            noise = max((v.report.metric_noise.get(metric, 0.0) for v in mine), default=0.0)
            trained_as = f"in training, ± {noise:.2g} noise" if noise else "in training"
            lines = (
                Series(trained_as, tuple(sorted(trained.items()))),
                Series("evaluated", tuple(sorted(evaluated.items()))),
            )
            shown = tuple(line for line in lines if line.points)
            if shown:
                curves.append(Curve(model, name, share, shown, shown[-1].points[-1][1]))
    return tuple(curves)


def _staleness(model: str, rounds: Sequence[RoundView]) -> list[Curve]:
    """How many versions behind the updates were that buffers added, mean and largest."""
    ages = {float(v.record.version): found for v in rounds if v.record.version and (found := v.report.ages())}
    if not ages:
        return []
    mean = tuple(
        (version, sum(behind * updates for behind, updates in found.items()) / sum(found.values()))
        for version, found in sorted(ages.items())
    )
    largest = tuple((version, float(max(found))) for version, found in sorted(ages.items()))
    lines = (Series("largest", largest), Series("mean", mean))
    return [Curve(model, "versions behind", False, lines, mean[-1][1])]


def budget(rounds: Sequence[RoundView], campaigns: Sequence[Campaign]) -> PrivacyBudget | None:
    """The privacy budget over the rounds; None when no round was accounted."""
    accounted = [v.report for v in rounds if v.report.epsilon is not None and v.report.delta is not None]
    if not accounted:
        return None
    limit = next((each for each in map(_limit, reversed(campaigns)) if each is not None), None)
    spent = [report.epsilon or 0.0 for report in accounted]
    if limit is None:
        line = Series("spent", tuple((float(n), e) for n, e in enumerate(spent, 1)))
        series: tuple[Series, ...] = (line,)
    else:
        left = [(float(n), max(0.0, limit - e)) for n, e in enumerate([0.0, *spent])]
        ends = ((0.0, 0.0), (float(len(spent)), 0.0))
        series = (Series("left", tuple(left)), Series("nothing left", ends, dashed=True))
    return PrivacyBudget(spent[-1], accounted[-1].delta or 0.0, limit, series)


def _limit(campaign: Campaign) -> float | None:
    try:
        return CampaignSettings.from_bytes(campaign.settings).epsilon_limit
    except ProtocolError:
        return None
