"""Runs a model of two numbers, in a process of its own: a runtime built for another processor ends it.

`probe.tflite` is x (1, 4) float32 times a fixed matrix plus a fixed vector.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).with_name("probe.tflite")
_SECONDS = 120


def probe() -> str | None:
    """Loads the runtime and runs the model; returns why that fails, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode < 0:
        return f"it ends its process by {signal.Signals(-done.returncode).name}"
    if done.returncode != 0 or done.stdout.strip() != "[8.0, 0.0]":
        return (done.stderr.strip().splitlines() or [f"it gives {done.stdout.strip()!r}"])[-1]
    return None


def main() -> None:
    """The process: prints what the model makes of 1, 2, 3, 4."""
    import numpy as np

    from edge_client.adapters import tflite

    interpreter = tflite.interpreter(MODEL.read_bytes())
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], np.array([[1, 2, 3, 4]], np.float32))
    interpreter.invoke()
    sys.stdout.write(f"{interpreter.get_tensor(made['index'])[0].tolist()}\n")


if __name__ == "__main__":
    main()
