"""The CPU kernels of training against the plain formulas and their gradients, for every instruction
set that this machine has.
"""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from llava_interleave import kernels
from llava_interleave.kernels import training
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.model.attention import causal
from llava_interleave.model.qwen2 import MLP, RMSNorm, rotary, rotate
from llava_interleave.testing import tiny_config
from llava_interleave.train.data.packing import Batch
from llava_interleave.train.losses import sft_loss

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
needs_kernels = pytest.mark.skipif(
    kernels.unavailable_reason() is not None, reason=f"no kernels: {kernels.unavailable_reason()}"
)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def with_gradients(
    function: Callable[..., Tensor], given: Sequence[Tensor], above: Tensor
) -> list[Tensor]:
    """The result, and the gradient of each input for that of the result."""
    found = function(*given)
    return [found.detach(), *torch.autograd.grad(found, given, above.to(found.dtype))]


def compare(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    given: Sequence[Tensor],
    rtol: float = 1e-5,
) -> None:
    """Both in the type of the inputs, within rounding of the plain formula in float64."""
    above = torch.randn_like(plain(*given).detach())
    exact = with_gradients(plain, leaves(*(t.double() for t in given)), above.double())
    found = with_gradients(ours, leaves(*given), above)
    for got, want, like in zip(found, exact, (above, *given), strict=True):
        assert got.dtype == like.dtype and got.shape == want.shape
        size = max(float(want.abs().max()), float(above.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * size)


def separately(lengths: Sequence[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of each sequence by PyTorch."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
        return torch.cat([causal(*(x[None] for x in part))[0] for part in parts])

    return attend


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "lengths"),
    [
        (1, 1, 64, [1]),
        (4, 4, 64, [95, 1, 96, 97, 300, 7, 192]),
        (6, 2, 32, [200, 13]),
        (14, 2, 128, [33, 150]),
        (2, 2, 80, [130, 5]),
        (3, 1, 8, [50, 11, 12, 13]),
        (2, 1, 20, [3, 100]),
    ],
)
def test_packed_attention_and_its_gradients(
    heads: int, kv_heads: int, d: int, lengths: list[int]
) -> None:
    torch.manual_seed(0)
    given = [2 * torch.randn(sum(lengths), h, d) for h in (heads, kv_heads, kv_heads)]
    compare(lambda q, k, v: training.packed_attention(q, k, v, lengths), separately(lengths), given)


@needs_kernels
@pytest.mark.usefixtures("instructions")
def test_attention_of_large_scores_and_of_what_is_no_number() -> None:
    """Weights of one and zero; NaN reaches every later token of its sequence, and no other."""
    lengths = [120, 40]
    q, k, v = leaves(*(30 * torch.randn(160, 2, 16) for _ in range(3)))
    compare(
        lambda q, k, v: training.packed_attention(q, k, v, lengths),
        separately(lengths),
        [q, k, v],
        1e-3,
    )
    with torch.no_grad():
        k[100, 0, 3] = torch.nan
    out = training.packed_attention(q, k, v, lengths)
    assert out[100:120, 0].isnan().all()
    assert not out[:100].isnan().any() and not out[120:].isnan().any()
    assert not out[:, 1].isnan().any()


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (63, 48), (200, 1024), (64, 32)])
def test_rms_norm_and_its_gradients(rows: int, width: int) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(width, 1e-5)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)

    given = [torch.randn(rows, width) * torch.rand(rows, 1), torch.randn(width)]
    compare(lambda x, weight: training.rms_norm(x, weight, norm.eps), plain, given, rtol=2e-6)


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("tokens", "heads", "d"), [(1, 1, 32), (301, 4, 64), (17, 2, 128)])
def test_rotary_embedding_has_the_bits_of_the_plain_formula(
    tokens: int, heads: int, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    cos, sin = rotary(torch.arange(tokens), d, 1e6, F32)
    (x,) = leaves(torch.randn(tokens, heads, d))
    above = torch.randn_like(x)
    found = with_gradients(lambda x: training.rotate(x, cos, sin), [x], above)
    monkeypatch.setattr(training, "applies", lambda *_: False)
    wanted = with_gradients(lambda x: rotate(x, cos, sin), [x], above)
    assert all(map(torch.equal, found, wanted))


@needs_kernels
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (301, 704)])
def test_swiglu_and_its_gradients(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [(8 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)]
    given[0].view(-1)[:4] = torch.tensor([0.0, 90.0, -90.0, -30.0])
    compare(
        training.swiglu, lambda gate, up: silu(gate) * up, given, 1e-6 if dtype == F32 else 4e-3
    )


CONFIG = tiny_config(
    text={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 32,
        "vocab_size": 320,
    }
)
LENGTHS = [100, 3, 47]


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (sum(LENGTHS),), generator=generator)
    learnt = torch.ones(len(tokens), dtype=torch.bool)
    learnt[[0, 100, 103]] = False
    return Batch(tokens, learnt, LENGTHS, torch.zeros(0, 3, 8, 8), [])


