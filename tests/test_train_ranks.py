"""Several processes, started by torchrun over gloo, compute what one does, and go on from what any
number of them has saved.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from llava_interleave import checkpoints, cli
from llava_interleave.config import LoraConfig
from llava_interleave.distributed import process_group
from llava_interleave.distributed.process_group import ProcessGroup, init_distributed
from llava_interleave.errors import OptionError, Unsupported
from llava_interleave.prompt import Prompt
from llava_interleave.testing import tiny_checkpoint, tiny_config
from llava_interleave.train import checkpointing, loop, recipe
from llava_interleave.train.data.packing import (
    DummyBatch,
    PlannedPackedDataset,
    Position,
    distributed_batches,
)
from llava_interleave.train.loop import train
from llava_interleave.train.losses import sft_loss
from llava_interleave.train.recipe import DPOConfig, KTOConfig, Recipe
from llava_interleave.train.run import check_shared, run
from tests.helpers.numbers_task import NUMBERS
from tests.helpers.training import Killed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # three processes begin, on however busy a machine
LR = 1e-4
STAGES: dict[str, dict[str, Any]] = {
    "all": {
        "tower_lr_scale": 0.2,
        "held_out": 0.2,
        "evaluate_every": 2,
        "sample_generations": 2,
        "ema_decay": 0.5,
        "evaluate": (NUMBERS,),
    },
    "decoder": {
        "projector_lr_scale": 0.0,
        "epochs": 1.3,
    },  # and a last step without enough batches for all
    "adapter": {
        "bfloat16": True,
        "activation_checkpointing": True,
        "adapter": LoraConfig(
            rank=4,
            dropout=0.2,
            dora=True,
            rank_pattern=("*.v_proj=2",),
            modules_to_save=("multi_modal_projector",),
        ),
    },
    "dpo": {"dpo": DPOConfig()},
    "kto": {"kto": KTOConfig()},
}


def dying(number: int, how: Any) -> Any:
    """A step of the loop, before whose `number` something happens."""
    step = loop.train_step

    def taken(*words: Any) -> loop.StepStats:
        if words[5] == number:
            how()
        return step(*words)

    return taken


def killed() -> None:
    raise Killed


def prepare(place: Path) -> None:
    """Model, samples, a recipe a stage; what one process makes of each, and one that was killed
    after two steps.
    """
    # With sizes that two cannot halve, and samples of which every third has no image: their rank
    # still goes through the tower.
    model = tiny_checkpoint(place / "tiny", tiny_config(text={"intermediate_size": 95}))
    samples, pairs = [], []
    for number in range(14):
        names = [f"{number}-{i}.png" for i in range(number % 3)]
        for name in names:
            Image.frombytes("RGB", (50, 40), Random(name).randbytes(6000)).save(place / name)
        question, said = "<image>\n" * len(names) + "What?", f"Number {number}." * (1 + number % 4)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": said}]
        samples.append({"id": f"s{number}", "image": names, "conversations": turns})
        pairs.append(
            {
                "id": f"s{number}",
                "images": names,
                "prompt": question,
                "chosen": said,
                "rejected": "No!",
            }
        )
    (place / "samples.json").write_text(json.dumps(samples))
    (place / "pairs.json").write_text(json.dumps(pairs))
    for stage, more in STAGES.items():
        source = place / ("pairs.json" if stage in ("dpo", "kto") else "samples.json")
        settings = {
            "lr": LR,
            "tokens": 250,
            "grad_accum_steps": 4,
            "workers": 0,
            "save_every": 2,
            "log_every": 1,
            "warmup_ratio": 0.5,
        }
        if "epochs" not in more:
            settings["steps"] = 4
        made = Recipe(model=str(model), source=source, **{**settings, **more})
        (place / f"{stage}.toml").write_text(made.toml())
        run(made, place / stage / "one", log=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", dying(2, killed))
        with pytest.raises(Killed):
            run(
                recipe.read(place / "adapter.toml"),
                place / "adapter" / "begun by one",
                log=lambda _: None,
            )


def together(place: Path) -> None:
    """What two processes do: every stage, the rest of what one began, and at last, by the command,
    what a signal to one ends.
    """
    group, _ = init_distributed("cpu", torch.device, timedelta(seconds=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "HEARTBEAT", 0.5)
        waited = group.run_on_rank0(lambda: time.sleep(9) or "done", long=True)
    (place / "waited").write_text(waited)
    for stage in STAGES:
        given = recipe.read(place / f"{stage}.toml").but({"cpu_offload": stage == "decoder"})
        run(given, place / stage / "two")
    run(recipe.read(place / "adapter.toml"), place / "adapter" / "begun by one")
    try:
        check_shared(place / f"of-{os.environ['RANK']}", group)
    except (OptionError, SystemExit) as error:
        (place / f"apart-{os.environ['RANK']}").write_text(str(error))
    if os.environ["RANK"] == "1":
        loop.train_step = dying(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    sys.argv = [
        "llava",
        "train",
        "-r",
        str(place / "all.toml"),
        "-o",
        str(place / "all" / "begun by two"),
    ]
    try:
        cli.main()
    except SystemExit as end:
        (place / f"code-{os.environ['RANK']}").write_text(str(end.code))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: products on more are rounded in another way
    try:
        prepare(place)
    finally:
        torch.set_num_threads(threads)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
        str(place),
    ]
    done = subprocess.run(
        launch,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "said").write_text(done.stdout)
    return place


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tensors(path: Path) -> dict[str, Tensor]:
    if path.name == "adapter":
        return load_file(path / "adapter_model.safetensors")
    return dict(checkpoints.load(path).named_parameters())


def alike(one: Path, other: Path) -> None:
    """Losses to 0.001 %, weights to 2 % of their change: sums have another order, and AdamW
    magnifies what is nearly 0.
    """
    mine, theirs = lines(one), lines(other)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        a, b = a.get("held_out", a), b.get("held_out", b)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["accuracy"] == pytest.approx(b["accuracy"])
    name = "adapter" if (one / "adapter").exists() else "model"
    a, b = tensors(one / name), tensors(other / name)
    before = (
        tensors(one.parent.parent / "tiny")
        if name == "model"
        else {key: torch.zeros(()) for key in a}
    )
    assert a.keys() == b.keys()
    apart, moved = (sum(float((a[k] - x[k]).square().sum()) for k in a) ** 0.5 for x in (b, before))
    assert apart < 0.02 * moved


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does(stage: str, place: Path) -> None:
    alike(place / stage / "one", place / stage / "two")


def test_what_is_frozen_stays_bit_equal(place: Path) -> None:
    before, after = tensors(place / "tiny"), tensors(place / "decoder" / "two" / "model")
    for name, p in before.items():
        assert torch.equal(p, after[name]) == (not name.startswith("language_model.")), name


def test_two_go_on_with_what_one_has_saved(place: Path) -> None:
    alike(place / "adapter" / "one", place / "adapter" / "begun by one")


def test_a_signal_to_one_rank_ends_all_and_one_rank_resumes_their_checkpoint(place: Path) -> None:
    """At the third step, after which nothing was due to be saved."""
    begun = place / "all" / "begun by two"
    assert [(place / f"code-{rank}").read_text() for rank in range(2)] == ["143", "143"]
    assert checkpointing.list_checkpoints(begun)[-1].name == "checkpoint-3"
    assert len(list((begun / "checkpoint-3").glob("*.safetensors"))) == 2
    run(recipe.read(place / "all.toml"), begun, log=lambda _: None)
    alike(place / "all" / "one", begun)


def test_a_folder_that_is_not_shared_is_noticed(place: Path) -> None:
    said = [(place / f"apart-{rank}").read_text() for rank in range(2)]
    assert said[1] == "2"
    assert "of-0 is not the folder of all processes: rank 1 (" in said[0]
    assert not list(place.glob("of-?/.seen*"))


def test_the_others_wait_for_rank_0_longer_than_for_a_collective(place: Path) -> None:
    assert (place / "waited").read_text() == "done"


def test_rank_0_alone_tells(place: Path) -> None:
    said = (place / "said").read_text()
    assert said.count("step 1 of 4  loss") == 5  # four stages and the command; one has other steps
    assert said.count("step 4 held out") == 1
    assert said.count("stopped by SIGTERM after step 3") == 1
    assert said.count("computing the reference of 14 pairs") == 1
    assert said.count("computing the reference of 28 pairs") == 1  # KTO has both answers of each


class Numbers:
    """Samples whose tokens tell which they are; their lengths go from 3 to 9."""

    def __call__(self, index: int) -> Prompt:
        return Prompt([index] * self.length(index), loss_mask=[True] * self.length(index))

    def length(self, index: int) -> int:
        return 3 + index * 5 % 7

    def images(self, index: int) -> int:
        return 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_batch_of_a_step_has_one_rank_and_those_of_the_same_time_are_alike(
    count: int,
) -> None:
    plan, each = PlannedPackedDataset(Numbers(), 60, size=16, tokens=20, seed=3), 6

    def read(rank: int, start: Position = Position()) -> list[tuple[Any, Position]]:  # noqa: B008  frozen
        return list(
            distributed_batches(plan, start, workers=0, each=each, ranks=ProcessGroup(rank, count))
        )

    found = [read(rank) for rank in range(count)]
    assert len({len(one) for one in found}) == 1
    assert all(len({after for _, after in turn}) == 1 for turn in zip(*found, strict=True))
    batches = [batch for one in found for batch, _ in one if not isinstance(batch, DummyBatch)]
    assert sorted({int(token) for batch in batches for token in batch.tokens}) == list(range(60))
    assert sum(len(batch.lengths) for batch in batches) == 60
    share = each // count
    assert len(found[0]) == -(-len(batches) // count)
    assert plan.steps(each) == -(-len(batches) // each) == -(-len(found[0]) // share)
    times = [
        [len(b.tokens) for b, _ in turn if not isinstance(b, DummyBatch)]
        for turn in zip(*found, strict=True)
    ]
    for number, (turn, after) in enumerate(pairwise(times), 1):
        assert number % share == 0 or min(turn) >= max(
            after
        )  # of another step, or as long as what comes next
    for rank in range(count):  # from the end of any step
        for cut in range(share, len(found[rank]), share):
            rest = read(rank, found[rank][cut - 1][1])
            assert [after for _, after in rest] == [after for _, after in found[rank][cut:]]
            assert [b.tokens.tolist() for b, _ in rest if not isinstance(b, DummyBatch)] == [
                b.tokens.tolist() for b, _ in found[rank][cut:] if not isinstance(b, DummyBatch)
            ]


def test_what_cannot_be_shared_is_refused(place: Path, tmp_path: Path) -> None:
    model = checkpoints.load(place / "tiny").requires_grad_(True)

    def go(config: Recipe, count: int) -> None:
        train(model, sft_loss, lambda _: iter(()), config, tmp_path, ranks=ProcessGroup(0, count))

    with pytest.raises(
        OptionError,
        match="3 processes cannot share 4 batches a step evenly: give grad_accum_steps 6",
    ):
        go(Recipe(steps=1, grad_accum_steps=4), 3)
    with pytest.raises(Unsupported, match="Muon needs whole matrices, and 2 processes have shards"):
        go(Recipe(steps=1, grad_accum_steps=4, muon_lr_scale=1.0), 2)


RESTARTED = """
import os, time
from datetime import timedelta
import torch
from llava_interleave.distributed.process_group import init_distributed
again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
time.sleep(again and os.environ["RANK"] == "0")
group, _ = init_distributed("cpu", torch.device, timedelta(seconds=20))
assert group.all_reduce_sum(1.0) == [2.0]
if not again and group.rank:
    os._exit(1)
"""


def test_a_restarted_rank_does_not_read_the_address_of_an_earlier_rank_0(tmp_path: Path) -> None:
    """Rank 0 is the later one of the restarted processes; torchrun's store is that of before."""
    (tmp_path / "restarted.py").write_text(RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--max-restarts", "1", "--nproc-per-node", "2", tmp_path / "restarted.py"],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    together(Path(sys.argv[1]))
