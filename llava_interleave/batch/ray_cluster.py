"""Batch inference on a Ray cluster: CPU tasks read and decode, replicas answer, one process writes.

Ray Data moves batches of samples between them with backpressure, and recomputes those of a lost
machine. Every machine must see the samples and the model under the same paths. Knows no models.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError, LlavaError, OptionError, RemoteError, Unsupported
from ..options import Options
from .run import Computed, Groups, ReplyFn, answer_samples, write
from .sources import Sample, Source

STALL_TIMEOUT = 1800
"""Seconds without a row after which a run ends."""


class WorkerSpec(Protocol):
    """The work of the cluster's processes, each with a copy of this; copies are equal."""

    def __hash__(self) -> int: ...

    def about(self) -> tuple[Mapping[str, Any], Options]:
        """Describes the run on this machine; its options. Raises `LlavaError` for wrong ones."""

    def preparer(self) -> Callable[[Any, Options], Any]:
        """A function from a conversation to the answerer's input. It raises `LlavaError`."""

    def answerer(self) -> ReplyFn:
        """The loaded model."""


@dataclass(frozen=True)
class BatchJob:
    """The job, for all processes."""

    path: Path
    question: str | None
    digest: str
    worker: WorkerSpec
    options: Options

    def prepared(self, indices: Sequence[int]) -> list[Sample]:
        """Samples, read and decoded here, with the answerer's input in place of their messages."""
        source, prepare = _source(self.path, self.question), _preparer(self.worker)
        if source.digest != self.digest:
            raise DataError(
                f"{self.path} is a different file on {platform.node()}: all machines need the "
                "same samples"
            )
        return [self._prepared(source.sample(i), prepare) for i in indices]

    def _prepared(self, sample: Sample, prepare: Callable[[Any, Options], Any]) -> Sample:
        if sample.error:
            return sample
        try:
            return replace(
                sample, messages=prepare(sample.messages, self.options.but(sample.options))
            )
        except LlavaError as error:
            return replace(sample, messages=(), error=error)


_source = cache(Source)
"""A source is opened once per process."""


@cache
def _preparer(worker: WorkerSpec) -> Callable[[Any, Options], Any]:
    return worker.preparer()


@dataclass(frozen=True)
class Slots:
    """How many replicas and readers run at a time, and the Ray resources of a replica."""

    replicas: int
    readers: int
    resources: Mapping[str, int]


class AnswerActor:
    """An actor: answers prepared batches."""

    def __init__(self, job: BatchJob) -> None:
        self._options, self._answer = job.options, job.worker.answerer()

    def __call__(self, batch: Any) -> dict[str, list[str]]:
        indices, samples = _unpack(batch)
        return {
            "done": [json.dumps([indices, answer_samples(samples, self._answer, self._options)])]
        }


def prepare(batch: Any, job: BatchJob) -> Any:
    """A task: the input of `AnswerActor` for one batch."""
    (group,) = batch["group"].to_pylist()
    return _pack((group, job.prepared(group)))


def _pack(value: Any) -> Any:
    """A table of one cell: Ray Data moves tables, not Python objects."""
    import pyarrow
    from ray import cloudpickle

    return pyarrow.table(
        {"packed": pyarrow.array([cloudpickle.dumps(value)], pyarrow.large_binary())}
    )


def _unpack(table: Any) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(table["packed"][0].as_py())


