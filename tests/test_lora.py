"""Adapters against the formula, against merged weights, against PEFT, and against each other in one
batch.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from torch import Tensor
from typer.testing import CliRunner

import llava_interleave
from llava_interleave import checkpoints
from llava_interleave.chat import Chatbot
from llava_interleave.checkpoints import CheckpointLayout, read_adapter, write_adapter
from llava_interleave.cli import app
from llava_interleave.cli.local_model import LazyModel, ModelFlags
from llava_interleave.config import LoraConfig
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.errors import CheckpointError, OptionError
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.lora import Adapters, LoraAdapter, LoraWeights, attach, linears, merge
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.prompt import Media, Prompt
from llava_interleave.quantization.linear_cpu import QuantizedLinear
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from llava_interleave.testing import tiny_checkpoint, tiny_config
from recipes.tiny_world import benchmark
from tests.helpers.engine import stream
from tests.helpers.lora import DECODER, made

WHOLE = LoraConfig(
    rank=3,
    alpha=5.0,
    dropout=0.0,
    targets=("vision_tower.*", "multi_modal_projector.linear_1", "*.q_proj", "*.down_proj"),
)
GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
SIZE, GRID, IMAGE = 30, 4, tiny_config().image_token_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head of its own: a tied one of random weights says its last token again, whatever came
    before.
    """
    return tiny_checkpoint(
        tmp_path_factory.mktemp("tiny") / "model", tiny_config(text={"tie_word_embeddings": False})
    )


def merged(folder: Path, adapter: LoraAdapter) -> Llava:
    network = checkpoints.load(folder)
    merge(network, adapter)
    return network


def carrying(folder: Path, adapter: LoraAdapter, name: str = "a") -> tuple[Llava, Adapters]:
    network = checkpoints.load(folder)
    adapters = Adapters(network)
    adapters.add(name, adapter)
    return network, adapters


