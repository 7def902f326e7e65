"""What this package does on a GPU, checked, measured, and next to transformers: one run, a table
last.

    python bench/gpu.py --small          # two minutes: small shapes, to see that everything runs
    python bench/gpu.py [--minutes 9]    # the checks in the small shape, then 0.5B and 7B
    python bench/gpu.py --device cpu --small

Needs torch and numpy (and PYTHONPATH=. where this package is not installed); transformers,
bitsandbytes and flash-attn where they are there. No network and no files: weights are random and
made on the device. Every group of measurements is a process of its own, so that one that fails,
runs out of memory or never ends is a row with its reason, and the next one goes on; groups that
time does not suffice for are named. Ceilings (memory by a copy, products of each number type) are
measured in the same run, and figures are reported as shares of what they allow: bytes that must be
read, or operations that must be done. The result goes to bench/results, group by group.
"""

import argparse
import gc
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES
from torch import Tensor, nn

from llava_interleave import config_json
from llava_interleave.checkpoints import meta_network
from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.engine import Engine, SamplingParams, bytes_per_token
from llava_interleave.engine.kv_budget import profile_kv_bytes
from llava_interleave.flops import decoder_bytes, prefill_flops, vision_flops
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.prompt import Media, Prompt
from llava_interleave.quantization import linear_cuda
from llava_interleave.quantization.linear_cpu import QuantizedLinearBase
from llava_interleave.quantization.replace import pack_for_cuda, replace_linears

RESULTS = Path(__file__).parent / "results"
SMALL = LlavaConfig(
    VisionConfig(128, 256, 2, 4, 56, 14),
    TextConfig(256, 512, 2, 4, 4, 64, 1024, 4096, 1e6, 1e-6, True),
    image_token_id=1023,
)
CONFIGS = {"small": SMALL, **SHAPES}
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
THEIRS = {"sdpa": "sdpa", "flash": "flash_attention_2"}
LONGEST = 150
"""Seconds that a group may take."""
TWICE = 2  # the better of so many; the first also sets things up


@dataclass(frozen=True)
class Work:
    """How much is measured. decode: requests at a time, after `context` tokens each; requests: two
    images each.
    """

    decode: tuple[int, ...]
    context: int
    tokens: int
    prefill: int
    crops: int
    images: tuple[int, ...]
    requests: int


WORK = {
    "whole": Work((1, 8, 64), 750, 64, 4096, 16, (1, 8, 16), 64),
    "small": Work((1, 4), 40, 12, 128, 4, (1, 2), 6),
}


@dataclass
class Row:
    """A figure. least: bytes, or operations of a number type, that `seconds` of it need at best.
    note: why there is none.
    """

    group: str
    name: str
    value: float | None = None
    unit: str = ""
    seconds: float | None = None
    least: dict[str, float] | None = None
    note: str = ""


Say = Callable[[Row], None]


# The network and its prompts.


def made(config: LlavaConfig, precision: str, device: torch.device) -> Llava:
    """A network of random weights in a precision, made where it computes."""
    dtype = FLOATS.get(precision, torch.float32 if device.type == "cpu" else torch.bfloat16)
    network = meta_network(config)
    if precision not in FLOATS:
        replace_linears(network, precision)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    network.to_empty(device=device).requires_grad_(False).eval()
    if isinstance(network.lm_head, nn.Linear):
        network.tie()
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        fill(name, tensor)
    if precision not in FLOATS and linear_cuda.unavailable_reason(device, dtype) is None:
        pack_for_cuda(network)
    return network


def fill(name: str, tensor: Tensor) -> None:
    """Random numbers that keep activations near 1."""
    if tensor.dtype == torch.uint8:
        tensor.random_(0, 256)
    elif tensor.dtype == torch.float8_e4m3fn:
        for rows in tensor.split(1024):
            rows.copy_(torch.randn(rows.shape, device=rows.device) * 50)
    elif name.endswith(".scale"):
        tensor.fill_(1e-3)
    elif tensor.dim() == 1:
        tensor.fill_(float("norm" in name and name.endswith("weight")))
    else:
        tensor.normal_(0, 1 if "embed" in name else tensor[0].numel() ** -0.5)


