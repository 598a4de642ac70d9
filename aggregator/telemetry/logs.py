"""Logs: one line an event, as text for people or as JSON for machines, with the ids that it is about.

`round`, `campaign` and `device` are bound where the service begins to work on one (`structlog.contextvars`),
so that every line below carries them. Nothing logs a payload or a secret. What a device wrote can be part of
a message: it is cut, and cannot begin a line of its own.
"""

from __future__ import annotations

import logging
import sys
from enum import StrEnum

import structlog
from structlog.typing import EventDict, Processor

LONGEST = 2000
"""Characters of one message; a traceback has a field of its own."""


class LogForm(StrEnum):
    """How a line looks."""

    CONSOLE = "console"
    JSON = "json"


def start(form: LogForm, level: int) -> None:
    """Sends everything that this process logs to standard error.

    Args:
        form: how a line looks.
        level: of the standard library; less than this is left out.
    """
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _harmless,
    ]
    after: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if form is LogForm.JSON:
        after += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Its own rendering of tracebacks would print the values of variables.
        plain = structlog.dev.plain_traceback
        after.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    handler = logging.StreamHandler()
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=after))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # At debug, they would log whole requests and packets.
    for name in ("asyncio", "botocore", "httpcore", "httpx", "s3fs", "urllib3", "multipart"):
        logging.getLogger(name).setLevel(max(level, logging.INFO))


def _harmless(_: object, __: str, event: EventDict) -> EventDict:
    text = str(event["event"])
    if len(text) > LONGEST:
        text = text[:LONGEST] + "..."
    event["event"] = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return event
