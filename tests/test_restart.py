"""A restart under load loses no request: the next server takes connections from the same socket."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from llava_interleave.errors import OptionError
from llava_interleave.server.run import check_port, inherited_socket
from llava_interleave.server.settings import Settings
from tests.helpers.server import until

INHERIT = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.executable, [sys.executable, "-m", "llava_interleave", "serve", *sys.argv[2:]])
"""


def start(listener: socket.socket, model: Path, log: Path) -> subprocess.Popen[str]:
    number = listener.fileno()
    process = subprocess.Popen(
        [sys.executable, "-c", INHERIT, str(number), "-m", str(model), "--name", "tiny"],
        pass_fds=[number],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
    )
    assert process.stdout is not None
    assert str(listener.getsockname()[1]) in process.stdout.readline()
    return process


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="passes a socket to a child")
def test_a_restart_under_load_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    """Four clients without retries but of connections; the first server ends while they ask."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    over, lost, answered = threading.Event(), [], [0] * 4

    def ask(number: int) -> None:
        with openai.OpenAI(base_url=url, api_key="none") as client:
            while not over.is_set():
                question: Any = [{"role": "user", "content": f"Hello {number}"}]
                try:
                    if number % 2:
                        stream = client.chat.completions.create(
                            model="tiny", messages=question, max_tokens=40, stream=True
                        )
                        reasons = [one.choices[0].finish_reason for one in stream]
                        assert reasons[-1] in ("stop", "length"), reasons
                    else:
                        client.chat.completions.create(
                            model="tiny", messages=question, max_tokens=40
                        )
                    answered[number] += 1
                except Exception as error:  # noqa: BLE001  all are counted
                    lost.append(repr(error))

    first = start(listener, tiny, tmp_path / "first")
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    second = None
    try:
        for thread in threads:
            thread.start()
        until(lambda: min(answered) > 3)
        second = start(listener, tiny, tmp_path / "second")
        until(lambda: (tmp_path / "second").read_text().count("chat/completions"))
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) in (0, -signal.SIGTERM)
        before = list(answered)
        until(lambda: min(a - b for a, b in zip(answered, before, strict=True)) > 3)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        for process in (first, second):
            if process is not None:
                process.terminate()
                process.wait(60)
        listener.close()
    assert not lost
    for name in ("first", "second"):
        lines = [
            json.loads(line)
            for line in (tmp_path / name).read_text().splitlines()
            if line.startswith("{")
        ]
        assert len(lines) > 3
        assert {line["error"] for line in lines} <= {None, "stopping"}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="passes a socket to a child")
def test_connections_wait_while_the_server_restarts(tiny: Path, tmp_path: Path) -> None:
    """As systemd does it: the first server ends, then the next starts."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    first = start(listener, tiny, tmp_path / "first")
    first.terminate()
    first.wait(60)
    answers: list[Any] = []
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        thread = threading.Thread(target=lambda: answers.append(client.models.list()))
        thread.start()
        time.sleep(0.2)
        assert not answers
        second = start(listener, tiny, tmp_path / "second")
        thread.join()
        second.terminate()
        second.wait(60)
    listener.close()
    assert answers[0].data[0].id == "tiny"


def test_an_inherited_socket_needs_keys_as_an_address_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert inherited_socket(Settings()) is None
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((host, 0)) as listener:
            monkeypatch.setattr("llava_interleave.server.run.LISTEN_FDS_START", listener.fileno())
            if host == "127.0.0.1":
                inherited = inherited_socket(Settings())
                assert inherited is not None
                assert inherited.getsockname() == listener.getsockname()
                inherited.close()
                check_port(Settings(port=1))
            else:
                with pytest.raises(OptionError, match="--api-keys"):
                    inherited_socket(Settings())


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, match in (
            (["--port", port], f"cannot listen on 127.0.0.1, port {port}: Address already in use"),
            (["--port", "70000"], "--port is a number from 0 to 65535, not 70000"),
            (["--port", "0", "-m", str(tmp_path / "none")], "there is no folder"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "llava_interleave", "serve", *words],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 2 or match.startswith("there"), done.stderr
            assert re.fullmatch(rf"llava: {re.escape(match)}[^\n]*\n", done.stderr), done.stderr
