"""Good and hostile traffic against one server: latency, memory growth and failed requests.

    python bench/soak.py [-m FOLDER] [--minutes 30] [--out soak.json] [--quick]

Two API keys. The good one's clients send old and new images, whole and streamed, n answers,
structured output, attribution, uploads; a repeated request must get the same answer. Each waits
--pause seconds after an answer, as people do: clients that never pause use the whole server, and
an equal share for a second key doubles their latency by definition. The hostile key's clients, in
a process of their own and at the lowest priority (they would be on other machines), send the corpus
of the tests, files that hold up a decoder, grammars that do not compile, many endless answers, and
below HTTP half a request, a slow one, none or garbage, without a pause. Limits, the rate limit too,
are the defaults. For the first quarter of the time the good clients are alone. Then each attack is
made once by itself, with a short request of the good key again and again during it.

Prints one JSON object; exit code 1 if a good request failed, a hostile one got anything but 4xx or
503, or a request still runs at the end. --quick: a tiny network, one minute.

latency      seconds of good requests alone and beside the hostile ones: median, 95th percentile;
             `ratio` of the two 95th percentiles
kinds        the 95th percentile of each kind of good request, alone and beside the hostile ones
parts        the 95th percentile of each phase, as the server counts it, of requests that are not
             streamed
attacks      seconds of each attack and its status, requests of the good key meanwhile, their median
             and longest; `none`: without an attack
memory       resident MiB of the server at the start, after the warm-up (a sixth of the time) and at
             the end; `course` in tenths, `medians` and `lowest` of each tenth (the heap is trimmed
             every ten seconds)
slope        MiB per minute after the warm-up, by least squares; `attacked`: from a third of the
             time on, without the step at the beginning of the attack; `caches`: growth of its
             bounded caches of image features and prefixes
hostile_per_minute   hostile requests and connections, while there are any
statuses     of hostile requests; 0: the connection was closed without a response
log          the end of the server's log
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from serve import BIN, START, free_port

from llava_interleave.testing import tiny_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers.hostile_files import (
    gif,
    gif_extension,
    key_frames,
    png_chunks,
    scans,
    with_segments,
)
from tests.helpers.requests import (
    BLUE,
    GREEN,
    HOSTILE,
    RED,
    STILLS,
    data_url,
    image_part,
    png,
    sent,
    user,
)
from tests.test_server_attack_files import FILES, video_part
from tests.test_server_attack_files import image_part as file_part

CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
GOOD_KEY, HOSTILE_KEY = "a-good-clients-own-key", "a-hostile-clients-key"
METRICS_KEY = "the-key-of-who-reads-metrics"
ENDLESS = {"n": 8, "max_tokens": 1500, "ignore_eos": True, "stop_on_repetition": False}
KINDS = ("image", "text", "video", "views", "form", "attribution", "new", "upload")
SMALL = 2  # megabytes of a file in the mixed traffic; the attacks by themselves are larger


class Soak:
    """One server's traffic; every thread counts what it saw."""

    def __init__(self, address: str, over: Event, pause: float = 0.0) -> None:
        self.address, self.over, self.pause = address, over, pause
        self.lock = threading.Lock()
        self.good: Counter[str] = Counter()
        self.hostile: Counter[str] = Counter()
        self.failures: list[str] = []
        self.answers: dict[str, Any] = {}
        self.attacked = False
        self.seconds: dict[bool, list[tuple[str, float]]] = {False: [], True: []}
        self.parts: dict[bool, list[dict[str, float]]] = {False: [], True: []}

    def client(self, key: str) -> httpx.Client:
        """One that leaves idle connections before the server does, which would look
        like a failure.
        """
        return httpx.Client(
            base_url=self.address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=300,
            limits=httpx.Limits(keepalive_expiry=2),
        )

    def count(self, where: Counter[str], what: object) -> None:
        with self.lock:
            where[str(what)] += 1

    def fail(self, what: str) -> None:
        with self.lock:
            self.failures.append(what[:500])

    def repeat(
        self, number: int, work: Callable[["Soak", httpx.Client, random.Random], None]
    ) -> None:
        """Do some work again and again until it is over."""
        chance = random.Random(number)
        with self.client(GOOD_KEY if work is good else HOSTILE_KEY) as client:
            while not self.over.is_set():
                try:
                    work(self, client, chance)
                except Exception as error:  # noqa: BLE001  it goes into the report, whatever it was
                    self.fail(f"{work.__name__}: {error!r}")
                if work is good:
                    time.sleep(self.pause)


