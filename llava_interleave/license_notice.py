"""The licence notice of the published checkpoints, shown once a user. Knows no torch."""

import json
import os
import re
import sys
from pathlib import Path

NOTICE = """\
Licence notice: {name} belongs to the LLaVA-NeXT-Interleave family. Its weights are for research only, not for commercial use:
they build on Qwen1.5 under the Tongyi Qianwen Research License Agreement, whose terms the LICENSE on its model page gives.
This is shown once."""

NAMES = re.compile(r"(llava-hf|lmms-lab)(/|--)llava-(next-)?interleave-qwen", re.IGNORECASE)
BASES = re.compile(r"Qwen1\.5-", re.IGNORECASE)
LICENCE = re.compile(r"^license_name:\s*[\"']?tongyi-qianwen", re.IGNORECASE | re.MULTILINE)


def official(name: str, folder: Path) -> bool:
    """Whether a checkpoint is one of the published family: by its name, its model card or the base that its config.json names."""
    if NAMES.search(name) or NAMES.search(str(folder)):
        return True
    card, config = folder / "README.md", folder / "config.json"
    if card.is_file() and LICENCE.search(card.read_text("utf-8", errors="replace")):
        return True
    if not config.is_file():
        return False
    written = json.loads(config.read_text("utf-8"))
    return any(
        BASES.search(str(part.get("_name_or_path", "")))
        for part in (written, written.get("text_config") or {})
    )


def state_folder() -> Path:
    """Where this user's small remembered things live: the platform's state folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "llava-interleave"


def show_once(name: str, folder: Path) -> None:
    """Write the notice to stderr if the checkpoint is official and this user has not seen it. An unwritable home is no error."""
    if not official(name, folder):
        return
    seen = state_folder() / "licence-notice-shown"
    if seen.exists():
        return
    print(NOTICE.format(name=name), file=sys.stderr)
    try:
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.touch()
    except OSError:
        return  # shown again next time
