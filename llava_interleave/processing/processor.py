"""From messages and media to one `Prompt`: counts first, then tokens, then pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from .. import config_json
from ..config import LlavaConfig
from ..config_json import read_json
from ..errors import CheckpointError, ContextError, MediaError, OptionError, PromptError
from ..image_layout import Arrangement, ImageTokenLayout, TokenReduction, anyres
from ..prompt import Media, Prompt
from .chat_template import (
    PRESETS,
    SYSTEM,
    MediaPlaceholder,
    Rendered,
    media_placeholders,
    parse,
    render,
)
from .hf_template import HfTemplate
from .images import ImageSettings
from .limits import Limits, PixelBudget
from .loader import Loader, name_of
from .tokenizer import IMAGE, Tokenizer
from .video import Clip, FrameSampling

if TYPE_CHECKING:
    from torch import Tensor

THREADS = 8
T = TypeVar("T")
DEFAULT = ...
"""The system prompt that a preset has of its own."""
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """How messages become a prompt.

    preset: interleave, hf or official (see `chat_template`).
    system: the system prompt; None for none, `DEFAULT` for the preset's. A system message among
        the messages takes its place.
    anyres: cut images (not video frames) into tiles as well, of the original's geometry. None is
        the checkpoint's default: OneVision tiles the only image of a conversation.
    pad: make images square with grey bars instead of squashing them, with True also frames. None
        is the checkpoint's default: OneVision pads several images.
    frames: how videos are sampled whose message part does not say it.
    reduction: how features become fewer tokens.
    frame_times: follow each video with a sentence that has the times of its frames. None is the
        checkpoint's default.
    add_generation_prompt: end with the start of the answer.
    continue_final_message: end within the last message, an answer to be continued; needs
        add_generation_prompt=False.
    max_new_tokens: room in the context that the answer needs.
    """

    preset: str = "interleave"
    system: str | EllipsisType | None = DEFAULT
    anyres: bool | None = None
    pad: bool | None = None
    frames: FrameSampling = FrameSampling()  # noqa: RUF009  frozen
    reduction: TokenReduction = TokenReduction()  # noqa: RUF009  frozen
    frame_times: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise OptionError(
                f"unknown preset {self.preset!r}; the presets are {', '.join(PRESETS)}"
            )
        if self.anyres and self.pad:
            raise OptionError(
                "anyres and pad both keep the proportions of an image; choose one of them"
            )


DEFAULTS = PromptOptions()


@dataclass(frozen=True, slots=True)
class EstimateItem:
    """A part of a prompt and how many tokens it takes; of a video the seconds of its frames."""

    name: str
    tokens: int
    times: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a prompt will need. `dataclasses.asdict` makes it JSON.

    parts: the text, then each image, view and video.
    total: tokens of the prompt.
    context: tokens that the network can hold.
    left: tokens that remain for the answer (negative: the prompt is too long).
    kv_bytes: the KV cache of the prompt.
    feature_bytes: features of its images.
    weight_bytes: the network; 0 if not counted.
    excess: what is wrong with a prompt that is too long, and the way out; empty if it fits.
    """

    parts: tuple[EstimateItem, ...]
    total: int
    context: int
    left: int
    kv_bytes: int
    feature_bytes: int
    weight_bytes: int = 0
    excess: str = ""

    def __str__(self) -> str:
        rows = [(part.name, f"{part.tokens:,}") for part in self.parts]
        rows += [
            ("total", f"{self.total:,}"),
            ("context", f"{self.context:,}"),
            ("left for the answer", f"{self.left:,}"),
        ]
        rows += [("KV cache", _size(self.kv_bytes)), ("image features", _size(self.feature_bytes))]
        rows += [("weights", _size(self.weight_bytes))] * bool(self.weight_bytes)
        width, number = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{name:<{width}}  {value:>{number}}" for name, value in rows]
        return "\n".join([*lines, *[self.excess] * bool(self.excess)])


