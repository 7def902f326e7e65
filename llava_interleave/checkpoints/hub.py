"""Where a checkpoint is: a local folder, or a repository of the Hugging Face hub that is fetched
into its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ..errors import CheckpointError, OptionError
from .published import PUBLISHED

PHOTOS = "photos"
"""The name of the model that `compose.photos` makes on this machine."""
# Code and pickles are never fetched, nor anything in subfolders (ONNX exports, training states).
_SETTINGS, _TENSORS = ["*.json", "*.jinja", "merges.txt"], ["*.safetensors"]


def resolve(
    name_or_folder: str | Path,
    revision: str | None = None,
    *,
    tensors: bool = True,
    endpoint: str | None = None,
    cache: str | Path | None = None,
) -> Path:
    """The folder of a checkpoint: `name_or_folder` itself where it is one, else the hub's
    repository of this name.

    revision: branch, tag or commit on the hub; of the files only JSON, safetensors and tokenizer
    files are fetched, and with tensors=False no safetensors.
    endpoint, cache: another hub's URL and another cache folder than huggingface_hub's own.
    """
    name = str(name_or_folder)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if revision is not None:
            raise OptionError(
                f"revision={revision!r} is for the hub, but {folder} is a local folder"
            )
        return folder
    if name and folder.exists():
        raise CheckpointError(
            f"{folder} is a file; give the folder that holds config.json and the safetensors"
        )
    if name_or_folder == PHOTOS and photos_folder().is_dir():
        return photos_folder()
    if not isinstance(name_or_folder, Path):
        name = repository(name)
    if isinstance(name_or_folder, Path) or name.startswith(("/", ".", "~")):
        raise CheckpointError(f"there is no folder {name}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(
            f"there is no folder {name}; a name on the Hugging Face hub looks like owner/model, "
            "`llava pull photos` makes the model photos, "
            f"published checkpoints have the names {', '.join(PUBLISHED)}"
        )
    return _fetch(name, revision, _SETTINGS + _TENSORS * tensors, endpoint, cache)


def photos_folder() -> Path:
    """Where `photos` is, or will be; another adapter has another number."""
    return platformdirs.user_cache_path("llava-interleave", appauthor=False) / "photos-3"


def photos_folders() -> list[Path]:
    """All folders of `photos` on this machine, those of earlier adapters too."""
    return sorted(photos_folder().parent.glob("photos-[0-9]*"))


def repository(name: str) -> str:
    """The repository of a published checkpoint's short name; any other name as it is."""
    return PUBLISHED.get(name.lower(), name)


@dataclass(frozen=True, slots=True)
class Cached:
    """A checkpoint in the hub's cache. size: bytes. used: seconds since the epoch."""

    name: str
    size: int
    used: float
    revisions: tuple[str, ...]


def cached() -> list[Cached]:
    """The checkpoints in the hub's cache, last used first: repositories with safetensors."""
    from huggingface_hub import errors, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except errors.CacheNotFound:
        return []
    found = [
        Cached(
            repo.repo_id,
            repo.size_on_disk,
            repo.last_accessed,
            tuple(sorted(revision.commit_hash for revision in repo.revisions)),
        )
        for repo in repos
        if repo.repo_type == "model"
        and any(
            file.file_name.endswith(".safetensors")
            for revision in repo.revisions
            for file in revision.files
        )
    ]
    return sorted(found, key=lambda entry: -entry.used)


def find_cached(name: str) -> Cached:
    """A checkpoint of the cache by its name. Raises CheckpointError."""
    known = cached()
    entry = next((entry for entry in known if entry.name == repository(name)), None)
    if entry is None:
        names = ", ".join(entry.name for entry in known) or "none"
        raise CheckpointError(f"{repository(name)} is not downloaded; in the cache: {names}")
    return entry


def remove(entry: Cached) -> None:
    """Delete a checkpoint from the cache."""
    from huggingface_hub import scan_cache_dir

    scan_cache_dir().delete_revisions(*entry.revisions).execute()


def _fetch(
    name: str,
    revision: str | None,
    files: list[str],
    endpoint: str | None,
    cache: str | Path | None,
) -> Path:
    from huggingface_hub import errors, snapshot_download

    by_hand = f"or fetch it elsewhere (hf download {name} --local-dir FOLDER) and give the folder"
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                endpoint=endpoint,
                cache_dir=cache,
                allow_patterns=files,
                ignore_patterns=["*/*"],
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its terms on the hub and log in with `hf auth login`, "
            f"{by_hand}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no {name} that you may see, and there is no such local folder: check "
            "the spelling, "
            f"log in with `hf auth login` if it is private, {by_hand}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {revision!r}; give a branch, a tag or a commit of it"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name} is not in the cache and the hub cannot be reached: connect once, {by_hand}"
        ) from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:  # type: ignore[attr-defined]  # httpx's or httpx2's
        raise CheckpointError(
            f"fetching {name} failed ({type(error).__name__}): try again, {by_hand}"
        ) from error
