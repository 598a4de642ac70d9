"""A token bucket: so much a second on average, and no more than its capacity at once."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TokenBucket:
    """What may be taken now. Time is an argument: seconds of any clock that does not jump.

    Attributes:
        rate: tokens a second.
        capacity: tokens that it holds at most.
        level: tokens that were in it at `at`.
    """

    rate: float
    capacity: float
    level: float
    at: float

    @classmethod
    def full(cls, rate: float, capacity: float, now: float) -> TokenBucket:
        """A bucket that nothing was taken from yet.

        Raises:
            ValueError: it would never hold anything.
        """
        if not (rate > 0 and capacity > 0):
            raise ValueError("rate and capacity are above zero")
        return cls(rate, capacity, capacity, now)

    def refilled(self, now: float) -> TokenBucket:
        """The bucket at a later moment."""
        level = min(self.capacity, self.level + self.rate * max(0.0, now - self.at))
        return replace(self, level=level, at=max(self.at, now))

    def affords(self, size: float, now: float) -> int:
        """How many portions of `size` tokens can be taken now."""
        # A hair more, or sums of small refills could stay below a portion for ever.
        return int(self.refilled(now).level / size + 1e-9)

    def spend(self, tokens: float, now: float) -> TokenBucket:
        """The bucket without these tokens, which it affords."""
        full = self.refilled(now)
        return replace(full, level=max(0.0, full.level - tokens))
