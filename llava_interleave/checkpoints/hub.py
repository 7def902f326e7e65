"""Where a checkpoint is: a local folder, or a repository of the Hugging Face hub that is fetched
into its cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, OptionError

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
    if isinstance(name_or_folder, Path) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise CheckpointError(
            f"there is no folder {name}; a name on the Hugging Face hub looks like owner/model"
        )
    return _fetch(name, revision, _SETTINGS + _TENSORS * tensors, endpoint, cache)


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
