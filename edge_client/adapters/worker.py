"""One thread that does what takes long: loading a model, training, reading a field, masking.

One job at a time, in order. The main loop stays free to answer the protocol meanwhile. A job never raises:
whatever goes wrong in it becomes a fault with a code, and the device goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from edge_client.adapters import memory
from edge_client.adapters.blobs import Blobs
from edge_client.adapters.files import StorageError, StorageFull
from edge_client.adapters.model_check import check_in_child
from edge_client.adapters.readings import FieldReader
from edge_client.adapters.uses import VersionUses
from edge_client.events import (
    Evaluated,
    Event,
    Fault,
    FieldRead,
    InputWritten,
    Personalised,
    PreparationFailed,
    TrainingFinished,
    UpdatePrepared,
    UpdateRead,
    VersionTested,
    WorkFailed,
)
from edge_client.fields import InvalidFields, UnreadableField
from edge_client.masked_input import Contribution, contribution_of, packed_slices, weighted
from edge_client.outputs import (
    Evaluate,
    MaskInput,
    Personalise,
    PrepareUpdate,
    ReadField,
    ReadUpdate,
    TestVersion,
    Train,
)
from edge_client.pausing import Gate, TrainingStopped
from edge_client.pending_file import InvalidUpdate, dump_update, load_update
from edge_client.personalisation import personalise
from edge_client.sources import DataSource
from edge_client.training import (
    ExamplesRejected,
    LocalTrainer,
    ModelRejected,
    TrainingDiverged,
    WeightsRejected,
)
from models.examples import InvalidExamples
from models.manifest import ModelManifest
from models.weights import InvalidWeights, decode_local, decode_weights, encode_weights
from protocol.dp.errors import NonFiniteUpdate, PrivacyError
from protocol.dp.sampling import discrete_gaussian_sampler, skellam_sampler
from protocol.fields import BlobRef

# What the owner's conditions hold up, between two calls of the graph.
Training = Train | PrepareUpdate | Evaluate | Personalise
RoundJob = Train | ReadUpdate | Evaluate | ReadField | MaskInput
Job = TestVersion | Personalise | PrepareUpdate | RoundJob
TrainerFactory = Callable[[ModelManifest, bytes], LocalTrainer]
ModelCheck = Callable[[ModelManifest, bytes, bytes], None]

_LOG = logging.getLogger("covey.edge.worker")
_DIVERGED = "training gave no finite update"
_UNUSABLE = "the examples on the device cannot be used"
_FULL, _BROKEN = "no space is left", "the device's storage fails"
# The first class that an error is an instance of decides. A fault travels to the aggregator: where an error's
# text may tell of data (a weight before any noise, the name of a recording), a fixed one stands for it.
_CODES: tuple[tuple[type[Exception], str, bool, str | None], ...] = (
    (StorageFull, "disk-full", True, _FULL),
    (StorageError, "storage", True, _BROKEN),
    (TrainingDiverged, "non-finite-update", False, _DIVERGED),
    (NonFiniteUpdate, "non-finite-update", False, _DIVERGED),
    (ExamplesRejected, "data-unusable", False, _UNUSABLE),
    (InvalidExamples, "data-unusable", False, _UNUSABLE),
    (ModelRejected, "model-unusable", False, None),
    (WeightsRejected, "model-unusable", False, None),
    (InvalidWeights, "model-unusable", False, None),
    (UnreadableField, "field-unreadable", False, None),
    (InvalidFields, "field-unreadable", False, "the declaration of fields cannot be used"),
    (InvalidUpdate, "update-lost", False, "the update that waited is damaged"),
    (PrivacyError, "encoding-failed", False, "the contribution cannot be encoded"),
    (MemoryError, "out-of-memory", True, None),
)


def tflite_trainer(
    manifest: ModelManifest, graph: bytes, between: Callable[[], None] = lambda: None
) -> LocalTrainer:
    """The trainer of this machine's TensorFlow Lite runtime, imported when it is first needed."""
    from edge_client.adapters.tflite import TfliteTrainer

    return TfliteTrainer(manifest, graph, between=between)