def gradients(model: Llava) -> dict[str, Tensor]:
    model.zero_grad()
    sft_loss(model, batch()).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model() -> Llava:
    torch.manual_seed(0)
    return Llava(CONFIG).train()


@needs_kernels
@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_has_the_gradients_of_the_plain_formulas(
    autocast: bool, model: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where autocast multiplies in bfloat16."""
    calls: list[str] = []
    call = training._call
    monkeypatch.setattr(training, "_call", lambda name, *x: (calls.append(name), call(name, *x)))
    with torch.autocast("cpu", BF16, enabled=autocast):
        found = gradients(model)
    assert set(calls) == set(itertools.islice(kernels.binding.ARGUMENTS, 4, None)), calls
    monkeypatch.setattr(training, "applies", lambda *_: False)
    with torch.autocast("cpu", BF16, enabled=autocast):
        plain = gradients(model)
    assert found.keys() == plain.keys()
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    rtol = 3e-2 if autocast else 1e-5
    for name, gradient in plain.items():
        assert found[name].dtype == F32
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * largest)


@needs_kernels
def test_threads_do_not_change_a_bit_of_the_gradients_of_kernels() -> None:
    lengths = [200, 90, 130]
    q, k, v = leaves(*(torch.randn(420, heads, 32) for heads in (4, 2, 2)))
    x, weight = leaves(torch.randn(420, 64), torch.randn(64))
    above, above_norm = torch.randn(420, 4, 32), torch.randn(420, 64)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            attended = training.packed_attention(q, k, v, lengths)
            normed = training.rms_norm(x, weight, 1e-6)
            found.append(
                [
                    *torch.autograd.grad(attended, (q, k, v), above),
                    *torch.autograd.grad(normed, (x, weight), above_norm),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@needs_kernels
def test_what_is_not_trained_in_float32_takes_the_plain_way() -> None:
    x = torch.randn(4, 32)
    assert not training.applies(x) and training.applies(x.requires_grad_())
    with torch.no_grad():
        assert not training.applies(x)
    assert not training.applies(x.double()) and not training.applies(x.to("meta"))
    q, k, v = (torch.randn(9, 2, 4, dtype=F64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: PackedAttention([5, 4])(0, *x), (q, k, v))
    mlp = MLP(CONFIG.text).double()
    assert torch.autograd.gradcheck(mlp, torch.randn(2, 64, dtype=F64, requires_grad=True))


@needs_kernels
def test_a_run_computes_the_same_bits_without_gradients(model: Llava) -> None:
    """So that a network equals its own reference before the first step."""
    loss = sft_loss(model, batch()).total
    with training.everywhere(), torch.no_grad():
        assert torch.equal(sft_loss(model, batch()).total, loss)
        assert not training.applies(torch.randn(16, dtype=F64))
    assert not training.applies(torch.randn(16))


@needs_kernels
def test_a_gradient_of_a_gradient_is_refused() -> None:
    gate, up = leaves(torch.randn(2, 16), torch.randn(2, 16))
    (first,) = torch.autograd.grad(
        training.swiglu(gate, up).square().sum(), gate, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
