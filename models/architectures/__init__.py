"""Covey's own models as ordinary Keras. Needs TensorFlow; see `models.recipes` for the rest."""

from __future__ import annotations

from models.architectures import anomaly, digits, forecast, gestures, keywords, pictures, watch
from models.architectures.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    module.ARCHITECTURE.name: module.ARCHITECTURE
    for module in (watch, digits, keywords, pictures, anomaly, forecast, gestures)
}
