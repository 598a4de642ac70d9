"""The files that a service is deployed with: units, containers, charts, dashboards, alerts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("yaml")

import yaml

from aggregator.telemetry.gauges import Gauges
from aggregator.telemetry.metrics import ServiceMetrics
from tests.databases import sqlite_repository

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm" / "covey"
VALUES: dict[str, Any] = {"broker": {"host": "broker.example"}, "databaseSecret": "covey-database"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
@pytest.mark.parametrize("name", ["covey-aggregator", "covey-broker"])
def test_a_unit_is_valid_and_hardened(name: str, tmp_path: Path) -> None:
    unit = DEPLOY / "systemd" / f"{name}.service"
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", unit], capture_output=True, text=True, check=False
    ).stdout
    level = float(shown.rsplit("Overall exposure level", 1)[1].split(":")[1].split()[0])
    assert level <= 1.5, shown
    # Programs that this machine has not installed are put in place.
    for path in (DEPLOY / "systemd").glob("*.service"):
        text = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", path.read_text())
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / unit.name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[dict[str, set[str]]]:
    """Every series that the service exports -> its labels."""
    repository = sqlite_repository(tmp_path / "aggregator.db")
    metrics = ServiceMetrics(repository)
    metrics.collect_with(Gauges(repository, dict, {}).collect)
    # Once each, so that families without a series yet have one.
    metrics._rounds_started.labels("toy"), metrics._rounds_ended.labels("toy", "completed", "")
    metrics._round.labels("completed"), metrics._versions.labels("toy"), metrics._presence.labels("online")
    metrics._staleness.labels("toy"), metrics._too_old.labels("toy")
    metrics.requests.labels("GET", "/x", "200")
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    # Of these there is one for each version, round that spent something, and certificate.
    found |= {"covey_model_version": {"model"}, "covey_epsilon_spent": {"delta"}}
    found["covey_certificate_expires_timestamp_seconds"] = {"certificate"}
    yield found
    repository.close()


def check(expression: str, exported: dict[str, set[str]]) -> None:
    names = set(re.findall(r"\b(?:covey|process)_[a-z_]+", expression))
    assert names, expression
    assert names <= exported.keys(), (expression, names - exported.keys())
    labels = {"job"}.union(*(exported[name] for name in names))
    used = {name for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(", ")}
    used |= set(re.findall(r"[{,]\s*([a-z_]+)=", expression))
    assert used <= labels, (expression, used - labels)


def test_every_query_of_the_dashboard_is_about_a_metric_that_is_exported(
    exported: dict[str, set[str]],
) -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "covey.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(expressions) >= 20
    for expression in expressions:
        check(expression, exported)
    for panel in dashboard["panels"]:
        named = set().union(*(re.findall(r"{{(\w+)}}", t["legendFormat"]) for t in panel["targets"]))
        text = " ".join(target["expr"] for target in panel["targets"])
        names = re.findall(r"\b(?:covey|process)_[a-z_]+", text)
        assert named <= set().union(*(exported[name] for name in names)), panel["title"]
    with pytest.raises(AssertionError):
        check("rate(covey_no_such_total[5m])", exported)


def test_every_alert_is_about_a_metric_that_is_exported(exported: dict[str, set[str]]) -> None:
    content = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    rules = [rule for group in content["groups"] for rule in group["rules"]]
    assert len(rules) >= 4
    for rule in rules:
        check(rule["expr"], exported)


def test_the_compose_file_is_valid_and_confined() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    text = (DEPLOY / "compose.yaml").read_text()
    # Merged first: it takes `<<` for a key.
    compose_spec.PyCompose.from_json(json.dumps(yaml.safe_load(text))).validate()
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"init", "broker", "database", "aggregator"}
    # The broker sees its own directory only, and no password is written down.
    (mount,) = services["broker"]["volumes"]
    assert mount["volume"] == {"subpath": "broker"}
    assert services["database"]["environment"]["POSTGRES_PASSWORD"].startswith("${COVEY_DATABASE_PASSWORD:?")
    for name in ("init", "broker", "aggregator"):
        assert services[name]["read_only"] and services[name]["cap_drop"] == ["ALL"]


def test_the_chart_passes_helm_and_makes_valid_resources() -> None:
    helm = pytest.importorskip("helm_python")
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    report = helm.lint(CHART, VALUES, strict=True)
    worst = [message for message in report["messages"] if message["severity"] >= 2]
    assert report["total_charts_linted"] == 1 and not worst and not report["errors"], report
    with helm.Chart.load(CHART) as chart:
        files = chart.render(VALUES, name="orchard", namespace="farm")
        with pytest.raises(helm.HelmError, match="the name by which devices reach the broker"):
            chart.render({}, name="orchard")
        bare = chart.render({"broker": {"host": "broker.example"}}, name="orchard")
        tickets = chart.render(VALUES | {"api": {"url": "https://hub.example:8443"}}, name="orchard")
    documents = [
        document
        for path, text in files.items()
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    assert sorted(each["kind"] for each in documents) == ["Service", "Service", "StatefulSet"]
    for document in documents:
        kubernetes_validate.validate(document, "1.30", strict=True)
    stateful = next(each for each in documents if each["kind"] == "StatefulSet")["spec"]
    pod = stateful["template"]["spec"]
    selected = stateful["selector"]["matchLabels"].items()
    assert selected <= stateful["template"]["metadata"]["labels"].items()
    for service in (each for each in documents if each["kind"] == "Service"):
        assert service["spec"]["selector"] == dict(selected)
    broker = next(each for each in pod["containers"] if each["name"] == "broker")
    assert broker["volumeMounts"] == [{"name": "state", "mountPath": "/broker", "subPath": "covey/broker"}]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["securityContext"]["runAsNonRoot"]
    (url,) = pod["initContainers"][0]["env"]
    assert url["valueFrom"]["secretKeyRef"] == {"name": "covey-database", "key": "url"}
    assert "COVEY_DATABASE_URL" not in "".join(bare.values())
    (door,) = (text for text in tickets.values() if "aggregator init" in text)
    (made,) = yaml.safe_load(door)["spec"]["template"]["spec"]["initContainers"][0]["args"]
    assert made.endswith('--broker mqtts://broker.example:8883 --api-url "https://hub.example:8443"'), made
    assert "--api-url" not in "".join(files.values())


def test_the_page_on_monitoring_names_metrics_that_are_exported(exported: dict[str, set[str]]) -> None:
    page = (DEPLOY.parent / "docs" / "how-to" / "monitor.md").read_text()
    families = exported.keys() | {name.removesuffix("_count") for name in exported} | {"covey_build_info"}
    rows = re.findall(r"^\| (`covey_.*?) \|", page, re.M)
    named = {name for row in rows for name in re.findall(r"covey_[a-z_]+", row)}
    assert len(named) >= 15 and named <= families, named - families
