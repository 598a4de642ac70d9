"""The feed of live events: what is told, in which order, and how somebody goes on where they were."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from aggregator.records import Campaign, Device
from aggregator.web.events import EventFeed
from aggregator.web.observed import ObservedRepository
from protocol.messages import DeviceStatus
from tests.aggregator_bench import Bench
from tests.toy_rounds import request as campaign_request


async def listen(
    feed: EventFeed, last_id: str | None, count: int
) -> list[tuple[str, str, dict[str, object]]]:
    """The first `count` events that a listener gets: (id, kind, data)."""
    found = []
    async for frame in feed.stream(last_id, lambda: True, keepalive=0.01):
        if frame.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in frame.strip().splitlines())
        found.append((fields["id"], fields["event"], json.loads(fields["data"])))
        if len(found) == count:
            break
    return found


def test_a_listener_hears_what_happens_from_now_on() -> None:
    feed = EventFeed(epoch="e")
    feed.publish("device", {"device": "old"})

    async def both() -> list[tuple[str, str, dict[str, object]]]:
        listening = asyncio.create_task(listen(feed, None, 2))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(feed.publish, "device", {"device": "new\ndata: forged"})
        return await listening

    assert asyncio.run(both()) == [
        ("e-1", "hello", {}),
        ("e-2", "device", {"device": "new\ndata: forged"}),
    ]


def test_whoever_was_away_misses_nothing_or_is_told() -> None:
    feed = EventFeed(kept=3, epoch="e")
    for number in range(1, 6):
        feed.publish("device", {"n": number})
    resumed = asyncio.run(listen(feed, "e-3", 3))
    assert [(kind, data.get("n")) for _, kind, data in resumed] == [
        ("hello", None),
        ("device", 4),
        ("device", 5),
    ]
    assert asyncio.run(listen(feed, "e-2", 2))[1][2] == {"n": 3}
    for gone in ("e-1", "other-5", "e-6", "e-", "nonsense", "e--1", "e-" + "9" * 40):
        assert asyncio.run(listen(feed, gone, 1)) == [("e-5", "reset", {})]


def test_a_listener_that_is_no_longer_welcome_is_let_go_and_so_is_everybody_at_the_end() -> None:
    async def count(valid: bool) -> int:
        feed = EventFeed()
        if valid:
            asyncio.get_running_loop().call_later(0.05, feed.close)
        return len([frame async for frame in feed.stream(None, lambda: valid, keepalive=0.01)])

    assert asyncio.run(count(False)) == 1
    assert asyncio.run(asyncio.wait_for(count(True), 60)) > 1


def test_what_was_rolled_back_never_happened(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    feed = EventFeed()
    repository = ObservedRepository(bench.repository, feed)
    with pytest.raises(RuntimeError), repository.write() as writer:
        writer.add_device(Device("barn-1", b"certificate", 1.0))
        raise RuntimeError
    assert feed.after(0) == ()
    with repository.write() as writer:
        writer.add_device(Device("barn-1", b"certificate", 1.0))
        writer.note_status("barn-1", DeviceStatus(session=bytes(32), online=True, models={"watch": 2}), 3.0)
        writer.add_campaign(Campaign("c" * 32, "watch", 1, b"{}", 1.0))
        assert feed.after(0) == ()  # not yet durable
    assert [(e.kind, e.data.get("change")) for e in feed.after(0) or ()] == [
        ("device", "enrolled"),
        ("device", "online"),
        ("campaign", None),
    ]


def test_a_round_is_told_from_its_start_to_its_version(tmp_path: Path) -> None:
    feed = EventFeed()
    bench = Bench(tmp_path)
    bench.repository = ObservedRepository(bench.repository, feed)  # type: ignore[assignment]
    bench.boot()
    bench.finish(bench.start(campaign_request(rounds=1)))
    events = feed.after(0) or ()
    rounds = [e.data for e in events if e.kind == "round"]
    assert rounds[0]["status"] == "running" and rounds[0]["number"] == 1
    phases = list(dict.fromkeys(data["phase"] for data in rounds if "phase" in data))
    assert phases == ["AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking"]
    assert (rounds[-1]["status"], rounds[-1]["version"]) == ("completed", 2)
    # Published, and, without a rollout, given to the fleet at once.
    versions = [(e.data["version"], e.data.get("stage")) for e in events if e.kind == "version"]
    assert versions == [(1, "stable"), (2, None), (2, "stable")]
    assert [e.data["status"] for e in events if e.kind == "campaign"][-1] == "finished"
