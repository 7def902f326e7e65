"""One network over two processes, started by torchrun, over gloo and on two GPUs over NCCL,
computes what it does in one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava_interleave import checkpoints, cli, load
from llava_interleave.chat import Chatbot
from llava_interleave.config import TextConfig
from llava_interleave.distributed.process_group import ProcessGroup, rank_and_world_size
from llava_interleave.distributed.replicated_engine import ReplicatedEngine
from llava_interleave.distributed.tensor_parallel import local_config, shard_model
from llava_interleave.engine import SamplingParams
from llava_interleave.errors import LlavaError, OptionError
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.quantization.precision import RECIPES
from llava_interleave.testing import tiny_checkpoint, tiny_config

pytestmark = [
    pytest.mark.timeout(600),
]  # two processes begin, on however busy a machine
SIZES: dict[str, dict[str, Any]] = {
    "tied": {},
    "grouped": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
    "odd vocabulary": {"vocab_size": 389},
    "divided": {
        "intermediate_size": 384,
        "head_dim": 64,
    },  # one group of the inner width for the first, two for the second
}
CASES = {name: (name, "float32") for name in ("tied", "grouped", "odd vocabulary")}
CASES |= {precision: ("divided", precision) for precision in ("bfloat16", "int8", "int4")}
CLOSE = {"bfloat16": 0.05, "int8": 0.05, "int4": 0.05}  # one rounding of an input more or less
KV = (
    100 * 2 * 2 * 64 * 4
)  # bytes of the KV cache of 100 tokens in float32; a share's 200 are for two requests of three


def images(folder: Path) -> list[str]:
    return [str(folder / f"{number}.png") for number in range(3)]


class Even:
    """Allows every second token; of which only the first process knows."""

    def __init__(self, size: int) -> None:
        self.size = size

    def allowed(self) -> Tensor:
        return torch.arange(self.size) % 2 == 0

    def take(self, token: int) -> None:
        assert token % 2 == 0


def answer_all(bot: Chatbot, folder: Path) -> dict[str, Any]:
    """Answers as token ids: several at once, sampled, aborted, with draft tokens, guided."""
    a, b, c = images(folder)
    turns = [bot.turn("What?", [a]), bot.turn("What else?", [a, b, c]), bot.turn("Who?")]
    found: dict[str, Any] = {"room": bot.engine.load().kv_total}
    found["together"] = [one.tokens for one in bot.batch(turns, max_new_tokens=12, ignore_eos=True)]
    drawn = bot.choices(turns[1], n=3, seed=5, temperature=1.0, max_new_tokens=6)
    found["drawn"] = [one.tokens for one in drawn]
    stream = bot.stream(turns[0], max_new_tokens=30, ignore_eos=True)
    next(stream)
    stream.close()
    again = bot.chat(turns[0], max_new_tokens=16, prompt_lookup_num_tokens=5, ignore_eos=True)
    found["again"] = [*again.tokens, again.usage.drafted, again.usage.accepted]
    free = bot.chat(
        turns[2], temperature=2.0, max_new_tokens=4
    )  # without a seed: another one in every process
    found["free"] = len(free.tokens)
    guided = bot.engine.add(
        bot.prompt(turns[2]),
        SamplingParams(max_new_tokens=6),
        constraint=Even(bot.processor.tokenizer.size),
    )
    while bot.engine.busy:
        bot.engine.step(0.001)
    found["guided"] = guided.generated
    bot.engine.check()
    bot.engine.clear()
    return json.loads(json.dumps(found))


def computed(network: Llava) -> list[Tensor]:
    """Features of three crops, and logits of 20 tokens in two sequences, some of them features."""
    with torch.inference_mode():
        random, size = torch.Generator().manual_seed(0), network.config.vision.image_size
        place = network.language_model.norm.weight
        features = network.encode(torch.randn(3, 3, size, size, generator=random).to(place))
        tokens = torch.randint(0, 300, (20,), generator=random).to(place.device)
        x = network.embed(tokens, [(3, features[2, :4])])
        hidden = network.forward(
            x,
            torch.cat([torch.arange(12), torch.arange(8)]).to(place.device),
            PackedAttention([12, 8]),
        )
        return [features.float(), network.logits(hidden).float()]


def compared(folder: Path, precision: str, ranks: ProcessGroup, device: str) -> dict[str, Any]:
    """How far this process's share is from the whole, and what it holds."""
    bits = precision if precision in RECIPES else None
    dtype = getattr(torch, "float32" if bits else precision)
    device = f"cuda:{ranks.rank}" if device == "cuda" else device
    whole = checkpoints.load(folder, dtype=dtype, precision=bits, device=device)
    part = checkpoints.load(folder, dtype=dtype, precision=bits)
    tp_group = shard_model(part, ranks, torch.device(device), dtype)
    with tp_group.lockstep():
        found = computed(part)
    apart = [
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(found, computed(whole), strict=True)
    ]
    try:
        computed(part)
    except LlavaError as error:
        refused = str(error)
    layers = [
        sum(t.nbytes for t in n.language_model.layers.state_dict().values()) for n in (part, whole)
    ]
    return {
        "apart": apart,
        "refused": refused,
        "layers": layers[0] / layers[1],
        "kv heads": part.config.text.num_kv_heads / whole.config.text.num_kv_heads,
        "head": len(part.lm_head.weight) / len(whole.lm_head.weight),
        "own head": part.lm_head.weight.untyped_storage().data_ptr()
        != part.language_model.embed_tokens.weight.untyped_storage().data_ptr(),
    }


