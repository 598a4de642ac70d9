"""Where `covey` begins: it imports the commands when it runs one.

The processes that unmask (`aggregator.adapters.cores`) import what the command's own script imports, and need
none of it: half of their memory.
"""

from __future__ import annotations


def main() -> None:
    """Runs the command line."""
    from aggregator.cli import main as run

    run()
