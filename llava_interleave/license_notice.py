"""The license notice of the published checkpoints, shown once per user. Knows no torch."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

NOTICE = """\
License notice: {name} belongs to the LLaVA-NeXT-Interleave family.
Its weights are for research only, not for commercial use: they build on Qwen1.5 under the Tongyi
Qianwen Research License Agreement; see the LICENSE on its model page. This notice is shown once."""

NAMES = re.compile(r"(llava-hf|lmms-lab)(/|--)llava-(next-)?interleave-qwen", re.IGNORECASE)
BASES = re.compile(r"Qwen1\.5-", re.IGNORECASE)
LICENSE = re.compile(r"^license_name:\s*[\"']?tongyi-qianwen", re.IGNORECASE | re.MULTILINE)


def is_published(name: str, folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is one of the published family.

    By its name, its model card, or the base model in its `config` (the content of config.json).
    """
    if NAMES.search(name) or NAMES.search(str(folder)):
        return True
    card = folder / "README.md"
    if card.is_file() and LICENSE.search(card.read_text("utf-8", errors="replace")):
        return True
    return any(
        BASES.search(str(part.get("_name_or_path", "")))
        for part in (config, config.get("text_config") or {})
    )


def state_folder() -> Path:
    """The folder of this user's small persistent state."""
    return platformdirs.user_state_path("llava-interleave", appauthor=False)


def show_once(name: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Print the notice to stderr for a published checkpoint that this user loads first.

    If the home folder is read-only, it is shown every time.
    """
    if not is_published(name, folder, config):
        return
    marker = state_folder() / "license-notice-shown"
    if marker.exists():
        return
    print(NOTICE.format(name=name), file=sys.stderr)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError:
        return
