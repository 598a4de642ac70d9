"""Predictions for other programs on the device: what is asked, what is answered, and what goes wrong. Pure.

A request and its answer are a JSON object each, in one line. Whatever comes in, something typed goes out.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from edge_client.training import TrainingError
from models.manifest import ModelManifest
from protocol.fields import Schema, Slug

MAX_REQUEST_BYTES = 1 << 20
MAX_EXAMPLES = 256
"""Of one request by another program, whose answer holds up everybody else's."""
_FLOAT32 = np.dtype("<f4")


class PredictionFailed(Exception):
    """There is no answer.

    Attributes:
        code: why, for programs: `bad-request`, `bad-input`, `too-large`, `no-model`, `model-unclear`,
            `unavailable` or `busy`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NoModel(PredictionFailed):
    """There is no version to predict with yet."""

    def __init__(self, message: str) -> None:
        super().__init__("no-model", message)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a version says to some examples.

    Attributes:
        model: its name.
        version: its number.
        personal: whether it was fine-tuned on this device.
        predictions: for each example `label`, `probability` and `probabilities` by label; or only the last,
            for a model of several labels; or `values` by name.
    """

    model: str
    version: int
    personal: bool
    predictions: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, manifest: ModelManifest, outputs: NDArray[np.float32], *, personal: bool) -> Prediction:
        """Names the outputs (n, labels) of a version."""
        found = tuple(prediction_of(manifest, row) for row in outputs)
        return cls(manifest.name, manifest.version, personal, found)

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "predictions": list(self.predictions)}


Predict = Callable[[NDArray[np.float32], str | None], Prediction]
"""Raw inputs (n, *example shape), or one example, and the model's name; raises PredictionFailed."""


class PredictRequest(Schema):
    """What a program asks.

    Attributes:
        id: comes back with the answer.
        model: which one; None where the device has only one.
        inputs: one example or several, raw, as nested lists of numbers; or the bytes of little-endian float32
            in base64, whole examples one after the other.
        shape: of inputs in base64; any number of whole examples when it is not said.
    """

    id: Annotated[str, Field(max_length=64)] = ""
    model: Slug | None = None
    inputs: Annotated[list[Any], Field(min_length=1)] | Annotated[str, Field(min_length=1)]
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=8)] | None = None


class PredictionService:
    """Answers requests as bytes. It never raises, and it may be called by one thread at a time."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict

    def answer(self, request: bytes) -> bytes:
        """The answer to one request, without a line break."""
        asked = ""
        try:
            if len(request) > MAX_REQUEST_BYTES:
                raise PredictionFailed("too-large", f"a request has at most {MAX_REQUEST_BYTES} bytes")
            parsed = _parsed(request)
            asked = parsed.id
            found = self._predict(_array(parsed.inputs, parsed.shape), parsed.model)
        except PredictionFailed as error:
            return refusal(error.code, str(error), asked)
        except TrainingError as error:
            return refusal("bad-input", str(error), asked)
        except Exception as error:
            # Whatever it is, the next request must find the server alive.
            return refusal("unavailable", type(error).__name__, asked)
        return _line({"id": asked, **found.as_json()})


def refusal(code: str, message: str, asked: str = "") -> bytes:
    """The answer that there is none."""
    return _line({"id": asked, "error": {"code": code, "message": message[:500]}})


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _parsed(request: bytes) -> PredictRequest:
    try:
        return PredictRequest.model_validate_json(request)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part)[:64] for part in first["loc"][:4])
        raise PredictionFailed("bad-request", f"{where or 'request'}: {first['msg'][:200]}") from None


def _array(inputs: list[Any] | str, shape: tuple[int, ...] | None) -> NDArray[np.float32]:
    """The inputs as float32; bytes without a shape stay flat until the model says how long an example is."""
    if isinstance(inputs, str):
        try:
            data = base64.b64decode(inputs, validate=True)
            flat = np.frombuffer(data, _FLOAT32).astype(np.float32)
            return flat if shape is None else flat.reshape(shape)
        except (binascii.Error, ValueError):
            raise PredictionFailed(
                "bad-request", "inputs: no base64 of little-endian float32, or of another shape"
            ) from None
    if not _only_numbers(inputs):
        raise PredictionFailed("bad-input", "inputs: something in them is no number")
    try:
        array = np.asarray(inputs)
    except (ValueError, OverflowError):
        raise PredictionFailed("bad-input", "inputs: lists of different lengths or depths") from None
    if array.dtype.kind not in "fiu":
        raise PredictionFailed("bad-input", "inputs: something in them is no number")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _only_numbers(inputs: list[Any]) -> bool:
    """Looks before NumPy does, which would give every text of a list the room of the longest one."""
    waiting = [inputs]
    while waiting:
        level = waiting.pop()
        kinds = set(map(type, level))
        if not kinds <= {list, int, float}:
            return False
        if list in kinds:
            waiting += (each for each in level if isinstance(each, list))
    return True


def shaped(
    manifest: ModelManifest, x: NDArray[np.float32], at_most: int | None = None
) -> NDArray[np.float32]:
    """Inputs as the model takes them, (n, *example shape): one example, several, or all their values flat.

    Raises:
        PredictionFailed: they are not whole examples, or too many.
    """
    shape = manifest.input.shape
    size = int(np.prod(shape))
    if x.shape == shape:
        x = x[np.newaxis]
    elif x.shape[1:] != shape and x.ndim == 1 and x.size and x.size % size == 0:
        x = x.reshape(-1, *shape)
    if x.shape[1:] != shape or len(x) == 0:
        raise PredictionFailed(
            "bad-input", f"inputs of shape {x.shape}: {manifest.name} takes {shape}, or several of these"
        )
    if at_most is not None and len(x) > at_most:
        raise PredictionFailed("too-large", f"{len(x)} examples at a time: at most {at_most}")
    return x


def prediction_of(manifest: ModelManifest, row: NDArray[np.float32]) -> dict[str, Any]:
    """One example's outputs by name; only a model of classes has one label to give."""
    outputs = {label: round(float(value), 6) for label, value in zip(manifest.labels, row, strict=True)}
    if manifest.regression:
        return {"values": outputs}
    if manifest.target.shape:
        return {"probabilities": outputs}
    best = manifest.labels[int(row.argmax())]
    return {"label": best, "probability": outputs[best], "probabilities": outputs}
