"""The exporter: what it refuses, what it writes, and that the bundled files are what Keras gives."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

# It also keeps the warnings of the import itself, which is why it comes before the modules that import it.
tf = pytest.importorskip("tensorflow")

from edge_client.adapters.tflite import TfliteTrainer
from edge_client.training import Examples, TrainingConfig
from models import export as exporter
from models import network as network_module
from models import zoo
from models.architectures import ARCHITECTURES
from models.export import export
from models.flatbuffer import operators
from models.layers.lowering import UnsupportedLayer
from models.manifest import InputSpec, ModelManifest, OptimizerSpec
from models.network import Network, UnsupportedModel
from models.parity import RUNTIMES, TOLERANCE, ParityError, prove_parity

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

layers = tf.keras.layers


def sequential(*parts: Any) -> Any:
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(3)
    return tf.keras.Sequential(list(parts))


def scaling(*shape: int) -> InputSpec:
    return InputSpec(shape=shape, mean=(0.0,) * shape[-1], std=(1.0,) * shape[-1])


def exported(model: Any, *shape: int, classes: int = 4, batch: int = 8) -> exporter.ExportedModel:
    labels = [f"class {index}" for index in range(classes)]
    return export(model, name="try", labels=labels, scaling=scaling(*shape), train_batch_size=batch)


MODELS = {
    "dense": ((5,), lambda: [layers.Dense(6, activation="relu"), layers.Dense(4, use_bias=False)]),
    "conv1d": (
        (20, 3),
        lambda: [
            layers.Conv1D(5, 3, strides=2, padding="same", activation="relu"),
            layers.MaxPooling1D(2),
            layers.Conv1D(4, 2),
            layers.ReLU(),
            layers.GlobalAveragePooling1D(),
            layers.Dense(4),
        ],
    ),
    "conv2d": (
        (9, 11, 2),
        lambda: [
            layers.Conv2D(5, (3, 2), strides=(2, 1), use_bias=False),
            layers.Activation("relu"),
            layers.AveragePooling2D((2, 3)),
            layers.Conv2D(6, 2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(4),
        ],
    ),
    "rim": (
        (7, 7, 1),
        lambda: [
            layers.Conv2D(3, 2, padding="same"),
            layers.MaxPooling2D((2, 3)),
            layers.Conv2D(4, 2, strides=2),
            layers.GlobalMaxPooling2D(),
            layers.Dense(4),
        ],
    ),
    "reshaped": (
        (12,),
        lambda: [layers.Reshape((6, 2)), layers.Conv1D(4, 3), layers.GlobalMaxPooling1D()],
    ),
    "dilated": (
        (9, 10, 3),
        lambda: [
            layers.Conv2D(4, (3, 2), dilation_rate=2, padding="same", activation="relu6"),
            layers.Conv2D(6, 3, groups=2, strides=2, activation="swish"),
            layers.Flatten(),
            layers.Dense(4),
        ],
    ),
    "separable": (
        (9, 10, 3),
        lambda: [
            layers.ZeroPadding2D(((1, 0), (0, 1))),
            layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2, activation="gelu"),
            layers.SeparableConv2D(5, 3, dilation_rate=2, padding="same"),
            layers.LeakyReLU(0.1),
            layers.Flatten(),
            layers.Dense(4),
        ],
    ),
    "overlapping": (
        (9, 10, 2),
        lambda: [
            layers.Conv2D(3, 2, activation="elu"),
            layers.MaxPooling2D(3, 2, padding="same"),
            layers.AveragePooling2D(3, 1, padding="same"),
            layers.Flatten(),
            layers.Dense(4),
        ],
    ),
    "normalised": (
        (6, 7, 4),
        lambda: [
            layers.Conv2D(4, 2),
            layers.GroupNormalization(2),
            layers.Activation("tanh"),
            layers.LayerNormalization(),
            layers.Permute((3, 1, 2)),
            layers.Flatten(),
            layers.Dense(5, activation="softmax"),
            layers.Dropout(0.3),
            layers.Dense(4),
        ],
    ),
    "words": (
        (6,),
        lambda: [layers.Embedding(9, 5), layers.Conv1D(4, 2, activation="sigmoid"), layers.GRU(4)],
    ),
    "recurrent": ((5, 3), lambda: [layers.LSTM(4, return_sequences=True), layers.GRU(4), layers.Dense(4)]),
    "frozen": (
        (6, 7, 4),
        lambda: [
            layers.Conv2D(4, 3, trainable=False),
            layers.BatchNormalization(trainable=False),
            layers.ReLU(6.0),
            layers.Conv2D(3, 1),
            layers.DepthwiseConv2D(2, trainable=False),
            layers.Flatten(),
            layers.Dense(4),
        ],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_exports_have_stock_gradients_and_small_builtin_graphs(name: str) -> None:
    shape, parts = MODELS[name]
    model = sequential(layers.Input(shape), *parts())
    result = exported(model, *shape)
    assert prove_parity(model, result.graph, result.manifest, seed=1) < TOLERANCE
    assert not {operator for operator in operators(result.graph) if operator.startswith("FLEX")}
    assert len(result.graph) <= size_limit(model)


def size_limit(model: Any) -> float:
    """1.3 x the bytes of all parameters, and 8 kB a layer."""
    return 1.3 * 4 * float(model.count_params()) + 8192 * len(model.layers)


def test_branches_and_models_inside_models_export() -> None:
    inner = tf.keras.Input((6, 7, 3))
    backbone = tf.keras.Model(inner, layers.Conv2D(3, 3, padding="same", activation="relu")(inner))
    backbone.trainable = False
    inputs = tf.keras.Input((6, 7, 3))
    x = layers.Add()([inputs, backbone(inputs)])
    gate = layers.Dense(3, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Reshape((42, 3))(layers.Multiply()([x, gate]))
    x = layers.Concatenate()([x, layers.MultiHeadAttention(2, 2)(x, x)])
    model = tf.keras.Model(inputs, layers.Dense(4)(layers.GlobalMaxPooling1D()(x)))
    result = exported(model, 6, 7, 3)
    assert result.manifest.parameter_count == model.count_params() - 84
    assert len(result.graph) <= size_limit(model)


def test_frozen_weights_do_not_travel_and_are_in_the_file_once() -> None:
    frozen = layers.Dense(200, activation="relu", trainable=False)
    model = sequential(layers.Input((100,)), frozen, layers.Dense(4, name="head"))
    result = exported(model, 100)
    assert [p.name for p in result.manifest.parameters] == ["head/kernel", "head/bias"]
    assert 80_800 < len(result.graph) <= 80_800 + 3 * 8192


@pytest.mark.parametrize(
    ("loss", "labels", "outputs"),
    [
        ("binary_crossentropy", 2, 1),
        ("multi_label_crossentropy", 3, 3),
        ("mean_squared_error", 2, 2),
        ("huber", 1, 1),
    ],
)
@pytest.mark.parametrize("options", [{}, {"optimizer": OptimizerSpec(kind="momentum"), "accumulation": 3}])
def test_every_loss_has_stock_gradients(
    loss: Any, labels: int, outputs: int, options: dict[str, Any]
) -> None:
    model = sequential(layers.Input((5,)), layers.Dense(6, activation="tanh"), layers.Dense(outputs))
    result = export(
        model,
        name="try",
        labels=[f"label {index}" for index in range(labels)],
        scaling=scaling(5),
        train_batch_size=8,
        loss=loss,
        **options,
    )
    assert prove_parity(model, result.graph, result.manifest, seed=5) < TOLERANCE
    assert ModelManifest.from_bytes(result.manifest.to_bytes()) == result.manifest


def test_functional_models_export_as_sequential_ones_do() -> None:
    inputs = tf.keras.Input((5,))
    model = tf.keras.Model(inputs, layers.Dense(4)(layers.Dense(6, activation="relu")(inputs)))
    assert exported(model, 5).manifest.parameter_count == 6 * 6 + 4 * 7


def test_graph_does_not_grow_with_its_parameters() -> None:
    small = exported(sequential(layers.Input((6,)), layers.Dense(9, activation="relu"), layers.Dense(4)), 6)
    large = exported(
        sequential(layers.Input((64,)), layers.Dense(900, activation="relu"), layers.Dense(4)), 64
    )
    assert large.manifest.weights.size > 240_000
    # Some shapes happen to be equal in the small one, and are in its file once.
    assert len(large.graph) <= len(small.graph) + 256


def own_relu(x: Any) -> Any:
    return 2 * tf.nn.relu(x)


own_relu.__name__ = "relu"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: layers.BatchNormalization(name="norm"), ["norm", "leak", "GroupNormalization"]),
        (lambda: layers.Conv1D(22, 3, groups=11, name="split"), ["split", "11 groups", "Depthwise"]),
        (lambda: layers.Conv1D(4, 3, padding="causal", name="past"), ["past", "causal", "same"]),
        (lambda: layers.Conv1D(4, 3, activation="selu", name="self"), ["self", "selu", "relu"]),
        (lambda: layers.UpSampling1D(2, name="up"), ["up", "UpSampling1D", "supported are"]),
        (lambda: layers.LayerNormalization(axis=1, name="across"), ["across", "axis=-1"]),
        (lambda: layers.GRU(4, reset_after=False, name="early"), ["early", "reset_after=True"]),
        (lambda: layers.LSTM(4, dropout=0.5, name="leaky"), ["leaky", "Dropout layers"]),
        (lambda: layers.ELU(0.5, name="half"), ["half", "alpha"]),
        (lambda: layers.Lambda(lambda x: x, name="own"), ["own", "Lambda", "supported are"]),
        (lambda: layers.Lambda(lambda x: x, name="own"), ["say it by layers such as Add"]),
        (lambda: layers.RandomContrast(0.1, name="vary"), ["vary", "in the data adapter"]),
        (lambda: layers.Bidirectional(layers.GRU(2), name="both"), ["both", "one direction"]),
        (
            lambda: layers.Dense(4, kernel_regularizer="l2", name="held"),
            ["held", "kernel_reg", "leave it out"],
        ),
        (lambda: layers.Dense(4, activity_regularizer="l1", name="calm"), ["calm", "activity_regularizer"]),
        (lambda: layers.GRU(4, recurrent_constraint="max_norm", name="tied"), ["tied", "recurrent_con"]),
        (lambda: layers.Dense(4, dtype="mixed_float16", name="mixed"), ["mixed", "float16", "policy"]),
        (lambda: layers.Dense(4, activation=own_relu, name="other"), ["other", "relu is a function of"]),
    ],
)
def test_refusals_name_layer_reason_and_alternative(layer: Any, words: list[str]) -> None:
    model = sequential(layers.Input((12, 22)), layer(), layers.Flatten(), layers.Dense(4))
    with pytest.raises(UnsupportedLayer) as refused:
        Network(model)
    for word in words:
        assert word in str(refused.value)


def test_softmax_at_the_end_is_refused_since_the_loss_has_it() -> None:
    for behind in ([], [layers.Dropout(0.1)], [layers.Reshape((2, 2)), layers.Flatten()]):
        model = sequential(layers.Input((5,)), layers.Dense(4, activation="softmax"), *behind)
        with pytest.raises(UnsupportedLayer, match="gives logits"):
            exported(model, 5)
    with pytest.raises(UnsupportedLayer, match="gives logits"):
        exported(sequential(layers.Input((5,)), layers.Dense(4), layers.Softmax()), 5)


def test_values_may_end_in_a_sigmoid_which_no_loss_of_theirs_has() -> None:
    model = sequential(layers.Input((5,)), layers.Dense(2, activation="sigmoid"))
    made = export(
        model,
        name="try",
        labels=["a", "b"],
        scaling=scaling(5),
        train_batch_size=8,
        loss="mean_squared_error",
    )
    assert prove_parity(model, made.graph, made.manifest, seed=1) < TOLERANCE


def test_a_frozen_layer_may_have_what_would_only_hold_its_weights() -> None:
    frozen = layers.Dense(3, kernel_regularizer="l2", bias_constraint="max_norm", trainable=False)
    assert Network(sequential(layers.Input((5,)), frozen, layers.Dense(4))).frozen_count == 18


def test_layers_that_get_several_shapes_export_or_are_named() -> None:
    inputs = tf.keras.Input((8, 3))
    twice, flat = layers.Conv1D(3, 2), layers.Flatten()
    both = layers.Concatenate()([flat(twice(inputs)), flat(twice(twice(inputs)))])
    exported(tf.keras.Model(inputs, layers.Dense(4)(both)), 8, 3)
    gru = layers.GRU(2, name="memory")
    both = layers.Concatenate()([gru(inputs), gru(twice(inputs))])
    with pytest.raises(UnsupportedLayer, match=r"memory.*several shapes"):
        Network(tf.keras.Model(inputs, layers.Dense(4)(both)))


def test_calls_with_more_than_the_inputs_are_refused() -> None:
    inputs = tf.keras.Input((6, 4))
    start = layers.Dense(2)(layers.GlobalAveragePooling1D()(inputs))
    with pytest.raises(UnsupportedLayer, match="state that it starts from"):
        Network(tf.keras.Model(inputs, layers.GRU(2)(inputs, initial_state=start)))
    attention = layers.MultiHeadAttention(2, 2)(inputs, inputs, attention_mask=tf.ones([1, 6, 6]))
    with pytest.raises(UnsupportedLayer, match="attention_mask"):
        Network(tf.keras.Model(inputs, layers.Flatten()(attention)))


@pytest.mark.parametrize("local", [(), ("first",)])
@pytest.mark.parametrize("trainable", [True, False])
def test_weights_that_are_not_finite_are_named(local: tuple[str, ...], trainable: bool) -> None:
    first = layers.Dense(3, name="first", trainable=trainable)
    model = sequential(layers.Input((5,)), first, layers.Dense(4))
    first.set_weights([np.full((5, 3), np.nan), np.zeros(3)])
    with pytest.raises(UnsupportedLayer, match="first/kernel:0 is not finite"):
        Network(model, local if trainable else ())


def test_a_subclass_of_a_known_layer_is_refused() -> None:
    class Doubled(layers.Dense):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            return 2 * super().call(inputs)

    with pytest.raises(UnsupportedLayer, match="Doubled"):
        Network(sequential(layers.Input((5,)), Doubled(4)))


def test_bare_operations_and_long_sequences_are_refused() -> None:
    inputs = tf.keras.Input((4,))
    with pytest.raises(UnsupportedLayer, match="use a layer, such as Add"):
        Network(tf.keras.Model(inputs, layers.Dense(4)(inputs) + inputs))
    with pytest.raises(UnsupportedLayer, match="pool or stride"):
        Network(sequential(layers.Input((400, 2)), layers.GRU(3), layers.Dense(4)))
    with pytest.raises(UnsupportedLayer, match="mask"):
        Network(sequential(layers.Input((4,)), layers.Embedding(5, 2, mask_zero=True), layers.GRU(3)))


class Subclass(tf.keras.Model):  # type: ignore[misc]
    def call(self, inputs: Any) -> Any:
        return inputs


def two(inputs: int, outputs: int) -> Any:
    ends = [tf.keras.Input((4,)) for _ in range(inputs)]
    whole = layers.Concatenate()(ends) if inputs > 1 else ends[0]
    return tf.keras.Model(ends, [layers.Dense(4)(whole) for _ in range(outputs)])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: None, "NoneType is no Keras model"),
        (lambda: tf.keras.Sequential([layers.Dense(4)]), "must be built.*Input"),
        (Subclass, "subclass of Model"),
        (lambda: two(2, 1), "one input.*are 2 and 1"),
        (lambda: two(1, 2), "one output.*are 1 and 2"),
        (lambda: sequential(layers.Input((None, 2)), layers.GlobalMaxPooling1D()), "fixed.*every axis"),
        (lambda: sequential(layers.Input((6, 2)), layers.Conv1D(4, 3)), "logits.*Flatten"),
        (lambda: sequential(layers.Input((6,)), layers.ReLU()), "no parameters to train"),
        (lambda: sequential(layers.Input((6,)), layers.Dense(4, trainable=False)), "no parameters"),
        (lambda: sequential(layers.Input((6,), dtype="uint8"), layers.Dense(4)), "takes uint8"),
    ],
)
def test_models_that_cannot_be_exported_as_a_whole_say_what_to_do(model: Any, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        Network(model())


def test_a_model_with_more_weights_than_devices_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = layers.Dense(30, trainable=False)
    model = sequential(layers.Input((5,)), frozen, layers.Dense(4))
    for limit, least, words in (
        ("MAX_PARAMETERS", 124, "124 weights"),
        ("MAX_GRAPH_BYTES", 720, "720 bytes"),
    ):
        monkeypatch.setattr(network_module, limit, least)
        Network(model)
        monkeypatch.setattr(network_module, limit, least - 1)
        with pytest.raises(UnsupportedModel, match=f"{words}.*narrower"):
            Network(model)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["a", "b", "c"]}, "4 outputs, but 3 labels"),
        ({"loss": "binary_crossentropy", "labels": ["a", "b"]}, "need 1"),
        ({"scaling": scaling(6)}, r"inputs \(5,\), but the scaling is of \(6,\)"),
        ({"loss": "mse"}, "choose one of .*mean_squared_error"),
        ({"labels": ["a", "a", "b", "c"]}, "same name"),
        ({"train_batch_size": 5000}, "4096"),
        ({"name": "My Model"}, "name"),
    ],
)
def test_what_does_not_fit_the_model_is_said_before_it_is_converted(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(exporter, "_convert")
    given = {"name": "try", "labels": list("abcd"), "scaling": scaling(5), "train_batch_size": 8}
    with pytest.raises(ValueError, match=words):
        export(sequential(layers.Input((5,)), layers.Dense(4)), **given | changes)


def test_parity_notices_a_graph_of_another_model() -> None:
    result = exported(sequential(layers.Input((5,)), layers.Dense(6, activation="relu"), layers.Dense(4)), 5)
    linear = sequential(layers.Input((5,)), layers.Dense(6), layers.Dense(4))
    with pytest.raises(ParityError):
        prove_parity(linear, result.graph, result.manifest)


def test_an_export_is_proved_in_both_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's own, and the one that devices have; either can refuse it."""
    proved: list[str] = []

    class Wrong:
        """A runtime whose weights after a step are off by 1 %; everything else is right."""

        def __init__(self, **options: Any) -> None:
            proved.append("wrong")
            self._inner = tf.lite.Interpreter(**options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def get_signature_runner(self, name: str) -> Any:
            run = self._inner.get_signature_runner(name)
            if name != "get_weights":
                return run
            return lambda: {"weights": 1.01 * run()["weights"]}

    assert [runtime.__module__.partition(".")[0] for runtime in RUNTIMES] == ["tensorflow", "tflite_runtime"]
    parts = layers.Input((5,)), layers.Dense(4)
    for place in range(2):
        changed = list(RUNTIMES)
        changed[place] = Wrong
        monkeypatch.setattr(exporter, "RUNTIMES", changed)
        with pytest.raises(ParityError, match="gradient"):
            exported(sequential(*parts), 5)
    assert proved


@pytest.fixture(scope="module", params=zoo.NAMES)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A model exported anew by the command line, its Keras form, and the files in the repository."""
    name = str(request.param)
    directory = tmp_path_factory.mktemp("export") / name
    assert exporter.main([name, "--out", str(directory)]) == 0
    return ARCHITECTURES[name].build_seeded(), directory, zoo.load(name)


def examples_for(manifest: ModelManifest, count: int) -> Examples:
    random = np.random.default_rng(4)
    x = random.normal(size=(count, *manifest.input.shape)) * manifest.input.std + manifest.input.mean
    y = random.integers(0, len(manifest.labels), count)
    return Examples("random", x.astype(np.float32), y.astype(np.int32))


def test_bundled_files_are_what_the_exporter_writes(fresh: tuple[Any, ...]) -> None:
    _, directory, bundled = fresh
    manifest = ModelManifest.from_bytes((directory / "manifest.json").read_bytes())
    changes = {"graph": bundled.manifest.graph, "weights": bundled.manifest.weights}
    assert ModelManifest.model_validate(dict(manifest) | changes) == bundled.manifest
    weights = np.frombuffer((directory / "weights.bin").read_bytes(), "<f4")
    np.testing.assert_allclose(weights, bundled.weights, atol=1e-7)
    trainer = TfliteTrainer(manifest, (directory / "model.tflite").read_bytes())
    checked_in = TfliteTrainer(bundled.manifest, bundled.graph)
    examples, config = examples_for(manifest, 80), TrainingConfig(2, 0.05)
    deltas = [
        one.train(bundled.weights, examples, config, np.random.default_rng(0)).delta
        for one in (trainer, checked_in)
    ]
    np.testing.assert_allclose(deltas[0], deltas[1], atol=1e-6)


def test_bundled_graphs_train_as_keras_does(fresh: tuple[Any, ...]) -> None:
    """Loss and weights after a few steps of stock Keras, from the same start in the same order."""
    model, _, bundled = fresh
    manifest = bundled.manifest
    examples, rate = examples_for(manifest, 80), 0.05
    trainer = TfliteTrainer(manifest, bundled.graph)
    config = TrainingConfig(local_epochs=2, learning_rate=rate)
    update = trainer.train(bundled.weights, examples, config, np.random.default_rng(9))

    x = ((examples.x - manifest.input.mean) / manifest.input.std).astype(np.float32)
    model.compile(
        tf.keras.optimizers.SGD(rate), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    before = float(model.evaluate(x, examples.y, verbose=0))
    random = np.random.default_rng(9)
    for _ in range(config.local_epochs):
        order = random.permutation(len(x))
        for start in range(0, len(x), manifest.train_batch_size):
            chosen = order[start : start + manifest.train_batch_size]
            model.train_on_batch(x[chosen], examples.y[chosen])
    weights: NDArray[np.float32] = np.concatenate([w.ravel() for w in model.get_weights()])
    np.testing.assert_allclose(bundled.weights + update.delta, weights, atol=2e-6)
    assert update.loss_before == pytest.approx(before, rel=1e-5)
    assert update.loss_after == pytest.approx(float(model.evaluate(x, examples.y, verbose=0)), rel=1e-5)


def test_files_tell_nothing_of_the_machine_that_made_them() -> None:
    for name in zoo.NAMES:
        directory = Path(str(zoo.__file__)).parent / name
        graph = (directory / "model.tflite").read_bytes()
        for word in (b"/tmp", b"/home", b"/work", b"/root", b"site-packages"):
            assert word not in graph
