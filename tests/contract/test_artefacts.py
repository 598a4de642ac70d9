"""What `aggregator.registry.artefacts` promises, for a directory and for a real S3 server."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aggregator import main as covey
from aggregator.adapters.objects import DirectoryStore
from aggregator.adapters.objects_s3 import S3Store, check_address
from aggregator.registry.artefacts import ArtefactStore, MissingArtefact, StoreUnavailable
from aggregator.service import STORE_PAUSE_SECONDS
from deploy.broker import free_port
from protocol.fields import BlobRef
from tests.aggregator_bench import Bench
from tests.aggregator_devices import model_files
from tests.toy_rounds import check_completed, request

DATA = bytes(range(256)) * 500
BLOB = BlobRef.of(DATA)


@dataclass
class S3Server:
    """A real server process on the loopback interface; it forgets everything when it ends."""

    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=2).close()  # noqa: S310
                return
            except OSError:
                assert time.monotonic() < end, "the S3 server does not start"
                time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def put(self, key: str, data: bytes = b"") -> None:
        """Writes an object, or makes a bucket, past the store."""
        message = urllib.request.Request(f"{self.url}/{key}", data=data or None, method="PUT")  # noqa: S310
        message.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4")
        urllib.request.urlopen(message, timeout=120).close()  # noqa: S310


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    server = S3Server(free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys for the server, and none of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@dataclass
class Place:
    """Where a kind of store keeps things, so that a test can damage them."""

    open: Callable[[], Any]
    write: Callable[[BlobRef, bytes], None]


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "directory":
        path = tmp_path / "registry"
        return Place(
            lambda: DirectoryStore(path), lambda blob, data: _overwrite(path / "blobs" / blob.sha256, data)
        )
    server: S3Server = request.getfixturevalue("s3")
    bucket = f"models-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    server.put(bucket)
    opened = iter(range(100))

    def open_it() -> S3Store:
        # A cache of its own, as another machine has.
        return S3Store(f"s3://{bucket}/covey", tmp_path / f"cache{next(opened)}", endpoint=server.url)

    return Place(open_it, lambda blob, data: server.put(f"{bucket}/covey/blobs/{blob.sha256}", data))


def _overwrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def test_what_is_stored_is_read_by_others(place: Place) -> None:
    writer: ArtefactStore = place.open()
    assert writer.put(DATA) == BLOB
    assert writer.put(DATA) == BLOB
    reader: ArtefactStore = place.open()
    assert reader.read_range(BLOB, 1000, 10) == DATA[1000:1010]
    assert reader.read_range(BLOB, len(DATA) - 5, 5) == DATA[-5:]
    assert reader.read(BLOB) == DATA


def test_what_is_not_there_is_missing(place: Place) -> None:
    store: ArtefactStore = place.open()
    with pytest.raises(MissingArtefact):
        store.read(BlobRef.of(b"never stored"))
    with pytest.raises(MissingArtefact):
        store.read_range(BlobRef.of(b"never stored"), 0, 1)


def test_what_is_removed_is_missing_and_can_be_stored_again(place: Place) -> None:
    store: ArtefactStore = place.open()
    store.remove(BLOB)
    assert store.held() == frozenset()
    store.put(DATA)
    other = store.put(DATA[1:])
    assert store.held() == place.open().held() == {BLOB.sha256, other.sha256}
    store.remove(BLOB)
    for each in (store, place.open()):
        with pytest.raises(MissingArtefact):
            each.read(BLOB)
        assert each.held() == {other.sha256}
    store.put(DATA)
    assert place.open().read(BLOB) == DATA


@pytest.mark.parametrize("damage", [DATA[:-1], DATA[:-1] + b"!", b"x"])
def test_what_is_damaged_is_not_read(place: Place, damage: bytes) -> None:
    place.open().put(DATA)
    place.write(BLOB, damage)
    with pytest.raises(MissingArtefact):
        place.open().read(BLOB)


def test_an_operator_publishes_to_a_bucket_and_a_round_improves_what_is_there(
    s3: S3Server, tmp_path: Path
) -> None:
    s3.put("fleet")
    state = tmp_path / "state"
    covey.init(state, objects="s3://fleet/orchard", objects_endpoint=s3.url)
    assert "hunter2" not in (state / "aggregator.json").read_text()
    with covey.open_operator(state) as operator:
        version = operator.publish(*model_files(1000))
        assert operator.model("toy").weights == model_files(1000)[2]
    other = S3Store("s3://fleet/orchard", tmp_path / "other", endpoint=s3.url)
    blob = BlobRef.of(model_files(1000)[2])
    assert other.read(blob) == model_files(1000)[2]
    assert version.version == 1


@contextmanager
def bench_with(store: ArtefactStore, path: Path) -> Iterator[Bench]:
    bench = Bench(path, devices=4, store=store)
    yield bench
    bench.close()


def test_a_round_waits_for_a_bucket_that_is_away_and_everything_else_goes_on(tmp_path: Path) -> None:
    server = S3Server(free_port())
    server.start()
    server.put("fleet")
    store = S3Store("s3://fleet", tmp_path / "cache", endpoint=server.url)
    with bench_with(store, tmp_path) as bench:
        campaign = bench.start(request(cohort=4))
        bench.run_until(lambda: bench.phase() == "Unmasking")
        server.stop()
        for _ in range(100):
            bench.step()
        (view,) = bench.rounds()
        assert view.record.status == "running"
        assert "the object store cannot be used" in bench.service.trouble
        assert bench.transport.resets == 0
        bench.hang_up("device-3")  # other messages are served
        bench.step()
        assert not {d.device_id: d for d in bench.operator.devices()}["device-3"].online
        server.start()
        server.put("fleet")
        for _ in range(round(10 * STORE_PAUSE_SECONDS)):
            bench.step()
        (view,) = bench.finish(campaign)
        check_completed(bench, view)
        assert bench.service.trouble == ""
    server.stop()


def test_an_unreachable_store_says_so_without_its_keys(tmp_path: Path) -> None:
    store = S3Store("s3://fleet", tmp_path, endpoint="http://127.0.0.1:1")
    for ask in (lambda: store.put(DATA), lambda: store.read(BLOB), lambda: store.read_range(BLOB, 0, 1)):
        with pytest.raises(StoreUnavailable, match="cannot be used") as caught:
            ask()
        assert "hunter2" not in str(caught.value)


def test_a_bucket_that_does_not_exist_is_no_missing_artefact(s3: S3Server, tmp_path: Path) -> None:
    store = S3Store("s3://no-such-bucket", tmp_path, endpoint=s3.url)
    for ask in (lambda: store.put(DATA), lambda: store.read(BLOB)):
        with pytest.raises(StoreUnavailable, match="bucket no-such-bucket does not exist"):
            ask()


def test_copies_are_bounded_and_fetched_again(tmp_path: Path) -> None:
    cache = DirectoryStore(tmp_path)
    blobs = [cache.put(bytes([number]) * 100) for number in range(5)]
    for number, blob in enumerate(blobs):
        os.utime(tmp_path / "blobs" / blob.sha256, (number, number))
    cache.shrink(250)
    assert [(tmp_path / "blobs" / blob.sha256).exists() for blob in blobs] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    "address",
    [
        "s3://key:hunter2@bucket/x",
        "http://bucket",
        "s3://",
        "s3://b/../../etc",
        "s3://Bucket",
        "s3://bucket?x=1",
    ],
)
def test_addresses_that_are_none_are_not_quoted(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET") as caught:
        check_address(address)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="s3://BUCKET"):
        covey.init(tmp_path / "state", objects=address)
    assert not (tmp_path / "state").exists()
