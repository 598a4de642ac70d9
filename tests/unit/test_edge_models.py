"""Versions on a device: fetched in chunks, verified, tested, switched, and never rolled back by a replay."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from typing import Any

from edge_client.adapters.mqtt import birth
from edge_client.events import Connected, Fault, VersionFailed, VersionTested
from edge_client.library import download_limit
from models.manifest import ModelManifest
from protocol.codec import chunk_count
from protocol.identity import SignedDocument
from protocol.messages import (
    CHUNK_BYTES,
    MAX_MODELS,
    WINDOW,
    AdvertiseKeys,
    BlobNeed,
    Invitation,
    ModelAnnouncement,
)
from protocol.plan import MODEL_KIND
from protocol.version_assignment import ASSIGNMENT_KIND, VersionAssignment
from tests.edge_fleet import (
    FLEET,
    GRAPH,
    OPERATOR,
    STRANGER,
    FakeDevice,
    announced,
    announcement,
    invitation,
    manifest,
    plan,
    serve,
    weights,
)


def files(version: int, graph: bytes = GRAPH) -> dict[str, bytes]:
    model = manifest(version, graph=graph)
    return {model.graph.sha256: graph, model.weights.sha256: weights(version)}


def serving(device: FakeDevice) -> dict[str, int]:
    return device.state.library.serving()


def needs(device: FakeDevice) -> list[BlobNeed]:
    return [message for message in device.take() if isinstance(message, BlobNeed)]


def test_a_version_is_fetched_tested_and_announced() -> None:
    device = FakeDevice()
    device.install()
    assert serving(device) == {"watch": 1} and device.statuses == [{"watch": 1}]


def test_the_graph_is_fetched_once_for_all_versions() -> None:
    device = FakeDevice()
    device.install()
    device.take()
    device.receive(announcement(manifest(2)))
    (need,) = needs(device)
    assert need.blob == manifest(2).weights
    device.outbox.append(need)
    serve(device, files(2))
    device.work()
    assert serving(device) == {"watch": 2}


def test_never_more_than_a_window_is_asked_for() -> None:
    graph = bytes(range(256)) * 256 * 9  # nine chunks
    device = FakeDevice()
    device.receive(announcement(manifest(graph=graph)))
    (need,) = needs(device)
    assert need.indices == tuple(range(WINDOW))
    device.outbox.append(need)
    assert serve(device, files(1, graph)) == chunk_count(len(graph)) + 1
    device.work()
    assert serving(device) == {"watch": 1}


def test_lost_chunks_are_asked_for_again_with_growing_patience() -> None:
    device = FakeDevice()
    device.receive(announcement(manifest()))
    serve(device, files(1), lose={1})
    asked = []
    for _ in range(400):
        device.tick(0.5)
        if found := needs(device):
            asked.append((device.steady, found[0].indices))
    assert {indices for _, indices in asked} == {(1,)}
    gaps = [b - a for (a, _), (b, _) in pairwise(asked)]
    assert gaps == sorted(gaps) and gaps[-1] == 60.0
    device.give(Connected())
    device.take()
    device.give(Connected())  # hurries: asked at once
    serve(device, files(1))
    device.work()
    assert serving(device) == {"watch": 1}


def test_a_download_goes_on_after_a_restart() -> None:
    device = FakeDevice()
    device.receive(announcement(manifest()))
    serve(device, files(1), lose={1})
    device.reboot()
    asked = needs(device)
    assert {need.indices for need in asked} == {(1,)}
    need = asked[-1]
    device.outbox.append(need)
    serve(device, files(1))
    device.work()
    assert serving(device) == {"watch": 1}


def test_duplicate_and_foreign_chunks_change_nothing() -> None:
    device = FakeDevice()
    device.receive(announcement(manifest()))
    (need,) = needs(device)
    for _ in range(2):
        device.outbox.append(need)
        serve(device, files(1))
    device.work()
    assert serving(device) == {"watch": 1}
    device.outbox.append(need)
    serve(device, files(1))
    assert device.disk.partial == {}


def test_a_corrupt_download_is_fetched_anew_and_the_version_is_not_blamed() -> None:
    device = FakeDevice()
    device.receive(announcement(manifest()))
    wrong = GRAPH[:-1] + b"!"
    serve(device, {manifest().graph.sha256: wrong})
    assert "download-corrupt" in device.note_events() and not device.state.library.shelf("watch").bad
    device.tick(1.0)
    assert needs(device) == []
    device.tick(10.0)
    (need,) = needs(device)
    device.outbox.append(need)
    serve(device, files(1))
    device.work()
    assert serving(device) == {"watch": 1}


def test_a_bad_version_is_remembered_and_the_last_good_one_stays() -> None:
    device = FakeDevice()
    device.install()
    device.take()
    device.receive(announcement(manifest(2)))
    serve(device, files(2))
    device.give(VersionTested(manifest(2).sha256(), Fault("model-unusable", "a prediction is not finite")))
    assert serving(device) == {"watch": 1}
    for _ in range(2):
        device.jobs.clear()
        device.reboot()
        device.take()
        device.receive(announcement(manifest(2)))
        assert needs(device) == [] and device.jobs == []
    assert "not finite" in device.state.library.shelf("watch").bad[manifest(2).sha256()]
    device.install(manifest(3))
    assert serving(device) == {"watch": 3}


def test_a_test_that_the_device_prevented_is_repeated() -> None:
    device = FakeDevice()
    device.receive(announcement(manifest()))
    serve(device, files(1))
    device.jobs.clear()
    device.give(VersionTested(manifest().sha256(), Fault("disk-full", "no space", transient=True)))
    assert serving(device) == {} and device.jobs == []
    device.tick(61.0)
    device.work()
    assert serving(device) == {"watch": 1}


def test_a_replayed_older_announcement_changes_nothing() -> None:
    device = FakeDevice()
    device.install()
    device.install(manifest(2))
    device.take()
    for _ in range(2):
        device.receive(announcement(manifest(1)))
        assert needs(device) == [] and serving(device) == {"watch": 2}
        device.reboot()
    assert device.note_events().count("assignment-not-newer") == 2
    # Nor with another version under the sequence that was taken last.
    device.receive(announcement(manifest(1, graph=b"another graph"), sequence=2))
    assert device.note_events().count("assignment-not-newer") == 3 and serving(device) == {"watch": 2}


def test_an_older_version_needs_a_signed_way_back() -> None:
    device = FakeDevice()
    device.install()
    device.install(manifest(2))
    device.receive(announcement(manifest(1), sequence=3))
    assert serving(device) == {"watch": 2} and "older-without-roll-back" in device.note_events()
    device.receive(announcement(manifest(1), sequence=4, rollback=True))
    # It is still on disk: nothing is fetched, and it is served at once.
    assert serving(device) == {"watch": 1} and not device.jobs and device.statuses[-1] == {"watch": 1}
    device.reboot()
    assert serving(device) == {"watch": 1}
    device.receive(announcement(manifest(2), sequence=4))  # the one that it went back from, replayed
    device.receive(announcement(manifest(2)))
    assert serving(device) == {"watch": 1}
    device.receive(announcement(manifest(2), sequence=5))
    assert serving(device) == {"watch": 2}


def test_a_version_that_is_gone_from_the_disk_is_fetched_on_the_way_back() -> None:
    device = FakeDevice()
    for number in (1, 2, 3):
        device.install(manifest(number))
    device.take()
    device.receive(announcement(manifest(1), sequence=4, rollback=True))
    assert serving(device) == {"watch": 3} and len(needs(device)) == 1
    device.reboot()
    serve(device, files(1))
    device.work()
    assert serving(device) == {"watch": 1}


def own(model: ModelManifest | None, sequence: int, **changes: Any) -> ModelAnnouncement:
    """An assignment of this device alone; None takes its version away."""
    if model is not None:
        return announcement(model, device="device-0", sequence=sequence, **changes)
    values = {"fleet": FLEET, "model": "watch", "device": "device-0", "sequence": sequence}
    return announced(VersionAssignment(**{**values, **changes}), None)


def test_a_device_has_its_own_version_whatever_the_fleet_has() -> None:
    device = FakeDevice()
    device.install()
    device.receive(own(manifest(2), 9))
    serve(device, files(2))
    device.work()
    assert serving(device) == {"watch": 2}
    for number in (3, 4):
        device.receive(announcement(manifest(number), sequence=10 * number))
        device.reboot()
    assert serving(device) == {"watch": 2} and needs(device) == []
    device.receive(own(None, 10))
    # What the fleet is to have was taken note of meanwhile.
    serve(device, files(4))
    device.work()
    assert serving(device) == {"watch": 4}
    device.receive(own(manifest(2), 9))  # replayed
    assert serving(device) == {"watch": 4} and "assignment-not-newer" in device.note_events()


def test_a_canary_goes_back_with_the_fleet_also_when_it_was_away() -> None:
    device = FakeDevice()
    device.install()
    device.receive(own(manifest(2), 9))
    serve(device, files(2))
    device.work()
    device.receive(own(None, 10))
    assert serving(device) == {"watch": 2} and "older-without-roll-back" in device.note_events()
    device.receive(own(None, 11, rollback=True))
    assert serving(device) == {"watch": 1}


def test_announcements_of_strangers_and_garbage_are_refused() -> None:
    device = FakeDevice()
    model = manifest()
    good = VersionAssignment(
        fleet=FLEET, model="watch", version=1, manifest_sha256=model.sha256(), sequence=1
    )
    signed = SignedDocument.create(OPERATOR, MODEL_KIND, model.to_bytes())

    def with_manifest(payload: bytes) -> ModelAnnouncement:
        sha256 = hashlib.sha256(payload).hexdigest()
        told = good.model_copy(update={"manifest_sha256": sha256})
        return announced(told, SignedDocument.create(OPERATOR, MODEL_KIND, payload))

    def with_assignment(**changes: Any) -> ModelAnnouncement:
        return announced(good.model_copy(update=changes), signed)

    hostile = [
        announcement(model, STRANGER),
        announced(good, signed, STRANGER),
        announced(good, SignedDocument.create(STRANGER, MODEL_KIND, model.to_bytes())),
        announced(good, SignedDocument.create(OPERATOR, "plan", model.to_bytes())),
        announced(good, None),
        ModelAnnouncement(assignment=signed, manifest=signed),
        ModelAnnouncement(assignment=SignedDocument.create(OPERATOR, ASSIGNMENT_KIND, b"{}")),
        with_assignment(fleet="shed"),
        with_assignment(device="device-1"),
        with_assignment(version=2),
        with_assignment(model="digits"),
        with_assignment(manifest_sha256="0" * 64),
        with_assignment(v=2),
        with_manifest(b"{}"),
        with_manifest(model.to_bytes() + b" "),
        with_manifest(model.to_bytes().replace(b'"watch"', b'"../../etc"')),
        with_manifest(model.to_bytes().replace(b'"parameter_count":10', b'"parameter_count":999999999999')),
    ]
    for message in hostile:
        device.receive(message)
    assert device.take() == [] and device.disk.versions == {} and device.disk.standings == {}
    assert device.note_events().count("announcement-refused") == len(hostile)


def test_a_version_that_fails_in_use_gives_way_to_the_one_before() -> None:
    device = FakeDevice()
    device.install()
    device.install(manifest(2))
    assert device.failures == {}
    device.give(VersionFailed(manifest(2).sha256(), Fault("model-unusable", "it crashed:\n\x1b[31m")))
    assert serving(device) == {"watch": 1} and device.statuses[-1] == {"watch": 1}
    failure = device.failures["watch"]
    assert (failure.version, failure.code, failure.detail) == (2, "model-unusable", "it crashed:??[31m")
    device.reboot()
    assert serving(device) == {"watch": 1} and device.failures["watch"].version == 2
    device.receive(announcement(manifest(2), sequence=7))
    assert serving(device) == {"watch": 1} and "version-known-bad" in device.note_events()
    # Where none is left, none is served; a newer one clears the blame.
    device.give(VersionFailed(manifest(1).sha256(), Fault("model-unusable", "it crashed")))
    assert serving(device) == {} == device.statuses[-1] and device.failures["watch"].version == 1
    device.reboot()
    assert serving(device) == {} and device.failures["watch"].version == 1
    device.install(manifest(8))
    assert serving(device) == {"watch": 8} and device.failures == {}


def test_a_round_brings_its_version_which_is_not_served() -> None:
    device = FakeDevice()
    device.install()
    device.take()
    base = manifest(2)
    with_base = Invitation(
        plan=invitation(plan(base=base)).plan,
        manifest=SignedDocument.create(OPERATOR, MODEL_KIND, base.to_bytes()),
    )
    device.receive(with_base)
    (check_in,) = [m for m in device.outbox if isinstance(m, AdvertiseKeys)]
    serve(device, files(2))
    device.work()
    assert device.state.library.ready("watch", base.sha256()) and serving(device) == {"watch": 1}
    device.reboot()
    device.work()
    assert device.state.library.ready("watch", base.sha256()) and serving(device) == {"watch": 1}
    # Once it is assigned, it is served without being fetched again.
    device.take()
    device.receive(announcement(base))
    assert serving(device) == {"watch": 2} and needs(device) == []
    assert check_in.round_id == "a" * 32


def test_a_round_s_version_needs_a_signature_and_the_plan_s_digest() -> None:
    base = manifest(2)
    for signer, payload in [(STRANGER, base), (OPERATOR, manifest(3))]:
        device = FakeDevice()
        device.install()
        device.take()
        signed = SignedDocument.create(signer, MODEL_KIND, payload.to_bytes())
        device.receive(Invitation(plan=invitation(plan(base=base)).plan, manifest=signed))
        assert device.take() == [] and "waiting-for-version" in device.note_events()


def test_a_device_follows_no_more_models_than_a_status_has_room_for() -> None:
    """One more stopped the process at each connection, since its birth could not be written."""
    device = FakeDevice()
    for number in range(MAX_MODELS + 1):
        device.install(manifest(name=f"watch-{number}"))
    device.give(Connected())
    birth(bytes(32), device.statuses[-1], "1", "none")
    assert len(device.statuses[-1]) == MAX_MODELS and device.note_events().count("too-many-models") == 1
    device.install(manifest(2, name="watch-0"))
    assert serving(device)["watch-0"] == 2


def test_old_files_are_deleted_but_not_those_of_the_active_round() -> None:
    device = FakeDevice()
    device.install()
    device.take()
    device.receive(invitation(plan()))
    for version in (2, 3, 4):
        device.install(manifest(version))
    assert manifest(1).weights.sha256 in device.disk.blobs
    assert manifest(2).weights.sha256 not in device.disk.blobs
    device.unix += 4000
    device.tick()
    assert manifest(1).weights.sha256 not in device.disk.blobs
    assert {manifest(3).sha256(), manifest(4).sha256()} == device.disk.versions.keys()
    device.reboot()
    assert serving(device) == {"watch": 4}


def test_a_newer_version_replaces_one_that_is_still_on_its_way() -> None:
    device = FakeDevice()
    device.receive(announcement(manifest(1)))
    device.take()
    device.receive(announcement(manifest(2)))
    serve(device, files(2))
    device.work()
    assert serving(device) == {"watch": 2} and manifest(1).sha256() not in device.disk.versions


def test_a_download_keeps_to_its_rate_and_resumes_when_the_limit_lets_it() -> None:
    graph = bytes(range(256)) * 256 * 9  # nine chunks, and the weights are a tenth
    device = FakeDevice()
    rate = CHUNK_BYTES / 2
    device.state = replace(
        device.state, library=replace(device.state.library, download=download_limit(rate, 0.0))
    )
    device.receive(announcement(manifest(graph=graph)))
    came = [(0.0, serve(device, files(1, graph)))]
    while not device.jobs and device.steady < 60:
        device.tick(0.25)
        came.append((device.steady, serve(device, files(1, graph))))
    device.work()
    assert serving(device) == {"watch": 1}
    # One chunk at once, then one every two seconds, and none twice.
    assert [at for at, chunks in came if chunks] == [2.0 * index for index in range(10)]
    assert sum(chunks for _, chunks in came) == 10


def test_what_was_lost_counts_against_the_rate_too() -> None:
    device = FakeDevice()
    limit = download_limit(CHUNK_BYTES, 0.0)
    device.state = replace(device.state, library=replace(device.state.library, download=limit))
    device.receive(announcement(manifest()))
    asked = 0
    for _ in range(40):
        asked += sum(len(need.indices) for need in needs(device))
        device.tick(0.5)
    assert 3 <= asked <= 21
    serve(device, files(1))
    device.give(Connected())
    while not device.jobs and device.steady < 120:
        device.tick(0.5)
        serve(device, files(1))
    device.work()
    assert serving(device) == {"watch": 1}
