"""The plugin of `llm`, through the installed command: attachments, options, conversations,
errors.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import llm
import pytest
from click.testing import CliRunner
from llm.plugins import pm
from PIL import Image

from llava_interleave import load

PLUGIN = Path(__file__).parent.parent / "plugins" / "llm-llava" / "llm_llava.py"


@pytest.fixture(scope="module")
def plugin() -> Any:
    spec = importlib.util.spec_from_file_location("llm_llava", PLUGIN)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(plugin: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`llm` with the plugin, a folder of its own and the model `tiny`; gives the result of a
    call.
    """
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    from llm.cli import cli

    def run(*words: str) -> Any:
        pm.register(plugin, "llm_llava")
        try:
            plugin.register_commands(cli)
            return CliRunner().invoke(cli, [str(word) for word in words])
        finally:
            pm.unregister(plugin)
            cli.commands.pop("llava", None)

    assert run("llava", "add", "tiny", str(tiny)).exit_code == 0
    return run


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    return paths


def test_answers_are_the_chatbots(command: Any, tiny: Path, images: list[Path]) -> None:
    flags = [word for path in images for word in ("-a", path)]
    options = ["-o", "max_new_tokens", "6", "-o", "temperature", "1.5", "-o", "seed", "3"]
    result = command("-m", "tiny", *flags, *options, "What differs?")
    assert result.exit_code == 0, result.output
    content = [{"type": "image", "path": str(path)} for path in images]
    turn = {"role": "user", "content": [*content, {"type": "text", "text": "What differs?"}]}
    sampling = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
    expected = load(tiny).chat([turn], **sampling)
    assert result.output == expected.text + "\n"

    again = command("-c", "-o", "max_new_tokens", "4", "And now?")
    assert again.exit_code == 0, again.output
    history = [
        turn,
        {"role": "assistant", "content": expected.text},
        {"role": "user", "content": "And now?"},
    ]
    assert again.output == load(tiny).chat(history, max_new_tokens=4).text + "\n"

    log = json.loads(command("logs", "--json", "-n", "1").output)[0]
    assert log["output_tokens"] == 4
    assert log["response_json"] == {"finish_reason": "length"}


def test_added_models_are_listed_and_removed(command: Any, tiny: Path) -> None:
    assert command("llava", "list").output == f"tiny: {tiny}\n"
    assert command("llava", "add", "llava", str(tiny)).exit_code == 1
    assert command("llava", "remove", "tiny").exit_code == 0
    assert command("llava", "list").output == ""
    assert "there is no tiny" in command("llava", "remove", "tiny").output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "max_new_tokens", "0", "Hello"], "max_new_tokens"),
        (["-o", "max_tokens", "3", "Hello"], "max_tokens"),
        (["-a", "missing.png", "Hello"], "missing.png"),
    ],
)
def test_mistakes_are_named(command: Any, words: list[str], message: str) -> None:
    result = command("-m", "tiny", *words)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


def test_every_option_of_an_answer_is_an_option_of_llm(plugin: Any) -> None:
    fields = plugin.Llava.Options.model_fields
    assert {"frames", "fps", "image_token_pool", "stop", "preset"} < set(fields)
    assert all(field.description for field in fields.values())
    assert issubclass(plugin.Llava.Options, llm.Options)
