"""Prometheus metrics for /metrics.

Labels are routes, statuses and error codes, never input of a client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ..chat import Answer
from ..engine import Load
from .access_log import current_record
from .api_errors import ApiError

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
LOAD: tuple[tuple[str, str, Callable[[Load], int]], ...] = (
    ("num_requests_waiting", "Answers in the engine's queue", lambda load: load.waiting),
    ("num_requests_running", "Answers being generated", lambda load: load.running),
    ("kv_cache_capacity_tokens", "Size of the KV cache", lambda load: load.kv_total),
    ("kv_cache_used_tokens", "KV cache of running answers", lambda load: load.kv_running),
    ("prefix_cache_tokens", "KV cache of reusable prefixes", lambda load: load.kv_cached),
    ("encoder_cache_bytes", "Size of cached image features", lambda load: load.feature_bytes),
    (
        "encoded_crops",
        "Crops that the vision encoder has encoded since the start",
        lambda load: load.crops_encoded,
    ),
)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"llava_{name}", help_text, labels, registry=registry)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"llava_{name}", help_text, buckets=buckets, registry=registry)

        self.requests = counter("http_requests", "HTTP requests", "route", "status")
        self.errors = counter("errors", "Error responses by code", "code")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("cached_prompt_tokens", "Prompt tokens from the prefix cache")
        self.generation_tokens = counter("generation_tokens", "Generated tokens")
        self.crops = counter("crops", "Crops of images and video frames in prompts")
        self.aborted = counter("aborted_requests", "Requests whose client disconnected")
        self.preprocess = histogram(
            "preprocess_seconds", "Fetching and decoding media, tokenizing, compiling a grammar"
        )
        self.attribution = histogram("attribution_seconds", "Attribution, with its wait")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the engine's queue to the first token"
        )
        self.token = histogram(
            "inter_token_latency_seconds", "Per token after the first", TOKEN_SECONDS
        )

    def watch(self, load: Callable[[], Load], num_active: Callable[[], int]) -> None:
        """Read the engine's load on every scrape."""
        for name, help_text, value in LOAD:
            gauge = Gauge(f"llava_{name}", help_text, registry=self.registry)
            gauge.set_function(lambda value=value: value(load()))  # type: ignore[misc]
        Gauge(
            "llava_num_requests_active",
            "Answers being prepared, waiting or running",
            registry=self.registry,
        ).set_function(num_active)

    def count_response(self, scope: Any, status: int) -> None:
        """Count a finished HTTP request; status 0: nothing was sent. A replica counts its own."""
        if "replica" in scope.get("state", ()):
            return
        route = getattr(scope.get("route"), "path", "other")
        self.requests.labels(route, str(status)).inc()

    def count_error(self, error: ApiError) -> ApiError:
        """Count an error, note it in the request's record, and return it."""
        current_record().error = error.code
        self.errors.labels(error.code).inc()
        return error

    def count_answer(self, answer: Answer) -> None:
        """Count a finished answer."""
        self.prompt_tokens.inc(answer.usage.prompt)
        self.cached_tokens.inc(answer.usage.cached)
        self.generation_tokens.inc(answer.usage.generated)
        if answer.timings.first_token is not None:
            self.first_token.observe(answer.timings.first_token)
        if answer.timings.tokens_per_second:
            self.token.observe(1 / answer.timings.tokens_per_second)

    def text(self) -> bytes:
        """The exposition for Prometheus."""
        return generate_latest(self.registry)


def merge_metrics(own: bytes, replicas: Mapping[str, bytes]) -> bytes:
    """The metrics of several servers as one text; a label names the replica of each sample."""
    families: dict[str, Metric] = {}
    for replica, text in {"": own, **replicas}.items():
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            merged.samples += [
                sample._replace(labels=sample.labels | {"replica": replica})
                for sample in family.samples
            ]
    return generate_latest(SimpleNamespace(collect=families.values))  # all that it reads
