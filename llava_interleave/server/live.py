"""Live sessions over HTTP: frames are appended and prefilled; questions see the last ones."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from ..chat.live import FrameWindow
from .api_errors import ApiError
from .openai_types import ChatRequest, Live, LiveFrames, LiveRequest, PromptRequest
from .settings import MB, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .models import ServedModels
    from .service import Service

    Upload = Callable[[str], bytes]


@dataclass(slots=True)
class _Session:
    """A session of an API key. bytes: of its decoded frames."""

    model: str | None
    window: FrameWindow
    used: float
    bytes: int = 0
    adding: asyncio.Lock = field(default_factory=asyncio.Lock)


class LiveQuestion(ChatRequest):
    """A chat request whose first user message begins with the frames of a session."""

    _parts: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def turns(self, upload: Upload, settings: Settings) -> list[dict[str, Any]]:
        return _with_frames(super().turns(upload, settings), self._parts)


class _LivePrefill(PromptRequest):
    _parts: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    def turns(self, upload: Upload, settings: Settings) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self._parts}]


class LiveSessions:
    """The sessions of all API keys: of each at most `live_sessions`, and of their decoded frames
    `files_mb` megabytes. A session ends after `live_seconds` without a request."""

    def __init__(self, service: Service | ServedModels) -> None:
        self.service, self.settings = service, service.settings
        self._by_key: dict[str, dict[str, _Session]] = {}

    async def create(self, request: LiveRequest, key: str) -> Live:
        """Raises OptionError where the frames do not fit the context."""
        self._expire()
        sessions = self._by_key.get(key, {})
        if len(sessions) >= self.settings.live_sessions:
            raise ApiError(
                429,
                "live_sessions_exceeded",
                f"this API key has {len(sessions)} live sessions, the most it can have; delete one",
                retry=10,
            )
        if request.keep > self.settings.max_media:
            raise ApiError(
                400,
                "invalid_value",
                f"keep is {request.keep}; this server's limit is {self.settings.max_media} images",
                param="keep",
            )
        async with self.service.use(request.model) as service:
            options = service.options(request)
            times = options.frame_times
            times = service.bot.model.config.arrangement.frame_times if times is None else times
            window = FrameWindow(request.keep, request.least, times)
            await service.run_in_pool(key, lambda: window.check(service.bot, options))
        name = f"live-{secrets.token_hex(12)}"
        self._by_key.setdefault(key, {})[name] = _Session(request.model, window, time.monotonic())
        asyncio.get_running_loop().call_later(self.settings.live_seconds + 1, self._expire)
        return Live(
            id=name, keep=window.keep, least=window.least, expires_after=self.settings.live_seconds
        )

    async def see(self, name: str, key: str, data: bytes, at: float | None) -> LiveFrames:
        """Append a frame and prefill it, unless a newer prefill of the key takes its place."""
        session = self._get(name, key)
        async with session.adding, self.service.use(session.model) as service:
            loader, window = service.bot.processor.loader, session.window
            with service.admission_slot(1, key):
                image = await service.media_pool.run(key, lambda: loader.image(data))
            frames = window.appended(image, at)
            session.bytes = sum(_bytes(one.image.image) for one in frames)
            used = sum(one.bytes for one in self._by_key.get(key, {}).values())
            if used > self.settings.files_mb * MB:
                session.bytes = sum(_bytes(one.image.image) for one in window.frames)
                raise ApiError(
                    413,
                    "live_full",
                    f"the frames would have {used:,} bytes decoded, but an API key has "
                    f"{self.settings.files_mb} MB: send smaller frames, or keep fewer",
                )
            request = _LivePrefill(model=session.model, messages=[{"role": "user"}])
            request._parts = window.parts(frames)
            tokens = None
            try:
                tokens = await service.prefill(request, key)
            except ApiError as error:
                if error.code != "superseded":
                    raise
            window.frames = frames
            session.used = time.monotonic()
        return LiveFrames(frames=len(frames), prefill=tokens)

    def question(self, name: str, key: str, request: LiveQuestion) -> LiveQuestion:
        """The request with the frames of now."""
        session = self._get(name, key)
        if request.model is None:
            request.model = session.model
        request._parts = session.window.parts(session.window.frames)
        return request

    def delete(self, name: str, key: str) -> None:
        """Raises ApiError for a name that this key has not."""
        self._get(name, key)
        del self._by_key[key][name]

    def retain(self, keys: Collection[str]) -> None:
        """Delete the sessions of all other keys."""
        self._by_key = {key: found for key, found in self._by_key.items() if key in keys}

    def _get(self, name: str, key: str) -> _Session:
        self._expire()
        session = self._by_key.get(key, {}).get(name)
        if session is None:
            raise ApiError(
                404,
                "live_not_found",
                f"no such live session: {name[:80]!r}; it ends after "
                f"{self.settings.live_seconds:g} s without a request",
            )
        session.used = time.monotonic()
        return session

    def _expire(self) -> None:
        ended = time.monotonic() - self.settings.live_seconds
        for key, sessions in list(self._by_key.items()):
            for name, session in list(sessions.items()):
                if session.used < ended and not session.adding.locked():
                    del sessions[name]
            if not sessions:
                del self._by_key[key]


def _bytes(image: Any) -> int:
    return image.width * image.height * 3


def _with_frames(turns: list[dict[str, Any]], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with parts at the beginning of the first user message."""
    for turn in turns:
        if turn.get("role") == "user":
            content = turn.get("content")
            text = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turn["content"] = [*parts, *(text if isinstance(text, list) else [text])]
            break
    return turns
