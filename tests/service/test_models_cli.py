"""`covey model new | export | inspect | evaluate`, from an empty directory to measured inference files."""

# ruff: noqa: E402  the import of TensorFlow comes first: it may skip the file
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

tf = pytest.importorskip("tensorflow")

from models import cli, graph_file, template
from models.examples import Examples
from models.inference import PRECISIONS, file_name
from models.manifest import ModelManifest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
OWN = """
import tensorflow as tf
LABELS = ["low", "high"]
def build():
    layers = tf.keras.layers
    return tf.keras.Sequential([layers.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(2)])
"""


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    yield
    for name in ("model", "data", "test_model"):
        sys.modules.pop(name, None)


def run(*arguments: str | Path) -> tuple[int, str]:
    app = typer.Typer()
    cli.register(app)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def examples(path: Path, count: int = 300) -> Path:
    x = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    Examples("some", x, (x.sum(axis=1) > 0).astype(np.int32)).save(path)
    return path


def test_a_new_project_exports_and_its_own_test_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "barn-doors"
    code, output = run("new", project)
    assert (code, "next:" in output) == (0, True)
    assert sorted(file.name for file in project.iterdir()) == sorted(template.FILES)
    assert run("new", project)[0] == 1
    assert run("new", tmp_path / "No Slug")[0] == 1
    code, output = run("export", f"{project / 'model.py'}:ARCHITECTURE", "--out", project / "export")
    assert code == 0, output
    manifest = ModelManifest.from_bytes((project / "export" / "manifest.json").read_bytes())
    assert (manifest.name, manifest.labels) == ("barn-doors", ("still", "moving"))
    monkeypatch.syspath_prepend(str(project))
    import test_model  # type: ignore[import-not-found]

    test_model.test_the_model_exports_and_learns()


def test_every_option_of_the_template_plan_is_one_that_covey_has(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from aggregator.cli import main; main()", "round", "start", "--help"]
    shown = subprocess.run(
        command, cwd=ROOT, env={"COLUMNS": "200", "PATH": ""}, capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in template.PLAN.splitlines() if line.startswith("covey round"))
    options = [word for word in line.split() if word.startswith("--")]
    assert options and all(option in shown for option in options)


def test_export_inspect_and_evaluate(tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    out, some = tmp_path / "export", examples(tmp_path / "some.npz")
    source = f"{tmp_path / 'own_model.py'}:build"
    code, output = run("export", source, "--out", out, "--inference", "--examples", some)
    assert code == 0, output
    manifest = ModelManifest.from_bytes((out / "manifest.json").read_bytes())
    assert (manifest.name, manifest.labels, manifest.input.shape) == ("own-model", ("low", "high"), (6,))
    graph_file.read((out / "model.tflite").read_bytes())
    sizes = [(out / file_name(precision)).stat().st_size for precision in PRECISIONS]
    assert all(sizes)

    code, output = run("inspect", out)
    assert code == 0, output
    for words in (
        "own-model version 1",
        "dense/kernel",
        "train ",
        "BATCH_MATMUL",
        "ms here",
        "KiB of memory",
    ):
        assert words in output
    assert run("inspect", out / file_name("float32"), "--no-time")[0] == 0

    code, output = run("evaluate", out, "--examples", some, "--json")
    assert code == 0, output
    scores = json.loads(output)
    assert [score["graph"] for score in scores] == ["trainable", *PRECISIONS]
    assert scores[1]["accuracy"] == scores[0]["accuracy"]
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-5)
    assert abs(scores[2]["accuracy"] - scores[0]["accuracy"]) <= 0.02
    assert abs(scores[3]["accuracy"] - scores[0]["accuracy"]) <= 0.05
    assert "accuracy" in run("evaluate", out, "--examples", some)[1]

    weights = np.full(manifest.parameter_count, 0.25, "<f4").tobytes()
    (tmp_path / "trained.bin").write_bytes(weights)
    code, output = run("export", source, "--out", out, "--weights", tmp_path / "trained.bin")
    assert (code, (out / "weights.bin").read_bytes()) == (0, weights)


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN.replace('activation="relu"', 'activation="selu", name="odd"'))
    out = tmp_path / "export"
    cases = {
        f"{file}:build": "odd",
        f"{file}:nothing": "no function nothing",
        f"{tmp_path}/none.py:build": "no file",
        "unheard-of": "one of anomaly",
    }
    for source, words in cases.items():
        code, output = run("export", source, "--out", out)
        assert (code, words in output) == (1, True), output
    assert not out.exists()
    (tmp_path / "bad.tflite").write_bytes(b"not a graph")
    code, output = run("inspect", tmp_path / "bad.tflite")
    assert (code, "no TensorFlow Lite flatbuffer" in output) == (1, True)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("def build(): return None", "NoneType is no Keras model"),
        ("def build(): raise OSError('no disk')", "line 7: OSError: no disk"),
        ("import nothing_like_it", "line 7: ModuleNotFoundError"),
        ("def (", "SyntaxError"),
        ("def build(): return tf.keras.Sequential([tf.keras.layers.Dense(2)])", "must be built"),
        ("LOSS = 'mse'", "choose one of"),
        ("OPTIMIZER = 'Adam'", "kind: Input should be 'sgd', 'momentum' or 'adam'"),
        ("TRAIN_BATCH_SIZE = 0", "train_batch_size: Input should be greater"),
        ("ACCUMULATION = 0", "accumulation: Input should be greater"),
        ("SCALING = (0, 1)", "no InputSpec"),
        ("LABELS = 'ab'", 'write ("ab",)'),
        ("LABELS = ['a', 'a']", "two labels have the same name"),
        ("LOCAL_LAYERS = ('nope',)", "no such layer"),
    ],
)
def test_a_mistake_in_an_authors_file_is_one_line(tmp_path: Path, extra: str, words: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN + extra + "\n")
    code, output = run("export", f"{file}:build", "--out", tmp_path / "export")
    assert (code, words in output, output.count("\n")) == (1, True, 1), output
    assert not (tmp_path / "export").exists()


