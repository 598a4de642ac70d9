"""Local inference: a Python call, a Unix socket, and the command line; versions change underneath."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_client.adapters.last_good import last_good
from edge_client.adapters.personal import PersonalFiles
from edge_client.adapters.predict_socket import MAX_CONNECTIONS, PredictSocket
from edge_client.adapters.serving import PredictionServers
from edge_client.adapters.store import DeviceStore
from edge_client.adapters.tflite import TfliteTrainer
from edge_client.adapters.uses import VersionUses
from edge_client.adapters.worker import tflite_trainer
from edge_client.configuration import EdgeConfiguration, InvalidConfiguration, PredictSettings
from edge_client.durable import SaveVersion, StoreChunk, VersionStatus
from edge_client.local import Predictor, SocketPredictor
from edge_client.main import main
from edge_client.personalisation import Personal, PersonalRecord
from edge_client.prediction import (
    MAX_EXAMPLES,
    MAX_REQUEST_BYTES,
    NoModel,
    Prediction,
    PredictionFailed,
    PredictionService,
)
from edge_client.training import LocalTrainer, ModelRejected
from models import zoo
from models.manifest import ModelManifest
from models.weights import encode_weights
from protocol.identity import SignedDocument
from protocol.plan import MODEL_KIND
from protocol.transfer import chunks
from tests.edge_broker import Fleet, wait_for
from tests.edge_fleet import OPERATOR, PERMISSIVE
from tests.unit.test_edge_personal import person

WATCH = zoo.load("watch")
WINDOW = np.asarray(person().x[0])
SHAPE = WATCH.manifest.input.shape


def version(number: int) -> ModelManifest:
    """A version of the watch model with weights of its own, so that its answers are, too."""
    return WATCH.manifest.model_copy(update={"version": number, "weights": _blob(number)})


def _weights(number: int) -> bytes:
    return encode_weights((WATCH.weights * np.float32(1 - number / 10)).astype(np.float32))


def _blob(number: int) -> Any:
    from models.manifest import describe

    return describe(_weights(number))


def serve(store: DeviceStore, number: int) -> None:
    """Makes a version the one that is served, as the daemon does."""
    manifest = version(number)
    for blob, data in ((manifest.graph, WATCH.graph), (manifest.weights, _weights(number))):
        for chunk, body in chunks(blob, data, range(10)):
            store.apply([StoreChunk(blob, chunk.index, body)])
        assert store.blobs.find(blob).complete
    document = SignedDocument.create(OPERATOR, MODEL_KIND, manifest.to_bytes())
    store.apply([SaveVersion(document, manifest, VersionStatus.GOOD)])


def expected(number: int) -> list[float]:
    weights = (WATCH.weights * np.float32(1 - number / 10)).astype(np.float32)
    row = tflite_trainer(WATCH.manifest, WATCH.graph).predict(weights, WINDOW[np.newaxis])[0]
    return [round(float(value), 6) for value in row]


def probabilities(found: Prediction) -> list[float]:
    return list(found.predictions[0]["probabilities"].values())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return Fleet(tmp_path).enrolled("barn-1", PERMISSIVE)


# --- the Python call -------------------------------------------------------------------------------------


def test_the_last_good_version_answers_and_changes_underneath(state: Path) -> None:
    predictor = Predictor(state)
    with pytest.raises(NoModel):
        predictor.predict(WINDOW)
    with DeviceStore.open(state) as store:
        for number in (1, 2, 3):
            serve(store, number)
            found = predictor.predict(WINDOW, "watch")
            assert (found.version, probabilities(found)) == (number, expected(number))
        # A way back: the version that was served last counts, and not the highest number.
        serve(store, 2)
        assert predictor.predict(WINDOW).version == 2 == last_good(state).manifest.version
        several = predictor.predict(np.stack([WINDOW] * 3).tolist())  # type: ignore[arg-type]
        assert len(several.predictions) == 3 and several.predictions[0] == several.predictions[2]
    for bad in (WINDOW[:50], np.zeros((0, *SHAPE)), np.full(SHAPE, np.nan)):
        with pytest.raises(PredictionFailed) as failed:
            predictor.predict(bad)
        assert failed.value.code == "bad-input"
    # Its own process may ask as much as it likes; a limit is for what others ask.
    assert len(predictor.predict(np.zeros((MAX_EXAMPLES + 1, *SHAPE))).predictions) == MAX_EXAMPLES + 1
    with pytest.raises(NoModel):
        predictor.predict(WINDOW, "digits")
    assert predictor.predict(WINDOW).version == 2
    predictor.close()


def test_a_personal_model_answers_as_soon_as_it_is_kept_and_until_it_is_dropped(state: Path) -> None:
    predictor, files = Predictor(state), PersonalFiles(state / "personal")
    with DeviceStore.open(state) as store:
        serve(store, 1)
    assert not predictor.predict(WINDOW).personal
    record = PersonalRecord(
        model="watch",
        version=1,
        manifest_sha256=version(1).sha256(),
        epochs=1,
        trained_on=10,
        held_out=10,
        global_accuracy=0.5,
        global_loss=1.0,
        personal_accuracy=0.6,
        personal_loss=0.9,
        kept=True,
    )
    with files.writing():
        files.save(Personal(record, np.zeros(WATCH.manifest.parameter_count, np.float32)))
    found = predictor.predict(WINDOW)
    assert found.personal and len(set(probabilities(found))) == 1
    with files.writing():
        files.drop()
    assert probabilities(predictor.predict(WINDOW)) == expected(1)


class Picky:
    """Trainers of versions of which some do not load, and others do not run."""

    def __init__(self) -> None:
        self.unloadable: set[int] = set()
        self.failing: set[int] = set()

    def __call__(self, manifest: ModelManifest, graph: bytes) -> LocalTrainer:
        if manifest.version in self.unloadable:
            raise ModelRejected("the runtime cannot load the model")
        if manifest.version in self.failing:
            return Failing(manifest, graph)
        return tflite_trainer(manifest, graph)


class Failing(TfliteTrainer):
    def predict(self, *_: object) -> NDArray[np.float32]:
        raise ModelRejected("the runtime cannot run infer")


def test_a_version_that_does_not_run_gives_way_to_the_one_before(state: Path) -> None:
    picky = Picky()
    predictor = Predictor(state, trainer=picky)
    with DeviceStore.open(state) as store:
        serve(store, 1)
        assert predictor.predict(WINDOW).version == 1
        picky.unloadable.add(2)
        serve(store, 2)
        assert [predictor.predict(WINDOW).version for _ in range(3)] == [1, 1, 1]
        picky.failing.add(3)
        serve(store, 3)
        assert [predictor.predict(WINDOW).version for _ in range(3)] == [1, 1, 1]
        # The daemon is told which, and why.
        told = {failure.sha256: failure.fault.detail for failure in VersionUses(state).found()}
        assert told.keys() == {version(2).sha256(), version(3).sha256()}
        serve(store, 4)
        assert predictor.predict(WINDOW).version == 4
    picky.failing |= {1, 4}
    broken = Predictor(state, trainer=picky)
    for _ in range(2):
        with pytest.raises(PredictionFailed) as failed:
            broken.predict(WINDOW)
        assert failed.value.code == "no-model"


def test_a_version_whose_files_are_damaged_leaves_the_one_before(state: Path) -> None:
    predictor = Predictor(state)
    with DeviceStore.open(state) as store:
        serve(store, 1)
        assert predictor.predict(WINDOW).version == 1
        serve(store, 2)
        rotten = state / "blobs" / version(2).weights.sha256
        rotten.write_bytes(bytes(rotten.stat().st_size))
        assert [predictor.predict(WINDOW).version for _ in range(3)] == [1, 1, 1]
        serve(store, 3)
        assert predictor.predict(WINDOW).version == 3


def test_no_request_is_lost_while_versions_change(state: Path) -> None:
    """Four threads ask all the time; every answer is whole, and of a version that was served then."""
    answers = {number: expected(number) for number in range(1, 7)}
    predictor, stopping = Predictor(state), threading.Event()
    troubles: list[object] = []
    seen: set[int] = set()
    with DeviceStore.open(state) as store:
        serve(store, 1)
        served = [1]

        def ask() -> None:
            while not stopping.is_set():
                earliest = served[-1]
                try:
                    found = predictor.predict(WINDOW)
                except Exception as error:
                    troubles.append(error)
                    return
                seen.add(found.version)
                if found.version < earliest or probabilities(found) != answers[found.version]:
                    troubles.append(found)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(2, 7):
            serve(store, number)
            served.append(number)
            wait_for(lambda: number in seen or troubles)  # noqa: B023
        stopping.set()
        for thread in threads:
            thread.join(60)
    assert troubles == [] and seen >= {2, 3, 4, 5, 6}


# --- requests --------------------------------------------------------------------------------------------


def service(state: Path) -> PredictionService:
    with DeviceStore.open(state) as store:
        serve(store, 1)
    return PredictionService(Predictor(state, at_most=MAX_EXAMPLES).predict)


def test_requests_in_lists_and_in_bytes(state: Path) -> None:
    answering = service(state)
    flat = base64.b64encode(np.stack([WINDOW, WINDOW]).astype("<f4").tobytes()).decode()
    several = [WINDOW.tolist(), WINDOW.tolist()]
    for inputs, count in ((WINDOW.tolist(), 1), (several, 2), (flat, 2)):
        request = json.dumps({"id": "7", "model": "watch", "inputs": inputs}).encode()
        answer = json.loads(answering.answer(request))
        assert answer["id"] == "7" and answer["version"] == 1 and len(answer["predictions"]) == count
        assert list(answer["predictions"][-1]["probabilities"].values()) == pytest.approx(
            expected(1), abs=1e-5
        )


HOSTILE: list[tuple[bytes, str]] = [
    (b"", "bad-request"),
    (b"\xff\xfe", "bad-request"),
    (b"null", "bad-request"),
    (b"[" * 500_000, "bad-request"),
    (b'{"inputs": ' + b"[" * 400 + b"1" + b"]" * 400 + b"}", "bad-request"),
    (b'{"inputs": []}', "bad-request"),
    (b'{"inputs": "AAA"}', "bad-request"),
    (b'{"inputs": "AAAA"}', "bad-request"),
    (b'{"inputs": "AACAPw==", "shape": [2]}', "bad-request"),
    (b'{"inputs": "AACAPw==", "shape": [-1]}', "bad-request"),
    (b'{"inputs": "AACAPw==", "shape": [1, 1]}', "bad-input"),
    (b'{"inputs": [1], "model": "../x"}', "bad-request"),
    (b'{"inputs": [1], "evil": 1}', "bad-request"),
    (b'{"inputs": [1], "id": "' + b"x" * 100 + b'"}', "bad-request"),
    (b'{"inputs": [1, [2]]}', "bad-input"),
    (b'{"inputs": ["1"]}', "bad-input"),
    (b'{"inputs": [null]}', "bad-input"),
    (b'{"inputs": [{"a": 1}]}', "bad-input"),
    (b'{"inputs": [true]}', "bad-input"),
    (b'{"inputs": [' + b"9" * 400 + b"]}", "bad-input"),
    (b'{"inputs": [1, 2, 3]}', "bad-input"),
    (json.dumps({"inputs": np.full(SHAPE, 1e300).tolist()}).encode(), "bad-input"),
    (json.dumps({"inputs": np.full(SHAPE, np.nan).tolist()}).encode(), "bad-input"),
    (b'{"inputs": [1], "model": "digits"}', "no-model"),
    (b"x" * (MAX_REQUEST_BYTES + 1), "too-large"),
]


def test_whatever_comes_in_something_typed_goes_out(state: Path) -> None:
    answering = service(state)
    for request, code in HOSTILE:
        answer = json.loads(answering.answer(request))
        assert answer["error"]["code"] == code, (request[:80], answer)
        assert len(answer["error"]["message"]) <= 500
    many = base64.b64encode(bytes(4 * 257 * 600)).decode()
    assert json.loads(answering.answer(json.dumps({"inputs": many}).encode()))["error"]["code"] == "too-large"
    good = json.dumps({"inputs": WINDOW.tolist()}).encode()
    assert json.loads(answering.answer(good))["version"] == 1

    def broken(*_: object) -> Prediction:
        raise RuntimeError("x = [1, 2, 3]")

    answer = json.loads(PredictionService(broken).answer(good))
    assert answer["error"] == {"code": "unavailable", "message": "RuntimeError"}


def test_a_request_takes_no_memory_out_of_proportion(state: Path) -> None:
    """NumPy would give every text of a list the room of the longest one."""
    answering = service(state)
    request = json.dumps({"inputs": ["x" * 50_000, *["y"] * 1_000]}).encode()
    answering.answer(request)
    tracemalloc.start()
    try:
        answer = json.loads(answering.answer(request))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer["error"]["code"] == "bad-input"
    assert peak < 50 * len(request), peak


# --- the socket ------------------------------------------------------------------------------------------


@contextmanager
def listening(path: Path, answer: Callable[[bytes], bytes], **more: Any) -> Iterator[PredictSocket]:
    server = PredictSocket(path, answer, **more)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        peer.connect(str(path))
        yield peer


def echo(request: bytes) -> bytes:
    return b"you said " + request


def lines(peer: socket.socket, count: int) -> list[bytes]:
    with peer.makefile("rb") as file:
        return [file.readline() for _ in range(count)]


def test_a_program_asks_through_the_socket(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "predict.sock"
    with DeviceStore.open(state) as store:
        serve(store, 1)
    servers = PredictionServers(PredictSettings(socket=str(path)), state)
    servers.start()
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
        with SocketPredictor(path) as predictor:
            assert probabilities(predictor.predict(WINDOW, "watch")) == pytest.approx(expected(1), abs=1e-5)
            with pytest.raises(PredictionFailed) as failed:
                predictor.predict(WINDOW[:50])
            assert failed.value.code == "bad-input"
            with pytest.raises(PredictionFailed) as failed:
                predictor.predict(np.zeros(300_000))
            assert failed.value.code == "too-large"
            with DeviceStore.open(state) as store:
                serve(store, 2)
            assert predictor.predict(WINDOW).version == 2
    finally:
        servers.stop()
    assert not path.exists()
    with pytest.raises(PredictionFailed) as failed:
        SocketPredictor(path)
    assert failed.value.code == "unavailable"


def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path, echo), connected(path) as peer:
        peer.sendall(b"".join(b"%d\n" % i for i in range(500)) + b"\n\nlast")
        assert lines(peer, 500) == [b"you said %d\n" % i for i in range(500)]
        peer.sendall(b" one\n")
        peer.shutdown(socket.SHUT_WR)
        assert peer.makefile("rb").read() == b"you said last one\n"


def test_a_program_that_takes_no_answers_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path, lambda request: request * 10_000), connected(path) as greedy:
        greedy.settimeout(0.5)
        with pytest.raises(TimeoutError):
            for _ in range(1000):
                greedy.sendall(b"0123456789\n" * 1000)
        with connected(path) as other:
            other.sendall(b"x\n")
            assert len(lines(other, 1)[0]) == 10_001
        greedy.settimeout(10)
        assert lines(greedy, 2) == [b"0123456789" * 10_000 + b"\n"] * 2


def test_what_is_too_long_or_too_much_is_refused_and_the_server_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    monkeypatch.setattr("edge_client.adapters.predict_socket.UNFINISHED_SECONDS", 0.5)
    with listening(path, echo):
        with connected(path) as peer:
            peer.sendall(b"x" * (MAX_REQUEST_BYTES + 100))
            assert json.loads(lines(peer, 1)[0])["error"]["code"] == "too-large"
            assert peer.recv(1) == b""
        crowd = [socket.socket(socket.AF_UNIX) for _ in range(MAX_CONNECTIONS)]
        for each in crowd:
            each.connect(str(path))
        crowd[0].sendall(b"half a line")
        with connected(path) as peer:
            assert json.loads(lines(peer, 1)[0])["error"]["code"] == "busy"
        # Whoever has nothing under way may stay; who does not go on is let go.
        crowd[0].settimeout(10)
        assert crowd[0].recv(1) == b""
        with connected(path) as peer:
            peer.sendall(b"there\n")
            assert lines(peer, 1) == [b"you said there\n"]
        for each in crowd[1:3]:
            each.sendall(b"a\n")
            assert lines(each, 1) == [b"you said a\n"]
        for each in crowd:
            each.close()


def test_the_socket_takes_only_a_place_that_is_free(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("a file")
    with pytest.raises(InvalidConfiguration, match="no socket"):
        PredictSocket(path, echo).start()
    path.unlink()
    with listening(path, echo), pytest.raises(InvalidConfiguration, match="another process"):
        PredictSocket(path, echo).start()
    # What a killed process left behind is replaced.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with listening(path, echo), connected(path) as peer:
        peer.sendall(b"a\n")
        assert lines(peer, 1) == [b"you said a\n"]
    with pytest.raises(InvalidConfiguration, match="no group"):
        PredictSocket(path, echo, group="no-such-group").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_only_members_of_the_group_may_ask(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:3]):
        if directory != Path("/tmp"):  # noqa: S108
            directory.chmod(0o755)
    path = tmp_path / "s"

    def asks(group: int) -> bool:
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setgid(group)
            os.setuid(12345)
            with socket.socket(socket.AF_UNIX) as peer:
                os._exit(0 if peer.connect_ex(str(path)) == 0 else 1)
        return os.waitpid(child, 0)[1] == 0

    with listening(path, echo, group="daemon"):
        assert path.stat().st_gid == 1
        assert asks(1) and not asks(54321)


# --- settings and the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[predict]\nsockets = '/run/x'", "predict.sockets"),
        ("[predict]\nsocket = 'run/x'", "predict.socket"),
        ("[predict.mqtt]\nbroker = 'mqtt://127.0.0.1'", "predict.mqtt.topic"),
        ("[predict.mqtt]\nbroker = 'mqtt://127.0.0.1'\ntopic = 'a/#'", "predict.mqtt.topic"),
        ("[predict.mqtt]\nbroker = 'mqtt://hub.example'\ntopic = 'a'", "unencrypted"),
    ],
)
def test_settings_that_cannot_be(text: str, match: str) -> None:
    with pytest.raises(InvalidConfiguration, match=match):
        EdgeConfiguration.from_bytes(text.encode())


def test_the_effective_settings_are_shown_as_a_file_that_means_the_same() -> None:
    text = (
        "[predict]\nsocket = '/run/covey/predict.sock'\n"
        "[predict.mqtt]\nbroker = 'mqtt://127.0.0.1'\ntopic = 'a'\nusername = 'me'\n"
    )
    configuration = EdgeConfiguration.from_bytes(text.encode())
    assert EdgeConfiguration.from_bytes(configuration.to_toml().encode()) == configuration
    assert "[predict" not in EdgeConfiguration().to_toml()


def test_the_command_line_says_how_long_an_answer_takes(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DeviceStore.open(state) as store:
        serve(store, 1)
    np.save(tmp_path / "x.npy", WINDOW)
    path = tmp_path / "s"
    servers = PredictionServers(PredictSettings(socket=str(path)), state)
    servers.start()
    try:
        for more in ([], ["--socket", str(path)]):
            argv = ["predict", "--state", str(state), "--input", str(tmp_path / "x.npy"), *more]
            assert main([*argv, "--repeat", "20", "--json"]) == 0
            answer = json.loads(capsys.readouterr().out)
            taken = answer["latency_ms"]
            assert taken["runs"] == 20
            assert 0 < taken["p50"] <= taken["p95"] <= taken["p99"] <= taken["longest"]
            assert answer["version"] == 1 and len(answer["predictions"]) == 1
            assert main([*argv, "--repeat", "5"]) == 0
            assert "latency over 5 runs" in capsys.readouterr().out
            assert main(argv) == 0 and "latency" not in capsys.readouterr().out
    finally:
        servers.stop()
    assert main([*argv, "--repeat", "0"]) == 2
    assert main(argv) == 1 and "covey-edge: " in capsys.readouterr().err
