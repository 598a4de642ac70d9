"""The manifest of one model version: what a device must know before it loads a graph, and what it checks.

A *version* of a model is the same graph with new weights: every round that publishes makes a new weights file
and a manifest whose version is one higher. A manifest has exactly one byte representation (canonical JSON),
so that a signature over the bytes is a signature over the meaning.

Importable on the device: the standard library and pydantic only.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from protocol.fields import BlobRef, Schema, Slug

MAX_MANIFEST_BYTES = 256 * 1024
MAX_GRAPH_BYTES = 256 * 1024 * 1024
MAX_PARAMETERS = 2**26
FLOAT32_BYTES = 4
MAX_VERSION = 2**31
TRAINABLE_SIGNATURES = frozenset({"train", "infer", "get_weights", "set_weights"})
LOCAL_SIGNATURE = "start_local"
"""Gives the values that local parameters start from; only where there are any."""
EXAMPLE_SIGNATURES = frozenset({"gradient", "apply"})
"""Entry points of DP-SGD on the device: one example's gradient, and a step by a gradient from outside."""
WRITING_SIGNATURES = frozenset({"train", "set_weights", "apply"})
"""The entry points that may change variables. Mode `example` rests on it: a graph that kept an example from a
prediction or a gradient could put it, without noise, into what leaves the device."""

Dimension = Annotated[int, Field(ge=1, le=2**26)]
LossName = Literal[
    "sparse_categorical_crossentropy",
    "binary_crossentropy",
    "multi_label_crossentropy",
    "mean_squared_error",
    "huber",
]
"""What training lowers: one class of many, of two, any number of labels, or values (the last two)."""
REGRESSION_LOSSES = frozenset({"mean_squared_error", "huber"})
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
ParameterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}$")]
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
Finite = Annotated[float, Field(ge=-1e30, le=1e30)]
Scale = Annotated[float, Field(ge=1e-12, le=1e30)]


class InvalidManifest(ValueError):
    """Bytes that are no valid manifest, or a change that a manifest does not allow."""


class SignatureSpec(Schema):
    """One entry point of the graph: its name, and the names of what goes in and what comes out."""

    name: TensorName
    inputs: Annotated[tuple[TensorName, ...], Field(max_length=16)]
    outputs: Annotated[tuple[TensorName, ...], Field(min_length=1, max_length=16)]


class InputSpec(Schema):
    """One example as the device measures it, and the fixed scaling that the graph expects to be done before.

    The graph sees `(x - mean) / std`, with one mean and one standard deviation for each entry of the last
    axis (the channels), in the units of the raw input. They are constants of the model, never statistics of
    anybody's data. Where `vocabulary` is given, the input is ids, whole numbers from 0 to below it.
    """

    shape: Annotated[tuple[Dimension, ...], Field(min_length=1, max_length=4)]
    dtype: Literal["float32"] = "float32"
    vocabulary: Annotated[int, Field(ge=1, le=2**24)] | None = None
    mean: Annotated[tuple[Finite, ...], Field(min_length=1, max_length=4096)]
    std: Annotated[tuple[Scale, ...], Field(min_length=1, max_length=4096)]

    @model_validator(mode="after")
    def _one_scale_per_channel(self) -> Self:
        channels = self.shape[-1]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(f"an input of shape {self.shape} needs {channels} means and standard deviations")
        if self.vocabulary is not None and (any(self.mean) or set(self.std) != {1.0}):
            raise ValueError("ids are not scaled: their means are 0 and standard deviations 1")
        return self


class TargetSpec(Schema):
    """What a model is to predict of one example.

    A class is an int32 scalar; several labels or values are float32 (k,), and values are predicted as
    `(y - mean) / std`, with constants of the model as in `InputSpec`.
    """

    shape: Annotated[tuple[Dimension, ...], Field(max_length=1)] = ()
    dtype: Literal["int32", "float32"] = "int32"
    mean: Annotated[tuple[Finite, ...], Field(max_length=1024)] = ()
    std: Annotated[tuple[Scale, ...], Field(max_length=1024)] = ()


