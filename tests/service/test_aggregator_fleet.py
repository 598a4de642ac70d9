"""Devices and keys: enrolment, presence, key files, publishing."""

from __future__ import annotations

import json
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator import main as covey
from aggregator.adapters import keyfiles
from aggregator.adapters.keyfiles import UnusableKeys
from aggregator.adapters.objects import DirectoryStore
from aggregator.adapters.tls import TlsFiles
from aggregator.fleet.authority import EnrolmentRefused
from aggregator.fleet.presence import Change, Presence
from aggregator.operations import OperationRefused
from aggregator.registry.artefacts import MissingArtefact
from aggregator.registry.publishing import PublishRefused, document_of
from aggregator.settings import CampaignRequest
from protocol.broker_address import BrokerAddress, InvalidAddress
from protocol.fields import BlobRef
from protocol.identity import create_request, verify_certificate
from protocol.messages import DeviceStatus
from protocol.plan import MODEL_KIND
from protocol.transfer import describe
from tests.aggregator_bench import START, Bench
from tests.aggregator_devices import model_files


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, devices=2, parameters=50)
    yield bench
    bench.close()


# --- presence

A, B = b"a" * 32, b"b" * 32


def status(session: bytes, *, online: bool) -> DeviceStatus:
    return DeviceStatus(session=session, online=online, models={})


def test_births_and_wills() -> None:
    presence = Presence()
    assert presence.status("d", status(A, online=True), 0) is Change.BORN
    assert presence.online() == {"d"}
    assert presence.status("d", status(A, online=False), 1) is Change.GONE
    assert presence.online() == frozenset()


def test_the_late_will_of_an_old_session_says_nothing() -> None:
    presence = Presence()
    presence.status("d", status(A, online=True), 0)
    presence.status("d", status(B, online=True), 1)
    assert presence.status("d", status(A, online=False), 2) is Change.NOTHING
    assert presence.online() == {"d"}
    assert presence.status("d", status(B, online=False), 3) is Change.GONE


def test_whoever_speaks_is_there_but_not_by_what_it_said_before_its_will() -> None:
    presence = Presence()
    assert presence.heard("d", 0) is Change.BORN
    assert presence.heard("d", 0) is Change.NOTHING
    presence.status("d", status(A, online=False), 1)
    assert presence.heard("d", 2) is Change.NOTHING
    assert presence.online() == frozenset()
    assert presence.heard("d", 4) is Change.BORN
    presence.reset()
    assert presence.online() == frozenset()


# --- enrolment


def test_a_bundle_holds_together_and_names_the_operator(bench: Bench) -> None:
    key = Ed25519PrivateKey.generate()
    bundle = bench.operator.enrol(create_request(key, "barn-1"))
    assert bundle.verify(now=int(START)).device_id == "barn-1"
    operator = bench.authority.operator_key.public_key().public_bytes_raw()
    assert bundle.plan_signers == bundle.model_signers == (operator,)
    assert bundle.fleet == "orchard"
    certificate = x509.load_der_x509_certificate(bundle.certificate)
    assert certificate.public_key() == key.public_key()


def test_the_operator_names_the_device(bench: Bench) -> None:
    bundle = bench.operator.enrol(create_request(Ed25519PrivateKey.generate(), "Any Name!"), name="barn-2")
    assert bundle.device_id == "barn-2"
    assert verify_certificate(bundle.certificate, bundle.ca, now=int(START)).device_id == "barn-2"
    with pytest.raises(EnrolmentRefused, match="--name"):
        bench.operator.enrol(create_request(Ed25519PrivateKey.generate(), "../../etc/passwd"))


def test_a_name_belongs_to_one_key_which_may_renew(bench: Bench) -> None:
    key = Ed25519PrivateKey.generate()
    first = bench.operator.enrol(create_request(key, "barn-1"))
    bench.clock.now += 86_400
    second = bench.operator.enrol(create_request(key, "barn-1"))
    assert first.certificate != second.certificate
    assert len([d for d in bench.operator.devices() if d.device_id == "barn-1"]) == 1
    with pytest.raises(EnrolmentRefused, match="another key"):
        bench.operator.enrol(create_request(Ed25519PrivateKey.generate(), "barn-1"))


