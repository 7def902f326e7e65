"""What /metrics tells, in the form of Prometheus. Labels hold routes, statuses and codes of ours, nothing that a client wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ..chat import Answer
from ..engine import Load
from .api_errors import ApiError

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()
        self.requests = Counter(
            "llava_requests", "HTTP requests", ["route", "status"], registry=made
        )
        self.refusals = Counter(
            "llava_refusals", "Requests without an answer, by error code", ["code"], registry=made
        )
        self.tokens = Counter(
            "llava_tokens",
            "Tokens: of prompts, of these from the cache, generated",
            ["kind"],
            registry=made,
        )
        self.crops = Counter(
            "llava_crops", "Crops of images and video frames asked about", registry=made
        )
        self.aborted = Counter(
            "llava_aborted", "Requests whose client left before the end", registry=made
        )
        self.prepare = Histogram(
            "llava_prepare_seconds",
            "Fetching, decoding and laying out",
            buckets=SECONDS,
            registry=made,
        )
        self.explain = Histogram(
            "llava_explain_seconds",
            "Explaining an answer, with its wait",
            buckets=SECONDS,
            registry=made,
        )
        self.first = Histogram(
            "llava_first_token_seconds",
            "From the queue to the first token",
            buckets=SECONDS,
            registry=made,
        )
        self.token = Histogram(
            "llava_token_seconds",
            "Each token after the first",
            buckets=TOKEN_SECONDS,
            registry=made,
        )

    def watch(self, load: Callable[[], Load], under_way: Callable[[], int]) -> None:
        """Read the engine's load whenever the metrics are asked for."""
        for field, text in (
            ("waiting", "Answers in the engine's queue"),
            ("running", "Answers being computed"),
            ("kv_total", "KV memory in tokens"),
            ("kv_running", "KV memory of answers being computed, in tokens"),
            ("kv_cached", "KV memory kept for prefixes, in tokens"),
            ("feature_bytes", "Image features kept, in bytes"),
            (
                "crops_encoded",
                "Crops that the tower encoded; the others of llava_crops were cached",
            ),
        ):
            gauge = Gauge(f"llava_{field}", text, registry=self.registry)
            gauge.set_function(lambda field=field: getattr(load(), field))  # type: ignore[misc]
        Gauge(
            "llava_under_way", "Answers admitted, also those being prepared", registry=self.registry
        ).set_function(under_way)

    def answered(self, scope: Any, status: int) -> None:
        """A request is over; status 0: nothing was sent. What a replica answered is counted there."""
        if "replica" in scope.get("state", ()):
            return
        route = getattr(scope.get("route"), "path", "other")
        self.requests.labels(route, str(status)).inc()

    def refused(self, refusal: ApiError) -> ApiError:
        """Counts a refusal and passes it on."""
        self.refusals.labels(refusal.code).inc()
        return refusal

    def finished(self, answer: Answer) -> None:
        """An answer came to its end."""
        for kind in ("prompt", "cached", "generated"):
            self.tokens.labels(kind).inc(getattr(answer.usage, kind))
        if answer.timings.first_token is not None:
            self.first.observe(answer.timings.first_token)
        if answer.timings.tokens_per_second:
            self.token.observe(1 / answer.timings.tokens_per_second)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


def merged(own: bytes, replicas: Mapping[str, bytes]) -> bytes:
    """The metrics of several servers as one text, each sample of a replica with its name in a label."""
    families: dict[str, Metric] = {}
    for replica, text in {"": own, **replicas}.items():
        for family in text_string_to_metric_families(text.decode()):
            into = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            into.samples += [
                sample._replace(labels=sample.labels | {"replica": replica})
                for sample in family.samples
            ]
    return generate_latest(
        SimpleNamespace(collect=families.values)
    )  # of a registry it asks no more
