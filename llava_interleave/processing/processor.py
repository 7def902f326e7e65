"""From messages and media to one `Prompt`: counts first, then tokens, then pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any, TypeVar

from PIL import Image

from ..config import LlavaConfig, read_json
from ..errors import CheckpointError, ContextError, OptionError, PromptError
from ..image_layout import ImageTokenLayout, TokenReduction, anyres
from ..prompt import Media, Prompt
from .chat_template import PRESETS, SYSTEM, MediaPlaceholder, Rendered, Turn, parse, render
from .images import ImageSettings
from .limits import Limits, PixelBudget
from .loader import Loader, name_of
from .tokenizer import IMAGE, Tokenizer
from .video import UNIFORM, Clip, FrameSampling

THREADS = 8
T = TypeVar("T")
DEFAULT = ...
"""The system prompt that a preset has of its own."""
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class EstimateItem:
    """A part of a prompt and how many tokens it takes; of a video the seconds of the frames that are looked at."""

    name: str
    tokens: int
    times: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a prompt will need. `dataclasses.asdict` makes it JSON.

    parts: the text, then each image, view and video.
    total: tokens of the prompt. context: tokens the network can hold. left: what remains for the answer (negative: too long).
    kv_bytes: keys and values of the prompt. feature_bytes: features of its images. weight_bytes: the network; 0 if not counted.
    """

    parts: tuple[EstimateItem, ...]
    total: int
    context: int
    left: int
    kv_bytes: int
    feature_bytes: int
    weight_bytes: int = 0

    def __str__(self) -> str:
        rows = [(part.name, f"{part.tokens:,}") for part in self.parts]
        rows += [
            ("total", f"{self.total:,}"),
            ("context", f"{self.context:,}"),
            ("left for the answer", f"{self.left:,}"),
        ]
        rows += [("KV memory", _size(self.kv_bytes)), ("image features", _size(self.feature_bytes))]
        rows += [("weights", _size(self.weight_bytes))] * bool(self.weight_bytes)
        width, number = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{name:<{width}}  {value:>{number}}" for name, value in rows)


@dataclass(frozen=True, slots=True)
class _MediaRequest:
    """One image or video to load, all questions about it answered."""

    name: str  # "image 1"
    source: object
    sampling: FrameSampling | None  # of a video; None for an image
    anyres: bool
    pad: bool
    pool: int
    share: float


