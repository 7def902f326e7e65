"""Seconds and bytes to a first answer on a machine without a compiler, next to other packages.

    make dist
    sudo python bench/install.py build/install dist/*.whl --out build/install.json
    sudo python bench/install.py build/install dist/*.whl --systems openvino --model openvino=FOLDER

The machine is a Debian root with Python and nothing else (debootstrap), entered by chroot. Each
system is downloaded, then installed from the downloaded files into a virtual environment, then
started with nothing in the page cache. `llava` also runs `llava demo` and checks that its kernels
are there: a failure ends with 1. --model gives a folder of `bench/make_checkpoint.py` or made from
one, for the answer about one image. --bind makes folders of this machine visible, for pip's files.
Needs root; Linux only. PIP_* variables are passed on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
CLONE_NEWNS, MS_BIND_REC, MS_PRIVATE_REC = 0x20000, 0x5000, 0x44000
"""linux/sched.h, linux/mount.h"""
DEMO = "demo --folder /tmp/demo"
ASK = ["ask", "-a", "/tmp/demo/before.png", "-a", "/tmp/demo/after.png", "What changed?"]
CHAT = [{"type": "image", "path": "/tmp/demo/before.png"}, {"type": "text", "text": "Describe it."}]
QUESTION = json.dumps({"chats": [[{"role": "user", "content": CHAT}]], "tokens": 1})


@dataclass(frozen=True)
class System:
    """requirements: what a user installs. how: arguments of bench/systems.py after the folder."""

    name: str
    requirements: tuple[str, ...]
    how: tuple[str, ...]


def systems(wheel: Path) -> dict[str, System]:
    ours = (f"/wheel/{wheel.name}",)
    return {
        "llava": System("llava", ours, ("int4", "kv8")),
        "llava-without-kernels": System("llava", ours, ("int4",)),
        "transformers": System("transformers", ("torch", "transformers", "pillow"), ("bfloat16",)),
        "openvino": System("openvino", ("openvino-genai", "pillow"), ("int4",)),
        "llamacpp": System("llamacpp", ("llama-cpp-python", "pillow"), ("q4_0", "8192", "no-amx")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="The root and the downloads are kept in it.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--systems", nargs="+", default=["llava"])
    parser.add_argument("--model", action="append", default=[], metavar="SYSTEM=FOLDER")
    parser.add_argument("--constraints", type=Path, default=BENCH.parent / "constraints.txt")
    parser.add_argument("--bind", nargs="*", default=[], type=Path)
    parser.add_argument("--download-only", action="store_true")
    parser.add_argument("--times", type=int, default=3, help="Cold starts of each.")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    root = make_root(given.folder.resolve() / "root")
    enter_mounts(root, given)
    models = dict(one.split("=", 1) for one in given.model)
    found: dict[str, Any] = {}
    for name in given.systems:
        found[name] = measure(root, name, systems(given.wheel)[name], models, given)
        print(name, json.dumps(found[name]), flush=True)
    if given.out:
        kept = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps(kept | found, indent=1) + "\n")
    if any("failed" in one for name, one in found.items() if name == "llava"):
        sys.exit(1)


def make_root(root: Path) -> Path:
    """Debian with Python, certificates and no compiler."""
    if not (root / "usr/bin/python3").exists():
        root.mkdir(parents=True, exist_ok=True)
        packages = "python3,python3-venv,ca-certificates"
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--include={packages}",
            "bookworm",
            str(root),
        ]
        subprocess.run(command, check=True)
    for name in ("c++", "g++", "clang++", "cc"):
        assert not (root / "usr/bin" / name).exists(), name
    return root


def enter_mounts(root: Path, given: argparse.Namespace) -> None:
    """Mount what the root needs, in a namespace of this process that ends with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        sys.exit(f"needs root: {os.strerror(ctypes.get_errno())}")
    libc.mount(b"none", b"/", None, MS_PRIVATE_REC, None)
    models = [one.split("=", 1) for one in given.model]
    inside = {
        **{Path(name): Path(name) for name in ("/proc", "/dev", "/sys", *given.bind)},
        Path("/wheel"): given.wheel.parent,
        Path("/bench"): BENCH,
        **{Path("/models") / name: Path(folder) for name, folder in models},
    }
    for to, source in inside.items():
        target = root / to.relative_to("/")
        target.mkdir(parents=True, exist_ok=True)
        if libc.mount(os.fsencode(source.resolve()), os.fsencode(target), None, MS_BIND_REC, None):
            sys.exit(f"cannot mount {source}: {os.strerror(ctypes.get_errno())}")
    for name in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):
        shutil.copyfile(name, root / name[1:])
    shutil.copyfile(given.constraints, root / "constraints.txt")