def attack(address: str, over: Event, results: "Queue[tuple[Counter[str], list[str]]]") -> None:
    """The hostile key's clients, in a process of their own, until it is over."""
    if sys.platform != "win32":
        os.nice(19)
    soak = Soak(address, over)
    workers = [
        threading.Thread(target=soak.repeat, args=(i, work))
        for i, work in enumerate([hostile, rude, rude, attacker, attacker])
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    results.put((soak.hostile, soak.failures))


def good(soak: Soak, client: httpx.Client, chance: random.Random) -> None:
    """A request that must be answered, the same as before where it is repeated."""
    colour = f"#{chance.randrange(1 << 24):06x}"
    same, new = chance.choice([RED, BLUE, GREEN]), data_url(png(colour))
    samples: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        (
            f"image {same[-30:]}",
            user(image_part(same), "What is this?"),
            {"seed": 1, "temperature": 1.0},
        ),
        (
            f"text {same[-30:]}",
            user(f"Say {same[-9:]}"),
            {"n": 2, "seed": 1, "temperature": 1.0},
        ),
        ("video", user(STILLS, "What moves?"), {"frames": 2}),
        (
            "views",
            user({"type": "views", "views": {"front": RED, "back": BLUE}}, "How many?"),
            {"logprobs": True},
        ),
        (
            "form",
            user(image_part(RED), "Which?"),
            {"response_format": {"type": "choice", "choice": ["red", "blue"]}},
        ),
        ("attribution", user(image_part(RED), "or", image_part(BLUE), "?"), {"attribution": True}),
        ("", user(image_part(new), "and", image_part(same), "?"), {"stop": ["."]}),
        ("", [], {}),
    ]
    name, messages, fields = chance.choice(samples)
    kind = name.partition(" ")[0] or ("new" if messages else "upload")
    messages = messages or user(image_part(upload(client, colour)), "What is this?")
    stream = chance.random() < 0.5
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "stream": stream, **fields}
    began, attacked = time.monotonic(), soak.attacked
    answer = client.post(CHAT, json=body)
    seconds = time.monotonic() - began
    soak.seconds[attacked].append((kind, seconds))
    soak.count(soak.good, answer.status_code)
    if answer.status_code != 200:
        return soak.fail(f"{name}: {answer.status_code} {answer.text}")
    texts = (
        streamed(answer.text)
        if stream
        else [choice["message"]["content"] for choice in answer.json()["choices"]]
    )
    if not stream:
        phases = answer.json()["timings"]
        prepare, queue, total = (phases[part] for part in ("prepare", "queue", "total"))
        rest = seconds - prepare - total
        parts = {"prepare": prepare, "queue": queue, "generate": total - queue, "rest": rest}
        soak.parts[attacked].append(parts)
    if name and soak.answers.setdefault(name, texts) != texts:
        soak.fail(f"{name}: {texts} instead of {soak.answers[name]}")
    return None


def streamed(text: str) -> list[str]:
    """The texts of all answers of a stream; fails if it does not end well."""
    *events, done, _ = text.split("\n\n")
    assert done == "data: [DONE]", text[-300:]
    texts: dict[int, str] = {}
    for event in events:
        for choice in (
            () if event.startswith(":") else json.loads(event.removeprefix("data: "))["choices"]
        ):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get(
                "content", ""
            )
    return [texts[index] for index in sorted(texts)]


def upload(client: httpx.Client, colour: str) -> str:
    """The id of an upload; the one before it is deleted, so that they do not pile up."""
    for file in client.get("/v1/files").json()["data"][:-8]:
        client.delete(f"/v1/files/{file['id']}")
    stored = client.post(
        "/v1/files", files={"file": ("a.png", png(colour, (60, 60)))}, data={"purpose": "vision"}
    )
    return str(stored.json()["id"])


def hostile(soak: Soak, client: httpx.Client, chance: random.Random) -> None:
    """One of the corpus."""
    name = chance.choice(list(HOSTILE))
    status = client.post(CHAT, content=sent(HOSTILE[name]), headers=JSON).status_code
    soak.count(soak.hostile, status)
    if not (400 <= status < 500 or status == 503):
        soak.fail(f"hostile {name}: {status}")


