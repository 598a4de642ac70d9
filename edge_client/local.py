"""Predictions in a Python program on the device, always by the last good version of a model.

from edge_client.local import Predictor, SocketPredictor

Predictor("/var/lib/covey").predict(window)                     # as the client's own user
SocketPredictor("/run/covey/predict.sock").predict(window)      # as any member of the socket's group
"""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_client.prediction import MAX_REQUEST_BYTES, NoModel, Prediction, PredictionFailed, shaped
from edge_client.training import ExamplesRejected, LocalTrainer, ModelRejected, WeightsRejected
from models.manifest import ModelManifest

if TYPE_CHECKING:
    from edge_client.adapters.last_good import LastGood
    from edge_client.adapters.revision import Revision
    from edge_client.adapters.uses import VersionUses

__all__ = ["NoModel", "Prediction", "PredictionFailed", "Predictor", "SocketPredictor"]

TrainerFactory = Callable[[ModelManifest, bytes], LocalTrainer]
MAX_ANSWER_BYTES = 1 << 24
_LOG = logging.getLogger("covey.edge.predict")


@dataclass(frozen=True)
class _Loaded:
    """A version ready to answer, and the state of the disk that it was read from."""

    revision: Revision
    sha256: str
    serving: LastGood
    trainer: LocalTrainer


class Predictor:
    """Answers from this device's own files, in this process; several threads may share one.

    A version that comes while it is used is taken up with the next call. One that does not run gives way to
    the one before, and the client that runs is told.
    """

    def __init__(
        self,
        state: Path | str,
        *,
        trainer: TrainerFactory | None = None,
        uses: VersionUses | None = None,
        at_most: int | None = None,
    ) -> None:
        """Takes the state directory of the device; nothing is read before the first prediction.

        Args:
            state: the directory.
            trainer: makes a trainer of a graph; by default this machine's TensorFlow Lite runtime.
            uses: this process's notes of what it uses, where a crash of it is to be blamed on the version.
            at_most: examples of one call; None is no limit.
        """
        from edge_client.adapters.revision import StateWatch
        from edge_client.adapters.uses import VersionUses
        from edge_client.adapters.worker import tflite_trainer

        self._state, self._factory = Path(state), trainer or tflite_trainer
        self._uses = uses or VersionUses(self._state)
        self._at_most = at_most
        self._watch = StateWatch(self._state)
        self._loaded: dict[str | None, _Loaded] = {}
        self._unread: dict[str | None, Revision] = {}
        self._lock = threading.Lock()

    def predict(self, x: NDArray[Any], model: str | None = None) -> Prediction:
        """What the last good version says to raw inputs.

        Args:
            x: one example, of the model's input shape, or several of them (n, *shape), in the units of the
                sensor; any dtype of numbers.
            model: its name; None where the device has only one.

        Raises:
            NoModel: no version of the model is good yet, or none runs any more.
            PredictionFailed: several models could be meant, or the inputs are not what it takes.
            CredentialError: the device is not set up.
            StorageError: its files cannot be read.
        """
        with self._lock:
            while True:
                try:
                    return self._run(self._current(model), x)
                except (ModelRejected, WeightsRejected) as error:
                    # It was loaded, and does not run.
                    known = self._loaded.pop(model, None)
                    if known is None or not self._blamed(known, error):
                        raise PredictionFailed("unavailable", str(error)) from error

    def close(self) -> None:
        """Lets go of all versions, and of the files."""
        with self._lock:
            self._loaded.clear()
            self._watch.close()

    def _run(self, loaded: _Loaded, x: NDArray[Any]) -> Prediction:
        serving = loaded.serving
        weights, local = serving.used()
        inputs = shaped(serving.manifest, np.asarray(x, np.float32), self._at_most)
        try:
            with self._uses.of(loaded.sha256):
                outputs = loaded.trainer.predict(weights, inputs, local)
        except ExamplesRejected as error:
            raise PredictionFailed("bad-input", str(error)) from error
        return Prediction.of(serving.manifest, outputs, personal=weights is not serving.weights)

    def _blamed(self, loaded: _Loaded, error: Exception) -> bool:
        from edge_client.adapters.last_good import blamed

        _LOG.warning("version-failed model=%s reason=%r", loaded.serving.manifest.name, str(error))
        return blamed(self._uses, loaded.sha256, error)

    def _current(self, model: str | None) -> _Loaded:
        """The version served, loaded anew when something on disk changed."""
        from edge_client.adapters.last_good import with_version

        known = self._loaded.get(model)
        revision = self._watch.look()
        if known is not None and revision in (known.revision, self._unread.get(model)):
            return known

        def load(serving: LastGood) -> _Loaded:
            sha256 = serving.manifest.sha256()
            if known is not None and known.sha256 == sha256:
                # Its own parameters changed, or something else on disk.
                return _Loaded(revision, sha256, serving, known.trainer)
            return _Loaded(revision, sha256, serving, self._factory(serving.manifest, serving.graph))

        try:
            loaded = with_version(self._state, model, self._uses, load)
        except PredictionFailed:
            self._loaded.pop(model, None)
            raise
        except (ValueError, OSError) as error:
            if known is None:
                raise
            # A disk that fails takes no model away that is in memory. Tried again when something changes.
            self._unread[model] = revision
            _LOG.warning("version-unread model=%s reason=%r", known.serving.manifest.name, str(error))
            return known
        self._loaded[model] = loaded
        self._unread.pop(model, None)
        return loaded


class SocketPredictor:
    """Asks the client that runs on this device, through its Unix socket (`[predict]` in edge.toml)."""

    def __init__(self, path: Path | str = "/run/covey/predict.sock", *, seconds: float = 10.0) -> None:
        """Connects.

        Args:
            path: of the socket.
            seconds: how long an answer may take.

        Raises:
            PredictionFailed: nobody answers there, or this user may not ask.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(seconds)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            hint = " (is this user in the socket's group?)" if isinstance(error, PermissionError) else ""
            raise PredictionFailed("unavailable", f"{path}: {error.strerror or error}{hint}") from error
        self._lines = self._socket.makefile("rb")

    def predict(self, x: NDArray[Any], model: str | None = None) -> Prediction:
        """As `Predictor.predict`.

        Raises:
            PredictionFailed: there is no answer; `code` says why.
        """
        array = np.ascontiguousarray(x, "<f4")
        asked: dict[str, Any] = {
            "inputs": base64.b64encode(array.tobytes()).decode(),
            "shape": array.shape,
        }
        if model is not None:
            asked["model"] = model
        request = json.dumps(asked).encode()
        if len(request) > MAX_REQUEST_BYTES:
            raise PredictionFailed("too-large", f"a request has at most {MAX_REQUEST_BYTES} bytes")
        try:
            self._socket.sendall(request + b"\n")
            line = self._lines.readline(MAX_ANSWER_BYTES)
        except OSError as error:
            raise PredictionFailed("unavailable", f"the connection failed: {error}") from error
        if not line.endswith(b"\n"):
            raise PredictionFailed("unavailable", "the connection was closed")
        answer = json.loads(line)
        if "error" in answer:
            raise PredictionFailed(answer["error"]["code"], answer["error"]["message"])
        return Prediction(
            answer["model"], answer["version"], answer["personal"], tuple(answer["predictions"])
        )

    def close(self) -> None:
        """Disconnects."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        """Returns the connection."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnects."""
        self.close()
