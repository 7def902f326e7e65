"""Compiled kernels against the same arithmetic by PyTorch, on odd shapes, for every instruction set
that this machine has.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_interleave import kernels
from llava_interleave.config import TextConfig
from llava_interleave.engine.kv_contiguous import ContiguousKVCache, Span, quantize_kv
from llava_interleave.engine.prefix_cache import CacheKey, SequenceKV
from llava_interleave.quantization.linear_cpu import QuantizedLinear
from llava_interleave.quantization.packing import pack

BF16, F32 = torch.bfloat16, torch.float32
needs_kernels = pytest.mark.skipif(
    kernels.unavailable_reason() is not None, reason=f"no kernels: {kernels.unavailable_reason()}"
)


def quantized(
    features: int, out: int, bits: int, dtype: torch.dtype, *, bias: bool = True
) -> QuantizedLinear:
    made = QuantizedLinear(features, out, bits, bias=bias)
    made.weight, made.scale = pack(torch.randn(out, features) * torch.rand(out, 1), bits)
    if made.bias is not None:
        made.bias = torch.nn.Parameter(torch.randn(out).to(dtype), requires_grad=False)
    return made


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("tokens", "features", "out", "bias"),
    [
        (1, 128, 16, False),
        (1, 1024, 130, True),
        (3, 40, 17, True),
        (7, 576, 1, False),
        (13, 129, 50, True),
        (250, 288, 31, False),
    ],
)
def test_linear_is_the_plain_product(
    tokens: int, features: int, out: int, bias: bool, bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module, x = (
        quantized(features, out, bits, dtype, bias=bias),
        torch.randn(tokens, features).to(dtype),
    )
    x[0, :5] *= 30  # groups of unlike size
    ours, plain = module(x), module.plain(x)
    assert ours.dtype == dtype and ours.shape == (tokens, out)
    torch.testing.assert_close(
        ours, plain, rtol=1e-5 if dtype == F32 else 8e-3, atol=1e-5 * float(plain.abs().max())
    )


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bits", [4, 8])
def test_largest_numbers_do_not_overflow(bits: int) -> None:
    """Pairs of products are summed in 16 bits on AVX2, where 255 * 127 * 2 would not fit."""
    module = QuantizedLinear(256, 16, bits, bias=False)
    for sign in (1, -1):
        module.weight, module.scale = pack(torch.full((16, 256), 3.0 * sign), bits)
        x = torch.full((2, 256), 5.0)
        torch.testing.assert_close(module(x), module.plain(x), rtol=1e-6, atol=0)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 100])
def test_products_have_the_same_bits_with_every_instruction_set(
    tokens: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = quantized(300, 70, bits, F32), torch.randn(tokens, 300)
    found = []
    for name in kernels.binding.supported_instructions():
        functions = kernels.binding.bind(kernels.binding.find_library(name))
        monkeypatch.setattr(kernels.binding, "library", lambda functions=functions: functions)
        found.append(module(x))
    assert all(torch.equal(y, found[0]) for y in found)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_a_token_is_the_same_in_any_batch(bits: int) -> None:
    module, x = quantized(224, 70, bits, BF16), torch.randn(61, 224).to(BF16)
    whole = module(x)
    for some in (slice(0, 1), slice(3, 5), slice(10, 23), slice(60, 61)):
        assert torch.equal(module(x[some]), whole[some])
    assert torch.equal(module(x[None])[0], whole)


@needs_kernels
def test_threads_do_not_change_a_bit() -> None:
    module, x = quantized(1024, 4096, 4, F32), torch.randn(40, 1024)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, one = module(x), module(x[:1])
        torch.set_num_threads(3)
        assert torch.equal(module(x), alone) and torch.equal(module(x[:1]), one)
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.usefixtures("instructions")
def test_noughts_and_what_is_no_number() -> None:
    module = quantized(64, 16, 4, F32, bias=False)
    x = torch.randn(3, 64)
    x[0] = 0
    x[1, 40] = torch.nan
    y = module(x)
    assert (y[0] == 0).all()
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


@needs_kernels
def test_weights_need_no_alignment() -> None:
    """A mapped file puts them anywhere."""
    module, x = quantized(96, 33, 4, F32), torch.randn(2, 96)
    right = module(x)
    for name in ("weight", "scale"):
        value = getattr(module, name)
        moved = torch.empty(value.nbytes + 2, dtype=torch.uint8)[2:]
        moved.copy_(value.view(-1).view(torch.uint8))
        setattr(module, name, moved.view(value.dtype).view(value.shape))
    assert torch.equal(module(x), right)


@needs_kernels
def test_no_tokens_and_many_at_once() -> None:
    """As many as make several blocks."""
    module = quantized(2048, 40, 4, F32)
    assert module(torch.randn(0, 2048)).shape == (0, 40)
    x = torch.randn(400, 2048)
    torch.testing.assert_close(module(x), module.plain(x), rtol=1e-4, atol=1e-3)


def test_shapes_that_do_not_fit_are_named() -> None:
    module = quantized(200, 48, 4, F32)
    with pytest.raises(AssertionError, match=r"\[2, 264\].*\[3, 2, 1088\]\), 48"):
        kernels.linear(torch.randn(2, 264), module.weight, module.scale, None, 48)
    with pytest.raises(AssertionError, match=r"\[3, 2, 1088\]\), 49"):
        kernels.linear(torch.randn(2, 200), module.weight, module.scale, None, 49)


def memory(heads: int, d: int, capacity: int) -> tuple[Tensor, Tensor]:
    return torch.randn(heads, d, capacity).to(BF16), torch.randn(heads, capacity, d).to(BF16)


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "capacity", "at"),
    [
        (1, 1, 16, 1, 0),
        (4, 2, 16, 40, 15),
        (4, 2, 80, 40, 16),
        (8, 8, 128, 100, 99),
        (6, 1, 64, 777, 700),
    ],
)
def test_attention_of_one_token(heads: int, kv_heads: int, d: int, capacity: int, at: int) -> None:
    torch.manual_seed(1)
    keys, values = memory(kv_heads, d, capacity)
    q, k, v = (torch.randn(1, n, d).to(BF16) * 2 for n in (heads, kv_heads, kv_heads))
    right_keys, right_values = keys.clone(), values.clone()
    right_keys[:, :, at], right_values[:, at] = k[0], v[0]
    out = kernels.attend(q, k, v, keys, values, at)
    assert torch.equal(keys, right_keys) and torch.equal(
        values, right_values
    )  # and nothing else was written
    scores = q[0].double().view(kv_heads, -1, d) @ keys.double()[:, :, : at + 1] * d**-0.5
    right = (scores.softmax(-1) @ values.double()[:, : at + 1]).view(1, heads, d)
    torch.testing.assert_close(
        out.double(), right, rtol=5e-3, atol=2**-9 * float(values[:, : at + 1].abs().max())
    )


def memory_in_8_bits(
    heads: int, d: int, capacity: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    (keys, by_key), (values, by_value) = (
        quantize_kv(torch.randn(capacity, heads, d)) for _ in range(2)
    )
    scales = by_key.t().contiguous(), by_value.t().contiguous()
    return keys.permute(1, 2, 0).contiguous(), values.transpose(0, 1).contiguous(), scales


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "capacity", "at"),
    [(1, 1, 16, 2, 0), (4, 2, 80, 40, 15), (8, 8, 128, 100, 98), (6, 1, 64, 777, 700)],
)
def test_attention_in_8_bits(heads: int, kv_heads: int, d: int, capacity: int, at: int) -> None:
    """What is written is `quantize_kv` to the bit; what is read are those numbers, and queries are
    rounded to 8 bits."""
    torch.manual_seed(1)
    keys, values, scales = memory_in_8_bits(kv_heads, d, capacity)
    q, k, v = (torch.randn(2, n, d).to(BF16) * 2 for n in (heads, kv_heads, kv_heads))
    k[0, 0] = 0
    right = keys.clone(), values.clone(), scales[0].clone(), scales[1].clone()
    (new_keys, by_key), (new_values, by_value) = quantize_kv(k), quantize_kv(v)
    right[0][:, :, at : at + 2], right[1][:, at : at + 2] = (
        new_keys.permute(1, 2, 0),
        new_values.transpose(0, 1),
    )
    right[2][:, at : at + 2], right[3][:, at : at + 2] = by_key.t(), by_value.t()
    out = kernels.attend(q, k, v, keys, values, at, scales)
    for ours, expected in zip((keys, values, *scales), right, strict=True):
        assert torch.equal(ours, expected)
    for token in range(2):
        stop = at + token + 1
        wide = (
            (keys.double() * scales[0][:, None])[..., :stop],
            (values.double() * scales[1][..., None])[:, :stop],
        )
        size = q[token].double().abs().amax(-1, keepdim=True) / 127
        rounded = (q[token].double() / size).round() * size
        scores = rounded.view(kv_heads, -1, d) @ wide[0] * d**-0.5
        right_seen = (scores.softmax(-1) @ wide[1]).view(heads, d)
        torch.testing.assert_close(
            out[token].double(), right_seen, rtol=5e-3, atol=2**-9 * float(wide[1].abs().max())
        )


@needs_kernels
@pytest.mark.parametrize(("tokens", "d", "at"), [(1, 16, 0), (3, 80, 255), (41, 64, 500)])
def test_attention_in_8_bits_has_the_same_bits_with_every_instruction_set(
    tokens: int, d: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    *kv, scales = memory_in_8_bits(2, d, at + tokens)
    q, k, v = (torch.randn(tokens, n, d).to(BF16) for n in (14, 2, 2))
    found = []
    for name in kernels.binding.supported_instructions():
        functions = kernels.binding.bind(kernels.binding.find_library(name))
        monkeypatch.setattr(kernels.binding, "library", lambda functions=functions: functions)
        found.append(kernels.attend(q, k, v, *kv, at, scales))
    assert all(torch.equal(out, found[0]) for out in found)


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize(("tokens", "at"), [(9, 70), (23, 250)])
def test_attention_of_several_tokens_is_that_of_each_alone(
    tokens: int, at: int, in_8_bits: bool
) -> None:
    """To the last bit, which draft tokens need; also across blocks of 256 keys."""
    torch.manual_seed(1)
    size = at + tokens + 11
    made = memory_in_8_bits(2, 48, size) if in_8_bits else (*memory(2, 48, size), None)
    q, k, v = (torch.randn(tokens, n, 48).to(BF16) for n in (6, 2, 2))
    copy = [
        tuple(map(Tensor.clone, one))
        if isinstance(one, tuple)
        else one
        if one is None
        else one.clone()
        for one in made
    ]
    together = kernels.attend(q, k, v, *made[:2], at, made[2])
    for token in range(tokens):
        alone = kernels.attend(
            *(x[token : token + 1] for x in (q, k, v)), *copy[:2], at + token, copy[2]
        )
        assert torch.equal(alone[0], together[token])
    assert torch.equal(copy[0], made[0]) and torch.equal(copy[1], made[1])


@needs_kernels
def test_attention_with_scores_far_apart() -> None:
    """Of which all but one vanish."""
    keys, values = memory(1, 16, 64)
    keys[:, :, 7] = 100
    q = torch.full((1, 1, 16), 50.0, dtype=BF16)
    new = torch.zeros(1, 1, 16, dtype=BF16)
    torch.testing.assert_close(kernels.attend(q, new, new, keys, values, 63)[0], values[:, 7])


@needs_kernels
def test_the_engines_memory_uses_it_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    c = TextConfig(64, 96, 1, 4, 2, 16, 64, 128, 1e4, 1e-6, False)

    def step() -> Tensor:
        torch.manual_seed(2)
        cache, kv = ContiguousKVCache(c, BF16, torch.device("cpu")), SequenceKV(CacheKey.of([]))
        kv.capacity = 32
        cache.prepare(kv)
        q, k, v = (torch.randn(20, n, 16).to(BF16) for n in (4, 2, 2))
        cache.attend([Span(kv, 0, 19)])(0, q[:19], k[:19], v[:19])
        return cache.attend([Span(kv, 19, 20)])(0, q[19:], k[19:], v[19:])

    calls: list[int] = []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *args: calls.append(args[5]) or attend(*args))
    compiled = step()
    assert calls == [19]
    monkeypatch.setattr(kernels.binding, "library", lambda: "none for this test")
    torch.testing.assert_close(compiled, step(), rtol=2e-2, atol=2e-2)
    assert calls == [19]


def reason() -> str:
    """`unavailable_reason` of a new process."""
    caches = kernels.binding.library, kernels.binding.supported_instructions
    for function in caches:
        function.cache_clear()
    try:
        return str(kernels.unavailable_reason())
    finally:
        for function in caches:
            function.cache_clear()


def test_without_kernels_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = quantized(64, 24, 4, F32), torch.randn(5, 64)
    monkeypatch.setattr(kernels, "linear", None)  # would raise
    monkeypatch.setattr(kernels.binding, "library", lambda: "none")
    assert torch.equal(module(x), module.plain(x))


def test_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as m:
        m.setattr("platform.machine", lambda: "riscv64")
        assert reason() == "they are not written for riscv64, only for x86_64 and aarch64"
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    with monkeypatch.context() as m:
        m.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": False})
        assert reason() == ("this CPU has none of amx, avx512_bf16, avx512_vnni, avx_vnni, avx2")
    with monkeypatch.context() as m:
        m.setattr("platform.machine", lambda: "arm64")
        m.setattr(torch.cpu, "get_capabilities", lambda: {"neon": True, "dot": True})
        m.setattr(kernels.binding, "find_library", lambda name: tmp_path / name)
        assert "neon_dotprod cannot be loaded" in reason()
    capabilities = dict.fromkeys(kernels.binding.CAPABILITIES["avx512_bf16"], True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(kernels.compilation, "library_path", lambda name: tmp_path / name)
    assert "csrc are not compiled: run python" in reason()
    monkeypatch.setattr(kernels.compilation, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(kernels.compilation, "FOLDER", tmp_path)
    assert "this installation has none" in reason()
    (tmp_path / "avx512_bf16-1.so").write_text("no library")
    assert "avx512_bf16-1.so cannot be loaded" in reason()


@pytest.mark.skipif(os.name == "nt", reason="its compiler is a shell script")
def test_compilation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It names the compiler's error and leaves nothing half done; libraries of other sources go."""
    compilation = kernels.compilation
    monkeypatch.setattr(compilation, "FLAGS", {compilation.architecture(): {"all": ()}})
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    folder = tmp_path / "lib"
    with pytest.raises(compilation.CompileError, match="compiler failed for all: no such flag"):
        list(compilation.compile_all(folder))
    assert not list(folder.iterdir())
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    (folder / f"all-0{compilation.SUFFIX}").touch()
    made = list(compilation.compile_all(folder))
    assert made == list(folder.iterdir()) == [compilation.library_path("all", folder)]
    compiler.unlink()
    assert list(compilation.compile_all(folder)) == made  # nothing to compile
    with pytest.raises(compilation.CompileError, match=r"compiler into .*: No such file"):
        list(compilation.compile_all(tmp_path / "another"))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(compilation.CompileError, match="no C\\+\\+ compiler"):
        compilation.find_compiler()


