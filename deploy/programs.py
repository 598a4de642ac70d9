"""Which programs of this machine a job needs, and what they are called in Debian."""

from __future__ import annotations

import shutil
from collections.abc import Mapping


def missing_programs(packages: Mapping[str, str]) -> str | None:
    """What to say when a program is missing; None when all are there.

    Args:
        packages: of Debian, by the program that is needed of each.
    """
    missing = [package for program, package in packages.items() if shutil.which(program) is None]
    return f"missing programs; on Debian: apt-get install {' '.join(missing)}" if missing else None
