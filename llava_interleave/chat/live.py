"""Live sessions: append frames as they come, ask at any time."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..engine import Usage
from ..errors import OptionError, PromptError
from ..options import Options
from ..processing import PreparedImage
from .table import REASON_TOKENS, TOP, alternatives, find_verdict

if TYPE_CHECKING:
    from .chatbot import Chatbot
    from .detokenize import Answer, AnswerDelta


@dataclass(frozen=True, slots=True)
class LiveFrame:
    """A frame of a session, and its time in seconds, if it was given."""

    image: PreparedImage
    at: float | None


class FrameWindow:
    """The last frames of a stream, and the messages of a question about them.

    times: the time of each frame is written before it. When `keep` frames are there, the oldest go
    until `least` are left.
    """

    def __init__(self, keep: int, least: int, times: bool) -> None:
        if type(keep) is not int or type(least) is not int or not 0 < least < keep:
            raise OptionError(
                f"keep and least are numbers of frames, 0 < least < keep, not {keep!r} and "
                f"{least!r}"
            )
        self.keep, self.least, self.times = keep, least, times
        self.frames: tuple[LiveFrame, ...] = ()

    def appended(self, image: Image.Image, at: float | None) -> tuple[LiveFrame, ...]:
        """The frames with one more, without the oldest if there are too many."""
        if self.times and at is None:
            raise OptionError("with frame_times every frame needs its time: at, in seconds")
        full = len(self.frames) == self.keep
        kept = self.frames[self.keep - self.least + 1 :] if full else self.frames
        return (*kept, LiveFrame(PreparedImage(image), at))

    def parts(self, frames: tuple[LiveFrame, ...]) -> list[dict[str, Any]]:
        """The frames as parts of a message."""
        parts: list[dict[str, Any]] = []
        for frame in frames:
            if self.times:
                parts.append({"type": "text", "text": f"{frame.at:.2f}s"})
            parts.append({"type": "image", "image": frame.image})
        return parts

    def check(self, bot: Chatbot, options: Options) -> None:
        """Raises `OptionError` where `keep` frames have no room next to a question."""
        size = bot.model.config.vision.image_size
        frame = LiveFrame(PreparedImage(Image.new("RGB", (size, size))), 0.0)
        one, all_frames = (
            bot.estimate([{"role": "user", "content": self.parts((frame,) * count)}], options)
            for count in (1, self.keep)
        )
        room = all_frames.left - (options.max_new_tokens or 1)
        if room < 0:
            tokens = (all_frames.total - one.total) // (self.keep - 1)
            raise OptionError(
                f"keep={self.keep} frames are {all_frames.total:,} tokens, but the context is "
                f"{all_frames.context:,}: keep at most {self.keep + room // tokens}, or pool their "
                "tokens (image_token_pool)"
            )


class LiveSession:
    """The last frames of a stream, prefilled as they come.

    The prompt is the system prompt, the frames, then the question: a question about `frames` is
    `Chatbot.chat` of `messages(question)`, and gives its answer whatever was seen and asked before.
    When `keep` frames are there, the oldest go until `least` are left, and those are prefilled
    again, from cached image features. So a frame takes its encoding and 1 + least / (keep - least)
    times its prefill on average, and memory is bounded.

    Several threads may use a session: a question sees the frames whose prefill has ended.
    """

    def __init__(self, bot: Chatbot, keep: int, least: int, options: Options) -> None:
        times = options.frame_times
        times = bot.model.config.arrangement.frame_times if times is None else times
        self.bot, self.options, self.window = bot, options, FrameWindow(keep, least, times)
        self._adding = threading.Lock()
        self.window.check(bot, options)

    @property
    def frames(self) -> tuple[LiveFrame, ...]:
        """The frames that a question sees."""
        return self.window.frames

    def see(self, frame: object, at: float | None = None) -> Usage:
        """Append a frame, an image as of `Chatbot.ask`, and prefill it.

        at: its time in seconds, which `frame_times` writes into the prompt. A frame that cannot be
        read raises `MediaError` and leaves the session as it is.
        """
        image = self.bot.processor.loader.image(frame)
        with self._adding:
            frames = self.window.appended(image, at)
            content = self.window.parts(frames)
            usage = self.bot.prefill([{"role": "user", "content": content}], self.options)
            self.window.frames = frames
        return usage

    def ask(self, question: str, **changes: object) -> Answer:
        """Ask about the frames. Keywords: fields of `Options`."""
        return self.bot.chat(self.messages(question), self.options, **changes)

    def probability(self, question: str) -> float:
        """The probability of yes against no as the answer to a yes/no question.

        Raises `PromptError` if the model says neither.
        """
        answer = self.ask(
            question, logprobs=TOP, temperature=0.0, stop="\n", max_new_tokens=REASON_TOKENS
        )
        found = find_verdict(alternatives(answer.logprobs or (), self.bot.processor.tokenizer))
        if found is None:
            raise PromptError(
                f"the answer to {question!r} is {answer.text[:80]!r}, and nowhere in it yes and no "
                "have half of the probability: ask a yes/no question"
            )
        return found[0] / sum(found)

    def stream(self, question: str, **changes: object) -> Generator[AnswerDelta]:
        """As `ask`, in deltas."""
        return self.bot.stream(self.messages(question), self.options, progress=None, **changes)

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The messages of a question about the frames of now."""
        text = {"type": "text", "text": question}
        return [{"role": "user", "content": [*self.window.parts(self.frames), text]}]
