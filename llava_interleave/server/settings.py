"""The operator's settings of a server: flags and documentation come from these fields."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..options import unknown

if TYPE_CHECKING:
    from ..config import LlavaConfig
    from ..processing import Limits

MB = 1_000_000
ACCESS_LOG_FORMATS = ("json", "text", "off")


def _setting(default: Any, sentence: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": sentence})


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """The model of a cluster's replicas. Names are those that all machines know."""

    name: str | None
    revision: str | None
    precision: str
    device: str
    batch_invariant: bool
    adapters: tuple[tuple[str, str], ...]
    generation_config: str
    log_level: int
    kv_precision: str = "auto"
    gpu_memory: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Addresses, authentication and limits of a server."""

    host: str = _setting(
        "127.0.0.1", "Address to listen on; an address other than loopback needs --api-keys."
    )
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.")
    api_keys: Path | None = _setting(  # noqa: RUF009  a field
        None,
        "File of API keys, a line each: KEY [NAME] [weight=N]; all routes but /health and the web "
        "UI then need one. SIGHUP reads it again.",
    )
    forwarded_allow_ips: str = _setting(
        "127.0.0.1",
        "Proxies whose X-Forwarded-For is the client's address in the access log, with commas.",
    )
    access_log: str = _setting("json", "A line for each request on stderr: json, text or off.")
    otlp_traces_endpoint: str | None = _setting(
        None,
        "Send OpenTelemetry traces here: http://localhost:4318/v1/traces; needs the extra otel.",
    )
    name: str | None = _setting(
        None, "Name of the model in requests. Default: the name of its folder."
    )
    preset: str = _setting("interleave", "Chat template: interleave, hf or official.")
    cors_origin: tuple[str, ...] = _setting(
        (),
        "Let web pages of this origin use the API: https://app.example.com, or * with --api-keys; "
        "can be given several times.",
    )
    media_root: Path | None = _setting(  # noqa: RUF009  a field
        None, "Let requests name files below this folder. Default: no files."
    )
    allow_host: tuple[str, ...] = _setting(
        (),
        "Fetch media from this host: images.example.com, *.example.com, host:port, or * for all; "
        "can be given several times.",
    )
    max_loaded_models: int = _setting(
        2, "Of several models, so many are in memory at a time; the idlest one makes room."
    )
    max_requests: int = _setting(
        32, "Answers running or waiting at a time; a further request gets 503."
    )
    media_workers: int = _setting(
        2, "Threads that fetch and decode media; one more is reserved for idle API keys."
    )
    max_connections: int = _setting(256, "Open connections; a further one gets 503.")
    requests_per_minute: int = _setting(
        600, "Rate limit of each API key, or of all clients without keys; over it: 429."
    )
    tokens_per_minute: int | None = _setting(
        None, "Rate limit of each API key in tokens of prompts and answers; over it: 429."
    )
    max_body_mb: int = _setting(64, "Largest request body in megabytes.")
    request_timeout: float = _setting(
        30.0, "Seconds for a client to send a request, and to accept each part of the response."
    )
    max_parts: int = _setting(512, "Messages and content parts in a request.")
    max_characters: int = _setting(500_000, "Characters of text in a request.")
    max_media: int = _setting(32, "Images and videos in a request.")
    media_mb: int = _setting(100, "Megabytes of one image or video.")
    image_megapixels: int = _setting(32, "Megapixels of one image or video frame.")
    media_megapixels: int = _setting(500, "Megapixels decoded for one request.")
    video_frames: int = _setting(64, "Frames sampled from one video.")
    video_seconds: float = _setting(3600.0, "Length of a video in seconds.")
    media_timeout: float = _setting(30.0, "Seconds for one download, and for decoding one video.")
    prepare_timeout: float = _setting(
        120.0, "Seconds for fetching and decoding all media of a request."
    )
    max_tokens: int = _setting(4096, "Tokens of an answer.")
    max_attribution_tokens: int = _setting(
        65_536, "Tokens that one attribution request may run through the model."
    )
    max_choices: int = _setting(8, "Answers to one request (n).")
    files_mb: int = _setting(256, "Megabytes of uploaded files in memory for each API key.")
    max_table_cells: int = _setting(4096, "Cells of a table (/v1/images/table): images x columns.")
    live_sessions: int = _setting(4, "Live sessions (/v1/live) of each API key.")
    live_seconds: float = _setting(300.0, "Seconds without a request that end a live session.")
    batch_dir: Path | None = _setting(  # noqa: RUF009  a field
        None,
        "Folder of batches (/v1/batches) and their files, which a later server goes on with. "
        "Default: a temporary one.",
    )
    batch_mb: int = _setting(256, "Megabytes of batch files on disk for each API key.")
    sse_keepalive: float = _setting(
        15.0, "Seconds without a token after which a stream sends a comment."
    )
    shutdown_timeout: float = _setting(
        30.0, "Seconds for running answers to finish when the server stops."
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                isinstance(value, int | float)
                and not value > 0
                and field.name not in ("port", "shutdown_timeout")
            ):
                raise OptionError(
                    f"--{field.name.replace('_', '-')} must be above 0, not {value!r}"
                )
        if not 0 <= self.port < 65536:
            raise OptionError(f"--port is a number from 0 to 65535, not {self.port}")
        if self.api_keys is None and not self.local:
            raise OptionError(
                f"{self.host} can be reached from outside this machine, which needs API keys: "
                "name a file of them with --api-keys, or use 127.0.0.1"
            )
        if self.api_keys is None and "*" in self.cors_origin:
            raise OptionError("--cors-origin * lets every web page in, which needs --api-keys")
        if self.access_log not in ACCESS_LOG_FORMATS:
            raise unknown("--access-log", self.access_log, ACCESS_LOG_FORMATS)
        if self.media_root is not None and not self.media_root.is_dir():
            raise OptionError(f"--media-root {self.media_root} is not a folder")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def limits(self, config: LlavaConfig | None = None) -> Limits:
        """Limits of the media of requests, for a model those of its context."""
        from ..processing import Limits

        limits = Limits(
            allow_local_files=self.media_root is not None,
            media_root=self.media_root,
            allow_remote=bool(self.allow_host),
            remote_hosts=self.allow_host,
            image_bytes=self.media_mb * MB,
            video_bytes=self.media_mb * MB,
            image_pixels=self.image_megapixels * MB,
            decoding_pixels=2 * self.image_megapixels * MB,
            prompt_media=self.max_media,
            prompt_pixels=self.media_megapixels * MB,
            video_seconds=self.video_seconds,
            video_frames=self.video_frames,
            decoded_frames=10_000,
            video_work_seconds=self.media_timeout,
            download_seconds=self.media_timeout,
        )
        if config is None:
            return limits
        frames = config.text.context // config.vision.grid**2
        return dataclasses.replace(limits, prompt_frames=max(1, frames))
