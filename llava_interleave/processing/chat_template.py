"""Messages become token ids in which one placeholder stands for each image or video.

Knows no pixels, and opens nothing.

Presets:
- interleave: ChatML as in training, media where the user put them, the system prompt of the
  training data. A newline follows an image or video, unless it ends the message or text follows
  that starts with whitespace or a punctuation mark. A newline separates two texts, unless
  whitespace does.
- hf: byte for byte the rendering of the checkpoint's own chat template (see `hf_template`); in this
  family the images of a message, then its videos, then its texts, a newline before each text, no
  system prompt. Each image and video stands where its own placeholder is. Control tokens spelled in
  the text become control tokens, as in transformers, except `<video>`.
- official: the published evaluation (LLaVA-NeXT branch interleave_inference,
  `llava/eval/model_vqa.py` preprocess_qwen): text is cut at each image, the pieces are tokenized
  apart, and a newline token follows each image.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import OptionError, PromptError
from .hf_template import HfTemplate
from .limits import check_length
from .tokenizer import IM_END, IMAGE, VIDEO, Tokenizer
from .video import FrameSampling

PRESETS = ("interleave", "hf", "official")
PUNCTUATION = ".,;:!?)]}'\"…"
SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")
SAMPLING_KEYS = ("frames", "fps", "times", "start", "end")


@dataclass(eq=False, slots=True)
class MediaPlaceholder:
    """The place of one image or video in a conversation.

    kind: "image" or "video". None for a `<image>` in text, whose kind its source decides, and
        "media" for a part that leaves it to its source; there an animated image is a video. The
        processor replaces both once it has read the source.
    source: the media to load; None for the next one of the prompt's `media`.
    anyres: True or False where the message part says it, None for the prompt's own setting.
    name: the name of a view.
    """

    kind: str | None = None
    source: object = None
    sampling: FrameSampling | None = None
    anyres: bool | None = None
    name: str | None = None


TextPieces = list[str | MediaPlaceholder]
"""A text with the placeholders that are spelled in it."""
ContentParts = list[MediaPlaceholder | TextPieces]
"""The content of a message, in order: images or videos, and texts."""


@dataclass(slots=True)
class Turn:
    """One message; `loss`: the weight of an answer in the loss mask."""

    role: str
    parts: ContentParts
    loss: float = 1.0


@dataclass(slots=True)
class Rendered:
    """Token ids with one placeholder token for each of `placeholders`, in order.

    loss_mask: the weight of the loss of answers and the tokens that end them, else False.
    """

    tokens: list[int] = field(default_factory=list)
    loss_mask: list[float] = field(default_factory=list)
    placeholders: list[MediaPlaceholder] = field(default_factory=list)

    def add(self, tokens: list[int], loss: float = False) -> None:
        """Append tokens whose loss has one weight."""
        self.tokens += tokens
        self.loss_mask += [loss] * len(tokens)


def parse(
    messages: Sequence[Mapping[str, Any]], frames: FrameSampling, media: int | None = None
) -> list[Turn]:
    """Read messages of the forms of transformers and of OpenAI.

    A message may have `"loss"`, for training: the weight of its answer's loss, False for none.

    frames: the sampling of videos whose part does not say it. media: how many the prompt has apart
    from those that parts name; if parts without a source take all of them, `<image>` in text is
    text. Without it each `<image>` is a placeholder. Raises PromptError for anything unknown.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages must be a list of {{'role', 'content'}}, not {type(messages).__name__}"
        )
    if not messages:
        raise PromptError("there are no messages")
    turns = [_turn(message, f"message {i + 1}", frames) for i, message in enumerate(messages)]
    parts = [part for turn in turns for part in turn.parts]
    if media == sum(isinstance(p, MediaPlaceholder) and p.source is None for p in parts):
        for turn in turns:
            turn.parts = [_literal(part) for part in turn.parts]
    return turns


def media_placeholders(turns: list[Turn]) -> list[MediaPlaceholder]:
    """All placeholders, in the order of the messages."""
    return [
        piece
        for turn in turns
        for part in turn.parts
        for piece in ([part] if isinstance(part, MediaPlaceholder) else part)
        if isinstance(piece, MediaPlaceholder)
    ]


