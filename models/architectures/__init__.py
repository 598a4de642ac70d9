"""Covey's own models as ordinary Keras. Needs TensorFlow; see `models.recipes` for the rest."""

from __future__ import annotations

from models.architectures import digits, watch
from models.architectures.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {"watch": watch.ARCHITECTURE, "digits": digits.ARCHITECTURE}
