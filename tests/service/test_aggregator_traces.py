"""Rounds as spans, sent to a real collector's endpoint."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from aggregator.settings import CampaignRequest
from aggregator.telemetry.traces import ENDPOINTS, tracing
from tests.aggregator_bench import Bench


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Bodies that an OTLP endpoint was sent."""
    got: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_round_is_a_span_with_its_phases(tmp_path: Path, collector: list[bytes]) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    bench = Bench(tmp_path, devices=4)
    campaign = bench.start(CampaignRequest("toy", rounds=1, cohort=4))
    (view,) = bench.finish(campaign)
    record = view.record
    with tracing(bench.repository) as listeners:
        for listener in listeners:
            listener.publish("round", {"round": record.round_id, "status": "running"})
            listener.publish("device", {"device": "device-1", "change": "online"})
            listener.publish("round", {"round": record.round_id, "status": "completed"})
    bench.close()
    spans: list[Any] = []
    for body in collector:
        message = ExportTraceServiceRequest.FromString(body)
        for resource in message.resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            assert names["service.name"] == "covey-aggregator"
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    root = next(span for span in spans if span.name == "round")
    assert {each.key: each.value for each in root.attributes}["covey.round"].string_value == record.round_id
    assert root.start_time_unix_nano == pytest.approx(record.started_at * 1e9, abs=1e4)
    children = [span for span in spans if span.parent_span_id == root.span_id]
    assert [span.name for span in sorted(children, key=lambda each: each.start_time_unix_nano)] == [
        *("AdvertiseKeys", "ShareKeys", "MaskedInput", "ConsistencyCheck", "Unmasking")
    ]
    assert all(root.start_time_unix_nano <= s.start_time_unix_nano <= s.end_time_unix_nano for s in children)


def test_without_a_collector_nothing_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    bench = Bench(tmp_path, devices=1)
    with tracing(bench.repository) as listeners:
        assert listeners == ()
    bench.close()