@pytest.mark.parametrize("request_", [b"", b"nonsense", b"\x30\x82" + bytes(100)])
def test_what_is_no_request_gets_no_certificate(bench: Bench, request_: bytes) -> None:
    with pytest.raises(EnrolmentRefused, match="signing request"):
        bench.operator.enrol(request_)


def test_excluding_a_device_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(OperationRefused, match="device list"):
        bench.operator.exclude("nobody", "x")


# --- keys


def test_key_files_are_private_and_load_again(tmp_path: Path) -> None:
    covey.init(tmp_path / "state", fleet="orchard")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    for path in (tmp_path / "state").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0 or path.name == "aggregator.json", path
    assert keyfiles.load(tmp_path / "state" / "keys").fleet == "orchard"


def test_keys_are_made_once(tmp_path: Path) -> None:
    covey.init(tmp_path / "state")
    before = (tmp_path / "state" / "keys" / "ca-key.pem").read_bytes()
    with pytest.raises(FileExistsError):
        covey.init(tmp_path / "state")
    assert (tmp_path / "state" / "keys" / "ca-key.pem").read_bytes() == before


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    covey.init(tmp_path / "state")
    keys = tmp_path / "state" / "keys"
    (keys / "ca-key.pem").chmod(0o644)
    with pytest.raises(UnusableKeys, match="chmod 600"):
        keyfiles.load(keys)
    (keys / "ca-key.pem").chmod(0o600)
    (keys / "operator-key.pem").write_text("garbage")
    with pytest.raises(UnusableKeys, match="backup"):
        keyfiles.load(keys)
    (keys / "operator-key.pem").unlink()
    with pytest.raises(UnusableKeys, match="init"):
        keyfiles.load(keys)


def test_the_key_of_the_ca_may_be_kept_offline(tmp_path: Path) -> None:
    """An aggregator that has it can surround a device with puppets, whatever the protocol checks."""
    state = tmp_path / "state"
    covey.init(state)
    request = create_request(Ed25519PrivateKey.generate(), "barn-1")
    (state / "keys" / "ca-key.pem").rename(tmp_path / "vault.pem")
    with covey.open_operator(state) as operator:
        assert operator.authority.ca_key is None
        with pytest.raises(EnrolmentRefused, match="put it back"):
            operator.enrol(request)
    (tmp_path / "vault.pem").rename(state / "keys" / "ca-key.pem")
    assert covey.enrol(state, request).verify(now=int(time.time())).device_id == "barn-1"


def test_the_service_does_not_hold_the_key_of_the_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[object] = []

    class Spy(covey.Service):
        def __init__(self, *parts: Any, **named: Any) -> None:
            super().__init__(*parts, **named)
            held.append(parts[2].ca_key)

    monkeypatch.setattr(covey, "Service", Spy)
    covey.init(tmp_path / "state", broker="mqtt://127.0.0.1:1")
    stop = threading.Event()
    stop.set()
    covey.run(tmp_path / "state", stop, listen="127.0.0.1:0")
    assert held == [None]


def test_the_service_says_once_that_it_has_loaded(tmp_path: Path) -> None:
    covey.init(tmp_path / "state", broker="mqtt://127.0.0.1:1")
    stop, seen = threading.Event(), []

    def loaded() -> None:
        seen.append(covey.is_running(tmp_path / "state"))
        stop.set()

    covey.run(tmp_path / "state", stop, listen="127.0.0.1:0", loaded=loaded)
    assert seen == [True]


def test_a_directory_without_an_aggregator_says_what_to_do(tmp_path: Path) -> None:
    for attempt in (
        lambda: covey.devices(tmp_path),
        lambda: covey.is_running(tmp_path / "nowhere"),
        lambda: covey.run(tmp_path, threading.Event()),
    ):
        with pytest.raises(covey.NotInitialised, match="covey aggregator init"):
            attempt()
    (tmp_path / "aggregator.json").write_text(json.dumps({"fleet": "x", "surprise": 1}))
    with pytest.raises(covey.NotInitialised, match="cannot be used"):
        covey.devices(tmp_path)


