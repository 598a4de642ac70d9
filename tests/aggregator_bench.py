"""A whole aggregator in one process, for tests: real service and repository, no network, time by hand."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from aggregator.adapters.objects import DirectoryStore
from aggregator.assigning import Promotion
from aggregator.clock import Moment
from aggregator.downloads import DEFAULT_LIMITS
from aggregator.fleet.authority import Authority
from aggregator.operations import Operator
from aggregator.records import Campaign
from aggregator.registry.artefacts import ArtefactStore
from aggregator.renewals import Renewals
from aggregator.retention import DEFAULT_RETENTION
from aggregator.round_operations import RoundView
from aggregator.rounds.release import Unmask
from aggregator.service import Service
from aggregator.settings import CampaignRequest
from aggregator.transport import Connected, Delivery, Disconnected, Inbound
from protocol.secagg.masking import apply_masks
from tests.aggregator_devices import Outgoing, SimulatedDevice, model_files
from tests.databases import sqlite_repository

START = 1_800_000_000.0


@dataclass
class ManualClock:
    """Time that passes when a test says so."""

    now: float = 0.0

    def moment(self) -> Moment:
        return Moment(self.now, START + self.now)


@dataclass
class LoopTransport:
    """A network of queues; `lose` decides which messages to devices are lost."""

    inbound: deque[Inbound] = field(default_factory=deque)
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    retained: dict[str, bytes] = field(default_factory=dict)
    unacknowledged: list[Delivery] = field(default_factory=list)
    resets: int = 0
    up: bool = True

    def receive(self, limit: int, timeout: float) -> list[Inbound]:
        batch = [self.inbound.popleft() for _ in range(min(limit, len(self.inbound)))]
        self.unacknowledged += [item for item in batch if isinstance(item, Delivery)]
        return batch

    def acknowledge(self, delivery: Delivery) -> None:
        self.unacknowledged = [item for item in self.unacknowledged if item is not delivery]

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        if not self.up:
            return False
        self.sent.append((topic, payload))
        if retain:
            self.retained[topic] = payload
        return True

    def busy(self) -> bool:
        return False

    def reset(self) -> None:
        self.resets += 1
        self.inbound.extend((Disconnected(), Connected(), *self.unacknowledged))
        self.unacknowledged = []


class Bench:
    """A fleet of simulated devices around one service, in a directory.

    Example:
        bench = Bench(tmp_path, devices=5)
        campaign = bench.start(CampaignRequest("toy", rounds=1, cohort=5))
        bench.run_until(lambda: bench.status(campaign) == "finished")
    """

    def __init__(
        self,
        path: Path,
        *,
        devices: int = 5,
        parameters: int = 1000,
        store: ArtefactStore | None = None,
        beside: Executor | None = None,
        unmask: Unmask = apply_masks,
    ) -> None:
        self.path = path
        self.clock = ManualClock()
        self.authority = Authority.create("orchard", now=int(START), serial=1)
        self.repository = sqlite_repository(path / "aggregator.db")
        self.beside, self.unmask = beside, unmask
        self.store = store or DirectoryStore(path / "registry")
        self.operator = Operator(self.repository, self.store, self.authority, self.clock)
        self.parameters = parameters
        self.operator.publish(*model_files(parameters))
        names = [f"device-{index}" for index in range(devices)]
        self.devices = {name: SimulatedDevice.enrol(self.operator, name, parameters) for name in names}
        self.filter: Callable[[Outgoing], list[Outgoing]] = lambda message: [message]
        self.downloads = DEFAULT_LIMITS
        self.retention = DEFAULT_RETENTION
        self.promotion = Promotion.AUTO
        self._counter = 0
        self._later: list[tuple[float, int, Outgoing]] = []
        self.boot()

    def boot(self) -> None:
        """Starts the service, or starts it again after a crash: what is in memory and on its way is lost."""
        self.transport = LoopTransport()
        self.service = Service(
            self.repository,
            self.store,
            self.authority,
            self.transport,
            self.clock,
            renewals=Renewals(lambda: self.authority),
            downloads=self.downloads,
            retention=self.retention,
            promotion=self.promotion,
            unmask=self.unmask,
            beside=self.beside,
        )
        self.transport.inbound.append(Connected())
        for device in self.devices.values():
            if device.online:
                self.deliver(device.birth())

    def close(self) -> None:
        self.repository.close()

    def deliver(self, *messages: Outgoing) -> None:
        """Brings messages of devices to the service."""
        for message in messages:
            for topic, frame in self.filter(message):
                self.transport.inbound.append(Delivery(topic, frame))

    def later(self, seconds: float, message: Outgoing) -> None:
        """Brings a message to the service after some time."""
        self._counter += 1
        heapq.heappush(self._later, (self.clock.now + seconds, self._counter, message))

    def start(self, request: CampaignRequest) -> Campaign:
        return self.operator.start_rounds(request)

    def step(self, seconds: float = 0.1) -> None:
        """Lets a little time pass: the service serves once, and every device answers."""
        self.clock.now += seconds
        while self._later and self._later[0][0] <= self.clock.now:
            self.deliver(heapq.heappop(self._later)[2])
        self.service.step(0)
        sent, self.transport.sent = self.transport.sent, []
        for topic, frame in sent:
            parts = topic.split("/")
            device = self.devices.get(parts[3]) if parts[2] == "dev" and parts[4] == "down" else None
            if device is not None and device.online:
                self.deliver(*device.receive(frame))
        if round(self.clock.now * 10) % 20 == 0:
            for device in self.devices.values():
                if device.online:
                    self.deliver(*device.repeat())

    def run_until(self, done: Callable[[], bool], *, seconds: float = 2000.0) -> None:
        """Steps until `done`; fails when it takes longer than `seconds` of simulated time."""
        end = self.clock.now + seconds
        while not done():
            assert self.clock.now < end, f"not done after {seconds} simulated seconds: {self.rounds()}"
            self.step()

    def finish(self, campaign: Campaign, *, seconds: float = 2000.0) -> list[RoundView]:
        """Runs a campaign to its end; returns its rounds."""
        self.run_until(
            lambda: self.operator.campaign(campaign.campaign_id).status not in ("waiting", "running"),
            seconds=seconds,
        )
        return list(self.operator.rounds(campaign.campaign_id))

    def rounds(self) -> list[RoundView]:
        return list(self.operator.rounds())

    def phase(self) -> str:
        """The phase of the round that is running; empty without one."""
        live = self.operator.live_rounds()
        return live[0].phase if live else ""

    def hang_up(self, *names: str) -> None:
        """These devices go offline, and their wills come."""
        for name in names:
            self.deliver(self.devices[name].will())

    def come_back(self, *names: str) -> None:
        for name in names:
            self.deliver(self.devices[name].birth())
