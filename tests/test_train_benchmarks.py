"""Benchmarks while training, averaged weights, 8-bit optimizer state, profiles, trackers: alone,
and together in a run that is killed and resumed.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_interleave import checkpoints
from llava_interleave.checkpoints import read_adapter
from llava_interleave.config import LoraConfig
from llava_interleave.errors import DataError, OptionError, Unsupported
from llava_interleave.evals.task import Task, example
from llava_interleave.testing import tiny_checkpoint, tiny_config
from llava_interleave.train import checkpointing, report, run, trackers
from llava_interleave.train.ema import WeightAverage
from llava_interleave.train.recipe import Recipe
from tests.helpers.numbers_task import NUMBERS
from tests.helpers.training import killed_before

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    untied = tiny_config(text={"tie_word_embeddings": False})
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", untied)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("samples")
    rows = []
    for number in range(8):
        names = [f"{number}.png"] * (number % 2)
        for name in names:
            Image.frombytes("RGB", (30, 30), Random(name).randbytes(2700)).save(place / name)
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "Which colour?"},
            {"from": "gpt", "value": "Blue. " * (1 + number % 3)},
        ]
        rows.append({"id": f"s{number}", "image": names, "conversations": turns})
    (place / "samples.json").write_text(json.dumps(rows))
    return place / "samples.json"


def quiet(_: str) -> None:
    pass


def test_the_average_is_the_formula_and_is_swapped_in() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    assert set(average.tensors) == {"weight"}
    expected = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        average.update(model)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    last = model.weight.detach().clone()
    with average.applied(model):
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, last)
    torch.testing.assert_close(average.tensors["weight"], expected)


def test_all_of_it_together_resumes_bit_for_bit(folder: Path, source: Path, tmp_path: Path) -> None:
    """An adapter with DoRA, its average, 8-bit state, a benchmark that decides which is best."""
    given = Recipe(
        model=str(folder), source=source, steps=6, lr=0.01, tokens=400, workers=0, save_every=2,
        held_out=0.2, evaluate_every=2, evaluate=(NUMBERS,), best_by=NUMBERS, ema_decay=0.5,
        optimizer="adamw8bit", profile_steps=1, sample_generations=0,
        adapter=LoraConfig(
            rank=64, dropout=0.2, dora=True, targets=("language_model.*",),
            modules_to_save=("multi_modal_projector",),
        ),
    )  # fmt: skip
    whole = run.run(given, tmp_path / "whole", log=quiet)
    with killed_before(5):
        run.run(given, tmp_path / "killed", log=quiet)
    resumed = run.run(given, tmp_path / "killed", log=quiet)
    one, other = (load_file(path / "adapter_model.safetensors") for path in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [
        [
            json.loads(line)
            for line in (path / "log.jsonl").read_text().splitlines()
            if "held_out" in line
        ]
        for path in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [0, 2, 4, 6]
    names = {"loss", "accuracy", NUMBERS, *(f"{NUMBERS}/{g}" for g in ("text", "image"))}
    assert set(lines[0][0]["held_out"]) == {*names, f"{NUMBERS}/all examples"}
    scores = [line["held_out"][NUMBERS] for line in lines[0]]
    last = checkpointing.list_checkpoints(tmp_path / "whole")[-1]
    state = json.loads((last / "state.json").read_text())
    assert state["best"] == [-max(scores), [0, 2, 4, 6][scores.index(max(scores))]]
    stored: dict[str, torch.Tensor] = {}
    for path in last.glob("*.safetensors"):
        stored |= load_file(path)
    states = {name: t.dtype for name, t in stored.items() if name.endswith(".state1")}
    assert torch.uint8 in states.values()
    assert torch.float32 in states.values()  # of fewer than 4,096 elements
    network = checkpoints.load(folder)
    for name, part in read_adapter(whole, network).parts.items():  # the average is written
        assert torch.equal(part.b, stored[f"ema.{name}.low.own.b"])
        assert not torch.equal(part.b, stored[f"{name}.low.own.b"])
    rows = sorted((tmp_path / "whole" / "benchmarks").iterdir())
    assert len(rows) == 4
    assert len(rows[0].read_text().splitlines()) == 1 + 4
    trace = tmp_path / "whole" / "profile" / "trace-0.json.gz"
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert "aten::" in (tmp_path / "whole" / "profile" / "summary-0.txt").read_text()
    report.write(tmp_path / "whole", tmp_path / "report.html")
    assert NUMBERS in (tmp_path / "report.html").read_text()
    with pytest.raises(Exception, match=r"ema_decay: 0\.5 there, 0\.9 here"):
        run.run(given.but({"ema_decay": 0.9}), tmp_path / "killed", log=quiet)


def test_a_run_without_held_out_samples_stops_early_by_a_benchmark(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """And keeps its own weights with `use_ema = false`."""
    given = Recipe(
        model=str(folder), source=source, steps=20, lr=1e-6, tokens=400, workers=0,
        evaluate=(NUMBERS,), evaluate_every=1, evaluate_questions=1, early_stopping=2,
        best_by=NUMBERS, ema_decay=0.5, use_ema=False,
    )  # fmt: skip
    said: list[str] = []
    done = run.run(given, tmp_path / "out", log=said.append)
    last = checkpointing.list_checkpoints(tmp_path / "out")[-1]
    assert last.name == "checkpoint-2"
    network, stored = checkpoints.load(done), load_file(next(last.glob("*.safetensors")))
    name = "multi_modal_projector.linear_1.weight"
    assert torch.equal(network.get_parameter(name), stored[name])
    assert len(next((tmp_path / "out" / "benchmarks").iterdir()).read_text().splitlines()) == 3
    with pytest.raises(OptionError, match=r"early_stopping goes by the held-out loss, and no samp"):
        run.run(given.but({"best_by": "loss"}), tmp_path / "loss", log=quiet)
    with pytest.raises(OptionError, match="unknown task 'docvq'; did you mean 'docvqa'"):
        run.run(given.but({"evaluate": ("docvq",), "best_by": "docvq"}), tmp_path / "a", log=quiet)
    with pytest.raises(OptionError, match="cpu_offload is for the shards of several processes"):
        run.run(given.but({"cpu_offload": True}), tmp_path / "b", log=quiet)
    with pytest.raises(Unsupported, match="paged_adamw8bit pages the memory of a CUDA GPU"):
        run.run(given.but({"optimizer": "paged_adamw8bit"}), tmp_path / "c", log=quiet)


class Faulty(Task):
    """A benchmark whose score fails."""

    def __init__(self) -> None:
        content = [{"type": "text", "text": "1"}]
        examples = [example("a", "b", content, "What?", "1", lambda _: {}["score"])]
        super().__init__(name="faulty", examples=examples, max_new_tokens=2)


def test_a_tracker_that_fails_ends_nothing_and_a_benchmark_is_named(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def flaky(*_: object) -> Iterator[Any]:
        def log(_: object, step: int) -> None:
            if step == 2:
                raise ConnectionError("gone")
            sent.append(step)

        yield log
        raise ConnectionError("still gone")

    def dead(*_: object) -> Any:
        raise ConnectionError("no server")

    sent, said = list[int](), list[str]()
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", flaky)
    given = Recipe(
        model=str(folder), source=source, steps=3, tokens=400, workers=0, log_every=1,
        trackers=("mlflow",),
    )  # fmt: skip
    run.run(given, tmp_path / "out", log=said.append)
    assert sent == [1]
    (failed, closed) = (line for line in said if line.startswith("tracker"))
    assert failed.startswith("tracker mlflow gets nothing from step 2 on, ConnectionError: gone (")
    assert closed.startswith("tracker mlflow was not closed, ConnectionError: still gone (")
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", dead)
    with pytest.raises(OptionError, match=r"tracker mlflow does not start, .*no server .*leave it"):
        run.run(given, tmp_path / "dead", log=quiet)
    name = f"{__name__}:Faulty"
    faulty = given.but({"trackers": (), "evaluate": (name,)})
    with pytest.raises(DataError, match=r"benchmark .*:Faulty raised KeyError: 'score' \(.*line"):
        run.run(faulty, tmp_path / "faulty", log=quiet)


def test_trackers_get_the_log_and_a_resumed_run_goes_on_in_it(
    folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages themselves, offline; `make test-trackers` installs them."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    given = Recipe(
        model=str(folder), source=source, steps=4, lr=1e-3, tokens=400, workers=0, held_out=0.2,
        log_every=1, save_every=2, trackers=("wandb", "mlflow"),
        tracker_project="colours", sample_generations=0,
    )  # fmt: skip
    out = tmp_path / "blue"
    with killed_before(2):
        run.run(given, out, log=quiet)
    run.run(given, out, log=quiet)
    expected = {
        line["step"]: line["loss"]
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "loss" in line
    }
    client = mlflow.MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("colours").experiment_id])
    assert (tracked.info.run_name, tracked.info.status) == ("blue", "FINISHED")
    assert tracked.data.params["lr"] == "0.001"
    history = client.get_metric_history(tracked.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(expected)
    assert [m.step for m in client.get_metric_history(tracked.info.run_id, "held_out/loss")] == [
        0,
        4,
    ]
    files = list((out / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2  # of one id; `wandb sync` joins them
    assert len({path.name for path in files}) == 1
    assert "MLFLOW_TRACKING_URI" not in os.environ
