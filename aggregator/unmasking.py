"""Recovers secrets and takes masks off sums beside the main loop: seconds that nobody should wait for.

A job sees a round's frozen state and its durable partial sums, and changes nothing. What it finds takes
effect in the one transaction in which the main loop ends the round. So whatever crashes, or is loaded again,
and when, loses work and no more: the job begins anew and comes to the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from aggregator.records import NoiseTree
from aggregator.repository import Repository
from aggregator.rounds import machine
from aggregator.rounds.machine import RoundState
from aggregator.rounds.partial_sum import load_sum
from aggregator.rounds.release import Release, Unmask, release, together
from aggregator.rounds.subcohort_state import SubcohortState
from aggregator.running import RunningRound
from protocol.dp.mechanism import EncodingParameters
from protocol.dp.parameters import PrivacyMode
from protocol.secagg.masking import apply_masks
from protocol.secagg.server_state import Recovered

P = ParamSpec("P")
T = TypeVar("T")


class LostTree(Exception):
    """A round whose noise tree is another by now, so that its sum cannot be released."""


@dataclass(frozen=True, eq=False)
class Unmasked:
    """What came of a round's unmasking.

    Attributes:
        state: of the round, in which every sub-cohort has recovered its masks or failed.
        released: None where too few sub-cohorts have a sum.
        tree: the noise tree that the release used, as it was.
    """

    state: RoundState
    released: Release | None = None
    tree: NoiseTree | None = None


class Inline(Executor):
    """Runs a job when it is handed in, on the caller's thread."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Runs `fn`; the future that it returns is done."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Unmasker:
    """The unmasking of every round that has ended; it belongs to the main loop."""

    def __init__(
        self,
        entropy: Callable[[], bytes],
        unmask: Unmask = apply_masks,
        executor: Executor | None = None,
    ) -> None:
        """Prepares to unmask.

        Args:
            entropy: returns 32 fresh secret bytes, for central noise.
            unmask: takes masks off a sum.
            executor: where jobs run: a single thread, so that one sum at a time is in memory; by default at
                once.
        """
        self._entropy = entropy
        self._unmask = unmask
        self._executor = Inline() if executor is None else executor
        self._jobs: dict[str, Future[Unmasked]] = {}

    def begin(self, repository: Repository, running: RunningRound) -> None:
        """Hands in the job of a round that has ended durably, once, if there is anything to do."""
        if running.round_id in self._jobs or not running.state.answered:
            return
        self._jobs[running.round_id] = self._executor.submit(
            unmask_round,
            repository,
            running.record.campaign_id,
            running.encoding,
            running.state,
            self._entropy,
            self._unmask,
        )

    def ready(self, running: RunningRound) -> bool:
        """Whether the round can be ended: its job is over, or it has none."""
        job = self._jobs.get(running.round_id)
        return not running.state.answered if job is None else job.done()

    def result(self, running: RunningRound) -> Unmasked:
        """What came of it, once it is `ready`; the same each time.

        Raises:
            Exception: whatever the job stumbled over.
        """
        job = self._jobs.get(running.round_id)
        return Unmasked(running.state) if job is None else job.result(timeout=0)

    def forget(self, round_id: str) -> None:
        """Drops what is known of a round, which has ended for good."""
        self._jobs.pop(round_id, None)

    def forget_all(self) -> None:
        """Drops everything, before it is loaded again; a job that runs goes to its end in vain."""
        for job in self._jobs.values():
            job.cancel()
        self._jobs.clear()


def unmask_round(
    repository: Repository,
    campaign_id: str,
    encoding: EncodingParameters,
    state: RoundState,
    entropy: Callable[[], bytes],
    unmask: Unmask,
) -> Unmasked:
    """Recovers the secrets of a round that has ended, takes the masks off its sums, and decodes.

    Args:
        repository: has the partial sums.
        campaign_id: of the round, which may have a noise tree.
        encoding: of the round.
        state: of the round.
        entropy: returns 32 fresh secret bytes, for central noise.
        unmask: takes masks off a sum.

    Raises:
        LostTree: the round's noise tree is gone.
        RepositoryError: storage failed.
    """
    state = machine.recover(state)
    if not state.completes:
        return Unmasked(state)
    tree: NoiseTree | None = None
    if encoding.privacy.tree is not None:
        with repository.read() as reader:
            tree = reader.noise_tree(campaign_id)
        if tree is None or tree.tree != encoding.privacy.tree.tree:
            raise LostTree(f"the key of the noise tree of round {state.plan.round_id} is not there")

    def sum_of(part: SubcohortState) -> Release:
        if not isinstance(part.secagg, Recovered):
            raise ValueError(f"sub-cohort {part.number} of round {state.plan.round_id} has no sum")
        with repository.read() as reader:
            total = load_sum(reader, state.plan.round_id, encoding, part.number)
        if tree is not None:
            return release(part.secagg, total, encoding, tree.key, unmask, after_leaf=tree.released)
        noise_key = entropy() if encoding.privacy.mode is PrivacyMode.CENTRAL else None
        return release(part.secagg, total, encoding, noise_key, unmask)

    parts = state.recovered
    return Unmasked(state, together(map(sum_of, parts), [len(part.survivors) for part in parts]), tree)
