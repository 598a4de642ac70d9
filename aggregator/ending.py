"""How a round ends: with a version, an evaluation, an answer, or a stated reason; each in one transaction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from aggregator.fleet.authority import Authority
from aggregator.optimizers import OptimizerState, memory, resumed
from aggregator.records import Evaluation, LedgerEntry, NoiseTree, OptimizerMemory, RoundEnding, Version
from aggregator.registry.artefacts import ArtefactStore
from aggregator.registry.publishing import sign
from aggregator.repository import Writer
from aggregator.rounds import machine
from aggregator.rounds.answer import Answer, answer
from aggregator.rounds.evaluation import VersionEvaluation, figures
from aggregator.rounds.planning import CampaignSettings
from aggregator.rounds.release import Release
from aggregator.rounds.report import RoundReport, Traffic
from aggregator.running import RunningRound
from aggregator.spending import epsilon_of, spent_events
from aggregator.unmasking import LostTree, Unmasked
from aggregator.work import Work
from models.assignment import Answering, Evaluating, Training, described
from models.manifest import ModelManifest
from models.weights import decode_weights, encode_weights
from protocol import transcript
from protocol.dp.events import DPEvent, event_for
from protocol.messages import RoundEnd
from protocol.secagg.server_state import Failed, Recovered

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outcome:
    """What came of a round that completed, by what it asked."""

    released: Release
    version: Version | None = None
    evaluation: VersionEvaluation | None = None
    answer: Answer | None = None

    def record(self) -> transcript.Content:
        """The last record of the transcript."""
        if self.version is not None:
            return transcript.VersionRecord(
                version=self.version.version, manifest_sha256=self.version.manifest_sha256
            )
        found = self.evaluation or self.answer
        if found is None:
            raise ValueError("a round completes with a version, an evaluation or an answer")
        return transcript.AnswerRecord(answer_sha256=found.digest)


@dataclass(frozen=True)
class Finisher:
    """Ends rounds."""

    store: ArtefactStore
    authority: Authority

    def finish(
        self, work: Work, running: RunningRound, unmasked: Unmasked, traffic: dict[str, Traffic]
    ) -> None:
        """Ends a round that has been unmasked, or has failed.

        New weights and manifest are durable before the transaction that makes them a version. A crash in
        between leaves the round as it was, so that it is finished again; no version can come of it twice.

        Raises:
            Exception: whatever the release stumbled over; the transaction must not be committed.
        """
        running.state = state = unmasked.state
        if unmasked.released is not None:
            self._complete(work, running, unmasked.released, unmasked.tree, traffic)
            return
        if not state.ended or state.completes:
            raise ValueError(f"round {running.round_id} has not ended, or is not unmasked")
        failures = [part.secagg for part in state.subcohorts if isinstance(part.secagg, Failed)]
        detail = failures[0].detail
        if len(state.subcohorts) > 1:
            detail = f"{len(failures)} of {len(state.subcohorts)} sub-cohorts failed, the first: {detail}"
        self.abort(work, running, failures[0].code, detail, traffic)

    def abort(
        self, work: Work, running: RunningRound, code: str, detail: str, traffic: dict[str, Traffic]
    ) -> None:
        """Ends a round without a result. What it spent in privacy is entered all the same."""
        event = _spent(running)
        detail = "; ".join(part for part in (detail, machine.why_declined(running.state)) if part)
        contents = [*_beginning(running, event), transcript.AbortRecord(code=code)]
        self._end(work, running, contents, event, traffic, code=code, detail=detail)
        logger.warning("round %s aborted: %s: %s", running.round_id[:8], code, detail)

    def _complete(
        self,
        work: Work,
        running: RunningRound,
        released: Release,
        tree: NoiseTree | None,
        traffic: dict[str, Traffic],
    ) -> None:
        if tree is not None:
            _note_leaf(work, running, tree)
        event = _spent(running)
        outcome = self._outcome(work, running, released)
        contents = [
            *_beginning(running, event),
            transcript.ReleaseRecord(release_sha256=released.digest),
            outcome.record(),
        ]
        misbehaved = tuple(
            part.secagg.cohort.members[index].device_id
            for part in running.state.recovered
            if isinstance(part.secagg, Recovered)
            for index in sorted(part.secagg.misbehaved)
        )
        self._end(
            work,
            running,
            contents,
            event,
            traffic,
            outcome=outcome,
            misbehaved=misbehaved,
        )
        logger.info(
            "round %s completed: %s, %d devices",
            running.round_id[:8],
            described(running.assignment.task),
            len(running.state.survivors),
        )

    def _outcome(self, work: Work, running: RunningRound, released: Release) -> _Outcome:
        assignment, at = running.assignment, work.at
        if isinstance(assignment, Training):
            version = self._make_version(work, running, assignment.manifest, released)
            return _Outcome(released, version=version)
        survivors = [len(part.survivors) for part in running.state.recovered]
        event = _spent(running)
        cost = None if event is None else epsilon_of([event], running.encoding.privacy.delta)
        if isinstance(assignment, Evaluating):
            task = assignment.task
            evaluation = VersionEvaluation(
                model=task.model,
                version=task.version,
                round_id=running.round_id,
                at=at.unix,
                participants=sum(survivors),
                held_out=len(set(running.state.survivors) - work.writer.contributors(task.model)),
                metrics=figures(task, released.mean_update, survivors, running.encoding),
                epsilon=cost,
            )
            return _Outcome(released, evaluation=evaluation)
        if isinstance(assignment, Answering):
            found = answer(assignment.task, released.mean_update, survivors, running.encoding)
            return _Outcome(released, answer=found.model_copy(update={"epsilon": cost}))
        assert_never(assignment)

    def _make_version(
        self, work: Work, running: RunningRound, base: ModelManifest, released: Release
    ) -> Version:
        weights = decode_weights(self.store.read(base.weights), base)
        # Every device weighs 1, which is what the user-level guarantee counts.
        moved = _step(work.writer, running.record.campaign_id, weights, released)
        data = encode_weights(moved.parameters)
        # The base need not be the newest: one that was withdrawn keeps its number.
        newest = work.writer.newest_version(base.name)
        manifest = base.next_version(data, after=None if newest is None else newest.version)
        version, document = sign(self.authority, manifest, now=work.at.unix, round_id=running.round_id)
        self.store.put(data)
        self.store.put_manifest(manifest, document)
        return version

    def _end(
        self,
        work: Work,
        running: RunningRound,
        contents: Sequence[transcript.Content],
        event: DPEvent | None,
        traffic: dict[str, Traffic],
        *,
        code: str = "",
        detail: str = "",
        outcome: _Outcome | None = None,
        misbehaved: tuple[str, ...] = (),
    ) -> None:
        writer, state = work.writer, running.state
        head = writer.transcript_head()
        records = transcript.write(
            running.round_id, contents, transcript.GENESIS if head is None else transcript.digest(head)
        )
        delta = running.encoding.privacy.delta
        events = [*spent_events(writer), *(() if event is None else (event,))]
        report = RoundReport(
            phases=state.phases(),
            subcohorts=state.reports(),
            survivors=state.survivors,
            metrics={} if outcome is None else outcome.released.metrics,
            metric_noise={} if outcome is None else outcome.released.metric_noise,
            traffic=traffic,
            misbehaved=misbehaved,
            excluded=_excluded(work, running),
            declined=state.declined,
            answer=None if outcome is None else outcome.answer,
            evaluation=None if outcome is None else outcome.evaluation,
            epsilon=epsilon_of(events, delta),
            delta=delta,
            buffer=running.buffer,
        )
        ledger = None
        if event is not None:
            ledger = LedgerEntry(
                running.round_id, running.record.model, work.at.unix, event.model_dump_json().encode()
            )
        writer.end_round(
            RoundEnding(
                round_id=running.round_id,
                status="aborted" if outcome is None else "completed",
                ended_at=work.at.unix,
                code=code,
                detail=detail[:300],
                report=report.to_bytes(),
                version=None if outcome is None else outcome.version,
                ledger=ledger,
                transcript=records,
                evaluation=None if outcome is None else _record(outcome.evaluation),
                contributors=state.survivors,
            )
        )
        end = RoundEnd(round_id=running.round_id, completed=outcome is not None, reason=code)
        for device_id in sorted(state.invited):
            work.send(device_id, end)


def _note_leaf(work: Work, running: RunningRound, tree: NoiseTree) -> None:
    """Counts a leaf of a noise tree as released, in the transaction that ends the round.

    Whatever is killed when, a leaf is released once, and a release that is repeated has the same noise.

    Raises:
        LostTree: the tree is no longer as the release found it.
    """
    if work.writer.noise_tree(tree.campaign_id) != tree:
        raise LostTree(f"the noise tree of round {running.round_id} is another by now")
    if running.encoding.privacy.tree is not None:
        work.writer.note_leaf_released(tree.campaign_id, running.encoding.privacy.tree.leaf)


def _step(
    writer: Writer, campaign_id: str, weights: NDArray[np.float32], released: Release
) -> OptimizerState:
    """Moves the model, and keeps what the optimizer remembers in the transaction that makes the version.

    A round that is aborted, or finished again after a crash, leaves the memory as it was.
    """
    campaign = writer.campaign(campaign_id)
    if campaign is None:
        raise ValueError(f"campaign {campaign_id} is gone")
    optimizer = CampaignSettings.from_bytes(campaign.settings).server.make()
    known = writer.optimizer_memory(campaign_id) or OptimizerMemory(campaign_id, 0)
    before = resumed(optimizer, weights, known.rounds, known.momentum, known.second_moment)
    moved = optimizer.apply(before, released.mean_update)
    writer.keep_optimizer_memory(
        OptimizerMemory(campaign_id, moved.rounds, memory(moved.momentum), memory(moved.second_moment))
    )
    return moved


def _record(found: VersionEvaluation | None) -> Evaluation | None:
    if found is None:
        return None
    return Evaluation(found.round_id, found.model, found.version, found.at, found.to_bytes())


def _excluded(work: Work, running: RunningRound) -> tuple[str, ...]:
    """Keeps the devices that broke the rules out of later rounds, until an operator lets them in again."""
    liars = sorted(running.state.liars)
    for device_id in liars:
        logger.warning("round %s: %s lied and is excluded", running.round_id[:8], device_id)
        reason = f"its shares in round {running.round_id} contradict those of the others"
        work.writer.set_exclusion(device_id, reason)
    return tuple(liars)


def _spent(running: RunningRound) -> DPEvent | None:
    """What a round spent: that of the sub-cohort that was asked to unmask with the fewest survivors.

    A device is in one sub-cohort, so its loss is what that sub-cohort's sum costs, and the round's is the
    largest of them (parallel composition; McSherry 2009, doi 10.1145/1559845.1559850, Theorem 4). Answers to
    the request may have come even where it failed: such a sum counts as released.
    """
    events = [event_for(running.encoding, len(part.survivors)) for part in running.state.spent]
    return min(events, key=lambda event: event.survivors, default=None)


def _beginning(running: RunningRound, event: DPEvent | None) -> list[transcript.Content]:
    """The records up to the release."""
    state = running.state
    contents: list[transcript.Content] = [
        transcript.PlanRecord(plan_sha256=state.document.digest.hex(), task=state.plan.task)
    ]
    contents += (
        transcript.RosterRecord(roster_hash=part.cohort.roster_hash, size=part.cohort.graph.size)
        for part in state.subcohorts
        if part.cohort is not None
    )
    contents += (
        transcript.SurvivorsRecord(survivors_hash=part.survivors_hash, size=len(part.survivors))
        for part in state.subcohorts
        if part.survivors_hash is not None
    )
    if event is not None:
        contents.append(transcript.PrivacyRecord(event=event))
    return contents