def test_what_a_file_says_of_its_training_is_in_the_manifest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "My Model.py"
    file.write_text(
        OWN + "OPTIMIZER, ACCUMULATION, TRAIN_BATCH_SIZE, EXAMPLE_GRADIENTS = 'momentum', 2, 4, True\n"
    )
    code, output = run("export", f"{file}:build", "--out", tmp_path / "export")
    assert code == 0, output
    assert "custom gradients" not in caplog.text
    manifest = ModelManifest.from_bytes((tmp_path / "export" / "manifest.json").read_bytes())
    assert (manifest.name, manifest.optimizer.kind, manifest.accumulation) == ("my-model", "momentum", 2)
    assert (manifest.train_batch_size, manifest.example_gradients) == (4, True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "own.py").write_text(OWN)
    some = examples(folder / "some.npz")
    code, output = run(
        "export", f"{folder / 'own.py'}:build", "--out", folder / "export", "--inference", "--examples", some
    )
    assert code == 0, output
    return folder


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (
            np.zeros((3, 5), np.float32),
            np.zeros(3, np.int32),
            "x has the shape (3, 5), the model takes (n, 6)",
        ),
        (np.zeros((0, 6), np.float32), np.zeros(0, np.int32), "x has the shape (0, 6)"),
        (np.zeros((3, 6)), np.zeros(3, np.int32), "use astype"),
        (np.zeros((3, 6), np.float32), np.full(3, 7, np.int32), "not one of 0 to 1"),
        (np.zeros((3, 6), np.float32), np.zeros((3, 2), np.float32), "trained by int32 classes"),
    ],
)
def test_examples_that_are_not_the_models_are_refused(
    finished: Path, tmp_path: Path, x: Any, y: Any, words: str
) -> None:
    np.savez(tmp_path / "some.npz", x=x, y=y)
    code, output = run("evaluate", finished / "export", "--examples", tmp_path / "some.npz")
    assert (code, words in output) == (1, True), output
    if words.startswith("x"):
        arguments = ["--out", tmp_path / "export", "--inference", "--examples", tmp_path / "some.npz"]
        code, output = run("export", f"{finished / 'own.py'}:build", *arguments)
        assert (code, words in output, (tmp_path / "export").exists()) == (1, True, False), output


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model.tflite", lambda data: data[:3000], "beyond the end"),
        ("model.tflite", lambda data: data + b"\0\0\0\0", "another model.tflite"),
        ("weights.bin", lambda data: data[:8], "has 8 bytes"),
        ("weights.bin", lambda data: data[::-1], "another digest"),
        ("inference-float32.tflite", lambda data: b"nothing" * 99, "no TensorFlow Lite flatbuffer"),
        ("manifest.json", lambda data: b"{}", "Field required"),
    ],
)
def test_damaged_files_are_named_and_never_run(
    finished: Path, tmp_path: Path, file: str, change: Any, words: str
) -> None:
    """A runtime would die of some, and the command with it."""
    copy = tmp_path / "export"
    shutil.copytree(finished / "export", copy)
    (copy / file).write_bytes(change((copy / file).read_bytes()))
    commands = [["evaluate", copy, "--examples", finished / "some.npz"]]
    commands += [["inspect", copy]] if not file.startswith("inference") else []
    for command in commands:
        code, output = run(*command)
        assert (code, words in output) == (1, True), output
    (copy / "weights.bin").unlink()
    (copy / "model.tflite").unlink()
    assert "give the directory of an export" in run("inspect", copy)[1]


def test_the_commands_are_part_of_covey_and_import_no_tensorflow() -> None:
    program = (
        "import sys; from aggregator.cli import model_app; "
        "print([c.name for c in model_app.registered_commands], 'tensorflow' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(name in shown for name in ("new", "export", "inspect", "evaluate", "publish", "False"))
