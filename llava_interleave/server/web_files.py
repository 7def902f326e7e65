"""The static files of the web UI: its modules, what `make web` builds, the demo's images."""

from __future__ import annotations

from pathlib import Path

WEB = Path(__file__).parent / "web"
BUILD = WEB / "build"
"""Made by `make web`: replaces files of the same name in `WEB`. Without it Markdown is plainer."""
DEMO = Path(__file__).parent.parent / "demo_files"


def _files(folder: Path, prefix: str = "/") -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {f"{prefix}{path.name}": path for path in sorted(folder.iterdir()) if path.is_file()}


WEB_FILES = {"/": WEB / "index.html"} | _files(WEB) | _files(BUILD) | _files(DEMO, "/examples/")
"""Files by path. They need no API key."""
WEB_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; font-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
