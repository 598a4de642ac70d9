"""What a round is said to cost is what it does cost."""

from __future__ import annotations

import json

import numpy as np
import pytest

from protocol import ring
from protocol.codec import chunk_count, encode
from protocol.messages import UploadOffer
from protocol.secagg import server
from protocol.secagg.costs import device_costs
from protocol.secagg.parameters import GraphAssumptions, parameters
from protocol.secagg.server_state import Recovered
from protocol.transfer import chunks, describe
from tests.secagg_round import ROUND_ID, Cohort


def test_control_bytes_are_those_of_a_real_round() -> None:
    cohort = Cohort(9, reboot=False)
    device = "device-003"
    up = len(encode(cohort.clients[device].answer))  # type: ignore[arg-type, union-attr]
    down = 0
    cohort.advertise()
    for step in ("share", "deliver", "check", "unmask"):
        down += len(encode(server.request(cohort.server, device)))  # type: ignore[arg-type]
        if step == "deliver":
            cohort.deliver()
            cohort.upload()
            continue
        cohort.exchange()
        up += len(encode(cohort.clients[device].answer))  # type: ignore[arg-type, union-attr]
    said = device_costs(parameters(9, GraphAssumptions()), 1000, 20)
    assert said.upload_bytes == 2500
    assert said.control_up_bytes == pytest.approx(up, rel=0.03)
    assert said.control_down_bytes == pytest.approx(down, rel=0.15)


@pytest.mark.parametrize("length", [1_000, 100_000])
@pytest.mark.parametrize(
    "graph",
    [
        GraphAssumptions(),
        GraphAssumptions(
            corrupt_fraction=0.0, dropout_fraction=0.0, adversary="semi-honest", complete_up_to=2
        ),
    ],
    ids=["complete", "regular"],
)
def test_a_client_uploads_what_the_issue_allows(graph: GraphAssumptions, length: int) -> None:
    """Every frame of a round: 1.02 d b / 8 bytes and 200 a neighbour; 1,700 more for a small vector."""
    cohort, device, bits = Cohort(12, length=length, reboot=False, graph=graph), "device-003", 20
    frames: list[bytes] = []
    receive = cohort.receive

    def heard(sender: str, message: server.ClientMessage) -> None:
        if sender == device:
            frames.append(encode(message))
        receive(sender, message)

    cohort.receive = heard  # type: ignore[method-assign]
    cohort.advertise()
    cohort.exchange()
    cohort.deliver()
    packed = ring.pack(cohort.masked(device) & np.uint32(ring.modulus_mask(bits)), bits)
    blob = describe(packed)
    frames.append(encode(UploadOffer(round_id=ROUND_ID, blob=blob)))
    frames += [encode(*part) for part in chunks(blob, packed, range(chunk_count(blob.size)))]
    cohort.upload()
    cohort.exchange()
    cohort.exchange()
    assert isinstance(cohort.server, Recovered)
    degree, sent = cohort.server.cohort.graph.degree, sum(map(len, frames))
    vector = 1.02 * length * bits / 8
    assert len(frames) == 5 + chunk_count(blob.size)
    assert sent <= vector + 200 * degree + (1_700 if length < 100_000 else 0)
    # A row of the sealed shares, and one of the shares that it gives away.
    assert sent <= vector + 119 * degree + 1_700


def test_the_command_prints_what_both_sides_will_use() -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from aggregator.cli import app

    result = CliRunner().invoke(app, ["secagg", "parameters", "--cohort", "1000", "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output)
    assert (figures["k"], figures["t"], figures["graph"]) == (96, 67, "regular")
    assert figures["upload_bytes"] == 2_500_000
    assert 0 < figures["cpu_seconds"] < 60
    refused = CliRunner().invoke(app, ["secagg", "parameters", "--cohort", "1000", "--corrupt", "0.5"])
    assert refused.exit_code == 2
    assert "--corrupt" in refused.output
