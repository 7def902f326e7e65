"""Which keys of a sample and of its messages are read, and what happens to all others.

No key that could change the training is dropped silently: it is refused by name, also where it is
a misspelt one. Other unknown keys are reported once for each data set.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

MEDIA = ("image", "images", "image_path", "video", "videos")
META = ("id", "sample_id", "metadata", "system", "kto_label")
WEIGHTS = ("weight", "sample_weight", "loss_weight")
"""Keys for the weight of a sample's loss; those that are there are multiplied."""
READ = (
    *META,
    *MEDIA,
    *WEIGHTS,
    *("conversations", "messages", "prompt", "completion", "question"),
    *("instruction", "input", "output", "query", "response", "history"),
    *("chosen", "rejected", "rejected_response", "rejected_messages"),
)
READ_IN_MESSAGES = ("role", "from", "content", "value", "loss", "train", "weight", "name")
NOTES = (
    *("source", "dataset", "task", "category", "type", "split", "language", "license", "url"),
    *("ds_name", "idx", "index", "width", "height", "text", "answer"),
)
"""Keys that say something about a sample; they are ignored without a remark."""
OUT = "take it out"
REFUSED: Mapping[str, str] = {
    "tools": f"tool calls are not supported: {OUT}",
    "functions": f"tool calls are not supported: {OUT}",
    "audio": "there is no audio encoder: leave the sample out",
    "audios": "there is no audio encoder: leave the sample out",
    "system_prompt": "name it `system`",
    "kto_tag": "it is for the recipe kto",
    "label": f"it is for the recipe kto: {OUT} for others",
    "loss": "leave the sample out, or put `loss` into its messages",
    "train": "leave the sample out, or put `train` into its messages",
    "weights": "name it `weight`, a number",
    "loss_scale": "name it `weight`, a number",
    "margin": f"pairs have no margins: {OUT}",
    "objects": f"grounding is not supported: write boxes into the texts, or {OUT}",
    "bbox": f"grounding is not supported: write boxes into the texts, or {OUT}",
}
REFUSED_IN_MESSAGES: Mapping[str, str] = {
    "tool_calls": f"tool calls are not supported: {OUT}",
    "function_call": f"tool calls are not supported: {OUT}",
    "tool_call_id": f"tool calls are not supported: {OUT}",
    "audio": "there is no audio encoder: leave the sample out",
    "images": "name images as content parts, or in the sample's `images`",
    "videos": "name videos as content parts, or in the sample's `videos`",
    "reasoning_content": f"reasoning is not supported: write it into the content, or {OUT}",
    "reasoning": f"reasoning is not supported: write it into the content, or {OUT}",
    "thinking": f"reasoning is not supported: write it into the content, or {OUT}",
    "train_detail": f"parts of a message have no loss of their own: {OUT}",
    "training_detail": f"parts of a message have no loss of their own: {OUT}",
    "loss_scale": "name it `weight`, a number",
}
MEDIA_NAMES = ("image", "img", "picture", "photo", "video", "clip", "frame", "audio")
MEDIA_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".wav", ".mp3", ".flac"),
)


def refused(row: Mapping[str, Any], *, message: bool = False) -> Iterator[tuple[str, str]]:
    """Keys of a sample, or of one of its messages, that cannot be honoured, each with a reason."""
    known, reasons = (READ_IN_MESSAGES, REFUSED_IN_MESSAGES) if message else (READ, REFUSED)
    for key, value in row.items():
        if key in known or _is_empty(key, value):
            continue
        if key in reasons:
            yield key, reasons[key]
        elif key not in NOTES and (meant := _misspelt(key, known)):
            yield key, f"it is not read; did you mean `{meant}`?"
        elif (
            key.lower().startswith(MEDIA_NAMES)
            and _looks_like_media(value)
            and not _names(value) <= {name for key in MEDIA for name in _names(row.get(key))}
        ):
            yield key, f"it is not read: name it `image`, `images`, `video` or `videos`, or {OUT}"


def ignored(row: Mapping[str, Any], used: Collection[str]) -> set[str]:
    """Keys that are not `used` and need not be: they get a remark."""
    return {
        key
        for key, value in row.items()
        if key not in used and key not in REFUSED and key not in NOTES and value is not None
    }


def _is_empty(key: str, value: Any) -> bool:
    """Whether a value asks for nothing: empty columns of tables, a weight of 1, `loss: true`."""
    if key == "label":  # KTO's is a truth value; others name a class
        return not isinstance(value, bool)
    if key in ("loss", "train", "weights", "loss_scale"):
        return value is None or value == 1
    return value is None or value in ("", "[]", "{}") or (not value and value is not False)


def _misspelt(key: str, known: Collection[str]) -> str | None:
    """The known key that this one misspells, if it is as long but for one letter."""
    if key.lower() in known:
        return key.lower()
    near = [one for one in known if min(len(key), len(one)) > 4 and abs(len(key) - len(one)) <= 1]
    ratios = {one: SequenceMatcher(None, key.lower(), one).ratio() for one in near}
    best = max(ratios, key=ratios.__getitem__, default=None)
    return best if best and ratios[best] >= 0.8 else None


def _names(value: Any) -> set[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return {Path(one).name for one in values if isinstance(one, str | Path)}


def _looks_like_media(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_looks_like_media, value))
    if isinstance(value, Mapping):
        return bool({"bytes", "path", "url"} & value.keys())
    return isinstance(value, bytes) or (
        isinstance(value, str) and value.lower().endswith(MEDIA_SUFFIXES)
    )