def message_of(call: Any) -> str:
    try:
        call()
    except LlavaError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def together(folder: Path, device: str) -> None:
    """What each of two processes does."""
    ranks, found = ProcessGroup(*rank_and_world_size()), {}
    found["batch_invariant"] = message_of(
        lambda: load(folder / "tied", device=device, batch_invariant=True)
    )
    try:
        bot = load(folder / "tied", device=device, kv_bytes=KV)
    except SystemExit:
        assert ranks.rank
    else:
        found["answers"] = answer_all(bot, folder)
        found["info"] = bot.info()
        found["attribution"] = message_of(
            lambda: bot.attribute(bot.turn("What?", images(folder)[:1]), "That.")
        )
        found["adapter"] = message_of(lambda: bot.add_adapter("one", folder))
        found["second"] = message_of(lambda: load(folder / "tied", device=device))
        found["after"] = answer_all(bot, folder)["together"]
        talk = bot.conversation()
        talk.ask("Who?", max_new_tokens=3)
        talk.save(folder / "talk.json")
        assert isinstance(bot.engine, ReplicatedEngine)
        bot.engine.close()
    for name, (size, precision) in CASES.items():
        found[name] = compared(folder / size, precision, ranks, device)
    (folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *words,
    ]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA GPUs are needed")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=TWO)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    for name, text in SIZES.items():
        tiny_checkpoint(folder / name, tiny_config(text=text))
    for path in images(folder):
        Image.frombytes("RGB", (50, 40), Random(path[-5:]).randbytes(6000)).save(path)
    done = launch(__file__, str(folder), device)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_a_share_computes_what_the_whole_does(name: str, found: list[dict[str, Any]]) -> None:
    layers = [rank[name]["layers"] for rank in found]
    assert 1 <= sum(layers) < 1.1  # norms are whole
    assert (layers[0] < 0.9 * layers[1]) == (name in ("int8", "int4"))  # by whole groups
    for one in (rank[name] for rank in found):
        assert max(one["apart"]) < CLOSE.get(name, 1e-5)
        assert one["kv heads"] == 0.5
        assert one["head"] == (1 if name == "odd vocabulary" else 0.5)
        assert one["own head"] == (name in ("grouped", "int8", "int4"))
        assert one["refused"].startswith(
            "this operation is not supported under tensor parallelism (world size 2); run it"
        )


@pytest.mark.slow
def test_answers_are_those_of_one_process(
    folder: Path, device: str, found: list[dict[str, Any]]
) -> None:
    bot = load(folder / "tied", device=device, kv_bytes=2 * KV)  # the KV cache of a rank takes half
    answers = answer_all(bot, folder)
    assert answers == found[0]["answers"]
    assert answers["together"] == found[0]["after"]
    assert bot.info() == found[0]["info"]


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_refused(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    assert all("batch_invariant needs one process" in rank["batch_invariant"] for rank in found)
    first = found[0]
    assert first["attribution"].startswith(
        "Unsupported: this operation is not supported under tensor parallelism (world size 2)"
    )
    assert (
        first["adapter"].startswith("Unsupported: ")
        and "llava convert --adapter" in first["adapter"]
    )
    assert first["second"].startswith(
        "Unsupported: this torchrun has loaded a tensor-parallel network already"
    )
    assert not list(folder.glob("talk.json*kv*"))


@pytest.mark.parametrize(
    ("count", "group", "sizes", "message"),
    [
        (
            3,
            1,
            {},
            "3 processes cannot share 4 attention heads and 4 KV heads evenly and .* width of 96: start .* 1 or 2 or 4",
        ),
        (
            4,
            1,
            {"num_kv_heads": 2},
            "4 processes cannot share 4 attention heads and 2 KV heads .*: start .* 1 or 2$",
        ),
        (
            2,
            128,
            {},
            "width of 96 in whole groups of 128 quantized weights: start torchrun with --nproc-per-node 1$",
        ),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused(
    count: int, group: int, sizes: dict[str, int], message: str
) -> None:
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
    } | sizes
    with pytest.raises(OptionError, match=message):
        local_config(TextConfig(**text), ProcessGroup(0, count), group)


@pytest.mark.slow
def test_the_command_answers_through_two_processes(folder: Path, device: str) -> None:
    """Both run it; one of them reads, answers and writes."""
    samples = [
        {"id": str(n), "image": images(folder)[n], "question": f"What is {n}?"} for n in range(3)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    words = ["-m", str(folder / "tied"), "--device", device, "--max-new-tokens", "5"]
    done = launch(
        "-m",
        "llava_interleave",
        "batch",
        str(folder / "samples.jsonl"),
        str(folder / "two.jsonl"),
        *words,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("3 samples, 0 with an error") == 1
    sys.argv = ["llava", "batch", str(folder / "samples.jsonl"), str(folder / "one.jsonl"), *words]
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    one, two = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["answer"] for row in one] == [row["answer"] for row in two]


if __name__ == "__main__":
    together(Path(sys.argv[1]), sys.argv[2])
