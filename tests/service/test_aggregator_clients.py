"""The client as the aggregator sees it: what is published and refused, who gets it, and what is shown."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator.access.roles import Role
from aggregator.assigning import Promotion
from aggregator.client import ApiError, Client
from aggregator.evaluations import EvaluationRequest
from aggregator.refusals import NoSuch, OperationRefused
from aggregator.registry.publishing import PublishRefused
from aggregator.rollout_operations import RolloutRequest
from aggregator.settings import CampaignRequest
from protocol import client_bundle, topics
from protocol.client_bundle import UnusableBundle, described
from protocol.client_release import CLIENT, RELEASE_KIND, ClientRelease, version_number
from protocol.codec import decode_to_device, encode
from protocol.identity import SignedDocument, key_id
from protocol.messages import (
    BlobChunk,
    BlobNeed,
    DeviceStatus,
    ModelAnnouncement,
    VersionFailure,
)
from protocol.version_assignment import VersionAssignment
from tests.aggregator_bench import Bench
from tests.api_bench import Api, api, csr
from tests.client_bundles import TARGET, bundle
from tests.console_pages import page, sign_in
from tests.service.test_aggregator_cli import run as run

TRIXIE = "trixie-arm64"
GOOD = bundle("0.2.0")
NUMBER = version_number("0.2.0")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Api]:
    with api(tmp_path) as found:
        yield found


def refused(client: Client, *bundles: bytes) -> str:
    with pytest.raises(ApiError) as error:
        client.publish_client(bundles)
    assert error.value.code == "publish-refused"
    return str(error.value)


# --- publishing


def test_a_release_has_a_bundle_for_each_system_and_stays_as_it_is(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        found = client.publish_client([bundle("0.2.0", target=TRIXIE), GOOD])
        assert (found.version, found.number, found.stage) == ("0.2.0", NUMBER, "candidate")
        assert [each.target for each in found.bundles] == [TARGET, TRIXIE]
        assert client.client_releases() == (found,)
        assert "is published already" in refused(client, GOOD)
        document = client.manifest(CLIENT, NUMBER)
        key = bench.context.operator.authority.operator_key.public_key()
        release = ClientRelease.from_bytes(document.open(RELEASE_KIND, {key_id(key): key}))
        assert release.version == "0.2.0" and release.bundle_for(TARGET) == described(io.BytesIO(GOOD))[1]
        # It is no model, wherever models are looked for.
        assert client.versions() == ()
        with pytest.raises(ApiError, match="no model"):
            client.graph(CLIENT, NUMBER)
    operator = bench.context.operator
    with pytest.raises(NoSuch, match="no model"):
        operator.start_rounds(CampaignRequest(CLIENT, rounds=1, cohort=2))
    with pytest.raises(NoSuch, match="no model"):
        operator.start_evaluation(EvaluationRequest(CLIENT))
    with bench.client(Role.VIEWER) as viewer, pytest.raises(ApiError) as error:
        viewer.publish_client([bundle("0.3.0")])
    assert error.value.code == "forbidden"


def test_what_is_no_whole_client_is_not_published(bench: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with bench.client(Role.OPERATOR) as client:
        for content, said in (
            (b"no archive", "damaged"),
            (GOOD[:-40], "damaged"),
            (GOOD[: len(GOOD) // 2], "damaged"),
            (renamed(GOOD, "bundle.json", "other.json"), "no client"),
            (renamed(GOOD, "site/edge.py", "site/other.py"), "site/edge.py in the bundle is damaged"),
            (renamed(GOOD, "site/edge.py", "../edge.py"), "no plain file"),
            (bundle("0.2"), "no client"),
            (bundle("0.0.0"), "no client"),
        ):
            assert said in refused(client, content), said
        assert "of 2 versions: 0.2.0, 0.3.0" in refused(client, GOOD, bundle("0.3.0", target=TRIXIE))
        assert "same system" in refused(client, GOOD, GOOD)
        with monkeypatch.context() as patched:
            patched.setattr(client_bundle, "MAX_BUNDLE_BYTES", 100)
            assert "larger than 100 bytes" in refused(client, GOOD)
        with monkeypatch.context() as patched:
            patched.setattr(client_bundle, "MAX_UNPACKED", 100)
            assert "unpacks to more" in refused(client, GOOD)
        assert client.client_releases() == ()


def renamed(content: bytes, name: str, other: str) -> bytes:
    """The bundle with one file under another name."""
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as old,
        tarfile.open(fileobj=buffer, mode="w:xz") as new,
    ):
        for entry in old:
            source = old.extractfile(entry)
            if entry.name == name:
                entry.name = other
            new.addfile(entry, source)
    return buffer.getvalue()


@pytest.mark.parametrize("cut", [1, 100])
def test_a_bundle_that_is_cut_short_is_no_bundle(cut: int) -> None:
    with pytest.raises(UnusableBundle):
        described(io.BytesIO(GOOD[:-cut]))


def test_where_publishers_sign_nobody_else_publishes_a_client(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    release = ClientRelease(version="0.2.0", bundles=(described(io.BytesIO(GOOD))[1],))

    def signature(signer: Ed25519PrivateKey) -> bytes:
        return SignedDocument.create(signer, RELEASE_KIND, release.to_bytes()).model_dump_json().encode()

    publishers = {key_id(key.public_key()): key.public_key()}
    with api(tmp_path, publishers=publishers) as bench, bench.client(Role.OPERATOR) as client:
        for bad in (None, signature(Ed25519PrivateKey.generate())):
            with pytest.raises(ApiError) as error:
                client.publish_client([GOOD], bad)
            assert error.value.code == "unknown-signer"
        with pytest.raises(ApiError, match="something else"):
            client.publish_client([bundle("0.3.0")], signature(key))
        assert client.publish_client([GOOD], signature(key)).version == "0.2.0"


def test_no_model_is_called_as_the_client(tmp_path: Path) -> None:
    from tests.aggregator_devices import model_files

    with api(tmp_path) as bench, pytest.raises(PublishRefused, match="another name"):
        bench.context.operator.publish(*model_files(50, name=CLIENT))


# --- to the devices


class Fleet:
    """A service, and devices that say what client they run."""

    def __init__(self, path: Path) -> None:
        self.bench = Bench(path, devices=6)
        self.bench.promotion = Promotion.AUTO
        self.operator = self.bench.operator
        for index, name in enumerate(sorted(self.bench.devices)):
            # The last one was installed by pip, the one before has a system that no release is for.
            self.says(name, "0.1.0" if index < 5 else "", target=(*[TARGET] * 4, "x", "")[index])

    def says(self, name: str, version: str, *, failed: str = "", target: str = TARGET) -> None:
        failure = VersionFailure(version=version_number(failed), code="client-refused") if failed else None
        status = DeviceStatus(
            session=self.bench.devices[name].session,
            online=True,
            client_version=version or "0.1.0",
            target=target,
            models={CLIENT: version_number(version)} if version else {},
            failures={CLIENT: failure} if failure else {},
        )
        self.bench.deliver((topics.up(name, "status"), encode(status)))
        self.bench.step(1.0)

    def rollout(self, version: str, *percent: float, **changes: object) -> str:
        request = RolloutRequest(CLIENT, version_number(version), percent or (25.0, 100.0), **changes)  # type: ignore[arg-type]
        return self.operator.start_rollout(request).record.rollout_id

    def settle(self) -> None:
        for _ in range(3):
            self.bench.step(1.0)

    def told(self, name: str) -> VersionAssignment | None:
        """What a device was told by itself."""
        frame = self.bench.transport.retained.get(topics.own_model(name, CLIENT))
        if frame is None:
            return None
        message = decode_to_device(frame)[0]
        assert isinstance(message, ModelAnnouncement)
        told = VersionAssignment.from_bytes(message.assignment.payload)
        assert (message.manifest is None) == (told.version is None)
        return told


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    found = Fleet(tmp_path)
    yield found
    found.bench.close()


def test_a_release_goes_out_in_waves_to_the_devices_that_can_install_it(fleet: Fleet) -> None:
    operator = fleet.operator
    operator.publish_client([bundle("0.1.0")])
    fleet.settle()
    assert topics.model(CLIENT) not in fleet.bench.transport.retained, "published is not rolled out"
    baseline = fleet.rollout("0.1.0", 100.0)
    fleet.settle()
    assert operator.rollout(baseline).record.status == "completed", "they run it already"
    operator.publish_client([GOOD])
    rollout = fleet.rollout("0.2.0", gate=("errors<0.3",))
    view = operator.rollout(rollout)
    assert view.record.pool == ("device-0", "device-1", "device-2", "device-3")
    fleet.settle()
    (first,) = operator.rollout(rollout).devices
    told = fleet.told(first)
    assert told is not None and (told.version, told.rollback) == (NUMBER, False)
    assert all(fleet.told(name) is None for name in fleet.bench.devices if name != first)

    # The bundle comes over the same transfer.
    blob = described(io.BytesIO(GOOD))[1].blob
    fleet.bench.transport.sent.clear()
    need = BlobNeed(blob=blob, indices=(0,))
    fleet.bench.deliver((topics.up(first, "msg"), encode(need)))
    fleet.bench.service.step(0)
    ((_, frame),) = [each for each in fleet.bench.transport.sent if each[0] == topics.down(first, "chunk")]
    chunk, body = decode_to_device(frame)
    assert isinstance(chunk, BlobChunk) and chunk.blob == blob and bytes(body) == GOOD

    fleet.says(first, "0.2.0")
    fleet.settle()
    view = operator.rollout(rollout)
    assert len(view.devices) == 4 and view.sight is not None and view.sight.waiting == 3
    second, third = view.devices[1:3]
    fleet.says(second, "0.1.0", failed="0.2.0")
    fleet.says(third, "0.1.0", failed="0.2.0")
    fleet.settle()
    view = operator.rollout(rollout)
    assert view.record.status == "rolled-back" and "errors" in view.progress.steps[-1].detail
    told = fleet.told(first)
    assert told is not None and (told.version, told.rollback) == (None, True), "back to what the fleet has"
    assert [each.record.stage for each in operator.releases()] == ["stable", "withdrawn"]
    counts = {(each.version, each.target): each.devices for each in operator.client_counts()}
    assert counts == {("0.1.0", TARGET): 3, ("0.1.0", "x"): 1, ("0.1.0", ""): 1, ("0.2.0", TARGET): 1}


def test_what_no_rollout_of_a_client_can_do_is_refused(fleet: Fleet) -> None:
    fleet.operator.publish_client([GOOD])
    with pytest.raises(OperationRefused, match="no accuracy"):
        fleet.rollout("0.2.0", gate=("accuracy>=0.8",))
    with pytest.raises(NoSuch):
        fleet.rollout("0.9.0")
    fleet.operator.publish_client([bundle("0.3.0", target=TRIXIE)])
    with pytest.raises(OperationRefused, match="no device that can install it"):
        fleet.rollout("0.3.0")
    rollout = fleet.rollout("0.2.0")
    fleet.operator.publish_client([bundle("0.4.0")])
    with pytest.raises(OperationRefused, match=r"covey-client version 0\.2\.0 is running"):
        fleet.rollout("0.4.0")
    fleet.operator.turn_rollout(rollout, "halt")
    fleet.operator.turn_rollout(rollout, "rollback")
    fleet.rollout("0.4.0")


def test_bundles_that_no_device_is_to_have_are_deleted_in_time(fleet: Fleet, tmp_path: Path) -> None:
    fleet.bench.retention = fleet.bench.retention.model_copy(update={"versions": 2})
    contents = [bundle(f"0.{minor}.0") for minor in range(1, 5)]
    for content in contents:
        fleet.operator.publish_client([content])
    fleet.rollout("0.1.0", 100.0)
    fleet.settle()
    fleet.bench.boot()
    fleet.settle()
    blobs = [described(io.BytesIO(content))[1].sha256 for content in contents]
    there = [(tmp_path / "registry" / "blobs" / sha256).exists() for sha256 in blobs]
    assert there == [True, False, True, True], "the fleet's, and the two newest"


def test_the_console_says_how_many_devices_run_which_client(bench: Api) -> None:
    with bench.client(Role.OPERATOR) as client:
        client.enrol(csr("barn-1"))
        client.enrol(csr("barn-2"))
    failure = VersionFailure(version=NUMBER, code="client-refused", detail="it did not stay up")
    said = DeviceStatus(
        session=bytes(32),
        online=True,
        client_version="0.1.0",
        target=TARGET,
        models={CLIENT: version_number("0.1.0")},
        failures={CLIENT: failure},
    )
    with bench.context.operator.repository.write() as writer:
        writer.note_status("barn-1", said, 1.0)
    browser = sign_in(bench, Role.VIEWER)
    fleet = page(bench, "/fleet", browser)
    assert f"Clients: not seen yet: 1, 0.1.0 on {TARGET}: 1" in fleet
    device = page(bench, "/fleet/barn-1", browser)
    assert "covey-client 0.2.0" in device and "it did not stay up" in device


# --- the commands


def test_the_commands_publish_list_roll_out_and_count(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from aggregator import main as covey

    run("aggregator", "init", "--fleet", "orchard")
    assert run("client", "list")[1].startswith("no releases yet")
    path = tmp_path / "covey-0.2.0-bookworm-arm64.tar.xz"
    path.write_bytes(GOOD)
    key = tmp_path / "key.pem"
    key.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    key.chmod(0o600)
    code, _, err = run("client", "publish", path, "--sign-key", key)
    assert code == 4 and "unknown key" in err
    code, out, _ = run("client", "publish", path)
    assert code == 0 and "0.2.0" in out and TARGET in out
    assert run("client", "publish", path)[0] == 1
    assert json.loads(run("client", "list", "--json")[1])[0]["number"] == NUMBER
    assert run("model", "list")[1].startswith("no versions yet")
    assert "no published client 0.9.0" in run("client", "rollout", "0.9.0")[2]
    assert "write 0.2.0" in run("client", "rollout", "two")[2]
    assert "no device that can install it" in run("client", "rollout", "0.2.0")[2]
    with covey.open_operator(tmp_path / "state") as operator:
        operator.enrol(csr("barn-1"))
        with operator.repository.write() as writer:
            said = DeviceStatus(
                session=bytes(32),
                online=True,
                client_version="0.1.0",
                target=TARGET,
                models={CLIENT: version_number("0.1.0")},
            )
            writer.note_status("barn-1", said, 1.0)
    code, out, err = run("client", "rollout", "0.2.0", "--percent", "100")
    assert code == 0 and "covey-client 0.2.0" in out and "no version to go back to" in err
    assert "covey-client 0.2.0" in run("rollout", "status")[1]
    out = run("client", "status")[1]
    assert "0.1.0" in out and TARGET in out
    assert json.loads(run("device", "list", "--json")[1])[0]["target"] == TARGET