@dataclass(frozen=True, slots=True)
class _MediaRequest:
    """One image or video to load.

    video: None until its first bytes are read. anyres, pad: of an image, once all kinds are known.
    """

    number: int  # in the prompt, from 1
    place: MediaPlaceholder
    source: object
    video: bool | None
    options: PromptOptions
    anyres: bool = False
    pad: bool = False

    @property
    def name(self) -> str:
        """Like "image 1"."""
        if self.place.name:
            return f"view {self.place.name}"
        return f"{'video' if self.video else 'image'} {self.number}"

    def crop(self, grid: int, arrangement: Arrangement) -> ImageTokenLayout:
        """The layout of an image that is not tiled, or of a video of one frame.

        The smaller of both as long as the kind is not known.
        """
        reduction = self.options.reduction
        if self.video or (self.video is None and arrangement.video_pool):
            return ImageTokenLayout(
                grid,
                pool=reduction.video_token_pool,
                share=float(reduction.video_token_ratio),
                bilinear=arrangement.video_pool,
                newline=arrangement.video_newline,
            )
        return ImageTokenLayout(
            grid,
            pool=reduction.image_token_pool,
            share=float(reduction.image_token_ratio),
            newline="end" if arrangement.newline else "none",
        )


@dataclass(frozen=True, slots=True)
class _LoadedMedia:
    """One image or video with the fields of `prompt.Media`; `clip` of a video, without frames."""

    crops: Tensor
    layout: ImageTokenLayout
    key: bytes
    label: str
    clip: Clip | None


