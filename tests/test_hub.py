"""Fetching from the Hugging Face hub, against a loopback server that speaks the endpoints that
huggingface_hub asks for.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llava_interleave.checkpoints import load, resolve
from llava_interleave.checkpoints.published import PUBLISHED
from llava_interleave.cli import app
from llava_interleave.errors import CheckpointError, OptionError
from llava_interleave.testing import tiny_checkpoint

pytestmark = pytest.mark.slow

NAME = "someone/tiny-llava"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub:
    """Repository NAME with two revisions, each a folder; every request is noted."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = {COMMITS[revision]: folder for revision, folder in folders.items()}
        self.requests: list[str] = []
        self.gated = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(self.path)
                self.answer(*hub.answer(self.path.split("?")[0]))

            do_HEAD = do_GET  # noqa: N815

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        def said(value: object) -> tuple[int, dict[str, str], bytes]:
            return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if found := re.fullmatch(rf"/api/models/{NAME}(/revision|/tree)?/?([^/]*)", path):
            commit = COMMITS.get(found[2] or "main", found[2])
            if commit not in self.folders:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            files = [p for p in sorted(self.folders[commit].rglob("*")) if p.is_file()]
            names = [str(p.relative_to(self.folders[commit])) for p in files]
            if found[1] == "/tree":
                rows = zip(names, files, strict=True)
                return said(
                    [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)}
                        for n, p in rows
                    ]
                )
            return said(
                {
                    "id": NAME,
                    "modelId": NAME,
                    "sha": commit,
                    "siblings": [{"rfilename": n} for n in names],
                }
            )
        if found := re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path):
            file = self.folders[found[1]] / found[2]
            return 200, {"X-Repo-Commit": found[1], "ETag": f'"{etag(file)}"'}, file.read_bytes()
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folders = {
        "main": tiny_checkpoint(tmp_path / "main", max_shard_bytes=100_000),
        "v1": tiny_checkpoint(tmp_path / "v1", seed=1),
    }
    for folder in folders.values():
        for surplus in (
            "pytorch_model.bin",
            "modeling_evil.py",
            "training_args.pt",
            "README.md",
            "onnx/config.json",
        ):
            (folder / surplus).parent.mkdir(exist_ok=True)
            (folder / surplus).write_text("not wanted")
    hub = Hub(folders)
    yield hub
    hub.close()


def test_by_name_and_revision(hub: Hub, tmp_path: Path) -> None:
    for revision, folder in [(None, "main"), ("v1", "v1"), (COMMITS["main"], "main")]:
        fetched = resolve(NAME, revision, endpoint=hub.url, cache=tmp_path / "cache")
        assert torch.equal(load(fetched).lm_head.weight, load(tmp_path / folder).lm_head.weight)
        assert (fetched / "tokenizer.json").read_bytes() == (
            tmp_path / folder / "tokenizer.json"
        ).read_bytes()


def test_code_and_pickles_are_never_fetched(hub: Hub, tmp_path: Path) -> None:
    fetched = resolve(NAME, endpoint=hub.url, cache=tmp_path / "cache")
    assert {path.suffix for path in fetched.rglob("*")} == {".json", ".safetensors"}
    assert not any(
        word in request for request in hub.requests for word in (".bin", ".py", ".pt", "onnx")
    )


def test_settings_come_without_weights_and_weights_later(hub: Hub, tmp_path: Path) -> None:
    """`llava plan` fetched gigabytes to count tokens."""
    fetched = resolve(NAME, tensors=False, endpoint=hub.url, cache=tmp_path / "cache")
    assert (fetched / "config.json").is_file()
    assert not list(fetched.glob("*.safetensors"))
    assert list(resolve(NAME, endpoint=hub.url, cache=tmp_path / "cache").glob("*.safetensors"))