@needs_kernels
def test_own_threads_are_used_where_pytorch_exports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = quantized(1024, 2048, 4, F32), torch.randn(40, 1024)
    right = module(x)
    monkeypatch.setattr(kernels.binding, "torch_parallel_for", lambda: None)
    found = kernels.binding.bind(
        kernels.binding.find_library(kernels.binding.supported_instructions()[0])
    )
    monkeypatch.setattr(kernels.binding, "library", lambda: found)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(module(x), right)
    finally:
        torch.set_num_threads(before)


OUTPUTS = Path(__file__).parent / "helpers" / "kernel_outputs.cpp"


def compile_outputs(folder: Path, compiler: str, *flags: str) -> Path:
    """The program that prints hashes of what the kernels compute on odd shapes."""
    program = folder / "outputs"
    command = [compiler, "-std=c++17", "-O0", "-ffp-contract=off", *flags]
    command += [f"-I{kernels.compilation.SOURCES}", "-o", str(program), str(OUTPUTS)]
    subprocess.run(command, check=True)
    return program


def printed(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program without vector instructions: `csrc/simd_scalar.h`."""
    if kernels.compilation.architecture() != "x86_64" or not shutil.which("g++"):
        pytest.skip("needs g++ on x86-64")
    return compile_outputs(tmp_path_factory.mktemp("scalar"), "g++", "-ldl")


def without_bfloat16_attention(lines: list[str]) -> list[str]:
    """Without towers and decoders with a bfloat16 KV cache."""
    kept: list[str] = []
    for line in lines:
        name, *shape = line.split()[:-1]
        if name in ("linear", "encode", "decode"):
            wanted = name == "linear" or (name == "decode" and shape[-1] == "1")
        kept += [line] * wanted  # a decoder's keys and values follow it
    return kept


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("name", kernels.compilation.FLAGS["x86_64"])
def test_x86_computes_the_bits_of_the_scalar_reference(name: str, scalar: Path) -> None:
    """The installed libraries: products, decoder and tower, int4 and int8, both KV caches."""
    if name not in kernels.binding.supported_instructions():
        pytest.skip("not on this CPU")
    reference, found = printed(scalar), printed(scalar, kernels.binding.find_library(name))
    assert len(reference) == len(found) == 434
    if name in ("amx", "avx512_bf16"):  # these multiply bfloat16 numbers in attention
        reference, found = map(without_bfloat16_attention, (reference, found))
        assert len(found) == 378
    assert found == reference


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
@pytest.mark.parametrize("name", kernels.compilation.FLAGS["aarch64"])
def test_neon_computes_the_bits_of_the_scalar_reference(
    name: str, scalar: Path, tmp_path: Path
) -> None:
    """The same, cross-compiled and emulated."""
    flags = kernels.compilation.FLAGS["aarch64"][name]
    arm = compile_outputs(tmp_path, "aarch64-linux-gnu-g++", "-static", *flags)
    found = printed("qemu-aarch64", arm)
    assert len(found) == 434
    assert found == printed(scalar)


HARNESS = """
#include "layers.cpp"
#include <cstdlib>
#include <sys/syscall.h>
#include <unistd.h>
static int32_t serial(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  for (int64_t i = begin; i < end; i++) body(i, i + 1, context);
  return 0;
}
template <class T> T* exactly(int64_t n) {  // to the byte, so that every read beyond it is seen
  auto p = static_cast<T*>(malloc(n * sizeof(T)));
  for (int64_t i = 0; i < n; i++) p[i] = T(i % 7);
  return p;
}
template <class T> void product(int bits, int64_t tokens, int64_t in, int64_t out) {
  int64_t groups = groups_of(in), panels = (out + 15) / 16;
  auto x = exactly<T>(tokens * in); auto y = exactly<T>(tokens * out); auto bias = exactly<T>(out);
  auto w = exactly<uint8_t>(panels * groups * group_bytes(bits)); auto s = exactly<uint16_t>(panels * groups * 16);
  llava_linear(serial, bits, sizeof(T) == 2, x, w, s, bias, y, tokens, in, out);
  free(x), free(y), free(bias), free(w), free(s);
}
void decode(int64_t bits, int64_t tokens, int64_t asked, bool in_8_bits) {
  const Shape shape{2, 64, 96, 4, 2, 32};  // layers, width, inner, heads, kv heads, d
  auto weight = [&](int64_t out, int64_t in, bool bias) {
    return Weight{bits, exactly<uint8_t>(out / 16 * groups_of(in) * group_bytes(bits)),
                  exactly<uint16_t>(out * groups_of(in)), bias ? exactly<uint16_t>(out) : nullptr};
  };
  auto norm = exactly<uint16_t>(64);
  const LayerWeights layer{norm, norm, weight(128, 64, true), weight(64, 64, true), weight(64, 64, true), weight(64, 128, false),
                           weight(96, 64, false), weight(96, 64, false), weight(64, 96, false)};
  const LayerWeights layers[] = {layer, layer};
  auto part = [&](int64_t rows) { return in_8_bits ? (void*)exactly<int8_t>(rows) : (void*)exactly<uint16_t>(rows); };
  auto scales = [&](int64_t n) { return in_8_bits ? exactly<uint16_t>(n) : nullptr; };
  const int64_t capacity = tokens + 3;
  LayerKV memory[2];
  for (auto& m : memory) m = {part(2 * 32 * capacity), part(2 * 32 * capacity), scales(2 * capacity), scales(2 * capacity)};
  const Sequence sequence{0, tokens, 3, capacity, asked, memory};
  auto hidden = exactly<uint16_t>(tokens * 64), turns = exactly<uint16_t>(tokens * 32);
  llava_decode(serial, 1, &shape, layers, 1e-6f, &sequence, 1, turns, turns, hidden, tokens);
}
void encode(int64_t bits, int64_t tokens) {
  const Shape shape{2, 96, 112, 4, 4, 24};
  auto weight = [&](int64_t out, int64_t in) {
    const int64_t groups = groups_of(in);
    return Weight{bits, exactly<uint8_t>(out / 16 * groups * group_bytes(bits)), exactly<uint16_t>(out * groups),
                  exactly<uint16_t>(out)};
  };
  auto norm = exactly<uint16_t>(96);
  const TowerWeights layer{norm, norm, norm, norm, weight(96, 96), weight(96, 96), weight(96, 96), weight(96, 96),
                           weight(112, 96), weight(96, 112)};
  const TowerWeights layers[] = {layer, layer};
  llava_encode(serial, 1, &shape, layers, 1e-6f, exactly<uint16_t>(tokens * 96), tokens);
}
void train(int64_t heads, int64_t kv_heads, int64_t d) {
  const PackedSequence sequences[] = {{1, 97}, {0, 1}, {98, 12}};
  const int64_t tokens = 110;
  auto made = [&](int64_t n) { return exactly<float>(tokens * n * d); };
  auto q = made(heads), k = made(kv_heads), v = made(kv_heads), out = made(heads), above = made(heads);
  auto dq = made(heads), dk = made(heads), dv = made(heads), normalizers = exactly<float>(tokens * heads);
  llava_packed_attention(serial, 1, q, k, v, out, normalizers, sequences, 3, tokens, heads, kv_heads, d);
  llava_packed_attention_backward(serial, 1, q, k, v, out, normalizers, above, dq, dk, dv, sequences, 3, tokens, heads,
                                  kv_heads, d);
  if (d % 32) return;
  auto angles = made(1), weight = exactly<float>(heads * d), parts = exactly<float>(2 * heads * d);
  llava_rotate(serial, q, angles, angles, 1, dq, tokens, heads, d);
  llava_rms_norm(serial, q, weight, 1e-6f, dq, normalizers, tokens, heads * d);
  llava_rms_norm_backward(serial, q, weight, normalizers, above, dq, parts, tokens, heads * d);
  llava_swiglu(serial, 0, q, above, dq, tokens * heads * d);
  llava_swiglu_backward(serial, 0, q, above, out, dq, dk, tokens * heads * d);
  llava_swiglu(serial, 1, q, above, dq, 2 * tokens * heads * d);
  llava_swiglu_backward(serial, 1, q, above, out, dq, dk, 2 * tokens * heads * d);
}
int main() {
#if defined(__AMX_TILE__)
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 2;
#endif
  for (int bits : {4, 8})
    for (int64_t tokens : {1, 7, 12, 13, 47}) {
      decode(bits, tokens, tokens, false), decode(bits, tokens, tokens, true), decode(bits, tokens, tokens / 2, true);
      encode(bits, tokens);
    }
  train(2, 1, 32), train(1, 1, 64), train(3, 3, 20);
  for (int bits : {4, 8})
    for (int64_t tokens : {1, 2, 12, 13, 40})
      for (int64_t in : {1, 127, 128, 300})
        for (int64_t out : {1, 16, 37}) product<float>(bits, tokens, in, out), product<uint16_t>(bits, tokens, in, out);
  for (int64_t d : {16, 64, 80})
    for (int64_t capacity : {1, 16, 33}) {
      int64_t n = capacity > 1 ? 2 : 1;  // tokens
      auto q = exactly<uint16_t>(n * 4 * d), k = exactly<uint16_t>(n * 2 * d), v = exactly<uint16_t>(n * 2 * d);
      auto o = exactly<uint16_t>(n * 4 * d);
      auto keys = exactly<uint16_t>(2 * d * capacity), values = exactly<uint16_t>(2 * d * capacity);
      auto keys8 = exactly<int8_t>(2 * d * capacity), values8 = exactly<int8_t>(2 * d * capacity);
      auto a = exactly<uint16_t>(2 * capacity), b = exactly<uint16_t>(2 * capacity);
      for (int64_t at = 0; at + n <= capacity; at++) {
        llava_attend(serial, q, k, v, keys, values, nullptr, nullptr, o, n, 4, 2, d, capacity, at);
        llava_attend(serial, q, k, v, keys8, values8, a, b, o, n, 4, 2, d, capacity, at);
      }
      free(q), free(k), free(v), free(o), free(keys), free(values), free(keys8), free(values8), free(a), free(b);
    }
}
"""


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("name", kernels.compilation.flags())
def test_nothing_is_read_or_written_beyond_its_end(name: str, tmp_path: Path) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    if name not in kernels.binding.supported_instructions():
        pytest.skip("not on this CPU")
    (tmp_path / "harness.cpp").write_text(HARNESS)
    sanitise = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-static-libasan",
        "-fno-sanitize=alignment",
    ]
    command = [
        "g++",
        "-std=c++17",
        "-O0",  # compiled in a quarter of the time of -O1, and no access is optimised away
        *kernels.compilation.flags()[name],
        *sanitise,
        f"-I{kernels.compilation.SOURCES}",
        "-o",
        "harness",
        "harness.cpp",
    ]
    if (
        shutil.which("g++") is None
        or subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
    ):
        pytest.skip("this compiler has no sanitizers")
    leaks = os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0"
    }  # the harness frees little, and the kernels hold nothing
    done = subprocess.run(["./harness"], cwd=tmp_path, capture_output=True, text=True, env=leaks)
    assert (done.returncode, done.stderr) == (0, "")
