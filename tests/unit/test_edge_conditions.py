"""Under which circumstances a device trains: read from its own files, judged by its owner's limits."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_client.adapters.notify import Notifier
from edge_client.adapters.surroundings import Surroundings
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.conditions import UNMET, unmet, worth_telling
from edge_client.configuration import ConditionLimits, EdgeConfiguration, InvalidConfiguration
from edge_client.events import Fault
from edge_client.pausing import Gate, TrainingStopped
from edge_client.training import Examples, TrainingConfig
from edge_client.watch import Watch
from models import zoo
from protocol.conditions import Conditions

WATCH = zoo.load("watch")
NOON = 12 * 60
HOT = Fault(UNMET, "too hot", transient=True)


def put(root: Path, files: dict[str, str]) -> Path:
    """Writes a tree as /sys and /proc show it."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


PI = {
    "sys/devices/system/cpu/online": "0-3",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "61234",
    "sys/class/thermal/thermal_zone1/type": "battery",
    "sys/class/thermal/thermal_zone1/temp": "90000",
    "sys/class/thermal/cooling_device0/type": "fan",
    "proc/loadavg": "1.00 0.50 0.25 1/200 4242",
    "proc/meminfo": "MemTotal:  948000 kB\nMemFree:  20000 kB\nMemAvailable:  409600 kB",
    "proc/net/route": "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
    "wwan0\t0000A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0",
}


def test_a_pi_without_a_battery_knows_all_but_its_power(tmp_path: Path) -> None:
    assert Surroundings(put(tmp_path, PI), ("wwan",)).read() == Conditions(
        temperature=61.234, load=0.25, metered=False, free_memory=400
    )


def test_a_device_without_any_of_these_files_knows_nothing(tmp_path: Path) -> None:
    assert Surroundings(tmp_path, ("wwan",)).read() == Conditions()
    assert Surroundings(put(tmp_path, dict.fromkeys(PI, "nonsense"))).read() == Conditions()


def test_the_last_key_at_any_terminal_says_how_long_its_owner_is_away(tmp_path: Path) -> None:
    now = 1_800_000_000.0

    def idle() -> float | None:
        return Surroundings(tmp_path, unix=lambda: now).read().idle_hours

    assert idle() is None
    put(tmp_path, {"proc/uptime": "36000.52 71000.00"})
    assert idle() == 10.0
    put(tmp_path, {"dev/pts/0": "", "dev/pts/ptmx": "", "dev/tty1": "", "dev/null": ""})
    for name, hours in (("pts/0", 2.5), ("tty1", 5.0), ("pts/ptmx", 0.0), ("null", 0.0)):
        # Output, which changes the second time, is nobody's use.
        os.utime(tmp_path / "dev" / name, (now - 3600 * hours, now))
    assert idle() == 2.5
    # From before the clock was set: no terminal was used before the start.
    os.utime(tmp_path / "dev/pts/0", (0.0, now))
    os.utime(tmp_path / "dev/tty1", (0.0, now))
    assert idle() == 10.0
    os.utime(tmp_path / "dev/tty1", (now + 60, now))
    assert idle() == 0.0


def test_this_machine_is_read_without_an_error() -> None:
    found = Surroundings().read()
    assert found.load is not None and found.free_memory is not None and found.free_memory > 0


@pytest.mark.parametrize(
    ("supplies", "power", "battery"),
    [
        ({"BAT0": ("Battery", "Discharging", "41")}, "battery", 41),
        ({"BAT0": ("Battery", "Discharging", "41"), "AC": ("Mains", "1")}, "mains", 41),
        ({"BAT0": ("Battery", "Charging", "41"), "AC": ("Mains", "0")}, "mains", 41),
        ({"BAT0": ("Battery", "Discharging", "80"), "BAT1": ("Battery", "Full", "12")}, "battery", 12),
        ({"usb": ("USB", "1")}, "mains", None),
        ({"AC": ("Mains", "0")}, None, None),
    ],
)
def test_power_is_what_the_supplies_say(
    tmp_path: Path, supplies: dict[str, tuple[str, ...]], power: str | None, battery: int | None
) -> None:
    for name, (kind, *rest) in supplies.items():
        folder = f"sys/class/power_supply/{name}"
        if kind == "Battery":
            put(
                tmp_path, {f"{folder}/type": kind, f"{folder}/status": rest[0], f"{folder}/capacity": rest[1]}
            )
        else:
            put(tmp_path, {f"{folder}/type": kind, f"{folder}/online": rest[0]})
    mouse = "sys/class/power_supply/hid-1"
    put(tmp_path, {f"{mouse}/type": "Battery", f"{mouse}/scope": "Device", f"{mouse}/capacity": "3"})
    found = Surroundings(tmp_path).read()
    assert (found.power, found.battery) == (power, battery)


