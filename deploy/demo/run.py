"""The demo itself: a private fleet on this machine, from the first model to the report.

One of two files that know both applications (the other is a simulation's), so it lives outside both cores.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from aggregator import main as covey
from aggregator.round_operations import RoundView
from aggregator.settings import CampaignRequest
from deploy.broker import BrokerProcess
from deploy.demo.accidents import Accidents, Sight
from deploy.demo.baselines import Baselines, evaluate, run_baselines
from deploy.demo.browsing import console_link, show_in_browser
from deploy.demo.compose import FoldOutcome, compose
from deploy.demo.display import Scene, shown
from deploy.demo.fleet import Fleet, device_policy, fleet
from deploy.demo.options import DemoError, DemoOptions, Fold, plan_folds, plan_kills, tolerated_dropouts
from deploy.demo.processes import ProcessError, ProcessGroup, signals_raise
from deploy.demo.report import summary_table, write_report
from deploy.demo.result import DemoResult
from edge_client.training import Evaluation
from models import zoo
from models.datasets import digits, watch
from models.examples import Examples
from models.recipes import RECIPES, Recipe
from models.weights import decode_weights
from protocol.dp.parameters import PrivacyMode
from protocol.plan import Deadlines

NOISE_MULTIPLIER = 0.1
"""z of the demo: what ten devices can bear. The epsilon that follows is large, and is printed as it is."""

BITS = 16
"""Of the ring: finer steps would drown in the noise, and cost upload and memory."""

START_SECONDS = 120.0
SETTLE_SECONDS = 60.0
_POLL_SECONDS = 0.02
_DEADLINES = Deadlines(
    advertise_keys=20.0,
    share_keys=20.0,
    masked_input=60.0,
    consistency_check=20.0,
    unmasking=20.0,
    offline_grace=0.7,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """What every fold of a demo stands on.

    Attributes:
        processes: the children and their temporary directory.
        broker_url: where devices and aggregator connect.
        broker_name: what the report calls the broker.
    """

    processes: ProcessGroup
    broker_url: str
    broker_name: str


@contextmanager
def stage(options: DemoOptions) -> Iterator[Stage]:
    """Opens the broker and an empty process group; whatever ends the block, nothing of them stays.

    The children stop before the broker, so that they can say good-bye.
    """
    with ExitStack() as stack:
        stack.enter_context(signals_raise())
        if options.broker is None:
            broker = stack.enter_context(BrokerProcess())
            url, name = broker.url, str(broker.kind)
        else:
            url, name = options.broker, "given by address"
        yield Stage(stack.enter_context(ProcessGroup()), url, name)


def run_demo(options: DemoOptions, console: Console | None = None) -> DemoResult:
    """Runs the demo, writes its report and prints its table.

    Raises:
        DemoError: it cannot be done as asked, or a process failed.
    """
    console = console or Console()
    began = time.time()
    people = (watch if options.dataset == "watch" else digits).load()
    scene = Scene()
    outcomes = []
    try:
        with stage(options) as ground, ExitStack() as running:
            with shown(scene, console):
                for fold in plan_folds(options, len(people)):
                    running.close()
                    show = _Show(options, ground, fold, people, scene, console)
                    outcomes.append(show.run(running))
            if not options.keep:
                running.close()
            result = compose(options, ground.broker_name, outcomes, began=began, ended=time.time())
            page = write_report(result, options.report)
            console.print(summary_table(result))
            console.print(f"report: {page}")
            if options.keep:
                show.stay()
    except ProcessError as error:
        raise DemoError(str(error)) from error
    return result


@dataclass
class _Show:
    """One fold, from enrolment to its figures."""

    options: DemoOptions
    ground: Stage
    fold: Fold
    people: list[Examples]
    scene: Scene
    console: Console
    recipe: Recipe = field(init=False)
    rounds: int = field(init=False)
    state: Path = field(init=False)
    evaluations: list[list[Evaluation]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe = RECIPES[self.options.dataset]
        self.rounds = self.options.rounds or self.recipe.rounds
        self.model = zoo.load(self.options.dataset)
        self.training = [self.people[index] for index in self.fold.training]
        self.held_out = [self.people[index] for index in self.fold.testing]
        kills = plan_kills(self.options, self.fold, self.rounds)
        self.accidents = Accidents(kills, [person.name for person in self.training])

    def run(self, stack: ExitStack) -> FoldOutcome:
        """Runs the federation, then what it is compared with; the fleet runs until `stack` closes."""
        mode = PrivacyMode(self.options.privacy)
        trainers = len(self.training)
        survivors = trainers - tolerated_dropouts(trainers)
        self.scene.accuracy.clear()
        self.scene.rounds, self.scene.round, self.scene.phase = self.rounds, 0, ""
        self.say(f"fold {self.fold.index}: enrolling {len(self.training) + len(self.held_out)} devices")
        running = stack.enter_context(
            fleet(
                self.ground.processes,
                self.ground.broker_url,
                f"fold{self.fold.index}",
                Path(zoo.__file__).parent / self.options.dataset,
                self.training,
                self.held_out,
                device_policy(mode, survivors),
            )
        )
        self.scene.devices = dict.fromkeys(running.devices, "starting")
        running.wait_for_version(self.model.manifest.name, 1, START_SECONDS, self.alive)
        self.scene.devices = dict.fromkeys(running.devices, "online")
        self.say("every device has version 1, verified and loaded")
        self.note_version(running, 1)
        self.invite(running)
        with covey.connect(running.state) as client:
            campaign = client.start_rounds(
                CampaignRequest(
                    model=self.model.manifest.name,
                    rounds=self.rounds,
                    cohort=len(running.devices),
                    minimum=survivors,
                    min_survivors=survivors,
                    privacy=mode,
                    noise_multiplier=None if mode is PrivacyMode.NONE else NOISE_MULTIPLIER,
                    bits=BITS,
                    deadlines=_DEADLINES,
                    seed=self.options.seed,
                )
            )
        began = time.time()
        views = self.watch(running, campaign.campaign)
        ended = time.time()
        version = max((view.record.version or 1 for view in views), default=1)
        running.wait_for_version(self.model.manifest.name, version, SETTLE_SECONDS, self.alive)
        self.say(f"every device answers with version {version}")
        right = self.predictions(running, version)
        peak = max(child.peak_rss_bytes for child in running.devices.values())
        versions = running.operator.versions(self.model.manifest.name)
        runtime = next(device.runtime for device in running.operator.devices())
        return FoldOutcome(
            fold=self.fold,
            model=self.model,
            held_out=tuple(self.held_out),
            evaluations=tuple(tuple(found) for found in self.evaluations),
            baselines=self.baselines(),
            views=views,
            killed=self.accidents.killed,
            versions=versions,
            device_predictions=right,
            device_peak_rss_bytes=peak,
            runtime=runtime,
            round_seconds=ended - began,
        )

    def invite(self, running: Fleet) -> None:
        """Says where the console is, and shows it when that was asked for."""
        link = console_link(running.state)
        self.state = running.state
        self.console.print(f"console: {link}", soft_wrap=True, highlight=False)
        if self.options.open and not show_in_browser(link, running.directory):
            self.console.print("no browser opens here: open that address in one", highlight=False)

    def stay(self) -> None:
        """Keeps the fleet and its console up until Ctrl-C."""
        self.console.print(f"console: {console_link(self.state)}", soft_wrap=True, highlight=False)
        self.console.print("the fleet and its console stay up until Ctrl-C", highlight=False)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                self.alive()
                time.sleep(1.0)

    def watch(self, running: Fleet, campaign_id: str) -> tuple[RoundView, ...]:
        """Follows the rounds to their end, and makes the accidents happen."""
        seen = 0
        while True:
            self.alive()
            for live in running.operator.live_rounds():
                self.follow(running, Sight(live.number, live.phase, live.said, live.stored))
            views = running.operator.rounds(campaign_id)
            over = [view for view in views if view.record.status != "running"]
            for view in over[seen:]:
                self.end_of_round(running, view)
            seen = len(over)
            campaign = running.operator.campaign(campaign_id)
            if campaign.status in ("failed", "cancelled"):
                raise DemoError(f"the rounds ended early: {campaign.note or campaign.status}")
            if campaign.status == "finished" and len(over) == len(views):
                return views
            for view in views[len(over) :]:
                if view.report.phases:
                    phase = view.report.phases[-1]
                    self.scene.answered, self.scene.expected = phase.answered, phase.expected
            time.sleep(_POLL_SECONDS)

    def follow(self, running: Fleet, sight: Sight) -> None:
        """One look at the running round."""
        self.scene.round, self.scene.phase = sight.number, sight.phase
        for action in self.accidents.step(sight):
            running.act(action)
            self.scene.devices[action.device] = "online" if action.kind == "restart" else "killed"
            if action.kind == "kill":
                self.say(f"round {sight.number}: {action.device} killed in {sight.phase or 'its end'}")
            elif action.kind == "restart":
                self.say(f"round {sight.number}: {action.device} comes back")

    def end_of_round(self, running: Fleet, view: RoundView) -> None:
        """A round has ended: bring the killed back, and look at its version."""
        record = view.record
        self.follow(running, Sight(record.number, "", {}))
        if record.version is None:
            self.say(f"round {record.number} aborted: {record.code} {record.detail}")
            self.evaluations.append(self.evaluations[-1])
        else:
            self.note_version(running, record.version)
            self.say(
                f"round {record.number}: {len(view.report.survivors)} updates in the sum, version "
                f"{record.version}, {self.scene.accuracy[-1]:.1%} on held-out people"
            )

    def note_version(self, running: Fleet, version: int) -> None:
        """Evaluates a version on the held-out people."""
        published = running.operator.model(self.model.manifest.name, version)
        weights = decode_weights(published.weights, published.manifest)
        self.evaluations.append(evaluate(self.model, weights, self.held_out))
        self.scene.accuracy.append(float(np.mean([found.accuracy for found in self.evaluations[-1]])))

    def predictions(self, running: Fleet, version: int) -> float:
        """Lets the held-out people's own devices answer; returns the share that is right."""
        right = total = 0
        for person in self.held_out:
            answered, labels = running.predict(person.name, person)
            if answered != version:
                raise DemoError(f"{person.name} answers with version {answered}, not {version}")
            truth = [self.model.manifest.labels[label] for label in person.y]
            right += sum(label == true for label, true in zip(labels, truth, strict=True))
            total += len(truth)
        return right / total

    def baselines(self) -> Baselines:
        """Trains what the federation is compared with."""
        self.scene.headline = "training each device alone, and all data in one place"
        self.scene.phase = ""
        return run_baselines(
            self.model,
            self.training,
            self.held_out,
            self.recipe,
            rounds=self.rounds,
            seed=self.options.seed,
            done=self.baseline_done,
        )

    def baseline_done(self, name: str) -> None:
        """One baseline is trained."""
        self.scene.events.append(f"baseline trained on {name}")

    def alive(self) -> None:
        """Raises ProcessError when a process ended that should not have."""
        prefix = f"fold{self.fold.index}-"
        ours = frozenset(child.name for child in self.ground.processes if not child.name.startswith(prefix))
        down = frozenset(prefix + device for device in self.accidents.down)
        self.ground.processes.check(may_be_down=ours | down)

    def say(self, event: str) -> None:
        """Shows an event, and prints it where there is no live display."""
        self.scene.headline = event
        self.scene.events.append(event)
        if not self.console.is_terminal:
            self.console.print(event, highlight=False)