@cache
def pixels(seed: int) -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, length: int, image: int | None = None) -> Prompt:
    """Text, with an image after its first 40 tokens."""
    tokens = torch.randint(
        0, 300, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    if image is None:
        return Prompt(tokens)
    media = Media(pixels(image), ImageTokenLayout(GRID), bytes([image]), min(40, length))
    return Prompt([*tokens[:40], *[IMAGE] * GRID**2, *tokens[40:]], (media,))


@torch.no_grad()
def logits(network: Llava, inputs: Prompt) -> Tensor:
    features = [(media.start, network.encode(media.pixels)[0]) for media in inputs.media]
    x = network.embed(torch.tensor(inputs.tokens), features)
    return network.logits(network.forward(x, torch.arange(len(x)), PackedAttention([len(x)])))


def engine(network: Llava, **options: Any) -> Engine:
    return Engine(network, eos_ids={0}, vocab=384, kv_bytes=1 << 24, **options)


@pytest.mark.slow
def test_a_fresh_adapter_changes_nothing_and_alone_trains(folder: Path) -> None:
    network, inputs = checkpoints.load(folder), prompt(0, 20, image=1)
    before, state = (
        logits(network, inputs),
        {name: value.clone() for name, value in network.state_dict().items()},
    )
    adapter = attach(network, WHOLE, seed=3)
    assert torch.equal(logits(network, inputs), before)
    training = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(training) == 2 * len(adapter.parts) == 2 * (12 + 1 + 2 + 2)
    assert all(".low." in name for name in training)
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network.train()
    for _ in range(2):  # B is zero at first, so that A has no gradient
        features = [(media.start, network.encode(media.pixels)[0]) for media in inputs.media]
        x = network.embed(torch.tensor(inputs.tokens), features)
        network.logits(network.forward(x, torch.arange(len(x)), PackedAttention([len(x)])))[
            -1, 5
        ].backward()
        optimiser.step()
    assert all(
        part.a.grad is not None and part.a.grad.any() and part.b.any()
        for part in adapter.parts.values()
    )
    after = {
        name.replace(".base.", "."): value
        for name, value in network.state_dict().items()
        if ".low." not in name
    }
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert (logits(network.eval(), inputs) - before).abs().max() > 0.1
    with pytest.raises(CheckpointError, match="merge adapters"):
        checkpoints.save(network, folder / "never", processor_from=None)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_formula(folder: Path, rslora: bool, scale: float) -> None:
    adapter = made(folder, LoraConfig(4, 8.0, 0.5, ("*.layers.1.mlp.up_proj",), rslora), 0)
    (part,) = adapter.parts.values()
    network, adapters = carrying(folder, adapter)
    up, x = network.get_submodule("language_model.layers.1.mlp.up_proj"), torch.randn(5, 64)
    expected = up.base(x) + scale * (part.b @ (part.a @ x.T)).T  # type: ignore[operator]
    with adapters.whole("a"):
        assert torch.allclose(up(x), expected, atol=1e-5)
        up.train()
        assert not torch.allclose(up(x), expected, atol=1e-2)  # half of x is left out
        means = torch.stack([up(x) for _ in range(4000)]).mean(0)
    assert torch.allclose(means, expected, atol=0.35)
    up.eval()
    with adapters.route.through([("0", slice(1, 3))]):
        mixed = up(x)
    assert torch.equal(mixed[[0, 3, 4]], up(x)[[0, 3, 4]])
    assert torch.allclose(mixed[1:3], expected[1:3], atol=1e-5)


def test_matrices_in_float32_over_weights_in_bfloat16(folder: Path) -> None:
    network = checkpoints.load(folder, dtype=torch.bfloat16)
    adapter = attach(network, DECODER)
    assert {part.a.dtype for part in adapter.parts.values()} == {torch.float32}
    assert logits(network, prompt(0, 9)).dtype == torch.bfloat16


def test_targets_are_patterns_and_one_that_matches_nothing_is_an_error(folder: Path) -> None:
    network = checkpoints.load(folder)
    assert "lm_head" not in linears(network)
    one = attach(network, LoraConfig(targets=("language_model.layers.[1-9]*.self_attn.?_proj",)))
    assert list(one.parts) == [f"language_model.layers.1.self_attn.{x}_proj" for x in "qkvo"]
    with pytest.raises(
        OptionError,
        match=r"'\*\.c_attn'; there are vision_tower\.encoder\.layers\.\*\.self_attn\.q_proj, ",
    ):
        attach(checkpoints.load(folder), LoraConfig(targets=("*.q_proj", "*.c_attn")))
    with pytest.raises(OptionError, match="no linear matches 'lm_head'"):
        attach(checkpoints.load(folder), LoraConfig(targets=("lm_head",)))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(OptionError, match=r"not [01]"):
            LoraConfig(**wrong)


def test_the_same_seed_gives_the_same_adapter(folder: Path) -> None:
    a, b, c = (attach(checkpoints.load(folder), DECODER, seed) for seed in (1, 1, 2))
    name = "language_model.layers.0.mlp.up_proj"
    assert torch.equal(a.parts[name].a, b.parts[name].a)
    assert not torch.equal(a.parts[name].a, c.parts[name].a)


@pytest.mark.parametrize("lora", [DECODER, WHOLE], ids=["decoder", "whole"])
def test_merged_equals_unmerged(folder: Path, lora: LoraConfig) -> None:
    adapter, inputs = made(folder, lora, 1), prompt(0, 60, image=1)
    network, adapters = carrying(folder, adapter)
    alone = logits(network, inputs)
    with adapters.whole("a"):
        unmerged = logits(network, inputs)
    assert (unmerged - logits(merged(folder, adapter), inputs)).abs().max() < 1e-4
    assert (unmerged - alone).abs().max() > 0.1
    assert torch.equal(alone, logits(checkpoints.load(folder), inputs))
    with pytest.raises(
        OptionError, match="LoraLinear: an adapter is merged into float weights only"
    ):
        merge(network, adapter)


def mixed(folder: Path) -> list[tuple[str | None, Prompt, list[int]]]:
    """Requests of several adapters with what a network of merged weights answers to each alone."""
    networks = {
        None: checkpoints.load(folder),
        "d": merged(folder, made(folder, DECODER, 1)),
        "w": merged(folder, made(folder, WHOLE, 2)),
    }
    prompts = [prompt(0, 50, image=1), prompt(1, 7), prompt(0, 50, image=2), prompt(2, 70)]
    pairs = [(name, p) for p in prompts for name in ("w", None, "d")]
    found = [
        (name, p, engine(networks[name]).generate([p], GREEDY)[0].generated) for name, p in pairs
    ]
    assert len({tuple(answer) for _, _, answer in found}) == len(found)
    return found


def with_both(folder: Path, **options: Any) -> Engine:
    e = engine(checkpoints.load(folder), **options)
    e.adapters.add("d", made(folder, DECODER, 1))
    e.adapters.add("w", made(folder, WHOLE, 2))
    return e


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 5, "max_batched_images": 2}, {"kv": 200}],
    ids=str,
)
def test_a_mixed_batch_equals_each_alone_equals_merged(
    folder: Path, options: dict[str, int]
) -> None:
    expected = mixed(folder)
    e = with_both(folder, **{name: value for name, value in options.items() if name != "kv"})
    if "kv" in options:  # room for two or three at a time: caches go, and what runs gives way
        e._prefix_cache.total = options["kv"]
    requests = [e.add(p, GREEDY, adapter=name) for name, p, _ in expected]
    while e.busy:
        e.step()
        e.check()
    assert [request.generated for request in requests] == [answer for _, _, answer in expected]
    alone = with_both(folder)
    for name, p, answer in expected:
        assert alone.generate([p], GREEDY, adapter=name)[0].generated == answer
        assert stream(alone, p, GREEDY, adapter=name)[-1].request.generated == answer