class Asking:
    """Prompts that nothing has seen."""

    def __init__(self, config: LlavaConfig) -> None:
        self.config, self.made = config, 0
        side = config.vision.image_size
        self.pixels = torch.rand(1, 3, side, side) * 2 - 1

    def __call__(self, images: int, words: int) -> Prompt:
        """So many images, and so many tokens of text."""
        self.made += 1
        text = torch.randint(
            self.config.image_token_id, (words,), generator=torch.Generator().manual_seed(self.made)
        ).tolist()
        tokens, media, layout = text[:4], [], ImageTokenLayout(self.config.vision.grid)
        for number in range(images):
            media.append(Media(self.pixels, layout, f"{self.made}.{number}".encode(), len(tokens)))
            tokens += [self.config.image_token_id] * layout.length
        return Prompt(tokens + text[4:], tuple(media))


@dataclass(frozen=True)
class Took:
    """Seconds to the `first` token and in `total`, and tokens a second of all answers while all
    were being written.
    """

    first: float
    total: float
    rate: float


class Ours:
    """This package's engine."""

    def __init__(self, network: Llava, kv_tokens: int) -> None:
        config, weight = network.config, network.language_model.norm.weight
        self.per_token = bytes_per_token(config.text, weight.dtype)
        self.engine = Engine(
            network,
            eos_ids=(),
            vocab=config.text.vocab_size,
            kv_bytes=kv_tokens * self.per_token,
            max_num_batched_tokens=4096,
        )
        self.asking, self.device = Asking(config), weight.device

    def answer(self, prompts: Sequence[Prompt], tokens: int) -> Took:
        engine, how = self.engine, SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        engine.clear()
        synchronize(self.device)
        began = time.perf_counter()
        requests = [engine.add(prompt, how) for prompt in prompts]
        first, start, stop = None, None, None  # stop: when one of them has ended
        while engine.busy:
            for event in engine.step():
                if event.error:
                    raise event.error
            now, written = time.perf_counter(), sum(len(request.generated) for request in requests)
            first = now if first is None and written else first
            if start is None and all(request.generated for request in requests):
                start = now, written
            if stop is None and start and any(request.finish_reason for request in requests):
                stop = now, written
        assert first is not None
        rate = (
            (stop[1] - start[1]) / (stop[0] - start[0])
            if start and stop and stop[0] > start[0]
            else 0.0
        )
        return Took(first - began, time.perf_counter() - began, rate)


class Theirs:
    """transformers, with its batch padded on the left."""

    def __init__(
        self, config: LlavaConfig, dtype: torch.dtype, device: torch.device, attention: str
    ) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        described = transformers.LlavaConfig.from_dict(config_json.to_dict(config))
        with torch.device(device):
            made = transformers.AutoModelForImageTextToText.from_config(
                described, dtype=dtype, attn_implementation=THEIRS[attention]
            )
        self.model = made.eval()
        self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id = (
            None,
            0,
        )
        self.asking, self.device, self.dtype = Asking(config), device, dtype

    def answer(self, prompts: Sequence[Prompt], tokens: int) -> Took:
        times: list[float] = []

        def clock(ids: Tensor, _: object, **__: object) -> Tensor:
            synchronize(self.device)
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        synchronize(self.device)
        began, longest = time.perf_counter(), max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (longest - len(p)) + p.tokens for p in prompts], device=self.device
        )
        mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device
        )
        pixels = [media.pixels for p in prompts for media in p.media]
        given = {"pixel_values": torch.cat(pixels).to(self.device, self.dtype)} if pixels else {}
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=[clock],
                **given,
            )
        later = times[-1] - times[0]
        return Took(
            times[0] - began,
            times[-1] - began,
            len(prompts) * (tokens - 1) / later if later else 0.0,
        )


# The groups.


def ceilings(group: str, device: torch.device, _: Work, say: Say) -> None:
    """Bytes a second that are read, and operations a second in products of each type."""
    large = device.type == "cuda"
    a = torch.empty(1 << (31 if large else 26), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    seconds = best(lambda: b.copy_(a), device, 5)
    say(Row(group, "memory, read and written", 2 * a.nbytes / seconds / 1e9, "GB/s"))
    side = 8192 if large else 128  # PyTorch takes 5 s for 512 in float8 on a CPU
    for kind, dtype in {**FLOATS, "int8": torch.int8, "float8": torch.float8_e4m3fn}.items():
        with reported(group, f"products in {kind}", say):
            x, y = (torch.ones(side, side, device=device).to(dtype) for _ in range(2))
            seconds = best(partial(multiply, kind, x, y), device, 5)
            say(Row(group, f"products in {kind}", 2 * side**3 / seconds / 1e12, "TOP/s"))


def multiply(kind: str, x: Tensor, y: Tensor) -> Tensor:
    if kind == "float8":
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16)
    return torch._int_mm(x, y) if kind == "int8" else x @ y


