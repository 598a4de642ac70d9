"""The enrolment bundle, and the files of a device that is set up."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest

from edge_client.adapters.credentials import (
    CredentialError,
    create_identity,
    load_credentials,
    load_policy,
    save_enrolment,
    save_policy,
    tls_files,
)
from edge_client.device_setup import enrol, initialise, set_policy
from edge_client.policy import DevicePolicy
from protocol.enrolment import EnrolmentBundle
from protocol.errors import BadSignature, MalformedMessage
from protocol.identity import issue_certificate, key_id, open_request
from tests.edge_fleet import CA, CA_KEY, NOW, OPERATOR, bundle


def bundle_for(request: bytes, device_id: str, *, now: int = NOW) -> EnrolmentBundle:
    _, public_key = open_request(request)
    certificate = issue_certificate(CA_KEY, CA, device_id, public_key, now=now, days=30, serial=7)
    return bundle(device_id).model_copy(update={"certificate": certificate})


def test_a_bundle_survives_its_file_and_verifies() -> None:
    made = bundle("barn-1")
    read = EnrolmentBundle.from_bytes(made.to_bytes())
    assert read == made
    assert read.verify(now=NOW).device_id == "barn-1"
    assert list(read.plan_keys()) == [key_id(OPERATOR.public_key())] == list(read.model_keys())


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"v": 2},
        {"fleet": "Barn/1"},
        {"device_id": "../barn"},
        {"plan_signers": []},
        {"plan_signers": ["AAAA"]},
        {"certificate": ""},
        {"type": "other"},
    ],
)
def test_a_malformed_bundle_is_refused(change: dict[str, object]) -> None:
    content = json.loads(bundle("barn-1").to_bytes()) | change
    with pytest.raises(MalformedMessage):
        EnrolmentBundle.from_bytes(json.dumps(content).encode())


def test_bytes_that_are_no_json_and_a_huge_file_are_refused() -> None:
    for data in (b"", b"\x00\xff", b"[]", b" " * 70_000):
        with pytest.raises(MalformedMessage):
            EnrolmentBundle.from_bytes(data)


def test_a_bundle_whose_parts_do_not_belong_together_is_refused() -> None:
    made = bundle("barn-1")
    for change in (
        {"fleet": "orchard"},
        {"device_id": "barn-2"},
        {"ca": made.certificate},
        {"certificate": made.ca},
        {"ca": bytes(100)},
    ):
        with pytest.raises(BadSignature):
            made.model_copy(update=change).verify(now=NOW)
    with pytest.raises(BadSignature, match="clock"):
        made.verify(now=NOW + 400 * 86_400)


def test_initialise_is_idempotent_and_private(tmp_path: Path) -> None:
    state = tmp_path / "state"
    first, second = initialise(state, "barn-1"), initialise(state, "barn-1")
    assert open_request(first)[0] == "barn-1"
    assert key_id(open_request(first)[1]) == key_id(open_request(second)[1])
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in state.iterdir()} == {0o600}
    with pytest.raises(CredentialError, match="enroll"):
        load_credentials(state)
    with pytest.raises(CredentialError, match="init"):
        load_credentials(tmp_path / "nowhere")
    with pytest.raises(CredentialError, match="device id"):
        initialise(state, "Barn 1")


def test_a_device_enrols_with_a_bundle_for_its_own_key_only(tmp_path: Path) -> None:
    request = create_identity(tmp_path, "barn-1")
    stranger = bundle("barn-1")
    with pytest.raises(CredentialError, match="another key"):
        save_enrolment(tmp_path, stranger, now=NOW)
    with pytest.raises(CredentialError, match="initialised as barn-1"):
        save_enrolment(tmp_path, bundle_for(request, "barn-2"), now=NOW)
    with pytest.raises(CredentialError, match="clock"):
        save_enrolment(tmp_path, bundle_for(request, "barn-1"), now=NOW + 90 * 86_400)
    made = bundle_for(request, "barn-1")
    save_enrolment(tmp_path, made, now=NOW)
    save_enrolment(tmp_path, made, now=NOW)
    credentials = load_credentials(tmp_path)
    assert credentials.bundle == made
    assert "PRIVATE" not in repr(credentials) and "identity" not in repr(credentials)
    files = tls_files(tmp_path)
    files.context()
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in (files.ca, files.certificate, files.key))
    with pytest.raises(CredentialError, match="belongs to the enrolled device barn-1"):
        create_identity(tmp_path, "barn-2")


def test_enrolling_anew_keeps_key_ledger_and_used_round_ids(tmp_path: Path) -> None:
    now = int(time.time())
    request = initialise(tmp_path, "barn-1")
    enrol(tmp_path, bundle_for(request, "barn-1", now=now))
    database = (tmp_path / "device.sqlite").read_bytes()
    enrol(tmp_path, bundle_for(initialise(tmp_path, "barn-1"), "barn-1", now=now + 60))
    assert (tmp_path / "device.sqlite").read_bytes() == database
    assert load_credentials(tmp_path).bundle.verify(now=now + 60).device_id == "barn-1"


def test_a_policy_file_names_only_what_differs(tmp_path: Path) -> None:
    assert load_policy(tmp_path / "policy.json") == DevicePolicy()
    path = tmp_path / "mine.json"
    path.write_text('{"minimum_cohort": 20, "privacy_modes": ["distributed"]}')
    policy = load_policy(path)
    assert policy.minimum_cohort == 20 and [mode.value for mode in policy.privacy_modes] == ["distributed"]
    save_policy(tmp_path / "policy.json", policy)
    assert load_policy(tmp_path / "policy.json") == policy
    set_policy(tmp_path / "new", policy)
    assert (tmp_path / "new" / "policy.json").exists()
