"""One system as a process: JSON lines in, JSON lines out. `bench/peers.py` starts it and measures.

    python bench/systems.py llava FOLDER int4 [kv8]
    python bench/systems.py transformers FOLDER bfloat16
    python bench/systems.py openvino EXPORTED int4
    python bench/systems.py llamacpp CONVERTED q4_0 [CONTEXT] [no-amx]
    python bench/systems.py vllm FOLDER bfloat16 [CONTEXT] [eager]

The first output line comes after loading and has the bytes read per token: `weights`, and `kv` for
each token before it. In: {"chats": [messages, ...], "tokens": N}; one batch, N tokens each. Out:
seconds to the `first` token and in `total`, of these in the tower (`vision`) and from there to the
first token (`prefill`; both null where unknown), `prompt` in tokens, and the ids `written`; of
several chats those of the first one.
"""

import ctypes
import hashlib
import json
import math
import os
import struct
import sys
import time
from itertools import count, takewhile
from pathlib import Path
from typing import Any

Chats = list[list[dict[str, Any]]]


class Llava:
    """This package, optionally with an int8 KV cache, and the checkpoint's chat template."""

    def __init__(self, folder: str, precision: str, kv: str = "") -> None:
        from llava_interleave.chat import Options, load
        from llava_interleave.flops import decoder_bytes

        self.bot = load(folder, precision=precision, kv_precision="int8" if kv == "kv8" else "auto")
        self.options = Options(
            preset="hf", ignore_eos=True, prompt_lookup_num_tokens=0
        )  # random weights repeat tokens
        self.about = {
            "weights": decoder_bytes(self.bot.model),
            "kv": self.bot.engine.bytes_per_token,
        }

    def answer(self, chats: Chats, tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        one = self.bot.batch(chats, self.options, max_new_tokens=tokens)[0]
        total, took = time.perf_counter() - began, one.timings
        return {
            "first": total - ((took.total or 0) - (took.first_token or 0)),
            "total": total,
            "vision": took.vision,
            "prefill": took.prefill,
            "prompt": one.usage.prompt,
            "written": one.tokens,
        }


class Transformers:
    """transformers, several questions as a left-padded batch."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        if self.model.config.model_type == "llava_onevision":  # transformers' needs torchvision
            from llava_interleave.hf.processor import AutoProcessor

            self.processor: Any = AutoProcessor.from_pretrained(folder)
        else:
            self.processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        self.processor.tokenizer.padding_side = "left"
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = self.processor.tokenizer.pad_token_id
        self.vision: list[float] = []
        tower, projector = self.model.model.vision_tower, self.model.model.multi_modal_projector
        tower.register_forward_pre_hook(lambda *_: self.vision.append(time.perf_counter()))
        projector.register_forward_hook(lambda *_: self.vision.append(time.perf_counter()))
        decoder = self.model.model.language_model
        parts = [
            *decoder.layers.parameters(),
            *decoder.norm.parameters(),
            *self.model.lm_head.parameters(),
        ]
        c = decoder.config
        width = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
        kv = 2 * c.num_hidden_layers * width * parts[0].element_size()
        self.about = {"weights": sum(p.nbytes for p in parts), "kv": kv}

    def answer(self, chats: Chats, tokens: int) -> dict[str, Any]:
        import torch

        began, times = time.perf_counter(), []
        self.vision.clear()

        def clock(ids: torch.Tensor, _: object, **__: object) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(self.model.dtype)
        with torch.inference_mode():
            made = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, stopping_criteria=[clock]
            )
        total, prompt = time.perf_counter() - began, inputs["input_ids"].shape[1]
        return {
            "first": times[0] - began,
            "total": total,
            "vision": sum(b - a for a, b in zip(self.vision[::2], self.vision[1::2], strict=True)),
            "prefill": times[0] - self.vision[-1],
            "prompt": prompt,
            "written": made[0, prompt:].tolist(),
        }


class OpenVino:
    """OpenVINO GenAI with a folder from optimum-intel: continuous batching with prefix caching."""

    def __init__(self, folder: str, _: str) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.cache_size = True, 2  # GB
        self.pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
        self.genai, self.tokenizer = genai, self.pipe.get_tokenizer()
        text = json.loads((Path(folder) / "config.json").read_text())["text_config"]
        width = (
            text["hidden_size"] // text["num_attention_heads"] + 8
        )  # bytes of a token: 8 bits, scale, zero
        kv = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * width
        self.about = {
            "weights": (Path(folder) / "openvino_language_model.bin").stat().st_size,
            "kv": kv,
        }

    def answer(self, chats: Chats, tokens: int) -> dict[str, Any]:
        import numpy as np
        import openvino
        from PIL import Image

        began = time.perf_counter()
        prompts, images = [], []
        for chat in chats:
            images.append(
                [
                    openvino.Tensor(np.asarray(Image.open(path).convert("RGB"))[None])
                    for path in paths(chat)
                ]
            )
            prompts.append(spelt(chat, "<ov_genai_image_{}>"))
        settings = self.genai.GenerationConfig(
            do_sample=False, ignore_eos=True, apply_chat_template=False, max_new_tokens=tokens
        )
        made = self.pipe.generate(prompts, images=images, generation_config=[settings] * len(chats))
        total, metrics = time.perf_counter() - began, made[0].perf_metrics
        return {
            "first": metrics.get_ttft().mean / 1000,
            "total": total,
            "vision": None,
            "prefill": None,
            "prompt": metrics.get_num_input_tokens(),
            "written": self.tokenizer.encode(made[0].texts[0]).input_ids.data[0].tolist(),
        }


class LlamaCpp:
    """llama.cpp with a folder of bench/make_gguf.py, used as its own server uses it: a sequence
    keeps what the next chat has in common with the one before, images included; several prompts are
    read one after another, their answers written together. no-amx: without AMX, with which 0.3.36
    ended with a segmentation fault on a Xeon; weights are repacked for AVX-512 then, its default.
    """

    SEQUENCES = 8

    def __init__(self, folder: str, _: str, context: str = "8192", amx: str = "") -> None:
        if amx == "no-amx":
            refuse_amx()
        import llama_cpp as llama
        from llama_cpp import mtmd_cpp as mtmd

        self.llama, self.mtmd = llama, mtmd
        self.max_tokens = int(context)  # of all sequences
        if sys.platform == "linux":
            threads = len(os.sched_getaffinity(0))
        else:
            threads = os.cpu_count() or 1
        weights = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(f"{folder}/decoder.gguf".encode(), weights)
        settings = llama.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx, settings.n_batch = (
            self.SEQUENCES,
            self.max_tokens,
            self.max_tokens,
        )
        settings.kv_unified = True  # one may have them all
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, settings)
        vision = mtmd.mtmd_context_params_default()
        vision.n_threads, vision.use_gpu = threads, False
        self.tower = mtmd.mtmd_init_from_file(f"{folder}/tower.gguf".encode(), self.model, vision)
        self.size = json.loads((Path(folder) / "preprocessor_config.json").read_text())["size"]
        self.batch = llama.llama_batch_init(self.max_tokens, 0, 1)
        self.held: list[list[Any]] = [[] for _ in range(self.SEQUENCES)]
        """By sequence a key for each of its tokens: the token's id, or the digest of the image
        that it is part of.
        """
        width = llama.llama_model_n_embd(self.model) // llama.llama_model_n_head(self.model)
        kv = (
            2
            * llama.llama_model_n_layer(self.model)
            * llama.llama_model_n_head_kv(self.model)
            * width
            * 2
        )  # float16
        self.about = {"weights": llama.llama_model_size(self.model), "kv": kv}

    def answer(self, chats: Chats, tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        prompts = [self.prompt(chat) for chat in chats]
        keys = [[key for _, part in pieces for key in part] for _, pieces in prompts]
        for sequence in range(self.SEQUENCES):
            self.keep(sequence, keys[sequence][:-1] if sequence < len(chats) else [])
        start, latest, firsts = time.perf_counter(), [], []
        for sequence, (_, pieces) in enumerate(prompts):
            vision = self.read(sequence, pieces)
            latest.append(self.likeliest(-1))
            firsts.append((time.perf_counter(), vision))
        written = [latest]
        for _ in range(tokens - 1):
            self.decode(list(zip(range(len(chats)), written[-1], strict=True)))
            written.append([self.likeliest(row) for row in range(len(chats))])
        total = time.perf_counter() - began
        for chunks, _ in prompts:
            self.mtmd.mtmd_input_chunks_free(chunks)
        first, vision = firsts[0]
        return {
            "first": first - began,
            "total": total,
            "vision": vision,
            "prefill": first - start - vision,
            "prompt": len(keys[0]),
            "written": [one[0] for one in written],
        }

    def prompt(self, chat: list[dict[str, Any]]) -> tuple[int, list[tuple[int, list[Any]]]]:
        """Its chunks as llama.cpp cuts it up, to be freed; and each with a key for each of its
        tokens.
        """
        mtmd, text = self.mtmd, spelt(chat, self.mtmd.mtmd_default_marker().decode()).encode()
        chunks, bitmaps = mtmd.mtmd_input_chunks_init(), [self.bitmap(path) for path in paths(chat)]
        given = (
            mtmd.mtmd_input_text(text, len(text), False, True),
            (ctypes.c_void_p * len(bitmaps))(*bitmaps),
        )
        self.check(
            mtmd.mtmd_tokenize(self.tower, chunks, ctypes.byref(given[0]), given[1], len(bitmaps))
        )
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        pieces = [
            mtmd.mtmd_input_chunks_get(chunks, index)
            for index in range(mtmd.mtmd_input_chunks_size(chunks))
        ]
        return chunks, [(piece, self.keys(piece)) for piece in pieces]

    def bitmap(self, path: str) -> int:
        """An image squashed to the tower's size, as the checkpoint's processor does it; llama.cpp
        would pad it to a square.
        """
        from PIL import Image

        image = (
            Image.open(path)
            .convert("RGB")
            .resize((self.size["width"], self.size["height"]), Image.Resampling.BICUBIC)
        )
        pixels = image.tobytes()
        bitmap = self.mtmd.mtmd_bitmap_init(
            *image.size, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        )
        self.mtmd.mtmd_bitmap_set_id(bitmap, hashlib.sha256(pixels).hexdigest().encode())
        return bitmap

    def keys(self, piece: int) -> list[Any]:
        tokens = ctypes.c_size_t(self.mtmd.mtmd_input_chunk_get_n_tokens(piece))
        if self.is_text(piece):
            return self.mtmd.mtmd_input_chunk_get_tokens_text(piece, ctypes.byref(tokens))[
                : tokens.value
            ]
        return [self.mtmd.mtmd_input_chunk_get_id(piece)] * tokens.value

    def is_text(self, piece: int) -> bool:
        return self.mtmd.mtmd_input_chunk_get_type(piece) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT

    def keep(self, sequence: int, keys: list[Any]) -> None:
        """Forget what a sequence holds from where it differs from these."""
        held = self.held[sequence]
        del held[
            sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, keys, strict=False))
            ) :
        ]
        self.llama.llama_memory_seq_rm(
            self.llama.llama_get_memory(self.context), sequence, len(held), -1
        )

    def read(self, sequence: int, pieces: list[tuple[int, list[Any]]]) -> float:
        """Compute what a sequence does not hold of a prompt; -> seconds in the tower."""
        held, mtmd, at, vision = self.held[sequence], self.mtmd, 0, 0.0
        for piece, keys in pieces:
            new = keys[max(len(held) - at, 0) :]
            at += len(keys)
            if new and self.is_text(piece):
                self.decode([(sequence, token) for token in new])
            elif new:
                began = time.perf_counter()
                self.check(mtmd.mtmd_encode_chunk(self.tower, piece))
                vision += time.perf_counter() - began
                given = (
                    piece,
                    mtmd.mtmd_get_output_embd(self.tower),
                    len(held),
                    sequence,
                    self.max_tokens,
                )
                after, none = (
                    ctypes.byref(ctypes.c_int32()),
                    mtmd.mtmd_helper_post_decode_callback(),
                )
                self.check(
                    mtmd.mtmd_helper_decode_image_chunk(
                        self.tower, self.context, *given, after, none, None
                    )
                )
                held += new
        return vision

    def decode(self, tokens: list[tuple[int, int]]) -> None:
        """Compute (sequence, token) pairs, sequence by sequence; the last of each tells what comes
        next.
        """
        batch = self.batch
        for row, (sequence, token) in enumerate(tokens):
            batch.token[row], batch.pos[row] = token, len(self.held[sequence])
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = row + 1 == len(tokens) or tokens[row + 1][0] != sequence
            self.held[sequence].append(token)
        batch.n_tokens = len(tokens)
        self.check(self.llama.llama_decode(self.context, batch))

    def likeliest(self, row: int) -> int:
        import numpy as np

        size = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(self.model))
        return int(
            np.ctypeslib.as_array(
                self.llama.llama_get_logits_ith(self.context, row), (size,)
            ).argmax()
        )

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"llama.cpp answered {status}")


def refuse_amx() -> None:
    """Have the kernel refuse tiles to this process by a seccomp filter (Linux, x86-64):
    `arch_prctl(ARCH_REQ_XCOMP_PERM)` fails, and libraries that ask take their other code.
    """
    arch_prctl, request, load, jump_if, answer = 158, 0x1023, 0x20, 0x15, 0x06
    allow, errno = 0x7FFF0000, 0x00050001
    steps = (
        (load, 0, 0, 0),  # the number of the system call
        (jump_if, 0, 3, arch_prctl),
        (load, 0, 0, 16),  # its first argument
        (jump_if, 0, 1, request),
        (answer, 0, 0, errno),
        (answer, 0, 0, allow),
    )
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    for option in ((38, 1, 0, 0, 0), (22, 2, program, 0, 0)):  # PR_SET_NO_NEW_PRIVS, _SECCOMP
        if libc.prctl(*option):
            raise OSError(ctypes.get_errno(), "prctl")


class Vllm:
    """vLLM's CPU build with a checkpoint's folder, in this process, as several would share the
    cores: its continuous batching, which finds prefixes again in whole blocks. eager: without
    torch.compile. The largest image and video are not tried at the start, which takes minutes.
    """

    def __init__(self, folder: str, dtype: str, context: str = "8192", eager: str = "") -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}  # GB
        os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
        import vllm
        from safetensors import safe_open

        config = json.loads((Path(folder) / "config.json").read_text())
        video = {"video": 1} if "video_token_index" in config else {}
        llm = vllm.LLM(
            folder,
            dtype=dtype,
            enable_prefix_caching=True,
            enforce_eager=eager == "eager",
            max_model_len=int(context),
            max_num_seqs=8,
            limit_mm_per_prompt={"image": 8, **video},
            skip_mm_profiling=True,
        )
        self.engine, self.settings, self.asked = llm.llm_engine, vllm.SamplingParams, count()
        files = [safe_open(path, "pt") for path in Path(folder).glob("*.safetensors")]
        sizes = {
            name: math.prod(file.get_slice(name).get_shape())
            for file in files
            for name in file.offset_keys()
        }
        decoder = {
            name.partition("language_model.")[2]: size
            for name, size in sizes.items()
            if "language_model." in name
        }
        if "lm_head.weight" in decoder:
            del decoder["model.embed_tokens.weight"]
        text = llm.model_config.hf_text_config
        width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
        self.about = {
            "weights": 2 * sum(decoder.values()),
            "kv": 2 * 2 * text.num_hidden_layers * width,
        }  # bfloat16

    def answer(self, chats: Chats, tokens: int) -> dict[str, Any]:
        from PIL import Image

        began, first, latest = time.perf_counter(), 0.0, None
        settings, ids = self.settings(temperature=0, max_tokens=tokens, ignore_eos=True), []
        for chat, number in zip(chats, self.asked, strict=False):
            images = [Image.open(path).convert("RGB") for path in paths(chat)]
            videos = [frames(path) for path in paths(chat, "video")]
            media = {"image": images} if images else {"video": videos}
            ids.append(str(number))
            tag = "<image>" if images else "<video>"
            given = {"prompt": spelt(chat, tag), "multi_modal_data": media}
            self.engine.add_request(ids[-1], given, settings)
        while self.engine.has_unfinished_requests():
            latest = next((one for one in self.engine.step() if one.request_id == ids[0]), latest)
            first = first or (latest is not None and time.perf_counter() - began)
        assert latest
        return {
            "first": first,
            "total": time.perf_counter() - began,
            "vision": None,
            "prefill": None,
            "prompt": len(latest.prompt_token_ids),
            "written": list(latest.outputs[0].token_ids),
        }


def spelt(chat: list[dict[str, Any]], tag: str) -> str:
    """A chat as the checkpoint's template lays it out, with tags where media are; {} in a tag is
    the number of the image or video.
    """
    text, images = "", count()
    for turn in chat:
        tags = "".join(
            tag.format(next(images)) for part in turn["content"] if part["type"] != "text"
        )
        words = "".join(f"\n{part['text']}" for part in turn["content"] if part["type"] == "text")
        text += f"<|im_start|>{turn['role']}\n{tags}{words}<|im_end|>\n"
    return f"{text}<|im_start|>assistant\n"


def paths(chat: list[dict[str, Any]], kind: str = "image") -> list[str]:
    return [part["path"] for turn in chat for part in turn["content"] if part["type"] == kind]


def frames(path: str) -> Any:
    """All frames of a video, (frames, height, width, 3)."""
    import cv2
    import numpy as np

    video, found = cv2.VideoCapture(path), []
    while (frame := video.read()[1]) is not None:
        found.append(frame[..., ::-1])  # BGR
    return np.stack(found)


SYSTEMS = {
    "llava": Llava,
    "transformers": Transformers,
    "openvino": OpenVino,
    "llamacpp": LlamaCpp,
    "vllm": Vllm,
}


def main() -> None:
    del sys.path[0]  # this folder: its kernels.py would shadow the package `kernels`
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    name, *how = sys.argv[1:]
    system = SYSTEMS[name](*how)
    print(json.dumps(system.about), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(system.answer(**json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
