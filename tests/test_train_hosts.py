"""Two hosts, as network namespaces: the documented torchrun command, and a process that is killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from llava_interleave.testing import tiny_checkpoint
from llava_interleave.train import ray_hosts, recipe
from llava_interleave.train.run import run

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Namespaces node1 and node2. As on Debian, the name of node2 is a loopback address there."""
    if not os.environ.get("LLAVA_TEST_HOSTS"):
        pytest.skip("takes two minutes of CPU, and time-outs count: set LLAVA_TEST_HOSTS=1")
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and iproute2")
    names = [f"llava-{os.getpid()}-{number}" for number in (1, 2)]
    node1 = "127.0.0.1 localhost\n10.231.0.1 node1\n"
    files = [Path("/etc/netns", name, "hosts") for name in names]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces: {error.stderr}")
        ends = [("peer1", "netns", names[0]), ("peer2", "netns", names[1])]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for number, (name, file) in enumerate(zip(names, files, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.231.0.{number}/24", "dev", f"peer{number}")
            for link in ("lo", f"peer{number}"):
                ip("-n", name, "link", "set", link, "up")
            file.parent.mkdir(parents=True)
            more = "10.231.0.2 node2\n" if number == 1 else "127.0.1.1 node2\n"
            file.write_text(node1 + more)
        yield names
    finally:
        for name, file in zip(names, files, strict=True):
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in listed.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(file.parent, ignore_errors=True)


def worker(host: str) -> int:
    """The training process on a host."""
    listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True).stdout
    (pid,) = (
        int(pid)
        for pid in listed.split()
        if (words := Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))[3:4]
        == [b"llava_interleave"]
        and b"torch.distributed.run" not in words
    )
    return pid


def data(folder: Path) -> Path:
    path = folder / "m4.json"
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": "What?"},
                                    {"role": "assistant", "content": f"Number {n}." * (1 + n % 3)}]}
        for n in range(12)
    ]  # fmt: skip
    path.write_text(json.dumps(rows))
    return path


SETTINGS = {"tokens": 60, "workers": 0, "save_every": 3, "log_every": 1}


def flags(steps: int) -> list[str]:
    settings = {**SETTINGS, "steps": steps}
    words = [word for name in settings for word in (f"--{name.replace('_', '-')}", settings[name])]
    return [*map(str, words), "--no-bfloat16"]


def assert_as_alone(out: Path, model: Path, steps: int) -> None:
    """The losses of a run are those of one process."""
    folder = out.with_name("alone")
    changes = {**SETTINGS, "steps": steps, "model": str(model), "source": out.with_name("m4.json")}
    one = recipe.read(recipe.find("interleave")).but(
        {**changes, "grad_accum_steps": 16, "bfloat16": False}
    )
    run(one, folder, log=lambda _: None)
    for number, (mine, alone) in enumerate(zip(lines(out), lines(folder), strict=True), 1):
        assert mine["step"] == alone["step"] == number
        assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_process_of_another_host_is_started_again_and_nothing_is_lost(
    hosts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, out = tiny_checkpoint(tmp_path / "instructed" / "model"), tmp_path / "out"
    data(tmp_path)
    (block,) = re.findall(r"^\$ (torchrun [^`]*--rdzv-id[^`]*)^```", PAGE.read_text(), re.M)
    command = block.replace("\\\n", " ").replace("--nproc-per-node 8", "--nproc-per-node 1")
    words = shlex.split(command)[1:]
    words[words.index("-o") + 1] = str(out)
    python = [sys.executable, "-m", "torch.distributed.run"]
    begun = []
    for number, host in enumerate(hosts, 1):
        named = ["unshare", "--uts", "sh", "-c", f'hostname node{number}; exec "$@"', "sh"]
        whole = ["ip", "netns", "exec", host, *named, *python, *words, *flags(40)]
        with (tmp_path / f"node{number}").open("w") as file:
            begun.append(subprocess.Popen(whole, stdout=file, stderr=subprocess.STDOUT))
    patience = time.monotonic() + 120
    while len(lines(out)) < 5 and time.monotonic() < patience:
        time.sleep(0.02)
    killed = worker(hosts[1])
    os.kill(killed, signal.SIGKILL)
    said = "".join((tmp_path / f"node{number}").read_text() for number in (1, 2))
    assert [process.wait(timeout=120) for process in begun] == [0, 0], said
    said = "".join((tmp_path / f"node{number}").read_text() for number in (1, 2))
    assert "rank 0 of 2 on node1 lost another process" in said
    assert_as_alone(out, model, 40)


def test_hosts_that_ray_reserves_train_as_one_process_does(
    hosts: list[str], tmp_path: Path
) -> None:
    """A Ray cluster of two hosts with one core each, started as by hand."""
    pytest.importorskip("ray")
    model, out = tiny_checkpoint(tmp_path / "model"), tmp_path / "out"
    about = {"RAY_ADDRESS": "10.231.0.1:6379", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": 32 * "t"}
    about |= {"RAY_DEDUP_LOGS": "0", "LOGLEVEL": "INFO"}
    with TemporaryDirectory(prefix="ray", dir="/tmp") as short:  # for the names of sockets
        own_disk = ["sh", "-c", f'mount -t tmpfs none {short} && exec "$@"', "sh"]

        def on(number: int, module: str, *words: object) -> str:
            command = [*own_disk * number, sys.executable, "-m", module, *map(str, words)]
            done = subprocess.run(
                ["ip", "netns", "exec", hosts[number], *command],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                timeout=200, env=os.environ | about,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout
            return done.stdout

        start = ("start", "--num-cpus", 1, "--object-store-memory", 10**8, "--disable-usage-stats")
        first = ("--head", "--port", 6379, "--temp-dir", short, "--include-dashboard", False)
        ray = "ray.scripts.scripts"
        on(0, ray, *start, *first, "--node-ip-address", "10.231.0.1")
        on(1, ray, *start, "--address", "10.231.0.1:6379", "--node-ip-address", "10.231.0.2")
        words = (data(tmp_path), "-r", "interleave", "-m", model, "-o", out)
        said = on(0, ray_hosts.__name__, "--hosts", 2, *words, "--grad-accum-steps", 16, *flags(8))
    agents = re.findall(r"\(Host pid=\d+(, ip=10\.231\.0\.2)?\).* group_rank=(\d)", said)
    assert sorted(agents) == [("", "0"), (", ip=10.231.0.2", "1")], said  # of torchrun's log
    assert_as_alone(out, model, 8)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_slurm_script_starts_torchrun_on_every_host(tmp_path: Path) -> None:
    """With SLURM's commands as they answer on the first of two hosts."""
    for name, text in (
        ("scontrol", '[ "$*" = "show hostnames node[3-4]" ] && printf "node3\\nnode4\\n"'),
        ("srun", 'printf "%s\\n" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = PAGE.parents[1] / "deploy" / "train.slurm"
    known = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77"}
    done = subprocess.run(
        ["bash", script, "m4.json", "-o", "a folder"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "8", **known},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    command = words[words.index("torchrun") :]
    documented = shlex.split(
        "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id 77 "
        "--rdzv-endpoint node3:29400 -m llava_interleave train m4.json -o 'a folder'"
    )
    assert command == documented
    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert all(word in torchrun for word in command[1 : command.index("-m")] if word[:2] == "--")
