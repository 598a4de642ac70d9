"""What holds for all tests: which of them this installation can run, and how much chance they get."""

from __future__ import annotations

import os
from importlib.util import find_spec

from hypothesis import HealthCheck, settings

# The bare install is the device's: it has neither the service's packages nor the exporter's.
collect_ignore_glob = (
    []
    if find_spec("sqlalchemy")
    else [
        "unit/test_aggregator_*.py",
        "unit/test_privacy_*.py",
        "unit/test_models_cli.py",
        "contract/*",
        *(
            f"unit/test_{name}.py"
            for name in (
                "campaign_optimizers",
                "campaigns",
                "console",
                "console_forms",
                "dp_example",
                "dp_tree",
                "enrolment_api",
                "query_answers",
                "query_cli",
                "retention",
                "round_losses",
                "selection",
                "staleness",
            )
        ),
    ]
)

# A slow machine is no failure: examples have no time limit, nor has making them.
settings.register_profile("covey", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# In CI the examples follow from the code, so that a red run is red again when somebody looks at it.
settings.register_profile("ci", settings.get_profile("covey"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "covey")
