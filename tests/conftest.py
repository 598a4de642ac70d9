"""What holds for all tests: how much chance they get."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# A slow machine is no failure: examples have no time limit, nor has making them.
settings.register_profile("covey", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# In CI the examples follow from the code, so that a red run is red again when somebody looks at it.
settings.register_profile("ci", settings.get_profile("covey"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "covey")

# A shell's background job has this ignored, and so would every process that a test starts to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