SLOW: dict[str, Callable[[], dict[str, Any]]] = {
    "video": lambda: video_part(key_frames(20_000)),
    "gif": lambda: file_part(gif(40, 2000)),
    "scans": lambda: file_part(scans(50, 2000)),
    "fill": lambda: file_part(with_segments(b"\xff", SMALL)),
    "chunks": lambda: file_part(png_chunks(SMALL)),
    "comment": lambda: file_part(gif_extension(b"\1x", megabytes=SMALL)),
}


@functools.cache
def slow_file(kind: str) -> dict[str, Any]:
    return SLOW[kind]()


def attacker(soak: Soak, client: httpx.Client, chance: random.Random) -> None:
    """Lawful in form, made to take time: files, grammars, answers without end."""
    kind = chance.choice([*SLOW, "grammar", "regex", "endless"])
    fields: dict[str, Any] = {}
    content: Any = [slow_file(kind)] if kind in SLOW else "?"
    if kind == "grammar":
        fields = {"response_format": wide_schema(chance.randrange(1500, 1900))}
    elif kind == "regex":
        nested = f"((a{{{chance.randrange(900, 1000)}}}){{1000}}){{1000}}"
        fields = {"response_format": {"type": "regex", "regex": nested}}
    elif kind == "endless":
        fields = ENDLESS
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}
    status = client.post(CHAT, json=body).status_code
    soak.count(soak.hostile, f"{kind} {status}")
    if status >= 500 and status != 503:
        soak.fail(f"attacker {kind}: {status}")


def wide_schema(fields: int) -> dict[str, Any]:
    """Takes a second or more to compile."""
    properties = {f"p{i}": {"type": "string"} for i in range(fields)}
    schema = {"type": "object", "properties": properties}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def rude(soak: Soak, _: httpx.Client, chance: random.Random) -> None:
    """Below HTTP: cut off, half closed, slow, silent, garbage, gone while it is answered."""
    body = json.dumps(
        {
            "model": "tiny",
            "messages": user(image_part(RED), "?"),
            "max_tokens": 2000,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {HOSTILE_KEY}\r\n"
        "Content-Type: "
        f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    whole = head.encode() + body
    kind = chance.choice(["cut", "half", "slow", "silent", "garbage", "leaves", "leaves"])
    at = urlsplit(soak.address)
    with (
        socket.create_connection((at.hostname, at.port), timeout=10) as wire,
        contextlib.suppress(OSError),
    ):
        if kind == "cut":
            wire.sendall(whole[: chance.randrange(len(whole))])
        elif kind == "half":
            wire.sendall(whole)
            wire.shutdown(socket.SHUT_WR)
        elif kind == "slow":
            for byte in whole[: chance.randrange(1, 60)]:
                wire.sendall(bytes([byte]))
                time.sleep(0.02)
        elif kind == "silent":
            time.sleep(1)
        elif kind == "garbage":
            wire.sendall(chance.randbytes(chance.randrange(1, 5000)) + b"\r\n\r\n")
            line = wire.recv(4096).split(b" ", 2)
            soak.count(soak.hostile, int(line[1]) if line[0].startswith(b"HTTP") else 0)
        else:
            wire.sendall(whole)
            wire.recv(chance.randrange(1, 2000))
    soak.count(soak.hostile, kind)


def resident(pid: int) -> float:
    line = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def gauges(client: httpx.Client) -> dict[str, float]:
    lines = (
        line.split()
        for line in client.get("/metrics").text.splitlines()
        if line[0] != "#" and "{" not in line
    )
    return {name.removeprefix("llava_"): float(value) for name, value in lines}


def watch(
    soak: Soak, process: "subprocess.Popen[bytes]", client: httpx.Client, seconds: float
) -> dict[str, Any]:
    """Memory once a second until the time is over or the server is."""
    began, rows = time.monotonic(), []
    while (at := time.monotonic() - began) < seconds and process.poll() is None:
        rows.append((at, resident(process.pid), gauges(client)["encoder_cache_bytes"] / 2**20))
        time.sleep(1)
    if process.poll() is not None:
        soak.fail(f"the server ended with {process.returncode}")
    times, memory, features = np.array(rows).T
    warm, attacked = times >= seconds / 6, times >= seconds / 3
    slope = {
        name: 60 * float(np.polyfit(times[part], values[part], 1)[0])
        for name, values, part in (
            ("memory", memory, warm),
            ("attacked", memory, attacked),
            ("caches", features, warm),
        )
    }
    at_warm = int(warm.argmax())
    return {
        "memory": {
            "start": memory[0],
            "warm": memory[at_warm],
            "end": memory[-1],
            "most": memory.max(),
        },
        "course": [
            round(float(one), 1) for one in np.interp(np.linspace(0, times[-1], 11), times, memory)
        ],
        "medians": [round(float(np.median(one)), 1) for one in np.array_split(memory, 10)],
        "lowest": [round(float(one.min()), 1) for one in np.array_split(memory, 10)],
        "slope": slope,
    }


def settled(client: httpx.Client) -> bool:
    """Whether nothing runs any more, seconds after the last client has left."""
    for _ in range(100):
        now = gauges(client)
        names = ("num_requests_active", "num_requests_running", "num_requests_waiting")
        if not any(now[name] for name in (*names, "kv_cache_used_tokens")):
            return True
        time.sleep(0.2)
    return False


def latency(seconds: list[float]) -> dict[str, float]:
    """Of good requests."""
    if not seconds:
        return {"requests": 0}
    median, high = np.percentile(seconds, [50, 95])
    return {"requests": len(seconds), "p50": round(float(median), 3), "p95": round(float(high), 3)}


def high(soak: Soak, kind: str, attacked: bool) -> float | None:
    """The 95th percentile of a kind of good requests."""
    return latency([s for one, s in soak.seconds[attacked] if one == kind]).get("p95")


def phases(parts: list[dict[str, float]]) -> dict[str, float]:
    """The 95th percentile of each."""
    return {
        name: round(float(np.percentile([one[name] for one in parts], 95)), 3)
        for name in (parts[0] if parts else ())
    }


QUESTION = [{"role": "user", "content": "Hello"}]
ATTACKS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        name: lambda make=make: {"messages": user(make(), "?"), "max_tokens": 2}  # type: ignore[misc]
        for name, make in FILES.items()
    },
    "eight endless answers": lambda: {"messages": QUESTION, **ENDLESS},
    "a grammar of 1,900 fields": lambda: {
        "messages": QUESTION,
        "response_format": wide_schema(1900),
    },
    "a regex of nested repeats": lambda: {
        "messages": QUESTION,
        "response_format": {"type": "regex", "regex": "((a{1000}){1000}){1000}"},
    },
}


