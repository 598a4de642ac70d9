"""Tells open pages that something has happened, at most twice a second, however much does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from aggregator.web.events import EventFeed

PAUSE_SECONDS = 0.5
VALID_SECONDS = 15.0


async def ticks(
    feed: EventFeed,
    valid: Callable[[], bool],
    *,
    pause: float = PAUSE_SECONDS,
    check: float = VALID_SECONDS,
) -> AsyncIterator[str]:
    """Server-Sent Events, one a kind of event since the last; pages fetch what they show themselves.

    Args:
        feed: what happens.
        valid: whether the listener may still listen; asked, on a thread, every `check` seconds.
        pause: seconds between two looks at the feed.
        check: seconds.
    """
    loop = asyncio.get_running_loop()
    at, asked = feed.position(None) or 0, loop.time()
    yield "retry: 2000\n\n"
    while not feed.closed:
        await asyncio.sleep(pause)
        events = feed.after(at)
        if events is None:
            # More than the feed keeps: everything may have changed.
            at = feed.position(None) or 0
            kinds = ["device", "version", "campaign", "round"]
        else:
            at = events[-1].number if events else at
            kinds = list(dict.fromkeys(event.kind for event in events))
        for kind in kinds:
            yield f"event: {kind}\ndata: {at}\n\n"
        if loop.time() - asked >= check:
            asked = loop.time()
            if not await asyncio.to_thread(valid):
                return
            yield ": alive\n\n"
