"""Where training stops for a while, or for good, when the device's circumstances ask for it."""

from __future__ import annotations

import threading

from edge_client.events import Fault


class TrainingStopped(Exception):
    """Training was given up because its conditions did not come back in time.

    Attributes:
        fault: what kept it.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.fault = fault


class Gate:
    """Open or closed by the main loop; passed by the worker before each call of a graph."""

    def __init__(self, patience: float = 600.0) -> None:
        """Makes an open gate.

        Args:
            patience: seconds that the worker waits at a closed gate.
        """
        self._patience = patience
        self._open = threading.Event()
        self._open.set()
        self._fault: Fault | None = None

    def set(self, fault: Fault | None) -> None:
        """Closes the gate for a reason, or opens it with None."""
        self._fault = fault
        if fault is None:
            self._open.set()
        else:
            self._open.clear()

    def wait(self) -> None:
        """Returns at once while the gate is open, else as soon as it is.

        Raises:
            TrainingStopped: it stayed closed for longer than the worker waits.
        """
        if self._open.wait(self._patience):
            return
        fault = self._fault
        if fault is not None:
            raise TrainingStopped(fault)