def fault_of(error: Exception) -> Fault:
    """Names what went wrong, without a word of data; only errors known to be harmless say it themselves."""
    if isinstance(error, TrainingStopped):
        return error.fault
    for kind, code, transient, told in _CODES:
        if isinstance(error, kind):
            return Fault(code, str(error)[:300] if told is None else told, transient)
    # Says nothing about a version: a broken installation must not condemn it for ever.
    return Fault("training-failed", type(error).__name__, transient=True)


def self_test(trainer: LocalTrainer, manifest: ModelManifest, weights: bytes) -> None:
    """Runs a version once.

    Raises:
        ModelRejected, InvalidWeights, WeightsRejected: it does not run, or gives no probabilities.
    """
    example = np.asarray(manifest.input.mean, np.float32)
    x = np.broadcast_to(example, (1, *manifest.input.shape)).astype(np.float32)
    probabilities = trainer.predict(decode_weights(weights, manifest), x)
    if probabilities.shape != (1, len(manifest.labels)) or not np.isfinite(probabilities).all():
        raise ModelRejected("a prediction with the new weights is not finite or has a wrong shape")


def _failed(job: Job, fault: Fault) -> Event:
    """What the core is told of a job that failed."""
    if isinstance(job, TestVersion):
        return VersionTested(job.sha256, fault)
    if isinstance(job, Personalise):
        return Personalised(job.manifest.name, fault, job.manifest.sha256())
    if isinstance(job, PrepareUpdate):
        return PreparationFailed(job.manifest.name, job.order, fault)
    return WorkFailed(job.round_id, fault)


def read_local(blobs: Blobs, blob: BlobRef) -> NDArray[np.float32] | None:
    """The local parameters in a file; None, and a warning, when it does not hold them any more.

    A damaged file must not keep a device out of all rounds: its local parameters start anew.
    """
    try:
        return decode_local(blobs.read_local(blob))
    except (StorageError, InvalidWeights) as error:
        _LOG.warning("local-parameters-lost reason=%r", str(error))
        return None