def test_the_default_route_says_whether_the_link_is_metered(tmp_path: Path) -> None:
    route = PI["proc/net/route"].replace("eth0", "wwan1")
    assert Surroundings(put(tmp_path, {"proc/net/route": route}), ("wwan",)).read().metered is True
    assert Surroundings(tmp_path).read().metered is False
    zero = "0" * 32
    six = f"{zero} 00 {zero} 00 fe80{'0' * 28} 00000400 00000001 00000000 00000003     ppp0"
    own = f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo"
    other = put(tmp_path / "other", {"proc/net/ipv6_route": f"{six}\n{own}"})
    assert Surroundings(other, ("ppp",)).read().metered is True


GOOD = Conditions(power="mains", battery=90, temperature=50.0, load=0.2, metered=False, free_memory=400)


@pytest.mark.parametrize(
    ("limits", "now", "said"),
    [
        ({"power": "mains"}, {"power": "battery"}, "it runs on battery"),
        ({}, {"power": "battery", "battery": 19}, "its battery holds 19 %"),
        ({}, {"temperature": 80.5}, "its processor has"),
        ({"maximum_load": 0.5}, {"load": 0.8}, "others load it with 0.80"),
        ({"minimum_free_memory": 500}, {}, "400 MiB are free"),
        ({}, {"metered": True}, "its link costs"),
        ({"quiet_hours": ["09:00-17:30"]}, {}, "its owner keeps it quiet, 09:00-17:30"),
        ({"quiet_hours": ["23:00-12:01"]}, {}, "its owner keeps it quiet"),
    ],
)
def test_one_limit_that_is_broken_keeps_the_device_out(
    limits: dict[str, object], now: dict[str, object], said: str
) -> None:
    own = ConditionLimits.of(limits, "conditions")
    fault = unmet(own, GOOD.model_copy(update=now), NOON)
    assert fault is not None and fault.code == UNMET and fault.transient and said in fault.detail
    quiet = unmet(own.model_copy(update={"tell": False}), GOOD.model_copy(update=now), NOON)
    assert quiet is not None and quiet.detail == "its owner's conditions are not met"


def test_what_is_good_or_unknown_keeps_nobody_out() -> None:
    strict = ConditionLimits(
        power="mains", maximum_load=0.5, minimum_free_memory=100, quiet_hours=("12:01-12:00",)
    )
    assert unmet(strict, GOOD, NOON) is None
    assert unmet(strict, Conditions(), NOON) is None
    # The client's own thread is no reason to stop it.
    assert unmet(strict, GOOD.model_copy(update={"load": 0.7}), NOON, own_load=0.25) is None
    assert unmet(ConditionLimits(metered=True), GOOD.model_copy(update={"metered": True}), NOON) is None


@pytest.mark.parametrize(
    "text",
    [
        "[conditions]\nquiet_hours = ['9:00-17:00']",
        "[conditions]\nquiet_hours = ['09:00-09:00']",
        "[conditions]\nquiet_hours = ['24:00-09:00']",
        "[conditions]\nmaximum_temprature = 70",
        "[conditions]\npower = 'sun'",
        "[conditions]\nminimum_battery = 101",
        "[conditions]\nmetered = 1",
    ],
)
def test_a_limit_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="conditions"):
        EdgeConfiguration.from_bytes(text.encode())


def test_the_settings_as_they_hold_are_a_file_that_says_the_same() -> None:
    given = EdgeConfiguration.from_bytes(
        b"[conditions]\nmaximum_load = 1\nquiet_hours = ['08:00-18:30', '23:00-06:00']\ntell = false\n"
        b"[[data]]\nsource = 'iio'\nmodel = 'watch'\nchannels = ['in_accel_x']\n"
        b"scale = { in_accel_x = 2.5 }\n"
    )
    assert given.conditions.maximum_load == 1.0
    assert EdgeConfiguration.from_bytes(given.to_toml().encode()) == given
    assert EdgeConfiguration.from_bytes(EdgeConfiguration().to_toml().encode()) == EdgeConfiguration()


