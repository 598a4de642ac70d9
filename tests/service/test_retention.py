"""What is kept, and what is deleted after its time: nothing that anybody may still need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from aggregator.registry.artefacts import MissingArtefact, StoreUnavailable
from aggregator.registry.publishing import manifest_of
from aggregator.retention import DAY, EVERY_SECONDS, FOREVER, Retention
from aggregator.settings import CampaignRequest
from protocol.fields import BlobRef
from tests.aggregator_bench import Bench
from tests.aggregator_devices import model_files


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A fleet with six versions; the first is there from the start."""
    bench = Bench(tmp_path, devices=3)
    for seed in range(1, 6):
        bench.operator.publish(*model_files(1000, seed=seed))
    yield bench
    bench.close()


def weights(bench: Bench, version: int) -> BlobRef:
    return manifest_of(bench.operator.version("toy", version)).weights


def there(bench: Bench) -> list[int]:
    """The versions whose weights can be read."""
    found = []
    for version in bench.operator.versions("toy"):
        try:
            bench.operator.model("toy", version.version)
        except MissingArtefact:
            continue
        found.append(version.version)
    return found


def tidy(bench: Bench, retention: Retention) -> None:
    bench.retention = retention
    bench.boot()
    bench.step()


def test_the_newest_versions_keep_their_weights_and_so_does_what_is_referred_to(bench: Bench) -> None:
    tidy(bench, FOREVER)
    tidy(bench, Retention(versions=6))
    assert there(bench) == [1, 2, 3, 4, 5, 6]
    bench.operator.pin("toy", 2, device="device-1")
    bench.operator.pin("toy", 3, group="site=north")
    tidy(bench, Retention(versions=2))
    assert there(bench) == [2, 3, 5, 6]
    # Every version is known for ever, with its signed manifest; and a file that comes again is stored again.
    assert [version.version for version in bench.operator.versions("toy")] == [1, 2, 3, 4, 5, 6]
    again = bench.operator.publish(*model_files(1000, seed=3))
    assert weights(bench, again.version) == weights(bench, 4)
    assert there(bench) == [2, 3, 4, 5, 6, 7]
    bench.clock.now += EVERY_SECONDS
    bench.step()
    assert there(bench) == [2, 3, 4, 6, 7]


def test_what_was_removed_is_not_asked_for_again_not_even_after_a_restart(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BlobRef] = []
    remove = bench.store.remove
    monkeypatch.setattr(bench.store, "remove", lambda blob: (asked.append(blob), remove(blob)))
    tidy(bench, Retention(versions=2))
    assert len(asked) == 4 and there(bench) == [5, 6]
    for _ in range(2):
        tidy(bench, Retention(versions=2))
        bench.clock.now += EVERY_SECONDS
        bench.step()
    assert len(asked) == 4


def test_a_store_that_is_away_stops_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(blob: BlobRef) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "remove", away)
        tidy(bench, Retention(versions=2))
        assert bench.service.trouble == "" and there(bench) == [1, 2, 3, 4, 5, 6]
    bench.clock.now += EVERY_SECONDS
    bench.step()
    assert there(bench) == [5, 6]


def test_how_cohorts_were_drawn_is_forgotten_and_the_ledger_is_not(bench: Bench) -> None:
    tidy(bench, Retention(selection_days=30))
    request = CampaignRequest("toy", rounds=1, cohort=3, minimum=3, min_survivors=3)
    (view,) = bench.finish(bench.start(request))
    round_id = view.record.round_id

    def selection() -> bytes | None:
        with bench.repository.read() as reader:
            assert reader.ledger() and reader.transcript(round_id) and reader.round(round_id)
            return reader.selection(round_id)

    bench.clock.now += 29 * DAY
    bench.step()
    assert selection() is not None
    bench.clock.now += 2 * DAY
    bench.step()
    assert selection() is None
    # The next round finds whom it wants all the same.
    assert len(bench.finish(bench.start(request))) == 1


def test_settings_that_would_lose_the_way_back_are_refused() -> None:
    for wrong in ({"versions": 1}, {"selection_days": 0}, {"transcripts": 5}):
        with pytest.raises(ValidationError):
            Retention.model_validate(wrong)