def test_caches_do_not_mix_adapters_but_images_that_no_adapter_sees_are_shared(
    folder: Path,
) -> None:
    e, inputs = with_both(folder), prompt(0, 50, image=1)
    usages = []
    for name in (None, "d", "w", None, "d", "w"):
        (request,) = e.generate([inputs], GREEDY, adapter=name)
        usages.append((request.usage.cached, e.load().crops_encoded))
    last = len(inputs) - 1
    assert usages == [(0, 1), (0, 1), (0, 2), (last, 2), (last, 2), (last, 2)]


def test_adapters_of_several_images_in_one_step(folder: Path) -> None:
    """The tower is called once for each adapter that sees images, and features do not meet."""
    e = with_both(folder, max_batched_images=8)
    pairs = [(name, prompt(5, 20, image=n)) for n in (1, 2) for name in ("w", None, "d")]
    requests = [e.add(p, GREEDY, adapter=name) for name, p in pairs]
    e.step()
    assert e.load().crops_encoded == 4
    while e.busy:
        e.step()
    networks = {
        None: checkpoints.load(folder),
        "d": merged(folder, made(folder, DECODER, 1)),
        "w": merged(folder, made(folder, WHOLE, 2)),
    }
    for (name, p), request in zip(pairs, requests, strict=True):
        assert request.generated == engine(networks[name]).generate([p], GREEDY)[0].generated