def checks(group: str, device: torch.device, _: Work, say: Say) -> None:
    """Everything against what is slower and surer, in the small shape."""
    torch.backends.cudnn.allow_tf32 = False
    prompts = [Asking(SMALL)(images, 20 + images) for images in (0, 1, 2)]
    truth = made(SMALL, "float32", torch.device("cpu"))
    expected, sure = written(truth, prompts), features(truth)

    def there(dtype: torch.dtype) -> Llava:
        network = made(SMALL, "float32", torch.device("cpu"))
        network.load_state_dict(truth.state_dict())
        network.to(device, dtype)
        network.tie()
        return network

    for name, dtype in FLOATS.items():
        with reported(group, f"{name}: features and logits", say):
            apart = [
                float((a - b).norm() / b.norm())
                for a, b in zip(features(there(dtype)), sure, strict=True)
            ]
            say(
                Row(
                    group,
                    f"{name}: features and logits",
                    max(apart),
                    "of their size apart from float32 on the CPU",
                )
            )
        with reported(group, f"{name}: greedy tokens", say):
            found = written(there(dtype), prompts)
            same = sum(
                a == b
                for x, y in zip(found, expected, strict=True)
                for a, b in zip(x, y, strict=True)
            )
            say(
                Row(
                    group,
                    f"{name}: greedy tokens",
                    same,
                    f"of {sum(map(len, expected))} as on the CPU, the weights random",
                )
            )
    for precision in ("int8", "int4", "nf4", "fp8"):
        with reported(group, f"{precision}: a linear", say):
            linear_cuda.check_supported(precision, device)
            for rows in (1, 7, 300):
                far = product(made(SMALL, precision, device), rows)
                say(
                    Row(
                        group,
                        f"{precision}: a linear, {rows} rows",
                        far,
                        "of its size apart from its weights unpacked",
                    )
                )
    if device.type == "cuda":
        steps_agree(group, there(torch.bfloat16), prompts, say)


def steps_agree(group: str, network: Llava, prompts: list[Prompt], say: Say) -> None:
    """Captured steps against the same steps launch by launch."""
    with reported(group, "captured steps: greedy tokens", say):
        ours = Ours(network, 4096)
        found = [
            request.generated
            for request in ours.engine.generate(
                prompts, SamplingParams(max_new_tokens=16, ignore_eos=True)
            )
        ]
        captured = ours.engine._runner.graphs
        assert captured
        if captured.unavailable:
            raise RuntimeError(captured.unavailable)
        plain = Ours(network, 4096)
        assert plain.engine._runner.graphs
        plain.engine._runner.graphs.drop("for comparison")
        sure = [
            request.generated
            for request in plain.engine.generate(
                prompts, SamplingParams(max_new_tokens=16, ignore_eos=True)
            )
        ]
        same = sum(
            a == b for x, y in zip(found, sure, strict=True) for a, b in zip(x, y, strict=True)
        )
        say(
            Row(
                group,
                "captured steps: greedy tokens",
                same,
                f"of {sum(map(len, sure))} as not captured",
            )
        )


def written(network: Llava, prompts: list[Prompt]) -> list[list[int]]:
    requests = Ours(network, 4096).engine.generate(
        prompts, SamplingParams(max_new_tokens=16, ignore_eos=True)
    )
    return [request.generated for request in requests]


@torch.inference_mode()
def features(network: Llava) -> list[Tensor]:
    weight, side = network.language_model.norm.weight, network.config.vision.image_size
    random = torch.Generator().manual_seed(0)
    seen = network.encode(
        torch.randn(3, 3, side, side, generator=random).to(weight.device, weight.dtype)
    )
    tokens = torch.randint(0, 1000, (70,), generator=random).to(weight.device)
    positions = torch.cat([torch.arange(40), torch.arange(30)]).to(weight.device)
    hidden = network.forward(
        network.embed(tokens, [(2, seen[1])]), positions, PackedAttention([40, 30])
    )
    return [seen.float().cpu(), network.logits(hidden).float().cpu()]


