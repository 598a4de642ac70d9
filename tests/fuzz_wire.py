"""Coverage-guided fuzzing of all that the network can hand to Covey, with atheris (libFuzzer).

    python -m tests.fuzz_wire [--seconds 60] [--target NAME] [libFuzzer options after --]

Whatever the bytes, nothing but the typed errors may come of them, within MEMORY_MIB of memory and a few
seconds. The targets:

    frames    frames of both directions: parsed, and what parsed is encoded and parsed again
    documents plans, model manifests and transcript records
    keys      certificates, signing requests and public keys
    enrolments tickets, enrolment requests and answers
    server    frames of devices, in every phase of the server's machine
    client    frames to a device, in every phase of the client's machine

A finding is kept as `crash-...` in the working directory; `python -m tests.fuzz_wire --target NAME -- FILE`
runs it again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

MEMORY_MIB = 512
MAX_INPUT_BYTES = 64 * 1024
SECONDS = 60
NAMES = ("frames", "documents", "keys", "enrolments", "server", "client")


def mutate(data: bytes, limit: int, seed: int, *, framed: bool) -> bytes:
    """Changes one value of a message, or one of its column's rows; other bytes are left to libFuzzer.

    Blind changes of bytes hardly ever leave JSON that parses, so that nothing behind the parser would be met.
    """
    import atheris

    draw = np.random.default_rng(seed)
    end = 4 + int.from_bytes(data[:4], "little") if framed else len(data)
    body = data[end:]
    try:
        header = json.loads(data[4:end] if framed else data)
        places = list(_places(header))
    except (ValueError, RecursionError):
        places = []
    if not places or draw.random() < 0.2:
        mutated: bytes = atheris.Mutate(data, limit)
        return mutated
    if body and draw.random() < 0.5:
        return (data[:end] + changed_column(body, draw))[:limit]
    holder, key = places[draw.integers(len(places))]
    other, name = places[draw.integers(len(places))]
    holder[key] = _changed(holder[key], json.loads(json.dumps(other[name])), draw)
    text = json.dumps(header).encode()
    return ((len(text).to_bytes(4, "little") if framed else b"") + text + body)[:limit]


def changed_column(body: bytes, draw: np.random.Generator) -> bytes:
    """A column with one row dropped, repeated, moved to another client, or of another value."""
    rows = int.from_bytes(body[:2], "little")
    if not rows or (len(body) - 2) % rows:
        return body[:-1]
    width = (len(body) - 2) // rows - 2
    peers = [body[2 + 2 * i : 4 + 2 * i] for i in range(rows)]
    values = [body[2 + 2 * rows + width * i :][:width] for i in range(rows)]
    at, kind = int(draw.integers(rows)), int(draw.integers(5))
    if kind == 0:
        del peers[at], values[at]
    elif kind == 1:
        peers.insert(at, peers[at])
        values.insert(at, values[at])
    elif kind == 2:
        peers[at] = int(draw.integers(2**16) if draw.random() < 0.5 else draw.integers(8)).to_bytes(
            2, "little"
        )
    elif kind == 3:
        values[at] = values[int(draw.integers(rows))]
    else:
        values[at] = draw.bytes(width)
    return len(peers).to_bytes(2, "little") + b"".join(peers) + b"".join(values)


def _changed(value: Any, other: Any, draw: np.random.Generator) -> Any:
    """Another value for a field: a little different, strange, or that of another field."""
    if isinstance(value, list) and value and draw.random() < 0.5:
        return [*value, value[0]] if draw.random() < 0.5 else value[1:]
    if isinstance(value, str) and value and draw.random() < 0.6:
        at = int(draw.integers(len(value)))
        return value[:at] + "ABab01-_="[draw.integers(9)] + value[at + 1 :]
    strange = (None, True, -1, 0, 1, 2**16, 2**63, 1.5, "", "A" * 44, [], {}, other, other)
    return strange[draw.integers(len(strange))]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def run(target: str, seconds: int, options: list[str]) -> None:
    """Fuzzes one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["protocol", "models"], enable_loader_override=False):
        from tests.fuzz_targets import FRAMED, TARGETS, seeds

    custom: Callable[..., bytes] | None = None
    if target in FRAMED or target == "documents":
        custom = partial(mutate, framed=target in FRAMED)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds(target)):
            (Path(corpus) / f"seed-{number:03d}").write_bytes(seed)
        arguments = [
            f"-max_total_time={seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-rss_limit_mb={MEMORY_MIB}",
            "-timeout=5",
            "-verbosity=0",
            "-print_final_stats=1",
            *options,
        ]
        again = [option for option in options if not option.startswith("-")]
        atheris.Setup(
            [sys.argv[0], *arguments, *([] if again else [corpus])],
            TARGETS[target],
            custom_mutator=custom,
        )
        atheris.Fuzz()


def main() -> None:
    """Fuzzes one target, or each for an equal share of the time in a process of its own."""
    parser = argparse.ArgumentParser(description="Fuzz what the network can hand to Covey.")
    parser.add_argument("--seconds", type=int, default=SECONDS, help=f"in all ({SECONDS})")
    parser.add_argument("--target", choices=[*NAMES, "planted"], help="only this one")
    parser.add_argument("options", nargs="*", help="of libFuzzer, or files to run again, after --")
    chosen = parser.parse_args()
    if chosen.target is not None:
        run(chosen.target, chosen.seconds, chosen.options)
        return
    for name in NAMES:
        share = str(max(1, chosen.seconds // len(NAMES)))
        print(f"{name}: {share} s", flush=True)
        command = [sys.executable, "-m", "tests.fuzz_wire", "--target", name, "--seconds", share]
        done = subprocess.run([*command, "--", *chosen.options], check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
