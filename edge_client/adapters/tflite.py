"""Local training by TensorFlow Lite, in either small runtime; the only module that touches an interpreter.

`tflite-runtime` (Python up to 3.11) and `ai-edge-litert` (later ones) have the same `Interpreter`; TensorFlow
is never imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_client import scoring
from edge_client.training import (
    MAX_WEIGHT,
    Evaluation,
    Examples,
    ExamplesRejected,
    HiddenExamples,
    LocalUpdate,
    ModelRejected,
    TrainingConfig,
    TrainingDiverged,
    WeightsRejected,
)
from models.manifest import LOCAL_SIGNATURE, ModelManifest
from protocol.dp.example import run_steps

try:
    from tflite_runtime.interpreter import Interpreter
except ImportError:
    from ai_edge_litert.interpreter import Interpreter

FLATBUFFER_IDENTIFIER = b"TFL3"
PREDICTION_BATCH = 32
"""Examples in one call of the graph: 256 are no faster, and cost 2 MiB more in the watch model."""


def open_interpreter(graph: bytes, threads: int = 1) -> Interpreter:
    """Load a graph, with XNNPACK for all its entry points.

    In tflite-runtime several threads work for XNNPACK alone. The runtime's own matrix products would have a
    pool of their own, and both wait for work by spinning: with a thread for every core they keep the cores
    from each other, and a step takes six times as long. On a busy machine those of XNNPACK alone make it
    hundreds of times as long, so leave it at one thread where others work as well.

    Args:
        graph: bytes of a `.tflite` file, which must outlive the interpreter: it keeps a pointer into them.
        threads: at most as many as there are idle cores. Models of a device's size gain nothing by two.

    Raises:
        ValueError, RuntimeError: the runtime cannot load it.
    """
    interpreter = Interpreter(model_content=graph, num_threads=threads)
    # Entry points of tflite-runtime alone never get XNNPACK: this gives it to all of them.
    interpreter.allocate_tensors()
    if threads > 1 and Interpreter.__module__.startswith("tflite_runtime"):
        # XNNPACK has its threads by now, and keeps them.
        interpreter._interpreter.SetNumThreads(1)
    return interpreter


class TfliteTrainer:
    """A `LocalTrainer` over one exported graph.

    Not safe for use by several threads at once: the graph holds the weights in training.

    Attributes:
        runtime: name of the package that runs the graph.
    """

    runtime: ClassVar[str] = Interpreter.__module__.partition(".")[0]

    def __init__(
        self,
        manifest: ModelManifest,
        graph: bytes,
        *,
        threads: int = 1,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Check a model file against its manifest and load it.

        Args:
            manifest: the (verified) manifest of the model.
            graph: bytes of the `.tflite` file.
            threads: as in `open_interpreter`.
            between: called before each call of the graph; what it raises ends what was asked for.

        Raises:
            ModelRejected: size, digest, format, signatures or parameters are not what the manifest says.
        """
        _check_file(manifest, graph)
        self._manifest, self._between = manifest, between
        self._mean = np.asarray(manifest.input.mean, np.float32)
        self._std = np.asarray(manifest.input.std, np.float32)
        try:
            # The interpreter keeps a pointer into these bytes.
            self._graph = graph
            self._interpreter = open_interpreter(graph, threads)
            _check_signatures(manifest, self._interpreter.get_signature_list())
            self._run: dict[str, Any] = {
                signature.name: self._interpreter.get_signature_runner(signature.name)
                for signature in manifest.signatures
            }
            _check_tensors(manifest, self._run)
        except (ValueError, RuntimeError) as error:
            raise ModelRejected(f"the runtime cannot load the model: {_first_line(error)}") from error

    @property
    def parameter_count(self) -> int:
        """Length d of the weights vector."""
        return self._manifest.parameter_count

    def train(
        self,
        weights: NDArray[np.float32],
        examples: Examples,
        config: TrainingConfig,
        generator: np.random.Generator,
        local: NDArray[np.float32] | None = None,
    ) -> LocalUpdate:
        """Train on the device's examples from the global weights; see `LocalTrainer.train`."""
        y = scoring.scaled_targets(self._manifest, examples.y)
        before = self._evaluate(weights, examples.x, y, local)
        self._set_weights(weights, local)
        if config.hidden is None:
            self._run_epochs(examples.x, y, config, generator)
        else:
            self._run_hidden(examples.x, y, config, config.hidden, generator)
        found = {name: np.array(vector, np.float32) for name, vector in self._call("get_weights").items()}
        for vector in found.values():
            largest = float(np.abs(vector).max())
            # Written so that NaN is refused.
            if not largest <= MAX_WEIGHT:
                raise TrainingDiverged(f"a weight became {largest}, beyond {MAX_WEIGHT:g}")
        after = self._evaluate(found["weights"], examples.x, y, found.get("local"))
        return LocalUpdate(
            delta=found["weights"] - weights,
            example_count=len(examples),
            loss_before=before.loss,
            loss_after=after.loss,
            accuracy=after.accuracy,
            local=found.get("local"),
        )

    def _run_epochs(
        self, x: NDArray[np.float32], y: NDArray[Any], config: TrainingConfig, generator: np.random.Generator
    ) -> None:
        """Passes over all examples in batches, each a step or a part of one."""
        fixed = _rates(config)
        for _ in range(config.local_epochs):
            order = generator.permutation(len(x))
            for chosen, more in _calls(self._manifest, order, generator):
                loss = self._call("train", x=self._scale(x[chosen]), y=y[chosen], **fixed, **more)["loss"]
                if not np.isfinite(loss):
                    raise TrainingDiverged(f"the loss became {float(loss)}")

    def _run_hidden(
        self,
        x: NDArray[np.float32],
        y: NDArray[Any],
        config: TrainingConfig,
        hidden: HiddenExamples,
        generator: np.random.Generator,
    ) -> None:
        """Steps of DP-SGD over the gradients of single examples; the graph sees one at a time.

        Raises:
            ModelRejected: the graph gives no such gradients.
        """
        manifest = self._manifest
        if not manifest.example_gradients:
            raise ModelRejected(
                f"{manifest.name} gives no gradients of single examples, which mode example needs: "
                f"export it with example_gradients=True"
            )
        fixed = _rates(config)

        def gradient(index: int) -> NDArray[np.float32]:
            one = slice(index, index + 1)
            more = {"keep": _kept(manifest, 1, generator)} if manifest.dropouts else {}
            found = self._call("gradient", x=self._scale(x[one]), y=y[one], **more)["gradient"]
            if found.shape != (self.parameter_count,) or found.dtype != np.float32:
                raise ModelRejected(f"a gradient is {found.dtype} of shape {found.shape}")
            return found

        def apply(estimate: NDArray[np.float32]) -> None:
            self._call("apply", gradient=estimate, **fixed)

        run_steps(hidden.mechanism, hidden.steps, len(x), hidden.secret, gradient, apply)

    def predict(
        self,
        weights: NDArray[np.float32],
        x: NDArray[np.float32],
        local: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Probabilities or values of raw inputs; see `LocalTrainer.predict`."""
        return scoring.predictions(self._manifest, self._outputs(weights, x, local))

    def evaluate(
        self,
        weights: NDArray[np.float32],
        examples: Examples,
        local: NDArray[np.float32] | None = None,
    ) -> Evaluation:
        """Loss, accuracy and confusion on labelled examples; see `LocalTrainer.evaluate`."""
        y = scoring.scaled_targets(self._manifest, examples.y)
        return self._evaluate(weights, examples.x, y, local)

    def _evaluate(
        self,
        weights: NDArray[np.float32],
        x: NDArray[np.float32],
        y: NDArray[Any],
        local: NDArray[np.float32] | None,
    ) -> Evaluation:
        return scoring.evaluate(self._manifest, self._outputs(weights, x, local), y)

    def _outputs(
        self, weights: NDArray[np.float32], x: NDArray[np.float32], local: NDArray[np.float32] | None
    ) -> NDArray[np.float64]:
        """The graph's outputs (n, k) for raw inputs, in batches that bound the memory."""
        self._check_inputs(x)
        self._set_weights(weights, local)
        parts = [self._call("infer", x=self._scale(part))["logits"] for part in _slices(x, PREDICTION_BATCH)]
        outputs: NDArray[np.float64] = np.concatenate(parts).astype(np.float64)
        return outputs

    def _call(self, entry: str, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run an entry point.

        Raises:
            ModelRejected: the runtime cannot run it.
        """
        self._between()
        try:
            outputs: dict[str, NDArray[Any]] = self._run[entry](**inputs)
        except (RuntimeError, ValueError) as error:
            raise ModelRejected(f"the runtime cannot run {entry}: {_first_line(error)}") from error
        return outputs

    def _set_weights(self, weights: NDArray[np.float32], local: NDArray[np.float32] | None) -> None:
        manifest = self._manifest
        vectors = {"weights": (weights, manifest.parameter_count)}
        if local is None and manifest.local_parameters:
            local = self._call(LOCAL_SIGNATURE)["local"]
        if local is not None:
            vectors["local"] = (local, manifest.local_count)
        for name, (vector, count) in vectors.items():
            if vector.dtype != np.float32 or vector.shape != (count,):
                raise WeightsRejected(
                    f"{name} are {vector.dtype} of shape {vector.shape}, the model has {count} float32 ones"
                )
            if not np.isfinite(vector).all():
                raise WeightsRejected(f"one of the {name} is not finite")
        self._call("set_weights", **{name: vector for name, (vector, _) in vectors.items()})

    def _check_inputs(self, x: NDArray[np.float32]) -> None:
        """Refuses what cannot be raw inputs of this model.

        Raises:
            ExamplesRejected: none at all, or another shape or dtype.
        """
        if x.dtype != np.float32 or x.shape[1:] != self._manifest.input.shape or len(x) == 0:
            raise ExamplesRejected(
                f"inputs are {x.dtype} of shape {x.shape}, the model takes float32 (n, "
                f"{', '.join(map(str, self._manifest.input.shape))}) with n at least 1"
            )

    def _scale(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """One batch in the model's scaling; a device has no memory for a scaled copy of all its examples.

        Raises:
            ExamplesRejected: a value is not finite.
        """
        scaled: NDArray[np.float32] = (x - self._mean) / self._std
        if not np.isfinite(scaled).all():
            raise ExamplesRejected("an input is not finite")
        vocabulary = self._manifest.input.vocabulary
        # The runtime looks ids up as they are: one beyond the table must never reach it.
        if vocabulary is not None and not (scaled.min() >= 0 and scaled.max() <= vocabulary - 1):
            raise ExamplesRejected(f"an id is not one of the model's {vocabulary}")
        return scaled


def interpreter(graph: bytes) -> Any:
    """A bare interpreter, to see that the runtime runs."""
    return Interpreter(model_content=graph, num_threads=1)


def _calls(
    manifest: ModelManifest, order: NDArray[np.int64], generator: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]]:
    """The calls of `train` for one epoch: indices of a batch, and what else the graph takes.

    Batches have one fixed size; the last is filled up with examples of weight 0. Several calls make one step
    of the optimizer where the manifest says so; the last of them says that it is.
    """
    size, per_step = manifest.train_batch_size, manifest.accumulation
    starts = range(0, len(order), size)
    for number, start in enumerate(starts, start=1):
        chosen = order[start : start + size]
        mask = np.zeros(size, np.float32)
        mask[: len(chosen)] = 1.0
        more = {"mask": mask}
        if manifest.dropouts:
            more["keep"] = _kept(manifest, size, generator)
        if per_step > 1:
            more["last"] = np.array(number % per_step == 0 or number == len(starts), np.float32)
        yield np.resize(chosen, size), more


def _rates(config: TrainingConfig) -> dict[str, NDArray[np.float32]]:
    """What every step takes: learning rate and weight of the proximal term."""
    return {
        "lr": np.array(config.learning_rate, np.float32),
        "mu": np.array(config.proximal_mu, np.float32),
    }


def _kept(manifest: ModelManifest, count: int, generator: np.random.Generator) -> NDArray[np.float32]:
    """Masks of all dropouts side by side: 0 for what is dropped, 1 / (1 - rate) for what is kept."""
    parts = []
    for dropout in manifest.dropouts:
        kept = generator.random((count, dropout.size), np.float32) >= dropout.rate
        parts.append(kept.astype(np.float32) / np.float32(1.0 - dropout.rate))
    return np.concatenate(parts, axis=1)


def _slices(x: NDArray[np.float32], size: int) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(x), size):
        yield x[start : start + size]


def _check_file(manifest: ModelManifest, graph: bytes) -> None:
    """What can be known about a model file without giving it to the runtime."""
    if len(graph) != manifest.graph.size:
        raise ModelRejected(f"the model file has {len(graph)} bytes, its manifest says {manifest.graph.size}")
    if hashlib.sha256(graph).hexdigest() != manifest.graph.sha256:
        raise ModelRejected("the model file has another digest than its manifest says")
    if graph[4:8] != FLATBUFFER_IDENTIFIER:
        raise ModelRejected("the model file is no TensorFlow Lite flatbuffer")


def _check_signatures(manifest: ModelManifest, found: dict[str, dict[str, list[str]]]) -> None:
    for signature in manifest.signatures:
        if signature.name not in found:
            raise ModelRejected(f"the model has no signature {signature.name}")
        names = found[signature.name]
        if set(names["inputs"]) != set(signature.inputs) or set(names["outputs"]) != set(signature.outputs):
            raise ModelRejected(f"the signature {signature.name} has other tensors than its manifest says")


def _check_tensors(manifest: ModelManifest, run: dict[str, Any]) -> None:
    """Compare the shapes that the graph declares with those of the manifest, before anything runs."""
    shape, batch = manifest.input.shape, manifest.train_batch_size
    scalar: tuple[int, ...] = ()
    expected = {
        ("train", "x"): (batch, *shape),
        ("train", "y"): (batch, *manifest.target.shape),
        ("train", "mask"): (batch,),
        ("train", "lr"): scalar,
        ("train", "mu"): scalar,
        ("infer", "x"): (-1, *shape),
        ("set_weights", "weights"): (manifest.parameter_count,),
    }
    if manifest.local_parameters:
        expected["set_weights", "local"] = (manifest.local_count,)
    if manifest.dropouts:
        expected["train", "keep"] = (batch, sum(dropout.size for dropout in manifest.dropouts))
    if manifest.accumulation > 1:
        expected["train", "last"] = scalar
    if manifest.example_gradients:
        expected["gradient", "x"] = (1, *shape)
        expected["gradient", "y"] = (1, *manifest.target.shape)
        expected["apply", "gradient"] = (manifest.parameter_count,)
        expected["apply", "lr"] = expected["apply", "mu"] = scalar
        if manifest.dropouts:
            expected["gradient", "keep"] = (1, sum(dropout.size for dropout in manifest.dropouts))
    for (name, tensor), wanted in expected.items():
        details = run[name].get_input_details()
        found = tuple(details[tensor]["shape_signature"].tolist()) if tensor in details else None
        if found != wanted:
            raise ModelRejected(f"{name}({tensor}) has shape {found}, its manifest says {wanted}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
