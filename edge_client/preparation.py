"""Updates that are ready before anybody asks for them: from a standing order to the file that waits. Pure.

    TrainingOrder --agreed to--> Order --version here, no round--> trained --on disk--> PendingUpdate
                                   ^                                                         |
                                   +---- too old, of another order, or used in a buffer <----+

A buffer (`TrainTask.order`) collects the pending update through a round like any other, in which nothing is
trained. It is dropped in the transaction that commits to the masked input made of it: one update is never in
two buffers. An order lives in memory only, as the aggregator repeats it at every check-in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edge_client.durable import DropPending, PendingUpdate, SavePending
from edge_client.events import Fault, PreparationFailed, Stamp, UpdatePrepared
from edge_client.library import Library
from edge_client.outputs import Output, Outputs, PrepareUpdate, Send, note, warning
from edge_client.round_work import training_config
from models.assignment import Training
from protocol.identity import SignedDocument
from protocol.messages import Refusal, UpdateReady
from protocol.plan import Plan


@dataclass(frozen=True)
class Order:
    """A standing order that this device has agreed to, and whose update is not ready yet.

    Attributes:
        document: the signed order.
        plan: its content, verified.
        assignment: what is to be trained.
        working: the worker trains.
    """

    document: SignedDocument
    plan: Plan
    assignment: Training
    working: bool = False

    @property
    def blobs(self) -> frozenset[str]:
        """Digests of the files that training needs."""
        manifest = self.assignment.manifest
        return frozenset((manifest.graph.sha256, manifest.weights.sha256))


Orders = Mapping[str, Order]
"""By model."""


def ready_message(update: PendingUpdate) -> UpdateReady:
    """What a device says of a pending update."""
    return UpdateReady(order=update.order, version=update.manifest.version)


def ordered(
    orders: Orders, library: Library, order: Order, engaged: str | None
) -> tuple[Orders, Library, Outputs]:
    """Takes in an order that was agreed to.

    Args:
        order: new, or one that is repeated.
        engaged: the order whose update the active round collects.
    """
    model, pending = order.assignment.task.model, library.pending.get(order.assignment.task.model)
    held = orders.get(model)
    newest = max((each.plan.issued_at for each in (held, pending) if each is not None), default=0)
    if order.plan.issued_at < newest:
        return orders, library, ()  # replayed
    outputs: Outputs = ()
    if pending is not None:
        if pending.order == engaged:
            return orders, library, ()
        why = _unusable(pending, order)
        if why is None:
            return orders, library, ()
        library, outputs = dropped(library, model, why)
    if held is not None and held.working and held.plan.round_id == order.plan.round_id:
        return orders, library, outputs
    return {**orders, model: order}, library, outputs


def _unusable(pending: PendingUpdate, order: Order) -> str | None:
    """Why an update that waits is not what an order asks for."""
    before, task = pending.plan.task, order.assignment.task
    if pending.order != order.plan.round_id:
        return "another campaign trains the model"
    if before.kind != "train" or (before.training, pending.plan.privacy) != (
        task.training,
        order.plan.privacy,
    ):
        return "the order has changed"
    staleness = task.base_version - pending.manifest.version
    if not 0 <= staleness <= task.training.maximum_staleness:
        return f"it is {staleness} versions old, {task.training.maximum_staleness} are allowed"
    return None


def dropped(library: Library, model: str, why: str) -> tuple[Library, Outputs]:
    """Drops a pending update, and says so."""
    version = library.pending[model].manifest.version
    told = warning("update-dropped", model=model, version=version, reason=why)
    return library.without_pending(model), (DropPending(model), told)


def advance(orders: Orders, library: Library, stamp: Stamp) -> tuple[Orders, Outputs]:
    """Begins to train whatever can begin; for when this device is in no round and fit to train."""
    outputs: list[Output] = []
    for model, order in orders.items():
        manifest = order.assignment.manifest
        if order.working or not library.ready(model, manifest.sha256()):
            continue
        job = PrepareUpdate(
            order.plan.round_id,
            manifest,
            training_config(order.plan.privacy, order.assignment, stamp),
            order.plan.privacy.clip_norm,
            library.local(manifest),
        )
        started = note("preparing-update", model=model, version=manifest.version)
        return {**orders, model: replace(order, working=True)}, (*outputs, started, job)
    return orders, ()


def ticked(orders: Orders, library: Library, stamp: Stamp) -> tuple[Orders, Library, Outputs]:
    """Lets go of what has expired, or cannot be trained any more."""
    outputs: Outputs = ()
    for model, pending in library.pending.items():
        if stamp.unix >= pending.plan.expires_at:
            library, told = dropped(library, model, "its order has expired")
            outputs += told
    kept = dict(orders)
    for model, order in orders.items():
        digest = order.assignment.manifest.sha256()
        if stamp.unix >= order.plan.expires_at:
            del kept[model]
        elif library.find(model, digest) is None and not order.working:
            del kept[model]
            reason = library.shelf(model).bad.get(digest, "it was replaced before it was here")
            fault = Fault("model-unusable", f"the version does not run: {reason}")
            outputs = (*outputs, *_refused(order, fault))
    return (kept if len(kept) < len(orders) else orders), library, outputs


def prepared(
    orders: Orders, library: Library, event: UpdatePrepared, stamp: Stamp
) -> tuple[Orders, Library, Outputs]:
    """The update is on disk: remember it."""
    order = orders.get(event.model)
    if order is None or order.plan.round_id != event.order or not order.working:
        return orders, library, ()  # of an order that is not held any more
    manifest = order.assignment.manifest
    update = PendingUpdate(order.document, order.plan, manifest, event.blob, stamp.unix)
    left = {model: each for model, each in orders.items() if model != event.model}
    return (
        left,
        library.with_pending(update),
        (
            SavePending(update),
            note("update-ready", model=event.model, version=manifest.version),
        ),
    )


def failed(orders: Orders, event: PreparationFailed) -> tuple[Orders, Outputs]:
    """Training failed: say so; the aggregator may order it again, later."""
    order = orders.get(event.model)
    if order is None or order.plan.round_id != event.order or not order.working:
        return orders, ()
    return {m: each for m, each in orders.items() if m != event.model}, _refused(order, event.fault)


def _refused(order: Order, fault: Fault) -> Outputs:
    detail = fault.detail[:300]
    return (
        warning("update-not-prepared", order=order.plan.round_id, code=fault.code, reason=detail),
        Send(Refusal(round_id=order.plan.round_id, code=fault.code, detail=detail)),
    )
