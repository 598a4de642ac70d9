"""Tells systemd how this service is, by the protocol of sd_notify(3); elsewhere it says nothing."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


class Notifier:
    """What `Type=notify` and `WatchdogSec=` listen to.

    READY means that the runtime is loaded and the store is read, not that the broker is there: else systemd
    would end a healthy device for a network that is away.
    """

    def __init__(self, address: str | None = None) -> None:
        """Takes the address of the socket; by default what systemd left in the environment."""
        self._address = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._status = ""

    def ready(self) -> None:
        """The client runs."""
        self._send("READY=1")

    def alive(self) -> None:
        """The loop still turns; to be said well within `WatchdogSec`."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`, if it is another one than before."""
        if text != self._status:
            self._status = text
            self._send("STATUS=" + "".join(filter(str.isprintable, text))[:200])

    def stopping(self) -> None:
        """The client ends."""
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        # A leading @ stands for the zero byte of an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(text.encode(), address)
