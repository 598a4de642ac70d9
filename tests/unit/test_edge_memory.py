"""How the device's process stays small: what is deferred works all the same, and only clean pages go back."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from edge_client.adapters.memory import DEFERRED, library_pages


def run(program: str) -> str:
    """Runs a program in a process of its own: what is deferred there is loaded here."""
    program = f"from edge_client.adapters import memory\nmemory.settle()\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_device_loads_none_of_what_is_deferred() -> None:
    loaded = run(
        "import json, sys, edge_client.daemon\n"
        "from edge_client.adapters import mqtt, tflite, worker\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    modules = set(json.loads(loaded))
    # NumPy 2 does not ask for its own parts before they are touched.
    own = {"numpy"} if int(np.__version__.split(".")[0]) >= 2 else set()
    assert {name for name in DEFERRED if name.split(".")[0] not in own} <= modules
    assert not modules & {"csv", "http", "numpy.ma.core", "numpy.fft.helper"}


def test_what_is_deferred_works_when_it_is_touched() -> None:
    assert run("import numpy as np; print(np.ma.masked_array([1, 2], [0, 1]).sum())") == "1"
    assert run("from numpy.polynomial import Polynomial; print(Polynomial([1, 2])(2))") == "5.0"
    assert run("import numpy.polynomial.hermite as h; print(h.hermval(1, [0, 1]))") == "2.0"
    assert run("import urllib.request; print(callable(urllib.request.urlopen))") == "True"
    assert run("from importlib.metadata import version; print(version('covey') > '0')") == "True"
    assert run("from importlib.metadata import entry_points; print(len(entry_points()) > 0)") == "True"
    assert run("import importlib.metadata._text as t; print(t.FoldedCase('A') == 'a')") == "True"
    assert (
        run("import numpy as np, sys; np.fft.fft([1]); print(np.fft is sys.modules['numpy.fft'])") == "True"
    )


def test_a_name_that_a_deferred_module_does_not_have_is_an_attribute_error() -> None:
    assert run("import urllib.request; print(hasattr(urllib.request, 'no_such_name'))") == "False"


SMAPS = """\
7f0000000000-7f0000002000 r--p 00000000 08:01 11  /usr/lib/libone.so.1
Rss:                   8 kB
Anonymous:             0 kB
7f0000002000-7f0000005000 r-xp 00002000 08:01 11  /usr/lib/libone.so.1
Anonymous:             0 kB
7f0000005000-7f0000006000 r--p 00005000 08:01 11  /usr/lib/libone.so.1
Anonymous:             4 kB
7f0000006000-7f0000007000 rw-p 00006000 08:01 11  /usr/lib/libone.so.1
Anonymous:             0 kB
7f0000007000-7f0000008000 r--s 00000000 08:01 12  /var/lib/covey/upload.so
Anonymous:             0 kB
7f0000008000-7f0000009000 r--p 00000000 08:01 13  /var/lib/covey/recordings
Anonymous:             0 kB
7f0000009000-7f000000a000 r-xp 00000000 00:00 0   [vdso]
Anonymous:             0 kB
"""


def test_only_pages_of_libraries_that_nobody_changed_go_back() -> None:
    """What was relocated, can be written, is shared or is no library stays."""
    assert list(library_pages(SMAPS)) == [(0x7F0000000000, 0x2000), (0x7F0000002000, 0x3000)]


def test_a_process_that_gave_back_is_smaller_and_goes_on() -> None:
    shown = run(
        "import numpy as np\n"
        "from pathlib import Path\n"
        "from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey\n"
        "def pages():\n"
        "    text = Path('/proc/self/status').read_text().split()\n"
        "    return int(text[text.index('RssFile:') + 1])\n"
        "key = Ed25519PrivateKey.generate()\n"
        "before = pages(); memory.give_back(); after = pages()\n"
        "key.public_key().verify(key.sign(b'x'), b'x')\n"
        "print(before, after, np.linalg.inv(np.eye(3)).sum())"
    )
    before, after, total = shown.split()
    assert int(after) < int(before) / 2 and total == "3.0"
