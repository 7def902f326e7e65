"""`llava batch --ray` on a cluster of two nodes here: rows as one process makes them, whatever
fails or is killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llava_interleave.batch import JsonRow, Reply, ReplyFn, Source, ray_cluster, run
from llava_interleave.cli import app
from llava_interleave.errors import (
    DataError,
    LlavaError,
    OptionError,
    PromptError,
    RemoteError,
    Unsupported,
)
from llava_interleave.options import Options

pytestmark = pytest.mark.slow

ray = pytest.importorskip("ray", reason="needs ray: pip install 'llava-interleave[ray]'")
NODE = {"num_cpus": 2, "object_store_memory": 100_000_000}
FAST = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    more = {
        "PYTHONPATH": str(Path(__file__).parent),  # where the nodes' processes find `Echo`
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_worker_niceness": "0",
    }
    os.environ |= more
    made = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "include_dashboard": False, "_system_config": FAST},
    )
    made.add_node(**NODE)
    ray.init(
        made.address, log_to_driver=False
    )  # all tests in one connection: every new one begins its processes anew
    yield made
    ray.shutdown()
    made.shutdown()
    for name in more:
        del os.environ[name]


@dataclass(frozen=True)
class Echo:
    """Answers with the question, to which `prepare` adds a number. With a bug it fails where it is
    asked to `break`.
    """

    seconds: float = 0.0
    bug: str = ""
    given: tuple[tuple[str, Any], ...] = ()

    def about(self) -> tuple[dict[str, Any], Options]:
        options = Options(**dict(self.given))
        if options.seed == 13:
            raise OptionError("not this seed")
        return {"model": "echo"}, options

    def preparer(self) -> Callable[[Any, Options], str]:
        def prepare(messages: Any, options: Options) -> str:
            text = messages[-1]["content"][-1]["text"]
            if text == "unreadable":
                raise PromptError("cannot be read")
            return f"{text} {options.max_new_tokens}"

        return prepare

    def answerer(self) -> ReplyFn:
        def answer(texts: Sequence[str], options: Options) -> list[Reply | LlavaError]:
            time.sleep(self.seconds)
            if self.bug and any(text.startswith("break") for text in texts):
                raise RuntimeError(self.bug)
            return [
                PromptError("refused")
                if t.startswith("bad")
                else Reply(t, "stop", options.max_new_tokens or 0, 2)
                for t in texts
            ]

        return answer


def samples(folder: Path, count: int, **special: str) -> Source:
    questions = {i: f"q{i}" for i in range(count)} | {
        int(place.removeprefix("_")): text for place, text in special.items()
    }
    rows = [
        {"id": f"s{i}", "question": questions[i], "images": [f"{i % 7}.png"]} for i in range(count)
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken")
    return Source(folder / "in.jsonl")


def alone(source: Source, out: Path, options: Options) -> list[JsonRow]:
    """The rows of one process, which prepares and answers a sample at a time."""
    prepare, answer = Echo().preparer(), Echo().answerer()

    def both(batch: Sequence[Any], chosen: Options) -> list[Reply | LlavaError]:
        said: list[Reply | LlavaError] = []
        for messages in batch:
            try:
                said += answer([prepare(messages, chosen)], chosen)
            except LlavaError as error:
                said.append(error)
        return said

    run(source, out, both, options, {"model": "echo"})
    return lines(out)


def lines(path: Path) -> list[JsonRow]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_node_killed_in_the_middle_loses_nothing(nodes: Any, tmp_path: Path) -> None:
    """Rows, their order and their errors are those of one process, though a node with a model, and
    what it had read, is gone.
    """
    source, options = samples(tmp_path, 40, _3="bad", _9="unreadable"), Options(max_new_tokens=7)
    out, lost = tmp_path / "out.jsonl", nodes.list_all_nodes()[1]
    said: list[tuple[int, int]] = []
    killed = threading.Event()

    def say(done: int, total: int) -> None:
        said.append((done, total))
        if 8 <= done < 12 and not killed.is_set():
            nodes.remove_node(lost, allow_graceful=False)
            killed.set()

    echo = Echo(seconds=0.2, given=(("max_new_tokens", 7),))
    more = {"address": nodes.address, "batch_size": 2, "progress": say}
    assert ray_cluster.run(source, out, echo, **more) == (41, 3)
    assert killed.is_set()
    assert lines(out) == alone(source, tmp_path / "alone.jsonl", options)
    assert (said[0], said[-1]) == ((0, 41), (41, 41))
    assert not out.with_name("out.jsonl.part").exists()


def test_finished_rows_are_kept_and_the_next_run_resumes(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug ends the run, and is told; without it the same run asks only for what is left."""
    source, options, out = samples(tmp_path, 12, _11="break"), Options(), tmp_path / "out.jsonl"
    part = out.with_name("out.jsonl.part")
    with pytest.raises(RemoteError, match=r"the same command resumes(.|\n)*out of cheese"):
        ray_cluster.run(
            source,
            out,
            Echo(seconds=0.2, bug="out of cheese"),
            address=nodes.address,
            batch_size=1,
        )
    kept = [json.loads(line)["id"] for line in part.read_text().splitlines()[1:]]
    assert len(kept) > 1
    computed: list[int] = []
    compute = ray_cluster._compute

    def spied(
        ray: Any,
        job: ray_cluster.BatchJob,
        groups: Sequence[Sequence[int]],
        fits: ray_cluster.Slots,
    ) -> Any:
        computed.extend(i for group in groups for i in group)
        return compute(ray, job, groups, fits)

    monkeypatch.setattr(ray_cluster, "_compute", spied)
    assert ray_cluster.run(source, out, Echo(), address=nodes.address, batch_size=3) == (13, 1)
    assert sorted(computed) == sorted(set(range(13)) - set(map(int, kept)))
    assert lines(out) == alone(source, tmp_path / "alone.jsonl", options)


