"""Compiles the Triton kernels for every architecture, without a GPU, and tells what each takes.

    python bench/compile_kernels.py            # all; rewrites the table of docs/gpu.md
    python bench/compile_kernels.py --json 90  # JSON for one architecture, for tests

Compiling all takes two minutes of a core. So the first command also writes compiled_kernels.json: a
digest of what was compiled for each architecture that all kernels fit. The second one compiles,
next to the named architecture, those whose digest is another one now, by the kernels, by how they
are launched, or by the version of Triton.

Specializations are those that the published models and LLaVA-OneVision 7B launch. Needs Triton with
its NVIDIA tools (pip install triton); `TRITON_INTERPRET` must not be 1.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from llava_interleave.kernels import triton as kt
from llava_interleave.kernels.triton.checks import Random
from llava_interleave.kernels.triton.launch import SHARED_MEMORY, Launch, kernel

ROOT = Path(__file__).parent.parent
PAGE, RECORD = ROOT / "docs" / "gpu.md", Path(__file__).parent / "compiled_kernels.json"
BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"
META, BF16, FP16 = torch.device("meta"), torch.bfloat16, torch.float16
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}


def calls() -> dict[str, Callable[[], object]]:
    """A call for each specialization, on the meta device."""
    r, half = Random(META, BF16), Random(META, FP16)
    table, one, two = r.ints([0] * 4).view(1, 4), r.ints([9]), r.ints([0, 9])

    def attention(heads: int, kv_heads: int, d: int, int8: bool, decode: bool) -> object:
        kv, q = r.cache(9, 256, kv_heads, d, int8=int8), r.floats(1, heads, d)
        if decode:
            return kt.paged_decode(q, kv, table, one)
        return kt.paged_attention(q, kv, table, two, one, 9)

    def rotary(heads: int, kv_heads: int, d: int, *, int8: bool) -> object:
        kv, qkv = r.cache(9, 256, kv_heads, d, int8=int8), r.floats(1, (heads + 2 * kv_heads) * d)
        rope = torch.empty(9, d, device=META)
        return kt.rotary_kv_write(qkv, one, one, rope, kv, heads)

    def split(width: int, dtype: torch.dtype = BF16) -> kt.Product:
        sums = torch.empty(4, 1, width, device=META)
        scale = torch.empty(1, device=META) if dtype == FP16 else None
        return kt.Product(sums, None, scale, dtype)

    def tower() -> object:
        q, k, v = r.floats(729, 48, 72).split(16, 1)
        return kt.varlen_attention(q, k, v, two, two, 729, causal=False)

    def sample() -> object:
        f, state = torch.empty(4, device=META), torch.empty(4, 152000, device=META).int()
        p = kt.SamplingTensors(f, f.int(), f, f, f, f, f, f.double(), f.int(), state)
        return kt.sample(r.floats(4, 152000), p)

    return {
        "add_rms_norm": lambda: kt.add_rms_norm(
            *(r.floats(1, 4096), r.floats(4096)), 1e-6, r.floats(1, 4096)
        ),
        "add_rms_norm, float16, 4 splits": lambda: kt.add_rms_norm(
            *(split(4096, FP16), half.floats(4096)), 1e-6, torch.empty(1, 4096, device=META)
        ),
        "add_layer_norm": lambda: kt.add_layer_norm(
            *(r.floats(1, 1152), r.floats(1152), r.floats(1152)), 1e-6, r.floats(1, 1152)
        ),
        "silu_mul": lambda: kt.silu_mul(r.floats(1, 5632)),
        "silu_mul, 4 splits": lambda: kt.silu_mul(split(22016)),
        "scale_rows, silu_mul": lambda: kt.scale_rows(half.floats(1, 22016), gated=True),
        "rotary_kv_write, d 128, int8": lambda: rotary(28, 4, 128, int8=True),
        "paged_decode, d 64, MHA": lambda: attention(16, 16, 64, False, True),
        "paged_decode, d 128, MHA": lambda: attention(32, 32, 128, False, True),
        "paged_decode, d 128, GQA 7:1, int8": lambda: attention(28, 4, 128, True, True),
        "paged_attention, d 64": lambda: attention(16, 16, 64, False, False),
        "paged_attention, d 128": lambda: attention(32, 32, 128, False, False),
        "paged_attention, d 128, int8": lambda: attention(28, 4, 128, True, False),
        "varlen_attention, d 72": tower,
        "packed_linear, int4, 1 row": lambda: kt.packed_linear(
            r.floats(1, 4096), r.weight(4096, 4096, 4)
        ),
        "packed_linear, int4, 8 rows": lambda: kt.packed_linear(
            r.floats(8, 4096), r.weight(4096, 22016, 4)
        ),
        "packed_linear, int8, 8 rows": lambda: kt.packed_linear(
            r.floats(8, 4096), r.weight(4096, 4096, 8)
        ),
        "packed_linear, int4, 64 rows, float16": lambda: kt.packed_linear(
            half.floats(64, 4096), r.weight(4096, 22016, 4)
        ),
        "packed_linear, int8, 1 row": lambda: kt.packed_linear(
            r.floats(1, 4096), r.weight(4096, 22016, 8)
        ),
        "packed_linear, int8, 64 rows": lambda: kt.packed_linear(
            r.floats(64, 4096), r.weight(4096, 22016, 8)
        ),
        "dequantize, int4": lambda: kt.dequantize(r.weight(4096, 4096, 4), BF16),
        "sample": sample,
    }


def launches(capability: int) -> dict[str, Launch]:
    """A launch for each kernel and specialization, by name."""
    found: dict[str, Launch] = {}
    seen: list[object] = []
    for name, call in calls().items():
        with kt.record_launches(capability) as recorded:
            call()
        for one in recorded:
            if (key := specialized(one)) not in seen:
                seen.append(key)
                function = one.name.split(".")[1]
                found[name if function in name else f"{name}: {function}"] = one
    return found


def specialized(launch: Launch) -> tuple[object, ...]:
    """What a kernel is compiled for."""
    options = launch.num_warps, launch.num_stages
    return launch.name, options, launch.constants, kt.specialization(launch)


def digest(capability: int) -> str:
    """Of what is compiled for an architecture, and by which Triton."""
    import triton

    text = [triton.__version__, *map(str, map(specialized, launches(capability).values()))]
    for name in sorted({launch.name.split(".")[0] for launch in launches(capability).values()}):
        text.append(code(ROOT / "llava_interleave" / "kernels" / "triton" / f"{name}.py"))
    text.append(code(ROOT / "llava_interleave" / "kernels" / "triton" / "programmatic.py"))
    return sha256("\n".join(text).encode()).hexdigest()


def code(file: Path) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Module) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


def compiled(capability: int) -> Iterator[tuple[str, dict[str, int]]]:
    """By specialization: KiB of shared memory, registers of a thread, bytes of its stack, which is
    where registers are spilled to."""
    import triton
    from triton.backends.compiler import GPUTarget

    for label, launch in launches(capability).items():
        made = triton.compile(
            ast_source(launch),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
        usage = resources(made.asm["cubin"])
        shared = -(-(made.metadata.shared + usage["SHARED"]) // 1024)
        yield label, {"shared": shared, "registers": usage["REG"], "stack": usage["STACK"]}


def ast_source(launch: Launch) -> Any:
    """A launch as its kernel is compiled for it."""
    from triton.compiler import ASTSource

    function = kernel(launch.name)
    given = iter(launch.arguments)
    signature, constants, attributes = {}, {}, {}
    for index, (name, known) in enumerate(kt.specialization(launch).items()):
        value = launch.constants[name] if name in launch.constants else next(given)
        if known is None:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = TYPES[known[0]]
        if known[1]:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED ... of a cubin's only kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", output)}


def fits(capability: int, kernels: dict[str, dict[str, int]]) -> bool:
    """Whether all have their shared memory, and spill no registers."""
    limit = SHARED_MEMORY[capability]
    return all(one["shared"] <= limit and not one["stack"] for one in kernels.values())


def table(by_capability: dict[int, dict[str, dict[str, int]]]) -> str:
    """KiB of shared memory and registers of every kernel, in Markdown."""
    heads = [f"sm_{c} ({SHARED_MEMORY[c]} KiB)" for c in by_capability]
    lines = [["kernel", *heads], ["---", *["---:"] * len(heads)]]
    for label in next(iter(by_capability.values())):
        each = (rows[label] for rows in by_capability.values())
        lines.append([label, *(f"{one['shared']} KiB, {one['registers']}" for one in each)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    warnings.simplefilter("ignore")
    digests = {str(capability): digest(capability) for capability in SHARED_MEMORY}
    if "--json" in sys.argv:
        known = json.loads(RECORD.read_text("utf-8"))
        changed = [name for name, own in digests.items() if known.get(name) != own]
        names = {*sys.argv[2:], *changed}
        json.dump({name: dict(compiled(int(name))) for name in names}, sys.stdout)
        return
    found = {capability: dict(compiled(capability)) for capability in SHARED_MEMORY}
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"
    PAGE.write_text(text, "utf-8")
    fitting = {str(c): digests[str(c)] for c, kernels in found.items() if fits(c, kernels)}
    RECORD.write_text(json.dumps(fitting, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