def _literal(part: MediaPlaceholder | TextPieces) -> MediaPlaceholder | TextPieces:
    """A part in whose text `<image>` is text."""
    if isinstance(part, MediaPlaceholder) or not part:
        return part
    return ["".join(piece if isinstance(piece, str) else IMAGE for piece in part)]


def _turn(message: Mapping[str, Any], where: str, frames: FrameSampling) -> Turn:
    _check_keys(message, where, needed=("role", "content"), allowed=("loss",))
    role, content, loss = message["role"], message["content"], message.get("loss", True)
    if role not in ROLES:
        raise PromptError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
    if isinstance(content, str):
        return Turn(role, [_text(content)], loss)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise PromptError(
            f"{where} has a content of type {type(content).__name__}; it must be a text or a list "
            "of parts"
        )
    turn = Turn(role, [], loss)
    for i, part in enumerate(content):
        turn.parts += _part(part, f"part {i + 1} of {where}", frames)
    return turn


def _part(part: Mapping[str, Any], where: str, frames: FrameSampling) -> ContentParts:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        _check_keys(part, where, needed=("type", "text"))
        if not isinstance(part["text"], str):
            raise PromptError(f"the text of {where} is of type {type(part['text']).__name__}")
        return [_text(part["text"])]
    if kind == "image":
        _check_keys(part, where, needed=("type",), allowed=("image", "url", "path", "base64"))
        return [MediaPlaceholder("image", _source(part, where, ("image", "url", "path", "base64")))]
    if kind == "image_url":
        _check_keys(part, where, needed=("type", "image_url"))
        url, detail = _url(part["image_url"], where, ("detail",))
        if detail not in (None, "auto", "low", "high"):
            raise PromptError(f"detail {detail!r} of {where} is not one of auto, low, high")
        return [
            MediaPlaceholder("image", url, anyres={"low": False, "high": True}.get(str(detail)))
        ]
    if kind in ("video", "video_url"):
        sources = ("video", "url", "path") if kind == "video" else ()
        needed = ("type",) if kind == "video" else ("type", "video_url")
        _check_keys(part, where, needed, (*sources, *SAMPLING_KEYS))
        source = _source(part, where, sources) if sources else _url(part["video_url"], where, ())[0]
        return [MediaPlaceholder("video", source, _sampling(part, frames))]
    if kind == "media":
        _check_keys(part, where, ("type",), ("url", "path", *SAMPLING_KEYS))
        source = _source(part, where, ("url", "path"))
        return [MediaPlaceholder("media", source, _sampling(part, frames))]
    if kind == "views":
        _check_keys(part, where, needed=("type", "views"))
        return _views(part["views"], where)
    if kind is None:
        raise PromptError(
            f"{where} has no type; a part is {{'type': 'text', 'text': ...}}, "
            f"{{'type': 'image', 'path': ...}} ..."
        )
    raise PromptError(
        f"{where} has the type {kind!r}; the types are text, image, image_url, video, video_url, "
        "views"
    )


def _text(text: str) -> TextPieces:
    if IMAGE not in text:
        return [text] if text else []
    pieces: TextPieces = []
    for i, piece in enumerate(text.split(IMAGE)):
        pieces += [MediaPlaceholder(), piece] if i else [piece]
    return [piece for piece in pieces if piece != ""]


def _views(views: Any, where: str) -> ContentParts:
    if isinstance(views, Mapping):
        views = [{"name": name, "image": image} for name, image in views.items()]
    if not isinstance(views, Sequence) or isinstance(views, str | bytes) or not views:
        raise PromptError(
            f"the views of {where} must be a list of images, of {{'name', 'image'}}, or "
            f"{{name: image}}"
        )
    parts: ContentParts = []
    for i, view in enumerate(views):
        name = None
        if isinstance(view, Mapping):
            _check_keys(view, f"view {i + 1} of {where}", needed=("image",), allowed=("name",))
            name, view = view.get("name"), view["image"]
        if name is not None and (not isinstance(name, str) or not name.strip() or IMAGE in name):
            raise PromptError(
                f"view {i + 1} of {where} has the name {name!r}; a name is a text without {IMAGE}"
            )
        if view is None:
            raise PromptError(f"view {i + 1} of {where} has no image")
        parts += (
            [[f"{name}: "], MediaPlaceholder("image", view, name=name)]
            if name
            else [MediaPlaceholder("image", view)]
        )
    return parts


