"""The same over a Ray cluster: CPU tasks read and decode, a model on every GPU or CPU slot answers, one process writes.

Ray Data moves groups of samples from the ones to the others, holds back what nobody takes, and computes again what a lost
machine had. Every machine must see the samples and the model under the same names. Knows nothing of how answers are made.
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
from .run import Answerer, Computed, Groups, rows, write
from .sources import Sample, Source

STALLED = 1800
"""Seconds without a row after which a run ends: no machine has come back for what is left."""


class WorkerSpec(Protocol):
    """What the cluster's processes do, each with a copy of this; copies of one are equal."""

    def __hash__(self) -> int: ...

    def about(self, options: Options) -> Mapping[str, Any]:
        """What answers, as it does where this runs. Raises `LlavaError` for a mistake in the options."""

    def preparer(self) -> Callable[[Any, Options], Any]:
        """A function from a conversation to what the answerer takes; it raises `LlavaError` for one that cannot be answered."""

    def answerer(self) -> Answerer:
        """The model, ready."""


@dataclass(frozen=True)
class BatchJob:
    """What is to be done, for all processes."""

    path: Path
    question: str | None
    digest: str
    worker: WorkerSpec
    options: Options

    def prepared(self, indices: Sequence[int]) -> list[Sample]:
        """Samples, with what the answerer takes in the place of their messages; read and decoded here."""
        source, prepare = _source(self.path, self.question), _preparer(self.worker)
        if source.digest != self.digest:
            raise DataError(
                f"{self.path} is another file on {platform.node()}: every machine must see the same samples"
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
"""A source is opened once a process."""


@cache
def _preparer(worker: WorkerSpec) -> Callable[[Any, Options], Any]:
    return worker.preparer()


@dataclass(frozen=True)
class Slots:
    """How many models and readers a cluster has at a time, and what Ray is told that a model takes."""

    models: int
    readers: int
    model: Mapping[str, int]


class AnswerActor:
    """An actor: the rows of groups that were prepared."""

    def __init__(self, job: BatchJob) -> None:
        self._options, self._answer = job.options, job.worker.answerer()

    def __call__(self, batch: Any) -> dict[str, list[str]]:
        indices, samples = _taken(batch)
        return {"done": [json.dumps([indices, rows(samples, self._answer, self._options)])]}


def prepare(batch: Any, job: BatchJob) -> Any:
    """A task: what `Answering` takes, of one group."""
    (group,) = batch["group"].to_pylist()
    return _packed((group, job.prepared(group)))


def _packed(value: Any) -> Any:
    """A table of one cell: Ray Data moves tables, and objects of ours are no columns."""
    import pyarrow
    from ray import cloudpickle

    return pyarrow.table(
        {"packed": pyarrow.array([cloudpickle.dumps(value)], pyarrow.large_binary())}
    )


def _taken(table: Any) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(table["packed"][0].as_py())


def run(
    source: Source,
    out: Path,
    worker: WorkerSpec,
    options: Options,
    about: Mapping[str, Any],
    *,
    address: str,
    cpus: int = 1,
    batch: int = 32,
    say: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """As `offline.run`, on the cluster at `address`: auto, HOST:PORT, or local for one of this machine alone. A program that is
    connected to one stays there.

    cpus: of each model; where the cluster has GPUs, one of those as well. Raises `RemoteError` where the cluster gives up; what
    is done is kept.
    """
    job = BatchJob(source.path.absolute(), source.question, source.digest, worker, options)
    with connected(address, "data") as ray, _moving(ray):
        fits = slots([node["Resources"] for node in ray.nodes() if node["Alive"]], cpus)
        model = ray.get(ray.remote(**fits.model)(type(worker).about).remote(worker, options))

        def compute(groups: Groups) -> Computed:
            return _computed(ray, job, groups, fits)

        return write(source, out, compute, {**model, **about}, batch=batch, say=say)


def slots(nodes: Sequence[Mapping[str, float]], cpus: int) -> Slots:
    """What fits on nodes with these resources: a model a GPU if there are any, and a CPU a node for reading where it has two."""
    gpus = any(node.get("GPU") for node in nodes)
    have = [int(node.get("CPU", 0)) for node in nodes]
    room = [max(count - 1, min(count, 1)) // cpus for count in have]
    models = sum(
        min(fits, int(node.get("GPU", 0))) if gpus else fits
        for fits, node in zip(room, nodes, strict=True)
    )
    if not models:
        told = ", ".join(
            f"{count} CPUs and {node.get('GPU', 0):g} GPUs"
            for count, node in zip(have, nodes, strict=True)
        )
        raise OptionError(
            f"a model takes {cpus} CPUs{' and a GPU' * gpus}, which fits on no node: there are {told}"
        )
    return Slots(
        models,
        max(len(nodes), sum(have) - models * cpus),
        {"num_cpus": cpus, "num_gpus": int(gpus)},
    )


def _computed(ray: Any, job: BatchJob, groups: Groups, fits: Slots) -> Computed:
    if not groups:
        return
    models = ray.data.ActorPoolStrategy(min_size=1, max_size=fits.models, initial_size=fits.models)
    # Readers are counted and hold no CPU: a model whose machine was lost may begin again on the last one, and needs them.
    readers = {"compute": ray.data.TaskPoolStrategy(size=fits.readers), "num_cpus": 0}
    one: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    data = ray.data.from_items(
        [{"group": list(group)} for group in groups], override_num_blocks=len(groups)
    )
    data = data.map_batches(prepare, fn_kwargs={"job": job}, **one, **readers)
    data = data.map_batches(
        AnswerActor, fn_constructor_args=[job], compute=models, **one, **fits.model
    )
    for row in data.iter_rows():
        indices, made = json.loads(row["done"])
        yield indices, made


@contextmanager
def connected(address: str, library: str) -> Iterator[Any]:
    """Ray with its library (data, serve), connected where this process is not yet, silent, and without its reports of use."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray

        import_module(f"ray.{library}")
    except ImportError as error:
        raise Unsupported(
            "ray is not installed; pip install 'llava-interleave[ray]', on every machine of the cluster"
        ) from error
    if "://" in address:
        raise OptionError(
            f"{address} is for Ray's client, which has no Ray {library.title()}: run the command on a node, with auto"
        )
    begun = not ray.is_initialized()
    try:
        if begun:
            ray.init(
                None if address == "local" else address,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        begin = "`ray start --head` begins one; if it asks for a token, set RAY_AUTH_MODE=token here, too"
        raise RemoteError(f"there is no Ray cluster at {address!r} ({error}); {begin}") from error
    try:
        yield ray
    finally:
        if begun:
            ray.shutdown()


@contextmanager
def _moving(ray: Any) -> Iterator[None]:
    """Ray Data as a run needs it, and errors told as a user knows them."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # else it stays on the machine that raised it
    context.execution_no_progress_timeout_s = STALLED
    try:
        yield
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise told(error) from error


def told(error: BaseException) -> LlavaError:
    """What a user is told of an error that Ray raises: our own where one lies beneath it."""
    beneath = getattr(error, "cause", None) or error.__cause__
    if isinstance(beneath, LlavaError):
        return beneath
    return (
        told(beneath)
        if beneath
        else RemoteError(
            f"the cluster gave up; the same command goes on with what is left. {error}"
        )
    )
