"""Files of deploy/ for operators: read by the programs that they are for, with this program's
flags.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fastapi import FastAPI
from typer.main import get_command
from typer.testing import CliRunner

from llava_interleave import chat
from llava_interleave.chat import load, loading
from llava_interleave.cli import app, demo, serve
from llava_interleave.server import run
from llava_interleave.server.api_keys import ApiKeys
from llava_interleave.server.app import create_app
from llava_interleave.server.metrics import Metrics
from llava_interleave.server.run import Server
from llava_interleave.server.settings import Settings
from tests.helpers.server import listening

DEPLOY = Path(__file__).parent.parent / "deploy"
COMPOSE = DEPLOY / "compose"


def needs(program: str) -> str:
    return shutil.which(program) or pytest.skip(f"no {program} on this machine")


@pytest.fixture
def metrics(tiny: Path) -> str:
    bot, metrics = load(tiny), Metrics()
    metrics.watch(bot.engine.load, lambda: 0)
    metrics.count_answer(bot.ask("Hello", max_new_tokens=3))
    return metrics.text().decode()


def test_promtool_accepts_the_metrics(metrics: str) -> None:
    done = subprocess.run(
        [needs("promtool"), "check", "metrics"], input=metrics, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(
        [needs("promtool"), "check", "config", "--syntax-only", COMPOSE / "prometheus.yaml"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_reads_metrics_that_exist(metrics: str) -> None:
    dashboard = json.loads((COMPOSE / "grafana" / "dashboards" / "llava.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for text in expressions for name in re.findall(r"llava_\w+", text)}
    known = set(re.findall(r"^# TYPE (llava_\w+)", metrics, re.MULTILINE))
    known |= {f"{name}_bucket" for name in known}
    assert len(names) > 12
    assert names <= known


def test_nginx_accepts_its_configuration(tmp_path: Path) -> None:
    """With names and paths of this machine: it resolves its upstream and reads the certificate."""
    nginx, openssl = needs("nginx"), needs("openssl")
    subject = ["-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    files = ["-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.crt")]
    subprocess.run([openssl, "req", *subject, *files], check=True, capture_output=True)
    text = (COMPOSE / "nginx.conf").read_text()
    text = text.replace("/etc/nginx/tls", str(tmp_path)).replace("llava:8000", "127.0.0.1:8000")
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/nginx.pid;\n{text}")
    done = subprocess.run(
        [nginx, "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = needs("systemd-analyze")
    unit = (DEPLOY / "systemd" / "llava.service").read_text()
    (tmp_path / "llava.service").write_text(unit.replace("/opt/llava/bin/llava", "/bin/true"))
    shutil.copy(DEPLOY / "systemd" / "llava.socket", tmp_path)
    units = [tmp_path / "llava.service", tmp_path / "llava.socket"]
    done = subprocess.run([program, "verify", "--man=no", *units], capture_output=True, text=True)
    assert "llava.service" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


def commands() -> list[list[str]]:
    """Every call of `llava` in these files, as words."""
    compose = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    unit = (DEPLOY / "systemd" / "llava.service").read_text()
    service = re.search(r"^ExecStart=\S+/llava (.*)$", unit, re.MULTILINE)
    image = re.search(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert service and image
    return [
        compose["services"]["llava"]["command"],
        json.loads(image[1]),
        shlex.split(service[1]),
    ]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_flags_are_this_programs(words: list[str]) -> None:
    serve = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    flags = {flag for parameter in serve.params for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= flags


def test_the_image_copies_what_exists_and_runs_unprivileged() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE):
        assert (DEPLOY.parent / source).exists()
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert ".git" in (DEPLOY.parent / ".dockerignore").read_text().split()


def test_the_guides_keys_are_read_by_the_users_of_the_containers(tmp_path: Path) -> None:
    """Compose mounts a secret with the owner that it has; each container has a user of its own."""
    guide = (DEPLOY.parent / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "docker compose" in block)
    user = re.search(r"useradd --uid (\d+) llava", (DEPLOY / "Dockerfile").read_text())
    assert user and f"chown {user[1]} keys " in block
    needs("openssl")
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    commands = block.partition("docker compose")[0].replace("sudo chown", ": chown")
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True)
    keys = tmp_path / "deploy" / "compose" / "keys"
    assert ApiKeys.read(keys).names == {"alice", "prometheus"}
    assert keys.stat().st_mode & 0o077 == 0


def serve_commands() -> list[str]:
    """Every `llava serve` of the guide."""
    guide = (DEPLOY.parent / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    lines = [line.partition("  #")[0] for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("llava serve")]


@pytest.mark.slow
@pytest.mark.parametrize("command", serve_commands())
def test_the_guides_commands_start_a_server(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the built-in model in place of the published ones, and up to where it would listen."""
    started: list[Server] = []
    monkeypatch.chdir(tmp_path)
    Path("keys").write_text(f"{'k' * 20} alice\n")
    Path("keys").chmod(0o600)
    monkeypatch.setattr(Server, "run", lambda server: started.append(server))
    monkeypatch.setattr(run, "check_port", lambda _: None)
    monkeypatch.setattr(loading, "locate", lambda *_, **__: loading.BUILTIN)
    monkeypatch.setattr(chat, "locate", lambda *_, **__: loading.BUILTIN)

    @contextlib.contextmanager
    def deployed(*_: object) -> Iterator[FastAPI]:
        yield create_app(load(), Settings())

    monkeypatch.setattr(serve, "_deployed", deployed)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(started) == 1 and started[0].service.name
    gc.unfreeze()


@pytest.mark.slow
def test_the_guides_client_gets_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (DEPLOY.parent / "docs" / "serving.md").read_text("utf-8")
    (program,) = re.findall(r"^```python\n(import openai.*?)^```", guide, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    demo.copy_files(Path("demo"))
    with listening(loading.BUILTIN, shutdown_timeout=0.1) as server:
        code = program.replace("http://127.0.0.1:8000", server.address)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "image_tokens" in done.stdout