@torch.inference_mode()
def product(network: Llava, rows: int) -> float:
    """The largest share that the products of few-bit linears are apart from what their weights
    say.
    """
    far = 0.0
    for module in network.modules():
        if isinstance(module, QuantizedLinearBase):
            weight = network.language_model.norm.weight
            x = torch.randn(rows, module.in_features, device=weight.device).to(weight.dtype)
            sure = x.float() @ module.dequantize().float().t() + (
                0 if module.bias is None else module.bias.float()
            )
            far = max(far, float((module(x).float() - sure).norm() / sure.norm()))
    return far


def ours(group: str, device: torch.device, work: Work, say: Say) -> None:
    shape, _, precision = group.split()
    config, few = CONFIGS[shape], precision not in FLOATS
    began = time.perf_counter()
    if few:
        linear_cuda.check_supported(precision, device)
    network = made(config, precision, device)
    synchronize(device)
    say(Row(group, "made in", time.perf_counter() - began, "s"))
    held = sum(
        tensor.nbytes
        for tensor in {id(t): t for t in (*network.parameters(), *network.buffers())}.values()
    )
    say(Row(group, "weights", held / 2**30, "GiB"))
    with reported(group, "peak memory, 2 images", say):
        peak(group, network, config, say)
    with reported(group, "KV cache, tokens that fit", say):
        most = room(network, config, work)
        say(Row(group, "KV cache, tokens that fit", most, "tokens"))
    if not few:
        with reported(group, "tower", say):
            tower(group, network, work, say)
    system = Ours(network, most)
    measure(group, system, work, say, network, brief=few)
    say(Row(group, "attention", note=system.engine.attention))


def theirs(group: str, device: torch.device, work: Work, say: Say) -> None:
    shape, _, precision, attention = group.split()
    measure(group, Theirs(CONFIGS[shape], FLOATS[precision], device, attention), work, say)


