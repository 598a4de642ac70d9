"""When the rounds of a campaign are due: a cron expression in a time zone.

Every firing is one round. Firings that nobody could serve, because the service was down or the devices away,
come to one round and not to a burst: after a round has begun, the next firing counts from that moment. Where
a clock is put forward, what would have fired in the hour that is left out fires after it; where it is put
back, nothing fires twice (as Debian's cron does it).
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import Field, model_validator

from protocol.fields import Schema

UTC = "UTC"


class Schedule(Schema):
    """A cron expression (minute, hour, day of month, month, day of week) and its IANA time zone."""

    cron: Annotated[str, Field(max_length=120)]
    zone: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$")] = UTC

    @model_validator(mode="after")
    def _fires(self) -> Self:
        try:
            # An expression without any firing (30 February) says so here, and not years later.
            self.after(0.0)
        except CronSimError as error:
            raise ValueError(f"{self.cron!r} is no cron expression such as '0 2 * * *': {error}") from error
        except StopIteration:
            raise ValueError(f"{self.cron!r} never fires") from None
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"{self.zone!r} is no time zone such as Europe/Berlin: {error}") from error
        return self

    def after(self, unix: float) -> float:
        """The first firing after an instant.

        Args:
            unix: seconds since 1970.

        Returns:
            Seconds since 1970.
        """
        moment = dt.datetime.fromtimestamp(unix, ZoneInfo(self.zone))
        return next(CronSim(self.cron, moment)).timestamp()

    def __str__(self) -> str:
        return f"{self.cron} ({self.zone})"


def schedule_of(cron: str | None, zone: str) -> Schedule | None:
    """The schedule that was asked for; None for rounds one after the other."""
    return None if cron is None else Schedule(cron=cron, zone=zone)