class PreparedImage:
    """An image that is processed once for all prompts that lay it out alike."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self._loaded: dict[tuple[bool, bool, ImageTokenLayout], _LoadedMedia] = {}

    def load(
        self, request: _MediaRequest, crop: ImageTokenLayout, load: Callable[[], _LoadedMedia]
    ) -> _LoadedMedia:
        """`load()`, or its earlier result for an equal request."""
        key = (request.anyres, request.pad, crop)
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = load()
            self._loaded = {key: loaded}
        return loaded


class Processor:
    """Everything that turns messages into prompts for one checkpoint.

    Safe to share between threads.

    tokenizer, config: of the checkpoint.
    images: the settings of its preprocessor_config.json.
    loader: reads media, within its limits.
    num_frames: frames of a video where neither the options nor the message say it: those of its
        video_preprocessor_config.json, else those of the arrangement.
    template: the checkpoint's chat template, of preset hf.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: LlavaConfig,
        images: ImageSettings,
        limits: Limits,
        num_frames: int | None = None,
        template: HfTemplate = HfTemplate(),  # noqa: B008  frozen
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.images = images
        self.loader = Loader(limits)
        self.num_frames = num_frames or config.arrangement.num_frames
        self.template = template
        self._crops: dict[tuple[bool | None, TokenReduction], ImageTokenLayout] = {}

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: LlavaConfig | None = None, limits: Limits | None = None
    ) -> Processor:
        """Read tokenizer and preprocessing of a checkpoint folder, and without `config` its
        config.json.

        Raises CheckpointError.
        """
        folder = Path(folder)
        config = config or config_json.from_dict(read_json(folder / "config.json"))
        tokenizer = Tokenizer.from_folder(folder, config.image_token_id, config.video_token_id)
        arrangement = config.arrangement
        images = ImageSettings.from_folder(folder, config.vision.image_size, arrangement)
        video = folder / "video_preprocessor_config.json"
        nested = read_json(folder / "processor_config.json", optional=True).get("video_processor")
        settings = (nested if isinstance(nested, dict) else {}) | read_json(video, optional=True)
        num_frames = settings.get("num_frames")
        num_frames = arrangement.num_frames if num_frames is None else num_frames
        if type(num_frames) is not int or num_frames < 1:
            raise CheckpointError(
                f"num_frames in {video} must be a whole number from 1 on, not {num_frames!r}"
            )
        template = HfTemplate.from_folder(folder)
        return cls(tokenizer, config, images, limits or Limits(), num_frames, template)

    def prompt(
        self,
        messages: Messages,
        media: Sequence[object] = (),
        options: PromptOptions = DEFAULTS,
        **changes: Any,
    ) -> Prompt:
        """The prompt of a conversation. Keywords are the fields of `PromptOptions`.

        media: what the parts without a source, and each `<image>` in text, stand for, in the order
            of the messages.

        Raises PromptError, OptionError, MediaError, MediaRefused, ContextError.
        """
        options = replace(options, **changes)
        return self._prompt(self._conversation(messages, media, options), options)

    def raw(
        self,
        text: str,
        media: Sequence[object] = (),
        options: PromptOptions = DEFAULTS,
        **changes: Any,
    ) -> Prompt:
        """The prompt of a text that is already rendered: control tokens in it count, `<image>` are
        `media`, and so are `<video>` where the checkpoint has that token.
        """
        options = replace(options, **changes)
        if (options.preset, options.system, options.frame_times) != (
            DEFAULTS.preset,
            DEFAULTS.system,
            DEFAULTS.frame_times,
        ):
            raise OptionError(
                "preset, system and frame_times are for messages, not for a raw prompt"
            )
        image, video = self.tokenizer.image_id, self.tokenizer.video_id
        tokens = self.tokenizer.encode(text)
        kinds = {image: None, video: "video"}
        placeholders = [MediaPlaceholder(kinds[token]) for token in tokens if token in kinds]
        tokens = [image if token == video else token for token in tokens]
        rendered = Rendered(tokens, [False] * len(tokens), placeholders)
        _assign_sources(placeholders, media)
        return self._prompt(lambda _: rendered, options)

    def example(
        self,
        messages: Messages,
        media: Sequence[object] = (),
        options: PromptOptions = DEFAULTS,
        **changes: Any,
    ) -> Prompt:
        """A finished conversation to train on: as `prompt`, with a `loss_mask`.

        The mask is True on answers and on the tokens that end them, unless the message has
        `"loss"`: False, or the weight of the loss.
        """
        options = replace(options, **changes, add_generation_prompt=False)
        renderer = self._conversation(messages, media, options)
        if (role := messages[-1]["role"]) != "assistant":
            raise PromptError(
                f"an example ends with an answer, this one with a message of the {role}"
            )
        return self._prompt(renderer, options, loss_mask=True)

    def estimate(
        self,
        messages: Messages,
        media: Sequence[object] = (),
        options: PromptOptions = DEFAULTS,
        *,
        number_bytes: int = 2,
        **changes: Any,
    ) -> Estimate:
        """What `prompt` with the same arguments takes, at `number_bytes` a number in KV cache and
        features.

        Nothing is decoded: of anyres images the size is read, of videos the time stamps; other
        images are not even opened. Never raises ContextError: `left` tells.
        """
        options = replace(options, **changes)
        text, requests, sizes = self._measured(messages, media, options)
        lengths = [layout.length for layout, _ in sizes]
        parts = [
            _item(request, layout, clip)
            for request, (layout, clip) in zip(requests, sizes, strict=True)
        ]
        decoder = self.config.text
        total = text + sum(lengths)
        return Estimate(
            (EstimateItem("text", text), *parts),
            total,
            decoder.context,
            decoder.context - total,
            2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * number_bytes * total,
            decoder.hidden_size * number_bytes * sum(lengths),
            excess=self._excess(text, requests, [layout for layout, _ in sizes], 0),
        )

    def count(
        self, messages: Messages, media: Sequence[object], options: PromptOptions
    ) -> tuple[int, list[tuple[int, int]]]:
        """Tokens of the text, and of each image and video its tokens and frames (1 of an image):
        what `estimate` says, without names."""
        text, _, sizes = self._measured(messages, media, options)
        return text, [(layout.length, len(clip.times) if clip else 1) for layout, clip in sizes]

    def count_turns(
        self, layouts: Sequence[Sequence[str]], images: Sequence[str], anyres: bool | None = None
    ) -> list[int]:
        """What `count` adds up to for layouts of one conversation, in less time: texts of questions
        and answers in turn, without the start of another answer.

        images: files, of the `<image>` in the questions.
        """
        if len(images) > self.loader.limits.prompt_media:
            raise PromptError("the prompt has too many images")
        shown = 0
        if images:
            tiled = self.config.arrangement.anyres if anyres is None else anyres
            place = MediaPlaceholder("image")
            one = _MediaRequest(1, place, images[0], False, DEFAULTS, tiled and len(images) == 1)
            shown = len(images) * self._measure(one)[0].length
        lengths = _Lengths(self.tokenizer)
        totals = []
        for texts in layouts:
            pieces = ["\n", f"system\n{SYSTEM}"]
            for question, answer in zip(texts[::2], texts[1::2], strict=True):
                pieces += f"user\n{question}".split(IMAGE)
                pieces += "\n", "assistant\n", answer, "\n"
            frame = 2 * (1 + len(texts))  # <|im_start|> and <|im_end|> of each message
            totals.append(shown + frame + sum(map(lengths.__getitem__, pieces)))
        return totals

    def _measured(
        self, messages: Messages, media: Sequence[object], options: PromptOptions
    ) -> tuple[int, list[_MediaRequest], list[tuple[ImageTokenLayout, Clip | None]]]:
        """Tokens of the text, the media, and their sizes."""
        renderer = self._conversation(messages, media, options)
        rendered, requests = self._decided(renderer, options)
        sizes = _each(self._measure, requests, lambda one: one.video or one.anyres)
        if self._has_times(options):
            rendered = renderer(_notes(rendered.placeholders, [clip for _, clip in sizes]))
        return len(rendered.tokens) - len(requests), requests, sizes

    def _conversation(
        self, messages: Messages, media: Sequence[object], options: PromptOptions
    ) -> Renderer:
        """Messages as tokens, as a function of the sentences that follow media."""
        turns = parse(messages, options.frames, len(media) if isinstance(media, Sequence) else None)
        _assign_sources(media_placeholders(turns), media)
        system = options.system
        if isinstance(system, EllipsisType):
            system = None if options.preset == "hf" else SYSTEM
        elif system is not None and any(turn.role == "system" for turn in turns):
            raise OptionError(
                "there is a system prompt and a system message among the messages; give one of them"
            )
        return lambda notes: render(
            self.tokenizer,
            turns,
            options.preset,
            system,
            options.add_generation_prompt,
            notes,
            self.template,
            options.continue_final_message,
        )

    def _prompt(
        self,
        renderer: Renderer,
        options: PromptOptions,
        loss_mask: bool = False,
    ) -> Prompt:
        reserve = options.max_new_tokens
        rendered, requests = self._decided(renderer, options, check_context=True)
        if loss_mask and not any(rendered.loss_mask):
            raise PromptError(
                "the example has no answer to learn, or the checkpoint's chat template changes it; "
                "use preset interleave"
            )
        budget = PixelBudget(self.loader.limits)
        loaded = _each(lambda request: self._load(request, budget), requests)
        if self._has_times(options):
            rendered = renderer(_notes(rendered.placeholders, [item.clip for item in loaded]))
        self._check_context(
            len(rendered.tokens), requests, [item.layout for item in loaded], reserve
        )
        return self._expand(rendered, requests, loaded, loss_mask)

    def _expand(
        self,
        rendered: Rendered,
        requests: list[_MediaRequest],
        loaded: list[_LoadedMedia],
        loss_mask: bool,
    ) -> Prompt:
        """Each placeholder becomes as many as the layout of its media has tokens."""
        tokens: list[int] = []
        mask: list[float] = []
        media: list[Media] = []
        begin = 0
        for request, item in zip(requests, loaded, strict=True):
            at = rendered.tokens.index(self.tokenizer.image_id, begin)
            tokens += rendered.tokens[begin:at]
            mask += rendered.loss_mask[begin:at] + [False] * item.layout.length
            media.append(
                Media(
                    item.crops,
                    item.layout,
                    item.key,
                    len(tokens),
                    request.name,
                    item.label,
                    self.images.table,
                )
            )
            tokens += [self.config.placeholder_id(bool(request.video))] * item.layout.length
            begin = at + 1
        tokens += rendered.tokens[begin:]
        mask += rendered.loss_mask[begin:]
        assert self.tokenizer.image_id not in rendered.tokens[begin:] and len(tokens) == len(mask)
        return Prompt(tokens, tuple(media), mask if loss_mask else None)

    def _decided(
        self, renderer: Renderer, options: PromptOptions, check_context: bool = False
    ) -> tuple[Rendered, list[_MediaRequest]]:
        """The tokens and their media, of which the kind and the geometry are known.

        check_context: refuse too many media before any of them is opened: an image takes at least
            one crop, a video one frame.
        """
        rendered = renderer({})
        requests = self._requests(rendered.placeholders, options)
        if check_context:
            crops = [self._crop(request) for request in requests]
            self._check_context(len(rendered.tokens), requests, crops, options.max_new_tokens)
        requests = _each(self._decide, requests, lambda one: str(one.source)[:4] == "http")
        unknown = [one for one in requests if one.place.kind not in ("image", "video")]
        for one in unknown:
            one.place.kind = "video" if one.video else "image"
        if unknown and options.preset == "hf" and self.template.has_videos:
            # The place of media in the prompt depends on their kind.
            rendered = renderer({})
            decided = {one.place: one for one in requests}
            requests = [
                replace(decided[place], number=number)
                for number, place in enumerate(rendered.placeholders, 1)
            ]
        return rendered, self._with_geometry(requests, options)

    def _requests(
        self, placeholders: list[MediaPlaceholder], options: PromptOptions
    ) -> list[_MediaRequest]:
        """The media of the placeholders."""
        self._check_reduction(options.reduction)
        limits = self.loader.limits
        if len(placeholders) > limits.prompt_media:
            raise PromptError(
                f"{len(placeholders)} images and videos are more than the limit of "
                f"{limits.prompt_media} in a prompt (Limits.prompt_media)"
            )
        kinds = {"image": False, "video": True}
        return [
            _MediaRequest(number, place, place.source, kinds.get(place.kind or ""), options)
            for number, place in enumerate(placeholders, 1)
        ]

    def _decide(self, request: _MediaRequest) -> _MediaRequest:
        """The request with its kind, which the source decides where the message does not."""
        if request.video is not None:
            return request
        animations = request.place.kind == "media"
        video, source = self.loader.resolve(request.source, animations)
        return replace(request, video=video, source=source)

    def _with_geometry(
        self, requests: list[_MediaRequest], options: PromptOptions
    ) -> list[_MediaRequest]:
        """Decide for each image whether it is tiled or padded: its message part, else the options,
        else the checkpoint's default, which depends on the number of images."""
        arrangement = self.config.arrangement
        images = sum(not request.video for request in requests)
        pad = arrangement.pad and images > 1 if options.pad is None else options.pad
        anyres = options.anyres
        if anyres is None:
            anyres = arrangement.anyres and images == 1 and not options.pad

        def decided(request: _MediaRequest) -> _MediaRequest:
            own = anyres if request.place.anyres is None else request.place.anyres
            geometry = own and not request.video, pad and not own
            if geometry == (request.anyres, request.pad):
                return request
            return replace(request, anyres=geometry[0], pad=geometry[1])

        return [decided(request) for request in requests]

    def _has_times(self, options: PromptOptions) -> bool:
        times = options.frame_times
        return self.config.arrangement.frame_times if times is None else times

    def _sampling(self, request: _MediaRequest) -> FrameSampling:
        sampling = request.place.sampling or request.options.frames
        if (sampling.frames, sampling.fps, sampling.times) == (None, None, None):
            return replace(sampling, frames=self.num_frames)
        return sampling

    def _check_reduction(self, reduction: TokenReduction) -> None:
        grid = self.config.vision.grid
        if self.config.arrangement.newline and reduction != TokenReduction():
            raise OptionError(
                "image_token_pool, video_token_pool, image_token_ratio and video_token_ratio are "
                "not supported for a checkpoint with image_newline, which ends rows of tokens; it "
                "pools video frames itself"
            )
        for name, side, share in (
            ("image", reduction.image_token_pool, reduction.image_token_ratio),
            ("video", reduction.video_token_pool, reduction.video_token_ratio),
        ):
            if type(side) is not int or not 1 <= side <= grid:
                raise OptionError(
                    f"{name}_token_pool must be a whole number from 1 to {grid}, the features on a "
                    f"side, not {side!r}"
                )
            if type(share) not in (int, float) or not 0 < share <= 1:
                raise OptionError(
                    f"{name}_token_ratio is a share of the tokens, above 0 and at most 1, "
                    f"not {share!r}"
                )

    def _crop(self, request: _MediaRequest) -> ImageTokenLayout:
        key = request.video, request.options.reduction
        if key not in self._crops:
            self._crops[key] = request.crop(self.config.vision.grid, self.config.arrangement)
        return self._crops[key]

    def _tiles(self, request: _MediaRequest, width: int, height: int) -> ImageTokenLayout:
        """The layout of an image of this size cut into tiles."""
        crop, arrangement = self._crop(request), self.config.arrangement
        size = self.config.vision.image_size
        return replace(
            anyres(width, height, size, crop.grid, crop.pool, arrangement), share=crop.share
        )

    def _measure(self, request: _MediaRequest) -> tuple[ImageTokenLayout, Clip | None]:
        """The layout, and of a video its times, without decoding."""
        if request.video:
            clip = self.loader.video_times(request.source, self._sampling(request))
            return replace(self._crop(request), crops=len(clip.times)), clip
        if request.anyres:
            source = request.source
            image = source.image if isinstance(source, PreparedImage) else source
            return self._tiles(request, *self.loader.image_size(image)), None
        return self._crop(request), None

    def _load(self, request: _MediaRequest, budget: PixelBudget) -> _LoadedMedia:
        if isinstance(source := request.source, PreparedImage):
            plain = replace(request, source=source.image)
            loaded = source.load(request, self._crop(request), lambda: self._load(plain, budget))
            return replace(loaded, label=_item(plain, loaded.layout, None).name)
        clip = None
        if request.video:
            pad = bool(request.options.pad)
            sampling = self._sampling(request)
            clip = self.loader.video(
                request.source, sampling, budget, lambda frame: self.images.fit(frame, pad)
            )
            layout, crops = replace(self._crop(request), crops=len(clip.frames)), clip.frames
        else:
            fit = self._anyres if request.anyres else self._one_crop
            layout, crops = self.loader.fitted(
                request.source, lambda image: fit(request, image), budget
            )
        stacked, key = self.images.stack(crops, layout)
        if clip is not None:
            clip = replace(clip, frames=[])
        label = _item(request, layout, clip).name
        return _LoadedMedia(stacked, layout, key, label, clip)

    def _anyres(
        self, request: _MediaRequest, image: Image.Image
    ) -> tuple[ImageTokenLayout, list[Image.Image]]:
        layout = self._tiles(request, *image.size)
        return layout, self.images.anyres_tiles(image, self.config.arrangement)

    def _one_crop(
        self, request: _MediaRequest, image: Image.Image
    ) -> tuple[ImageTokenLayout, list[Image.Image]]:
        return self._crop(request), [self.images.fit(image, request.pad)]

    def _check_context(
        self,
        text: int,
        requests: list[_MediaRequest],
        layouts: list[ImageTokenLayout],
        reserve: int,
    ) -> None:
        """Raise ContextError, with a way out, where prompt and answer have no room.

        text: tokens of the rendered text, one placeholder for each of the requests.
        reserve: tokens of the answer.
        """
        if excess := self._excess(text - len(requests), requests, layouts, reserve):
            raise ContextError(excess)

    def _excess(
        self,
        text: int,
        requests: list[_MediaRequest],
        layouts: list[ImageTokenLayout],
        reserve: int,
    ) -> str:
        """What `_check_context` says, or nothing; `text` without placeholders."""
        context = self.config.text.context
        lengths = [layout.length for layout in layouts]
        total = text + sum(lengths)
        if total + reserve <= context:
            return ""
        crops = [self._crop(request).length for request in requests]
        videos = [one for one, request in zip(layouts, requests, strict=True) if request.video]
        frames = [replace(one, crops=2).length - replace(one, crops=1).length for one in videos]
        reducible = sum(n * one.crops for n, one in zip(frames, videos, strict=True))
        fit = (context - reserve - (total - reducible)) // sum(frames) if frames else 0
        images = (context - reserve - text) // max(crops, default=1)
        if frames and fit > 0:
            way = (
                f"at most {fit} frame{'s' * (fit != 1)} {'of each video ' * (len(frames) > 1)}fit "
                "in the rest of the context; ask for fewer frames"
            )
        elif any(layout.tiles for layout in layouts) and text + sum(crops) + reserve <= context:
            way = f"without anyres it would be {text + sum(crops):,} tokens"
        elif requests and images > 0:
            way = (
                f"at most {images} image{'s' * (images != 1)} of {max(crops)} tokens fit "
                "next to the text"
            )
        else:
            way = "shorten the text" + " or ask for fewer new tokens" * (reserve > 0)
        return (
            f"the prompt has {total:,} tokens ({text:,} of text, {total - text:,} of images)"
            + (f", and {reserve:,} are to be generated" if reserve else "")
            + f", but the context is {context:,}: {way}"
        )