@functools.cache
def attack_body(name: str) -> bytes:
    return json.dumps({"model": "tiny", **ATTACKS[name]()}).encode()


def make_ready(name: str) -> None:
    """In the attackers' process, at the lowest priority: make the body of an attack."""
    if sys.platform != "win32":
        os.nice(19)
    attack_body.cache_clear()
    attack_body(name)


def send_thrice(address: str, name: str) -> tuple[float, list[int]]:
    """In the attackers' process: an attack three times at once; seconds, statuses."""

    def send(_: int) -> int:
        with Soak(address, multiprocessing.get_context("spawn").Event()).client(HOSTILE_KEY) as one:
            return one.post(CHAT, content=attack_body(name), headers=JSON).status_code

    began = time.monotonic()
    with ThreadPoolExecutor(3) as threads:
        statuses = list(threads.map(send, range(3)))
    return time.monotonic() - began, statuses


def attacks(soak: Soak) -> dict[str, dict[str, Any]]:
    """Each attack by itself, and the good key's short requests beside it."""
    rows: dict[str, dict[str, Any]] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as attackers, soak.client(GOOD_KEY) as client:
        for name in ("none", *ATTACKS):
            attack = None
            if name in ATTACKS:
                attackers.submit(make_ready, name).result()
                attack = attackers.submit(send_thrice, soak.address, name)
            seconds: list[float] = []
            while (attack and not attack.done()) or len(seconds) < 20:
                start = time.monotonic()
                body = {"model": "tiny", "messages": QUESTION, "max_tokens": 8}
                answer = client.post(CHAT, json=body)
                seconds.append(time.monotonic() - start)
                time.sleep(soak.pause / 4)
                if answer.status_code != 200:
                    soak.fail(f"beside {name}: {answer.status_code} {answer.text}")
            took, statuses = attack.result() if attack else (0.0, [])
            rows[name] = {
                "seconds": round(took, 2),
                "statuses": dict(Counter(statuses)),
                "good requests": len(seconds),
                "median": round(float(np.median(seconds)), 3),
                "longest": round(max(seconds), 3),
            }
    return rows


