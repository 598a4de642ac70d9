"""The typed errors of the privacy mechanisms: all are raised before any data leaves the device."""

from __future__ import annotations


class PrivacyError(ValueError):
    """Something that would break or void the privacy guarantee."""


class InvalidParameters(PrivacyError):
    """Figures for which no encoding exists: clip norm, noise, cohort or dimension out of range."""


class RingTooNarrow(InvalidParameters):
    """The ring cannot hold the sum at the stated overflow probability."""


class CohortTooSmall(InvalidParameters):
    """A cohort that cannot give the fewest survivors that a sum needs."""


class NonFiniteUpdate(PrivacyError):
    """The update or a metric holds NaN or infinity: refused on the device, counted, never sent."""


class UpdateShapeError(PrivacyError):
    """The update, the metrics or the sum are not of the shape that the plan declares."""


class TooFewSurvivors(PrivacyError):
    """Fewer survivors than the noise was sized for: the sum must not be decoded."""


class NoiseKeyError(PrivacyError):
    """Central noise without its key, or a key where no noise belongs."""


class RoundingFailed(PrivacyError):
    """Conditional rounding found no vector within the norm bound; it cannot happen to a clipped update."""
