"""What operations say when they cannot be done."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class OperationRefused(Exception):
    """What was asked for cannot be done; the message says what to do."""


class NoSuch(OperationRefused):
    """What was named is not there."""


def there(found: T | None, what: str) -> T:
    """What was found.

    Raises:
        NoSuch: nothing was; `what` begins with "no".
    """
    if found is None:
        raise NoSuch(f"there is {what}")
    return found
