"""Checkpoints in and out: layouts, shards, what is refused, and the memory that a load takes."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_interleave import checkpoints
from llava_interleave.checkpoints import Checkpoint, CheckpointLayout, fingerprint, load, save
from llava_interleave.config import LlavaConfig
from llava_interleave.errors import CheckpointError, OptionError, Unsupported
from llava_interleave.model import Llava
from llava_interleave.testing import tiny_checkpoint, tiny_config

UNTIED = tiny_config(text={"tie_word_embeddings": False, "num_kv_heads": 2})


def same(a: Llava, b: Llava) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Rewrite the single weights file of a checkpoint, with the safetensors package."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "new.safetensors", metadata={"format": "pt"})
    (folder / "new.safetensors").replace(
        folder / "model.safetensors"
    )  # networks that were loaded from the old one live on
    return folder


# The names that facts of the checkpoints give, written out: the table in the program must not be
# its own witness.
NAMES: dict[CheckpointLayout, list[str]] = {
    "hub": [
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.bias",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.bias",
        "vision_tower.vision_model.post_layernorm.weight",
    ],
    "original": [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.norm.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.bias",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
    ],
    "transformers-4.52": [
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.self_attn.q_proj.bias",
        "model.language_model.norm.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.vision_tower.vision_model.encoder.layers.1.self_attn.out_proj.bias",
        "model.vision_tower.vision_model.post_layernorm.weight",
    ],
    "transformers-5": [
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.1.self_attn.q_proj.bias",
        "model.language_model.norm.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.vision_tower.encoder.layers.1.self_attn.out_proj.bias",
        "model.vision_tower.post_layernorm.weight",
    ],
    "transformers-5.23": [
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.q_proj.bias",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.embeddings.patch_embedding.weight",
        "vision_tower.encoder.layers.1.self_attn.out_proj.bias",
        "vision_tower.post_layernorm.weight",
    ],
}


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
@pytest.mark.parametrize("config", [tiny_config(), UNTIED], ids=["tied", "untied, GQA"])
@pytest.mark.parametrize("shard", [5_000_000_000, 60_000], ids=["single", "shards"])
def test_layouts_hold_the_same_network(
    tmp_path: Path, layout: CheckpointLayout, config: LlavaConfig, shard: int
) -> None:
    reference = load(tiny_checkpoint(tmp_path / "reference", config))
    folder = tiny_checkpoint(tmp_path / layout, config, layout=layout, max_shard_bytes=shard)
    assert Checkpoint.open(folder).config == config
    assert same(load(folder), reference)
    files = sorted(folder.glob("*.safetensors"))
    assert (
        (len(files) > 1) == (shard == 60_000) == (folder / "model.safetensors.index.json").exists()
    )
    stored = [name for file in files for name in load_file(file)]
    expected = NAMES[layout] if not config.text.tie_word_embeddings else NAMES[layout][1:]
    assert set(expected) <= set(stored), "names"
    assert (
        len(stored)
        == len(set(stored))
        == len(reference.state_dict()) + 2 - config.text.tie_word_embeddings
    )


def test_our_files_are_the_packages_files(tmp_path: Path) -> None:
    """Reader and writer are our own for the sake of memory; the safetensors package is the judge of
    both.
    """
    folder = tiny_checkpoint(tmp_path / "a", dtype=torch.bfloat16)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before = load(folder)
    assert before.lm_head.weight.dtype == torch.bfloat16
    assert same(load(edit(folder, dict.copy)), before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16, None])
def test_types(
    tmp_path: Path, stored: torch.dtype, held: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cast in pieces of a staging buffer, which must give what a cast of the whole gives."""
    monkeypatch.setattr(
        checkpoints.safetensors_file, "_CHUNK", 1000
    )  # smaller than most tensors and no divisor of them
    folder = edit(
        tiny_checkpoint(tmp_path / "a"), lambda t: t.update({k: v.to(stored) for k, v in t.items()})
    )
    model = load(folder, dtype=held)
    expected = held or (torch.float32 if stored == torch.float64 else stored)
    name = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(
        model.get_parameter("vision_tower.encoder.layers.1.mlp.fc1.weight"),
        load_file(folder / "model.safetensors")[name].to(expected),
    )
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path / "a"))
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


def test_tied_head_stored_anyway(tmp_path: Path) -> None:
    """Some savers store the tied head too, or the head instead of the embedding; another head than
    the embedding is a mistake.
    """
    embed, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    folder = tiny_checkpoint(tmp_path / "a")
    before = load(folder)
    assert same(load(edit(folder, lambda t: t.update({head: t[embed].clone()}))), before)
    assert same(load(edit(folder, lambda t: t.pop(embed))), before)
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load(edit(folder, lambda t: t.update({embed: t[head] + 1})))


