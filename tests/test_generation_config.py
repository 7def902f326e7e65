"""generation_config.json as defaults: of the library, the command line, the server and `hf`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from llava_interleave import generation_config
from llava_interleave.chat import Options, load
from llava_interleave.cli import app
from llava_interleave.cli.local_model import LazyModel, ModelFlags
from llava_interleave.errors import CheckpointError, Unsupported
from llava_interleave.hf.model import LlavaForConditionalGeneration
from llava_interleave.server.app import create_app
from llava_interleave.server.settings import Settings
from tests.helpers.requests import WHAT

PUBLISHED = {"_from_model_config": True, "bos_token_id": 151643, "eos_token_id": 151645}
ONEVISION_CHAT = {
    "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "temperature": 0.7,
    "eos_token_id": [151645, 151643], "repetition_penalty": 1.05, "top_k": 20, "top_p": 0.8,
    "transformers_version": "4.41.2",
}  # fmt: skip
SAMPLED = {"do_sample": True, "temperature": 9.0, "top_p": 0.9, "repetition_penalty": 1.2}
IN_FORCE = {"repetition_penalty": 1.2, "temperature": 9.0, "top_k": 50, "top_p": 0.9}


def checkpoint(tiny: Path, folder: Path, **values: Any) -> Path:
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def sampled(tiny: Path, tmp_path: Path) -> Path:
    return checkpoint(tiny, tmp_path / "sampled", **SAMPLED, max_new_tokens=7)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (PUBLISHED, {}),
        (
            ONEVISION_CHAT,
            {"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        ),
        ({}, {}),
        ({"do_sample": False, "temperature": 0.7, "typical_p": 0.5, "num_beams": 1}, {}),
        (SAMPLED, IN_FORCE),
        (
            {"max_new_tokens": 20, "stop_strings": "END", "top_k": None, "min_p": 0.1},
            {"max_new_tokens": 20, "stop": ("END",)},
        ),
    ],
)
def test_the_options_of_a_file(
    tmp_path: Path, values: dict[str, Any], options: dict[str, Any]
) -> None:
    assert generation_config.read(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert generation_config.read(tmp_path) == options
    assert generation_config.read(tmp_path / "other", tmp_path) == options
    assert generation_config.read(tmp_path, "none") == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 4}, "num_beams=4, which is not supported.*generation_config='none'"),
        (
            {"no_repeat_ngram_size": 3, "penalty_alpha": 0.6},
            "no_repeat_ngram_size=3, penalty_alpha",
        ),
        ({"suppress_tokens": [1]}, "suppress_tokens"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p"),
        ({"do_sample": True, "temperature": -1}, "temperature"),
        ({"do_sample": True, "top_k": "many"}, "top_k"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tiny: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = checkpoint(tiny, tmp_path / "tiny", **values)
    with pytest.raises(CheckpointError, match=message):
        load(folder, device="cpu")
    assert load(folder, device="cpu", generation_config="none").generation_config == {}


def test_keywords_change_the_defaults_and_a_record_is_taken_as_it_is(
    tiny: Path, sampled: Path
) -> None:
    bot, plain = load(sampled, device="cpu"), load(tiny, device="cpu")
    assert bot.info()["generation_config"] == (
        "max_new_tokens 7, repetition_penalty 1.2, temperature 9.0, top_k 50, top_p 0.9"
    )
    assert plain.info()["generation_config"] == "none"
    explicit = plain.chat(WHAT, seed=3, max_new_tokens=7, **IN_FORCE)
    assert bot.chat(WHAT, seed=3).text == explicit.text
    assert bot.batch([WHAT], seed=3)[0].text == explicit.text
    greedy = plain.chat(WHAT, max_new_tokens=9)
    assert bot.chat(WHAT, Options(max_new_tokens=9)).text == greedy.text != explicit.text
    assert bot.chat(WHAT, temperature=0, repetition_penalty=1, max_new_tokens=9).text == greedy.text
    assert len(bot.chat(WHAT, temperature=0).tokens) == 7
    assert bot.default_options.max_new_tokens is None  # the default gives way to the context
    long = [{"role": "user", "content": "word " * 780}]
    left = 4096 - len(bot.prompt(long))
    bot.max_new_tokens = bot._driver.max_new_tokens = 4000
    assert 0 < left < 4000
    assert len(bot.chat(long, ignore_eos=True, temperature=0).tokens) == left


def test_a_conversation_has_the_defaults(tiny: Path, sampled: Path) -> None:
    talk = load(sampled, device="cpu").conversation()
    expected = load(tiny, device="cpu").ask("Hello", seed=3, max_new_tokens=7, **IN_FORCE)
    assert talk.ask("Hello", seed=3).text == expected.text


def test_further_end_tokens_end_an_answer(tiny: Path, tmp_path: Path) -> None:
    plain = load(tiny, device="cpu").chat(WHAT, max_new_tokens=9)
    end = plain.tokens[3]
    folder = checkpoint(tiny, tmp_path / "tiny", eos_token_id=[end, 151645, "x", -1])
    for source in ("auto", "none"):
        bot = load(folder, device="cpu", generation_config=source)
        assert bot.chat(WHAT, max_new_tokens=9, stop_ids=(1,)).finish_reason == "stop"
        assert (
            bot.chat(WHAT, max_new_tokens=9).tokens == plain.tokens[: plain.tokens.index(end) + 1]
        )
        longer = bot.chat(WHAT, max_new_tokens=9, ignore_eos=True)
        assert longer.tokens == plain.tokens


def test_fields_of_requests_win_over_the_defaults(tiny: Path, sampled: Path) -> None:
    plain = load(tiny, device="cpu")
    settings = Settings(requests_per_minute=100_000, max_tokens=5)
    with TestClient(
        create_app(load(sampled, device="cpu"), settings), base_url="http://127.0.0.1"
    ) as client:

        def text(**fields: Any) -> str:
            reply = client.post("/v1/chat/completions", json={"messages": WHAT, **fields})
            assert reply.status_code == 200, reply.text
            return str(reply.json()["choices"][0]["message"]["content"])

        assert text(seed=3) == plain.chat(WHAT, seed=3, max_new_tokens=5, **IN_FORCE).text
        assert text(seed=3, temperature=None) == text(seed=3)
        greedy = plain.chat(WHAT, max_new_tokens=5).text
        assert text(temperature=0, repetition_penalty=1.0) == greedy != text(seed=3)
        assert text(temperature=0.0, repetition_penalty=1) == greedy
        expected = IN_FORCE | {"max_new_tokens": 7}
        assert client.get("/v1/models").json()["data"][0]["generation_config"] == expected


def test_flags_win_over_the_defaults(tiny: Path, sampled: Path, tmp_path: Path) -> None:
    plain = load(tiny, device="cpu")

    def ask(*words: str) -> tuple[str, str]:
        done = CliRunner().invoke(
            app, ["ask", "-m", str(sampled), "--device", "cpu", "Hello", "--no-stream", *words]
        )
        assert done.exit_code == 0, done.output
        return done.stdout.strip(), done.stderr

    explicit = plain.ask("Hello", seed=3, max_new_tokens=7, **IN_FORCE).text
    said, shown = ask("--seed", "3")
    assert said == explicit.strip()
    assert "defaults of generation_config: max_new_tokens 7" in shown
    greedy = plain.ask("Hello", max_new_tokens=6).text.strip()
    more = ["--max-new-tokens", "6"]
    assert ask("--temperature", "0", "--repetition-penalty", "1", *more)[0] == greedy
    said, shown = ask("--generation-config", "none", *more)
    assert said == greedy and "generation_config" not in shown
    assert ask("--generation-config", str(tiny), *more)[0] == greedy

    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "question": "Hello"}))
    words = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "-m", str(sampled)]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--seed", "3"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.jsonl").read_text())["answer"] == explicit
    model = LazyModel(ModelFlags(str(sampled), device="cpu"))
    assert model.options({"top_k": 3}) == load(sampled, device="cpu").options(changes={"top_k": 3})


def test_the_light_hf_model_has_the_defaults(tiny: Path, sampled: Path, tmp_path: Path) -> None:
    def generate(folder: Path, **more: Any) -> list[int]:
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        torch.manual_seed(0)
        ids = torch.tensor([[7, 8, 9]])
        return model.generate(input_ids=ids, eos_token_id=1, **more)[0, 3:].tolist()

    explicit = {**SAMPLED, "max_new_tokens": 7}
    assert generate(sampled) == generate(tiny, **explicit)
    more = {"do_sample": False, "max_new_tokens": 9}
    assert generate(sampled, **more) == generate(tiny, **more, repetition_penalty=1.2)
    beams = checkpoint(tiny, tmp_path / "beams", num_beams=4)
    with pytest.raises(Unsupported, match="num_beams=4"):
        generate(beams)
    assert generate(beams, num_beams=1, max_new_tokens=9) == generate(tiny, max_new_tokens=9)
