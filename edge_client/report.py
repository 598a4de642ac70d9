"""What the device's owner can ask: its state, its ledger, a prediction. Works while `run` runs."""

from __future__ import annotations

import datetime as dt
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from numpy.typing import NDArray
from pydantic import TypeAdapter

from edge_client import cli
from edge_client.adapters.blobs import Blobs
from edge_client.adapters.credentials import POLICY, load_credentials, load_policy
from edge_client.adapters.last_good import LastGood, with_version
from edge_client.adapters.store import DATABASE, DeviceStore
from edge_client.adapters.uses import VersionUses
from edge_client.durable import VersionStatus
from edge_client.ledger import DAY, History, LedgerEntry
from edge_client.local import Prediction
from edge_client.personalisation import Personal, PersonalConfig
from edge_client.personalisation import personalise as fine_tuned
from edge_client.sources import DataSource
from edge_client.training import LocalTrainer
from models.assignment import described
from models.examples import InvalidExamples
from models.manifest import ModelManifest
from protocol.plan import Task

TrainerFactory = Callable[[ModelManifest, bytes], LocalTrainer]
_TASK: TypeAdapter[Task] = TypeAdapter(Task)


class ReportError(Exception):
    """A question that cannot be answered like this; the message says what to do."""


def status(state: Path, *, running: bool) -> dict[str, Any]:
    """What this device is, has and does, ready for JSON.

    Raises:
        CredentialError: it is not set up.
        StorageError: its store cannot be read.
    """
    bundle = load_credentials(state).bundle
    certificate = x509.load_der_x509_certificate(bundle.certificate)
    answer: dict[str, Any] = {
        "device_id": bundle.device_id,
        "fleet": bundle.fleet,
        "running": running,
        "certificate_expires": certificate.not_valid_after_utc.isoformat(),
        "models": [],
        "active_round": None,
        "recent_rounds": [],
        "contributions": 0,
        "personal": [],
        "waiting_updates": [],
    }
    if not (state / DATABASE).exists():
        return answer
    with DeviceStore.open(state, read_only=True) as store:
        versions, rounds, ledger = store.versions(), store.rounds(), store.ledger()
        pending = store.pending()
    served = {v.manifest.name: v.manifest.version for v in versions if v.status is VersionStatus.GOOD}
    answer["models"] = [
        {
            "name": version.manifest.name,
            "version": version.manifest.version,
            "status": version.status.value,
            "serving": version.status is VersionStatus.GOOD
            and served[version.manifest.name] == version.manifest.version,
            "reason": version.reason,
        }
        for version in versions
    ]
    answer["recent_rounds"] = [
        {
            "round_id": entry.round_id,
            "joined_at": _time(entry.joined_at),
            "phase": entry.phase,
            "outcome": entry.outcome,
        }
        for entry in rounds
    ]
    answer["active_round"] = next((r for r in answer["recent_rounds"] if r["outcome"] is None), None)
    answer["contributions"] = len(ledger)
    answer["personal"] = [record.model_dump() for record in Blobs(state).personal.records()]
    answer["waiting_updates"] = [
        {
            "model": update.manifest.name,
            "version": update.manifest.version,
            "campaign": update.order,
            "ready_at": _time(update.at),
        }
        for update in pending
    ]
    return answer


def status_text(answer: dict[str, Any]) -> str:
    """`status` for a person."""
    active = answer["active_round"]
    lines = [
        f"device         {answer['device_id']} in the fleet {answer['fleet']}",
        f"running        {'yes' if answer['running'] else 'no'}",
        f"certificate    until {answer['certificate_expires']}",
        f"round          {active['round_id'] + ', ' + active['phase'] if active else 'none'}",
        f"contributions  {answer['contributions']}",
    ]
    for model in answer["models"]:
        serving = ", serving" if model["serving"] else ""
        reason = f" ({model['reason']})" if model["reason"] else ""
        lines.append(
            f"model          {model['name']} v{model['version']}: {model['status']}{serving}{reason}"
        )
    served = {model["name"] for model in answer["models"] if model["serving"]}
    for name in sorted({model["name"] for model in answer["models"] if model["status"] == "bad"} - served):
        lines.append(f"model          {name}: none is served until a version comes that runs here")
    for update in answer["waiting_updates"]:
        lines.append(
            f"update         of {update['model']} v{update['version']} waits for a buffer"
            f" since {update['ready_at']}"
        )
    for record in answer["personal"]:
        verdict = "kept" if record["kept"] else "not better"
        lines.append(
            f"personal       {record['model']} v{record['version']}: {verdict}"
            f", accuracy {record['personal_accuracy']:.1%} against {record['global_accuracy']:.1%}"
        )
    return "\n".join(lines)


