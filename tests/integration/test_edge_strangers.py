"""A key that the fleet does not know signs a plan, and a version: a real device refuses both, and says so."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deploy.broker import BrokerProcess
from models import zoo
from models.weights import encode_weights
from protocol.identity import SignedDocument, key_id
from protocol.messages import AdvertiseKeys, FromDevice, Invitation, Refusal
from protocol.plan import PLAN_KIND
from tests.edge_broker import Device, Fleet, Hub, command, running, wait_for
from tests.edge_fleet import PERMISSIVE, plan

WATCH = zoo.load("watch")


def test_a_plan_by_an_unknown_key_is_refused_by_a_running_device(
    mosquitto: BrokerProcess, tmp_path: Path
) -> None:
    fleet, stranger = Fleet(tmp_path), Ed25519PrivateKey.generate()
    state = fleet.enrolled("device-1", PERMISSIVE)
    device = Device(state, fleet.data("device-1", WATCH.manifest), mosquitto)
    with Hub(mosquitto) as hub, running(device):

        def answer() -> FromDevice:
            wait_for(lambda: not hub.heard.empty(), what="an answer")
            return hub.heard.get()[1]

        weights = encode_weights(np.array(WATCH.weights))
        hub.publish(WATCH.manifest, WATCH.graph, weights, fleet.operator)
        wait_for(lambda: hub.serving("device-1") == {"watch": 1}, what="the version")

        now = int(time.time())
        times = {"issued_at": now, "expires_at": now + 600}
        payload = plan(base=WATCH.manifest, **times).to_bytes()
        hub.send("device-1", Invitation(plan=SignedDocument.create(stranger, PLAN_KIND, payload)))
        refusal = answer()
        assert isinstance(refusal, Refusal) and refusal.code == "bad-signature"
        assert key_id(stranger.public_key())[:8] in refusal.detail

        # Nor may it name the operator's key, or take the operator's signature to another plan.
        true = SignedDocument.create(fleet.operator, PLAN_KIND, payload)
        forged = SignedDocument.create(stranger, PLAN_KIND, payload).model_copy(
            update={"key_id": true.key_id}
        )
        other = true.model_copy(update={"payload": plan(round_id="b" * 32, base=WATCH.manifest).to_bytes()})
        for document in (forged, other):
            hub.send("device-1", Invitation(plan=document))
            refusal = answer()
            assert isinstance(refusal, Refusal) and refusal.code == "bad-signature"

        hub.publish(WATCH.manifest.model_copy(update={"version": 2}), WATCH.graph, weights, stranger)
        wait_for(lambda: "announcement-refused" in device.log.read_text(), what="the refusal of the version")
        done = subprocess.run(
            command("status", "--state", state, "--json"), capture_output=True, text=True, check=True
        )
        status = json.loads(done.stdout)
        assert status["recent_rounds"] == [] and [m["version"] for m in status["models"]] == [1]

        # The same plan, signed by whom the device knows, is one that it takes part in.
        hub.send("device-1", Invitation(plan=true))
        assert isinstance(answer(), AdvertiseKeys)
