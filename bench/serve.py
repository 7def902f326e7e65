"""Speed under load: this server, `transformers serve` and vLLM, with the same requests in turns.

    python bench/make_checkpoint.py /tmp/half --shape 0.5b
    python bench/serve.py -m builtin -m /tmp/half [--clients 1 4 16] [--rounds 3] [--vllm COMMAND]
    python bench/serve.py -m /tmp/half --also other=http://127.0.0.1:8001/v1   # any OpenAI server

The load is open: each client sends at times drawn beforehand (Poisson, fixed seed), whether or not
it has its answers, and latencies count from those times. On average a client sends a request in
twice the time of a single answer of this package, or --rate per second; 16 clients send more than a
server can answer that processes one request after another. `shared` images are those of all
requests of a round, `fresh` ones new in each. All servers use the checkpoint's chat template; the
servers that wait are stopped (SIGSTOP). --vllm: the command of vLLM in its own environment.
--quick: a tiny network, few requests, a smoke test. --out FILE.json: all requests and the medians.

tokens/s     generated tokens, from the first request to the end of the last answer
first        seconds to the first text, median and 95th percentile
whole        seconds to the whole answer with queueing, median and 95th percentile
token        milliseconds per token from the first text to the end, median
pause        milliseconds of the longest gap between two texts of an answer, median
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
from PIL import Image, ImageDraw

from llava_interleave.chat import BUILTIN
from llava_interleave.testing import tiny_checkpoint

BIN = Path(sys.executable).parent
SIDE = 384
START = 600  # seconds that a server may take to load


@dataclass(frozen=True)
class Timed:
    """A request: seconds from its moment; tokens as the server counts them. `failed` says why it
    has no answer.
    """

    prompt: int = 0
    tokens: int = 0
    first: float = 0.0
    total: float = 0.0
    pause: float = 0.0
    failed: str = ""


def random_image(rng: np.random.Generator) -> dict[str, Any]:
    """Boxes of many colours, as a message part."""
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for x, y, *colour in rng.integers(0, 256, (12, 5)):
        draw.rectangle((int(x), int(y), int(x) + 90, int(y) + 60), fill=tuple(map(int, colour)))
    file = BytesIO()
    image.save(file, "JPEG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/jpeg;base64," + b64encode(file.getvalue()).decode()},
    }


def load(
    clients: int, shared: bool, round_: int, given: argparse.Namespace, rate: float
) -> list[tuple[float, list[Any]]]:
    """The moments of all requests, the first one's 0, and their contents; the same for every
    server.
    """
    rng = np.random.default_rng([clients, shared, round_, given.seed])
    same = [random_image(rng) for _ in range(given.images)]
    moments = np.sort(
        np.cumsum(rng.exponential(1 / rate, (clients, given.requests)), axis=1).ravel()
    )
    return [
        (
            float(moment - moments[0]),
            [
                *(same if shared else [random_image(rng) for _ in range(given.images)]),
                question(number),
            ],
        )
        for number, moment in enumerate(moments)
    ]


def question(number: int) -> dict[str, str]:
    return {
        "type": "text",
        "text": f"Question {number}: describe every image, and say what differs.",
    }


async def ask(
    api: openai.AsyncOpenAI, model: str, moment: float, content: list[Any], tokens: int
) -> Timed:
    """Ask at `moment` of the event loop's clock."""
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(moment - clock())
    texts, usage = [], None
    try:
        stream = await api.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                texts.append(clock() - moment)
    except openai.OpenAIError as error:
        return Timed(failed=str(error)[:200])
    if not usage or not texts:
        return Timed(failed="no usage" if texts else "no text")
    pause = max((b - a for a, b in pairwise(texts)), default=0.0)
    return Timed(usage.prompt_tokens, usage.completion_tokens, texts[0], clock() - moment, pause)