class Worker:
    """The thread. `start` and `stop` once; `submit` from the main loop."""

    def __init__(
        self,
        blobs: Blobs,
        data: DataSource,
        fields: FieldReader,
        deliver: Callable[[Event], None],
        *,
        trainer: TrainerFactory | None = None,
        check: ModelCheck = check_in_child,
        uses: VersionUses | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Describes a worker.

        Args:
            blobs: model files and masked inputs.
            data: the device's examples.
            fields: what queries may ask for.
            deliver: takes each job's result, on the worker's thread.
            trainer: makes a trainer of a graph; by default of this machine's runtime.
            check: tries a new version's graph and weights where a crash does no harm; raises `ModelRejected`.
            uses: is told which version is in use; nobody when None.
            gate: holds training up while it is closed.
        """
        self._blobs = blobs
        self._data = data
        self._fields = fields
        self._deliver = deliver
        self._factory = trainer or (lambda manifest, graph: tflite_trainer(manifest, graph, self._between))
        self._check = check
        self._uses = uses
        self._gate = gate or Gate()
        self._job: Job | None = None
        self.example_count: int | None = None
        self._loaded: tuple[str, LocalTrainer] | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._round_id = ""
        self._thread = threading.Thread(target=self._run, name="covey-worker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job; what still waits for an earlier round is not done any more.

        Else rounds that fail one after the other, or are made to, would keep a slow device behind for hours.
        """
        if isinstance(job, RoundJob):
            self._round_id = job.round_id
        self._jobs.put(job)

    def stop(self, seconds: float = 2.0) -> None:
        """Asks the thread to end after its present job, and waits a little; it never blocks the exit."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=seconds)

    def _run(self) -> None:
        memory.give_back()
        while (job := self._jobs.get()) is not None:
            if isinstance(job, RoundJob) and job.round_id != self._round_id:
                continue
            self._job = job
            try:
                event: Event = self._do(job)
            except Exception as error:
                fault = fault_of(error)
                if isinstance(error, TrainingStopped):
                    self._loaded = None  # what half a training left in it
                if fault.code == "training-failed":
                    # A defect of the client: the owner needs to see where. No traceback shows data.
                    _LOG.exception("job-failed job=%s", type(job).__name__)
                else:
                    # For the owner, who may know more than the aggregator.
                    _LOG.warning(
                        "job-failed job=%s code=%s reason=%r",
                        type(job).__name__,
                        fault.code,
                        str(error)[:300],
                    )
                event = _failed(job, fault)
            self._job = None
            self._deliver(event)

    @property
    def training(self) -> bool:
        """Whether it computes something that the owner's conditions may hold up."""
        return isinstance(self._job, Training)

    def _between(self) -> None:
        """Before each call of the graph: here training waits, or ends.

        Raises:
            TrainingStopped: it waited for too long, or its round is over.
        """
        job = self._job
        if isinstance(job, RoundJob) and job.round_id != self._round_id:
            raise TrainingStopped(Fault("superseded", "another round took its place", transient=True))
        if isinstance(job, Training):
            self._gate.wait()

    def _do(self, job: Job) -> Event:
        if isinstance(job, TestVersion):
            # The child needs memory that the last version's trainer would otherwise hold beside it.
            self._loaded = None
            file = self._blobs.read(job.manifest.weights)
            self._check(job.manifest, self._blobs.read(job.manifest.graph), file)
            with self._using(job.sha256):
                self_test(self._trainer(job.manifest), job.manifest, file)
            memory.give_back()  # of the interpreter's start
            return VersionTested(job.sha256, None)
        if isinstance(job, MaskInput):
            # The noise table and the masks need the memory that the model takes; it is read again in no time.
            self._loaded = None
            memory.give_back()
            parts = packed_slices(job.contribution, job.encoding, job.masks, job.noise_key)
            blob = self._blobs.write_upload(job.round_id, parts)
            own = job.contribution.local
            local = self._blobs.write_local(encode_weights(own)) if own is not None else None
            skellam_sampler.cache_clear()
            discrete_gaussian_sampler.cache_clear()
            return InputWritten(job.round_id, blob, local)
        if isinstance(job, ReadField):
            return FieldRead(job.round_id, self._fields.read(job.field))
        if isinstance(job, ReadUpdate):
            return UpdateRead(job.round_id, self._read_update(job.blob))
        if isinstance(job, Train | PrepareUpdate) and job.config.hidden is not None:
            # Nothing of an earlier training without noise may be left in the graph's variables.
            self._loaded = None
        with self._using(job.manifest.sha256()):
            return self._use(job)

    def _using(self, sha256: str) -> AbstractContextManager[None]:
        return nullcontext() if self._uses is None else self._uses.of(sha256)

    def _use(self, job: Train | Evaluate | PrepareUpdate | Personalise) -> Event:
        """Runs a version on this device's examples."""
        trainer = self._trainer(job.manifest)
        weights = decode_weights(self._blobs.read(job.manifest.weights), job.manifest)
        examples = self._data.load(job.manifest)
        self.example_count = len(examples)
        own = read_local(self._blobs, job.local) if job.local is not None else None
        if isinstance(job, Personalise):
            with self._blobs.personal.writing():
                personal = personalise(trainer, job.manifest, weights, own, examples, job.config)
                self._blobs.personal.save(personal)
            return Personalised(job.manifest.name, personal.record, job.manifest.sha256())
        if isinstance(job, Evaluate):
            return Evaluated(job.round_id, trainer.evaluate(weights, examples, own))
        update = trainer.train(weights, examples, job.config, job.config.generator(), own)
        if isinstance(job, PrepareUpdate):
            clipped = weighted(contribution_of(update), job.clip_norm, 1.0)
            blob = self._blobs.write_pending(dump_update(clipped))
            return UpdatePrepared(job.manifest.name, job.order, blob)
        return TrainingFinished(job.round_id, update)

    def _read_update(self, blob: BlobRef) -> Contribution:
        try:
            return load_update(self._blobs.read_pending(blob))
        except StorageError as error:
            raise InvalidUpdate(str(error)) from error

    def _trainer(self, manifest: ModelManifest) -> LocalTrainer:
        """The trainer of a version; the last one is kept, since a version is tested and then trained."""
        digest = manifest.sha256()
        if self._loaded is None or self._loaded[0] != digest:
            self._loaded = None  # let go of the old one before the new one takes memory
            self._loaded = (digest, self._factory(manifest, self._blobs.read(manifest.graph)))
        return self._loaded[1]
