"""The command `covey`: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator import cli, cli_output
from aggregator import main as covey
from aggregator.rounds.planning import CampaignSettings
from protocol.enrolment import EnrolmentBundle
from protocol.identity import create_request
from tests.aggregator_bench import Bench
from tests.aggregator_devices import model_files
from tests.toy_rounds import request as campaign_request


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs `covey ...` on a state directory of its own; returns (exit code, output, errors)."""
    monkeypatch.setenv("COVEY_STATE", str(tmp_path / "state"))
    # Set at the import, which may have been in another test, with other columns.
    monkeypatch.setattr(cli_output._console, "_width", 160)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["covey", *map(str, arguments)])
        code: object = 0
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        finally:
            # `aggregator run` logs to the standard error of now, which is closed in other tests.
            root.handlers[:] = handlers
            root.setLevel(level)
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "toy"
    directory.mkdir()
    for name, data in zip(("manifest.json", "model.tflite", "weights.bin"), model_files(50), strict=True):
        (directory / name).write_bytes(data)
    return directory


def test_from_nothing_to_a_campaign(run, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("aggregator", "init", "--fleet", "orchard")
    assert code == 0
    assert "covey model publish" in out
    assert run("device", "list")[1].startswith("no devices yet")
    assert run("model", "list")[1].startswith("no versions yet")
    assert run("round", "status")[1].startswith("no rounds yet")

    request = tmp_path / "barn-1.csr"
    request.write_bytes(create_request(Ed25519PrivateKey.generate(), "barn-1"))
    code, out, _ = run("device", "enroll", "--csr", request, "--out", tmp_path / "barn-1.json")
    assert (code, "enrolled barn-1 in orchard" in out) == (0, True)
    assert EnrolmentBundle.from_bytes((tmp_path / "barn-1.json").read_bytes()).device_id == "barn-1"
    assert "barn-1" in run("device", "list")[1]
    (device,) = json.loads(run("device", "list", "--json")[1])
    assert (device["device"], device["online"], device["last_seen"]) == ("barn-1", False, None)
    assert run("device", "exclude", "barn-1", "--reason", "[red]loud")[0] == 0
    assert "excluded: [red]loud" in run("device", "list")[1]
    assert run("device", "include", "barn-1")[0] == 0

    code, out, _ = run("model", "publish", model)
    assert (code, "toy" in out) == (0, True)
    (version,) = json.loads(run("model", "list", "--json")[1])
    assert (version["model"], version["version"], version["round"]) == ("toy", 1, None)

    code, out, err = run("round", "start", "--model", "toy", "--rounds", 2, "--cohort", 3, "--json")
    assert code == 0
    assert "no aggregator is running" in err
    (campaign,) = json.loads(out)
    assert (campaign["status"], campaign["rounds"]) == ("waiting", 2)
    status = json.loads(run("round", "status", "--json")[1])
    assert status == {"campaigns": [campaign], "rounds": []}


def test_a_buffered_campaign_by_its_options(run, model: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run("aggregator", "init", "--fleet", "orchard")
    run("model", "publish", model)
    create = ("campaign", "create", "--model", "toy", "--mode", "buffered", "--json")
    for options, (size, staleness, seconds) in {
        ("--buffer", 12, "--max-staleness", 3): (12, 3, 60.0),
        ("--cohort", 7, "--input-seconds", 600): (7, 8, 600.0),
    }.items():
        code, out, _ = run(*create, *options)
        assert code == 0
        (created,) = json.loads(out)
        assert created["buffered"] is True
        with covey.open_operator(tmp_path / "state") as operator:
            settings = CampaignSettings.from_bytes(operator.campaign(created["campaign"]).settings)
        assert settings.buffered and settings.cohort.size == size
        assert settings.maximum_staleness == staleness and settings.deadlines.masked_input == seconds
    assert "buffers of toy" in run("campaign", "list")[1]
    for options in (("--buffer", 5), ("--mode", "buffered", "--buffer", 5, "--cohort", 6)):
        code, out, err = run("campaign", "create", "--model", "toy", *options)
        assert (code, out) == (2, "") and "--mode buffered, in place of --cohort" in " ".join(err.split())


def test_errors_say_what_to_do_and_exit_with_1(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for arguments in (["device", "list"], ["model", "list"], ["round", "status"], ["aggregator", "run"]):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert "covey aggregator init" in err
        assert "Traceback" not in err
    run("aggregator", "init")
    assert run("aggregator", "init")[0] == 1
    (tmp_path / "bad.csr").write_bytes(b"garbage")
    code, _, err = run("device", "enroll", "--csr", tmp_path / "bad.csr", "--out", tmp_path / "x.json")
    assert (code, "covey-edge" in err) == (1, True)
    assert not (tmp_path / "x.json").exists()
    (tmp_path / "empty").mkdir()
    code, _, err = run("model", "publish", tmp_path / "empty")
    assert (code, "manifest.json" in err) == (1, True)
    assert run("round", "start", "--model", "toy")[0] == 1
    assert run("round", "watch")[0] == 1
    code, _, err = run("aggregator", "run", "--broker", "mqtt://user:secret@localhost")
    assert code == 1
    assert "secret" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["round", "start"],
        ["round", "start", "--model", "toy", "--cohort", "1"],
        ["round", "start", "--model", "toy", "--privacy", "perfect"],
        ["device", "enroll", "--csr", "/nonexistent", "--out", "x"],
    ],
)
def test_a_wrong_command_line_exits_with_2(run, arguments: list[str]) -> None:  # type: ignore[no-untyped-def]
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage" in err


@pytest.mark.parametrize(
    "command",
    [
        "aggregator init",
        "aggregator run",
        "aggregator broker",
        "device enroll",
        "device list",
        "device exclude",
        "device include",
        "device label",
        "login",
        "logout",
        "whoami",
        "token create",
        "token list",
        "token revoke",
        "audit-log",
        "model publish",
        "model list",
        "round start",
        "round status",
        "round watch",
    ],
)
def test_every_command_explains_itself_with_an_example(run, command: str) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert f"covey {command}" in out.replace("Usage: covey", "")


def test_tokens_and_what_they_leave_behind(run) -> None:  # type: ignore[no-untyped-def]
    run("aggregator", "init")
    code, made, _ = run(
        "token", "create", "--role", "viewer", "--expires", "90m", "--json", "--label", "[b]x"
    )
    content = json.loads(made)
    assert (code, content["role"], content["expires_at"] - content["created_at"]) == (0, "viewer", 5400)
    listed = run("token", "list")[1]
    assert content["token"] in listed and "[b]x" in listed
    assert content["secret"] not in listed and "first" in listed
    assert run("token", "revoke", content["token"])[0] == 0
    assert "revoked" in run("token", "list")[1]
    code, _, err = run("token", "revoke", "0" * 12)
    assert (code, "covey token list" in err) == (1, True)
    log = json.loads(run("audit-log", "--output", "json")[1])
    assert [(e["action"], e["target"], e["outcome"]) for e in log] == [
        ("revoke-token", "0" * 12, "not-found"),
        ("revoke-token", content["token"], "done"),
        ("create-token", "viewer [b]x", "done"),
    ]
    assert "viewer [b]x" in run("audit-log")[1]


@pytest.mark.parametrize("expires", ["0d", "367d", "30", "d", "-1d", "1w", "9999999m", "1d "])
def test_a_time_that_is_none_makes_no_token(run, expires: str) -> None:  # type: ignore[no-untyped-def]
    run("aggregator", "init")
    code, out, err = run("token", "create", "--role", "admin", f"--expires={expires}")
    assert (code, out, "30d, 12h or 90m" in err) == (1, "", True)


def test_labels_by_the_command(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run("aggregator", "init")
    request = tmp_path / "barn-1.csr"
    request.write_bytes(create_request(Ed25519PrivateKey.generate(), "barn-1"))
    run("device", "enroll", "--csr", request, "--out", tmp_path / "barn-1.json")
    assert "site=north" in run("device", "label", "barn-1", "site=north", "barn")[1]
    assert "barn-1" in run("device", "list", "--label", "barn", "--offline")[1]
    assert run("device", "list", "--label", "barn", "--online", "--json")[1] == "[]\n"
    code, _, err = run("device", "label", "barn-1", "<script>")
    assert (code, "body.labels.0" in err) == (1, True)


def test_help_and_version(run) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("--help")
    assert code == 0
    assert all(word in out for word in ("aggregator", "device", "model", "round", "Exit codes"))
    assert run("--version")[1].startswith("covey 0.")


def test_commands_of_other_distributions_join_and_are_loaded_when_used(
    run,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = EntryPoint("extra", "tests.service.test_aggregator_cli:extra_command", "covey.commands")
    broken = EntryPoint("broken", "no_such_module:command", "covey.commands")
    monkeypatch.setattr(cli, "_registered", lambda: {"extra": entry, "broken": broken})
    assert run("extra", "--word", "hello") == (0, "hello\n", "")
    assert run("device", "--help")[0] == 0  # the broken one is not touched


def extra_command(word: str = "nothing") -> None:
    """Says a word."""
    sys.stdout.write(word + "\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_a_campaign_to_its_end(run, tmp_path: Path, as_json: bool) -> None:  # type: ignore[no-untyped-def]
    covey.init(tmp_path / "state")
    bench = Bench(tmp_path / "state")
    good = bench.start(campaign_request(rounds=2))
    bench.finish(good)
    for name in ("device-0", "device-1", "device-2"):
        bench.devices[name].mute = {"share-keys"}
    bad = bench.start(campaign_request())
    bench.finish(bad)
    bench.close()
    options = ["--json"] if as_json else []
    code, out, _ = run("round", "watch", "--campaign", good.campaign_id, *options)
    assert code == 0
    if as_json:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["version"] for line in lines] == [2, 3]
        assert lines[0]["report"]["metrics"].keys() >= {"accuracy", "loss_after"}
        assert lines[0]["report"]["phases"][0]["phase"] == "AdvertiseKeys"
    else:
        assert "round 2 of 2: completed with version 3" in out
    code, out, _ = run("round", "watch", "--campaign", bad.campaign_id, *options)
    assert code == 3
    assert "too-few-shares" in out
    code, out, _ = run("round", "status")
    assert "too-few-shares" in out
    assert "version 3" in out
