"""OpenTelemetry traces: a span of each request, with spans of its queue, media, prefill, decode.

Needs the extra `otel`. The exporter and the resource read OpenTelemetry's environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from .access_log import RequestRecord


class Tracing:
    """Exports a trace of each finished request, in a thread of its own."""

    def __init__(self, exporter: SpanExporter) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "llava-interleave")
        resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: __version__})
        self.provider = TracerProvider(resource=resource)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("llava_interleave", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_endpoint(cls, url: str) -> Tracing:
        """Traces to a collector, by OTLP over HTTP: http://localhost:4318/v1/traces."""
        return cls(OTLPSpanExporter(endpoint=url))

    def export(
        self,
        record: RequestRecord,
        route: str,
        status: int,
        end: float,
        headers: Mapping[str, str],
    ) -> None:
        """The spans of a request that ended at `end`; `traceparent` of the headers continues."""
        attributes: dict[str, str | int | None] = {
            "http.request.method": record.method,
            "http.route": route,
            "http.response.status_code": status or None,
            "client.address": record.address,
            "error.type": record.error,
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "llava.request_id": record.request_id,
            "llava.key": record.key or None,
        }
        span = self._tracer.start_span(
            f"{record.method} {route}",
            context=self._propagator.extract(headers),
            kind=trace.SpanKind.SERVER,
            attributes={name: value for name, value in attributes.items() if value is not None},
            start_time=_nanoseconds(record.start),
        )
        if status >= 500 or not status:
            span.set_status(trace.StatusCode.ERROR, record.error)
        context = trace.set_span_in_context(span)
        for name, start, stop in record.spans:
            child = self._tracer.start_span(name, context=context, start_time=_nanoseconds(start))
            child.end(_nanoseconds(stop))
        span.end(_nanoseconds(end))

    def close(self) -> None:
        """Export what is left."""
        self.provider.shutdown()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