def test_unused_tensors_are_dropped(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a")
    before = load(folder)
    junk = {
        "image_newline": torch.zeros(64),
        "model.image_newline": torch.zeros(64),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(16)[None],
        "vision_tower.vision_model.head.probe": torch.zeros(1, 1, 32),
        "vision_tower.vision_model.head.mlp.fc1.weight": torch.zeros(4, 4),
    }
    assert same(load(edit(folder, lambda t: t.update(junk))), before)


def test_spare_tower_layers_are_dropped_where_config_says_so(tmp_path: Path) -> None:
    """A tower stored whole with vision_feature_layer -2: its last layer is surplus unless the
    config tells of it.
    """
    folder = tiny_checkpoint(tmp_path / "a", tiny_config(vision={"num_layers": 3}))
    two = tiny_checkpoint(tmp_path / "b", tiny_config(vision={"num_layers": 2}))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"vision_feature_layer": -2}))
    assert same(load(folder), load(two))
    values["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"16 surplus: vision_tower.vision_model.encoder.layers.2"
    ):
        load(folder)


def test_all_faults_in_one_error(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["language_model.model.norm.weight"]
        tensors["adapter.weight"] = torch.zeros(3)
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(63)
        tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(64, dtype=torch.int8)
        tensors["model.multi_modal_projector.linear_2.weight"] = torch.zeros(64, 64)

    with pytest.raises(CheckpointError) as caught:
        load(edit(tiny_checkpoint(tmp_path / "a"), spoil))
    message = str(caught.value)
    assert "1 missing: language_model.norm.weight" in message
    assert "1 surplus: adapter.weight" in message
    assert "multi_modal_projector.linear_1.bias is [63] instead of [64]" in message
    assert "linear_2.bias is of type I8, quantized" in message
    assert "is a second multi_modal_projector.linear_2.weight" in message


def one(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + b"\0\0\0\0"


BROKEN: dict[str, bytes | Callable[[bytes], bytes]] = {
    "empty": b"",
    "short": lambda data: data[:7],
    "truncated header": lambda data: data[:500],
    "truncated data": lambda data: data[:-1],
    "surplus data": lambda data: data + b"\0",
    "huge header": lambda data: (2**63).to_bytes(8, "little") + data[8:],
    "no JSON": lambda data: data[:8] + b"X" + data[9:],
    "deep JSON": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "negative offset": lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[-,'),
    "a number as entry": (7).to_bytes(8, "little") + b'{"a":1}',
    "float shape": one(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}'),
    "wrong length": one(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'),
    "unknown type": one(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'),
    "gap": one(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}'),
    "overlap": one(
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}'
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path: Path, name: str) -> None:
    folder = tiny_checkpoint(tmp_path / "a")
    file = folder / "model.safetensors"
    broken = BROKEN[name]
    file.write_bytes(broken if isinstance(broken, bytes) else broken(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no intact safetensors file"):
        load(folder)


def index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("weight_map"), "has no weight_map"),
        (lambda v: v["weight_map"].update(x="../../secret.safetensors"), r"'\.\./\.\./secret"),
        (lambda v: v["weight_map"].update(x="/etc/passwd"), "'/etc/passwd'"),
        (lambda v: v["weight_map"].update(x="pytorch_model.bin"), r"'pytorch_model\.bin'"),
        (lambda v: v["weight_map"].update(x=["a"]), "names the shard"),
        (lambda v: v["weight_map"].update(x="model-9.safetensors"), "which does not exist"),
        (
            lambda v: v["weight_map"].update(x="model-00001-of-00010.safetensors"),
            "are not in their shards: x",
        ),
    ],
)
def test_broken_index(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = index(tiny_checkpoint(tmp_path / "a", max_shard_bytes=60_000), change)
    (folder / "model-00001-of-00010.safetensors").write_bytes(
        (folder / sorted(folder.glob("*.safetensors"))[0]).read_bytes()
    )
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_other_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "nul"])
def test_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        Checkpoint.open(tmp_path / "nowhere")


def test_places_and_types_that_cannot_be(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a")
    with pytest.raises(OptionError, match=r"unknown device 'gpu'"):
        load(folder, device="gpu")
    with pytest.raises(OptionError, match=r"not torch\.int8"):
        load(folder, dtype=torch.int8)
    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="use device cpu"):
            load(folder, device="cuda")


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_saved_is_loaded(tmp_path: Path, layout: CheckpointLayout) -> None:
    source = tiny_checkpoint(tmp_path / "a", UNTIED)
    model = load(source)
    save(
        model, tmp_path / "new" / "b", processor_from=source, layout=layout, max_shard_bytes=50_000
    )
    assert same(load(tmp_path / "new" / "b"), model)
    for name in (
        "tokenizer.json",
        "preprocessor_config.json",
        "chat_template.json",
        "generation_config.json",
    ):
        assert (tmp_path / "new" / "b" / name).read_bytes() == (source / name).read_bytes()
    save(model, tmp_path / "half", processor_from=None, dtype=torch.bfloat16, layout=layout)
    assert load(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_save_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle leaves neither the folder nor a trace next to it."""
    model = load(tiny_checkpoint(tmp_path / "a"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save(model, tmp_path / "b", processor_from=tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    (tmp_path / "b").mkdir()  # empty: may be filled
    save(model, tmp_path / "b", processor_from=tmp_path / "a")
    assert same(load(tmp_path / "b"), model)


def test_save_refuses(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path / "a"))
    before = fingerprint(tmp_path / "a")
    with pytest.raises(CheckpointError, match="not empty"):
        save(model, tmp_path / "a", processor_from=None)
    assert fingerprint(tmp_path / "a") == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        save(model, tmp_path / "b", processor_from=tmp_path / "empty")
    with pytest.raises(OptionError, match="unknown layout"):
        save(model, tmp_path / "b", processor_from=None, layout="gguf")  # type: ignore[arg-type]
    model.multi_modal_projector.linear_1 = torch.nn.Linear(32, 65)
    with pytest.raises(CheckpointError, match="was changed"):
        save(model, tmp_path / "b", processor_from=None)
    assert not (tmp_path / "b").exists()


def test_fingerprint(tmp_path: Path) -> None:
    first = fingerprint(tiny_checkpoint(tmp_path / "a"))
    assert first == fingerprint(tiny_checkpoint(tmp_path / "b")) == fingerprint(tmp_path / "a")
    assert first == fingerprint(tiny_checkpoint(tmp_path / "shards", max_shard_bytes=50_000))
    assert first != fingerprint(tiny_checkpoint(tmp_path / "c", seed=1))
    assert first != fingerprint(tiny_checkpoint(tmp_path / "d", UNTIED))
    assert first != fingerprint(tiny_checkpoint(tmp_path / "e", dtype=torch.bfloat16))


def test_loaded_weights_are_ours_to_change(tmp_path: Path) -> None:
    """They may be the mapped file; training writes into them all the same, and the file stays as it
    was.
    """
    folder = tiny_checkpoint(tmp_path / "a")
    model = load(folder)
    for parameter in model.parameters():
        parameter.add_(1)
    assert not same(model, load(folder))
    before = load(folder)
    (folder / "model.safetensors").unlink()
    tiny_checkpoint(tmp_path / "b")
    assert same(before, load(tmp_path / "b")), "a deleted file stays readable for those who have it"


def test_odd_offsets(tmp_path: Path) -> None:
    """Some writers do not pad the header; a tensor at an odd byte cannot be mapped as numbers and
    is read.
    """
    folder = tiny_checkpoint(tmp_path / "a")
    before = load(folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    file.unlink()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert same(load(folder), before)


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(tiny_checkpoint(tmp_path / "a"), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {seen[-1][0]}


PEAK = """
import sys, torch
from llava_interleave.checkpoints import load
from llava_interleave.testing import tiny_checkpoint  # the same imports for both children
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
if sys.argv[4] == "meta":  # a device that takes everything and keeps nothing
    sys.modules["llava_interleave.checkpoints.load"].get_device = torch.device
load(sys.argv[1], device=sys.argv[4])  # a tiny one: what torch itself takes for the first load is not the checkpoint's
before = peak()
model = load(sys.argv[2], dtype=getattr(torch, sys.argv[3]), device=sys.argv[4])
touched = [p.view(-1)[::256].sum() for p in model.parameters() if p.is_cpu]  # mapped pages count when they are used
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """The folder of a checkpoint of 70 million parameters, made once for each dtype."""
    config = tiny_config(
        text={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_layers": 4,
            "num_heads": 16,
            "num_kv_heads": 16,
        }
    )
    root = tmp_path_factory.mktemp("large")
    return functools.cache(lambda dtype: tiny_checkpoint(root / str(dtype), config, dtype=dtype))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("held", "device", "most"),
    [("float32", "cpu", 1.15), ("bfloat16", "cpu", 1.15), ("bfloat16", "meta", 0.1)],
)
def test_peak_memory(
    tiny: Path,
    large: Callable[[torch.dtype], Path],
    stored: torch.dtype,
    held: str,
    device: str,
    most: float,
) -> None:
    """At most 1.15 times the weights as held, casting included. Pages of mapped files count. What
    goes to another device is here a few megabytes at a time only, so that it may be larger than the
    memory.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tiny, large(stored), held, device],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, done.stdout.split())
    assert size > 130_000_000
    assert peak <= most * size, f"{peak / size:.2f} times the weights"