def run(root: Path, *command: str, stdin: str = "") -> dict[str, Any]:
    """One command in the root: wall seconds, CPU seconds, its output, and the end of its errors if
    it failed."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        ["chroot", root, *command],
        input=stdin,
        text=True,
        capture_output=True,
        env={**kept, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(used, 2),
        "output": done.stdout,
    }
    return result | ({"failed": done.stderr.strip()[-300:]} if done.returncode else {})


def size(folder: Path) -> float:
    """MB on disk, in files."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return round(sum(path.stat().st_size for path in files) / 1e6, 1)


def measure(
    root: Path, name: str, system: System, models: dict[str, str], given: argparse.Namespace
) -> dict[str, Any]:
    """A row: megabytes and seconds of the installation, and seconds of cold first answers."""
    files, environment = f"/downloads/{system.name}", f"/opt/{name}"
    pip = f"{environment}/bin/pip"
    found: dict[str, Any] = {}
    kept = ["--quiet", "-c", "/constraints.txt"]
    shutil.rmtree(root / environment[1:], ignore_errors=True)
    run(root, "python3", "-m", "venv", environment)
    if not (root / files[1:]).is_dir():
        made = run(root, pip, "download", *kept, "-d", files, *system.requirements)
        if "failed" in made:
            shutil.rmtree(root / files[1:], ignore_errors=True)
            return {"failed": made["failed"]}
    found["download_mb"] = size(root / files[1:])
    if given.download_only:
        return found
    empty = size(root / environment[1:])
    offline = ["--no-index", "--find-links", files]
    made = run(root, pip, "install", *kept, *offline, *system.requirements)
    if "failed" in made:
        return found | {"failed": made["failed"]}
    found |= {f"install_{key}": made[key] for key in ("seconds", "cpu_seconds")}
    found["installed_mb"] = round(size(root / environment[1:]) - empty, 1)
    python = f"{environment}/bin/python"
    if name.endswith("without-kernels"):
        [lib] = (root / environment[1:]).glob("lib/*/site-packages/llava_interleave/kernels/lib")
        shutil.rmtree(lib)
    if system.name == "llava":
        found |= check(root, environment, kernels=name == "llava")
        if "failed" in found:
            return found
        found["builtin"] = cold([f"{environment}/bin/llava", *ASK], root, "", given.times)
    if system.name in models:
        words = ["/bench/systems.py", system.name, f"/models/{system.name}", *system.how]
        found["model_mb"] = size(Path(models[system.name]))
        found["half_billion"] = cold([python, *words], root, QUESTION, given.times)
    return found


def check(root: Path, environment: str, *, kernels: bool) -> dict[str, Any]:
    """`llava demo` answers all of its questions, with kernels or, without them, with PyTorch."""
    code = "from llava_interleave import kernels; print(kernels.unavailable_reason())"
    reason = run(root, f"{environment}/bin/python", "-c", code)["output"].strip()
    if (reason == "None") is not kernels:
        return {"failed": f"kernels: {reason}"}
    demo = run(root, f"{environment}/bin/llava", *DEMO.split())
    right = re.findall(r"^\d+ of \d+.*", demo["output"], re.MULTILINE)
    return {"demo": right} | ({"failed": demo["failed"]} if "failed" in demo else {})


def cold(command: list[str], root: Path, stdin: str, times: int) -> dict[str, Any]:
    """The command `times` times, each with nothing in the page cache."""
    found = []
    for _ in range(times):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        found.append(run(root, *command, stdin=stdin))
        if "failed" in found[-1]:
            return {"failed": found[-1]["failed"]}
    return {
        "seconds": sorted(one["seconds"] for one in found),
        "cpu_seconds": sorted(one["cpu_seconds"] for one in found),
    }


if __name__ == "__main__":
    main()