def test_each_adapter_computes_once_a_step_and_never_for_rows_that_are_not_its_own(
    folder: Path,
) -> None:
    e, rows = with_both(folder), []
    low = e.model.get_submodule("language_model.layers.1.self_attn.q_proj.low")
    for key, part in low.named_children():
        part.register_forward_hook(lambda _, x, __, key=key: rows.append((key, len(x[0]))))
    for index, name in enumerate(("w", None, "d", "w", None, "d")):
        e.add(prompt(index, 10 + index), GREEDY, adapter=name)
    e.step()
    assert rows == [("0", 12 + 15), ("1", 10 + 13)]
    rows.clear()
    while e.busy:
        e.step()
    assert set(rows) == {("0", 2), ("1", 2)}
    rows.clear()
    e.generate([prompt(9, 10)], GREEDY)
    assert rows == []


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_adapters_over_quantized_weights(folder: Path, precision: str) -> None:
    network, adapter = checkpoints.load(folder, precision=precision), made(folder, WHOLE, 2)
    x, part = torch.randn(7, 64), adapter.parts["language_model.layers.0.self_attn.q_proj"]
    expected = (
        network.language_model.layers[0].self_attn.q_proj(x) + 5 / 3 * x @ part.a.T @ part.b.T
    )
    e, prompts = engine(network), [prompt(0, 50, image=1), prompt(1, 7), prompt(2, 30)]
    alone = [e.generate([p], GREEDY)[0].generated for p in prompts]
    e.adapters.add("w", adapter)
    alone += [e.generate([p], GREEDY, adapter="w")[0].generated for p in prompts]
    with e.adapters.whole("w"):
        assert torch.allclose(
            network.language_model.layers[0].self_attn.q_proj(x), expected, atol=1e-5
        )
    e.clear()
    requests = [e.add(p, GREEDY, adapter=name) for name in (None, "w") for p in prompts]
    while e.busy:
        e.step()
    assert [request.generated for request in requests] == alone
    assert len({tuple(answer) for answer in alone}) == len(alone)
    with pytest.raises(OptionError, match="merged into float weights only"):
        merge(checkpoints.load(folder, precision=precision), adapter)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_over_quantized_weights_equals_training_over_the_dequantized(
    folder: Path, precision: str, bfloat16: bool
) -> None:
    """Equal losses and adapters, but for bfloat16's rounding; the same bytes of weights; afterwards
    the kernels answer again.
    """
    packed, whole = checkpoints.load(folder, precision=precision), checkpoints.load(folder)
    before = {name: value.clone() for name, value in packed.named_buffers()}
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = whole.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            linear.weight.data = module.dequantize()
    inputs = prompt(0, 50, image=1)
    trained = []
    for network in (packed, whole):
        adapter = attach(network, WHOLE, 5)
        optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.01)
        network.train()
        losses = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                features = [
                    (media.start, network.encode(media.pixels)[0]) for media in inputs.media
                ]
                x = network.embed(torch.tensor(inputs.tokens), features)
                said = network.logits(
                    network.forward(x, torch.arange(len(x)), PackedAttention([len(x)]))
                )
                loss = torch.nn.functional.cross_entropy(
                    said[40 + GRID**2 : -1], torch.tensor(inputs.tokens[41 + GRID**2 :])
                )
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        assert losses[2] < losses[0]
        trained.append(
            (
                losses,
                {name: (part.a.detach(), part.b.detach()) for name, part in adapter.parts.items()},
            )
        )
    (losses, parts), (wanted, others) = trained
    assert losses == pytest.approx(wanted, rel=1e-3 if bfloat16 else 1e-5)
    for name, pair in parts.items() if not bfloat16 else ():
        for ours, theirs in zip(pair, others[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert all(
        torch.equal(value, before[name.replace(".base.", ".")])
        for name, value in packed.named_buffers()
    )
    x = torch.randn(3, 64)
    linear = packed.eval().lm_head
    assert isinstance(linear, QuantizedLinear)
    torch.testing.assert_close(linear(x), linear.plain(x))
    assert not torch.allclose(linear(x), linear.train()(x))  # in training inputs are not rounded


def test_names(folder: Path) -> None:
    e = engine(checkpoints.load(folder))
    with pytest.raises(OptionError, match="unknown adapter 'd'; loaded are: none"):
        e.add(prompt(0, 5), adapter="d")
    e = with_both(folder)
    with pytest.raises(OptionError, match="unknown adapter 'x'; loaded are: 'd', 'w'"):
        e.add(prompt(0, 5), adapter="x")
    with pytest.raises(OptionError, match="an adapter 'd' exists already"):
        e.adapters.add("d", made(folder, DECODER, 1))
    assert not e.busy


def test_a_thread_says_for_itself_alone(folder: Path) -> None:
    network, adapters = carrying(folder, made(folder, DECODER, 1))
    inputs, found = prompt(0, 9), []
    before = logits(network, inputs)
    with adapters.whole("a"):
        thread = threading.Thread(target=lambda: found.append(logits(network, inputs)))
        thread.start()
        thread.join()
        assert not torch.equal(logits(network, inputs), before)
    assert torch.equal(found[0], before)
    assert torch.equal(logits(network, inputs), before)


# PEFT's format


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Callable[[], Any]:
    """A fresh network of transformers."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return lambda: transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


@torch.no_grad()
def their_logits(network: Any, inputs: Prompt) -> Tensor:
    return network(
        input_ids=torch.tensor([inputs.tokens]), pixel_values=inputs.media[0].pixels
    ).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [DECODER, WHOLE, LoraConfig(4, 8.0, 0.1, ("*.o_proj", "*.out_proj"), rslora=True)],
    ids=str,
)
def test_peft_loads_ours(
    folder: Path, tmp_path: Path, theirs: Callable[[], Any], lora: LoraConfig
) -> None:
    peft = pytest.importorskip("peft")
    inputs, adapter = prompt(0, 60, image=1), made(folder, lora, 4)
    write_adapter(tmp_path / "a", adapter, base=str(folder))
    network, adapters = carrying(folder, read_adapter(tmp_path / "a", checkpoints.load(folder)))
    with adapters.whole("a"):
        ours = logits(network, inputs)
    loaded = peft.PeftModel.from_pretrained(theirs(), tmp_path / "a")
    assert (ours - their_logits(loaded, inputs)).abs().max() < 1e-4
    assert (ours - their_logits(theirs(), inputs)).abs().max() > 0.1
    targets = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert len(targets) == len(adapter.parts)  # and at nothing else
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (
        lora.rank,
        lora.alpha,
        lora.dropout,
        lora.rslora,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "linear_2", "fc1"]},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "use_rslora": True},
        {
            "target_modules": ["v_proj", "gate_proj"],
            "rank_pattern": {"gate_proj": 2},
            "task_type": "CAUSAL_LM",
        },
        {
            "target_modules": ["q_proj", "up_proj", "fc1"],
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"layers.1.mlp.up_proj": 3, "up_proj": 9, "fc1": 1},
        },
        {"target_modules": ["q_proj", "linear_2", "fc1", "down_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["multi_modal_projector"]},
        {"target_modules": ["linear_1"], "modules_to_save": ["linear_2", "gate_proj"]},
    ],
    ids=["some", "all, rslora", "ranks", "alphas", "dora", "projector", "linears"],
)
def test_ours_loads_pefts(
    folder: Path, tmp_path: Path, theirs: Callable[[], Any], options: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options)
    network, inputs = peft.get_peft_model(theirs(), config).eval(), prompt(0, 60, image=1)
    with torch.no_grad():  # as training leaves them
        for name, parameter in network.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    network.save_pretrained(tmp_path / "a")
    own, adapters = carrying(folder, read_adapter(tmp_path / "a", checkpoints.load(folder)))
    expected = their_logits(network, inputs)
    with adapters.whole("a"):
        assert (logits(own, inputs) - expected).abs().max() < 1e-4 * expected.abs().max()
    adapter = read_adapter(tmp_path / "a", own)
    assert (
        logits(merged(folder, adapter), inputs) - expected
    ).abs().max() < 1e-4 * expected.abs().max()
    write_adapter(tmp_path / "again", adapter)
    tensors, again = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "again")
    )
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert (
        their_logits(peft.PeftModel.from_pretrained(theirs(), tmp_path / "again"), inputs)
        - expected
    ).abs().max() < 1e-5


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "language_model.norm"]])
def test_whole_modules_that_are_no_linears_are_merged(
    folder: Path, tmp_path: Path, theirs: Callable[[], Any], modules: list[str]
) -> None:
    """Beside other requests they cannot stand. A tied output head gets a weight of its own, as in
    PEFT.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=modules, init_lora_weights=False
    )
    network, inputs = peft.get_peft_model(theirs(), config).eval(), prompt(0, 60, image=1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    network.save_pretrained(tmp_path / "a")
    own = checkpoints.load(folder)
    adapter = read_adapter(tmp_path / "a", own)
    with pytest.raises(OptionError, match=r"for all requests; merge it .*llava convert --adapter"):
        Adapters(own).add("a", adapter)
    expected, together = their_logits(network, inputs), merged(folder, adapter)
    assert (logits(together, inputs) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not together.config.text.tie_word_embeddings
    checkpoints.save(together, tmp_path / "merged", processor_from=folder)
    again = checkpoints.load(tmp_path / "merged")
    assert torch.equal(logits(again, inputs), logits(together, inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(4, 8.0, 0.0, ("language_model.*",), dora=True),
        LoraConfig(4, 8.0, 0.3, ("*.q_proj", "*.fc?", "*.down_proj"), dora=True, rslora=True),
        LoraConfig(
            4, 8.0, 0.3, ("language_model.*", "*.fc1"),
            rank_pattern=("*.fc1=2", "*.gate_proj=7"), alpha_pattern=("*.fc1=3.5",),
            modules_to_save=("multi_modal_projector",),
        ),
        LoraConfig(
            3, 6.0, 0.0, ("language_model.layers.*",), dora=True, rank_pattern=("*.mlp.*=2",),
            modules_to_save=("vision_tower", "multi_modal_projector.*", "*norm", "lm_head"),
        ),
    ],
    ids=["dora", "dora, dropout", "ranks, projector", "dora, ranks, tower, norms, head"],
)  # fmt: skip
def test_training_is_that_of_peft(
    folder: Path, tmp_path: Path, theirs: Callable[[], Any], lora: LoraConfig
) -> None:
    """The losses and adapters of five steps, from the same matrices, with the same dropout; what
    ours writes then PEFT reads.
    """
    peft = pytest.importorskip("peft")
    network, inputs = checkpoints.load(folder), prompt(0, 50, image=1)
    write_adapter(tmp_path / "begin", attach(network, lora, 3))
    other = peft.PeftModel.from_pretrained(theirs(), tmp_path / "begin", is_trainable=True)
    network = checkpoints.load(folder)
    adapter = attach(network, lora, 3)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == sum(
        p.numel() for p in other.parameters() if p.requires_grad
    )

    def ours() -> Tensor:
        features = [(media.start, network.encode(media.pixels)[0]) for media in inputs.media]
        x = network.embed(torch.tensor(inputs.tokens), features)
        return network.logits(network.forward(x, torch.arange(len(x)), PackedAttention([len(x)])))

    def of_peft() -> Tensor:
        found = other(input_ids=torch.tensor([inputs.tokens]), pixel_values=inputs.media[0].pixels)
        assert isinstance(found.logits, Tensor)
        return found.logits[0]

    losses = []
    for model, forward in ((network, ours), (other, of_peft)):
        model.train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(5):
            torch.manual_seed(step)
            loss = torch.nn.functional.cross_entropy(
                forward()[40 + GRID**2 : -1], torch.tensor(inputs.tokens[41 + GRID**2 :])
            )
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        model.eval()
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-4)
    assert losses[4] < losses[0]
    write_adapter(tmp_path / "ours", adapter)
    other.save_pretrained(tmp_path / "theirs")
    found, expected = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=3e-4, msg=name)
    with torch.no_grad():
        alone = ours()
    loaded = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours")
    assert (their_logits(loaded, inputs) - alone).abs().max() < 1e-4
    again = merged(folder, read_adapter(tmp_path / "ours", checkpoints.load(folder)))
    assert (logits(again, inputs) - alone).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ("*.v_proj",)}, "both have vision_tower.* leave it out of one"),
        ({"modules_to_save": ("projector",)}, "no module matches 'projector'; there are vision"),
        ({"rank_pattern": ("*.fc1=2",), "targets": ("*_proj",)}, "no linear matches .*fc1'; there"),
        ({"rank_pattern": ("*.fc1",)}, r"rank_pattern takes PATTERN=NUMBER, .* '\*\.fc1'"),
        ({"rank_pattern": ("*.fc1=2.5",)}, "rank_pattern .*fc1: the rank of an adapter is a whole"),
        ({"alpha_pattern": ("*.fc1=-1",)}, "alpha_pattern .*fc1: an adapter's alpha is a number"),
        ({"dora": 1}, "dora must be true or false, not 1"),
    ],
    ids=str,
)
def test_contradictory_settings_are_refused(
    folder: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        attach(checkpoints.load(folder), LoraConfig(**{"targets": ("*",), **lora}))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_modules_to_save_of_quantized_weights_are_floats(
    folder: Path, tmp_path: Path, precision: str
) -> None:
    network, inputs = checkpoints.load(folder, precision=precision), prompt(0, 30, image=1)
    projector = network.multi_modal_projector
    expected = {
        f"{name}.{key}": value.clone()
        for name, module in projector.named_modules()
        if hasattr(module, "in_features")
        for key, value in {
            "weight": getattr(module, "dequantize", lambda m=module: m.weight)(),
            "bias": module.bias,
        }.items()
    }
    lora = LoraConfig(4, modules_to_save=("multi_modal_projector", "lm_head"), dora=True)
    adapter = attach(network, lora)
    found = dict(network.multi_modal_projector.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    write_adapter(tmp_path / "a", adapter)
    other = checkpoints.load(folder)
    merge(other, read_adapter(tmp_path / "a", other))
    assert torch.equal(other.lm_head.weight, network.lm_head.weight)
    assert engine(network).generate([inputs], GREEDY)[0].generated


def test_dora_over_quantized_weights_is_dora_over_what_they_stand_for(folder: Path) -> None:
    network, lora = checkpoints.load(folder, precision="int8"), LoraConfig(4, 8.0, 0.0)
    name = "language_model.layers.0.mlp.up_proj"
    linear, random = network.get_submodule(name), torch.Generator().manual_seed(0)
    a, b, magnitude, x = (
        torch.randn(*shape, generator=random) for shape in ((4, 64), (96, 4), (96,), (5, 64))
    )
    adapters = Adapters(network)
    adapters.add("d", LoraAdapter(lora, {name: LoraWeights(a, b, lora, magnitude=magnitude)}))
    weight = linear.dequantize() + 2 * b @ a
    expected = x @ (weight * (magnitude / weight.norm(dim=1))[:, None]).T
    with adapters.whole("d"):
        found = network.get_submodule(name)(x)
    assert (found - expected).norm() < 0.03 * expected.norm()


# What adapters of each layout call a linear of the decoder, of the projector and of the tower,
# written out.
NAMES: dict[CheckpointLayout, tuple[str, str, str]] = {
    "hub": (
        "language_model.model.layers.1.mlp.up_proj",
        "multi_modal_projector.linear_1",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    ),
    "original": (
        "model.layers.1.mlp.up_proj",
        "model.mm_projector.0",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    ),
    "transformers-4.52": (
        "model.language_model.layers.1.mlp.up_proj",
        "model.multi_modal_projector.linear_1",
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    ),
    "transformers-5": (
        "model.language_model.layers.1.mlp.up_proj",
        "model.multi_modal_projector.linear_1",
        "model.vision_tower.encoder.layers.0.mlp.fc1",
    ),
    "transformers-5.23": (
        "language_model.model.layers.1.mlp.up_proj",
        "multi_modal_projector.linear_1",
        "vision_tower.encoder.layers.0.mlp.fc1",
    ),
}
OURS = (
    "language_model.layers.1.mlp.up_proj",
    "multi_modal_projector.linear_1",
    "vision_tower.encoder.layers.0.mlp.fc1",
)


def files(folder: Path, target: Path, **config: Any) -> Path:
    """A written adapter, its settings changed."""
    write_adapter(target, made(folder, LoraConfig(4, 8.0, targets=OURS), 1))
    settings = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(settings | config))
    return target


def edit(target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_names_of_every_layout_are_read(
    folder: Path, tmp_path: Path, layout: CheckpointLayout
) -> None:
    target = files(folder, tmp_path / "a")
    expected = load_file(target / "adapter_model.safetensors")

    def rename(tensors: dict[str, Tensor]) -> None:
        for new, old in zip(NAMES["transformers-5"], NAMES[layout], strict=True):
            for side in "AB":
                value = tensors.pop(f"base_model.model.{new}.lora_{side}.weight")
                tensors[f"base_model.model.{old}.lora_{side}.weight"] = value

    adapter = read_adapter(edit(target, rename), checkpoints.load(folder))
    assert set(adapter.parts) == set(OURS)
    for name, stored in zip(OURS, NAMES["transformers-5"], strict=True):
        assert torch.equal(
            adapter.parts[name].a, expected[f"base_model.model.{stored}.lora_A.weight"]
        )
        assert torch.equal(
            adapter.parts[name].b, expected[f"base_model.model.{stored}.lora_B.weight"]
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "has the peft_type 'LOHA'; only 'LORA' is supported"),
        ({"task_type": "SEQ_CLS"}, "has the task_type 'SEQ_CLS'"),
        ({"use_dora": True}, "of another network: .*rank 4, A .4, 64. and B .96, 4."),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"alpha_pattern": {"up_proj": -3}}, "alpha is a number above 0, not -3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        (
            {"trainable_token_indices": [1], "lora_bias": True},
            r"lora_bias=True, trainable_token_indices=\[1\]",
        ),
        ({"of_next_year": 1}, "of_next_year=1"),
        ({"r": 0}, "of another network: .*rank 0, A .4, 64. and B .96, 4."),
        ({"lora_alpha": "8"}, "alpha is a number above 0, not '8'"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused_by_name(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_adapter(files(folder, tmp_path / "a", **config), checkpoints.load(folder))


def test_broken_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    network = checkpoints.load(folder)
    with pytest.raises(
        CheckpointError,
        match=r"is not an adapter: in PEFT's format that is a folder with adapter_config.json and",
    ):
        read_adapter(folder, network)
    target = files(folder, tmp_path / "a")
    tensors = (target / "adapter_model.safetensors").read_bytes()
    (target / "adapter_model.safetensors").write_bytes(tensors[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(target, network)
    (target / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has the peft_type None"):
        read_adapter(target, network)
    (target / "adapter_model.safetensors").rename(target / "adapter_model.bin")
    for read in (
        lambda: read_adapter(target, network),
        lambda: checkpoints.adapter_fingerprint(target),
    ):
        with pytest.raises(
            CheckpointError, match=r"no adapter_model.safetensors but adapter_model.bin, a pickle"
        ):
            read()
    with pytest.raises(CheckpointError, match="is not empty"):
        write_adapter(target, made(folder, DECODER, 0))


def test_an_adapter_of_another_network_is_refused_with_the_numbers(
    folder: Path, tmp_path: Path
) -> None:
    other = tiny_checkpoint(
        tmp_path / "other", tiny_config(text={"num_layers": 3, "intermediate_size": 80})
    )
    write_adapter(
        tmp_path / "a",
        made(other, LoraConfig(4, 8.0, targets=("language_model.*.mlp.up_proj",)), 1),
    )
    name = "language_model.layers.{}.mlp.up_proj"
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path / "a", checkpoints.load(folder))
    message = str(caught.value)
    assert (
        f"model.{name.format(2)}.lora_A.weight [4, 64] belongs to no linear of the network"
        in message
    )
    assert (
        f"{name.format(0)} has 64 inputs and 96 outputs, the adapter, of rank 4, A [4, 64] and B [80, 4]"
        in message
    )
    half = edit(
        files(folder, tmp_path / "b"),
        lambda t: t.pop(f"base_model.model.{NAMES['transformers-5'][0]}.lora_B.weight"),
    )
    with pytest.raises(CheckpointError, match=r"the adapter, of rank 4, A \[4, 64\]$"):
        read_adapter(half, checkpoints.load(folder))
    with pytest.raises(CheckpointError, match="it has no tensors"):
        read_adapter(edit(half, dict.clear), checkpoints.load(folder))
    head = edit(
        files(folder, tmp_path / "c"),
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}),
    )
    with pytest.raises(
        CheckpointError, match=r"lm_head.lora_A.weight \[4, 64\] belongs to no linear"
    ):
        read_adapter(head, checkpoints.load(folder))


# Chatbot and commands


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters on the disk, `d` and `w`."""
    place = tmp_path_factory.mktemp("adapters")
    write_adapter(place / "d", made(folder, DECODER, 1), base=str(folder))
    write_adapter(place / "w", made(folder, WHOLE, 2), base=str(folder))
    return place


@pytest.fixture(scope="module")
def bots(
    folder: Path, stored: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, Chatbot]:
    """The network alone, and what `llava convert` merged."""
    place, found = tmp_path_factory.mktemp("merged"), {None: llava_interleave.load(folder)}
    for name in ("d", "w"):
        done = CliRunner().invoke(
            app, ["convert", str(folder), str(place / name), "--adapter", str(stored / name)]
        )
        assert done.exit_code == 0, done.output
        found[name] = llava_interleave.load(place / name)
    return found


def random_image(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    )


def test_a_question_chooses_its_adapter(
    folder: Path, stored: Path, bots: dict[str | None, Chatbot]
) -> None:
    bot = llava_interleave.load(folder, adapters={"d": stored / "d"})
    assert bot.adapters == ("d",)
    with pytest.raises(OptionError, match="unknown adapter 'w'; loaded are: 'd'"):
        bot.ask("What?", adapter="w")
    bot.add_adapter("w", str(stored / "w"))
    assert bot.info()["adapters"] == ["d", "w"]
    turn, answers = bot.turn("What?", [random_image(1), random_image(2)]), []
    for name, oracle in bots.items():
        want = oracle.chat(turn, max_new_tokens=12, ignore_eos=True)
        answers.append(want.tokens)
        assert (
            bot.chat(turn, max_new_tokens=12, ignore_eos=True, adapter=name).tokens == want.tokens
        )
        (batched,) = bot.batch([turn], max_new_tokens=12, ignore_eos=True, adapter=name)
        assert batched.tokens == want.tokens
        mine, same = (b.attribute(turn, want, adapter=a) for b, a in ((bot, name), (oracle, None)))
        assert mine.logprob == pytest.approx(same.logprob, abs=1e-3)
        assert [look.attention for look in mine.images] == pytest.approx(
            [look.attention for look in same.images], abs=1e-4
        )
    assert len(set(answers)) == 3


def test_user_errors_are_reported_before_the_weights_are_read(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(CheckpointError, match="there is no folder"):
        llava_interleave.load(
            folder, adapters={"a": tmp_path / "none"}, progress=lambda *done: seen.append(done)
        )
    assert seen == []


def test_commands_take_an_adapter(
    folder: Path, stored: Path, bots: dict[str | None, Chatbot], tmp_path: Path
) -> None:
    flags = ["-m", str(folder), "--adapter", str(stored / "d"), "--max-new-tokens", "9"]
    want = bots["d"].ask("Hm?", max_new_tokens=9)
    ran = CliRunner().invoke(app, ["ask", "Hm?", "--json", *flags])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert (tuple(report["tokens"]), report["adapter"]) == (want.tokens, str(stored / "d"))
    talk = CliRunner().invoke(app, ["chat", *flags], input="Hm?\n")
    assert talk.exit_code == 0, talk.output
    assert want.text in talk.stdout
    (tmp_path / "in.jsonl").write_text('{"question": "Hm?"}\n')
    done = CliRunner().invoke(
        app, ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), *flags]
    )
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.jsonl").read_text())["answer"] == want.text


def test_a_benchmark_is_answered_through_an_adapter(
    folder: Path, stored: Path, bots: dict[str | None, Chatbot], tmp_path: Path
) -> None:
    flags = [
        "-m",
        str(folder),
        "-n",
        "1",
        "--task-option",
        "scenario=single",
        "--max-new-tokens",
        "9",
        "-o",
        str(tmp_path),
    ]
    done = CliRunner().invoke(
        app, ["eval", "recipes.tiny_world.benchmark:World", "--adapter", str(stored / "d"), *flags]
    )
    assert done.exit_code == 0, done.output
    about, row = map(json.loads, (tmp_path / "world.jsonl").read_text().splitlines())
    assert "adapter" in json.dumps(about)
    messages = benchmark.examples("single", 1, held_out=False)[0].ask(tmp_path)
    assert (
        row["answer"]
        == bots["d"].chat(messages, max_new_tokens=9).text
        != bots[None].chat(messages, max_new_tokens=9).text
    )
    other = CliRunner().invoke(app, ["eval", "recipes.tiny_world.benchmark:World", *flags])
    assert other.exit_code != 0  # these rows are another model's


def test_a_results_file_tells_adapters_apart_by_every_number(
    folder: Path, stored: Path, tmp_path: Path
) -> None:
    def about(adapter: Path) -> object:
        return LazyModel(ModelFlags(str(folder), device="cpu", adapter=str(adapter))).about[
            "adapter"
        ]

    copy = files(folder, tmp_path / "a")
    before = about(copy)
    assert before != about(stored / "d")
    edit(copy, lambda t: next(iter(t.values()))[-1].add_(1e-3))
    assert about(copy) != before
    assert "adapter" not in LazyModel(ModelFlags(str(folder), device="cpu")).about


def test_a_server_has_an_adapter_as_a_model(
    folder: Path, stored: Path, bots: dict[str | None, Chatbot]
) -> None:
    bot = llava_interleave.load(
        folder, device="cpu", adapters={"d": stored / "d", "w": stored / "w"}
    )
    image = Image.new("RGB", (40, 30), "teal")
    data = io.BytesIO()
    image.save(data, "png")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "Hm?"},
            ],
        }
    ]
    with TestClient(
        create_app(bot, Settings(name="base")), base_url="http://127.0.0.1:8000"
    ) as client:
        parents = {
            model["id"]: model["parent"] for model in client.get("/v1/models").json()["data"]
        }
        assert parents == {"base": None, "d": "base", "w": "base"}
        assert client.get("/v1/models/w").json()["parent"] == "base"
        for name, oracle in (
            ("base", bots[None]),
            ("d", bots["d"]),
            ("w", bots["w"]),
            ("base", bots[None]),
        ):
            body = {"model": name, "messages": messages, "max_tokens": 9, "attribution": True}
            said = client.post("/v1/chat/completions", json=body).json()
            want = oracle.ask("Hm?", [image], max_new_tokens=9)
            assert (said["model"], said["choices"][0]["message"]["content"]) == (name, want.text)
            looked = oracle.attribute(oracle.turn("Hm?", [image]), want)
            assert said["attributions"][0]["logprob"] == pytest.approx(looked.logprob, abs=1e-3)
            again = {
                "model": name,
                "messages": [*messages, {"role": "assistant", "content": want.text}],
            }
            assert client.post("/v1/messages/attribution", json=again).status_code == 200
        refused = client.post("/v1/chat/completions", json={"model": "e", "messages": messages})
        assert refused.status_code == client.get("/v1/models/e").status_code == 404
        assert "'base', 'd', 'w'" in refused.json()["error"]["message"]
    with pytest.raises(OptionError, match="both called 'd'"):
        create_app(bot, Settings(name="d"))
