"""Compare GGUF files of a checkpoint with the checkpoint, computed by llama.cpp's own build.

Needs llama-cpp-python, which compiles llama.cpp. Its CPU kernels round activations to 8 bits or
float16, and its GELU is tanh's by a table; so weights of 16 bits agree closely, not to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..chat import locate
from ..compose.gguf_files import DECODER, MMPROJ
from ..errors import CheckpointError, Unsupported
from ..processing import Processor
from ..prompt import Prompt
from . import candidate
from .parity import conversations, kl_divergence, matching_prefix

CONTEXT = 8192
_kept: list[Any] = []  # callbacks that the library calls for as long as the process lives
DIVERGENCE = 0.01
"""Nats that the distribution of the first token may differ by, also with 8-bit weights."""


@dataclass(frozen=True, slots=True)
class GgufCase:
    """A prompt on both sides.

    same_ids: whether llama.cpp splits its text into the same tokens. cosine: the smallest of an
    image's features, given the same pixels; None without images. divergence: of the distribution
    of the first token, in nats. own_divergence: the same where llama.cpp prepares the images
    itself, which fits them into a square with black bars. matching: greedy tokens that agree from
    the first on, of `compared`.
    """

    name: str
    same_ids: bool
    cosine: float | None
    divergence: float
    own_divergence: float | None
    matching: int
    compared: int

    @property
    def passed(self) -> bool:
        """Whether ids are the same and the first token's distribution is within `DIVERGENCE`."""
        return self.same_ids and self.divergence < DIVERGENCE


def verify_gguf(
    folder: Path, against: str | None, revision: str | None = None, tokens: int = 32
) -> list[GgufCase]:
    """The comparisons of a folder of `llava convert --layout gguf` with the checkpoint `against`,
    in float32.
    """
    source = locate(against, revision)
    processor = Processor.from_folder(source)
    ours = candidate.load(source, processor)
    theirs = LlamaCpp(folder)
    cases = []
    for name, messages in conversations().items():
        prompt = processor.prompt(messages)
        images = [
            part["image"]
            for message in messages
            for part in message["content"]
            if part["type"] == "image"
        ]
        cases.append(compare(name, prompt, images, ours, theirs, processor, tokens))
    return cases


def compare(
    name: str,
    prompt: Prompt,
    images: Sequence[Image.Image],
    ours: candidate.Candidate,
    theirs: LlamaCpp,
    processor: Processor,
    tokens: int,
) -> GgufCase:
    """One prompt. images: as they were given, before the processor."""
    size, model = processor.tokenizer.size, ours.engine.model
    expected = ours.logits(prompt)[-1, :size]
    crops = [media.crops[0].numpy() for media in prompt.media]
    cosines = []
    for media, crop in zip(prompt.media, crops, strict=True):
        with torch.inference_mode():
            features = model.encode(media.pixels).flatten(0, -2)
        found = theirs.features(crop)
        cosines.append(float(torch.cosine_similarity(features, found, dim=-1).min()))
    own = [np.asarray(image.convert("RGB")) for image in images]
    written = theirs.greedy(prompt, crops, tokens)
    return GgufCase(
        name,
        all(
            theirs.tokenize(processor.tokenizer.decode(part, skip_special=False)) == list(part)
            for part in _text_parts(prompt)
        ),
        min(cosines, default=None),
        kl_divergence(theirs.logits(prompt, crops)[:size], expected),
        kl_divergence(theirs.logits(prompt, own)[:size], expected) if own else None,
        matching_prefix(ours.greedy(prompt, tokens), written),
        tokens,
    )


def _text_parts(prompt: Prompt) -> list[list[int]]:
    """The tokens before, between and behind the images."""
    ends = [0, *(media.start + media.layout.length for media in prompt.media)]
    starts = [*(media.start for media in prompt.media), len(prompt)]
    return [prompt.tokens[end:start] for end, start in zip(ends, starts, strict=True)]