def measure(
    group: str,
    system: Ours | Theirs,
    work: Work,
    say: Say,
    network: Llava | None = None,
    brief: bool = False,
) -> None:
    """The measurements of both systems. brief: no images."""
    config, kind = system.asking.config, group.split()[2]
    kind = kind if kind in FLOATS else {"fp8": "float8"}.get(kind, "bfloat16")
    for count in work.decode:
        name = f"decode, {count} at a time"
        with reported(group, name, say):
            took = max(
                (
                    system.answer(
                        [system.asking(0, work.context) for _ in range(count)], work.tokens
                    )
                    for _ in range(TWICE)
                ),
                key=lambda took: took.rate,
            )
            least = None
            if network is not None:
                kept = (
                    count
                    * (work.context + work.tokens / 2)
                    * bytes_per_token(config.text, network.language_model.norm.weight.dtype)
                )
                least = {"bytes": decoder_bytes(network) + kept}
            say(
                Row(
                    group,
                    name,
                    took.rate,
                    "tokens/s",
                    count / took.rate if took.rate else None,
                    least,
                )
            )
    with reported(group, "prompt", say):
        seconds = min(
            system.answer([system.asking(0, work.prefill)], 1).first for _ in range(TWICE)
        )
        say(
            Row(
                group,
                "prompt",
                work.prefill / seconds,
                "tokens/s",
                seconds,
                {kind: prefill_flops(config, work.prefill)},
            )
        )
    if brief:
        return
    for images in work.images:
        name = f"first token, {images} image{'s' * (images > 1)}"
        with reported(group, name, say):
            seconds = min(system.answer([system.asking(images, 30)], 1).first for _ in range(TWICE))
            ops = images * vision_flops(config) + prefill_flops(
                config, images * config.vision.grid**2 + 30
            )
            say(Row(group, name, seconds, "s", seconds, {kind: ops}))
    together = work.requests
    while together:  # as many at a time as there is memory for
        name = f"{work.requests} requests of 2 images"
        try:
            parts = [work.requests // together, work.requests % together]
            sizes = [together] * parts[0] + [parts[1]] * (parts[1] > 0)
            prompts = [
                [system.asking(2, 20 + number * 7 % 40) for number in range(size)] for size in sizes
            ]
            seconds = sum(system.answer(part, work.tokens).total for part in prompts)
            say(
                Row(
                    group,
                    name,
                    work.requests * work.tokens / seconds,
                    "tokens/s",
                    note="" if together == work.requests else f"{together} at a time",
                )
            )
            return
        except torch.OutOfMemoryError:
            together //= 2
        forget()  # now that the error holds nothing any more


def room(network: Llava, config: LlavaConfig, work: Work) -> int:
    """Tokens of KV cache: as many as the largest measurement needs, or as fit in memory."""
    wanted = work.requests * (2 * config.vision.grid**2 + 100 + work.tokens + 512)
    wanted = max(
        wanted,
        *(count * (work.context + work.tokens + 512) for count in work.decode),
        work.prefill + 512,
    )
    weight = network.language_model.norm.weight
    if weight.is_cuda:
        wanted = min(
            wanted,
            profile_kv_bytes(network, max_num_batched_tokens=4096)
            // bytes_per_token(config.text, weight.dtype),
        )
    return wanted


def peak(group: str, network: Llava, config: LlavaConfig, say: Say) -> None:
    """Peak memory of two images and an answer, with a KV cache for them alone."""
    if not network.language_model.norm.weight.is_cuda:
        raise RuntimeError("peak memory is measured on GPUs only")
    torch.cuda.reset_peak_memory_stats()
    system = Ours(network, 2 * config.vision.grid**2 + 1024)
    system.answer([system.asking(2, 30)], 8)
    say(Row(group, "peak memory, 2 images", torch.cuda.max_memory_allocated() / 2**30, "GiB"))


@torch.inference_mode()
def tower(group: str, network: Llava, work: Work, say: Say) -> None:
    weight, side = network.language_model.norm.weight, network.config.vision.image_size
    pixels = torch.rand(work.crops, 3, side, side, device=weight.device, dtype=weight.dtype)
    seconds = best(lambda: network.encode(pixels), weight.device, 4)
    least = {group.split()[2]: float(work.crops * vision_flops(network.config))}
    say(Row(group, "tower", work.crops / seconds, "images/s", seconds, least))


# Running them.


class reported:  # noqa: N801
    """What fails within is a row with its reason."""

    def __init__(self, group: str, name: str, say: Say) -> None:
        self.group, self.name, self.say = group, name, say

    def __enter__(self) -> None:
        forget()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> bool:
        if isinstance(error, Exception):
            reason = str(error).strip().splitlines() or [""]
            self.say(Row(self.group, self.name, note=f"{type(error).__name__}: {reason[0][:200]}"))
            return True
        return False


def forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best(call: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    found = []
    for _ in range(times + 1):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])


def groups(device: str, small: bool) -> list[str]:
    """What is run, the most wanted first: the checks; small shapes, or 0.5B and 7B next to
    transformers and then in fewer bits.
    """
    kind, few, attentions = "bfloat16", ["int4", "int8", "nf4", "fp8"], list(THEIRS)
    if device == "cpu":
        kind, few, attentions = "float32", ["int8"], ["sdpa"]
    shapes = ["small"] if small else ["0.5b", "7b"]
    whole = [
        [f"{shape} ours {kind}", *(f"{shape} transformers {kind} {how}" for how in attentions)]
        for shape in shapes
    ]
    return [
        "ceilings",
        "checks",
        *chain(*whole),
        *(f"{shape} ours {bits}" for bits in few for shape in reversed(shapes)),
    ]


def run(group: str, device: torch.device, say: Say) -> None:
    """One group, in this process."""
    work = WORK["small" if group.startswith("small") or device.type == "cpu" else "whole"]
    kinds = {"ceilings": ceilings, "checks": checks, "ours": ours, "transformers": theirs}
    with reported(group, "all of it", say):
        kinds[group.split()[min(1, group.count(" "))]](group, device, work, say)


