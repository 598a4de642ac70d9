"""The real service in its own process, and simulated devices that reach it through a real broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from aggregator import main as covey
from aggregator.round_operations import RoundView
from protocol import topics
from tests.aggregator_devices import SimulatedDevice, model_files

DOWNLINKS = f"{topics.ROOT}/dev/+/down/+"


COMMAND = ("-c", "from aggregator.cli import main; main()")


class ServiceProcess:
    """`covey aggregator run`, to be killed and started again.

    Attributes:
        program: what the interpreter runs, before the arguments of the command.
        options: more arguments of the command.
    """

    def __init__(self, state: Path, broker: str) -> None:
        self.program: tuple[str, ...] = COMMAND
        self.options: tuple[str, ...] = ()
        self._state = state
        self._broker = broker
        self._process: subprocess.Popen[bytes] | None = None
        self._log = state.parent / "service.log"

    def start(self) -> None:
        command = [sys.executable, *self.program, "aggregator", "run"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *command,
                    *("--state", str(self._state), "--broker", self._broker, "--listen", "127.0.0.1:0"),
                    *self.options,
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONWARNINGS": "default"},
            )

    def end(self, number: int) -> int:
        """Sends a signal and waits for the end; returns the exit code."""
        process = self._process
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(number)
        code = process.wait(timeout=120)
        self._process = None
        return code

    @property
    def ended(self) -> bool:
        """Whether it was started, and has ended by itself."""
        return self._process is not None and self._process.poll() is not None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(signal.SIGKILL)


class SimulatedFleet:
    """Simulated devices behind one MQTT connection; each still speaks on its own topics.

    Attributes:
        pause: seconds that a device takes for each answer, so that a test can act in between.
    """

    def __init__(self, state: Path, host: str, port: int, *, devices: int, parameters: int) -> None:
        with covey.open_operator(state) as operator:
            operator.publish(*model_files(parameters))
            names = [f"device-{index}" for index in range(devices)]
            self.devices = {n: SimulatedDevice.enrol(operator, n, parameters) for n in names}
        self.state = state
        self.pause = 0.0
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="fleet")
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(1, 1)
        self._client.connect(host, port)
        self._repeater = threading.Thread(target=self._repeat, daemon=True)

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        client.subscribe(DOWNLINKS, 1)
        with self._lock:
            for device in self.devices.values():
                if device.online:
                    client.publish(*device.birth(), qos=1, retain=True)

    def _on_message(self, client: paho.Client, _: Any, message: paho.MQTTMessage) -> None:
        try:
            device = self.devices[message.topic.split("/")[3]]
            with self._lock:
                answers = device.receive(bytes(message.payload)) if device.online else []
            if answers and self.pause:
                time.sleep(self.pause)
            for topic, frame in answers:
                client.publish(topic, frame, qos=1)
        except BaseException as error:
            self.errors.append(error)
            raise

    def _repeat(self) -> None:
        while not self._stopping.wait(1.0):
            with self._lock:
                repeats = [each for d in self.devices.values() if d.online for each in d.repeat()]
            for topic, frame in repeats:
                self._client.publish(topic, frame, qos=1)

    def hang_up(self, name: str) -> None:
        """A device goes offline and forgets everything; its will comes."""
        with self._lock:
            topic, frame = self.devices[name].will()
            self.devices[name].crash()
        self._client.publish(topic, frame, qos=1, retain=True)

    def come_back(self, name: str) -> None:
        with self._lock:
            topic, frame = self.devices[name].birth()
        self._client.publish(topic, frame, qos=1, retain=True)

    def wait(self, done: Callable[[], bool], *, seconds: float = 120.0) -> None:
        """Waits until `done`."""
        end = time.monotonic() + seconds
        while not done():
            assert not self.errors, self.errors
            assert time.monotonic() < end, f"not done after {seconds} s: {self.rounds()}"
            time.sleep(0.02)

    def phase(self) -> str:
        """The phase of the round that is running; empty without one."""
        with covey.open_operator(self.state) as operator:
            live = operator.live_rounds()
        return live[0].phase if live else ""

    def rounds(self) -> tuple[RoundView, ...]:
        with covey.open_operator(self.state) as operator:
            return operator.rounds()

    def __enter__(self) -> Self:
        self._client.loop_start()
        self._repeater.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._repeater.join()
        self._client.disconnect()
        self._client.loop_stop()