class LlamaCpp:
    """llama.cpp with a folder of `llava convert --layout gguf`, one sequence, on the CPU.

    Raises `Unsupported` without llama-cpp-python, and `CheckpointError` for files that llama.cpp
    does not read.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import llama_cpp
            from llama_cpp import mtmd_cpp
        except ImportError as error:
            raise Unsupported(
                "comparing GGUF files needs llama.cpp: pip install llama-cpp-python"
            ) from error
        self.llama: Any = llama_cpp
        self.mtmd: Any = mtmd_cpp
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        _kept.append(silent)
        for log_set in (
            llama_cpp.llama_log_set,
            mtmd_cpp._libmtmd.mtmd_log_set,
            mtmd_cpp._libmtmd.mtmd_helper_log_set,
        ):
            log_set(silent, ctypes.c_void_p())
        threads = torch.get_num_threads()
        settings = llama_cpp.llama_model_default_params()
        # 0.3.36 crashes with weights that are repacked for AMX
        settings.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(folder / DECODER).encode(), settings)
        if not self.model:
            raise CheckpointError(f"llama.cpp cannot read {folder / DECODER}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = min(CONTEXT, llama_cpp.llama_model_n_ctx_train(self.model))
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.n_threads, vision.use_gpu, vision.print_timings = threads, False, False
        self.tower = mtmd_cpp.mtmd_init_from_file(str(folder / MMPROJ).encode(), self.model, vision)
        if not self.tower:
            raise CheckpointError(f"llama.cpp cannot read {folder / MMPROJ}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.batch_size = int(params.n_batch)

    def tokenize(self, text: str) -> list[int]:
        """Its ids of a text, in which control tokens count."""
        data = text.encode()
        ids = (self.llama.llama_token * (len(data) + 8))()
        count = self.llama.llama_tokenize(
            self.vocabulary, data, len(data), ids, len(ids), False, True
        )
        return list(ids[:count])

    def features(self, pixels: np.ndarray[Any, Any]) -> Tensor:
        """Features `[tokens, D]` behind the projector, of an image `[H, W, 3]` of bytes."""
        chunks, chunk = self._image(pixels)
        try:
            return self._encode(chunk)
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)

    def logits(self, prompt: Prompt, images: Sequence[np.ndarray[Any, Any]]) -> Tensor:
        """Logits `[vocabulary]` of the token behind a prompt, with these images."""
        self._read(prompt, images)
        return self._last_logits()

    def greedy(
        self, prompt: Prompt, images: Sequence[np.ndarray[Any, Any]], tokens: int
    ) -> list[int]:
        """The most probable continuation; it does not stop at the end of the turn."""
        length = self._read(prompt, images)
        written: list[int] = []
        while True:
            written.append(int(self._last_logits().argmax()))
            if len(written) == tokens:
                return written
            length = self._decode([written[-1]], length)

    def _image(self, pixels: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """All chunks, to be freed, and the one of the image."""
        mtmd, data = self.mtmd, np.ascontiguousarray(pixels).tobytes()
        height, width, _ = pixels.shape
        bitmap = mtmd.mtmd_bitmap_init(
            width, height, (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        )
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (ctypes.c_void_p * 1)(bitmap)
        self._check(mtmd.mtmd_tokenize(self.tower, chunks, ctypes.byref(text), bitmaps, 1))
        mtmd.mtmd_bitmap_free(bitmap)
        found = [
            chunk
            for index in range(mtmd.mtmd_input_chunks_size(chunks))
            if mtmd.mtmd_input_chunk_get_type(chunk := mtmd.mtmd_input_chunks_get(chunks, index))
            != mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT
        ]
        return chunks, found[0]

    def _encode(self, chunk: Any) -> Tensor:
        self._check(self.mtmd.mtmd_encode_chunk(self.tower, chunk))
        rows = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        values = self.mtmd.mtmd_get_output_embd(self.tower)
        array = np.ctypeslib.as_array(values, (rows, self.width))
        return torch.from_numpy(array.copy())

    def _read(self, prompt: Prompt, images: Sequence[np.ndarray[Any, Any]]) -> int:
        """Compute a prompt from nothing; -> its length there."""
        memory = self.llama.llama_get_memory(self.context)
        self.llama.llama_memory_clear(memory, True)
        length = 0
        for number, part in enumerate(_text_parts(prompt)):
            if number:
                length = self._read_image(images[number - 1], length)
            length = self._decode(part, length) if part else length
        return length

    def _read_image(self, pixels: np.ndarray[Any, Any], at: int) -> int:
        chunks, chunk = self._image(pixels)
        try:
            self._encode(chunk)
            after = ctypes.c_int32()
            self._check(
                self.mtmd.mtmd_helper_decode_image_chunk(
                    self.tower,
                    self.context,
                    chunk,
                    self.mtmd.mtmd_get_output_embd(self.tower),
                    at,
                    0,
                    self.batch_size,
                    ctypes.byref(after),
                    self.mtmd.mtmd_helper_post_decode_callback(),
                    None,
                )
            )
            return after.value
        finally:
            self.mtmd.mtmd_input_chunks_free(chunks)

    def _decode(self, tokens: Sequence[int], at: int) -> int:
        batch = self.llama.llama_batch_init(len(tokens), 0, 1)
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row] = token, at + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = row + 1 == len(tokens)
        batch.n_tokens = len(tokens)
        self._check(self.llama.llama_decode(self.context, batch))
        self.llama.llama_batch_free(batch)
        return at + len(tokens)

    def _last_logits(self) -> Tensor:
        row = self.llama.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(row, (self.size,)).copy())

    def _check(self, status: int) -> None:
        if status:
            raise CheckpointError(f"llama.cpp failed with status {status}")
