"""What is asked of PyTorch's operators on a GPU, without one: their own rules for shapes, types and
devices, by tensors that hold no numbers. It takes a PyTorch that was built for CUDA; a card may be
there or not.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_interleave.checkpoints import meta_network
from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.engine.cuda_graphs import CudaGraphDecoder
from llava_interleave.engine.kv_contiguous import Span
from llava_interleave.engine.kv_paged import PagedKVCache, bytes_per_token
from llava_interleave.engine.prefix_cache import CacheKey, SequenceKV
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.quantization.replace import pack_for_cuda, replace_linears

BUILT = torch.version.cuda is not None
pytestmark = pytest.mark.skipif(
    not BUILT, reason=f"this PyTorch ({torch.__version__}) was not built for CUDA"
)

TEXT = TextConfig(256, 512, 2, 4, 2, 64, 1024, 4096, 1e6, 1e-6, True)
CONFIG = LlavaConfig(VisionConfig(128, 256, 2, 4, 56, 14), TEXT, image_token_id=1023)
CARD, BF16 = torch.device("cuda", 0), torch.bfloat16


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that supports everything; values are not checked."""
    monkeypatch.setattr("llava_interleave.engine.kv_paged.choose", lambda *_: "varlen_attn")
    monkeypatch.setattr("llava_interleave.model.attention.choose", lambda *_: "varlen_attn")
    monkeypatch.setattr(torch, "equal", lambda *_: True)
    with FakeTensorMode():
        yield


def network(precision: str, *, trained: bool = False) -> Llava:
    made = meta_network(CONFIG)
    if precision != "bfloat16":
        replace_linears(made, precision)
    for module in made.modules():
        for name, old in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(
                torch.empty(old.shape, dtype=BF16, device=CARD), requires_grad=trained
            )
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CARD)
    if precision in ("int4", "int8"):
        pack_for_cuda(made)
    return made.eval()


def memory(*, int8: bool = False) -> PagedKVCache:
    room = 20 * 256 * bytes_per_token(TEXT, BF16, int8=int8)
    return PagedKVCache(TEXT, BF16, CARD, room, int8=int8)


def sequence(*blocks: int) -> SequenceKV:
    made = SequenceKV(CacheKey.of([]), 0, 256 * len(blocks))
    made.blocks = list(blocks)
    return made


@pytest.mark.parametrize("precision", ["bfloat16", "int4", "int8", "fp8"])
@torch.no_grad()
def test_a_step_that_is_captured(precision: str) -> None:
    step = CudaGraphDecoder.__new__(CudaGraphDecoder)
    step.model, step.memory, step.vocab = network(precision), memory(), 1000
    step.inputs = torch.zeros(8, 2 + 4, dtype=torch.int32, device=CARD)
    for size in (1, 8):
        logits, best = step._step(size)
        assert (logits.shape, best.shape, logits.device, best.device) == (
            (size, 1000),
            (size,),
            CARD,
            CARD,
        )


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "int4", "int8", "fp8"])
@torch.no_grad()
def test_prompts_and_answers_in_one_step_and_images(precision: str, int8: bool) -> None:
    model, kept = network(precision), memory(int8=int8)
    a, b = sequence(0, 1, 2), sequence(3, 4, 5)
    x = model.embed(torch.zeros(301, dtype=torch.long, device=CARD))
    found = model.forward(
        x, torch.arange(301, device=CARD), kept.attend([Span(a, 0, 300), Span(b, 10, 11)])
    )
    assert (found.shape, found.device, found.dtype) == ((301, 256), CARD, BF16)
    assert model.encode(torch.zeros(3, 3, 56, 56, device=CARD, dtype=BF16)).shape == (3, 16, 256)
    kept.copy(a, b, 300)


def test_packed_sequences_in_training() -> None:
    model = network("bfloat16", trained=True)
    x = model.embed(torch.zeros(70, dtype=torch.long, device=CARD))
    found = model.logits(model.forward(x, torch.arange(70, device=CARD), PackedAttention([40, 30])))
    assert (found.shape, found.device) == ((70, 1024), CARD) and found.requires_grad