class _Lengths(dict[str, int]):
    """How many tokens a text has."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, text: str) -> int:
        self[text] = length = len(self._tokenizer.encode(text, special=False))
        return length


Renderer = Callable[[Mapping[MediaPlaceholder, str]], Rendered]


def _assign_sources(placeholders: list[MediaPlaceholder], media: Sequence[object]) -> None:
    """Give the placeholders without a source the media. Raises PromptError where counts differ."""
    if isinstance(media, str | bytes | os.PathLike) or not isinstance(media, Sequence):
        raise PromptError(f"media must be a list of images and videos, not {type(media).__name__}")
    without_source = [place for place in placeholders if place.source is None]
    if len(without_source) != len(media):
        raise PromptError(
            f"the prompt has {len(without_source)} `{IMAGE}` but {len(media)} "
            f"image{'s were' if len(media) != 1 else ' was'} given"
        )
    for place, source in zip(without_source, media, strict=True):
        place.source = source


def _each(
    work: Callable[[_MediaRequest], T],
    requests: list[_MediaRequest],
    slow: Callable[[_MediaRequest], object] = lambda _: True,
) -> list[T]:
    """The results of `work`, by threads where several are slow: they read or download a source.

    PIL images stay in this thread: they load lazily, which is not thread-safe. A MediaError names
    which of several it is about.
    """

    def named(request: _MediaRequest) -> T:
        try:
            return work(request)
        except MediaError as error:
            if len(requests) == 1:
                raise
            raise type(error)(f"{request.name}: {error}") from error

    threaded = [
        not isinstance(request.source, (Image.Image, PreparedImage)) and bool(slow(request))
        for request in requests
    ]
    if sum(threaded) < 2:
        return [named(request) for request in requests]
    with ThreadPoolExecutor(min(THREADS, len(requests))) as pool:
        try:
            later = {
                i: pool.submit(named, request) for i, request in enumerate(requests) if threaded[i]
            }
            return [
                later[i].result() if i in later else named(request)
                for i, request in enumerate(requests)
            ]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _item(request: _MediaRequest, layout: ImageTokenLayout, clip: Clip | None) -> EstimateItem:
    name = f"{request.name}: {name_of(request.source)}"
    if clip is None:
        return EstimateItem(name, layout.length)
    times = tuple(clip.times)
    return EstimateItem(f"{name} ({len(times)} frames)", layout.length, times)


def _notes(
    placeholders: list[MediaPlaceholder], clips: Sequence[Clip | None]
) -> dict[MediaPlaceholder, str]:
    """The sentence that follows each video."""
    return {
        place: clip.sentence()
        for place, clip in zip(placeholders, clips, strict=True)
        if clip is not None
    }


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"