def soaked(
    folder: str | None,
    minutes: float,
    threads: int,
    pause: float,
    each_attack: bool,
    scratch: Path,
) -> dict[str, Any]:
    """Start a server, run all clients, and report."""
    port = free_port()
    spawn = multiprocessing.get_context("spawn")
    soak = Soak(f"http://127.0.0.1:{port}", spawn.Event(), pause)
    results: Queue[tuple[Counter[str], list[str]]] = spawn.Queue()
    attackers = spawn.Process(target=attack, args=(soak.address, soak.over, results))
    keys = scratch / "keys"
    keys.write_text(f"{GOOD_KEY} good\n{HOSTILE_KEY} hostile\n{METRICS_KEY} metrics\n")
    keys.chmod(0o600)
    model = ["-m", folder] if folder else []
    command = [str(BIN / "llava"), "serve", *model, "--port", str(port), "--name", "tiny"]
    command += ["--api-keys", str(keys), "--request-timeout", "5", "--media-timeout", "10"]
    command += ["--precision", "int8", "--log-level", "error", "--access-log", "off"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            with soak.client(METRICS_KEY) as client:
                wait_until_ready(process, client)
                calm = [
                    threading.Thread(target=soak.repeat, args=(i, good)) for i in range(threads)
                ]

                def attack_later() -> None:
                    if not soak.over.wait(60 * minutes / 4):
                        attackers.start()
                        soak.attacked = True

                timer = threading.Thread(target=attack_later)
                for worker in (*calm, timer):
                    worker.start()
                try:
                    report = watch(soak, process, client, 60 * minutes)
                finally:
                    soak.over.set()
                    for worker in (timer, *calm):
                        worker.join()
                    if soak.attacked:
                        soak.hostile, failures = results.get(timeout=300)
                        soak.failures += failures
                        attackers.join()
                if process.poll() is None and not settled(client):
                    soak.fail(f"still running at the end: {gauges(client)}")
                if process.poll() is None and each_attack:
                    report["attacks"] = attacks(soak)
                    if not settled(client):
                        soak.fail(f"still running after the attacks: {gauges(client)}")
        finally:
            process.terminate()
        process.wait(60)
        log.seek(0)
        text = log.read().decode()
    alone, beside = (latency([s for _, s in soak.seconds[here]]) for here in (False, True))
    ratio = round(beside.get("p95", 0) / alone["p95"], 2) if alone.get("p95") else None
    return {
        "minutes": minutes,
        "pause": pause,
        "good": dict(soak.good),
        "failures": soak.failures[:20],
        "failed": len(soak.failures),
        "logged_errors": text.count(" ERROR "),
        "log": text[-2000:],
        "latency": {"alone": alone, "attacked": beside, "ratio": ratio},
        "kinds": {kind: [high(soak, kind, here) for here in (False, True)] for kind in KINDS},
        "parts": {
            "alone": phases(soak.parts[False]),
            "attacked": phases(soak.parts[True]),
        },
        "hostile_per_minute": round(soak.hostile.total() / (minutes * 3 / 4)),
        "statuses": dict(sorted(soak.hostile.items())),
        **report,
    }


def wait_until_ready(process: "subprocess.Popen[bytes]", client: httpx.Client) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            client.get("/health")
            return
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", help="a checkpoint folder; without it the built-in model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=4, help="good clients")
    parser.add_argument("--pause", type=float, default=0.6, help="seconds after each good answer")
    parser.add_argument("--no-attacks", action="store_true", help="mixed traffic alone")
    parser.add_argument("--out", type=Path, help="write it here, too")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.quick:
            given.model, given.minutes = str(tiny_checkpoint(Path(scratch) / "tiny")), 1
        report = soaked(
            given.model,
            given.minutes,
            given.threads,
            given.pause,
            not given.no_attacks,
            Path(scratch),
        )
    print(json.dumps(report, indent=1))
    if given.out:
        given.out.write_text(json.dumps(report) + "\n")
    raise SystemExit(1 if report["failed"] or report["logged_errors"] else 0)


if __name__ == "__main__":
    main()
