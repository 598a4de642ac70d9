"""Shoulder exercises on a wrist: ten real people, seven exercises, a watch's inertial sensors.

Burns et al. 2018 (arXiv 1802.01489), as shipped in seglearn (BSD-3): 140 recordings at 50 Hz, each of one
person, one exercise and one side. Channels: acceleration x, y, z in g, rotation rate x, y, z in rad/s.
Recordings are cut into windows of 2 s that overlap by half, so windows are only ever split between *people*.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.datasets.source import read_packaged
from models.examples import Examples

PACKAGE = "seglearn"
FILE = "data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
LABELS = (
    "pendulum",
    "abduction",
    "forward elevation",
    "internal rotation",
    "external rotation",
    "trapezius extension",
    "upright row",
)
WINDOW = 100
STRIDE = 50
CHANNELS = 6


def load() -> list[Examples]:
    """One `Examples` a person, `person-01` to `person-10`; x is (n, 100, 6) raw, 4,677 windows in all.

    Raises:
        DataSetUnavailable: seglearn is not installed, or its file is not the reviewed one.
    """
    content = _reviewed_content(read_packaged(PACKAGE, FILE, SHA256))
    people = np.asarray(content["subject"], dtype=np.int64)
    labels = np.asarray(content["y"], dtype=np.int32)
    recordings = content["X"]
    result = []
    for person in np.unique(people):
        chosen = np.flatnonzero(people == person)
        windows = [windows_of(np.asarray(recordings[index], dtype=np.float32)) for index in chosen]
        y = np.repeat(labels[chosen], [len(part) for part in windows]).astype(np.int32)
        result.append(Examples(f"person-{int(person):02d}", np.concatenate(windows), y))
    return result


def windows_of(recording: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut a recording (t, 6) into windows, shape (n, 100, 6), one every 50 samples; a rest is left out."""
    if len(recording) < WINDOW:
        return np.empty((0, WINDOW, recording.shape[1]), np.float32)
    views = np.lib.stride_tricks.sliding_window_view(recording, WINDOW, axis=0)[::STRIDE]
    return np.ascontiguousarray(views.transpose(0, 2, 1))


def _reviewed_content(data: bytes) -> dict[str, Any]:
    """Unpickle the file whose digest was checked: the one place where anything is unpickled.

    Safe only because these very bytes were reviewed: with another digest they would not have come this far.
    """
    content: dict[str, Any] = np.load(io.BytesIO(data), allow_pickle=True).item()
    return content