@pytest.mark.parametrize("kind", ["interleave", "onevision"])
def test_the_command(
    kind: str, nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_interleave import testing  # not above: `Echo` shall cost no torch
    from tests.helpers.images import random_image

    config = testing.tiny_config if kind == "interleave" else testing.tiny_onevision_config
    testing.tiny_checkpoint(tmp_path / "model", config(text={"tie_word_embeddings": False}))
    random_image(58, 44).save(tmp_path / "tiled.png")
    random_image(93, 82, 1).save(tmp_path / "other.png")
    bodies = [
        {"model": "m", "messages": [{"role": "user", "content": f"hi {n}"}], "max_tokens": n}
        for n in (2, 5)
    ]
    rows: list[Mapping[str, Any]] = [{"id": f"{n}", "question": f"What {n}?"} for n in range(5)]
    rows += [
        {"custom_id": f"o{n}", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    rows += [
        {"id": "tiled", "question": "What?", "image": "tiled.png"},
        {"id": "padded", "question": "Which?", "images": ["tiled.png", "other.png"]},
        {"id": "lost", "question": "What?", "image": "lost.png"},
        {"id": "long", "question": "word " * 9000},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(
        tmp_path
    )  # the nodes' processes are elsewhere, and know what is meant by "model"
    given = ["batch", "in.jsonl", "-m", "model", "--max-new-tokens", "6", "--batch-size", "3"]
    for out, more in (("one.jsonl", []), ("ray.jsonl", ["--ray", nodes.address])):
        done = CliRunner().invoke(app, [*given[:2], str(tmp_path / out), *given[2:], *more])
        assert done.exit_code == 1, done.output  # one of eleven samples has an error
    one, many = lines(tmp_path / "one.jsonl"), lines(tmp_path / "ray.jsonl")
    assert one[9].pop("error") in many[9].pop("error")  # there with its whole path
    for row in one + many:
        row.get("response", {}).get("body", {}).pop("created", None)
    assert one == many
    assert [bool(row.get("error")) for row in one] == [False] * 10 + [True]
    assert ["answer" in row for row in one] == [True] * 5 + [False] * 2 + [True] * 2 + [False] * 2


def test_user_errors_are_reported_once(nodes: Any, tmp_path: Path) -> None:
    source = samples(tmp_path, 2)
    for address, echo, message in (
        (nodes.address, Echo(given=(("seed", 13),)), "^not this seed$"),
        ("ray://localhost:10001", Echo(), "run the command on a node"),
    ):
        with pytest.raises(OptionError, match=message):
            ray_cluster.run(source, tmp_path / "out.jsonl", echo, address=address)
    assert not (tmp_path / "out.jsonl.part").exists()
    assert (
        ray.data.DataContext.get_current().execution_no_progress_timeout_s
        == ray_cluster.STALL_TIMEOUT
    )
    job = ray_cluster.BatchJob(source.path, source.question, source.digest, Echo(), Options())
    assert [sample.messages for sample in job.prepared([1, 0])] == ["q1 None", "q0 None"]
    with pytest.raises(DataError, match="a different file on"):
        dataclasses.replace(job, digest="").prepared([0])


def test_where_ray_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RemoteError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        ray_cluster.run(
            samples(tmp_path, 2),
            tmp_path / "out.jsonl",
            Echo(),
            address="127.0.0.1:1",
        )
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Unsupported, match=r"pip install 'llava-interleave\[ray\]'"):
        ray_cluster.run(samples(tmp_path, 2), tmp_path / "out.jsonl", Echo(), address="auto")


def test_whose_mistake_it_is() -> None:
    def within(error: Exception, *others: Exception) -> BaseException:
        for other in others:
            other.__cause__, error = error, other
        return error

    own = DataError("not this one")
    assert ray_cluster.to_llava_error(within(own, ValueError("x"), KeyError("y"))) is own
    assert ray_cluster.to_llava_error(ray.exceptions.RayTaskError("f", "told", own)) is own
    assert isinstance(
        ray_cluster.to_llava_error(ray.data.exceptions.ExecutionTimeoutError("nothing for 1800 s")),
        RemoteError,
    )
    assert re.fullmatch(
        r"the cluster failed; the same command resumes.*out of cheese",
        str(ray_cluster.to_llava_error(within(ValueError("out of cheese"), KeyError()))),
    )


def test_what_fits() -> None:
    def fits(cpus: int, *nodes: dict[str, float]) -> tuple[int, int]:
        found = ray_cluster.slots(nodes, cpus)
        return found.replicas, found.readers

    assert fits(1, {"CPU": 2.0}, {"CPU": 2.0}) == (2, 2)
    assert fits(1, {"CPU": 1.0}) == (1, 1)
    assert fits(4, {"CPU": 16.0}, {"CPU": 4.0}, {}) == (3, 8)
    assert fits(2, {"CPU": 32.0, "GPU": 8.0}, {"CPU": 8.0}) == (8, 24)
    assert ray_cluster.slots([{"CPU": 32.0, "GPU": 8.0}], 2).resources == {
        "num_cpus": 2,
        "num_gpus": 1,
    }
    with pytest.raises(
        OptionError,
        match="a replica needs 2 CPUs and a GPU, more than any node has: 2 CPUs and 1 GPUs, "
        "8 CPUs and 0",
    ):
        fits(2, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0})
