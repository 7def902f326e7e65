"""What this package does on a GPU, checked, measured, and next to transformers: one run, a table
last.

    python bench/gpu.py --minutes 8              # on a GPU
    TRITON_INTERPRET=1 python bench/gpu.py --device cpu --small    # that it works

Needs torch, triton and numpy (and PYTHONPATH=. where this package is not installed); pytest and
transformers where they are there. No network and no files: weights are random and made on the
device. In this order: ceilings of the machine; every kernel against float64, and replayed graphs
against the same steps kernel by kernel; the GPU's half of tests/cuda; 0.5B in bfloat16; 7B in
bfloat16, int4 and int8; transformers. What is wanted most comes first.

A model is a process. Each step has a deadline: one that fails, ends its process or never ends is a
row with its reason, and the process goes on with the next step. The result is written after every
row. Ceilings (memory by a copy, products of random numbers) are measured in the same run, and
figures are shares of what they allow: bytes that must be read, or operations that must be done.
The engine is the one that users get.
"""

import argparse
import gc
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
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
from llava_interleave.engine import Engine, SamplingParams, bytes_per_token, kv_paged
from llava_interleave.engine.kv_budget import profile_kv_bytes
from llava_interleave.flops import decoder_bytes, prefill_flops, vision_flops
from llava_interleave.image_layout import ImageTokenLayout
from llava_interleave.kernels import GROUP, PANEL, SUBGROUP, group_bytes, triton
from llava_interleave.kernels.triton import checks
from llava_interleave.model import Llava
from llava_interleave.prompt import Media, Prompt
from llava_interleave.quantization import linear_cuda
from llava_interleave.quantization.linear_cpu import QuantizedLinearBase
from llava_interleave.quantization.replace import pack_for_cuda, replace_linears

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SMALL = LlavaConfig(
    VisionConfig(128, 256, 2, 4, 56, 14),
    TextConfig(256, 512, 2, 4, 4, 64, 1024, 4096, 1e6, 1e-6, True),
    image_token_id=1023,
)
CONFIGS = {"small": SMALL, **SHAPES}
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TWICE = 2  # the better of so many; the first also sets things up


@dataclass
class Row:
    """A figure. least: bytes, or operations of a number type, that `seconds` of it need at best.
    note: why there is none, or details. table: the kernels of a profile.
    """

    process: str
    step: str
    name: str
    value: float | None = None
    unit: str = ""
    seconds: float | None = None
    least: dict[str, float] | None = None
    note: str = ""
    table: list[dict[str, Any]] | None = None


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
    if precision not in FLOATS and triton.unavailable_reason(device, dtype) is None:
        pack_for_cuda(network)
    return network