def privacy(state: Path, now: int) -> dict[str, Any]:
    """The ledger, ready for JSON, and what it amounts to by the device's own reckoning.

    Args:
        state: the state directory; the period, limit and delta are those of the policy in it.
        now: seconds since 1970.

    Raises:
        CredentialError: the device is not set up.
        StorageError: its store cannot be read.
    """
    bundle = load_credentials(state).bundle
    if not (state / DATABASE).exists():
        ledger: tuple[LedgerEntry, ...] = ()
    else:
        with DeviceStore.open(state, read_only=True) as store:
            ledger = store.ledger()
    policy, history = load_policy(state / POLICY), History.of(ledger)
    days, delta = policy.epsilon_period_days, policy.delta
    return {
        "device_id": bundle.device_id,
        "unit": "device",
        "epsilon": _finite(history.spent(now, days, delta).epsilon),
        "epsilon_period_days": days,
        "maximum_epsilon": policy.maximum_epsilon,
        "epsilon_ever": _finite(history.spent(now, now // DAY + 1, delta).epsilon),
        "delta": delta,
        "without_noise": history.without_noise(),
        "one_example": {
            "unit": "example",
            "contributions": history.hiding_examples(),
            "epsilon": _finite(history.spent_on_an_example(now, days, delta).epsilon),
            "maximum_epsilon": policy.maximum_example_epsilon,
            "epsilon_ever": _finite(history.spent_on_an_example(now, now // DAY + 1, delta).epsilon),
        },
        "entries": [entry.model_dump(mode="json") for entry in ledger],
    }


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def privacy_text(answer: dict[str, Any]) -> str:
    """`privacy` for a person."""
    entries = answer["entries"]
    if not entries:
        return f"{answer['device_id']} has contributed nothing yet"
    headings = ("when", "round", "for", "mode", "clip norm", "noise", "in a sum of", "delta")
    rows = [
        (
            _time(entry["at"]),
            entry["round_id"][:8],
            described(_TASK.validate_json(json.dumps(entry["task"]))),
            entry["event"]["mode"],
            f"{entry['event']['clip_norm']:g}",
            f"{entry['event']['noise_multiplier']:g}",
            "its own"
            if entry["event"]["unit"] == "example"
            else f"{entry['event']['minimum_survivors']} or more",
            f"{entry['delta']:g}",
        )
        for entry in entries
    ]
    example = answer["one_example"]
    hiding = example["contributions"]
    noisy = len(rows) - answer["without_noise"] - hiding
    lines = [
        cli.table(headings, rows),
        f"{len(rows)} contributions of {answer['device_id']}; unit of privacy: the device",
    ]
    if noisy:
        lines.append(_spent_line(answer, answer))
    if answer["without_noise"]:
        lines.append(f"{answer['without_noise']} of them without noise: no epsilon bounds those")
    if hiding:
        lines.append(
            f"{hiding} of them hide single examples and not the device: no epsilon of the device bounds those"
        )
        lines.append(f"one example of the device: {_spent_line(answer, example)}")
    return "\n".join(lines)


def _spent_line(answer: dict[str, Any], unit: dict[str, Any]) -> str:
    limit = unit["maximum_epsilon"]
    return (
        f"epsilon {_epsilon(unit['epsilon'])} in the last {answer['epsilon_period_days']} days "
        f"({'no limit' if limit is None else f'limit {limit:g}'}), {_epsilon(unit['epsilon_ever'])} in all, "
        f"at delta {answer['delta']:g}"
    )


def _epsilon(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.4g}"


def predict(
    predictor: Callable[[NDArray[np.float32]], Prediction], path: Path, repeat: int = 1
) -> dict[str, Any]:
    """What a predictor says to the examples in an NPY file; with `repeat`, also how long that took.

    Raises:
        ReportError: the file holds no examples.
        PredictionFailed: there is no answer.
    """
    x = _read(path)
    answer, milliseconds = predictor(x), []
    for _ in range(repeat if repeat > 1 else 0):
        before = time.perf_counter()
        answer = predictor(x)
        milliseconds.append(1000.0 * (time.perf_counter() - before))
    found = answer.as_json()
    if milliseconds:
        p50, p95, p99, longest = np.percentile(milliseconds, [50, 95, 99, 100]).round(3).tolist()
        found["latency_ms"] = {"runs": repeat, "p50": p50, "p95": p95, "p99": p99, "longest": longest}
    return found


def personalise(
    state: Path, source: DataSource, model: str | None, config: PersonalConfig, trainer: TrainerFactory
) -> dict[str, Any]:
    """Fine-tunes the last good version on the device's own data; keeps the result if it is better.

    Raises:
        PredictionFailed: no version of the model is good yet, or several models could be meant.
        ReportError: there is no such data.
        TrainingError: the examples do not do, or training diverged: nothing changed.
        StorageError: the store cannot be read or written, or another process personalises.
    """
    if (fault := source.fault()) is not None:
        raise ReportError(fault.detail)
    files = Blobs(state).personal

    def run(serving: LastGood) -> Personal:
        try:
            examples = source.load(serving.manifest)
        except InvalidExamples as error:
            raise ReportError(str(error)) from error
        made = trainer(serving.manifest, serving.graph)
        return fine_tuned(made, serving.manifest, serving.weights, serving.local, examples, config)

    uses = VersionUses(state)
    with files.writing(), uses.armed():
        personal = with_version(state, model, uses, run)
        files.save(personal)
    return personal.record.model_dump()


def personal_text(answer: dict[str, Any]) -> str:
    """`personalise` for a person."""
    rows = [
        ("global", f"{answer['global_accuracy']:.1%}", f"{answer['global_loss']:.4f}"),
        ("personal", f"{answer['personal_accuracy']:.1%}", f"{answer['personal_loss']:.4f}"),
    ]
    verdict = (
        "kept: `predict` answers with it until the next version comes"
        if answer["kept"]
        else "not better, so not kept: `predict` answers with the global version"
    )
    return (
        f"{answer['model']} v{answer['version']}: trained {answer['epochs']} epochs on "
        f"{answer['trained_on']} examples, judged on {answer['held_out']} later ones\n"
        f"{cli.table(('version', 'accuracy', 'loss'), rows)}\n{verdict}"
    )


def reset_personal(state: Path, model: str | None) -> tuple[str, ...]:
    """Deletes personal models; returns the names of the models that had one.

    Raises:
        CredentialError: the device is not set up.
        StorageError: deleting failed, or another process personalises.
    """
    load_credentials(state)
    files = Blobs(state).personal
    with files.writing():
        return files.drop(model)


def reset_local(state: Path, model: str | None) -> tuple[str, ...]:
    """Deletes local parameters, while no client runs; returns the names of the models that had any.

    A personal model, which holds such parameters as well, stays.

    Raises:
        CredentialError: the device is not set up.
        StorageError: deleting failed.
    """
    load_credentials(state)
    with DeviceStore.open(state) as store:
        return store.forget_local(model)


def prediction_text(answer: dict[str, Any]) -> str:
    """`predict` for a person."""
    head = f"{answer['model']} v{answer['version']}{', personal' if answer['personal'] else ''}"
    items = answer["predictions"]
    if "latency_ms" in answer:
        taken = answer["latency_ms"]
        head += (
            f"\nlatency over {taken['runs']} runs: median {taken['p50']:.3g} ms, 95 % {taken['p95']:.3g} ms,"
            f" 99 % {taken['p99']:.3g} ms, longest {taken['longest']:.3g} ms"
        )
    rows: list[tuple[str, ...]]
    if all("label" in item for item in items):
        rows = [(str(i), item["label"], f"{item['probability']:.3f}") for i, item in enumerate(items)]
        return f"{head}\n{cli.table(('example', 'label', 'probability'), rows)}"
    outputs = [item.get("values") or item["probabilities"] for item in items]
    rows = [(str(i), *(f"{value:.3f}" for value in found.values())) for i, found in enumerate(outputs)]
    return f"{head}\n{cli.table(('example', *outputs[0]), rows)}"


def _read(path: Path) -> NDArray[np.float32]:
    try:
        x = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ReportError(f"{path} is no NPY file: {error}") from error
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiu":
        raise ReportError(f"{path} holds no array of numbers")
    return x.astype(np.float32)


def _time(seconds: int) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