def _source(part: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> object:
    """The source that an image or video part names, or None."""
    present = [key for key in keys if part.get(key) is not None]
    if not present:
        return None
    if len(present) > 1:
        raise PromptError(f"{where} has {' and '.join(present)}; give one of them")
    key = present[0]
    value = part[key]
    if key in ("url", "base64") and not isinstance(value, str):
        raise PromptError(f"the {key} of {where} is of type {type(value).__name__}, not a text")
    if key == "url":
        return _url(value, where, ())[0]
    if key == "path":
        if isinstance(value, str):
            check_length(value)
        try:
            return Path(value)
        except TypeError as error:
            raise PromptError(f"the path of {where} is of type {type(value).__name__}") from error
    return f"data:;base64,{value}" if key == "base64" else value


def _url(value: Any, where: str, more: tuple[str, ...]) -> tuple[str | bytes, Any]:
    """The URL of OpenAI's `"https://..."` or `{"url": "https://...", ...}`, and its one optional
    key.

    Bytes pass, too: a caller may have put a file's bytes in the place of its URL.
    """
    other = None
    if isinstance(value, Mapping):
        _check_keys(value, where, needed=("url",), allowed=more)
        value, other = value["url"], value.get(more[0]) if more else None
    if not isinstance(value, bytes) and (not isinstance(value, str) or ":" not in value):
        raise PromptError(f"the url of {where} is not a URL; for a file use {{'path': ...}}")
    return value, other


def _sampling(part: Mapping[str, Any], frames: FrameSampling) -> FrameSampling:
    values = {key: part[key] for key in SAMPLING_KEYS if part.get(key) is not None}
    if "times" in values:
        if not isinstance(values["times"], Sequence) or isinstance(values["times"], str):
            raise OptionError(f"times must be a list of seconds, not {values['times']!r}")
        values["times"] = tuple(values["times"])
    # The moments of a part replace those of the prompt; start and end only narrow them.
    has_moments = values.keys() & {"frames", "fps", "times"}
    return FrameSampling(**values) if has_moments or frames.times else replace(frames, **values)


def _check_keys(
    value: Any, where: str, needed: tuple[str, ...], allowed: tuple[str, ...] = ()
) -> None:
    if not isinstance(value, dict | Mapping):
        raise PromptError(
            f"{where} is of type {type(value).__name__}, not an object with {', '.join(needed)}"
        )
    if missing := [key for key in needed if key not in value]:
        raise PromptError(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(str(key) for key in value.keys() - {*needed, *allowed}):
        raise PromptError(
            f"{where} has unknown {', '.join(unknown)}; it may have "
            f"{', '.join((*needed, *allowed))}"
        )


def render(
    tokenizer: Tokenizer,
    turns: list[Turn],
    preset: str,
    system: str | None,
    add_generation_prompt: bool,
    notes: Mapping[MediaPlaceholder, str],
    template: HfTemplate,
    continue_final_message: bool = False,
) -> Rendered:
    """Turns as tokens under a preset.

    system: the first message, unless the turns have a system message.
    add_generation_prompt: end with the start of an answer.
    notes: sentences that follow their media.
    template: the checkpoint's, for preset hf.
    continue_final_message: end with the text of the last message, an answer to be continued.

    Raises PromptError where there is no such text.
    """
    if continue_final_message:
        _check_continued(turns, add_generation_prompt)
    if system is not None and not any(turn.role == "system" for turn in turns):
        turns = [Turn("system", [[system]]), *turns]
    if notes:
        turns = [replace(turn, parts=_noted(turn.parts, notes)) for turn in turns]
    if preset == "hf":
        return _hf(tokenizer, turns, add_generation_prompt, template, continue_final_message)
    out = Rendered()
    for turn in turns:
        answer = turn.role == "assistant"
        loss = answer and turn.loss
        out.add([tokenizer.im_start])
        # An answer is tokenised apart from its header, as it is when it is generated.
        text = f"{turn.role}\n"
        if answer or preset == "official":
            out.add(tokenizer.encode(text, special=False))
            text = ""
        for piece in _flat(turn.parts, after_media="" if preset == "official" else "\n"):
            if isinstance(piece, str):
                text += piece
                continue
            out.add(tokenizer.encode(text, special=False), loss)
            text = ""
            out.add([tokenizer.image_id])
            out.placeholders.append(piece)
            if preset == "official":
                out.add(tokenizer.encode("\n", special=False), loss)
        out.add(tokenizer.encode(text, special=False), loss)
        if continue_final_message and turn is turns[-1]:
            break
        out.add([tokenizer.im_end], loss)
        out.add(tokenizer.encode("\n", special=False))
    if add_generation_prompt:
        out.add([tokenizer.im_start, *tokenizer.encode("assistant\n", special=False)])
    return out


def _check_continued(turns: list[Turn], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise OptionError("add_generation_prompt and continue_final_message contradict each other")
    last = turns[-1]
    if last.role != "assistant" or not _last_text(last):
        raise PromptError(
            "continue_final_message continues the last message, which must be the beginning of an "
            f"answer, a text; the last message is of the {last.role}"
        )


def _last_text(turn: Turn) -> str:
    """The text that ends a message, "" where an image does."""
    piece = turn.parts[-1] if turn.parts else []
    last = piece[-1] if isinstance(piece, list) and piece else ""
    return last if isinstance(last, str) else ""


PLACE, BEGIN, END = "\ue000place\ue001", "\ue002", "\ue003"
LITERALS = {"\ue000image\ue001": IMAGE, "\ue000video\ue001": VIDEO}
"""Marks of preset hf, in private characters: a placeholder in text, the ends of an answer, and an
`<image>` or `<video>` that is text; the marks are as long as these.
"""


def hf_text(
    turns: list[Turn], add_generation_prompt: bool, template: HfTemplate
) -> tuple[str, list[MediaPlaceholder]]:
    """The rendering of the checkpoint's chat template, and its placeholders in order.

    An `<image>` or `<video>` that is text is one of `LITERALS`. Raises PromptError where the
    template's placeholders do not match the media.
    """
    if any(isinstance(p, MediaPlaceholder) and p.name is not None for t in turns for p in t.parts):
        raise OptionError("preset hf has no names of views; use interleave")
    text = template.render(_messages(turns, template, marked=False), add_generation_prompt)
    parts = [part for turn in turns for part in _placeholders(turn, in_text=False)]
    sources = {
        IMAGE: [part for part in parts if not _is_video(part, template)],
        VIDEO: [part for part in parts if _is_video(part, template)],
        PLACE: [part for turn in turns for part in _placeholders(turn, in_text=True)],
    }
    marks: list[str] = re.findall("|".join(sources), text)
    if any(marks.count(mark) != len(places) for mark, places in sources.items()):
        raise PromptError(
            f"the checkpoint's chat template writes {len(marks)} {IMAGE} or {VIDEO} for "
            f"{sum(map(len, sources.values()))} images and videos; use preset interleave"
        )
    rest = {mark: iter(places) for mark, places in sources.items()}
    return text.replace(PLACE, IMAGE), [next(rest[mark]) for mark in marks]


def _is_video(part: MediaPlaceholder, template: HfTemplate) -> bool:
    """Whether the template writes `<video>` for it."""
    return part.kind == "video" and template.has_videos


def _placeholders(turn: Turn, in_text: bool) -> list[MediaPlaceholder]:
    """The placeholders of a message: its parts, or those spelled in its texts."""
    if not in_text:
        return [part for part in turn.parts if isinstance(part, MediaPlaceholder)]
    texts = [part for part in turn.parts if not isinstance(part, MediaPlaceholder)]
    return [piece for text in texts for piece in text if isinstance(piece, MediaPlaceholder)]


def _messages(turns: list[Turn], template: HfTemplate, marked: bool) -> list[dict[str, Any]]:
    """Messages in the form of chat templates; `marked` puts its ends into each answer."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content: list[dict[str, str]] = []
        for part in turn.parts:
            if isinstance(part, MediaPlaceholder):
                content.append({"type": "video" if _is_video(part, template) else "image"})
                continue
            text = "".join(_literal_text(p) if isinstance(p, str) else PLACE for p in part)
            content.append({"type": "text", "text": text})
        if marked and _is_learnt(turn):
            texts = [part for part in content if part["type"] == "text"]
            texts[0]["text"] = BEGIN + texts[0]["text"]
            texts[-1]["text"] += END
        if template.takes_parts:
            messages.append({"role": turn.role, "content": content})
        else:
            pieces = [part.get("text", IMAGE) for part in content]
            messages.append({"role": turn.role, "content": "\n".join(pieces)})
    return messages


def _is_learnt(turn: Turn) -> bool:
    """Whether a message is an answer with loss that has text."""
    text = any(not isinstance(part, MediaPlaceholder) for part in turn.parts)
    return turn.role == "assistant" and bool(turn.loss) and text


def _literal_text(text: str) -> str:
    """A text whose `<image>` and `<video>` are no placeholders."""
    for mark, spelling in LITERALS.items():
        text = text.replace(spelling, mark)
    return text


def _hf(
    tokenizer: Tokenizer,
    turns: list[Turn],
    add_generation_prompt: bool,
    template: HfTemplate,
    continue_final_message: bool,
) -> Rendered:
    text, placeholders = hf_text(turns, add_generation_prompt, template)
    text = text.replace(VIDEO, IMAGE)
    if continue_final_message:  # as transformers does it
        ending = _literal_text(_last_text(turns[-1])).strip()
        text = text[: text.rindex(ending) + len(ending)]
    tokens, starts = tokenizer.encode_with_starts(text, LITERALS)
    if tokens.count(tokenizer.image_id) != len(placeholders):
        raise PromptError(f"the chat template's {IMAGE} are not the tokenizer's {IMAGE} tokens")
    spans = iter(_answers(text, turns, add_generation_prompt, template))
    weights = iter([turn.loss for turn in turns if _is_learnt(turn)])
    first, last = next(spans, (len(text), len(text)))
    weight = next(weights, 0.0)
    loss_mask: list[float] = []
    for token, start in zip(tokens, starts, strict=True):
        while start >= last and last < len(text):
            first, last = next(spans, (len(text), len(text)))
            weight = next(weights, 0.0)
        learnt = first <= start < last and token != tokenizer.image_id
        loss_mask.append(learnt and weight)
    return Rendered(tokens, loss_mask, placeholders)


def _answers(
    text: str, turns: list[Turn], add_generation_prompt: bool, template: HfTemplate
) -> list[tuple[int, int]]:
    """The spans of answers in a rendering, each with the control token that ends it.

    Empty where the template changes answers (it strips them, say): a prompt needs no spans.
    """
    marked = template.render(_messages(turns, template, marked=True), add_generation_prompt)
    written = marked.replace(PLACE, IMAGE).replace(VIDEO, IMAGE)
    if written.replace(BEGIN, "").replace(END, "") != text:
        return []
    spans, at = [], 0
    pieces = re.split(f"([{BEGIN}{END}])", marked)
    for piece in pieces:
        if piece == BEGIN:
            spans.append((at, at))
        elif piece == END and spans:
            spans[-1] = (spans[-1][0], at)
        else:
            at += len(piece)
    return [(a, b + len(IM_END) if text.startswith(IM_END, b) else b) for a, b in spans]


def _noted(parts: ContentParts, notes: Mapping[MediaPlaceholder, str]) -> ContentParts:
    """Parts with the notes behind their media."""
    out: ContentParts = []
    for part in parts:
        if isinstance(part, MediaPlaceholder):
            out += [part, [notes[part]]] if part in notes else [part]
            continue
        pieces: TextPieces = []
        for piece, following in zip(part, [*part[1:], " "], strict=True):
            pieces.append(piece)
            if isinstance(piece, MediaPlaceholder) and piece in notes:
                pieces.append(f"\n{notes[piece]}")
                if isinstance(following, MediaPlaceholder) or not following[0].isspace():
                    pieces.append("\n")
        out.append(pieces)
    return out


def _flat(parts: ContentParts, after_media: str) -> list[str | MediaPlaceholder]:
    """Parts in order, with the separators between them; neighboring texts stay separate pieces."""
    out: list[str | MediaPlaceholder] = []
    for part in parts:
        pieces = [part] if isinstance(part, MediaPlaceholder) else part
        if not pieces:
            continue
        first = pieces[0]
        if out and not (isinstance(first, str) and first[0].isspace()):
            last = out[-1]
            if isinstance(last, MediaPlaceholder):
                out.append(
                    "" if isinstance(first, str) and first[0] in PUNCTUATION else after_media
                )
            elif isinstance(first, str) and not last[-1:].isspace():
                out.append("\n")
        out += pieces
    return [piece for piece in out if piece != ""]