class OptimizerSpec(Schema):
    """What one step does with a gradient; the learning rate comes with every call.

    `momentum` uses `beta_1`, and `adam` (Kingma and Ba 2015, arXiv 1412.6980) all three. Their state lives in
    the graph for one round: `set_weights` sets it to zero, and it never leaves the device.
    """

    kind: Literal["sgd", "momentum", "adam"] = "sgd"
    beta_1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta_2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    epsilon: Annotated[float, Field(ge=1e-12, le=1.0)] = 1e-7


class DropoutSpec(Schema):
    """One dropout: entries of one example, and the share of them that a training step sets to 0."""

    size: Annotated[int, Field(ge=1, le=2**20)]
    rate: Annotated[float, Field(gt=0.0, lt=1.0)]


class ParameterSpec(Schema):
    """Where one parameter of a layer lies in the flat weights vector; row-major, offset in elements."""

    name: ParameterName
    shape: Annotated[tuple[Dimension, ...], Field(min_length=1, max_length=6)]
    offset: Annotated[int, Field(ge=0, lt=MAX_PARAMETERS)]

    @property
    def size(self) -> int:
        """Number of float32 elements."""
        return math.prod(self.shape)


class ModelManifest(Schema):
    """One version of one model: artefacts by digest, entry points, input, labels and parameter layout.

    The weights file is one flat little-endian float32 vector of `parameter_count` elements, tiled exactly by
    `parameters` in order. `labels` name the classes, or the predicted labels or values. One step of the
    optimizer takes `accumulation` batches of `train_batch_size`.

    `local_parameters` tile a second vector, which never leaves a device: it is in no file, no update and no
    message (FedPer, Arivazhagan et al. 2019, arXiv 1912.00818). Without any, the field is left out of the
    bytes.
    """

    schema_version: Literal[1] = 1
    name: Slug
    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]
    graph: BlobRef
    weights: BlobRef
    signatures: Annotated[tuple[SignatureSpec, ...], Field(min_length=1, max_length=16)]
    input: InputSpec
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=1024)]
    loss: LossName
    target: TargetSpec = TargetSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    dropouts: Annotated[tuple[DropoutSpec, ...], Field(max_length=64)] = ()
    train_batch_size: Annotated[int, Field(ge=1, le=4096)]
    parameter_count: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)]
    parameters: Annotated[tuple[ParameterSpec, ...], Field(min_length=1, max_length=2048)]
    local_parameters: Annotated[tuple[ParameterSpec, ...], Field(max_length=2048)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.graph.size > MAX_GRAPH_BYTES:
            raise ValueError(f"a graph has at most {MAX_GRAPH_BYTES} bytes, this one {self.graph.size}")
        if self.weights.size != FLOAT32_BYTES * self.parameter_count:
            raise ValueError(
                f"{self.parameter_count} float32 parameters do not fit {self.weights.size} bytes of weights"
            )
        names = [signature.name for signature in self.signatures]
        if len(set(names)) != len(names) or not set(names) >= TRAINABLE_SIGNATURES:
            raise ValueError(f"signatures are {names}, needed once each: {sorted(TRAINABLE_SIGNATURES)}")
        if self.example_gradients and self.local_parameters:
            raise ValueError("a model with local parameters gives no gradients of single examples")
        if (LOCAL_SIGNATURE in names) != bool(self.local_parameters):
            raise ValueError(
                f"local parameters and the signature {LOCAL_SIGNATURE} come together or not at all"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("two labels have the same name")
        self._check_target()
        self._check_layout()
        return self

    @property
    def example_gradients(self) -> bool:
        """Whether the graph gives one example's gradient, which training in privacy mode example needs."""
        return {signature.name for signature in self.signatures} >= EXAMPLE_SIGNATURES

    @property
    def regression(self) -> bool:
        """Whether values are predicted, and not classes or labels."""
        return self.loss in REGRESSION_LOSSES

    @property
    def local_count(self) -> int:
        """Length k of the vector that stays on the device; 0 for none."""
        return sum(parameter.size for parameter in self.local_parameters)

    @property
    def whole_layout(self) -> tuple[ParameterSpec, ...]:
        """Both vectors as one, the local parameters after the shared ones."""
        shift = self.parameter_count
        local = (part.model_copy(update={"offset": part.offset + shift}) for part in self.local_parameters)
        return (*self.parameters, *local)

    @property
    def local_layout(self) -> str:
        """Hex digest of the names and shapes of the local parameters: versions that share it share them."""
        layout = [[parameter.name, *parameter.shape] for parameter in self.local_parameters]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()

    def _check_target(self) -> None:
        labels, target = len(self.labels), self.target
        if self.loss in {"sparse_categorical_crossentropy", "binary_crossentropy"}:
            if labels < 2 or (self.loss == "binary_crossentropy" and labels != 2):
                raise ValueError(f"{labels} labels do not fit the loss {self.loss}")
            expected = TargetSpec()
        else:
            scales = {"mean": target.mean, "std": target.std} if self.regression else {}
            expected = TargetSpec(shape=(labels,), dtype="float32", **scales)
            if self.regression and not len(target.mean) == len(target.std) == labels:
                raise ValueError(f"{labels} values need as many means and standard deviations")
        if target != expected:
            raise ValueError(f"the target does not fit the loss {self.loss} with {labels} labels")

    def _check_layout(self) -> None:
        names = [parameter.name for parameter in (*self.parameters, *self.local_parameters)]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"parameter {twice} appears twice")
        count = _tiled(self.parameters)
        if count != self.parameter_count:
            raise ValueError(f"the layout covers {count} of {self.parameter_count} parameters")
        if _tiled(self.local_parameters) > MAX_PARAMETERS:
            raise ValueError(f"more than {MAX_PARAMETERS} local parameters")

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelManifest:
        """Parse canonical JSON bytes.

        Raises:
            InvalidManifest: too long, not JSON, a field missing, unknown or out of range, an inconsistent
                layout, or bytes other than the canonical ones (which also refuses repeated keys).
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise InvalidManifest(f"a manifest has at most {MAX_MANIFEST_BYTES} bytes, this one {len(data)}")
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            # The offending input is left out: it is as long as the sender likes.
            problems = error.errors(include_url=False, include_input=False, include_context=False)
            first = problems[0]
            where = ".".join(str(part)[:64] for part in first["loc"][:8])
            raise InvalidManifest(f"{where or 'manifest'}: {first['msg'][:200]}") from None
        if manifest.to_bytes() != data:
            raise InvalidManifest("the bytes are not the canonical form of their content")
        return manifest

    def to_bytes(self) -> bytes:
        """The canonical JSON bytes: sorted keys, no white space, ASCII; what is hashed and signed."""
        # A field that came later, so that manifests without it keep their bytes and their digests.
        without = None if self.local_parameters else {"local_parameters"}
        content = self.model_dump(mode="json", exclude=without)
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")

    def sha256(self) -> str:
        """Hex digest of the canonical bytes: the identity of this version."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def next_version(self, weights: bytes, *, after: int | None = None) -> ModelManifest:
        """The manifest of the version that follows this one: same graph, new weights.

        Args:
            weights: the new weights file, `4 * parameter_count` bytes (see `models.weights.encode_weights`).
            after: the highest number that was given; this version's own by default.

        Raises:
            InvalidManifest: the weights have another length, or no version number is left.
        """
        last = max(self.version, after or 0)
        if last >= MAX_VERSION:
            raise InvalidManifest(f"version {last} is the last there can be")
        if len(weights) != self.weights.size:
            raise InvalidManifest(f"new weights have {len(weights)} bytes, this model {self.weights.size}")
        changes = {"version": last + 1, "weights": describe(weights)}
        return ModelManifest.model_validate(dict(self) | changes)


def _tiled(parameters: tuple[ParameterSpec, ...]) -> int:
    """Elements of a vector that parameters tile without a gap."""
    offset = 0
    for parameter in parameters:
        if parameter.offset != offset:
            raise ValueError(f"parameter {parameter.name} starts at {parameter.offset}, expected {offset}")
        offset += parameter.size
    return offset


def describe(data: bytes) -> BlobRef:
    """Digest and size of an artefact.

    Raises:
        InvalidManifest: the artefact is empty or larger than a blob may be.
    """
    try:
        return BlobRef.of(data)
    except ValidationError:
        raise InvalidManifest(f"an artefact cannot have {len(data)} bytes") from None
