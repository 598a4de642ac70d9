"""What the device's owner can ask: its state, its ledger, a prediction. Works while `run` runs."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from numpy.typing import NDArray

from edge_client import cli
from edge_client.adapters.credentials import POLICY, load_credentials, load_policy
from edge_client.adapters.files import StorageError
from edge_client.adapters.store import DATABASE, DeviceStore
from edge_client.events import VersionStatus
from edge_client.ledger import DAY, History, LedgerEntry
from edge_client.models import Library
from edge_client.training import LocalTrainer
from models.manifest import ModelManifest
from models.weights import decode_local, decode_weights

TrainerFactory = Callable[[ModelManifest, bytes], LocalTrainer]


class ReportError(Exception):
    """A question that cannot be answered like this; the message says what to do."""


class NoModel(ReportError):
    """There is no version to predict with."""


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
    }
    if not (state / DATABASE).exists():
        return answer
    with DeviceStore.open(state, read_only=True) as store:
        versions, rounds, ledger = store.versions(), store.rounds(), store.ledger()
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


def _finite(epsilon: float) -> float | None:
    """JSON has no infinity."""
    return epsilon if math.isfinite(epsilon) else None


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
            _asked(entry["task"]),
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


def _asked(task: dict[str, Any]) -> str:
    if task["kind"] == "query":
        return f"{task['question']['kind']} of {task['field']}"
    return f"{task['model']} v{task['base_version']}"


def _spent_line(answer: dict[str, Any], unit: dict[str, Any]) -> str:
    limit = unit["maximum_epsilon"]
    return (
        f"epsilon {_epsilon(unit['epsilon'])} in the last {answer['epsilon_period_days']} days "
        f"({'no limit' if limit is None else f'limit {limit:g}'}), {_epsilon(unit['epsilon_ever'])} in all, "
        f"at delta {answer['delta']:g}"
    )


def _epsilon(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.4g}"


def predict(state: Path, path: Path, model: str | None, trainer: TrainerFactory) -> dict[str, Any]:
    """Class probabilities for the examples in an NPY file, from the last good version and local parameters.

    Raises:
        NoModel: no version of the model is good yet.
        ReportError: the file holds no examples, or several models could be meant.
        TrainingError: the examples do not fit the model.
        StorageError: the store cannot be read.
    """
    x = _read(path)
    for attempt in (1, 2):
        manifest, graph, weights, local = None, b"", b"", None
        try:
            manifest, graph, weights, local = _last_good(state, model)
            break
        except StorageError:
            # `run` may have switched versions and deleted the old one's files in between.
            if attempt == 2:
                raise
    assert manifest is not None  # noqa: S101 - the loop ended by `break`
    examples = x[np.newaxis] if x.shape == manifest.input.shape else x
    probabilities = trainer(manifest, graph).predict(decode_weights(weights, manifest), examples, local)
    return {
        "model": manifest.name,
        "version": manifest.version,
        "predictions": [prediction_of(manifest, row) for row in probabilities],
    }


def prediction_of(manifest: ModelManifest, row: NDArray[np.float32]) -> dict[str, Any]:
    """One example's outputs by name; only a model of classes has one label to give."""
    outputs = {label: round(float(value), 6) for label, value in zip(manifest.labels, row, strict=True)}
    if manifest.regression:
        return {"values": outputs}
    if manifest.target.shape:
        return {"probabilities": outputs}
    best = manifest.labels[int(row.argmax())]
    return {"label": best, "probability": outputs[best], "probabilities": outputs}


def prediction_text(answer: dict[str, Any]) -> str:
    """`predict` for a person."""
    head = f"{answer['model']} v{answer['version']}"
    items = answer["predictions"]
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


def _last_good(
    state: Path, model: str | None
) -> tuple[ModelManifest, bytes, bytes, NDArray[np.float32] | None]:
    load_credentials(state)
    if not (state / DATABASE).exists():
        raise NoModel("this device has no model yet: start `covey-edge run`")
    with DeviceStore.open(state, read_only=True) as store:
        good = [v.manifest for v in store.versions() if v.status is VersionStatus.GOOD]
        names = sorted({manifest.name for manifest in good})
        if model is None and len(names) > 1:
            raise ReportError(f"this device has several models, choose one by --model: {', '.join(names)}")
        chosen = [manifest for manifest in good if model in (None, manifest.name)]
        if not chosen:
            missing = f"no good version of {model}" if model else "no model"
            raise NoModel(f"this device has {missing} yet: it comes while `covey-edge run` runs")
        manifest = max(chosen, key=lambda manifest: manifest.version)
        own = Library(own={saved.model: saved for saved in store.local()}).local(manifest)
        local = decode_local(store.blobs.read_local(own)) if own is not None else None
        return manifest, store.blobs.read(manifest.graph), store.blobs.read(manifest.weights), local


def _time(seconds: int) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