def fill(name: str, tensor: Tensor) -> None:
    """Random numbers that keep activations near 1."""
    if tensor.dtype == torch.uint8:
        tensor.random_(0, 256)
        if tensor.shape[-1] == group_bytes(4):  # of int4: sub_scale + 16 * zero_point, 7 or 8
            rows = tensor[..., : PANEL * GROUP // SUBGROUP]
            rows.bitwise_and_(31).add_(112)
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
    """This package's engine, as `load()` makes it."""

    def __init__(self, network: Llava) -> None:
        config, weight = network.config, network.language_model.norm.weight
        on_cpu = weight.device.type == "cpu"
        tokens = 4096 * bytes_per_token(config.text, weight.dtype)
        self.engine = Engine(
            network,
            eos_ids=(),
            vocab=config.text.vocab_size,
            kv_bytes=tokens if on_cpu else profile_kv_bytes(network),
            kv_block_size=256 if on_cpu else None,
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

    def __init__(self, config: LlavaConfig, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        described = transformers.LlavaConfig.from_dict(config_json.to_dict(config))
        with torch.device(device):
            made = transformers.AutoModelForImageTextToText.from_config(
                described, dtype=dtype, attn_implementation="sdpa"
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


# The steps.


class Session:
    """A process: its device and model, and where its rows go."""

    def __init__(self, process: str, device: torch.device, say: Callable[[Row], None]) -> None:
        self.process, self.device, self._say, self.step = process, device, say, ""
        self.shape = process.split()[-1]
        self.small = self.shape == "small" or device.type == "cpu"
        self.dtype = torch.bfloat16
        self.precision = "bfloat16"
        self._system: Ours | Theirs | None = None

    def say(self, name: str, value: float | None = None, unit: str = "", **more: Any) -> None:
        self._say(Row(self.process, self.step, name, value, unit, **more))

    @property
    def system(self) -> Any:
        """The engine, or transformers; made at first use."""
        if self._system is None:
            began = time.perf_counter()
            if self.process.startswith("transformers"):
                self._system = Theirs(CONFIGS[self.shape], self.dtype, self.device)
            else:
                self._system = Ours(made(CONFIGS[self.shape], self.precision, self.device))
                self.say("attention", note=self._system.engine.attention)
            synchronize(self.device)
            self.say("loaded in", time.perf_counter() - began, "s")
        return self._system

    def use(self, precision: str) -> None:
        """Have another precision from now on."""
        if precision != self.precision:
            self._system, self.precision = None, precision
            forget()

    @property
    def network(self) -> Llava:
        network = self.system.engine.model
        assert isinstance(network, Llava)
        return network


def memory(session: Session) -> None:
    """Bytes a second that are read and written."""
    a = torch.empty(1 << (26 if session.small else 31), dtype=torch.uint8, device=session.device)
    b = torch.empty_like(a.random_(0, 256))
    seconds = best(lambda: b.copy_(a), session.device, 5)
    session.say("memory, read and written", 2 * a.nbytes / seconds / 1e9, "GB/s")


def products(session: Session) -> None:
    """Operations a second in products of each type, of random numbers."""
    side = 64 if session.small else 8192  # PyTorch takes seconds for 512 in float8 on a CPU
    kinds = {**FLOATS, "int8": torch.int8, "float8": torch.float8_e4m3fn}
    for kind, dtype in kinds.items():
        random = torch.randn(2, side, side, device=session.device)
        x, y = (random * 30 if kind == "int8" else random).to(dtype)
        try:
            seconds = best(partial(multiply, kind, x, y), session.device, 5)
            session.say(f"products in {kind}", 2 * side**3 / seconds / 1e12, "TOP/s")
        except RuntimeError as error:
            session.say(f"products in {kind}", note=str(error).splitlines()[0])


def multiply(kind: str, x: Tensor, y: Tensor) -> Tensor:
    if kind == "float8":
        one = torch.ones((), device=x.device)
        return torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16)
    return torch._int_mm(x, y) if kind == "int8" else x @ y


def kernels(session: Session) -> None:
    """Each kernel against its formula in float64, on new random numbers."""
    for kind in ("bfloat16", "float16"):
        for name, case in checks.cases(session.device, FLOATS[kind]).items():
            try:
                session.say(f"{name}, {kind}", checks.error(case), "of its norm off float64")
            except Exception as error:  # noqa: BLE001  whatever Triton or the driver raise
                reason = (str(error).splitlines() or [""])[0]
                session.say(f"{name}, {kind}", note=f"{type(error).__name__}: {reason}")


def linears(session: Session) -> None:
    """The products of quantized linears against those of their weights in float32."""
    for precision in ("int8", "int4", "fp8"):
        try:
            linear_cuda.check_supported(precision, session.device)
            network = made(SMALL, precision, session.device)
            for rows in (1, 7, 64, 300):
                off = product(network, rows)
                session.say(f"{precision}, {rows} rows", off, "of its norm off its weights")
        except Exception as error:  # noqa: BLE001  one precision is a row
            session.say(precision, note=f"{type(error).__name__}: {error}")


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


def replays(session: Session) -> None:
    """Replayed graphs against the same steps kernel by kernel: tokens, and logits to the bit."""
    network = made(SMALL, "bfloat16", session.device)
    prompts = [Asking(SMALL)(images, 20 + images) for images in (0, 1, 2)]
    if session.device.type == "cpu":  # where Triton's interpreter takes a second a token
        prompts = prompts[:2]
    tokens = 16 if session.device.type == "cuda" else 2
    how, found = SamplingParams(max_new_tokens=tokens, ignore_eos=True), []
    for captured in (True, False):
        engine = Ours(network).engine
        graphs, tower = engine._runner.graphs, engine._runner.tower_graphs
        assert graphs is not None and tower is not None, engine.attention
        if captured and graphs.unavailable and session.device.type == "cuda":
            raise RuntimeError(graphs.unavailable)
        if not captured:
            graphs.drop("for comparison")
            tower._graphs.clear()
        requests = engine.generate(prompts, how)
        found.append([request.generated for request in requests])
    pairs = [pair for a, b in zip(*found, strict=True) for pair in zip(a, b, strict=True)]
    same = sum(a == b for a, b in pairs)
    session.say("tokens of replays", same, f"of {len(pairs)} as kernel by kernel")


def tests(session: Session) -> None:
    """The GPU's half of tests/cuda; what has not ended after 80 s is left out."""
    command = [sys.executable, "-m", "pytest", "-v", "-n0", "--tb=line", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TESTS_CUDA_ONLY": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        [*command, "tests/cuda"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    late = threading.Timer(80, running.kill)
    late.start()
    assert running.stdout is not None
    lines = running.stdout.read().strip().splitlines()
    late.cancel()
    failed = [line for line in lines if " FAILED " in line or " ERROR " in line]
    note = "; ".join([*failed, *lines[-3:]])[:3000]
    session.say("passed", sum(" PASSED " in line for line in lines), "tests", note=note)


def decode(count: int, context: int, session: Session) -> None:
    """Tokens a second of answers after `context` tokens each."""
    tokens = 128
    if session.device.type == "cpu":
        count, context, tokens = min(count, 2), 20 + context // 750, 4
    system = session.system
    took = max(
        (
            system.answer([system.asking(0, context) for _ in range(count)], tokens)
            for _ in range(TWICE)
        ),
        key=lambda took: took.rate,
    )
    least = None
    if isinstance(system, Ours):
        per_token = bytes_per_token(session.network.config.text, session.dtype)
        kept = count * (context + tokens / 2) * per_token
        least = {"bytes": decoder_bytes(session.network) + kept}
    seconds = count / took.rate if took.rate else None
    name = f"{session.precision} decode, {count} at a time after {context}"
    session.say(name, took.rate, "tokens/s", seconds=seconds, least=least)


def first_token(images: int, session: Session) -> None:
    system = session.system
    config = system.asking.config
    seconds = min(system.answer([system.asking(images, 30)], 1).first for _ in range(TWICE + 1))
    tokens = images * config.vision.grid**2 + 30
    ops = images * vision_flops(config) + prefill_flops(config, tokens)
    name = f"first token, {images} image{'s' * (images > 1)}"
    session.say(name, seconds, "s", seconds=seconds, least={"bfloat16": float(ops)})


@torch.inference_mode()
def tower(session: Session) -> None:
    runner, side = session.system.engine._runner, session.network.config.vision.image_size
    for crops in (1, 8):
        pixels = torch.rand(crops, 3, side, side, device=session.device, dtype=session.dtype)
        seconds = best(partial(runner._encode_images, pixels, ""), session.device, 4)
        least = {"bfloat16": float(crops * vision_flops(session.network.config))}
        name = f"tower, {crops} at a time"
        session.say(name, crops / seconds, "images/s", seconds=seconds, least=least)


def profile(session: Session) -> None:
    """The kernels of one replay of a decode step of one sequence."""
    if session.device.type != "cuda":
        session.say("kernels of a decode step", note="a profile needs a GPU")
        return
    from torch.profiler import ProfilerActivity

    engine, asking = session.system.engine, session.system.asking
    engine.clear()
    engine.add(asking(0, 750), SamplingParams(max_new_tokens=64, ignore_eos=True))
    for _ in range(8):
        engine.step()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.step()
        synchronize(session.device)
    while engine.busy:
        engine.step()
    table = [
        {"kernel": event.key[:120], "count": event.count, "us": event.device_time_total}
        for event in profiler.key_averages()
    ]
    table.sort(key=lambda row: -float(row["us"]))
    launched = sum(int(row["count"]) for row in table)
    session.say("kernels of a decode step", launched, "kernels and copies", table=table[:40])


def with_precision(precision: str, step: Callable[[Session], None], session: Session) -> None:
    session.use(precision)
    step(session)


Step = tuple[float, Callable[[Session], None]]
"""Seconds that it may take, and what it does."""
MODEL: dict[str, Step] = {
    "decode 1": (100, partial(decode, 1, 750)),
    "decode 8": (20, partial(decode, 8, 750)),
    "decode 64": (30, partial(decode, 64, 750)),
    "decode 1 after 8k": (20, partial(decode, 1, 8192)),
    "first token, 1 image": (20, partial(first_token, 1)),
    "first token, 2 images": (20, partial(first_token, 2)),
    "tower": (20, tower),
    "profile": (20, profile),
}
BITS = ("int4", "int8")
FEW = {
    f"{bits} decode {count}": (80.0, partial(with_precision, bits, partial(decode, count, 750)))
    for bits in BITS
    for count in (1, 64)
}
THEIRS = {name: MODEL[name] for name in ("decode 1", "decode 64", "first token, 2 images")}
CHECKS: dict[str, Step] = {
    "kernels": (90, kernels),
    "linears": (60, linears),
    "replays": (60, replays),
}


def processes(small: bool) -> dict[str, dict[str, Step]]:
    """What is run, the most wanted first: steps by process."""
    ceilings: dict[str, Step] = {"memory": (20, memory), "products": (30, products)}
    found: dict[str, dict[str, Step]] = {
        "ceilings": ceilings,
        "checks": CHECKS,
        "tests/cuda": {"tests/cuda": (90, tests)},
    }
    if small:
        steps = {name: step for name, step in MODEL.items() if "64" not in name}
        return found | {
            "ours small": steps | {f"{bits} decode 1": FEW[f"{bits} decode 1"] for bits in BITS},
            "transformers small": {"decode 1": MODEL["decode 1"]},
        }
    return found | {
        "ours 0.5b": MODEL,
        "ours 7b": MODEL | FEW,
        "transformers 0.5b": THEIRS,
        "transformers 7b": THEIRS,
    }


# Running them.


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


def child(process: str, steps: Sequence[str], device: torch.device, small: bool) -> None:
    """Some steps of a process, in this one: a line for each begin and each row."""
    if device.type == "cpu":  # Triton's interpreter or the formulas compute there
        kv_paged.unavailable_reason = lambda *_: None
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no row

    def say(row: Row) -> None:
        print(json.dumps(asdict(row)), file=out, flush=True)

    session, known = Session(process, device, say), processes(small)[process]
    for name in steps:
        session.step = name
        print(json.dumps({"begin": name}), file=out, flush=True)
        try:
            known[name][1](session)
        except Exception as error:  # noqa: BLE001  a row with its reason
            reason = (str(error).strip().splitlines() or [""])[0]
            session.say(name, note=f"{type(error).__name__}: {reason[:300]}")
            error.__traceback__ = None
        forget()


def run(process: str, device: str, small: bool, end: float) -> Iterator[Row]:
    """The rows of a process. It is started again behind a step that hangs or ends it."""
    steps = processes(small)[process]
    left, slow = list(steps), 10 if device == "cpu" else 1
    while left and end - time.perf_counter() > 5:
        command = [sys.executable, __file__, "--device", device, "--process", process]
        command += [*(["--small"] if small else []), "--steps", *left]
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []
        assert running.stdout is not None and running.stderr is not None
        threading.Thread(target=_read, args=(running.stdout, lines.put), daemon=True).start()
        threading.Thread(target=_read, args=(running.stderr, errors.append), daemon=True).start()
        step, deadline = "", time.perf_counter() + 60 * slow  # to import everything
        while True:
            seconds = min(deadline, end) - time.perf_counter()
            try:
                line = lines.get(timeout=max(0.01, seconds))
            except queue.Empty:
                running.kill()
                late = "the minutes were over" if deadline > end else "it took too long"
                yield Row(process, step, step or "start", note=late)
                break
            if line is None:
                if running.wait():
                    last = next((e for e in reversed(errors) if e and e.strip()), "")
                    note = f"ended with {running.returncode}: {last.strip()[:300]}"
                    yield Row(process, step, step or "start", note=note)
                else:
                    left = []
                break
            data = json.loads(line)
            if "begin" in data:
                step = data["begin"]
                left.remove(step)
                deadline = time.perf_counter() + steps[step][0] * slow
            else:
                yield Row(**data)
        running.kill()
        running.wait()
        if not step:
            return
    for step in left:
        yield Row(process, step, step, note="left out: the minutes were over")


def _read(stream: Any, put: Callable[[str | None], object]) -> None:
    for line in stream:
        put(line)
    put(None)


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
        (r.value for r in rows if r.process == "ceilings" and r.name == name and r.value), None
    )
    return (
        None
        if limit is None
        else amount / (limit * (1e9 if kind == "bytes" else 1e12)) / row.seconds
    )


def relative(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as fast as transformers in the same shape."""
    kind, _, shape = row.process.partition(" ")
    if not row.value or kind != "ours" or row.least is None or row.unit not in ("tokens/s", "s"):
        return None
    name, theirs = re.sub("int[48]", "bfloat16", row.name), f"transformers {shape}"
    other = [r.value for r in rows if r.process == theirs and r.name == name and r.value]
    if not other:
        return None
    return row.value / other[0] if row.unit == "tokens/s" else other[0] / row.value


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
        cells = [
            f"{row.process}: {row.name}",
            value,
            row.unit,
            "" if part is None else f"{part:.0%}",
        ]
        lines.append([*cells, "" if ratio is None else f"{ratio:.2f}", row.note[:200]])
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
        "--minutes", type=float, default=8.0, help="what is not done by then is left out"
    )
    parser.add_argument("--only", nargs="*", metavar="PROCESS", help="run these processes alone")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    parser.add_argument("--steps", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, help="the result; without it bench/results/<device>.json"
    )
    given = parser.parse_args()
    if given.process:
        child(given.process, given.steps, torch.device(given.device), given.small)
        return
    end, machine = time.perf_counter() + 60 * given.minutes, about(given.device)
    name = re.sub(r"\W+", "-", str(machine["device"])).strip("-").lower()
    out = given.out or RESULTS / f"{name}{'-small' if given.small else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for process in given.only or processes(given.small):
        for row in run(process, given.device, given.small, end):
            rows.append(row)
            value = "" if row.value is None else f"{row.value:.4g}"
            print(f"{row.process}: {row.name}: {value} {row.unit} {row.note[:200]}", flush=True)
            figures = [
                asdict(row)
                | {"of the ceiling": share(row, rows), "x transformers": relative(row, rows)}
                for row in rows
            ]
            out.write_text(json.dumps({"about": machine, "rows": figures}, indent=1) + "\n")
    print(f"\n{json.dumps(machine, indent=1)}\n\n{table(rows)}\n\n{out}")


if __name__ == "__main__":
    main()