def test_what_wavers_is_not_told_every_time() -> None:
    def news(seconds: float, **changed: object) -> bool:
        return worth_telling(GOOD, GOOD.model_copy(update=changed), seconds)

    assert not news(59, power="battery") and news(60, power="battery") and news(60, metered=True)
    assert not news(10**6) and not news(899, battery=10) and news(900, battery=10)
    assert not news(899, idle_hours=5.0) and news(900, idle_hours=5.0)
    idle = GOOD.model_copy(update={"idle_hours": 4.5})
    for hours, told in ((4.9, False), (7.9, False), (8.0, True), (3.9, True), (0.0, True)):
        assert worth_telling(idle, idle.model_copy(update={"idle_hours": hours}), 900) is told
    assert not news(900, temperature=55.0) and news(900, temperature=65.0) and news(900, temperature=None)


# --- in training -----------------------------------------------------------------------------------------


def watch_examples(count: int = 64) -> Examples:
    generator = np.random.default_rng(1)
    x = generator.normal(size=(count, *WATCH.manifest.input.shape)).astype(np.float32)
    return Examples("own", x, generator.integers(0, len(WATCH.manifest.labels), count).astype(np.int32))


def test_training_waits_at_a_closed_gate_and_ends_as_it_would_have() -> None:
    config, gate, calls = TrainingConfig(2, 0.05), Gate(patience=60), 0
    waiting = threading.Event()

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            gate.set(HOT)
            waiting.set()
        gate.wait()

    def train(trainer: TfliteTrainer) -> np.ndarray:
        return trainer.train(WATCH.weights, watch_examples(), config, config.generator()).delta

    undisturbed = train(TfliteTrainer(WATCH.manifest, WATCH.graph))
    found: list[np.ndarray] = []
    trainer = TfliteTrainer(WATCH.manifest, WATCH.graph, between=between)
    thread = threading.Thread(target=lambda: found.append(train(trainer)))
    thread.start()
    assert waiting.wait(120)
    thread.join(0.2)
    assert thread.is_alive() and calls == 8
    gate.set(None)
    thread.join(60)
    assert calls > 8 and np.array_equal(found[0], undisturbed)


def test_training_is_given_up_when_the_gate_stays_closed() -> None:
    gate = Gate(patience=0)
    trainer = TfliteTrainer(WATCH.manifest, WATCH.graph, between=gate.wait)
    config = TrainingConfig(1, 0.05)
    gate.set(HOT)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train(WATCH.weights, watch_examples(), config, config.generator())
    assert stopped.value.fault == HOT
    gate.set(None)
    trainer.train(WATCH.weights, watch_examples(), config, config.generator())


def test_the_watch_closes_the_gate_and_tells_what_it_may(tmp_path: Path) -> None:
    put(tmp_path, PI)
    gate = Gate(patience=0)
    watch = Watch(Surroundings(tmp_path), ConditionLimits(), gate, minute=lambda: NOON)
    assert watch.look(training=False, examples=64) is None and watch.news(0.0)
    assert watch.tell(0.0).examples == 10 and not watch.news(3600.0)
    put(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "85000"})
    fault = watch.look(training=True, examples=64)
    assert fault is not None and "85 C" in fault.detail
    with pytest.raises(TrainingStopped):
        gate.wait()
    assert watch.news(3600.0) and watch.tell(3600.0).temperature == 85.0
    silent = Watch(Surroundings(tmp_path), ConditionLimits(tell=False), gate, minute=lambda: NOON)
    assert silent.look(training=False) is not None
    assert silent.tell(0.0) == Conditions() and not silent.news(10**6)


# --- the service manager -----------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_how_the_service_is(tmp_path: Path, abstract: bool) -> None:
    name = f"@covey-test-{id(tmp_path)}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        systemd.settimeout(60)
        notifier = Notifier(name)
        notifier.ready()
        notifier.status("connected\nREADY=0")
        notifier.status("connected\nREADY=0")
        notifier.alive()
        notifier.stopping()
        heard = [systemd.recv(1024) for _ in range(4)]
    assert heard == [b"READY=1", b"STATUS=connectedREADY=0", b"WATCHDOG=1", b"STOPPING=1"]
    Notifier(str(tmp_path / "nobody")).ready()
    Notifier("").ready()
