"""One system as a process that answers: JSON lines in, JSON lines out. `bench/peers.py` starts it and takes the times.

    python bench/systems.py llava FOLDER int4
    python bench/systems.py transformers FOLDER bfloat16
    python bench/systems.py openvino EXPORTED int4

The first line out tells that it is loaded, and how many bytes a token reads: `weights`, and `kv` for each token before it.
In: {"chats": [messages, ...], "tokens": N}; all are answered together, with N tokens each. Out: seconds to the `first` token and
in `total`, of them in the tower (`vision`) and from there to the first token (`prefill`; both null where unknown), `prompt` in
tokens, and the ids `written`; of several chats those of the first one.
"""

import json
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

Chats = list[list[dict[str, Any]]]


class Llava:
    """This package. A question is laid out as the checkpoint's own template does, as transformers does it."""

    def __init__(self, folder: str, precision: str) -> None:
        from llava_interleave.chatbot import Options, load
        from llava_interleave.model.work import decoder_bytes

        self.bot, self.options = load(folder, precision=precision), Options(preset="hf", ignore_eos=True)
        self.about = {"weights": decoder_bytes(self.bot.model), "kv": self.bot.engine.bytes_per_token}

    def answer(self, chats: Chats, tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        one = self.bot.batch(chats, self.options, max_new_tokens=tokens)[0]
        total, took = time.perf_counter() - began, one.timings
        return {
            "first": total - (took.total - took.first_token),
            "total": total,
            "vision": took.vision,
            "prefill": took.prefill,
            "prompt": one.usage.prompt,
            "written": one.tokens,
        }


class Transformers:
    """transformers, several questions as a batch padded on the left."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
        self.processor.tokenizer.padding_side = "left"
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = self.processor.tokenizer.pad_token_id
        self.vision: list[float] = []
        tower, projector = self.model.model.vision_tower, self.model.model.multi_modal_projector
        tower.register_forward_pre_hook(lambda *_: self.vision.append(time.perf_counter()))
        projector.register_forward_hook(lambda *_: self.vision.append(time.perf_counter()))
        decoder = self.model.model.language_model
        parts = [*decoder.layers.parameters(), *decoder.norm.parameters(), *self.model.lm_head.parameters()]
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
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        ).to(self.model.dtype)
        with torch.inference_mode():
            made = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, stopping_criteria=[clock])
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
    """OpenVINO GenAI with a folder that optimum-intel exported: its continuous batching, which finds prefixes again."""

    def __init__(self, folder: str, _: str) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.cache_size = True, 2  # GB
        self.pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
        self.genai, self.tokenizer = genai, self.pipe.get_tokenizer()
        text = json.loads((Path(folder) / "config.json").read_text())["text_config"]
        width = text["hidden_size"] // text["num_attention_heads"] + 8  # bytes of a token: 8 bits, scale, zero
        kv = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * width
        self.about = {"weights": (Path(folder) / "openvino_language_model.bin").stat().st_size, "kv": kv}

    def answer(self, chats: Chats, tokens: int) -> dict[str, Any]:
        import numpy as np
        import openvino
        from PIL import Image

        began = time.perf_counter()
        prompts, pictures = [], []
        for chat in chats:
            paths = [part["path"] for turn in chat for part in turn["content"] if part["type"] == "image"]
            pictures.append([openvino.Tensor(np.asarray(Image.open(path).convert("RGB"))[None]) for path in paths])
            prompts.append(spelt(chat))
        settings = self.genai.GenerationConfig(do_sample=False, ignore_eos=True, apply_chat_template=False, max_new_tokens=tokens)
        made = self.pipe.generate(prompts, images=pictures, generation_config=[settings] * len(chats))
        total, metrics = time.perf_counter() - began, made[0].perf_metrics
        return {
            "first": metrics.get_ttft().mean / 1000,
            "total": total,
            "vision": None,
            "prefill": None,
            "prompt": metrics.get_num_input_tokens(),
            "written": self.tokenizer.encode(made[0].texts[0]).input_ids.data[0].tolist(),
        }


def spelt(chat: list[dict[str, Any]]) -> str:
    """A chat as the checkpoint's template lays it out, with numbered tags where images are, as OpenVINO GenAI takes it."""
    text, images = "", count()
    for turn in chat:
        tags = "".join(f"<ov_genai_image_{next(images)}>" for part in turn["content"] if part["type"] == "image")
        words = "".join(f"\n{part['text']}" for part in turn["content"] if part["type"] == "text")
        text += f"<|im_start|>{turn['role']}\n{tags}{words}<|im_end|>\n"
    return f"{text}<|im_start|>assistant\n"


SYSTEMS = {"llava": Llava, "transformers": Transformers, "openvino": OpenVino}


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    name, folder, precision = sys.argv[1:]
    system = SYSTEMS[name](folder, precision)
    print(json.dumps(system.about), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(system.answer(**json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