def test_second_time_comes_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    first = resolve(NAME, endpoint=hub.url, cache=tmp_path / "cache")
    hub.requests.clear()
    assert resolve(NAME, endpoint=hub.url, cache=tmp_path / "cache") == first
    assert not any("/resolve/" in request for request in hub.requests)
    hub.close()  # and without any connection
    assert resolve(NAME, endpoint=hub.url, cache=tmp_path / "cache") == first


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"the hub has no someone/else that you may see.*hf auth login"
    ):
        resolve("someone/else", endpoint=hub.url, cache=tmp_path / "cache")
    with pytest.raises(CheckpointError, match="no revision 'v9'"):
        resolve(NAME, "v9", endpoint=hub.url, cache=tmp_path / "cache")
    hub.gated = True
    with pytest.raises(CheckpointError, match=r"is gated: accept its terms.*hf auth login"):
        resolve(NAME, endpoint=hub.url, cache=tmp_path / "cache")


def test_hub_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    hub.close()
    with pytest.raises(CheckpointError, match=r"cannot be reached.*--local-dir"):
        resolve(NAME, endpoint=hub.url, cache=tmp_path / "cache")


def test_local_folders(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "a")
    assert resolve(folder) == resolve(str(folder)) == folder
    with pytest.raises(OptionError, match="local folder"):
        resolve(folder, "main")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(folder / "config.json")


@pytest.mark.parametrize(
    "name",
    [
        "no-such-folder",
        "/no/such/folder",
        "../a/b",
        "a/b/c",
        "a/../../b",
        "https://x.y/z",
        "a/b\n",
        "",
    ],
)
def test_no_folder_and_no_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path with a typing error must not be asked for on the hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        resolve(name)


@pytest.fixture
def own_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands' own hub and cache, and a short name of its model."""
    import huggingface_hub
    from huggingface_hub import constants

    cache, download = tmp_path / "own cache", huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **named: download(name, **{**named, "endpoint": hub.url}),
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setitem(PUBLISHED, "small", NAME)
    return cache


def run(*words: str, code: int = 0, stdin: str = "") -> str:
    result = CliRunner().invoke(app, [*words], input=stdin)
    assert result.exit_code == code, result.output
    return result.output


def test_models_are_pulled_listed_and_removed(hub: Hub, own_cache: Path) -> None:
    assert "nothing is downloaded" in run("models") and "small" in run("models")
    assert "llava ask -m small" in run("pull", "small")
    requests = [*hub.requests]
    listed = json.loads(run("models", "--json"))["cached"]
    assert [entry["name"] for entry in listed] == [NAME]
    assert listed[0]["size"] == sum(f.stat().st_size for f in own_cache.rglob("blobs/*"))
    assert NAME in run("models") and f"small  {NAME}" not in run("models")
    assert hub.requests == requests, "a listing needs no network"
    hub.close()
    assert resolve("small") == resolve(NAME) == resolve("SMALL")
    run("rm", NAME, stdin="n\n", code=1)
    assert "are free" in run("rm", "small", stdin="y\n")
    assert json.loads(run("models", "--json"))["cached"] == []
    with pytest.raises(CheckpointError, match="not downloaded; in the cache: none"):
        CliRunner().invoke(app, ["rm", "-y", "small"], catch_exceptions=False)
    with pytest.raises(CheckpointError, match="connect once"):
        CliRunner().invoke(app, ["pull", "small"], catch_exceptions=False)


def test_a_plain_name_that_is_none_lists_those_that_are() -> None:
    with pytest.raises(CheckpointError, match=r"owner/model.*interleave-0\.5b"):
        resolve("interleave-9b")


def test_a_folder_comes_before_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "interleave-7b").mkdir()
    assert resolve("interleave-7b") == Path("interleave-7b")


def test_published_names_are_the_familys() -> None:
    for name, repository in PUBLISHED.items():
        owner, _, model = repository.partition("/")
        assert owner in ("llava-hf", "lmms-lab")
        kind, size, *_ = name.split("-")
        assert kind in model.lower() and size in model.lower()
