"""`/metrics`: what Prometheus reads, with a viewer's token."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from aggregator.access.roles import Role
from aggregator.telemetry.metrics import CONTENT_TYPE
from aggregator.web.admission import By, guarded
from aggregator.web.context import context_of
from aggregator.web.problems import ApiProblem

looking = guarded(Role.VIEWER, tag="metrics")


@looking.get("/metrics", name="show-metrics", include_in_schema=False)
def show_metrics(by: By, request: Request) -> Response:
    """Everything that the service counts, in Prometheus's text format."""
    metrics = context_of(request).metrics
    if metrics is None:
        raise ApiProblem("unavailable", "no service runs in this process, so nothing is counted")
    return Response(metrics.text(), media_type=CONTENT_TYPE)