def run(
    source: Source,
    out: Path,
    worker: WorkerSpec,
    *,
    address: str,
    cpus: int = 1,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """As `batch.run`, on the cluster at `address`: auto, HOST:PORT, or local for this machine
    alone. A program that is already connected stays connected.

    cpus: CPUs of each replica; where the cluster has GPUs, it also gets one. Raises `RemoteError`
    where the cluster fails; finished rows are kept.
    """
    with connected(address, "data") as ray, _ray_data(ray):
        plan = slots([node["Resources"] for node in ray.nodes() if node["Alive"]], cpus)
        about, options = ray.get(ray.remote(**plan.resources)(type(worker).about).remote(worker))
        job = BatchJob(source.path.absolute(), source.question, source.digest, worker, options)

        def compute(groups: Groups) -> Computed:
            return _compute(ray, job, groups, plan)

        return write(source, out, compute, about, batch_size=batch_size, progress=progress)


def slots(nodes: Sequence[Mapping[str, float]], cpus: int) -> Slots:
    """Replicas on nodes with these resources: one per GPU if there are any, and one CPU per node
    for reading where it has two.
    """
    gpus = any(node.get("GPU") for node in nodes)
    node_cpus = [int(node.get("CPU", 0)) for node in nodes]
    capacity = [max(count - 1, min(count, 1)) // cpus for count in node_cpus]
    replicas = sum(
        min(count, int(node.get("GPU", 0))) if gpus else count
        for count, node in zip(capacity, nodes, strict=True)
    )
    if not replicas:
        available = ", ".join(
            f"{count} CPUs and {node.get('GPU', 0):g} GPUs"
            for count, node in zip(node_cpus, nodes, strict=True)
        )
        raise OptionError(
            f"a replica needs {cpus} CPUs{' and a GPU' * gpus}, more than any node has: {available}"
        )
    return Slots(
        replicas,
        max(len(nodes), sum(node_cpus) - replicas * cpus),
        {"num_cpus": cpus, "num_gpus": int(gpus)},
    )


def _compute(ray: Any, job: BatchJob, groups: Groups, plan: Slots) -> Computed:
    if not groups:
        return
    replicas = ray.data.ActorPoolStrategy(
        min_size=1, max_size=plan.replicas, initial_size=plan.replicas
    )
    # Readers reserve no CPU: a replica of a lost machine may restart on the last one, and needs it.
    readers = {"compute": ray.data.TaskPoolStrategy(size=plan.readers), "num_cpus": 0}
    one: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    data = ray.data.from_items(
        [{"group": list(group)} for group in groups], override_num_blocks=len(groups)
    )
    data = data.map_batches(prepare, fn_kwargs={"job": job}, **one, **readers)
    data = data.map_batches(
        AnswerActor, fn_constructor_args=[job], compute=replicas, **one, **plan.resources
    )
    for row in data.iter_rows():
        indices, rows = json.loads(row["done"])
        yield indices, rows


@contextmanager
def connected(address: str, library: str) -> Iterator[Any]:
    """Ray and one of its libraries (data, serve), connected, without log output and
    usage reports.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray

        import_module(f"ray.{library}")
    except ImportError as error:
        raise Unsupported(
            "ray is not installed; pip install 'llava-interleave[ray]', on every machine of the "
            "cluster"
        ) from error
    if "://" in address:
        raise OptionError(
            f"{address} is an address of Ray Client, which has no Ray {library.title()}: run the "
            "command on a node, with auto"
        )
    connecting = not ray.is_initialized()
    try:
        if connecting:
            ray.init(
                None if address == "local" else address,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "`ray start --head` starts one; if it needs a token, set RAY_AUTH_MODE=token"
        raise RemoteError(f"there is no Ray cluster at {address!r} ({error}); {hint}") from error
    try:
        yield ray
    finally:
        if connecting:
            ray.shutdown()


@contextmanager
def _ray_data(ray: Any) -> Iterator[None]:
    """Settings of Ray Data for a run; its errors become `LlavaError`s."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else it stays on the machine that raised it
    context.execution_no_progress_timeout_s = STALL_TIMEOUT
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise to_llava_error(error) from error


def to_llava_error(error: BaseException) -> LlavaError:
    """The `LlavaError` that caused an error of Ray, else a `RemoteError`."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, LlavaError):
        return cause
    return (
        to_llava_error(cause)
        if cause
        else RemoteError(f"the cluster failed; the same command resumes the run. {error}")
    )