@pytest.mark.parametrize("fleet", ["", "Barn", "a/b", "x" * 64])
def test_a_fleet_needs_a_usable_name(tmp_path: Path, fleet: str) -> None:
    with pytest.raises(ValueError, match="lower-case"):
        covey.init(tmp_path / "state", fleet=fleet)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:1883",
        "http://localhost",
        "mqtt://",
        "mqtt://u:p@localhost",
        "mqtt://h:99999",
        "mqtt://barn",
    ],
)
def test_addresses_that_cannot_be_used(url: str) -> None:
    with pytest.raises(InvalidAddress):
        BrokerAddress.parse(url)


def test_addresses() -> None:
    assert BrokerAddress.parse("mqtt://127.0.0.1") == BrokerAddress("127.0.0.1", 1883, False)
    assert BrokerAddress.parse("mqtts://barn.local") == BrokerAddress("barn.local", 8883, True)
    assert str(BrokerAddress.parse("mqtt://[::1]:99")) == "mqtt://[::1]:99"
    assert BrokerAddress.parse("mqtt://barn", insecure=True).port == 1883
    with pytest.raises(InvalidAddress, match="TLS files"):
        TlsFiles(ca=Path("/nonexistent.pem")).context()


# --- models


def test_versions_are_numbered_signed_and_readable(bench: Bench) -> None:
    version = bench.operator.publish(*model_files(50, seed=1))
    assert version.version == 2
    signers = next(iter(bench.devices.values())).bundle.model_keys()
    payload = document_of(version).open(MODEL_KIND, signers)
    model = bench.operator.model("toy")
    assert payload == model.manifest.to_bytes()
    assert (model.graph, model.weights) == model_files(50, seed=1)[1:]
    assert bench.operator.model("toy", 1).manifest.version == 1
    assert [v.version for v in bench.operator.versions("toy")] == [1, 2]


def test_files_that_do_not_belong_together_are_not_published(bench: Bench) -> None:
    manifest, graph, weights = model_files(50)
    for files in (
        (b"{}", graph, weights),
        (manifest, graph + b"x", weights),
        (manifest, graph, weights[:-1]),
        (manifest, graph, bytes(len(weights))),
    ):
        with pytest.raises(PublishRefused, match="export the model again"):
            bench.operator.publish(*files)
    assert len(bench.operator.versions()) == 1


def test_nothing_is_published_while_a_round_of_that_model_runs(bench: Bench) -> None:
    campaign = bench.start(
        CampaignRequest("toy", rounds=1, cohort=2, minimum=2, min_survivors=2, gather_seconds=0)
    )
    bench.run_until(lambda: bench.phase() == "ShareKeys")
    with pytest.raises(PublishRefused, match="is running"):
        bench.operator.publish(*model_files(50, seed=1))
    assert bench.operator.publish(*model_files(50, name="other")).version == 1
    bench.finish(campaign)
    assert bench.operator.publish(*model_files(50, seed=1)).version == 3


def test_rounds_need_a_model_and_settings_that_work(bench: Bench) -> None:
    with pytest.raises(OperationRefused, match="covey model publish"):
        bench.start(CampaignRequest("nothing"))
    with pytest.raises(OperationRefused, match="bits"):
        bench.start(CampaignRequest("toy", cohort=1000, bits=8))
    with pytest.raises(OperationRefused, match="minimum_survivors <= minimum"):
        bench.start(CampaignRequest("toy", cohort=5, minimum=6))
    with pytest.raises(OperationRefused, match="model list"):
        bench.operator.model("toy", 9)
    with pytest.raises(OperationRefused, match="campaign list"):
        bench.operator.campaign("f" * 32)
    assert bench.operator.campaigns() == ()


def test_artefacts_are_whole_or_missing(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    blob = store.put(b"content")
    assert store.put(b"content") == blob
    assert store.read(blob) == b"content"
    assert store.read_range(blob, 3, 2) == b"te"
    with pytest.raises(MissingArtefact):
        store.read(describe(b"another"))
    with pytest.raises(MissingArtefact, match="size"):
        store.read_range(BlobRef(sha256=blob.sha256, size=99), 0, 1)
    (tmp_path / "blobs" / blob.sha256).write_bytes(b"CONTENT")
    with pytest.raises(MissingArtefact, match="damaged"):
        store.read(blob)
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [blob.sha256]
