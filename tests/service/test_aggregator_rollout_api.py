"""Rollouts and pins through the API and the commands: what is asked, refused, shown and recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from aggregator.access.roles import Role
from aggregator.client import ApiError, Client
from aggregator.rollout.waves import ordered
from aggregator.rollout_operations import RolloutRequest
from tests.aggregator_devices import model_files
from tests.api_bench import Api, api, csr
from tests.service.test_aggregator_api import problem
from tests.service.test_aggregator_cli import run as run

V1 = "/api/v1"
NAMES = tuple(f"barn-{index}" for index in range(20))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    """Twenty devices, and three versions of which the fleet has the first."""
    with api(tmp_path) as found:
        with found.client(Role.OPERATOR) as client:
            for name in NAMES:
                client.enrol(csr(name))
            for seed in range(3):
                client.publish(*model_files(50, seed=seed))
        with found.context.operator.repository.write() as writer:
            writer.set_stage("toy", 1, "stable")
        yield found


def asked(**changes: object) -> RolloutRequest:
    return RolloutRequest(**{"model": "toy", "version": 2, **changes})  # type: ignore[arg-type]


def refused(client: Client, **changes: object) -> str:
    with pytest.raises(ApiError) as error:
        client.start_rollout(asked(**changes))
    assert error.value.code in ("refused", "not-found", "invalid-request")
    return str(error.value)


def test_a_rollout_from_start_to_roll_back(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        started = client.start_rollout(asked(gate=("accuracy>=0.8", "errors<0.01"), soak_seconds=60.0))
        assert (started.status, started.wave, started.percent, started.pool) == ("running", 1, 5.0, 20)
        assert (started.replaces, started.gates) == (1, ("accuracy>=0.8", "errors<0.01"))
        assert started.sight is not None and (started.sight.size, started.sight.serving) == (1, 0)
        assert [v.stage for v in client.versions()] == ["stable", "canary", "candidate"]
        who = client.rollout_devices(started.rollout)
        assert who.devices == ordered(who.pool, bytes.fromhex(who.seed))[:1] and who.pool == tuple(
            sorted(NAMES)
        )
        assert "is running: let it end" in refused(client, version=3)
        assert client.turn_rollout(started.rollout, "pause", "looking").note == "looking"
        assert client.turn_rollout(started.rollout, "resume").status == "running"
        assert client.turn_rollout(started.rollout, "halt", "enough").status == "halted"
        with pytest.raises(ApiError, match="that is halted cannot go on"):
            client.turn_rollout(started.rollout, "resume")
        back = client.turn_rollout(started.rollout, "rollback", "bad labels")
        assert (back.status, back.note, back.percent) == ("rolled-back", "bad labels", 0.0)
        assert [step.what for step in back.steps] == ["running", "paused", "running", "halted", "rolled-back"]
        assert client.versions()[1].stage == "withdrawn"
        assert "was withdrawn" in refused(client)
        assert [each.rollout for each in client.rollouts("toy")] == [started.rollout]
        assert client.rollouts("watch") == ()
    with bench.client(Role.ADMIN) as admin:
        actions = [entry.action for entry in admin.audit_log().items][::-1]
    done = [action for action in actions if "rollout" in action]
    assert done == [
        "start-rollout",
        "start-rollout",
        "pause-rollout",
        "resume-rollout",
        "halt-rollout",
        "resume-rollout",
        "roll-back-rollout",
        "start-rollout",
    ]
    kinds = [event.kind for event in bench.context.feed.after(0) or ()]
    assert kinds.count("rollout") == 5


def test_what_makes_no_rollout_is_refused_with_what_to_do(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        for changes, why in [
            ({"version": 9}, "covey model list"),
            ({"model": "nothing"}, "covey model list"),
            ({"version": 1}, '"promotion": "manual"'),
            ({"percent": (5.0, 25.0)}, "end with 100"),
            ({"percent": ()}, "at least 1 item"),
            ({"gate": ("accuracy<0.8",)}, "wrong direction"),
            ({"gate": ("drop table",)}, "is no gate"),
            ({"seed": "xyz"}, "64 hexadecimal digits"),
            ({"soak_seconds": -1.0}, "greater than or equal to 0"),
            ({"group": "nowhere"}, "no device that is not pinned"),
        ]:
            assert why in refused(client, **changes)
        assert client.rollouts() == ()
        with bench.context.operator.repository.write() as writer:
            writer.set_stage("toy", 3, "stable")
        assert "older than 3" in refused(client)


def test_viewers_look_and_do_not_touch(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        rollout = client.start_rollout(asked()).rollout
    for method, path in [
        ("POST", "/rollouts"),
        *(("POST", f"/rollouts/{rollout}/{turn}") for turn in ("pause", "resume", "halt", "rollback")),
        ("POST", "/models/toy/versions/2/withdraw"),
        ("PUT", "/pins"),
        ("POST", "/pins/remove"),
    ]:
        problem(bench.call(method, V1 + path, Role.VIEWER, content=b"{{{"), 403, "forbidden")
    with bench.client(Role.VIEWER) as client:
        assert client.rollout(rollout).status == "running" and client.pins() == ()
    for path in ("/rollouts/" + "0" * 32, "/rollouts/" + "0" * 32 + "/devices"):
        assert "covey rollout status" in problem(bench.call("GET", V1 + path), 404, "not-found")
    problem(bench.call("GET", f"{V1}/rollouts/../../etc"), 404, "not-found")


def test_pins_and_what_holds_on_to_a_version(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        client.label("barn-3", ("site=north",))
        assert client.pin("toy", 2, device="barn-1").target == "barn-1"
        client.pin("toy", 1, device="barn-1")
        client.pin("toy", 3, group="site=north")
        pins = [(pin.kind, pin.target, pin.version) for pin in client.pins("toy")]
        assert pins == [("device", "barn-1", 1), ("group", "site=north", 3)]
        assert client.start_rollout(asked()).pool == 18
        for changes, why in [
            ({"device": "nobody"}, "no device nobody"),
            ({}, "one device, or one group"),
            ({"device": "barn-1", "group": "site=north"}, "one device, or one group"),
        ]:
            with pytest.raises(ApiError, match=why):
                client.pin("toy", 2, **changes)
        with pytest.raises(ApiError, match="a rollout of it is not over"):
            client.withdraw("toy", 2)
        with pytest.raises(ApiError, match="it is pinned"):
            client.withdraw("toy", 3)
        client.unpin("toy", group="site=north")
        assert client.withdraw("toy", 3).stage == "withdrawn"
        with pytest.raises(ApiError, match="was withdrawn"):
            client.pin("toy", 3, device="barn-1")
        with pytest.raises(ApiError, match="no pin of toy"):
            client.unpin("toy", group="site=north")
    hostile = {"model": "toy", "version": 2, "group": "<script>alert(1)</script>"}
    problem(bench.call("PUT", f"{V1}/pins", Role.OPERATOR, json=hostile), 422, "invalid-request")


def test_the_commands(run, bench: Api, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert run("aggregator", "init", "--fleet", "orchard")[0] == 0
    model = tmp_path / "toy"
    model.mkdir()
    for name, data in zip(("manifest.json", "model.tflite", "weights.bin"), model_files(50), strict=True):
        (model / name).write_bytes(data)
    (tmp_path / "barn-1.csr").write_bytes(csr("barn-1"))
    run("device", "enroll", "--csr", tmp_path / "barn-1.csr", "--out", tmp_path / "barn-1.json")
    run("model", "publish", model)
    assert run("rollout", "status")[1].startswith("no rollouts yet")
    code, out, hint = run("rollout", "start", "--model", "toy", "--version", 1, "--gate", "errors<0.1")
    assert (code, "running" in out, "no aggregator is running" in hint) == (0, True, True)
    assert run("rollout", "start", "--model", "toy", "--version", 1)[0] == 1
    (found,) = json.loads(run("rollout", "status", "--json")[1])
    assert found["gates"] == ["errors<0.1"] and found["percents"] == [5.0, 25.0, 100.0]
    shown = run("rollout", "status", found["rollout"][:8])[1]
    assert re.search(r"wave 1 +running", shown) and "waits" not in shown
    assert run("rollout", "status", "--devices")[1].split() == ["barn-1"]
    assert "paused" in run("rollout", "pause", "--reason", "[red]look")[1]
    assert "running" in run("rollout", "resume")[1]
    assert "halted" in run("rollout", "halt")[1]
    assert "rolled-back" in run("rollout", "rollback", "--reason", "bad")[1]
    assert run("rollout", "rollback")[0] == 1
    assert (
        run("rollout", "start", "--model", "toy", "--version", 1, "--soak", "soon")[2]
        .strip()
        .endswith("write 90s, 30m, 1h or 2d")
    )
    run("model", "publish", model)
    assert run("model", "pin", "toy", "--version", 2, "--device", "barn-1")[0] == 0
    assert "barn-1" in run("model", "pins", "toy")[1]
    assert run("model", "unpin", "toy", "--device", "barn-1")[0] == 0
    assert "every device has what the fleet has" in run("model", "pins")[1]
    assert "withdrawn" in run("model", "withdraw", "toy", "--version", 2)[1]
    assert run("model", "list")[1].count("withdrawn") == 2
