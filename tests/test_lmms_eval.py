"""lmms-eval drives our server through its OpenAI-compatible model. Needs lmms-eval, best in an
environment of its own:

LMMS_EVAL=/path/to/its/bin/lmms-eval pytest tests/test_lmms_eval.py
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from llava_interleave import load
from llava_interleave.chat import locate
from tests.helpers.server import listening

pytestmark = pytest.mark.slow

PROGRAM = os.environ.get("LMMS_EVAL") or shutil.which("lmms-eval")
TASK = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function code.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 8, temperature: 0}}
process_results: !function code.results
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
CODE = """from PIL import Image

def visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]

def results(doc, said):
    return {"right": float(said[0] == doc["answer"])}
"""


@pytest.mark.skipif(
    PROGRAM is None, reason="lmms-eval is not installed; LMMS_EVAL names its program"
)
def test_lmms_eval_gets_our_answers(tmp_path: Path) -> None:
    """Eight questions with one to three images, four at once: what it scores as right is what the
    chatbot says alone.
    """
    bot, rows = load(), []
    for i in range(8):
        paths = [tmp_path / f"{i}-{j}.png" for j in range(1 + i % 3)]
        for path in paths:
            Image.new("RGB", (60 + i, 50), (30 * i, 80, 200 - 20 * i)).save(path)
        question = f"What is in the {i + 2} pictures?"
        answer = bot.ask(question, paths, max_new_tokens=8).text if i else "something else"
        rows.append({"question": question, "images": list(map(str, paths)), "answer": answer})
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "colours.yaml").write_text(TASK.format(data=tmp_path / "rows.json"))
    (tmp_path / "task" / "code.py").write_text(CODE)
    own = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "OPENAI_API_BASE": "",
    }
    with listening(locate(None, None)) as server:
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        arguments = f"base_url={url},api_key=none,model_version={locate(None, None).name},num_concurrent=4,timeout=60"
        command = [
            str(PROGRAM),
            "eval",
            "--model",
            "openai",
            "--model_args",
            arguments,
            "--tasks",
            "colours",
            "--log_samples",
        ]
        more = [
            "--include_path",
            str(tmp_path / "task"),
            "--output_path",
            str(tmp_path / "out"),
            "--batch_size",
            "4",
        ]
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, env=os.environ | own, timeout=900
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["colours"]["right,none"] == 7 / 8