class Processor:
    """Everything that turns messages into prompts for one checkpoint. Safe to share between threads.

    tokenizer, config, images (what preprocessor_config.json says), loader (with its limits), num_frames: how many frames of a
    video are looked at where nobody says it (what video_preprocessor_config.json says, else 16).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: LlavaConfig,
        images: ImageSettings,
        limits: Limits,
        num_frames: int = UNIFORM,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.images = images
        self.loader = Loader(limits)
        self.num_frames = num_frames

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: LlavaConfig | None = None, limits: Limits | None = None
    ) -> Processor:
        """Read tokenizer and preprocessing of a checkpoint folder, and its config.json if `config` is not given.

        Raises CheckpointError.
        """
        folder = Path(folder)
        config = config or LlavaConfig.from_dict(read_json(folder / "config.json"))
        tokenizer = Tokenizer.from_folder(folder, config.image_token_id)
        images = ImageSettings.from_folder(folder, config.vision.image_size)
        video = folder / "video_preprocessor_config.json"
        num_frames = read_json(video, optional=True).get("num_frames", UNIFORM)
        if type(num_frames) is not int or num_frames < 1:
            raise CheckpointError(
                f"num_frames in {video} must be a whole number from 1 on, not {num_frames!r}"
            )
        return cls(tokenizer, config, images, limits or Limits(), num_frames)

    def prompt(
        self,
        messages: Messages,
        media: Sequence[object] = (),
        *,
        preset: str = "interleave",
        system: str | EllipsisType | None = DEFAULT,
        anyres: bool = False,
        pad: bool = False,
        frames: FrameSampling = FrameSampling(),  # noqa: B008  frozen
        thin: TokenReduction = TokenReduction(),  # noqa: B008  frozen
        frame_times: bool = False,
        generation: bool = True,
        max_new_tokens: int = 0,
    ) -> Prompt:
        """The prompt of a conversation. `media` fill, in order, the image parts without a source and each `<image>` in text.

        preset: interleave, hf or official (see `chat`). system: a system prompt, None for none. A
        system message among `messages` takes its place. anyres: images (not video frames) also as tiles, of the original's
        geometry. pad: images and frames are made square with grey bars instead of squashed. frames: how videos are sampled
        that do not say it themselves. thin: how features become fewer tokens. frame_times: after a video stands when its frames
        are. generation: end with the start of the answer. max_new_tokens: room in the context that the answer needs.
        Raises PromptError, OptionError, MediaError, MediaRefused, ContextError.
        """
        turns = parse(messages, frames)
        rendering = self._rendering(turns, preset, system, generation)
        return self._prompt(
            rendering, media, anyres, pad, frames, frame_times, max_new_tokens, thin=thin
        )

    def raw(
        self,
        text: str,
        media: Sequence[object] = (),
        *,
        anyres: bool = False,
        pad: bool = False,
        frames: FrameSampling = FrameSampling(),  # noqa: B008  frozen
        max_new_tokens: int = 0,
    ) -> Prompt:
        """The prompt of a text that is already rendered, taken as it is: control tokens in it count, `<image>` are `media`."""
        tokens = self.tokenizer.encode(text)
        slots = [MediaPlaceholder() for token in tokens if token == self.tokenizer.image_id]
        rendered = Rendered(tokens, [False] * len(tokens), slots)
        return self._prompt(lambda _: rendered, media, anyres, pad, frames, False, max_new_tokens)

    def example(
        self,
        messages: Messages,
        media: Sequence[object] = (),
        *,
        preset: str = "interleave",
        system: str | EllipsisType | None = DEFAULT,
        anyres: bool = False,
        pad: bool = False,
        frames: FrameSampling = FrameSampling(),  # noqa: B008  frozen
        frame_times: bool = False,
    ) -> Prompt:
        """A finished conversation to train on: as `prompt`, with its `loss_mask`: True on answers and their ends."""
        turns = parse(messages, frames)
        if turns[-1].role != "assistant":
            raise PromptError(
                f"an example ends with an answer, this one with a message of the {turns[-1].role}"
            )
        rendering = self._rendering(turns, preset, system, generation=False)
        return self._prompt(
            rendering, media, anyres, pad, frames, frame_times, 0, with_loss_mask=True
        )

    def estimate(
        self,
        messages: Messages,
        media: Sequence[object] = (),
        *,
        preset: str = "interleave",
        system: str | EllipsisType | None = DEFAULT,
        anyres: bool = False,
        pad: bool = False,
        frames: FrameSampling = FrameSampling(),  # noqa: B008  frozen
        thin: TokenReduction = TokenReduction(),  # noqa: B008  frozen
        frame_times: bool = False,
        generation: bool = True,
        number_bytes: int = 2,
    ) -> Estimate:
        """What `prompt` with the same arguments would take, at `number_bytes` a number in KV memory and features.

        Nothing is decoded: of anyres images the size is read, of videos the time stamps; other images are not even opened.
        Never raises ContextError: `left` tells.
        """
        turns = parse(messages, frames)
        rendering = self._rendering(turns, preset, system, generation)
        rendered = rendering({})
        jobs = self._jobs(rendered.slots, media, anyres, pad, frames, thin)
        sizes = _each(self._measure, jobs)
        if frame_times:
            rendered = rendering(_notes(rendered.slots, [clip for _, clip in sizes]))
        lengths = [layout.length for layout, _ in sizes]
        text = len(rendered.tokens) - len(jobs)
        parts = [_part(job, layout, clip) for job, (layout, clip) in zip(jobs, sizes, strict=True)]
        decoder = self.config.text
        total = text + sum(lengths)
        return Estimate(
            (EstimateItem("text", text), *parts),
            total,
            decoder.context,
            decoder.context - total,
            2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * number_bytes * total,
            decoder.hidden_size * number_bytes * sum(lengths),
        )

    def _rendering(
        self, turns: list[Turn], preset: str, system: str | EllipsisType | None, generation: bool
    ) -> Callable[[Mapping[MediaPlaceholder, str]], Rendered]:
        if preset not in PRESETS:
            raise OptionError(
                f"there is no preset {preset!r}; the presets are {', '.join(PRESETS)}"
            )
        if isinstance(system, str) and any(turn.role == "system" for turn in turns):
            raise OptionError(
                "a system prompt was given beside the system message among the messages; give one of them"
            )
        own = None if preset == "hf" else SYSTEM
        chosen = own if isinstance(system, EllipsisType) else system
        return lambda notes: render(self.tokenizer, turns, preset, chosen, generation, notes)

    def _prompt(
        self,
        rendering: Callable[[Mapping[MediaPlaceholder, str]], Rendered],
        media: Sequence[object],
        anyres: bool,
        pad: bool,
        frames: FrameSampling,
        frame_times: bool,
        max_new_tokens: int,
        with_loss_mask: bool = False,
        thin: TokenReduction = TokenReduction(),  # noqa: B008  frozen
    ) -> Prompt:
        rendered = rendering({})
        jobs = self._jobs(rendered.slots, media, anyres, pad, frames, thin)
        # An image takes at least one crop, a video one frame: far too many are refused before any is opened.
        least = [self._crop(job) for job in jobs]
        self._check_context(len(rendered.tokens), jobs, least, max_new_tokens)
        budget = PixelBudget(self.loader.limits)
        loaded = _each(lambda job: self._load(job, budget), jobs)
        if frame_times:
            rendered = rendering(_notes(rendered.slots, [clip for _, clip in loaded]))
        self._check_context(
            len(rendered.tokens), jobs, [item.layout for item, _ in loaded], max_new_tokens
        )
        return self._expand(rendered, [item for item, _ in loaded], with_loss_mask)

    def _expand(self, rendered: Rendered, loaded: list[Media], with_loss_mask: bool) -> Prompt:
        """Each placeholder becomes as many as its media's layout says."""
        tokens: list[int] = []
        loss_mask: list[bool] = []
        placed: list[Media] = []
        begin = 0
        for item in loaded:
            at = rendered.tokens.index(self.tokenizer.image_id, begin)
            tokens += rendered.tokens[begin:at]
            loss_mask += rendered.loss_mask[begin:at] + [False] * item.layout.length
            placed.append(replace(item, start=len(tokens)))
            tokens += [self.tokenizer.image_id] * item.layout.length
            begin = at + 1
        tokens += rendered.tokens[begin:]
        loss_mask += rendered.loss_mask[begin:]
        assert self.tokenizer.image_id not in rendered.tokens[begin:] and len(tokens) == len(
            loss_mask
        )
        return Prompt(tokens, tuple(placed), loss_mask if with_loss_mask else None)

    def _jobs(
        self,
        slots: list[MediaPlaceholder],
        media: Sequence[object],
        anyres: bool,
        pad: bool,
        frames: FrameSampling,
        thin: TokenReduction,
    ) -> list[_MediaRequest]:
        """Give each slot its source. Raises PromptError where the counts differ."""
        if anyres and pad:
            raise OptionError(
                "anyres and pad are two ways to keep the proportions of an image; give one of them"
            )
        grid = self.config.vision.grid
        for name, side, share in (
            ("image", thin.image_token_pool, thin.image_token_ratio),
            ("video", thin.video_token_pool, thin.video_token_ratio),
        ):
            if type(side) is not int or not 1 <= side <= grid:
                raise OptionError(
                    f"{name}_token_pool must be a whole number from 1 to {grid}, the features on a side, not {side!r}"
                )
            if type(share) not in (int, float) or not 0 < share <= 1:
                raise OptionError(
                    f"{name}_token_ratio is a share of the tokens, above 0 and at most 1, not {share!r}"
                )
        if isinstance(media, str | bytes | os.PathLike) or not isinstance(media, Sequence):
            raise PromptError(
                f"media must be a list of images and videos, not {type(media).__name__}"
            )
        open_slots = sum(slot.source is None for slot in slots)
        if open_slots != len(media):
            raise PromptError(
                f"the prompt has {open_slots} `{IMAGE}` but {len(media)} image{'s' * (len(media) != 1)} "
                f"{'were' if len(media) != 1 else 'was'} given"
            )
        limits = self.loader.limits
        if len(slots) > limits.prompt_media:
            raise PromptError(
                f"{len(slots)} images and videos are more than the limit of {limits.prompt_media} in a prompt"
            )
        rest = iter(media)
        jobs = []
        for number, slot in enumerate(slots, 1):
            source = next(rest) if slot.source is None else slot.source
            video = slot.kind == "video" or (slot.kind is None and self.loader.is_video(source))
            name = f"view {slot.name}" if slot.name else f"{'video' if video else 'image'} {number}"
            tiles = anyres if slot.anyres is None else slot.anyres
            sampling = (slot.sampling or frames) if video else None
            if sampling and (sampling.frames, sampling.fps, sampling.times) == (None, None, None):
                sampling = replace(sampling, frames=self.num_frames)
            pool, share = (
                (thin.video_token_pool, thin.video_token_ratio)
                if video
                else (thin.image_token_pool, thin.image_token_ratio)
            )
            jobs.append(
                _MediaRequest(name, source, sampling, tiles and not video, pad, pool, share)
            )
        return jobs

    def _crop(self, job: _MediaRequest) -> ImageTokenLayout:
        """The layout of one crop."""
        return ImageTokenLayout(self.config.vision.grid, pool=job.pool, share=float(job.share))

    def _tiles(self, job: _MediaRequest, width: int, height: int) -> ImageTokenLayout:
        """The layout of an image of this size cut into tiles."""
        one = self._crop(job)
        return replace(
            anyres(width, height, self.config.vision.image_size, one.grid, one.pool),
            share=one.share,
        )

    def _measure(self, job: _MediaRequest) -> tuple[ImageTokenLayout, Clip | None]:
        """Layout, and the times of a video, without decoding."""
        if job.sampling is not None:
            clip = self.loader.video_times(job.source, job.sampling)
            return replace(self._crop(job), crops=len(clip.times)), clip
        return self._tiles(job, *self.loader.image_size(job.source)) if job.anyres else self._crop(
            job
        ), None

    def _load(self, job: _MediaRequest, budget: PixelBudget) -> tuple[Media, Clip | None]:
        """An image or video ready for the tower; its place in the prompt is not known yet."""
        clip = None
        if job.sampling is not None:
            clip = self.loader.video(
                job.source, job.sampling, budget, lambda frame: self.images.fit(frame, job.pad)
            )
            layout, crops = replace(self._crop(job), crops=len(clip.frames)), clip.frames
        else:
            image = self.loader.image(job.source, budget)
            if job.anyres:
                layout, crops = self._tiles(job, *image.size), self.images.tile(image)
            else:
                layout, crops = self._crop(job), [self.images.fit(image, job.pad)]
        pixels, key = self.images.pixels(crops, layout)
        label = _part(job, layout, clip).name
        return Media(pixels, layout, key, 0, job.name, label), clip

    def _check_context(
        self, text: int, jobs: list[_MediaRequest], layouts: list[ImageTokenLayout], reserve: int
    ) -> None:
        context = self.config.text.context
        lengths = [layout.length for layout in layouts]
        text -= len(jobs)
        total = text + sum(lengths)
        if total + reserve <= context:
            return
        ones = [self._crop(job).length for job in jobs]  # what a frame or a whole picture takes
        videos = sum(length for job, length in zip(jobs, lengths, strict=True) if job.sampling)
        frames = [one for job, one in zip(jobs, ones, strict=True) if job.sampling]
        clips = len(frames)
        fit = (context - reserve - (total - videos)) // sum(frames) if clips else 0
        pictures = (context - reserve - text) // max(ones, default=1)
        if clips and fit > 0:
            way = f"at most {fit} frame{'s' * (fit != 1)} {'of each video ' * (clips > 1)}fit beside the rest; ask for fewer frames"
        elif any(layout.tiles for layout in layouts) and text + sum(ones) + reserve <= context:
            way = f"without anyres it would be {text + sum(ones):,} tokens"
        elif jobs and pictures > 0:
            way = f"at most {pictures} image{'s' * (pictures != 1)} of {max(ones)} tokens fit beside the text"
        else:
            way = "shorten the text" + " or ask for fewer new tokens" * (reserve > 0)
        raise ContextError(
            f"the prompt has {total:,} tokens ({text:,} of text, {total - text:,} of images)"
            + (f", and {reserve:,} are to be generated" if reserve else "")
            + f", but the context is {context:,}: {way}"
        )


def _each(work: Callable[[_MediaRequest], T], jobs: list[_MediaRequest]) -> list[T]:
    """Work on all jobs, in threads if several have to be read. PIL images stay in this thread: they load lazily, not safely."""
    if sum(not isinstance(job.source, Image.Image) for job in jobs) < 2:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(min(THREADS, len(jobs))) as pool:
        try:
            later = {
                i: pool.submit(work, job)
                for i, job in enumerate(jobs)
                if not isinstance(job.source, Image.Image)
            }
            return [later[i].result() if i in later else work(job) for i, job in enumerate(jobs)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _part(job: _MediaRequest, layout: ImageTokenLayout, clip: Clip | None) -> EstimateItem:
    name = f"{job.name}: {name_of(job.source)}"
    if clip is None:
        return EstimateItem(name, layout.length)
    return EstimateItem(f"{name} ({len(clip.times)} frames)", layout.length, tuple(clip.times))


def _notes(
    slots: list[MediaPlaceholder], clips: Sequence[Clip | None]
) -> dict[MediaPlaceholder, str]:
    return {
        slot: clip.sentence() for slot, clip in zip(slots, clips, strict=True) if clip is not None
    }


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