async def run(
    url: str, model: str, requests: list[tuple[float, list[Any]]], tokens: int
) -> tuple[list[Timed], float]:
    """All requests, and the seconds until the last answer."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as api:
        start = asyncio.get_running_loop().time() + 0.1
        timed = await asyncio.gather(
            *(ask(api, model, start + at, content, tokens) for at, content in requests)
        )
        return list(timed), asyncio.get_running_loop().time() - start


def figures(timed: list[Timed], seconds: float) -> dict[str, float]:
    good = [t for t in timed if not t.failed]
    firsts, wholes = (
        [getattr(t, name) for t in good] or [float("nan")] for name in ("first", "total")
    )
    each = [(t.total - t.first) / (t.tokens - 1) for t in good if t.tokens > 1] or [float("nan")]
    return {
        "tokens/s": sum(t.tokens for t in good) / seconds,
        "first": statistics.median(firsts),
        "first95": float(np.percentile(firsts, 95)),
        "whole": statistics.median(wholes),
        "whole95": float(np.percentile(wholes, 95)),
        "token": 1000 * statistics.median(each),
        "pause": 1000 * statistics.median([t.pause for t in good] or [float("nan")]),
        "failed": len(timed) - len(good),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class System:
    """A server: its address, the model's name there, and its process where it is ours to stop."""

    url: str
    model: str
    process: "subprocess.Popen[bytes] | None" = None

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Runs within, and is stopped after it."""
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, number)


@contextlib.contextmanager
def serving(
    command: Sequence[str | Path], port: int, model: str, log: Path, **env: str
) -> Iterator[System]:
    """A server in processes of its own, once it is well."""
    with log.open("wb") as out:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | env
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        system = System(f"http://127.0.0.1:{port}/v1", model, process)
        try:
            for _ in range(START * 4):
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} ended:\n{log.read_text()[-2000:]}")
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
                ):
                    break
                time.sleep(0.25)
            else:
                raise SystemExit(
                    f"{command[0]} did not start in {START} s:\n{log.read_text()[-2000:]}"
                )
            with system.awake():
                pass
            yield system
        finally:
            system.signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                system.signal(signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def servers(folder: Path, given: argparse.Namespace, logs: Path) -> Iterator[dict[str, System]]:
    """All that are measured, by name."""
    with contextlib.ExitStack() as stack:
        port = free_port()
        mine: list[str | Path] = [
            BIN / "llava",
            "serve",
            "-m",
            folder,
            "--port",
            str(port),
            "--name",
            "model",
            "--preset",
            "hf",
        ]
        most = [
            "--max-requests",
            "1000",
            "--max-connections",
            "2000",
            "--requests-per-minute",
            "1000000",
        ]
        found = {
            "llava": stack.enter_context(serving([*mine, *most], port, "model", logs / "llava"))
        }
        if not given.alone:
            port = free_port()
            command: list[str | Path] = [
                BIN / "transformers",
                "serve",
                folder,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ]
            found["transformers"] = stack.enter_context(
                serving(command, port, str(folder), logs / "transformers")
            )
        if given.vllm:
            port = free_port()
            command = [
                given.vllm,
                "serve",
                folder,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--served-model-name",
                "model",
            ]
            command += ["--limit-mm-per-prompt", json.dumps({"image": given.images})]
            memory = {
                "VLLM_CPU_KVCACHE_SPACE": "4",
                "VLLM_NO_USAGE_STATS": "1",
            }  # GiB; and no telemetry
            found["vllm"] = stack.enter_context(
                serving(command, port, "model", logs / "vllm", **memory)
            )
        for name, url in (pair.split("=", 1) for pair in given.also):
            with openai.OpenAI(base_url=url, api_key="none") as api:
                found[name] = System(url, api.models.list().data[0].id)
        yield found


def asked(
    system: System, requests: list[tuple[float, list[Any]]], tokens: int
) -> tuple[list[Timed], float]:
    """As `run`, with this server alone awake."""
    with system.awake():
        return asyncio.run(run(system.url, system.model, requests, tokens))


def measure(
    name: str, folder: Path, given: argparse.Namespace, logs: Path
) -> Iterator[dict[str, Any]]:
    """A row for each server, number of clients, kind of images and round; servers take turns."""
    with servers(folder, given, logs) as found:
        lone = {}
        for server, system in found.items():  # once to warm up, once for the time
            for number in range(2):
                rng = np.random.default_rng([given.seed, number])
                content = [*(random_image(rng) for _ in range(given.images)), question(number)]
                (warm,), lone[server] = asked(system, [(0.0, content)], given.tokens)
                if warm.failed:
                    raise SystemExit(f"{server} does not answer: {warm.failed}")
        rate = given.rate or 0.5 / lone["llava"]
        cells = itertools.product(range(given.rounds), given.clients, ("shared", "fresh"))
        for number, (round_, clients, images) in enumerate(cells):
            requests = load(clients, images == "shared", round_, given, rate)
            for server in rotated(list(found), number):
                timed, seconds = asked(found[server], requests, given.tokens)
                row = {
                    "model": name,
                    "server": server,
                    "clients": clients,
                    "images": images,
                    "round": round_,
                    "rate": rate,
                }
                row |= {"lone": lone[server]} | figures(timed, seconds)
                yield row | {"requests": [asdict(one) for one in timed]}


def rotated(names: list[str], by: int) -> list[str]:
    """Each is first as often as the others."""
    return names[by % len(names) :] + names[: by % len(names)]


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all rounds as one."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(
            tuple(row[key] for key in ("model", "clients", "images", "server")), []
        ).append(row)
    names = ("tokens/s", "first", "first95", "whole", "whole95", "token", "pause")
    return [
        dict(zip(("model", "clients", "images", "server"), cell, strict=True))
        | {name: statistics.median(row[name] for row in same) for name in names}
        | {"failed": sum(row["failed"] for row in same)}
        for cell, same in sorted(cells.items())
    ]


COLUMNS = {"model": 12, "clients": 7, "images": 6, "server": 12, "tokens/s": 8} | dict.fromkeys(
    ("first", "first95", "whole", "whole95", "token", "pause", "failed"), 7
)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A head and a line for each row."""
    yield " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    for row in rows:
        values = (
            f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name])[:12]
            for name in COLUMNS
        )
        yield " ".join(
            f"{value:>{width}}" for value, width in zip(values, COLUMNS.values(), strict=True)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        help="a checkpoint folder, or builtin; can be given several times",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--images", type=int, default=2, help="in each request")
    parser.add_argument("--tokens", type=int, default=32, help="most of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, help="requests a second of each client")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="leave out transformers")
    parser.add_argument(
        "--vllm", type=Path, metavar="COMMAND", help="also measure the server of this vLLM"
    )
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=URL", help="measure this server, too"
    )
    parser.add_argument("--out", type=Path, help="write everything here as JSON")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.quick:
            given.model, given.clients, given.requests, given.rounds, given.tokens = (
                [scratch],
                [1, 2],
                2,
                1,
                8,
            )
            tiny_checkpoint(scratch)
        rows = []
        for model in given.model or ["builtin"]:
            folder = BUILTIN if model == "builtin" else Path(model)
            for row in measure(
                "tiny" if given.quick else folder.name, folder, given, Path(scratch)
            ):
                rows.append(row)
                print(*list(table([row]))[1:], sep="\n", file=sys.stderr, flush=True)
    summary = medians(rows)
    print(*table(summary), sep="\n")
    if given.out:
        given.out.write_text(
            json.dumps({"arguments": vars(given), "medians": summary, "rows": rows}, default=str)
            + "\n"
        )
    if any(row["failed"] for row in rows):
        raise SystemExit("some requests failed; --out has why")


if __name__ == "__main__":
    main()
