"""The wish that this process ends, from the first moment on that it can be heard."""

from __future__ import annotations

import signal
from collections.abc import Callable


class StopWish:
    """Hears SIGTERM and SIGINT; belongs to the main thread.

    Reading some hundred modules takes seconds on a Pi. Until somebody listens the wish is kept, so that no
    moment of the start is one in which a signal ends the process in the middle of something.
    """

    def __init__(self) -> None:
        """Hears nothing yet."""
        self.there = False
        self._listener: Callable[[], object] = lambda: None

    def hear(self) -> None:
        """From now on a signal is a wish."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    def tell(self, listener: Callable[[], object]) -> None:
        """Tells somebody of the wish, at once when it is there; once too often does no harm."""
        self._listener = listener
        if self.there:
            listener()

    def _heard(self, *_: object) -> None:
        self.there = True
        self._listener()