def started(group: str, device: str, seconds: float) -> Iterator[Row]:
    """One group in a process of its own: its rows, and what ended it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.jsonl"
        out.touch()
        command = [
            sys.executable,
            __file__,
            "--device",
            device,
            "--group",
            group,
            "--out",
            str(out),
        ]
        note = ""
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=seconds,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1][:300]
                note = f"ended with {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            note = f"took longer than {seconds:.0f} s"
        for line in out.read_text().splitlines():
            yield Row(**json.loads(line))
        if note:
            yield Row(group, "all of it", note=note)


def about(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    if device != "cpu" and torch.cuda.is_available():
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(ask, capture_output=True, text=True).stdout.strip()
            if shutil.which(ask[0])
            else "unknown"
        )
        free, total = torch.cuda.mem_get_info()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        found |= {
            "device": torch.cuda.get_device_name(),
            "driver": driver,
            "CUDA": torch.version.cuda,
        }
        found |= {
            "compute capability": capability,
            "memory, GiB": round(total / 2**30, 1),
            "free, GiB": round(free / 2**30, 1),
        }
    for name in (
        "llava-interleave",
        "torch",
        "transformers",
        "triton",
        "bitsandbytes",
        "flash-attn",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def share(row: Row, rows: Sequence[Row]) -> float | None:
    """Of the ceiling: the seconds that it needs at best, by those it took."""
    if not row.least or not row.seconds:
        return None
    ((kind, amount),) = row.least.items()
    name = "memory, read and written" if kind == "bytes" else f"products in {kind}"
    limit = next(
        (r.value for r in rows if r.group == "ceilings" and r.name == name and r.value), None
    )
    return (
        None
        if limit is None
        else amount / (limit * (1e9 if kind == "bytes" else 1e12)) / row.seconds
    )


def relative(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast as transformers, in the same shape, with the attention that was the
    faster one there.
    """
    shape, *kind = row.group.split()
    if not row.value or kind[:1] != ["ours"] or row.unit not in ("tokens/s", "s"):
        return None
    theirs = [
        r.value
        for r in rows
        if r.group.startswith(f"{shape} transformers") and r.name == row.name and r.value
    ]
    if not theirs:
        return None
    return row.value / max(theirs) if row.unit == "tokens/s" else min(theirs) / row.value


def table(rows: Sequence[Row]) -> str:
    lines = [["", "", "", "of the ceiling", "x transformers", ""]]
    for row in rows:
        part, ratio = share(row, rows), relative(row, rows)
        value = (
            ""
            if row.value is None
            else f"{row.value:,.0f}"
            if row.value >= 100
            else f"{row.value:.3g}"
        )
        cells = [f"{row.group}: {row.name}", value, row.unit, "" if part is None else f"{part:.0%}"]
        lines.append([*cells, "" if ratio is None else f"{ratio:.2f}", row.note])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = (False, True, False, True, True, False)
    aligned = (
        [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes only")
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.0,
        help="what has not begun by then is named and left out",
    )
    parser.add_argument("--only", nargs="*", metavar="GROUP", help="run these groups alone")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, help="the result; without it bench/results/<device>.json"
    )
    given = parser.parse_args()
    if given.group:
        with given.out.open("a") as file:
            run(
                given.group,
                torch.device(given.device),
                lambda row: print(json.dumps(asdict(row)), file=file, flush=True),
            )
        return
    end, machine = time.perf_counter() + 60 * given.minutes, about(given.device)
    name = re.sub(r"\W+", "-", str(machine["device"])).strip("-").lower()
    out = given.out or RESULTS / f"{name}{'-small' if given.small else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    left = []
    for group in given.only or groups(given.device, given.small):
        seconds = end - time.perf_counter()
        if seconds < min(20.0, 6 * given.minutes):
            left.append(group)
            continue
        for row in started(group, given.device, min(seconds, LONGEST)):
            rows.append(row)
            print(
                f"{row.group}: {row.name}: {'' if row.value is None else f'{row.value:.4g}'} "
                f"{row.unit} {row.note}",
                flush=True,
            )
        figures = [
            asdict(row)
            | {"of the ceiling": share(row, rows), "x transformers": relative(row, rows)}
            for row in rows
        ]
        out.write_text(
            json.dumps({"about": machine, "rows": figures, "left out": left}, indent=1) + "\n"
        )
    print(f"\n{json.dumps(machine, indent=1)}\n\n{table(rows)}")
    if left:
        print(f"\nleft out, for {given.minutes:g} minutes were over: {', '.join(left)}")
    print(f"\n{out}")


if __name__ == "__main__":
    main()
