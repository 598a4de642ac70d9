"""The specification against the service: made-up requests, right and wrong, are answered as it says."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from aggregator.access.roles import Role
from aggregator.web.context import Vitals
from aggregator.web.limit_settings import Limits
from aggregator.web.listen import ListenAddress
from aggregator.web.schemas import PREFIX
from aggregator.web.server import ApiServer
from tests.aggregator_devices import model_files
from tests.api_bench import GENEROUS, Api, api, csr

LIMITS = Limits(per_address=GENEROUS, per_principal=GENEROUS, failures=GENEROUS)
# Text that is longer than its field may be is at times more than is read: 413 refuses it, too.
REFUSED = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]
CONFIG = SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": REFUSED}}})


def healthy() -> Vitals:
    return Vitals(broker=True, loop=True)


BOUNDED = settings(
    derandomize=True,
    max_examples=5,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def bench() -> Iterator[Api]:
    with (
        tempfile.TemporaryDirectory() as directory,
        api(Path(directory), limits=LIMITS, vitals=healthy) as found,
    ):
        with found.client() as client:
            client.enrol(csr("barn-1"))
            client.publish(*model_files(50))
        yield found


def exercise(schema: Any, token: str) -> set[str]:
    """Sends made-up requests to every operation and checks the answers; returns the operations."""
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        seen.add(operation.label)
        for mode in GenerationMode:

            @BOUNDED
            @given(case=operation.as_strategy(generation_mode=mode))
            def sent(case: Any) -> None:
                case.call_and_validate(
                    headers={"Authorization": f"Bearer {token}"},
                    # The first look at a ledger loads the accountant: on a busy machine, that is long.
                    timeout=120,
                    excluded_checks=[
                        # A schema cannot say what is a signing request, or a model: 422 says that, too.
                        positive_data_acceptance,
                        # A query has no types: a number where a text should be arrives as text.
                        *([negative_data_rejection] if case.method == "GET" else []),
                    ],
                )

            # Some operations take nothing that could be wrong.
            with contextlib.suppress(Unsatisfiable):
                sent()
    return seen


def test_the_service_answers_as_its_specification_says(bench: Api) -> None:
    schema = schemathesis.openapi.from_asgi(f"{PREFIX}/openapi.json", bench.app, config=CONFIG)
    # A stream has no end to wait for.
    seen = exercise(schema.exclude(path=f"{PREFIX}/events"), bench.tokens[Role.ADMIN])
    assert len(seen) > 20


def test_and_so_it_does_on_a_real_socket(bench: Api) -> None:
    with ApiServer(bench.app, ListenAddress.parse("127.0.0.1:0")) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}{PREFIX}/openapi.json", config=CONFIG)
        seen = exercise(schema.include(path=f"{PREFIX}/devices"), bench.tokens[Role.ADMIN])
    assert seen == {f"GET {PREFIX}/devices", f"POST {PREFIX}/devices"}
