"""Write a checkpoint as llama.cpp reads it. Runs where gguf and llama-cpp-python are installed.

python bench/make_gguf.py FOLDER OUT q4_0

OUT/decoder.gguf is q4_0 or q8_0: matrices by the gguf package, tensor by tensor, so that 7B needs
8 GB; the output head by llama.cpp, as it chooses. OUT/tower.gguf is the tower with the projector,
in bfloat16. The folder is one of bench/make_checkpoint.py.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf.utility import SafetensorsLocal

Kind = gguf.GGMLQuantizationType
TYPES = {
    "q4_0": (Kind.Q4_0, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0),
    "q8_0": (Kind.Q8_0, llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
}

Tensors = Iterator[tuple[str, np.ndarray]]


def tensors(folder: Path) -> Tensors:
    """All tensors in float32 by their names, which are the hub's; linears of the projector count
    from 0.
    """
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in SafetensorsLocal(path).tensors.items():
            raw = tensor.mmap_bytes().reshape(*tensor.shape[:-1], -1)
            spelt = name.removeprefix("language_model.").replace("linear_1", "linear_0")
            yield spelt, gguf.dequantize(raw, gguf.GGMLQuantizationType[tensor.dtype])


def add(
    writer: gguf.GGUFWriter,
    found: Tensors,
    names: gguf.TensorNameMap,
    matrix: gguf.GGMLQuantizationType = Kind.BF16,
    head: str = "",
) -> None:
    """Those that `names` knows: matrices as `matrix`, of these `head` in bfloat16; biases, norms,
    positions and patches in float32, as llama.cpp has them.
    """
    for name, values in found:
        spelt = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if (
            spelt and "post_ln" not in spelt
        ):  # the norm after the last layer; features are taken before it
            kind = matrix if values.ndim == 2 and "position" not in name else Kind.F32
            kind = Kind.BF16 if spelt == head else kind
            writer.add_tensor(spelt, gguf.quantize(values, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    pieces = {
        number: (piece, gguf.TokenType.NORMAL) for piece, number in spec["model"]["vocab"].items()
    }
    pieces |= {one["id"]: (one["content"], gguf.TokenType.CONTROL) for one in spec["added_tokens"]}
    rows = [pieces.get(number, (f"[PAD{number}]", gguf.TokenType.UNUSED)) for number in range(size)]
    merges = [one if isinstance(one, str) else " ".join(one) for one in spec["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([piece for piece, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_token_merges(
        merges or ["Ġ1000 Ġ1001"]
    )  # llama.cpp wants some; this one never applies
    writer.add_eos_token_id(
        next(number for number, (piece, _) in pieces.items() if piece == "<|im_end|>")
    )
    writer.add_add_bos_token(False)


def decoder(folder: Path, out: Path, c: dict[str, Any], kind: str) -> None:
    (matrix, file_type), whole = TYPES[kind], out.with_suffix(".part")
    writer = gguf.GGUFWriter(whole, "qwen2")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    vocabulary(writer, folder, c["vocab_size"])
    add(
        writer,
        tensors(folder),
        gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, c["num_hidden_layers"]),
        matrix,
        "token_embd.weight" if c["tie_word_embeddings"] else "output.weight",
    )
    finish(writer)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = file_type
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(out).encode(), settings) == 0
    whole.unlink()


def tower(folder: Path, out: Path, c: dict[str, Any], width: int) -> None:
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    writer = gguf.GGUFWriter(out, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(c["image_size"])
    writer.add_vision_patch_size(c["patch_size"])
    writer.add_vision_embedding_length(c["hidden_size"])
    writer.add_vision_feed_forward_length(c["intermediate_size"])
    writer.add_vision_block_count(c["num_hidden_layers"])
    writer.add_vision_head_count(c["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(c["layer_norm_eps"])
    writer.add_vision_image_mean(pixels["image_mean"])
    writer.add_vision_image_std(pixels["image_std"])
    writer.add_vision_use_gelu(True)
    writer.add_array(
        "clip.vision.feature_layer", [c["num_hidden_layers"]]
    )  # without it the last layer is left out
    add(
        writer,
        tensors(folder),
        gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, c["num_hidden_layers"]),
    )
    finish(writer)


def main() -> None:
    folder, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    part = out.with_name(f"{out.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    decoder(folder, part / "decoder.gguf", config["text_config"], kind)
    tower(
        folder, part / "tower.gguf", config["vision_config"], config["text_config"]["hidden_size"]
    )
    shutil.copy(folder / "preprocessor_config.json", part)
    part.rename(out)


if __name__ == "__main__":
    main()
